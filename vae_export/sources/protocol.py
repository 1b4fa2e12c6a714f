"""The protocol between sources of trained models and the exporter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from vae_export.contract.manifest import Origin
from vae_export.contract.model import DECODER_OUTPUTS, ENCODER_OUTPUTS, Model, SizeDim, shape_text
from vae_export.errors import InputError


@dataclass(frozen=True)
class Training:
    """How a model was trained, for its card.

    Attributes:
        figures: by quantity, its value with the unit, as text.
        pictures: by file name, the caption and the bytes.
    """

    figures: Mapping[str, str]
    pictures: Mapping[str, tuple[str, bytes]]


@dataclass(frozen=True)
class Trained:
    """A trained model and what the manifest records of it. A new kind of source is one file that returns this.

    Attributes:
        module: has `encode(x)`, which returns the tensors of `ENCODER_OUTPUTS[posterior]` in order, and
            `decode(z)`, those of `DECODER_OUTPUTS[likelihood]`; a single one may come without a tuple. It
            draws no random numbers and is in evaluation mode, on the CPU, in float32.
        model: the shapes, the range of the data, the prior, the posterior and the likelihood.
        origin: the kind and name of the source, and the digest of its weights.
        config: the source's own configuration, as JSON; it is kept in the bundle.
        example_shape: (*data): the shape to trace and to verify at, with a size for each named dimension.
        held_out: (M, *data) float32 in the data's range, to verify on, at best not used in training; or None.
        calibration: (N, *data) float32, other data, such as the model was trained on, to choose a lower precision by;
            None: the rows of held_out that the certificate does not need.
        training: figures and pictures of the training, where they are known.
    """

    module: nn.Module
    model: Model
    origin: Origin
    config: bytes
    example_shape: tuple[int, ...]
    held_out: npt.NDArray[np.float32] | None = None
    calibration: npt.NDArray[np.float32] | None = None
    training: Training | None = None

    def __repr__(self) -> str:
        model = self.model
        return (
            f"Trained({self.origin.name!r}, {model.architecture}, {model.parameters:,} parameters, "
            f"data {shape_text(model.data.shape)}, latent {shape_text(model.latent.shape)}, {model.likelihood.kind})"
        )

    def sizes(self) -> dict[str, int]:
        """The named dimensions' sizes in `example_shape`."""
        dims = zip(self.model.data.shape, self.example_shape, strict=True)
        return {dim.name: size for dim, size in dims if isinstance(dim, SizeDim)}


class Encoder(nn.Module):
    """x → the tensors of q(z|x), by name."""

    def __init__(self, module: nn.Module, model: Model) -> None:
        super().__init__()
        self.module = module
        self.outputs = ENCODER_OUTPUTS[model.posterior.kind]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, *data) → (B, *latent) each."""
        return _tensors("encode", self.module.encode(x), self.outputs)  # type: ignore[operator]


class Decoder(nn.Module):
    """z → the tensors of p(x|z), by name."""

    def __init__(self, module: nn.Module, model: Model) -> None:
        super().__init__()
        self.module = module
        self.outputs = DECODER_OUTPUTS[model.likelihood.kind]

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        """(B, *latent) → (B, *data) each."""
        return _tensors("decode", self.module.decode(z), self.outputs)  # type: ignore[operator]


def _tensors(method: str, value: Any, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    tensors = (value,) if isinstance(value, Tensor) else tuple(value)
    if len(tensors) != len(names):
        raise InputError(
            f"export: {method} must return {len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names)}), "
            f"got {len(tensors)}"
        )
    return tensors
