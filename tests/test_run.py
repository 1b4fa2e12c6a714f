"""What a run does beside lowering its loss: objectives, averages, early stopping, figures, pictures, processes."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from tensorboardX.proto.event_pb2 import Event

import vae_export
from vae_export.errors import BackendError
from vae_export.trainers import checkpoint, datasets, evaluate, plots
from vae_export.trainers import config as configs
from vae_export.trainers.batches import Batches
from vae_export.trainers.choices import ModelName
from vae_export.trainers.config import DataConfig, ModelConfig, Result, TrainConfig
from vae_export.trainers.fit import fit

DIGITS = (1, 8, 8)
MLP = ModelConfig(model="mlp", data_shape=DIGITS, likelihood="gaussian", widths=(32,), latent=4)


def train(path: Path, model: ModelConfig = MLP, data_config: DataConfig = DataConfig(), **options: Any) -> Result:  # noqa: B008
    return fit(path, model, TrainConfig(**{"epochs": 2, "importance_draws": 2, "device": "cpu"} | options), data_config)


def state_of(path: Path) -> tuple[checkpoint.State, dict[str, torch.Tensor]]:
    return checkpoint.read_state(path) or pytest.fail("no state")


def history(path: Path) -> tuple[checkpoint.Epoch, ...]:
    return state_of(path)[0].history


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "elbo", "draws": 4},
        {"objective": "elbo_monte_carlo"},
        {"objective": "importance_weighted", "draws": 5},
        {"beta": 0.5, "kl_warmup": 2},
        {"free_bits": 0.1},
        {"ema": 0.0, "gradient_clip": 10.0},
    ],
    ids=str,
)
def test_every_objective_learns(tmp_path: Path, options: dict[str, Any]) -> None:
    train(tmp_path / "run", epochs=5, **options)
    rows = history(tmp_path / "run")
    assert [row.validation_bound for row in rows] == sorted(row.validation_bound for row in rows)
    assert rows[-1].validation_bound > rows[0].validation_bound + 10
    assert all(row.validation_kl >= 0 for row in rows)


def test_the_kls_weight(tmp_path: Path) -> None:
    train(tmp_path / "warm", beta=2.0, kl_warmup=2, epochs=3)
    weights = [row.kl_weight for row in history(tmp_path / "warm")]
    assert weights == [pytest.approx(2 * 19 / 40), pytest.approx(2 * 39 / 40), 2.0]
    kls = {}
    for beta in (0.1, 10.0):
        train(tmp_path / str(beta), beta=beta, epochs=5)
        kls[beta] = history(tmp_path / str(beta))[-1].validation_kl
    assert kls[10.0] < kls[0.1] / 2


def test_free_bits_keep_latents_in_use(tmp_path: Path) -> None:
    """Where the likelihood is so wide that nothing is worth coding, only the free part is coded."""
    wide = ModelConfig(
        model="mlp", data_shape=DIGITS, likelihood="gaussian_fixed", variance=50.0, widths=(32,), latent=4
    )
    kl = {free: train(tmp_path / str(free), wide, epochs=15, free_bits=free).kl for free in (0.0, 0.05)}
    assert (kl[0.05] or 0) > 5 * (kl[0.0] or 0)


def test_averaged_weights(tmp_path: Path) -> None:
    train(tmp_path / "none", ema=0.0)
    _, tensors = state_of(tmp_path / "none")
    names = [name.partition("/")[2] for name in tensors if name.startswith("model/")]
    assert all(torch.equal(tensors[f"model/{name}"], tensors[f"average/{name}"]) for name in names)
    train(tmp_path / "some", ema=0.99)
    _, tensors = state_of(tmp_path / "some")
    assert not any(torch.equal(tensors[f"model/{name}"], tensors[f"average/{name}"]) for name in names)
    kept = checkpoint.read_weights(tmp_path / "some")
    assert all(torch.equal(tensors[f"average/{name}"], kept[name]) for name in names)  # its best epoch is its last


def few(path: Path, rows: int = 60) -> DataConfig:
    """Some digits in an array: few enough to be learned by heart."""
    part = datasets.load(DataConfig(), 0).train
    np.save(path, part.read(np.arange(rows)))
    return DataConfig(spec=f"array:{path}")


def test_early_stopping_and_the_best_weights(tmp_path: Path) -> None:
    config = few(tmp_path / "x.npy")
    options = {"epochs": 400, "learning_rate": 1e-2, "ema": 0.9}
    result = train(tmp_path / "run", data_config=config, patience=5, **options)
    rows = history(tmp_path / "run")
    assert len(rows) < 400
    scores = [row.validation_bound for row in rows]
    assert result.epoch == int(np.argmax(scores)) + 1 == len(rows) - 5
    # The weights in the folder are those of that epoch: another run that ends there has them.
    shorter = fit(
        tmp_path / "again",
        MLP,
        TrainConfig(importance_draws=2, device="cpu", patience=1000, **options),
        config,
        resume=True,
    )
    assert shorter.epoch != len(history(tmp_path / "again"))
    last = train(tmp_path / "last", data_config=config, patience=5, keep="last", **options)
    assert last.epoch == len(rows)
    assert fit(
        tmp_path / "run", MLP, TrainConfig(importance_draws=2, device="cpu", patience=5, **options), config, resume=True
    ) == result  # fmt: skip


def test_the_result_is_that_of_the_kept_weights(tmp_path: Path) -> None:
    result = train(tmp_path / "run", epochs=3, importance_draws=8)
    config, model = checkpoint.read(tmp_path / "run")
    assert config.result == result
    test = datasets.load(DataConfig(), 0).test
    x = torch.from_numpy(test.read(np.arange(len(test))))
    with torch.no_grad():
        mean, logvar = model.encode(x)
        q = torch.distributions.Normal(mean.double(), (0.5 * logvar.double()).exp())
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
        error = (model.decode(mean)[0] - x).square().sum() / len(x)
    assert result.kl == pytest.approx(kl.sum(1).mean().item(), rel=1e-5)
    assert result.kl_by_dimension == pytest.approx(kl.mean(0).tolist(), rel=1e-5)
    assert result.active_units == int((mean.var(0, correction=0) > 0.01).sum())
    assert result.squared_error == pytest.approx(error.item(), rel=1e-5)
    assert result.elbo == pytest.approx((result.reconstruction or 0) - (result.kl or 0))
    assert (result.log_likelihood or 0) > (result.elbo or 0)
    assert result.log_likelihood_examples == len(test) == 359


def test_bits_per_dimension() -> None:
    """Against the probability of discrete data under distributions that are known."""
    dataset = datasets.load(DataConfig(), 0)
    values = 64
    model = ModelConfig(data_shape=DIGITS, likelihood="discretized_logistic")
    uniform = values * math.log(1 / 256)
    assert evaluate.bits_per_dimension(uniform, dataset.quantized(), model, DataConfig()) == pytest.approx(8.0)
    bernoulli = ModelConfig(data_shape=DIGITS)
    coin = values * math.log(0.5)
    binary = datasets.load(DataConfig(binarize="static"), 0)
    assert evaluate.bits_per_dimension(coin, binary, bernoulli, DataConfig(binarize="static")) == pytest.approx(1.0)
    assert evaluate.bits_per_dimension(coin, dataset, bernoulli, DataConfig()) is None  # grey values are no code
    gaussian = ModelConfig(data_shape=DIGITS, likelihood="gaussian")
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        config = DataConfig(dequantize=True, range=(low, high))
        density = values * stats.uniform(low, high - low).logpdf((low + high) / 2)
        bits = evaluate.bits_per_dimension(density, datasets.load(config, 0), gaussian, config)
        assert bits == pytest.approx(math.log2(17))  # digits have 17 levels


def test_collapse_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = ModelConfig(
        model="mlp", data_shape=DIGITS, likelihood="gaussian_fixed", variance=50.0, widths=(8,), latent=5
    )
    train(tmp_path / "run", wide, epochs=5)
    said = capsys.readouterr().err
    assert "warning: posterior collapse: 5 of 5 latent dimensions are inactive" in said
    assert "try --kl-warmup 20, --free-bits 0.1" in said
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["warnings"][0].startswith("posterior collapse")
    train(tmp_path / "fine", epochs=20)
    assert "collapse" not in capsys.readouterr().err


def events(path: Path) -> list[Event]:
    """The TensorBoard events of a run."""
    (file,) = (path / "tensorboard").iterdir()
    raw, read = file.read_bytes(), []
    while raw:
        (length,) = struct.unpack("<Q", raw[:8])
        read.append(Event.FromString(raw[12 : 12 + length]))
        raw = raw[16 + length :]
    return read


def test_figures_and_logs(tmp_path: Path) -> None:
    result = train(tmp_path / "run", epochs=3)
    plain = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert msgspec.convert(plain["result"], Result) == result
    assert plain["split"]["train"] == 1258
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["validation_bound"]) for row in rows] == [e["validation_bound"] for e in plain["history"]]
    scalars: dict[str, list[tuple[int, float]]] = {}
    for event in events(tmp_path / "run"):
        for value in event.summary.value:
            if not value.tag.startswith("pictures/"):
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert set(scalars) == {
        *("train/bound", "train/reconstruction", "train/kl", "validation/bound", "validation/reconstruction"),
        *("validation/kl", "run/learning_rate", "run/kl_weight", "run/images_per_second"),
    }
    expected = [(row["step"], pytest.approx(row["validation_bound"], rel=1e-6)) for row in plain["history"]]
    assert scalars["validation/bound"] == expected


@pytest.mark.parametrize("data", ["digits", "photos"])
def test_pictures_in_tensorboard(tmp_path: Path, data: str) -> None:
    """Grey and in colour: those of the run's folder, as they are at the end, pixel by pixel."""
    config = DataConfig(spec=data, size=None if data == "digits" else (32, 32))
    shape = datasets.load(config, 0).shape
    train(tmp_path / "run", msgspec.structs.replace(MLP, data_shape=shape, widths=(8,)), config, epochs=1)
    steps: dict[str, int] = {}
    for event in events(tmp_path / "run"):
        for value in event.summary.value:
            kind, _, name = value.tag.partition("/")
            if kind == "pictures":
                steps[name] = event.step
                with (
                    Image.open(io.BytesIO(value.image.encoded_image_string)) as shown,
                    Image.open(tmp_path / "run" / "pictures" / f"{name}.png") as written,
                ):
                    assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(written.convert("RGB")))
                    assert (value.image.width, value.image.height) == written.size
    assert set(steps) == {"reconstructions", "samples", "interpolation"}
    assert set(steps.values()) == {history(tmp_path / "run")[-1].step}


@pytest.mark.parametrize(("objective", "figure"), [("elbo", "bound -?[0-9.]+ nats"), ("autoencoder", "squared error")])
def test_the_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str, figure: str) -> None:
    """Says the epoch, and the last validation figure, within 80 columns."""
    model = MLP
    if objective == "autoencoder":
        model = msgspec.structs.replace(MLP, posterior="deterministic", likelihood="none")
    train(tmp_path / "run", model, objective=objective)
    first = history(tmp_path / "run")[0].validation_bound
    shown = f"{first:.2f}" if objective == "elbo" else f"{-first:.3g}"
    assert re.search(rf"epoch 2/2 .*{figure}.*, validation {re.escape(shown)}, .*images/s\n", capsys.readouterr().err)


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a VAE with a latent plane, while it trains and at its end; an autoencoder has no prior to draw from."""
    plane = msgspec.structs.replace(MLP, latent=2)
    drawn: list[int] = []
    write = plots.write
    monkeypatch.setattr(plots, "write", lambda *args: drawn.append(len(args[3])) or write(*args))
    fit(tmp_path / "vae", plane, TrainConfig(epochs=3, importance_draws=1, device="cpu"), picture_seconds=0.0)
    assert drawn == [1, 2, 3, 3]
    assert {path.name for path in (tmp_path / "vae" / "pictures").iterdir()} == set(checkpoint.CAPTIONS)
    for path in (tmp_path / "vae" / "pictures").iterdir():
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5  # something is on it
    flat = msgspec.structs.replace(plane, posterior="deterministic", likelihood="none")
    result = train(tmp_path / "plain", flat, objective="autoencoder")
    assert result.elbo is None
    assert result.squared_error
    assert {path.name for path in (tmp_path / "plain" / "pictures").iterdir()} == {
        *("curves.png", "latents.png", "reconstructions.png", "interpolation.png"),
    }


def test_the_manifold_is_the_unit_square_through_the_inverse_normal() -> None:
    points = plots.manifold(4).reshape(4, 4, 2)
    quantiles = stats.norm.ppf([0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(points[0, :, 0], quantiles, rtol=1e-6)
    np.testing.assert_allclose(points[:, 0, 1], quantiles[::-1], rtol=1e-6)


def test_an_autoencoder_is_exported_and_runs(tmp_path: Path) -> None:
    flat = msgspec.structs.replace(MLP, latent=2, posterior="deterministic", likelihood="none")
    train(tmp_path / "plain", flat, objective="autoencoder", epochs=5)
    assert vae_export.export(tmp_path / "plain", tmp_path / "b").passed
    with vae_export.load(tmp_path / "b") as vae:
        assert vae.model.posterior.kind == "deterministic"
        test = datasets.load(DataConfig(), 0).test
        x = test.read(np.arange(359))
        error = ((vae.reconstruct(x) - x) ** 2).sum() / 359
    config = configs.read(tmp_path / "plain")
    assert config.result
    assert error == pytest.approx(config.result.squared_error, rel=1e-4)


def test_the_model_card_shows_the_training(tmp_path: Path) -> None:
    result = train(tmp_path / "run")
    vae_export.export(tmp_path / "run", tmp_path / "b")
    card = (tmp_path / "b" / "README.md").read_text()
    assert f"| test ELBO | {result.elbo:.2f} nats |" in card
    for name in ("curves.png", "reconstructions.png", "samples.png", "interpolation.png"):
        assert f"](training/{name})" in card
        assert (tmp_path / "b" / "training" / name).read_bytes() == (tmp_path / "run" / "pictures" / name).read_bytes()
    assert vae_export.verify(tmp_path / "b").passed


@pytest.mark.parametrize(("model", "likelihood"), [("conv", "gaussian_fixed"), ("resnet", "discretized_logistic")])
def test_photographs(tmp_path: Path, model: ModelName, likelihood: str) -> None:
    """Real pictures in colour, in a range that is not [0, 1], from training to a bundle."""
    config = configs.model_config(
        model, data_shape=(3, 16, 16), data_range=(-1.0, 1.0), likelihood=likelihood, widths=(4, 8), latent=2
    )
    options = DataConfig(spec="photos", range=(-1.0, 1.0), flip=True)
    result = train(tmp_path / "run", config, options, epochs=1)
    assert (result.bits_per_dimension is not None) == (likelihood == "discretized_logistic")
    if result.bits_per_dimension:
        assert 1 < result.bits_per_dimension < 9  # 8 is what a uniform distribution needs
    assert vae_export.export(tmp_path / "run", tmp_path / "b").passed


def test_shares_of_a_step_are_the_step() -> None:
    """Two or three processes together read what one reads, with the same noise, in every step of an epoch."""
    part = datasets.load(DataConfig(flip=True, dequantize=True), 0).train
    for processes in (2, 3):
        whole = Batches(part, TrainConfig(batch_size=20 * processes, draws=2), (4,))
        parts = [Batches(part, TrainConfig(batch_size=20, draws=2), (4,), rank, processes) for rank in range(processes)]
        assert all(batches.steps_per_epoch == whole.steps_per_epoch for batches in parts)
        for step in (0, 5, whole.steps_per_epoch - 1, whole.steps_per_epoch):
            expected, shares = whole[step], [batches[step] for batches in parts]
            assert all(share.total == expected.total for share in shares)
            assert torch.equal(torch.cat([share.x[: share.count] for share in shares]), expected.x)
            assert torch.equal(torch.cat([share.eps[:, : share.count] for share in shares], 1), expected.eps)
    tiny = msgspec.structs.replace(TrainConfig(), batch_size=629)  # the last step has none for the second process
    last = Batches(part, msgspec.structs.replace(tiny, batch_size=1257), (4,), 1, 2)
    assert (last[0].count, len(last[0].x)) == (629, 629)
    empty = Batches(
        datasets.Subset(part.rows, part.indices[:3], None, part.transform), TrainConfig(batch_size=1), (4,), 1, 2
    )
    assert (empty[1].count, empty[1].total, len(empty[1].x)) == (0, 1, 1)


def test_batches_made_ahead_are_the_same() -> None:
    batches = Batches(datasets.load(DataConfig(binarize="dynamic"), 0).train, TrainConfig(), (4,))
    for batch, step in zip(batches.ahead(range(15, 45), workers=3), range(15, 45), strict=True):
        assert torch.equal(batch.x, batches[step].x)
        assert torch.equal(batch.eps, batches[step].eps)


CHECKED = """
import gc, torch
from torch.nn.parallel import DistributedDataParallel
destroy = torch.distributed.destroy_process_group
def checked():
    assert not any(isinstance(one, DistributedDataParallel) for one in gc.get_objects()), "a reducer outlives its group"
    print("the reducer was released")
    destroy()
torch.distributed.destroy_process_group = checked
from vae_export.commands.app import main
main()
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """20 steps of two processes with 32 examples each and of one with 64: the same weights, to rounding."""
    options = ["--free-bits", 0.2, "--draws", 2, "--flip", "--importance-draws", 2, "--batch-size", 32]
    arguments = ["train", "two", "--model", "conv", "--widths", "8,16", "--epochs", 1, "--device", "cpu", "--seed", 3]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port, "checked.py"]
    (tmp_path / "checked.py").write_text(CHECKED)
    done = subprocess.run(
        [sys.executable, *map(str, [*command, *arguments, *options])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two: test ELBO") == 1
    assert done.stdout.count("the reducer was released") == 2
    model = configs.model_config("conv", data_shape=DIGITS, widths=(8, 16))
    train(tmp_path / "one", model, DataConfig(flip=True), free_bits=0.2, draws=2, epochs=1, seed=3)
    (one, first), (two, second) = (state_of(tmp_path / name) for name in ("one", "two"))
    assert (one.step, one.processes, two.step, two.processes) == (20, 1, 20, 2)
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-6)
    a, b = (configs.read(tmp_path / name).result for name in ("one", "two"))
    assert a
    assert b
    assert a.elbo == pytest.approx(b.elbo, rel=1e-5)
    assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-5)
    assert history(tmp_path / "one")[0].train_bound == pytest.approx(history(tmp_path / "two")[0].train_bound, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler warns of PyTorch
def test_compiled(tmp_path: Path) -> None:
    """With torch.compile the same figures to rounding; without a compiler, words."""
    if not shutil.which("g++"):
        with pytest.raises(BackendError, match=r"torch\.compile does not work here: "):
            train(tmp_path / "compiled", epochs=1, compile=True)
        pytest.skip("no C++ compiler")
    tiny = msgspec.structs.replace(MLP, widths=(8,))
    eager = train(tmp_path / "eager", tiny, epochs=1)
    compiled = train(tmp_path / "compiled", tiny, epochs=1, compile=True)
    assert compiled.elbo == pytest.approx(eager.elbo, rel=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_compiler(tmp_path: Path) -> None:
    from torch._inductor import config

    tiny = ModelConfig(model="mlp", data_shape=DIGITS, widths=(8,), latent=3)
    with (
        config.patch({"cpp.cxx": ("/nowhere/g++",), "fx_graph_cache": False}),
        pytest.raises(BackendError, match=r"torch\.compile does not work here: .*Leave --compile out"),
    ):
        train(tmp_path / "run", tiny, epochs=1, compile=True)
