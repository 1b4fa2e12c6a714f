"""Golden examples: inputs, and the reference's results for them, so that every user can measure a certificate.

The reference is the PyTorch model in float64. The noise is not stored, as (seed, stream, row) determine it: row i of
x is drawn from the posterior with stream `noise.POSTERIOR`, row j of the prior's latents with stream `noise.PRIOR`.

Tensors of `golden.safetensors`, N examples and M draws from the prior:

| name | shape, dtype | content |
|---|---|---|
| x | (N, *data) float32 | extremes of the data's range, then data |
| mean, logvar | (N, *latent) float64 | the posterior; logvar where it is Gaussian |
| sample | (N, *data) float64 | the decoded mean at the sampled latent, which is rounded to float32 |
| reconstruction, kl, scale | (N,) float64 | the ELBO's terms, and Σ|ELBO terms|; where there is a likelihood |
| prior.NAME | (M, *data) float64 | the decoder's outputs for draws from the prior |
| spread.ID | (N,) or (M,) float64 | how far float32 rounding moves a quantity of `deviations`: see `rounding` |
| float32.ID | (N,) or (M,) float64 | its deviation in PyTorch in float32 |

The same tensors at further sizes of the data's named dimensions have the prefix `size.K.`, K from 0 on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from vae_export.certification.deviations import conditioned
from vae_export.contract.manifest import Golden, GoldenSize
from vae_export.contract.model import DECODER_OUTPUTS, ENCODER_OUTPUTS, Model, shape_text
from vae_export.errors import BundleError, InputError

FILE = "golden.safetensors"
CALIBRATION_FILE = "calibration.safetensors"
#: The file is kept below this size by leaving rows out.
LIMIT = 32 << 20
_HEADER = 64 << 10

#: Fixed examples at the ends of the data's range, which come first in x.
EXTREMES = 4

Tensors = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Rows:
    """Golden examples of one size.

    Attributes:
        sizes: of the data's named dimensions; empty where there are none.
        tensors: those of the table above, without prefix.
        extremes: number of the first rows of x, at the ends of the data's range.
        held_out: number of the rows of x behind the extremes that are data. The others are decoded prior draws.
    """

    sizes: Mapping[str, int]
    tensors: Tensors
    extremes: int = 0
    held_out: int = 0

    @property
    def examples(self) -> int:
        """The number of rows of x."""
        return len(self.tensors["x"])

    @property
    def prior(self) -> int:
        """The number of draws from the prior."""
        return len(self.tensors["prior.sample"])

    @property
    def nbytes(self) -> int:
        """The size of all tensors, in bytes."""
        return sum(value.nbytes for value in self.tensors.values())


@dataclass(frozen=True)
class Reference:
    """Golden examples in memory.

    Attributes:
        record: the number of rows of each kind, and the seed.
        tensors: those of the table above, at the example's size.
        others: the rows of further sizes, for those of `record.sizes` that have rows.
    """

    record: Golden
    tensors: Tensors
    others: tuple[Rows, ...] = ()

    def groups(self, model: Model) -> list[Rows]:
        """The rows by size, the example's first."""
        sizes = model.sizes(self.tensors["mean"].shape[1:])
        return [Rows(sizes, self.tensors, self.record.extremes, self.record.held_out), *self.others]

    def shrunk(self, limit: int = LIMIT) -> Reference:
        """The same in at most `limit` bytes: large sizes and then rows are left out, never the extremes."""
        if sum(rows.nbytes for rows in (Rows({}, self.tensors), *self.others)) <= limit - _HEADER:
            return self
        sizes, others, room = [], [], limit // 2
        kept = iter(self.others)
        for size in self.record.sizes:
            if size.absent is None:
                rows = next(kept)
                if rows.nbytes > room:
                    reason = f"measured at the export; its rows of {rows.nbytes:,} bytes are not kept"
                    size = GoldenSize(sizes=size.sizes, absent=reason)
                else:
                    room -= rows.nbytes
                    others.append(rows)
            sizes.append(size)
        limit -= sum(rows.nbytes for rows in others)
        record = msgspec.structs.replace(self.record, sizes=tuple(sizes))
        return dataclasses.replace(self, record=record, others=tuple(others))._fewer(limit)

    def _fewer(self, limit: int) -> Reference:
        """The same with rows of the example's size left out, so that those of this size have at most `limit` bytes."""
        rows = {True: len(self.tensors["x"]), False: self.record.prior}
        size = {True: 0, False: 0}
        for name, value in self.tensors.items():
            size["prior." not in name] += value.nbytes
        fixed = size[True] // rows[True] * EXTREMES
        free = size[True] - fixed + size[False]
        share = min(1.0, max(0.0, (limit - _HEADER - fixed) / free))
        if share == 1.0:
            return self
        return self._kept(max(1, int(share * (rows[True] - EXTREMES))), max(1, int(share * rows[False])))

    def first(self, rows: int) -> Reference:
        """The same with at most so many examples beside the extremes, and so many draws from the prior."""
        return self._kept(min(rows, self.record.examples - EXTREMES), min(rows, self.record.prior))

    def _kept(self, examples: int, prior: int) -> Reference:
        """The extremes, so many examples behind them, and so many draws from the prior."""
        record = msgspec.structs.replace(
            self.record,
            extremes=EXTREMES,
            held_out=min(examples, self.record.held_out),
            decoded=max(0, examples - self.record.held_out),
            prior=prior,
        )
        keep = {
            name: value[: prior if "prior." in name else EXTREMES + examples] for name, value in self.tensors.items()
        }
        return dataclasses.replace(self, record=record, tensors=keep)


def extremes(shape: tuple[int, ...], value_range: tuple[float, float]) -> npt.NDArray[np.float32]:
    """Examples at the ends of the range: all low, all high, and two checkerboards: (EXTREMES, *shape) float32."""
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
    tensors = dict(reference.tensors)
    for index, rows in enumerate(reference.others):
        tensors |= {f"size.{index}.{name}": value for name, value in rows.tensors.items()}
    return safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in tensors.items()})


def decode(raw: bytes, record: Golden, model: Model) -> Reference:
    """Read `golden.safetensors`.

    Raises:
        BundleError: its content contradicts the manifest.
    """
    try:
        tensors: Tensors = safetensors.numpy.load(raw)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(f"{FILE} is not a safetensors file: {error}") from None
    sized = [size for size in record.sizes if size.absent is None]
    parts: list[Tensors] = [{} for _ in sized]
    base: Tensors = {}
    for name, value in tensors.items():
        prefix, _, rest = name.removeprefix("size.").partition(".")
        known = name.startswith("size.") and prefix.isdigit() and int(prefix) < len(parts)
        (parts[int(prefix)] if known else base)[rest if known else name] = value
    if record.draws == 0:  # written before tolerances came from spreads: these values have another meaning
        base = {name: value for name, value in base.items() if not name.startswith("float32.")}
    _check(base, record.examples, record.prior, record, model, "")
    others = []
    for index, (size, part) in enumerate(zip(sized, parts, strict=True)):
        _check(part, size.examples, size.prior, record, model, f"size.{index}.")
        if part["x"].shape[1:] != model.data_shape(model.latent_shape(size.sizes)):
            raise BundleError(f"{FILE}: size.{index}.x has shape {part['x'].shape}; the manifest says {size.sizes}")
        others.append(Rows(size.sizes, part))
    return Reference(record, base, tuple(others))


def _check(tensors: Tensors, examples: int, prior: int, record: Golden, model: Model, prefix: str) -> None:
    """Raise for tensors of other names, shapes or dtypes, and for values that are not finite."""
    expected = _shapes(tensors, examples, prior, record, model, prefix)
    if set(tensors) != set(expected):
        raise BundleError(f"{FILE} has the tensors {sorted(tensors)}; expected {sorted(expected)}")
    for name, shape in expected.items():
        value, dtype = tensors[name], np.dtype(np.float32 if name == "x" else np.float64)
        if value.shape != shape or value.dtype != dtype:
            raise BundleError(
                f"{FILE}: {prefix}{name} has shape {value.shape} and dtype {value.dtype}; expected {shape} and {dtype}"
            )
        if not np.isfinite(value).all():
            raise BundleError(f"{FILE}: {prefix}{name} has values that are not finite")


def decode_calibration(raw: bytes, model: Model) -> npt.NDArray[np.float32]:
    """The examples of `calibration.safetensors`: (n, *data) float32, where n may be 0.

    Raises:
        BundleError: they are not data of the model.
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


def _shapes(
    tensors: Tensors, examples: int, prior: int, record: Golden, model: Model, prefix: str
) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor must have. Named dimensions have the size of x."""
    if "x" not in tensors or tensors["x"].ndim != len(model.data.shape) + 1:
        raise BundleError(f"{FILE} has no {prefix}x of shape {shape_text(model.data.shape, 'N')}")
    sizes = tensors["x"].shape[1:]
    data = tuple(dim if isinstance(dim, int) else size for dim, size in zip(model.data.shape, sizes, strict=True))
    named = {dim.name: size for dim, size in zip(model.data.shape, sizes, strict=True) if not isinstance(dim, int)}
    try:
        latent = model.latent_shape(named)
    except InputError as error:
        raise BundleError(f"{FILE}: {prefix}x has a size that the model does not take: {error}") from None
    expected = {"x": (examples, *data), "sample": (examples, *data)}
    for name in ENCODER_OUTPUTS[model.posterior.kind]:
        expected[name] = (examples, *latent)
    for name in DECODER_OUTPUTS[model.likelihood.kind]:
        expected[f"prior.{name}"] = (prior, *data)
    if model.has_elbo:
        for name in ("reconstruction", "kl", "scale"):
            expected[name] = (examples,)
    if record.draws:
        for quantity in conditioned(model):
            count = (prior if quantity.startswith("prior.") else examples,)
            expected |= {f"spread.{quantity}": count, f"float32.{quantity}": count}
    return expected


def stretched(rows: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Data cut to another size, or repeated in each direction: (n, *shape).

    Args:
        rows: (n, *data).
        shape: of one example.
    """
    wide = [(0, 0), *((0, max(0, n - m)) for n, m in zip(shape, rows.shape[1:], strict=True))]
    return np.ascontiguousarray(np.pad(rows, wide, mode="wrap")[(slice(None), *map(slice, shape))])
