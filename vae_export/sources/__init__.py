"""Trained models from somewhere, under one protocol."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from torch import nn

from vae_export.errors import InputError
from vae_export.sources import checkpoint, diffusers_folder, module
from vae_export.sources.module import Source
from vae_export.sources.protocol import Trained
from vae_export.trainers import config as configs


class Described(TypedDict, total=False):
    """What may be said of a source beside its name. Each kind of source takes its own, and refuses the others.

    A diffusers autoencoder takes `config`, `size` and `held_out`; a PyTorch module all that `vae_export.Source` has
    beside the module; a factory that returns a bare module `shape`, `likelihood`, `data_range`, `variance` and
    `multiple_of`. A checkpoint says everything itself.
    """

    config: str | os.PathLike[str] | None
    size: Mapping[str, int] | None
    held_out: npt.NDArray[np.float32] | None
    example: Any
    shape: tuple[int, ...] | None
    likelihood: str | None
    data_range: tuple[float, float] | None
    variance: float | None
    multiple_of: int | None
    outputs: str | None
    nominal: bool
    name: str | None
    scaling: float
    shift: float
    keep_example: bool


def resolve(source: Any, **described: Any) -> Trained:
    """A source, whatever its kind, under the protocol. Arguments: as for `export`.

    Raises:
        InputError: there is no such source, it cannot be read, or what is said of it does not belong to its kind.
        BackendError: a package that it needs is not installed.
    """
    said = {name: value for name, value in described.items() if value is not None}
    if isinstance(source, Trained):
        _only("a Trained", said, ())
        return source
    if isinstance(source, Source):
        _only("a vae_export.Source", said, ())
        return module.resolve(source)
    if isinstance(source, nn.Module):
        needed = ("example", "likelihood", "data_range")
        _only("a module", said, (*needed, *_OF_MODULES))
        missing = [name for name in needed if name not in said]
        if missing:
            raise InputError(
                f"export: a module does not say {', '.join(missing)}. Pass them: "
                "export(module, path, example=x, likelihood='bernoulli', data_range=(0, 1))"
            )
        return module.resolve(Source(source, **said))
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"export: got a {type(source).__name__}; expected a checkpoint's or a diffusers autoencoder's folder, "
            "package.module:factory, a PyTorch module, or a vae_export.Source"
        )
    path = Path(source)
    if ":" in str(source) and not path.exists():
        _only("a factory", said, _OF_FACTORIES)
        return module.resolve(module.from_factory(str(source), **said))
    if not path.exists():
        raise InputError(
            f"export: {path} does not exist; expected a checkpoint's or a diffusers autoencoder's folder, a "
            ".safetensors file, or package.module:factory"
        )
    if configs.is_checkpoint(path) or not (diffusers_folder.is_diffusers(path) or "config" in said):
        _only("a checkpoint", said, ())
        return checkpoint.load(path)
    _only("a diffusers autoencoder", said, ("config", "size", "held_out"))
    if "config" in said:
        said["config"] = Path(said["config"])
    return diffusers_folder.load(path, **said)


_OF_MODULES = ("held_out", "variance", "multiple_of", "outputs", "nominal", "name", "scaling", "shift", "keep_example")
_OF_FACTORIES = ("shape", "likelihood", "data_range", "variance", "multiple_of")


def _only(kind: str, said: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if other := sorted(set(said) - set(known)):
        takes = f"takes {', '.join(known)}" if known else "says everything itself"
        raise InputError(f"export: {kind} {takes}; got {', '.join(other)}. Drop {'it' if len(other) == 1 else 'them'}")
