"""The trainer: the loss falls, the checkpoint is the model, bad configurations cost no time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from vae_export.trainers import checkpoint, data, fit, models
from vae_export.trainers import config as configs
from vae_export.trainers.config import ModelConfig, TrainConfig
from vae_export.trainers.objective import elbo, gaussian

from vae_export import noise
from vae_export.errors import BackendError, InputError

DIGITS = (1, 8, 8)


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_training_raises_the_held_out_elbo(tmp_path: Path, model: str, likelihood: str) -> None:
    config = ModelConfig(model=model, data_shape=DIGITS, likelihood=likelihood, latent=6, widths=(16, 32))
    results = [fit.fit(tmp_path / str(n), config, TrainConfig(epochs=n, device="cpu")) for n in (1, 4)]
    assert results[1].elbo > results[0].elbo + 1
    for result in results:
        assert result.elbo == pytest.approx(result.reconstruction - result.kl)
        assert result.kl > 0


def test_same_seed_same_model(tmp_path: Path) -> None:
    config = ModelConfig(model="mlp", data_shape=DIGITS, widths=(8,), latent=2)
    weights = []
    for index, seed in enumerate((0, 0, 1)):
        fit.fit(tmp_path / str(index), config, TrainConfig(epochs=1, seed=seed, device="cpu"))
        weights.append((tmp_path / str(index) / configs.WEIGHTS).read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_checkpoint_round_trip(checkpoints: dict[str, Path]) -> None:
    config, model = checkpoint.read(checkpoints["gaussian"])
    assert config.model.likelihood == "gaussian"
    assert not model.training
    held_out = torch.from_numpy(data.load("digits", 0).held_out)
    eps = torch.from_numpy(noise.normals(0, noise.TRAINER, 1 << 63, len(held_out), 8))
    with torch.no_grad():
        terms = elbo(model, gaussian, held_out, eps)
    assert (terms.reconstruction - terms.kl).mean().item() == pytest.approx(config.result.elbo, rel=1e-5)


def test_data_is_split_once_and_for_all() -> None:
    first, again, other = data.load("digits", 0), data.load("digits", 0), data.load("digits", 1)
    assert np.array_equal(first.held_out, again.held_out)
    assert not np.array_equal(first.held_out, other.held_out)
    assert (len(first.train), len(first.held_out)) == (1438, 359)
    assert first.train.dtype == np.float32
    assert (first.train.min(), first.train.max()) == (0.0, 1.0)
    both = np.concatenate([first.train, first.held_out]).reshape(1797, -1)
    everything = np.concatenate([other.train, other.held_out]).reshape(1797, -1)
    assert sorted(map(bytes, both)) == sorted(map(bytes, everything))


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_models_have_the_shapes_they_promise(model: str) -> None:
    for shape, widths in ((DIGITS, (4, 8)), ((3, 12, 20), (4, 6)), ((1, 28, 28), (3,))):
        for likelihood, outputs in (("bernoulli", 2), ("gaussian", 2)):
            config = ModelConfig(model=model, data_shape=shape, likelihood=likelihood, latent=7, widths=widths)
            built = models.build(config)
            mean, logvar = built.encode(torch.rand(5, *shape))
            assert mean.shape == logvar.shape == (5, 7)
            parameters = built.decode(mean)
            assert len(parameters) == outputs
            assert all(p.shape == (5, *shape) for p in parameters)


def test_log_variances_are_clamped_as_recorded() -> None:
    config = ModelConfig(model="mlp", data_shape=DIGITS, likelihood="gaussian", widths=(4,))
    model = models.build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e4)
        _, logvar = model.encode(torch.ones(8, *DIGITS))
        _, sample_logvar = model.decode(torch.ones(8, 16) * torch.arange(8)[:, None])
    assert (logvar.min().item(), logvar.max().item()) == config.logvar_clamp
    assert (sample_logvar.min().item(), sample_logvar.max().item()) == config.sample_logvar_clamp


def test_schedule() -> None:
    rates = [fit._schedule(step, 10, 100) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3
    assert all(math.isfinite(rate) for rate in rates)


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({"latent": 0}, {}, "latent is 0; expected 1 to 65,536"),
        ({"widths": ()}, {}, r"widths are \[\]; expected one or more numbers from 1"),
        ({"widths": (4, 0)}, {}, r"widths are \[4, 0\]"),
        ({"widths": (4,) * 4}, {}, "4 widths halve the image 4 times, but 8 × 8 does not divide by 16"),
        ({"data_shape": (0, 8, 8)}, {}, r"data shape is \(0, 8, 8\)"),
        ({"logvar_clamp": (5.0, -5.0)}, {}, r"logvar_clamp is \[5\.0, -5\.0\]; expected two finite, rising numbers"),
        ({"data_range": (-1.0, 1.0)}, {}, r"a Bernoulli likelihood needs data in \[0, 1\], got \[-1\.0, 1\.0\]"),
        ({"data_range": (-1.0, 1.0), "likelihood": "gaussian"}, {}, r"expects data in \[-1\.0, 1\.0\]; scikit-learn"),
        ({"data_shape": (3, 8, 8)}, {}, r"expects examples of shape \(3, 8, 8\); scikit-learn handwritten digits has"),
        ({}, {"epochs": 0}, "epochs and batch size must be 1 or more, got 0 and 64"),
        ({}, {"batch_size": 0}, "got 60 and 0"),
        ({}, {"learning_rate": 0.0}, r"learning rate must be positive, got 0\.0"),
        ({}, {"gradient_clip": 0.0}, "the gradient clip must be positive"),
        ({}, {"learning_rate": math.nan}, "learning rate must be positive, got nan"),
        ({}, {"seed": -1}, r"the seed must be from 0 to 2\^64 - 1, got -1"),
        ({}, {"data": "mnist"}, "data set 'mnist' is not known; expected 'digits'"),
    ],
)
def test_bad_configurations(tmp_path: Path, model: dict[str, Any], train: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit.fit(tmp_path / "out", ModelConfig(**{"data_shape": DIGITS} | model), TrainConfig(**train))
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_explodes_is_told(tmp_path: Path) -> None:
    config = ModelConfig(model="mlp", data_shape=DIGITS, likelihood="gaussian", widths=(8,))
    with pytest.raises(
        InputError,
        match=r"the (loss|gradient's norm|held-out loss) became (nan|-?inf) at step \d+ .*Lower the learning",
    ):
        fit.fit(tmp_path / "out", config, TrainConfig(epochs=5, learning_rate=1e30, device="cpu"))
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(
        InputError, match=r"exists already\. Choose another path, or overwrite it on purpose \(--force\)"
    ):
        fit.fit(checkpoints["gaussian"], ModelConfig(data_shape=DIGITS), TrainConfig(epochs=1))


def test_only_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("…")
    config = ModelConfig(model="mlp", data_shape=DIGITS, widths=(8,))
    with pytest.raises(InputError, match=r"is not just a checkpoint \(thesis\.txt\)\. Remove it yourself"):
        fit.fit(tmp_path, config, TrainConfig(epochs=1), overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_place_that_cannot_be_written_costs_no_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        fit.fit(tmp_path / "file" / "out", ModelConfig(data_shape=DIGITS), TrainConfig(epochs=100_000))


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA: its absence cannot be tested")
    with pytest.raises(BackendError, match=r"train: device 'cuda' with precision '32-true' is not available here: "):
        fit.fit(Path("never"), ModelConfig(data_shape=DIGITS), TrainConfig(device="cuda"))


def test_another_precision_is_used_or_refused(tmp_path: Path) -> None:
    """bfloat16 trains on the CPU; float16 does not, and is not quietly replaced."""
    config = ModelConfig(data_shape=DIGITS, widths=(8, 16))
    result = fit.fit(tmp_path / "b", config, TrainConfig(epochs=1, device="cpu", precision="bf16-mixed"))
    exact = fit.fit(tmp_path / "f", config, TrainConfig(epochs=1, device="cpu"))
    assert result.elbo != exact.elbo
    assert result.elbo == pytest.approx(exact.elbo, rel=0.1)
    with pytest.raises(BackendError, match=r"with precision '16-mixed' is not available here: .*fp16 is not supported"):
        fit.fit(tmp_path / "h", config, TrainConfig(epochs=1, device="cpu", precision="16-mixed"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "config.json").write_text("{"), r"config\.json is not a checkpoint's configuration"),
        (lambda p: (p / "config.json").unlink(), r"is not a checkpoint: expected a folder with config\.json and"),
        (lambda p: (p / "model.safetensors").write_bytes(b"junk"), r"model\.safetensors does not hold this model's"),
    ],
)
def test_damaged_checkpoints(
    checkpoints: dict[str, Path], tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    config, model = checkpoint.read(checkpoints["gaussian"])
    checkpoint.write(tmp_path / "c", config, model)
    damage(tmp_path / "c")
    with pytest.raises(InputError, match=message):
        checkpoint.read(tmp_path / "c")


def test_weights_of_another_model(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config, model = checkpoint.read(checkpoints["gaussian"])
    checkpoint.write(tmp_path / "c", config, model)
    plain = json.loads((tmp_path / "c" / configs.CONFIG).read_text())
    plain["model"]["latent"] = 9
    (tmp_path / "c" / configs.CONFIG).write_text(json.dumps(plain))
    with pytest.raises(InputError, match=r"(?s)does not hold this model's weights: .*size mismatch"):
        checkpoint.read(tmp_path / "c")
    assert msgspec.json.decode((checkpoints["gaussian"] / "config.json").read_bytes(), type=configs.CheckpointConfig)
