"""The trainer: the loss falls, the checkpoint is the model, bad configurations cost no time."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import typer

from vae_export.commands.train import default, train
from vae_export.errors import BackendError, InputError
from vae_export.numerics import noise
from vae_export.trainers import checkpoint, datasets, fit, schedule
from vae_export.trainers import config as configs
from vae_export.trainers.config import DataConfig, ModelConfig, TrainConfig
from vae_export.trainers.objective import Objective, elbo, gaussian

DIGITS = (1, 8, 8)


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_training_raises_the_held_out_elbo(tmp_path: Path, model: str, likelihood: str) -> None:
    config = ModelConfig(model=model, data_shape=DIGITS, likelihood=likelihood, latent=6, widths=(8, 16))
    result = fit.fit(tmp_path / "run", config, TrainConfig(epochs=3, importance_draws=1, device="cpu"))
    first, _, last = (checkpoint.read_state(tmp_path / "run") or pytest.fail("no state"))[0].history
    assert last.validation_bound > first.validation_bound + 1
    assert result.elbo == pytest.approx(last.validation_bound, rel=0.2)  # of other examples
    for bound, reconstruction, kl in (
        (result.elbo, result.reconstruction, result.kl),
        *((row.validation_bound, row.validation_reconstruction, row.validation_kl) for row in (first, last)),
    ):
        assert bound == pytest.approx(reconstruction - kl)
        assert kl > 0


def test_same_seed_same_model(tmp_path: Path) -> None:
    config = ModelConfig(model="mlp", data_shape=DIGITS, widths=(8,), latent=2)
    weights = []
    for index, seed in enumerate((0, 0, 1)):
        train = TrainConfig(epochs=1, importance_draws=1, seed=seed, device="cpu")
        fit.fit(tmp_path / str(index), config, train)
        weights.append((tmp_path / str(index) / configs.WEIGHTS).read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_checkpoint_round_trip(checkpoints: dict[str, Path]) -> None:
    config, model = checkpoint.read(checkpoints["gaussian"])
    assert config.model.likelihood == "gaussian"
    assert not model.training
    test = datasets.load(DataConfig(), 0).test
    held_out = torch.from_numpy(test.read(np.arange(len(test))))
    eps = torch.from_numpy(noise.normals(0, noise.TRAINER, 0, len(held_out), 8, datasets.TEST))
    with torch.no_grad():
        terms = elbo(model, gaussian, held_out, eps)
    assert (terms.reconstruction - terms.kl).mean().item() == pytest.approx(config.result.elbo, rel=1e-5)


def test_schedule() -> None:
    rates = [schedule.learning_rate(step, 10, 100) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3
    assert all(math.isfinite(rate) for rate in rates)
    assert schedule.learning_rate(0, 100, 20) == 0.5  # warm-up is a tenth of all steps at most
    assert schedule.learning_rate(0, 100, 1) == 1.0


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({"latent": 0}, {}, "latent is 0; expected 1 to 65,536"),
        ({"widths": ()}, {}, r"widths is \[\]; expected one or more of 1 to 65,536"),
        ({"model": "linear"}, {}, r"model 'linear' has no hidden layers, got widths \[64, 128\]"),
        ({"model": "linear", "widths": ()}, {}, "'linear' is probabilistic PCA, whose likelihood is 'gaussian_fixed'"),
        ({"model": "resnet", "blocks": 0}, {}, "blocks is 0; expected 1 to 64"),
        ({"blocks": 2}, {}, "blocks and attention belong to model 'resnet', got them for 'conv'"),
        ({"attention": True}, {}, "blocks and attention belong to model 'resnet', got them for 'conv'"),
        ({"model": "resnet", "widths": (4,) * 5}, {}, "5 widths of 'resnet' halve the image 4 times, but 8 × 8 is"),
        ({"variance": 0.1}, {}, "variance belongs to likelihood 'gaussian_fixed', got 'bernoulli'"),
        ({"variance": 0.0, "likelihood": "gaussian_fixed"}, {}, r"variance is 0\.0; expected a positive number"),
        ({"likelihood": "none"}, {}, "a deterministic posterior and likelihood 'none' belong together"),
        ({"posterior": "deterministic", "likelihood": "none"}, {}, "objective 'elbo' does not fit a 'deterministic'"),
        ({}, {"objective": "autoencoder"}, "objective 'autoencoder' does not fit a 'diagonal_gaussian' posterior"),
        ({"log_scale_clamp": (1.0, 1.0)}, {}, r"log_scale_clamp is \[1\.0, 1\.0\]"),
        ({"widths": (4, 0)}, {}, r"widths is \[4, 0\]"),
        ({"widths": (4,) * 4}, {}, "4 widths of 'conv' halve the image 4 times, but 8 × 8 is not divisible by 16"),
        ({"data_shape": (0, 8, 8)}, {}, r"data_shape is \(0, 8, 8\); expected \(C, H, W\), each 1 or more"),
        ({"logvar_clamp": (5.0, -5.0)}, {}, r"logvar_clamp is \[5\.0, -5\.0\]; expected two finite, rising numbers"),
        ({"data_range": (-1.0, 1.0)}, {}, r"a Bernoulli likelihood needs data in \[0, 1\], got \[-1\.0, 1\.0\]"),
        ({"data_range": (-1.0, 1.0), "likelihood": "gaussian"}, {}, r"expects data in \[-1\.0, 1\.0\]; scikit-learn"),
        ({"data_shape": (3, 8, 8)}, {}, r"expects examples of shape \(3, 8, 8\); scikit-learn handwritten digits has"),
        ({}, {"epochs": 0}, "epochs is 0; expected 1 or more"),
        ({}, {"batch_size": 0}, "batch_size is 0; expected 1 or more"),
        ({}, {"learning_rate": 0.0}, r"learning_rate is 0\.0; expected a positive number"),
        ({}, {"gradient_clip": 0.0}, r"gradient_clip is 0\.0; expected a positive number"),
        ({}, {"weight_decay": -1.0}, r"weight_decay is -1\.0; expected 0 or a positive number"),
        ({}, {"learning_rate": math.nan}, "learning_rate is nan; expected a positive number"),
        ({}, {"warmup": -1}, "warmup is -1; expected 0 or more"),
        ({}, {"kl_warmup": -1}, "kl_warmup is -1; expected 0 or more"),
        ({}, {"patience": -1}, "patience is -1; expected 0 or more"),
        ({}, {"draws": 0}, "draws is 0; expected 1 to 65,536"),
        ({}, {"importance_draws": 0}, "importance_draws is 0"),
        ({}, {"ema": 1.0}, r"ema is 1\.0; expected at least 0 and less than 1"),
        ({}, {"beta": 0.0}, r"beta is 0\.0; expected a positive number"),
        ({}, {"free_bits": -0.1}, r"free_bits is -0\.1; expected 0 or a positive number"),
        (
            {},
            {"free_bits": 0.1, "objective": "importance_weighted"},
            "'importance_weighted' has no separate KL term: leave out beta",
        ),
        ({}, {"beta": 2.0, "objective": "autoencoder"}, "leave out beta, kl_warmup and free_bits"),
        ({}, {"free_bits": 0.1, "objective": "elbo_monte_carlo"}, "free_bits needs the KL of each dimension in closed"),
        ({}, {"draws": 2, "objective": "autoencoder"}, "an autoencoder draws no samples: draws must be 1, got 2"),
        ({}, {"seed": -1}, r"seed is -1; expected 0 to 2\^64 - 1"),
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
        match=r"the (loss|gradient norm|validation bound) became (nan|-?inf) at step \d+ .*No checkpoint has been "
        r"written yet\. Lower the learning",
    ):
        fit.fit(tmp_path / "out", config, TrainConfig(epochs=5, learning_rate=1e30, device="cpu"))
    assert not configs.is_checkpoint(tmp_path / "out")


def test_nothing_is_overwritten(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config, train = ModelConfig(data_shape=DIGITS), TrainConfig(epochs=1)
    with pytest.raises(
        InputError,
        match=r"exists already\. Continue its run \(--resume\), replace it \(--force\), or choose another folder",
    ):
        fit.fit(checkpoints["gaussian"], config, train)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match=r"exists already\. Choose another path, or overwrite it on purpose \(--force"):
        fit.fit(tmp_path, config, train)


def test_only_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("…")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "mine.png").touch()
    config = ModelConfig(model="mlp", data_shape=DIGITS, widths=(8,))
    with pytest.raises(InputError, match=r"is not just a run: it also has pictures/mine\.png, thesis\.txt\. Remove"):
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
    few: dict[str, Any] = {"epochs": 1, "importance_draws": 1, "device": "cpu"}
    result = fit.fit(tmp_path / "b", config, TrainConfig(precision="bf16-mixed", **few))
    exact = fit.fit(tmp_path / "f", config, TrainConfig(**few))
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
    shutil.copytree(checkpoints["gaussian"], tmp_path / "c")
    damage(tmp_path / "c")
    with pytest.raises(InputError, match=message):
        checkpoint.read(tmp_path / "c")


def test_weights_of_another_model(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["gaussian"], tmp_path / "c")
    plain = json.loads((tmp_path / "c" / configs.CONFIG).read_text())
    plain["model"]["latent"] = 9
    (tmp_path / "c" / configs.CONFIG).write_text(json.dumps(plain))
    with pytest.raises(InputError, match=r"(?s)does not hold this model's weights: .*size mismatch"):
        checkpoint.read(tmp_path / "c")
    assert msgspec.json.decode((checkpoints["gaussian"] / "config.json").read_bytes(), type=configs.CheckpointConfig)


def test_another_programs_model_is_no_run(tmp_path: Path) -> None:
    """The names of our files are those of others, too."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"config\.json is not a checkpoint's configuration"):
        fit.fit(tmp_path, ModelConfig(data_shape=DIGITS), TrainConfig(epochs=1), overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_links_are_not_followed(tmp_path: Path) -> None:
    config = ModelConfig(model="mlp", data_shape=DIGITS, widths=(8,))
    train = TrainConfig(epochs=1, importance_draws=1, device="cpu")
    fit.fit(tmp_path / "run", config, train)
    (tmp_path / "mine").mkdir()
    shutil.rmtree(tmp_path / "run" / "pictures")
    (tmp_path / "run" / "pictures").symlink_to(tmp_path / "mine")
    (tmp_path / "mine" / "samples.png").touch()
    with pytest.raises(InputError, match=r"is not just a run: it also has pictures\. Remove"):
        fit.fit(tmp_path / "run", config, train, overwrite=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["samples.png"]


def test_what_fails_at_once_leaves_the_old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(model="mlp", data_shape=DIGITS, widths=(8,))
    train = TrainConfig(epochs=1, importance_draws=1, device="cpu")
    fit.fit(tmp_path / "run", config, train)
    before = (tmp_path / "run" / configs.WEIGHTS).read_bytes()

    def no_memory(*args: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")

    monkeypatch.setattr(Objective, "forward", no_memory)
    with pytest.raises(InputError, match=r"not enough memory: DefaultCPU.*Use a smaller --batch-size"):
        fit.fit(tmp_path / "run", config, train, overwrite=True)
    assert (tmp_path / "run" / configs.WEIGHTS).read_bytes() == before


def test_resuming_and_replacing_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--resume continues a run, --force replaces it"):
        fit.fit(tmp_path, ModelConfig(data_shape=DIGITS), resume=True, overwrite=True)


def test_a_run_does_not_lie_in_its_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lies in the folder of the training pictures\. Choose a folder outside"):
        fit.fit(tmp_path / "run", ModelConfig(data_shape=DIGITS), data_config=DataConfig(spec=f"images:{tmp_path}"))


def test_configurations_show_what_is_not_the_default() -> None:
    assert repr(DataConfig()) == "DataConfig()"
    assert repr(TrainConfig(epochs=3, beta=1.0)) == "TrainConfig(epochs=3)"
    assert repr(ModelConfig(data_shape=DIGITS)) == "ModelConfig(data_shape=(1, 8, 8))"
    shown = repr(datasets.load(DataConfig(), 0))
    assert shown.startswith(
        "Dataset(name='scikit-learn handwritten digits', shape=(1, 8, 8), range=(0.0, 1.0), levels=17"
    )
    assert "train=Subset(1,258 of 1,797 examples)" in shown


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (DataConfig(channels=2), r"Invalid enum value 2 - at `\$\.channels`"),  # type: ignore[arg-type]
        (TrainConfig(objective="map"), r"Invalid enum value 'map' - at `\$\.objective`"),  # type: ignore[arg-type]
        (TrainConfig(epochs=1.5), r"Expected `int`, got `float` - at `\$\.epochs`"),  # type: ignore[arg-type]
        (DataConfig(spec="images:a\udcff"), r"characters that cannot be written|surrogates"),
        (
            DataConfig(validation=0.0),
            r"validation, test is \(0\.0, 0\.2\); expected positive shares whose sum is below 1",
        ),
        (DataConfig(size=(0, 8)), r"size is \[0, 8\]; expected height and width from 1"),
        (DataConfig(binarize="static", range=(-1.0, 1.0)), r"binarization needs data in \[0, 1\]"),
        (DataConfig(binarize="static", dequantize=True), "binarized data has no levels left to dequantize"),
    ],
)
def test_records_are_checked(record: DataConfig | TrainConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        record.check()


@pytest.mark.parametrize(
    ("data_config", "likelihood", "message"),
    [
        (
            {"dequantize": True},
            "bernoulli",
            "dequantized data is continuous, and a Bernoulli likelihood needs 0s and 1s",
        ),
        ({"binarize": "static"}, "gaussian", "binarized data needs likelihood 'bernoulli', got 'gaussian'"),
        ({"dequantize": True}, "discretized_logistic", "'discretized_logistic' needs data with 256 levels"),
    ],
)
def test_data_and_likelihood_fit(tmp_path: Path, data_config: dict[str, Any], likelihood: str, message: str) -> None:
    model = ModelConfig(data_shape=DIGITS, likelihood=likelihood)
    with pytest.raises(InputError, match=message):
        fit.fit(tmp_path / "run", model, data_config=DataConfig(**data_config))
    assert not (tmp_path / "run").exists()


def test_mixed_precision_sees_the_data_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only layers compute in bfloat16: neither data, noise nor sums are rounded to it."""
    seen: set[torch.dtype] = set()
    forward = Objective.forward

    def note(self: Any, x: torch.Tensor, eps: torch.Tensor) -> Any:
        bound = forward(self, x, eps)
        seen.update(tensor.dtype for tensor in (x, eps, *bound))
        return bound

    monkeypatch.setattr(Objective, "forward", note)
    config = ModelConfig(model="mlp", data_shape=DIGITS, likelihood="discretized_logistic", widths=(16,))
    for precision in ("32-true", "bf16-mixed"):
        options = TrainConfig(epochs=2, device="cpu", precision=precision, importance_draws=1, learning_rate=1e-9)
        fit.fit(tmp_path / precision, config, options)
    assert seen == {torch.float32}
    (bf16, full) = (checkpoint.read_state(tmp_path / p) for p in ("bf16-mixed", "32-true"))
    assert bf16
    assert full
    assert bf16[0].history[0].train_bound == pytest.approx(full[0].history[0].train_bound, rel=2e-3)


def test_the_help_says_defaults_and_sentences(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Each option's help is a sentence of its own; defaults are those of the records, which differ between models."""
    shown = run("train", "--help", COLUMNS="400").stdout
    assert "Peak learning rate of AdamW. [default: (linear: 0.01; mlp, resnet: 0.001; conv: 0.002)]" in shown
    assert "Linear warm-up, in steps; at most a tenth of all. [default: (100)]" in shown
    for option, text in {
        "--epochs": "linear: 500; mlp, conv, resnet: 60",
        "--widths": "linear: none; mlp: 512; conv: 64,128; resnet: 32,64",
        "--attention": "off",
        "--variance": "learned",
        "--range": "0,1",
        "--data": "digits",
    }.items():
        (line,) = (line for line in shown.splitlines() if f"│ {option} " in line)
        assert line.rstrip(" │").endswith(f"[default: ({text})]")
    app = typer.Typer(add_completion=False)
    app.command()(train)
    options = [
        parameter
        for parameter in typer.main.get_command(app).params
        if parameter.name not in ("out", "resume", "force", "download")
    ]
    assert len(options) > 30
    for option in options:
        assert re.fullmatch(r"[A-Z].{15,}\.", option.help or ""), option.name
        assert default(option.name or "")
