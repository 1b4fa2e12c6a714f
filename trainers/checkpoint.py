"""Checkpoints: a folder with `config.json` and `model.safetensors`, written whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from vae_export import files
from vae_export.errors import InputError

from . import config as configs
from .config import CheckpointConfig
from .models import VAEModel, build


def write(path: Path, config: CheckpointConfig, model: VAEModel, *, overwrite: bool = False) -> None:
    """Write a checkpoint.

    Raises:
        InputError: something is at `path` and overwrite is false.
    """
    check_target(path, overwrite=overwrite)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with files.atomic_folder(path, overwrite=overwrite) as stage:
        (stage / configs.WEIGHTS).write_bytes(save(tensors))
        (stage / configs.CONFIG).write_bytes(configs.encode(config))


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any training time is spent, a place where the checkpoint cannot be written.

    Raises:
        InputError: something is at `path` and overwrite is false, or it is not just a checkpoint.
        OSError: its folder cannot be written to.
    """
    files.check_target(path, overwrite=overwrite)
    if path.is_dir():
        strangers = sorted({entry.name for entry in path.iterdir()} - {configs.CONFIG, configs.WEIGHTS})
        if strangers or (any(path.iterdir()) and not configs.is_checkpoint(path)):
            raise InputError(
                f"train: {path} is not just a checkpoint ({', '.join(strangers[:5]) or 'a part is missing'}). "
                "Remove it yourself, or choose another folder"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}."):
        pass


def read(path: Path) -> tuple[CheckpointConfig, VAEModel]:
    """Read a checkpoint's configuration and model, the latter on the CPU, in float32, for evaluation.

    Raises:
        InputError: there is no checkpoint at `path`, or its weights are not those of its configuration.
    """
    config = configs.read(path)
    model = build(config.model)
    try:
        model.load_state_dict(load((path / configs.WEIGHTS).read_bytes()))
    except (SafetensorError, RuntimeError) as error:
        raise InputError(f"{path / configs.WEIGHTS} does not hold this model's weights: {error}") from None
    return config, model.eval()
