"""Sources of trained models, under one protocol."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vae_export.errors import InputError
from vae_export.sources import checkpoint, diffusers_folder, module
from vae_export.sources.module import Source
from vae_export.sources.protocol import Trained

_MODULE = ("example", "likelihood", "data_range")


def resolve(source: Any, **options: Any) -> Trained:
    """A source of any kind under the protocol. Arguments: as for `export`; None is the same as no argument.

    Raises:
        InputError: there is no such source, it cannot be read, or an option does not belong to its kind.
        BackendError: a package that it needs is not installed.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(source, Trained):
        _check_options("a Trained", options, ())
        return source
    if isinstance(source, Source):
        _check_options("a vae_export.Source", options, ())
        return module.resolve(source)
    if isinstance(source, nn.Module):
        _check_options("a module", options, tuple(Source.__dataclass_fields__)[1:])
        missing = [name for name in _MODULE if name not in options]
        if missing:
            raise InputError(
                f"export: a module needs {', '.join(missing)}. Pass them: "
                "export(module, path, example=x, likelihood='bernoulli', data_range=(0, 1))"
            )
        return module.resolve(Source(source, **options))
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"export: got a {type(source).__name__}; expected a checkpoint's or a diffusers autoencoder's folder, "
            "package.module:factory, a PyTorch module, or a vae_export.Source"
        )
    path = Path(source)
    if ":" in str(source) and not path.exists():
        _check_options("a factory", options, ("shape", "likelihood", "data_range", "variance", "multiple_of"))
        return module.resolve(module.from_factory(str(source), **options))
    if not path.exists():
        raise InputError(
            f"export: {path} does not exist; expected a checkpoint's or a diffusers autoencoder's folder, a "
            ".safetensors file, or package.module:factory"
        )
    if checkpoint.is_checkpoint(path) or not (diffusers_folder.is_diffusers(path) or "config" in options):
        _check_options("a checkpoint", options, ())
        return checkpoint.load(path)
    _check_options("a diffusers autoencoder", options, ("config", "size", "held_out"))
    if "config" in options:
        options["config"] = Path(options["config"])
    return diffusers_folder.load(path, **options)


def _check_options(kind: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if other := sorted(set(options) - set(known)):
        takes = f"takes {', '.join(known)}" if known else "takes no further options"
        raise InputError(f"export: {kind} {takes}; got {', '.join(other)}. Omit {'it' if len(other) == 1 else 'them'}")
