"""A run's folder: its files and records, each file written whole or not at all.

`config.json` describes the run and is there from the start; `model.safetensors` holds the averaged weights that are
kept, the best or the last; `training_state.safetensors` holds everything that a resumed run needs. Noise, order and
augmentation are functions of the step, so that the step is the only random state.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor, nn
from torch.optim import AdamW

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
#: The pictures of a run, in the order in which a model card shows them, each with its caption.
CAPTIONS = {
    "curves.png": "how training went: what it maximized, and the same of the averaged weights on validation data",
    "reconstructions.png": "test examples above their reconstructions through the posterior's mean",
    "samples.png": "means of p(x|z) at draws from the prior",
    "interpolation.png": "from the left test example to the right one, along a line between their latents",
    "manifold.png": "p(x|z)'s means over the latent plane, at equally probable steps of the prior",
    "latents.png": "posterior means of test examples",
}
_LOCK = ".lock"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for each parameter
# All files that a run writes. Any other file in its folder belongs to the user and is never removed.
_OURS = (
    *(configs.CONFIG, configs.WEIGHTS, configs.STATE, METRICS, CURVE, _LOCK, ".*.partial*"),
    *(f"{PICTURES}/{name}" for name in CAPTIONS),
    *(f"{PICTURES}/.*.partial*", f"{TENSORBOARD}/events.out.tfevents.*"),
)


class Epoch(Record, frozen=True, kw_only=True):
    """Figures of one epoch, in nats for each example; for an autoencoder, a bound is minus the squared error.

    Attributes:
        epoch: counted from 1.
        step: of the optimizer at the epoch's end.
        learning_rate: of the epoch's last step.
        kl_weight: of the epoch's last step.
        train_bound: the objective with the KL unweighted, averaged over the epoch.
        train_reconstruction: log p(x|z), averaged over the epoch.
        train_kl: averaged over the epoch.
        validation_bound: ELBO of the averaged weights, with one draw from the posterior of each example.
        validation_reconstruction: log p(x|z) of the same draws.
        validation_kl: in closed form.
        images_per_second: training throughput of all processes together, without evaluation and writing.
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
    """The record in `training_state.safetensors` beside its tensors.

    Attributes:
        step: number of steps taken.
        processes: number of processes that train together.
        totals: sums over the current epoch: `bound`, `reconstruction`, `kl`, `examples`, `seconds`.
        history: the completed epochs.
        scaler: state of the gradient scaler of float16.
        environment: device, threads and PyTorch's version, on which the last bits of the result depend.
    """

    step: int
    processes: int
    totals: dict[str, float]
    history: tuple[Epoch, ...]
    scaler: dict[str, int | float]
    environment: dict[str, str | int]


def best(history: tuple[Epoch, ...]) -> Epoch:
    """The first epoch with the highest validation bound, of a history that is not empty."""
    return max(history, key=lambda epoch: epoch.validation_bound)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder in which a run cannot be written, before any time is spent on training.

    Raises:
        InputError: something is at `path` and overwrite is false, or it holds other files than those of a run.
        OSError: its parent folder is not writable.
    """
    entries = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    empty = all(name == _LOCK or ".partial" in name for name in entries)  # what a killed process leaves
    if configs.CONFIG in entries and not overwrite:
        raise InputError(
            f"train: {path} exists already. Continue its run (--resume), replace it (--force), or choose another folder"
        )
    atomic.check_target(path, overwrite=overwrite or (path.is_dir() and empty))
    if strangers := _strangers(path):
        raise InputError(
            f"train: {path} is not just a run: it also has {', '.join(strangers[:5])}. Remove them yourself, or choose "
            "another folder"
        )
    if not empty:
        configs.read_config(path)  # another program's config.json and model.safetensors are not a run
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}."):
        pass


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a run's folder against other training processes, until the context or the process ends.

    Raises:
        InputError: another process holds the lock.
    """
    try:
        lock = FileLock(path / _LOCK).acquire(blocking=False)
    except Timeout:
        raise InputError(f"train: another process is training in {path}. Choose another folder") from None
    with lock:
        yield


def clear(path: Path, *, partial: bool = False) -> None:
    """Remove the files of a run; with `partial`, only the half-written ones of a killed process.

    Raises:
        InputError: a subfolder of the run is a symbolic link.
    """
    for name in (PICTURES, TENSORBOARD):
        if (path / name).is_symlink():
            raise InputError(f"train: {path / name} is a link. Remove it, or choose another folder")
    for pattern in reversed(_OURS):  # the configuration last: it marks the folder as a run
        for file in path.glob(pattern):
            if file.name != _LOCK and (not partial or ".partial" in file.name):
                file.unlink()


def check_same(path: Path, config: CheckpointConfig) -> None:
    """Refuse to resume a run with another configuration. Only the path to its data may change.

    Raises:
        InputError: a field has another value than in the run's `config.json`.
    """
    recorded = configs.read_config(path)
    for section in ("model", "data", "train", "split"):
        if getattr(recorded, section) is not None:
            check_fields(path, section, getattr(recorded, section), msgspec.structs.asdict(getattr(config, section)))


def check_fields(path: Path, section: str, recorded: Record, fields: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other values of some fields of a section of its configuration.

    Raises:
        InputError: a field has another value than `recorded`.
    """
    for name, new in fields.items():
        old = getattr(recorded, name)
        if name == "spec":
            old, new = old.partition(":")[0], new.partition(":")[0]
        if old != new and name != "name":
            raise InputError(
                f"train: --resume continues the run in {path} as it was, but {section}.{name} was {old!r} and is now "
                f"{new!r}. Use the old value, or start a new run in another folder"
            )


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
    """Read `training_state.safetensors`; None where there is none yet.

    Raises:
        InputError: the file is damaged.
    """
    file = path / configs.STATE
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        return msgspec.json.decode(metadata.get("state", ""), type=State), load_file(file)
    except (SafetensorError, msgspec.MsgspecError) as error:
        raise InputError(f"{file} is damaged: {error}. Remove the run and train again") from None


def read(path: Path) -> tuple[CheckpointConfig, VAEModel]:
    """Read a checkpoint: its configuration, and its model on the CPU in evaluation mode.

    Raises:
        InputError: there is no checkpoint at `path`, or its weights do not fit its configuration.
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
        SafetensorError: the file is damaged.
    """
    return load((path / configs.WEIGHTS).read_bytes())


def state_tensors(model: nn.Module, average: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """The tensors of `training_state.safetensors`: `model/NAME`, `average/NAME` and `optimizer/NAME/MOMENT`."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average/{name}": tensor for name, tensor in average.state_dict().items()}
    state = optimizer.state_dict()["state"]
    for index, name in enumerate(_optimized(model, optimizer)):
        if index in state:
            tensors |= {f"optimizer/{name}/{key}": state[index][key] for key in _MOMENTS}
    return tensors


def restore(
    path: Path, state: State, tensors: Mapping[str, Tensor], model: nn.Module, average: nn.Module, optimizer: AdamW
) -> None:
    """Load the tensors of `state_tensors` back into model, averaged model and optimizer.

    Raises:
        InputError: they, or those of `model.safetensors` if an epoch was completed, do not fit the model.
    """
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
    try:
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        if state.history:  # damaged weights are found now, and not at the end of training
            average.load_state_dict(read_weights(path))
        model.load_state_dict(parts["model"])
        average.load_state_dict(parts["average"])
        plain = optimizer.state_dict()
        for index, name in enumerate(_optimized(model, optimizer)):
            if f"{name}/step" in parts["optimizer"]:  # absent if the scaler of float16 has skipped every step
                plain["state"][index] = {key: parts["optimizer"][f"{name}/{key}"] for key in _MOMENTS}
        optimizer.load_state_dict(plain)
    except (KeyError, RuntimeError, SafetensorError, OSError) as error:
        raise InputError(
            f"train: the checkpoint in {path} does not hold this model's weights: {error}. Its files are "
            "damaged or have been changed. Train again in another folder"
        ) from None


def _optimized(model: nn.Module, optimizer: AdamW) -> list[str]:
    """Names of the parameters in the optimizer's order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _write(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic.atomic_file(file) as stage:
        stage.write_bytes(save(plain, metadata))


def _strangers(path: Path) -> list[str]:
    """Files and links below `path` that a run does not write."""
    ours = {file for pattern in _OURS for file in path.glob(pattern)}
    strangers = []
    for folder, folders, names in os.walk(path):
        entries = [Path(folder, name) for name in names if Path(folder, name) not in ours]
        entries += [Path(folder, name) for name in folders if Path(folder, name).is_symlink()]
        strangers += [str(entry.relative_to(path)) for entry in entries]
    return sorted(strangers)
