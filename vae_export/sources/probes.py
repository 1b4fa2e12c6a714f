"""Calls of a user's `encode` and `decode` on an example, and what the results must satisfy before an export."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from vae_export.contract.model import DECODER_OUTPUTS, LatentDim, SizeDim
from vae_export.errors import InputError
from vae_export.sources.adapter import Adapter, Parts, advice

#: Largest deviation between an example's results alone and in a batch, relative to max|result|: another order of
#: float32 sums moves them by a hundredth of it, statistics of the batch by far more.
_BATCH_TOLERANCE = 1e-4
#: Fewer values than this are all positive by chance.
_MIN_VALUES = 8
_BATCH_AXIS = "The first axis of example is the batch: add it to a single example with x[None]"


def check_methods(adapter: Adapter, example: Tensor, data_range: tuple[float, float]) -> tuple[tuple[int, ...], bool]:
    """Call encode and decode, and refuse what is random, not finite, of a wrong shape, or depends on the batch.

    Args:
        adapter: of the module's copy; what its decoder's single tensor holds is decided here.
        example: (B, *data). A single example gets its mirror image in the data's range as a second one.
        data_range: the smallest and the largest value of the data.

    Returns:
        The shape of one latent, and whether the encoder is deterministic.

    Raises:
        InputError: one of the checks failed.
    """
    batch = torch.cat([example, sum(data_range) - example]) if len(example) == 1 else example
    data = tuple(batch.shape[1:])
    encoded = _call(adapter, "encode", adapter.encode_parts, batch)
    _check_positive(adapter, "encode", encoded)
    posterior = _check_repeatable(adapter, "encode", adapter.encode, batch)
    for tensor in posterior:
        if tensor.shape != posterior[0].shape or tensor.ndim not in (2, 4) or len(tensor) != len(batch):
            shapes = " and ".join(
                f"{name} {tuple(t.shape)}" for name, t in zip(("mean", "logvar"), posterior, strict=False)
            )
            raise InputError(
                f"export: {adapter.label('encode')} gave {shapes} for a batch of {len(batch)} of {data}; expected "
                f"(B, D) or (B, C, h, w), the same for both. {_BATCH_AXIS}"
            )
    z = posterior[0]
    _check_logvar(adapter, "encode", encoded, 1.0)
    _check_independent(adapter, "encode", adapter.encode, batch, posterior)

    _call(adapter, "decode", adapter.decide_outputs, z)
    decoded = _call(adapter, "decode", adapter.decode_parts, z)
    _check_positive(adapter, "decode", decoded)
    likelihood = _check_repeatable(adapter, "decode", adapter.decode, z)
    for name, tensor in zip(DECODER_OUTPUTS[adapter.likelihood], likelihood, strict=True):
        if tensor.shape != batch.shape:
            reshape = " Let decode reshape its result to that." if tensor.numel() == batch.numel() else ""
            raise InputError(
                f"export: {adapter.label('decode')} gave {name} of shape {tuple(tensor.shape)} for a batch of "
                f"{len(batch)}; expected {tuple(batch.shape)}, the shape of example.{reshape} "
                f"{advice(adapter.likelihood)}"
            )
    _check_logvar(adapter, "decode", decoded, data_range[1] - data_range[0])
    _check_probabilities(adapter, decoded)
    _check_independent(adapter, "decode", adapter.decode, z, likelihood)
    return tuple(z.shape[1:]), len(posterior) == 1


def named_sizes(
    adapter: Adapter, shape: tuple[int, ...], latent: tuple[int, ...], unit: int | None, value: float
) -> tuple[tuple[int | SizeDim, ...], tuple[int | LatentDim, ...]]:
    """The shapes of data and latents with named height and width, after calls at other sizes than the example's.

    Args:
        adapter: of the module's copy.
        shape: (C, H, W) of the example.
        latent: of its latents.
        unit: `Source.multiple_of`; None: the shapes stay as they are.
        value: of all pixels of the pictures that are tried.

    Raises:
        InputError: unit is no positive whole number, the shapes do not follow it, or the module fails at another size.
    """
    if unit is None:
        return shape, latent
    if isinstance(unit, bool) or not isinstance(unit, int) or unit < 1:
        raise InputError(f"export: multiple_of is {unit!r}; expected a whole number of 1 or more")
    if len(shape) != 3 or len(latent) != 3:
        raise InputError(
            f"export: multiple_of needs pictures (C, H, W) with spatial latents (C, h, w); the data's shape is "
            f"{shape}, the latents' {latent}"
        )
    if shape[1] % unit or shape[2] % unit:
        raise InputError(f"export: the example has height and width {shape[1:]}, which are no multiples of {unit}")
    factors = [size // max(1, small) for size, small in zip(shape[1:], latent[1:], strict=True)]
    fits = [size == small * by for size, small, by in zip(shape[1:], latent[1:], factors, strict=True)]
    if not all(fits) or any(unit % max(1, by) for by in factors):
        raise InputError(
            f"export: latents of {latent[1:]} for pictures of {shape[1:]} do not follow sizes that are multiples of "
            f"{unit}: the model divides by {factors[0]} and {factors[1]}, of which multiple_of must be a multiple"
        )
    other = (shape[0], shape[1] + unit, shape[2] + 2 * unit)
    expected = (latent[0], other[1] // factors[0], other[2] // factors[1])
    z, reconstruction = _shapes_at(adapter, other, unit, value)
    if z != expected or reconstruction != other:
        raise InputError(
            f"export: multiple_of={unit}, and for pictures {other} the module gave latents {z} and "
            f"reconstructions {reconstruction}; expected {expected} and {other}"
        )
    height, width = (
        SizeDim(name=name, multiple_of=unit, min=_smallest(adapter, shape, axis, factors, unit, value))
        for axis, name in ((1, "height"), (2, "width"))
    )
    h, w = (LatentDim(name=n, divided_by=by) for n, by in zip(("height", "width"), factors, strict=True))
    return (shape[0], height, width), (latent[0], h, w)


def error_summary(error: Exception) -> str:
    """Type and first line of an error that a user's code raised."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(" .:")


def _call(adapter: Adapter, method: str, function: Callable[[Tensor], Any], value: Tensor) -> Any:
    """Call the module on a copy of `value`, which it may change."""
    try:
        return function(value.clone())
    except InputError:
        raise
    except Exception as error:  # a user's code may raise anything
        axis = f" {_BATCH_AXIS}" * (method == "encode")
        raise InputError(
            f"export: {adapter.label(method)} failed on a batch of {len(value)} of {tuple(value.shape[1:])}: "
            f"{error_summary(error)}.{axis}"
        ) from error


def _check_positive(adapter: Adapter, method: str, parts: Parts) -> None:
    for name in ("std", "variance"):
        if name in parts.tensors and not (parts.tensors[name] > 0).all():
            raise InputError(
                f"export: {adapter.label(method)} gave a {name} of {parts.tensors[name].min():g}; "
                "expected positive values"
            )


def _check_logvar(adapter: Adapter, method: str, parts: Parts, width: float) -> None:
    """Refuse what is probably a standard deviation in the place of a log-variance.

    A log-variance that is positive throughout is that of a distribution wider than 1 in every value: wider than the
    prior, or than data in a range of `width` up to 2.
    """
    logvar = parts.tensors.get("logvar")
    if logvar is not None and not parts.named and width <= 2 and logvar.numel() >= _MIN_VALUES and (logvar > 0).all():
        raise InputError(
            f"export: {adapter.label(method)} gave a pair whose second is positive throughout: it may be a standard "
            "deviation where a log-variance is expected. Return a dict with the keys mean and logvar, std or variance. "
            f"{advice(adapter.likelihood)}"
        )


def _check_probabilities(adapter: Adapter, parts: Parts) -> None:
    """Probabilities lie in [0, 1], and are the sigmoid of logits that come with them."""
    p = parts.tensors.get("probabilities")
    if p is None:
        return
    if p.min() < 0 or p.max() > 1:
        raise InputError(
            f"export: {adapter.label('decode')} gave probabilities from {p.min():g} to {p.max():g}; expected values "
            'in [0, 1]. If they are logits, pass outputs="logits"'
        )
    if "logits" in parts.tensors and (error := (p - torch.sigmoid(parts.tensors["logits"])).abs().max()) > 1e-5:
        raise InputError(
            f"export: {adapter.label('decode')} gave two tensors, and the first is not the sigmoid of the second: "
            f"they differ by {error:.3g}. Return (probabilities, logits), or logits alone"
        )


def _check_repeatable(
    adapter: Adapter, method: str, function: Callable[[Tensor], tuple[Tensor, ...]], value: Tensor
) -> tuple[Tensor, ...]:
    """The results, which must be finite and the same with two states of the random generators."""
    results: list[tuple[Tensor, ...]] = []
    with _random_state():
        for seed in (0, 1):
            torch.manual_seed(seed)
            results.append(_call(adapter, method, function, value))
    first, second = results
    if not all(bool(torch.isfinite(tensor).all()) for tensor in first):
        raise InputError(f"export: {adapter.label(method)} gave values that are not finite on the example")
    if not all(map(torch.equal, first, second)):
        raise InputError(
            f"export: {adapter.label(method)} draws random numbers: two calls with the same argument differ. Either "
            "it samples, which is left to the runtime, or dropout stays on after eval(). Let it return the "
            f"distribution's parameters. {advice(adapter.likelihood)}"
        )
    return first


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    """Restore the caller's random generators afterwards."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _check_independent(
    adapter: Adapter,
    method: str,
    function: Callable[[Tensor], tuple[Tensor, ...]],
    value: Tensor,
    together: tuple[Tensor, ...],
) -> None:
    """An example's results do not depend on the others in its batch."""
    try:
        alone: tuple[Tensor, ...] | None = function(value[:1].clone())
    except Exception:  # batch normalization without its own statistics refuses a batch of one
        alone = None
    if alone is None or any(
        (one[0] - many[0]).abs().max() > _BATCH_TOLERANCE * many.abs().max()
        for one, many in zip(alone, together, strict=True)
    ):
        norms = [
            name
            for name, part in adapter.module.named_modules()
            if isinstance(part, _NormBase) and part.running_mean is None
        ]
        culprits = f", as {', '.join(norms)} has none" if norms else ""
        raise InputError(
            f"export: {adapter.label(method)} mixes the examples of a batch: the first gives other results alone. "
            f"Batch normalization must use its running statistics{culprits}; train it with track_running_stats=True"
        )


def _shapes_at(
    adapter: Adapter, shape: tuple[int, ...], unit: int, value: float
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of latents and reconstruction for one picture of another size than the example's."""
    x = torch.full((1, *shape), value)
    try:
        z = _call(adapter, "encode", adapter.encode, x)[0]
        return tuple(z.shape[1:]), tuple(_call(adapter, "decode", adapter.decode, z)[0].shape[1:])
    except InputError as error:
        raise InputError(
            f"{str(error).rstrip('.')}. It was tried at another size than the example's, because multiple_of is "
            f"{unit}: something in the module is for one size only, as an embedding of positions or a number in "
            "reshape is. Interpolate it to x.shape[-2:], write -1, or omit multiple_of"
        ) from error


def _smallest(
    adapter: Adapter, shape: tuple[int, ...], axis: int, factors: Sequence[int], unit: int, value: float
) -> int:
    """The smallest height or width that the module takes, by bisection: padding by reflection needs some pixels."""
    low, high = 1, shape[axis] // unit
    while low < high:
        middle = (low + high) // 2
        size = (*shape[:axis], middle * unit, *shape[axis + 1 :])
        latent = tuple(pixels // by for pixels, by in zip(size[1:], factors, strict=True))
        try:
            z, reconstruction = _shapes_at(adapter, size, unit, value)
            fits = z[1:] == latent and reconstruction == size
        except InputError:
            fits = False
        low, high = (low, middle) if fits else (middle + 1, high)
    return low * unit
