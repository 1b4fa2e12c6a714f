"""Nothing is lost: stopped, killed, out of room or diverged, a run goes on where it was, or says why not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from conftest import ROOT
from kills import difference

from vae_export.errors import InputError
from vae_export.trainers import checkpoint, evaluate, models
from vae_export.trainers import config as configs
from vae_export.trainers.batches import Batches
from vae_export.trainers.config import DataConfig, ModelConfig, Result, TrainConfig, model_config, train_config
from vae_export.trainers.fit import fit

DIGITS = (1, 8, 8)
#: Each model, with what else is random or has a memory.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "linear": ({}, {}, {"flip": True}),
    "mlp": ({"widths": (32,)}, {"draws": 2, "kl_warmup": 2}, {"binarize": "dynamic"}),
    "conv": ({"widths": (8, 16)}, {"free_bits": 0.1, "keep": "last"}, {"dequantize": True}),
    "resnet": ({"widths": (8, 16), "attention": True}, {"objective": "importance_weighted", "draws": 3}, {}),
}


@pytest.fixture(scope="module", autouse=True)
def few(tmp_path_factory: pytest.TempPathFactory) -> None:
    """160 digits as the files of MNIST: 115 to train on, 15 steps of 8 an epoch."""
    from sklearn.datasets import load_digits

    folder, digits = tmp_path_factory.mktemp("few"), (load_digits().images[:160] * 15).astype(np.uint8)
    for part, rows in (("train", digits[:128]), ("t10k", digits[128:])):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x0803, *rows.shape) + rows.tobytes())
    for _, _, data in RUNS.values():
        data["spec"] = f"mnist:{folder}"


def train(path: Path, name: str, **options: Any) -> Result:
    model, run, data = RUNS[name]
    return fit(
        path,
        model_config(name, data_shape=DIGITS, **model),
        train_config(name, **{"epochs": 3, "batch_size": 8, "importance_draws": 2, "device": "cpu", **run}),
        DataConfig(**data),
        **options,
    )


@contextlib.contextmanager
def at_step(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Do something as the batch of a step is made."""
    with pytest.MonkeyPatch.context() as patch:
        before = Batches.__getitem__

        def item(batches: Batches, index: int) -> object:
            if index == step:
                act()
            return before(batches, index)

        patch.setattr(Batches, "__getitem__", item)
        yield


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_resumed_equals_uninterrupted(tmp_path: Path, name: str) -> None:
    """Stopped inside the first epoch, at an epoch's last step and inside the last: all tensors to the bit."""
    whole = train(tmp_path / "whole", name)
    for step in (6, 29, 33):
        with pytest.raises(SystemExit) as stopped, at_step(step, send(signal.SIGTERM)):
            train(tmp_path / "stopped", name, resume=True)
        assert stopped.value.code == 143
        state, _ = checkpoint.read_state(tmp_path / "stopped") or pytest.fail("no state")
        assert state.step == step + 1
    resumed = train(tmp_path / "stopped", name, resume=True)
    assert difference(tmp_path / "whole", tmp_path / "stopped") is None
    assert resumed == whole
    assert train(tmp_path / "stopped", name, resume=True) == whole  # it has ended: nothing is done again
    curves = [(tmp_path / path / "metrics.csv").read_text().splitlines() for path in ("whole", "stopped")]
    assert len(curves[0]) == 4
    assert curves[0][0].endswith(",images_per_second")  # all but the speed is the same
    assert [line.rpartition(",")[0] for line in curves[0]] == [line.rpartition(",")[0] for line in curves[1]]


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        config = TrainConfig(epochs=1, batch_size=400, importance_draws=1, device="cpu", seed=seed)
        fit(tmp_path / name, ModelConfig(model="mlp", data_shape=DIGITS, widths=(8,)), config)
    assert "differs" in (difference(tmp_path / "a", tmp_path / "b") or "")


def test_interrupts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), at_step(5, send(signal.SIGINT)):
        train(tmp_path / "run", "linear")
    assert "run: stopped after step 6 and saved; continue with --resume" in capsys.readouterr().err.replace("\n", "")
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(InputError, match=r"is a run that was stopped before its first evaluation\. Continue it: "):
        configs.read(tmp_path / "run")
    train(tmp_path / "run", "linear", resume=True)
    assert "run: continuing after step 6" in capsys.readouterr().err


def test_resume_without_a_checkpoint_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With nothing there, and with a run that was killed before it wrote one."""
    path = tmp_path / "run"
    train(path, "linear", resume=True)
    assert "there is no checkpoint yet; starting at step 0" in capsys.readouterr().err
    (path / configs.STATE).unlink()
    forget_the_end(path)
    train(path, "linear", resume=True)
    assert "there is no checkpoint yet; starting at step 0" in capsys.readouterr().err


def test_killed_in_its_first_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.0123abcd.partial.json").write_text("{")
    train(tmp_path / "run", "linear", resume=True)
    assert "there is no checkpoint yet; starting at step 0" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob(".*.partial*"))


def forget_the_end(path: Path) -> None:
    """As if the process had been killed before it wrote the result."""
    checkpoint.write_config(path, msgspec.structs.replace(configs.read(path), result=None))


@pytest.mark.slow
def test_killed(tmp_path: Path) -> None:
    """Kill -9 at random moments: `make kills` does it 200 times."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "6"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 runs killed and continued" in done.stdout
    assert "lost or different: 0" in done.stdout


def test_what_a_killed_write_leaves_is_removed(tmp_path: Path) -> None:
    train(tmp_path / "run", "linear")
    (tmp_path / "run" / ".training_state.0123abcd.partial.safetensors").write_bytes(b"half")
    forget_the_end(tmp_path / "run")
    train(tmp_path / "run", "linear", resume=True)
    assert not list((tmp_path / "run").glob("*.partial*"))
    assert configs.read(tmp_path / "run").result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"learning_rate": 0.5}}, r"train\.learning_rate was 0\.01 and is now 0\.5\. Use the old value"),
        ({"train": {"epochs": 4}}, r"train\.epochs was 3 and is now 4"),
        ({"model": {"latent": 3}}, r"model\.latent was 10 and is now 3"),
        ({"data": {"flip": False}}, r"data\.flip was True and is now False"),
        ({"data": {"test": 0.3, "flip": True}}, r"data\.test was 0\.2 and is now 0\.3"),
    ],
)
def test_another_configuration_is_refused(
    tmp_path: Path, change: dict[str, dict[str, Any]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit), at_step(3, send(signal.SIGTERM)):
        train(tmp_path / "run", "linear")
    model, run, data = RUNS["linear"]
    changed = (model | change.get("model", {}), run | change.get("train", {}), data | change.get("data", {}))
    monkeypatch.setitem(RUNS, "linear", changed)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    with pytest.raises(InputError, match=f"--resume continues the run in .* as it was, but {message}"):
        train(tmp_path / "run", "linear", resume=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}


def test_other_data_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.npy"
    model = ModelConfig(model="mlp", data_shape=DIGITS, likelihood="gaussian", widths=(8,))
    config = TrainConfig(epochs=2, device="cpu")
    np.save(file, np.full((30, 8, 8), 0.5, np.float32))
    with pytest.raises(SystemExit), at_step(1, send(signal.SIGTERM)):
        fit(tmp_path / "run", model, config, DataConfig(spec=f"array:{file}"))
    np.save(file, np.full((40, 8, 8), 0.5, np.float32))
    with pytest.raises(InputError, match=r"split\.train was 21 and is now 28"):
        fit(tmp_path / "run", model, config, DataConfig(spec=f"array:{file}"), resume=True)


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), at_step(3, send(signal.SIGTERM)):
        train(tmp_path / "run", "linear")
    state, tensors = checkpoint.read_state(tmp_path / "run") or pytest.fail("no state")
    checkpoint.write_state(tmp_path / "run", msgspec.structs.replace(state, processes=2), tensors)
    with pytest.raises(InputError, match=r"it had 2 processes and now has 1\. Start 2, or a new run"):
        train(tmp_path / "run", "linear", resume=True)


def test_a_damaged_state(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), at_step(3, send(signal.SIGTERM)):
        train(tmp_path / "run", "linear")
    file = tmp_path / "run" / configs.STATE
    whole = file.read_bytes()
    for raw in (b"", b"junk", whole[: len(whole) // 2], whole.replace(b'"step\\":4', b'"step\\":"')):
        assert raw != whole
        file.write_bytes(raw)
        with pytest.raises(InputError, match=r"training_state\.safetensors is damaged: .*Remove the run and train"):
            train(tmp_path / "run", "linear", resume=True)


def test_two_at_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (
        checkpoint.locked(tmp_path / "run"),
        pytest.raises(InputError, match=r"another process is training in .*run\. Choose another folder"),
    ):
        train(tmp_path / "run", "linear")


FULL = """
import resource, signal, sys
from pathlib import Path
from vae_export.trainers import fit as module, logs
from vae_export.trainers.config import model_config, train_config
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
before = logs.Log.epoch
def epoch(log, row):
    before(log, row)
    if row.epoch == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
logs.Log.epoch = epoch
model = model_config("linear", data_shape=(1, 8, 8))
config = train_config("linear", epochs=3, importance_draws=2, device="cpu")
try:
    module.fit(Path("run"), model, config, checkpoint_seconds=0.0)
except module.InputError as error:
    print(error)
"""


def test_no_room(tmp_path: Path) -> None:
    """The system refuses to write more, for real: the message says what is still there, and it is."""
    done = subprocess.run([sys.executable, "-c", FULL], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "the checkpoint of step 40 could not be written to run: " in done.stdout, done.stdout + done.stderr
    assert "The last checkpoint, of step 39, is complete in run. Make space, and continue with --resume" in done.stdout
    state, _ = checkpoint.read_state(tmp_path / "run") or pytest.fail("no state")
    assert state.step == 39
    assert not list((tmp_path / "run").glob(".*.partial*"))
    model = model_config("linear", data_shape=DIGITS)
    config = train_config("linear", epochs=3, importance_draws=2, device="cpu")
    assert fit(tmp_path / "run", model, config, resume=True) == fit(tmp_path / "whole", model, config)
    assert difference(tmp_path / "whole", tmp_path / "run") is None


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_not_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Said with the step, the rows and the last good checkpoint, which is still good."""
    seen: list[Batches] = []
    before = Batches.__getitem__

    def item(batches: Batches, step: int) -> object:
        seen.append(batches)
        if step == 20:  # as a diverged run has it: weights that are no numbers, or gradients that overflow
            if what == "loss":
                model[0].decoder[0].bias.data[3] = torch.nan
            else:
                model[0].decoder[0].weight.register_hook(lambda gradient: gradient * torch.inf)
        return before(batches, step)

    model: list[Any] = []
    build = models.build
    monkeypatch.setattr(models, "build", lambda config: model.append(build(config)) or model[-1])
    monkeypatch.setattr(Batches, "__getitem__", item)
    value = "nan" if what == "loss" else "(nan|inf)"
    with pytest.raises(
        InputError, match=rf"the {what} became {value} at step 20 \(epoch 2\), on training rows"
    ) as said:
        train(tmp_path / "run", "linear", checkpoint_seconds=0.0)
    rows = ", ".join(map(str, seen[0].indices(20)[:8]))
    assert f"rows {rows}. The last checkpoint, of step 20, is complete in " in str(said.value)
    assert "Lower the learning rate" in str(said.value)
    state, tensors = checkpoint.read_state(tmp_path / "run") or pytest.fail("no state")
    assert state.step == 20
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_version_1_checkpoints_stay_readable(tmp_path: Path) -> None:
    """As 0.1.0 wrote them: the same model, and the same rows held out."""
    plain = json.loads((ROOT / "tests" / "data" / "checkpoint-v1.json").read_text())
    (tmp_path / configs.CONFIG).write_text(json.dumps(plain))
    model = models.build(configs.read_config(tmp_path).model)
    checkpoint.write_weights(tmp_path, model.state_dict())
    config, _ = checkpoint.read(tmp_path)
    assert config.data == DataConfig(spec="digits")
    assert config.train.ema == 0
    assert config.train.epochs == plain["train"]["epochs"]
    assert config.result
    assert config.result.elbo == plain["result"]["elbo"]


def test_signals_after_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heeded before the test data is measured; a second SIGTERM changes nothing."""
    on_validation = evaluate.on_validation

    def interrupted(model: Any, fabric: Any, part: Any, config: Any) -> Any:
        send(signal.SIGTERM)()
        send(signal.SIGTERM)()
        return on_validation(model, fabric, part, config)

    whole = train(tmp_path / "whole", "mlp")
    monkeypatch.setattr(evaluate, "on_validation", interrupted)
    for _ in range(3):
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path / "run", "mlp", resume=True)
        assert stopped.value.code == 143
    monkeypatch.setattr(evaluate, "on_validation", on_validation)
    assert train(tmp_path / "run", "mlp", resume=True) == whole
    assert difference(tmp_path / "whole", tmp_path / "run") is None


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    with pytest.raises(KeyboardInterrupt), at_step(5, twice):
        train(tmp_path / "run", "linear", checkpoint_seconds=0.0)
    state, _ = checkpoint.read_state(tmp_path / "run") or pytest.fail("no state")
    assert state.step == 5


@pytest.mark.parametrize("file", [configs.WEIGHTS, configs.CONFIG])
def test_files_that_do_not_fit_each_other(tmp_path: Path, file: str) -> None:
    """Known before any training, and told."""
    with pytest.raises(SystemExit), at_step(20, send(signal.SIGTERM)):
        train(tmp_path / "run", "linear")
    if file == configs.WEIGHTS:
        (tmp_path / "run" / file).write_bytes(b"damaged")
    else:
        config = configs.read_config(tmp_path / "run")
        other = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, latent=3))
        checkpoint.write_config(tmp_path / "run", other)
    model = model_config("linear", data_shape=DIGITS, latent=3 if file == configs.CONFIG else 10)
    _, run, data = RUNS["linear"]
    config = train_config("linear", epochs=3, batch_size=8, importance_draws=2, device="cpu", **run)
    with pytest.raises(InputError, match=r"(?s)does not hold this model's weights: .*Train again in another folder"):
        fit(tmp_path / "run", model, config, DataConfig(**data), resume=True)


def test_a_run_whose_data_has_moved_goes_on(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.linspace(0, 1, 30 * 64, dtype=np.float32).reshape(30, 8, 8))
    model = ModelConfig(model="mlp", data_shape=DIGITS, likelihood="gaussian", widths=(8,))
    config = TrainConfig(epochs=2, importance_draws=1, device="cpu")
    with pytest.raises(SystemExit), at_step(1, send(signal.SIGTERM)):
        fit(tmp_path / "run", model, config, DataConfig(spec=f"array:{tmp_path / 'a.npy'}"))
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    moved = DataConfig(spec=f"array:{tmp_path / 'b.npy'}")
    fit(tmp_path / "run", model, config, moved, resume=True)
    assert configs.read(tmp_path / "run").data == moved
    # What is there now may have been trained on, if it is not what was there then: it is not called held out.
    from vae_export.sources import checkpoint as source

    assert source.load(tmp_path / "run").held_out is not None
    np.save(tmp_path / "b.npy", np.linspace(1, 0, 30 * 64, dtype=np.float32).reshape(30, 8, 8))
    assert source.load(tmp_path / "run").held_out is None


def test_the_scalers_state_keeps_its_types() -> None:
    """Of float16's gradient scaler: an integer that comes back as a float stops the first step."""
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "growth_interval": 2000, "_growth_tracker": 0}
    state = checkpoint.State(step=1, processes=1, totals={}, history=(), scaler=scaler, environment={})
    again = msgspec.json.decode(msgspec.json.encode(state), type=checkpoint.State).scaler
    assert again == scaler
    assert {name: type(value) for name, value in again.items()} == {name: type(v) for name, v in scaler.items()}
