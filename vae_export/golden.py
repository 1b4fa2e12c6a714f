"""Golden examples: inputs, and what the reference gave for them, so that anybody can measure again.

The reference is the PyTorch model in float64. The noise is left out, as (seed, stream, row) makes it again:
row i of x is drawn from the posterior with stream `noise.POSTERIOR`, row j of the prior's latents with
stream `noise.PRIOR`.

Tensors of `golden.safetensors`, N examples and M draws from the prior:

| name | shape, dtype | what |
|---|---|---|
| x | (N, *data) float32 | extremes of the data's range, then data |
| mean, logvar | (N, *latent) float64 | the posterior; logvar where it is Gaussian |
| sample | (N, *data) float64 | the decoded mean at the drawn latent |
| reconstruction, kl, scale | (N,) float64 | the ELBO's terms, and S = Σ|terms|; where there is a likelihood |
| float32.reconstruction, float32.kl | (N,) float64 | the terms of PyTorch in float32, summed in float64 |
| float32.divergence | (N,) float64 | KL(q in float64 || q in float32) of the worst latent dimension |
| float32.mean, float32.logvar | (N,) float64 | the worst error of PyTorch in float32, absolute |
| float32.prior.NAME | (M,) float64 | the same for the decoder's outputs |
| prior.NAME | (M, *data) float64 | the decoder's outputs for draws from the prior |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from vae_export.errors import BundleError, InputError
from vae_export.manifest import DECODER_OUTPUTS, ENCODER_OUTPUTS, Golden, Model, shape_text

FILE = "golden.safetensors"
CALIBRATION_FILE = "calibration.safetensors"
#: The file is kept below this size by leaving rows out.
LIMIT = 32 << 20

#: Fixed examples at the ends of the data's range, which come first in x.
EXTREMES = 4

Tensors = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Reference:
    """Golden examples in memory.

    Attributes:
        record: how many rows of each kind, and the seed.
        tensors: those of the table above.
    """

    record: Golden
    tensors: Tensors

    @property
    def has_elbo(self) -> bool:
        """Whether the model has one: a likelihood and a posterior variance."""
        return "scale" in self.tensors

    def shrunk(self, limit: int = LIMIT) -> Reference:
        """The same with as many rows left out as bring it below `limit` bytes. The extremes stay."""
        rows = {True: len(self.tensors["x"]), False: self.record.prior}
        size = {True: 0, False: 0}
        for name, value in self.tensors.items():
            size["prior." not in name] += value.nbytes
        fixed = size[True] // rows[True] * EXTREMES
        free = size[True] - fixed + size[False]
        share = min(1.0, max(0.0, (limit - (64 << 10) - fixed) / free))
        if share == 1.0:
            return self
        return self._kept(max(1, int(share * (rows[True] - EXTREMES))), max(1, int(share * rows[False])))

    def first(self, rows: int) -> Reference:
        """The same with at most so many examples beside the extremes, and so many draws from the prior."""
        return self._kept(min(rows, self.record.examples - EXTREMES), min(rows, self.record.prior))

    def _kept(self, examples: int, prior: int) -> Reference:
        """The extremes, so many examples behind them, and so many draws from the prior."""
        record = Golden(
            seed=self.record.seed,
            reference=self.record.reference,
            extremes=EXTREMES,
            held_out=min(examples, self.record.held_out),
            decoded=max(0, examples - self.record.held_out),
            prior=prior,
        )
        keep = {
            name: value[: prior if "prior." in name else EXTREMES + examples] for name, value in self.tensors.items()
        }
        return Reference(record, keep)


def extremes(shape: tuple[int, ...], value_range: tuple[float, float]) -> npt.NDArray[np.float32]:
    """The ends of the range: all low, all high, and the two alternations of both. (EXTREMES, *shape)."""
    low, high = value_range
    parity = np.indices(shape).sum(axis=0) % 2
    rows = [
        np.full(shape, low),
        np.full(shape, high),
        np.where(parity, low, high),
        np.where(parity, high, low),
    ]
    return np.stack(rows).astype(np.float32)


def encode(reference: Reference) -> bytes:
    """The bytes of `golden.safetensors`."""
    return safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in reference.tensors.items()})


def decode(raw: bytes, record: Golden, model: Model) -> Reference:
    """Read `golden.safetensors`.

    Raises:
        BundleError: it does not hold what the manifest says.
    """
    try:
        tensors: Tensors = safetensors.numpy.load(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(f"{FILE} is not a safetensors file: {error}") from None
    expected = _shapes(tensors, record, model)
    if set(tensors) != set(expected):
        raise BundleError(f"{FILE} has the tensors {sorted(tensors)}; expected {sorted(expected)}")
    for name, shape in expected.items():
        value, dtype = tensors[name], np.dtype(np.float32 if name == "x" else np.float64)
        if value.shape != shape or value.dtype != dtype:
            raise BundleError(
                f"{FILE}: {name} has shape {value.shape} and dtype {value.dtype}; expected {shape} and {dtype}"
            )
        if not np.isfinite(value).all():
            raise BundleError(f"{FILE}: {name} has values that are not finite")
    return Reference(record, tensors)


def decode_calibration(raw: bytes, model: Model) -> npt.NDArray[np.float32]:
    """The examples of `calibration.safetensors`: (n, *data) float32, where n may be 0.

    Raises:
        BundleError: they are no data of the model.
    """
    try:
        (x,) = safetensors.numpy.load(raw).values()
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(f"{CALIBRATION_FILE} is not a safetensors file with one tensor: {error}") from None
    fits = x.ndim == len(model.data.shape) + 1 and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(model.data.shape, x.shape[1:], strict=True)
    )
    if not fits or x.dtype != np.float32 or not np.isfinite(x).all():
        raise BundleError(
            f"{CALIBRATION_FILE} has x of shape {x.shape} and dtype {x.dtype}; expected finite float32 of shape "
            f"{shape_text(model.data.shape, 'N')}"
        )
    return x


def _shapes(tensors: Tensors, record: Golden, model: Model) -> dict[str, tuple[int, ...]]:
    """The shape that every tensor must have. Named dimensions have the size that x has."""
    if "x" not in tensors or tensors["x"].ndim != len(model.data.shape) + 1:
        raise BundleError(f"{FILE} has no x of shape {shape_text(model.data.shape, 'N')}")
    sizes = tensors["x"].shape[1:]
    data = tuple(dim if isinstance(dim, int) else size for dim, size in zip(model.data.shape, sizes, strict=True))
    named = {dim.name: size for dim, size in zip(model.data.shape, sizes, strict=True) if not isinstance(dim, int)}
    try:
        latent = model.latent_shape(named)
    except InputError as error:
        raise BundleError(f"{FILE}: x has a size that the model does not take: {error}") from None
    count = record.examples
    expected = {"x": (count, *data), "sample": (count, *data)}
    for name in ENCODER_OUTPUTS[model.posterior.kind]:
        expected |= {name: (count, *latent), f"float32.{name}": (count,)}
    for name in DECODER_OUTPUTS[model.likelihood.kind]:
        expected |= {f"prior.{name}": (record.prior, *data), f"float32.prior.{name}": (record.prior,)}
    if model.posterior.kind == "diagonal_gaussian":
        expected["float32.divergence"] = (count,)
    if model.has_elbo:
        for name in ("reconstruction", "kl", "scale", "float32.reconstruction", "float32.kl"):
            expected[name] = (count,)
    return expected
