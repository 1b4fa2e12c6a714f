"""A user's own PyTorch module as a source: what has to be said of it, and what can be found out."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from vae_export.contract.manifest import Origin
from vae_export.contract.model import (
    DECODER_OUTPUTS,
    Data,
    Latent,
    LatentDim,
    Likelihood,
    LikelihoodKind,
    Model,
    Posterior,
    SizeDim,
)
from vae_export.errors import InputError, check_flags
from vae_export.sources.adapter import Adapter, Outputs, Parts, advice, shown
from vae_export.sources.protocol import Trained

#: How far an example's results may move when others are in its batch, of the largest: float32 sums in another order
#: move them by a hundredth of it, statistics of the batch by far more.
_ALONE = 1e-4
#: Fewer values than this are positive throughout by chance.
_FEW = 8


@dataclass(frozen=True)
class Source:
    """A PyTorch module of your own, and what its bundle has to say of it.

    The module has `encode(x)` and `decode(z)`, without random numbers in them; `sources.adapter` tells what they may
    return. Your module stays as it is: what is exported is a copy in evaluation mode, on the CPU, in float32. The prior
    p(z) is a standard normal.

    Attributes:
        module: the trained module.
        example: (B, *data), one example or more, as a tensor or an array of floating-point values in `data_range`:
            data of the kind that the module was trained on. The module is tried on it. It is kept in the bundle, to
            verify it with or, beside `held_out`, to choose a lower precision by.
        likelihood: p(x|z): `bernoulli`, `gaussian`, `gaussian_fixed`, `discretized_logistic`, or `none`.
        data_range: the smallest and the largest value of the data, such as (0, 1).
        variance: the one variance of `gaussian_fixed`.
        multiple_of: for pictures (C, H, W): any height and width that is a multiple of this will do, from the smallest
            that the module takes. Without it, only the example's own.
        held_out: (M, *data), data that the module was not trained on, to verify the bundle with, which is kept in it;
            `example` if None. Some hundreds are of use: what is beyond them serves to choose a lower precision by.
        name: what the model is called; the class's name if None.
        outputs: `logits` or `probabilities`, where a Bernoulli decoder leaves open which of them it returns.
        nominal: the module was not trained with this likelihood: it is a convention, and so is the ELBO.
        scaling: for latent diffusion, such a pipeline works on (z − shift) · scaling.
        shift: see scaling.
        keep_example: whether `example` is data that the bundle may keep. False for made-up values, and for data that
            must not be passed on: the bundle is then verified on `held_out`, or on what the decoder makes of noise.
    """

    module: nn.Module
    example: Tensor | npt.NDArray[Any]
    likelihood: LikelihoodKind
    data_range: tuple[float, float]
    variance: float | None = None
    multiple_of: int | None = None
    held_out: Tensor | npt.NDArray[Any] | None = None
    name: str | None = None
    outputs: Outputs | None = None
    nominal: bool = False
    scaling: float = 1.0
    shift: float = 0.0
    keep_example: bool = True


def resolve(source: Source) -> Trained:
    """Try the module on its example, and bring it under the protocol.

    Raises:
        InputError: what was said is wrong or does not fit the module; or the module draws random numbers, mixes the
            examples of a batch, or returns what is not recognized.
    """
    low, high = _check_words(source)
    variance = None if source.variance is None else float(source.variance)
    example = checked_rows("example", source.example, (low, high))
    held_out = None if source.held_out is None else checked_rows("held_out", source.held_out, (low, high))
    shape = example.shape[1:]
    if held_out is not None and held_out.shape[1:] != shape:
        raise InputError(f"export: held_out has shape {held_out.shape}; expected (M, {_dims(shape)}), as example has")
    adapter = Adapter(_copied(source.module), source.likelihood, source.outputs).eval()
    with torch.no_grad():
        latent, deterministic = _try(adapter, torch.from_numpy(example), (low, high))
        data, latents = _sizes(source, adapter, shape, latent)
    try:
        model = Model(
            architecture=type(source.module).__name__,
            parameters=sum(p.numel() for p in source.module.parameters()),
            data=Data(shape=data, range=(low, high)),
            latent=Latent(shape=latents, scaling=float(source.scaling), shift=float(source.shift)),
            prior="standard_normal",
            posterior=Posterior(kind="deterministic" if deterministic else "diagonal_gaussian"),
            likelihood=Likelihood(kind=source.likelihood, variance=variance, nominal=bool(source.nominal)),
        )
        name = type(source.module).__name__ if source.name is None else source.name
        origin = Origin(kind="module", name=name, weights_sha256=_digest(source.module))
    except ValueError as error:
        raise InputError(f"export: {error}") from None
    said = {
        "class": type(source.module).__name__,
        "example_shape": shape,
        "likelihood": source.likelihood,
        "variance": variance,
        "data_range": (low, high),
        "multiple_of": source.multiple_of,
        "outputs": adapter.outputs,
    }
    return Trained(
        module=adapter,
        model=model,
        origin=origin,
        config=(json.dumps(said, indent=2) + "\n").encode(),
        example_shape=shape,
        held_out=example if held_out is None and source.keep_example else held_out,
        calibration=None if held_out is None or not source.keep_example else example,
    )


def from_factory(
    spec: str,
    *,
    shape: tuple[int, ...] | None = None,
    likelihood: LikelihoodKind | None = None,
    data_range: tuple[float, float] | None = None,
    variance: float | None = None,
    multiple_of: int | None = None,
) -> Source:
    """Call a function of the user's code that makes the module. This runs that code.

    Args:
        spec: `package.module:function`, found from the current folder or among what is installed. The function takes
            no arguments and returns a `Source`, or a module, of which the other arguments then tell the rest.
        shape: (*data): the shape of one example, without the batch.
        likelihood: see `Source`; so are the others.
        data_range: see `Source`.
        variance: see `Source`.
        multiple_of: see `Source`.

    Raises:
        InputError: there is no such function, it fails, or it returns something else; a module came without shape,
            likelihood and data range; or a `Source`, which says all that itself, came with one of them.
    """
    made = _make(spec)
    options: dict[str, Any] = {"shape": shape, "likelihood": likelihood, "data_range": data_range}
    options |= {"variance": variance, "multiple_of": multiple_of}
    if isinstance(made, Source):
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise InputError(
                f"export: {spec} returned a Source, which says {', '.join(given)} itself. Leave that away, or return "
                "the module alone"
            )
        return made
    if not isinstance(made, nn.Module):
        raise InputError(f"export: {spec} returned {shown(made)}; expected a vae_export.Source or a torch.nn.Module")
    if shape is None or likelihood is None or data_range is None:
        missing = [name for name in ("shape", "likelihood", "data_range") if options[name] is None]
        raise InputError(
            f"export: {spec} returned a {type(made).__name__} alone; {', '.join(missing)} must be given with it, or "
            "let it return a vae_export.Source"
        )
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise InputError(f"export: shape must be positive whole numbers such as (3, 32, 32), got {shape}")
    low, high = _check_range(data_range)
    waves = np.sin(np.arange(2 * math.prod(shape), dtype=np.float64) * 0.37).reshape(2, *shape)
    example = (low + (high - low) * (0.5 + 0.5 * waves)).clip(low, high).astype(np.float32)
    return Source(made, example, likelihood, data_range, variance=variance, multiple_of=multiple_of, keep_example=False)


def _make(spec: str) -> Any:
    """What the function returns that `spec` names."""
    name, colon, attribute = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in (*name.split("."), attribute)):
        raise InputError(
            f"export: {spec!r} names no function; expected package.module:function, such as models.vae:make"
        )
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # their code, which may raise anything; so below
            where = f" There is no such module in {here} or among what is installed" * _is_missing(error, name)
            raise InputError(f"export: {name} could not be imported: {_said(error)}.{where}") from error
        if not hasattr(module, attribute):
            raise InputError(
                f"export: the module {name} has no {attribute!r}; expected a function that makes the model"
            )
        function = getattr(module, attribute)
        if not callable(function):
            raise InputError(f"export: {spec} is {shown(function)}; expected a function that makes the model")
        try:
            return function()
        except Exception as error:  # their code, as above
            raise InputError(f"export: {spec} failed: {_said(error)}. It is called without arguments") from error
    finally:
        # The function's module may have changed the path itself: only one entry is ours.
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _is_missing(error: Exception, name: str) -> bool:
    """Whether it is this module that is not there, and not one that it imports."""
    return isinstance(error, ModuleNotFoundError) and error.name is not None and f"{name}.".startswith(f"{error.name}.")


def _check_words(source: Source) -> tuple[float, float]:
    """What can be refused before the module is tried; the data's range."""
    if not isinstance(source.module, nn.Module):
        raise InputError(f"export: module is {shown(source.module)}; expected a torch.nn.Module with its weights")
    words = {"likelihood": source.likelihood, "outputs": source.outputs, "name": source.name}
    numbers = {"variance": source.variance, "scaling": source.scaling, "shift": source.shift}
    for said, kind, expected in ((words, str, "a text"), (numbers, (int, float, np.number), "a number")):
        for name, value in said.items():
            if value is not None and (not isinstance(value, kind) or isinstance(value, (bool, np.complexfloating))):
                raise InputError(f"export: {name} is {shown(value)}; expected {expected}")
    for name, value in numbers.items():
        if value is not None and not _finite(value):
            raise InputError(f"export: {name} is {shown(value)}; expected a finite number")
    check_flags("export", nominal=source.nominal, keep_example=source.keep_example)
    if source.likelihood not in DECODER_OUTPUTS:
        raise InputError(f"export: likelihood is {source.likelihood!r}; expected one of {', '.join(DECODER_OUTPUTS)}")
    if source.outputs is not None and (source.likelihood != "bernoulli" or source.outputs not in get_args(Outputs)):
        raise InputError(
            f"export: outputs is {source.outputs!r} and the likelihood {source.likelihood}; expected logits or "
            "probabilities, for bernoulli only"
        )
    if source.likelihood == "gaussian_fixed" and source.variance is None:
        raise InputError(
            "export: likelihood gaussian_fixed needs its variance. For a model trained with the mean squared error "
            "summed over an example, it is 0.5"
        )
    low, high = _check_range(source.data_range)
    if source.likelihood == "bernoulli" and (low, high) != (0.0, 1.0):
        raise InputError(f"export: a Bernoulli likelihood needs data_range (0, 1), got ({low:g}, {high:g})")
    return low, high


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _check_range(data_range: Any) -> tuple[float, float]:
    try:
        low, high = map(float, data_range)
    except (OverflowError, TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"export: data_range is {data_range!r}; expected two finite, rising numbers such as (0, 1)")
    return low, high


def checked_rows(name: str, value: Any, data_range: tuple[float, float]) -> npt.NDArray[np.float32]:
    """Data that a caller gave, as an array (B, *data) float32.

    Raises:
        InputError: it is no floating-point array of one row or more, or has values that are not finite or lie outside
            of data_range.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    if not isinstance(value, np.ndarray):
        raise InputError(f"export: {name} is {shown(value)}; expected a tensor or an array of shape (B, *data)")
    if not np.issubdtype(value.dtype, np.floating):
        raise InputError(
            f"export: {name} has the type {value.dtype}; expected floating-point values, scaled onto data_range as the "
            "model was given them"
        )
    if value.ndim < 2 or value.size == 0:
        raise InputError(
            f"export: {name} has shape {value.shape}; expected (B, *data) with one example or more. A single example "
            "gets its batch axis by [None]"
        )
    rows = np.ascontiguousarray(value, np.float32)
    if not np.isfinite(rows).all():
        raise InputError(f"export: {name} has values that are not finite")
    low, high = data_range
    slack = 1e-6 * (high - low)
    if rows.min() < low - slack or rows.max() > high + slack:
        raise InputError(
            f"export: {name} has values from {rows.min():g} to {rows.max():g}, outside of data_range "
            f"({low:g}, {high:g}). Give the range that the model was trained on, and data in it"
        )
    return rows


def _copied(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, on the CPU, in float32."""
    try:
        result = copy.deepcopy(module, _computed(module))
    except Exception as error:  # their code, as above
        raise InputError(
            f"export: {type(module).__name__} cannot be copied: {_said(error)}. What is exported is a copy: drop what "
            "the module keeps besides its weights, such as results of an earlier call"
        ) from error
    result = result.to("cpu", torch.float32).eval()
    for part in result.modules():
        for key, hook in _old_norms(part).items():
            hook.remove(part)
            del part._forward_pre_hooks[key]
    still = [f"{name or 'itself'} ({type(part).__name__})" for name, part in result.named_modules() if part.training]
    if still:
        raise InputError(
            f"export: {type(module).__name__} stays in training mode after eval(): {', '.join(still)}. A train() or "
            "eval() of its own does not reach them; let it call super().train(mode)"
        )
    return result


def _computed(module: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: copies of what old `weight_norm` and `spectral_norm` keep as a layer's `weight`.

    It is computed from other weights before each call, with the graph of its gradients, which cannot be copied. What
    else a module keeps of earlier calls stays refused.
    """
    found: dict[int, Any] = {}
    for part in module.modules():
        for hook in _old_norms(part).values():
            value = vars(part)[hook.name]
            found[id(value)] = value.detach().clone()
    return found


def _old_norms(part: nn.Module) -> dict[int, WeightNorm | SpectralNorm]:
    """The hooks of a layer's old `weight_norm` and `spectral_norm`."""
    return {k: hook for k, hook in part._forward_pre_hooks.items() if isinstance(hook, (WeightNorm, SpectralNorm))}


def _try(adapter: Adapter, example: Tensor, data_range: tuple[float, float]) -> tuple[tuple[int, ...], bool]:
    """Call encode and decode as the checks need it.

    Args:
        adapter: of the module's copy; what its decoder's single tensor holds is settled.
        example: (B, *data).
        data_range: a single example gets its mirror image in it as a second one.

    Returns:
        One latent's shape, and whether the encoder is deterministic.
    """
    batch = torch.cat([example, sum(data_range) - example]) if len(example) == 1 else example
    data = tuple(batch.shape[1:])
    encoded = _call(adapter, "encode", adapter.encoded, batch)
    _check_positive(adapter, "encode", encoded)
    posterior = _check_repeats(adapter, "encode", adapter.encode, batch)
    for tensor in posterior:
        if tensor.shape != posterior[0].shape or tensor.ndim not in (2, 4) or len(tensor) != len(batch):
            got = " and ".join(
                f"{name} {tuple(t.shape)}" for name, t in zip(("mean", "logvar"), posterior, strict=False)
            )
            raise InputError(
                f"export: {adapter.called('encode')} gave {got} for a batch of {len(batch)} of {data}; expected (B, D) "
                f"or (B, C, h, w), the same for both. The first axis of example is the batch: a single example gets "
                "its by [None]"
            )
    z = posterior[0]
    _check_pair(adapter, "encode", encoded, 1.0)
    _check_alone(adapter, "encode", adapter.encode, batch, posterior)

    _call(adapter, "decode", adapter.settle, z)
    decoded = _call(adapter, "decode", adapter.decoded, z)
    _check_positive(adapter, "decode", decoded)
    likelihood = _check_repeats(adapter, "decode", adapter.decode, z)
    for name, tensor in zip(DECODER_OUTPUTS[adapter.likelihood], likelihood, strict=True):
        if tensor.shape != batch.shape:
            same = " Let decode give its result that shape." if tensor.numel() == batch.numel() else ""
            raise InputError(
                f"export: {adapter.called('decode')} gave {name} of shape {tuple(tensor.shape)} for a batch of "
                f"{len(batch)}; expected {tuple(batch.shape)}, as example has.{same} {advice(adapter.likelihood)}"
            )
    _check_pair(adapter, "decode", decoded, data_range[1] - data_range[0])
    _check_probabilities(adapter, decoded)
    _check_alone(adapter, "decode", adapter.decode, z, likelihood)
    return tuple(z.shape[1:]), len(posterior) == 1


def _check_positive(adapter: Adapter, method: str, parts: Parts) -> None:
    """Standard deviations and variances are."""
    for name in ("std", "variance"):
        if name in parts.tensors and not (parts.tensors[name] > 0).all():
            raise InputError(
                f"export: {adapter.called(method)} gave a {name} of {parts.tensors[name].min():g}; "
                "expected positive values"
            )


def _check_pair(adapter: Adapter, method: str, parts: Parts, width: float) -> None:
    """What stands where a log-variance is expected should be no standard deviation, or every result would be wrong.

    A log-variance that is positive throughout says that all is spread more widely than 1: more than the prior, or
    than data in a range of `width` up to 2. A few values say nothing.
    """
    logvar = parts.tensors.get("logvar")
    if logvar is not None and not parts.named and width <= 2 and logvar.numel() >= _FEW and (logvar > 0).all():
        raise InputError(
            f"export: {adapter.called(method)} gave a pair whose second is positive throughout: it may be a standard "
            "deviation where a log-variance is expected. Return a dict that tells: mean and logvar, std or variance. "
            f"{advice(adapter.likelihood)}"
        )


def _check_probabilities(adapter: Adapter, parts: Parts) -> None:
    """What is said to be a probability is one, and belongs to the logits beside it."""
    p = parts.tensors.get("probabilities")
    if p is None:
        return
    if p.min() < 0 or p.max() > 1:
        raise InputError(
            f"export: {adapter.called('decode')} gave probabilities from {p.min():g} to {p.max():g}; expected values "
            'in [0, 1]. If they are logits, give outputs="logits"'
        )
    if "logits" in parts.tensors and (error := (p - torch.sigmoid(parts.tensors["logits"])).abs().max()) > 1e-5:
        raise InputError(
            f"export: {adapter.called('decode')} gave two tensors, and the first is not the sigmoid of the second: "
            f"they differ by {error:.3g}. Return (probabilities, logits), or logits alone"
        )


def _call(adapter: Adapter, method: str, function: Callable[[Tensor], Any], value: Tensor) -> Any:
    """Call the module on a copy of `value`, which it may change."""
    try:
        return function(value.clone())
    except InputError:
        raise
    except Exception as error:  # their code, as above
        axis = " The first axis of example is the batch: a single example gets its by [None]" * (method == "encode")
        raise InputError(
            f"export: {adapter.called(method)} failed on a batch of {len(value)} of {tuple(value.shape[1:])}: "
            f"{_said(error)}.{axis}"
        ) from error


def _check_repeats(
    adapter: Adapter, method: str, function: Callable[[Tensor], tuple[Tensor, ...]], value: Tensor
) -> tuple[Tensor, ...]:
    """Call it with two states of the random generators: a pure function does not see them."""
    results: list[tuple[Tensor, ...]] = []
    with _random_state():
        for seed in (0, 1):
            torch.manual_seed(seed)
            results.append(_call(adapter, method, function, value))
    first, second = results
    if not all(bool(torch.isfinite(tensor).all()) for tensor in first):
        raise InputError(f"export: {adapter.called(method)} gave values that are not finite on the example")
    if not all(map(torch.equal, first, second)):
        raise InputError(
            f"export: {adapter.called(method)} draws random numbers: two calls with the same argument differ. Either "
            "it samples, which is left to the runtime, or dropout stays on after eval(). Let it return the "
            f"distribution's parameters. {advice(adapter.likelihood)}"
        )
    return first


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    """The caller's random generators go on as if nothing had been drawn from them."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _check_alone(
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
        (one[0] - many[0]).abs().max() > _ALONE * many.abs().max() for one, many in zip(alone, together, strict=True)
    ):
        norms = [
            name
            for name, part in adapter.module.named_modules()
            if isinstance(part, _NormBase) and part.running_mean is None
        ]
        culprits = f", as {', '.join(norms)} has none" if norms else ""
        raise InputError(
            f"export: {adapter.called(method)} mixes the examples of a batch: the first gives other results alone. "
            f"Batch normalization must use its running statistics{culprits}; train it with track_running_stats=True"
        )


def _sizes(
    source: Source, adapter: Adapter, shape: tuple[int, ...], latent: tuple[int, ...]
) -> tuple[tuple[int | SizeDim, ...], tuple[int | LatentDim, ...]]:
    """The shapes of data and latents, with named height and width where the source has them."""
    unit = source.multiple_of
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
    divided = [size // max(1, small) for size, small in zip(shape[1:], latent[1:], strict=True)]
    fits = [size == small * by for size, small, by in zip(shape[1:], latent[1:], divided, strict=True)]
    if not all(fits) or any(unit % max(1, by) for by in divided):
        raise InputError(
            f"export: latents of {latent[1:]} for pictures of {shape[1:]} do not follow sizes that are multiples of "
            f"{unit}: the model divides by {divided[0]} and {divided[1]}, of which multiple_of must be a multiple"
        )
    # One size says nothing of another: the next one is tried, too.
    other = (shape[0], shape[1] + unit, shape[2] + 2 * unit)
    expected = (latent[0], other[1] // divided[0], other[2] // divided[1])
    z, back = _at_size(source, adapter, other)
    if z != expected or back != other:
        raise InputError(
            f"export: multiple_of={unit}, and for pictures {other} the module gave latents {z} and "
            f"reconstructions {back}; expected {expected} and {other}"
        )
    height, width = (
        SizeDim(name=name, multiple_of=unit, min=_smallest(source, adapter, shape, axis, divided))
        for axis, name in ((1, "height"), (2, "width"))
    )
    h, w = (LatentDim(name=n, divided_by=by) for n, by in zip(("height", "width"), divided, strict=True))
    return (shape[0], height, width), (latent[0], h, w)


def _at_size(source: Source, adapter: Adapter, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of latents and reconstruction for a picture of another size than the example's."""
    x = torch.full((1, *shape), sum(source.data_range) / 2)
    try:
        z = _call(adapter, "encode", adapter.encode, x)[0]
        return tuple(z.shape[1:]), tuple(_call(adapter, "decode", adapter.decode, z)[0].shape[1:])
    except InputError as error:
        raise InputError(
            f"{str(error).rstrip('.')}. It was tried at another size than the example's, because multiple_of is "
            f"{source.multiple_of}: something in the module was made for one size, as an embedding of positions or a "
            "number in reshape is. Interpolate it to x.shape[-2:], write -1, or leave multiple_of away"
        ) from error


def _smallest(source: Source, adapter: Adapter, shape: tuple[int, ...], axis: int, divided: Sequence[int]) -> int:
    """The smallest height or width that the module takes: padding by reflection, for instance, needs some.

    It is searched for by halves, the other side as in the example: what takes a size takes all above it.
    """
    unit = source.multiple_of
    assert unit is not None
    low, high = 1, shape[axis] // unit
    while low < high:
        middle = (low + high) // 2
        tried = (*shape[:axis], middle * unit, *shape[axis + 1 :])
        latent = tuple(size // by for size, by in zip(tried[1:], divided, strict=True))
        try:
            z, back = _at_size(source, adapter, tried)
            fits = z[1:] == latent and back == tried
        except InputError:
            fits = False
        low, high = (low, middle) if fits else (middle + 1, high)
    return low * unit


def _digest(module: nn.Module) -> str:
    """SHA-256 over the module's tensors in the order of their names, each with name, type and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _said(error: Exception) -> str:
    """The first line of what an error says, with its type."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(" .:")


def _dims(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
