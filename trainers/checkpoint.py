"""A run's folder: what training leaves, written file by file, each whole or not at all.

`config.json` says what is trained and is there from the start; `model.safetensors` holds the averaged weights
that are kept, the best or the last; `training_state.safetensors` holds all that a run needs to go on where it
was. Noise, order and augmentation are addressed by the step, so that the step is all the random state there is.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor

from vae_export.contract import atomic
from vae_export.contract.records import Record
from vae_export.errors import InputError
from vae_export.trainers import config as configs
from vae_export.trainers.config import CheckpointConfig
from vae_export.trainers.models import VAEModel, build

METRICS = "metrics.json"
CURVE = "metrics.csv"
PICTURES = "pictures"
TENSORBOARD = "tensorboard"
#: The pictures that may be in a run, in the order in which a model card shows them, and what each is.
CAPTIONS = {
    "curves.png": "how training went: what it maximized, and the same of the averaged weights on validation data",
    "reconstructions.png": "test examples above their reconstructions through the posterior's mean",
    "samples.png": "means of p(x|z) at draws from the prior",
    "interpolation.png": "from the left test example to the right one, along a line between their latents",
    "manifold.png": "p(x|z)'s means over the latent plane, at equally probable steps of the prior",
    "latents.png": "posterior means of test examples",
}
_LOCK = ".lock"
# What a run writes. Anything else in its folder is somebody's own and is never removed.
_OURS = (
    *(configs.CONFIG, configs.WEIGHTS, configs.STATE, METRICS, CURVE, _LOCK, ".*.partial*"),
    *(f"{PICTURES}/{name}" for name in CAPTIONS),
    *(f"{PICTURES}/.*.partial*", f"{TENSORBOARD}/events.out.tfevents.*"),
)


class Epoch(Record, frozen=True, kw_only=True):
    """One epoch of a run, in nats for each example; of an autoencoder, a bound is minus the squared error.

    Attributes:
        epoch: counted from 1.
        step: of the optimizer at its end.
        learning_rate: of its last step.
        kl_weight: of its last step.
        train_bound: what the objective maximizes, with the KL unweighted, averaged over the epoch.
        train_reconstruction: log p(x|z), likewise.
        train_kl: likewise.
        validation_bound: ELBO of the averaged weights, one draw from the posterior of each example.
        validation_reconstruction: likewise.
        validation_kl: likewise.
        images_per_second: trained on, all processes together; evaluation and writing not counted.
    """

    epoch: int
    step: int
    learning_rate: float
    kl_weight: float
    train_bound: float
    train_reconstruction: float
    train_kl: float
    validation_bound: float
    validation_reconstruction: float
    validation_kl: float
    images_per_second: float


class State(Record, frozen=True, kw_only=True):
    """What `training_state.safetensors` says of a run besides its tensors.

    Attributes:
        step: steps taken.
        processes: that train together.
        totals: of the epoch that is not over: `bound`, `reconstruction`, `kl`, `examples`, `seconds`.
        history: the epochs that are over.
        scaler: of float16 gradients.
        environment: what has a say in the last bits: device, threads and PyTorch's version.
    """

    step: int
    processes: int
    totals: dict[str, float]
    history: tuple[Epoch, ...]
    scaler: dict[str, int | float]
    environment: dict[str, str | int]


def best(history: tuple[Epoch, ...]) -> Epoch:
    """The first of the epochs with the highest bound on the validation data; there must be one."""
    return max(history, key=lambda epoch: epoch.validation_bound)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any training time is spent, a place where a run cannot be written.

    Raises:
        InputError: something is at `path` and overwrite is false, or it is not just a run.
        OSError: its folder cannot be written to.
    """
    entries = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    empty = all(name == _LOCK or ".partial" in name for name in entries)  # as a process that was killed leaves it
    if path.is_dir() and empty:
        overwrite = True
    atomic.check_target(path, overwrite=overwrite)
    if strangers := _strangers(path):
        raise InputError(
            f"train: {path} is not just a run ({', '.join(strangers[:5])}). Remove it yourself, or choose another "
            "folder"
        )
    if not empty:
        configs.read_config(path)  # another program's config.json and model.safetensors are no run
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}."):
        pass


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep every other training process out of the folder until this one ends, however it ends.

    Raises:
        InputError: another process has it.
    """
    with (path / _LOCK).open("a") as lock:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"train: another process is training in {path}. Choose another folder") from None
        yield


def clear(path: Path, *, partial: bool = False) -> None:
    """Remove what a run has written; with `partial`, only what a killed process left half written.

    Raises:
        InputError: a folder of the run is a link to somewhere else.
    """
    for name in (PICTURES, TENSORBOARD):
        if (path / name).is_symlink():
            raise InputError(f"train: {path / name} is a link. Remove it, or choose another folder")
    for pattern in reversed(_OURS):  # the configuration last: while it is there, this is known to be a run
        for file in path.glob(pattern):
            if file.name != _LOCK and (not partial or ".partial" in file.name):
                file.unlink()


def write_config(path: Path, config: CheckpointConfig) -> None:
    """Write `config.json`."""
    with atomic.atomic_file(path / configs.CONFIG) as stage:
        stage.write_bytes(configs.encode(config))


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors`."""
    _write(path / configs.WEIGHTS, tensors, {})


def write_state(path: Path, state: State, tensors: Mapping[str, Tensor]) -> None:
    """Write `training_state.safetensors`."""
    _write(path / configs.STATE, tensors, {"state": msgspec.json.encode(state).decode()})


def read_state(path: Path) -> tuple[State, dict[str, Tensor]] | None:
    """Read `training_state.safetensors`, or None if the run never came to write one.

    Raises:
        InputError: it is damaged.
    """
    file = path / configs.STATE
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        return msgspec.json.decode(metadata.get("state", ""), type=State), load_file(file)
    except (SafetensorError, msgspec.MsgspecError) as error:
        raise InputError(f"{file} is damaged: {error}. Remove the run, and train again") from None


def read(path: Path) -> tuple[CheckpointConfig, VAEModel]:
    """Read a checkpoint's configuration and model, the latter on the CPU, in float32, for evaluation.

    Raises:
        InputError: there is no checkpoint at `path`, or its weights are not those of its configuration.
    """
    config = configs.read(path)
    model = build(config.model)
    try:
        model.load_state_dict(read_weights(path))
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{path / configs.WEIGHTS} does not hold this model's weights: {error}") from None
    return config, model.eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read `model.safetensors`.

    Raises:
        SafetensorError: it is damaged.
    """
    return load((path / configs.WEIGHTS).read_bytes())


def _write(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic.atomic_file(file) as stage:
        stage.write_bytes(save(plain, metadata))


def _strangers(path: Path) -> list[str]:
    ours = {file for pattern in _OURS for file in path.glob(pattern)}
    found = []
    for folder, folders, names in os.walk(path):
        entries = [Path(folder, name) for name in names if Path(folder, name) not in ours]
        entries += [Path(folder, name) for name in folders if Path(folder, name).is_symlink()]
        found += [str(entry.relative_to(path)) for entry in entries]
    return sorted(found)
