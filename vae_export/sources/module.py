"""A user's own PyTorch module as a source: its description, the checks of it, and factories that return one."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from vae_export.contract.manifest import Origin
from vae_export.contract.model import DECODER_OUTPUTS, Data, Latent, Likelihood, LikelihoodKind, Model, Posterior
from vae_export.errors import InputError, check_flags
from vae_export.sources import probes
from vae_export.sources.adapter import Adapter, Outputs, describe
from vae_export.sources.probes import error_summary
from vae_export.sources.protocol import Trained


@dataclass(frozen=True)
class Source:
    """A PyTorch module of your own, and what its bundle records of it.

    The module has `encode(x)` and `decode(z)` without random numbers in them; `sources.adapter` lists what they may
    return. Your module is not changed: what is exported is a copy in evaluation mode, on the CPU, in float32. The prior
    p(z) is a standard normal.

    Attributes:
        module: the trained module.
        example: (B, *data), B ≥ 1, a tensor or an array of floating-point values in `data_range`: data of the kind that
            the module was trained on. The module is tried on it. It is kept in the bundle, to verify the bundle on or,
            where there is `held_out`, to choose a lower precision by.
        likelihood: p(x|z): `bernoulli`, `gaussian`, `gaussian_fixed`, `discretized_logistic`, or `none`.
        data_range: the smallest and the largest value of the data, such as (0, 1).
        variance: the one variance of `gaussian_fixed`, in squared units of the data.
        multiple_of: for pictures (C, H, W), in pixels: height and width may be any multiples of it, from the smallest
            that the module takes. None: the example's height and width only.
        held_out: (M, *data), data that the module was not trained on, to verify the bundle on, and kept in it;
            `example` if None. Some hundreds are of use: rows that the certificate does not need serve to choose a
            lower precision by.
        name: of the model; None: the class's name.
        outputs: `logits` or `probabilities`: what a Bernoulli decoder returns, where that cannot be told.
        nominal: the module was not trained with this likelihood, so the ELBO is a convention.
        scaling: for latent diffusion, whose pipelines work on (z − shift) · scaling.
        shift: see scaling.
        keep_example: whether the bundle may keep `example`. False for made-up values, and for data that must not be
            passed on: the bundle is then verified on `held_out`, or on decoded draws from the prior.
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

    def __repr__(self) -> str:
        shape = getattr(self.example, "shape", None)
        example = describe(self.example) if shape is None else f"of shape {tuple(shape)}"
        return f"Source({type(self.module).__name__}, {self.likelihood}, example {example} in {self.data_range})"


def resolve(source: Source) -> Trained:
    """Try the module on its example, and bring it under the protocol.

    Raises:
        InputError: an attribute is wrong or does not fit the module; or the module draws random numbers, mixes the
            examples of a batch, or returns what is not recognized.
    """
    low, high = _check_attributes(source)
    variance = None if source.variance is None else float(source.variance)
    example = checked_rows("example", source.example, (low, high))
    held_out = None if source.held_out is None else checked_rows("held_out", source.held_out, (low, high))
    shape = example.shape[1:]
    if held_out is not None and held_out.shape[1:] != shape:
        raise InputError(f"export: held_out has shape {held_out.shape}; expected rows of shape {shape}, as in example")
    adapter = Adapter(_copied(source.module), source.likelihood, source.outputs).eval()
    with torch.no_grad():
        latent, deterministic = probes.check_methods(adapter, torch.from_numpy(example), (low, high))
        data, latents = probes.named_sizes(adapter, shape, latent, source.multiple_of, (low + high) / 2)
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
    config = {
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
        config=(json.dumps(config, indent=2) + "\n").encode(),
        example_shape=shape,
        held_out=example if held_out is None and source.keep_example else held_out,
        calibration=None if held_out is None or not source.keep_example else example,
    )


def from_factory(spec: str, **options: Any) -> Source:
    """Call a function of the user's code that makes the module. This runs that code.

    Args:
        spec: `package.module:function`, looked up in the current folder and among what is installed. The function takes
            no arguments and returns a `Source`, or a module, which the options then describe.
        options: `shape`, `likelihood`, `data_range`, `variance` and `multiple_of` of `export`.

    Raises:
        InputError: there is no such function, it fails, or it returns something else; a module came without shape,
            likelihood and data range; or a `Source`, which has all that itself, came with an option.
    """
    result = _call_factory(spec)
    if isinstance(result, Source):
        if options:
            raise InputError(
                f"export: {spec} returned a Source, which has {', '.join(options)} itself. Omit "
                f"{'it' if len(options) == 1 else 'them'}, or return the module alone"
            )
        return result
    if not isinstance(result, nn.Module):
        raise InputError(f"export: {spec} returned {describe(result)}; expected a vae_export.Source or torch.nn.Module")
    if missing := [name for name in ("shape", "likelihood", "data_range") if name not in options]:
        raise InputError(
            f"export: {spec} returned a {type(result).__name__} alone; {', '.join(missing)} must be given with it, or "
            "let it return a vae_export.Source"
        )
    shape = options.pop("shape")
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise InputError(f"export: shape must be positive whole numbers such as (3, 32, 32), got {shape}")
    low, high = _check_range(options["data_range"])
    waves = np.sin(np.arange(2 * math.prod(shape), dtype=np.float64) * 0.37).reshape(2, *shape)
    example = (low + (high - low) * (0.5 + 0.5 * waves)).clip(low, high).astype(np.float32)
    return Source(result, example, keep_example=False, **options)


def _call_factory(spec: str) -> Any:
    """The result of the function that `spec` names."""
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
        except Exception as error:  # a user's code may raise anything, here and below
            where = f" There is no such module in {here} or among what is installed" * _is_missing(error, name)
            raise InputError(f"export: {name} could not be imported: {error_summary(error)}.{where}") from error
        if not hasattr(module, attribute):
            raise InputError(
                f"export: the module {name} has no {attribute!r}; expected a function that makes the model"
            )
        function = getattr(module, attribute)
        if not callable(function):
            raise InputError(f"export: {spec} is {describe(function)}; expected a function that makes the model")
        try:
            return function()
        except Exception as error:  # a user's code may raise anything
            raise InputError(
                f"export: {spec} failed: {error_summary(error)}. It is called without arguments"
            ) from error
    finally:
        # The function's module may have changed the path itself: only one entry is ours.
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _is_missing(error: Exception, name: str) -> bool:
    """Whether the module itself is missing, and not one that it imports."""
    return isinstance(error, ModuleNotFoundError) and error.name is not None and f"{name}.".startswith(f"{error.name}.")


def _check_attributes(source: Source) -> tuple[float, float]:
    """Refuse wrong attributes before the module is tried; return the data's range."""
    if not isinstance(source.module, nn.Module):
        raise InputError(f"export: module is {describe(source.module)}; expected a torch.nn.Module with its weights")
    texts = {"likelihood": source.likelihood, "outputs": source.outputs, "name": source.name}
    numbers = {"variance": source.variance, "scaling": source.scaling, "shift": source.shift}
    for values, kind, expected in ((texts, str, "a text"), (numbers, (int, float, np.number), "a number")):
        for name, value in values.items():
            if value is not None and (not isinstance(value, kind) or isinstance(value, (bool, np.complexfloating))):
                raise InputError(f"export: {name} is {describe(value)}; expected {expected}")
    for name, value in numbers.items():
        if value is not None and not _finite(value):
            raise InputError(f"export: {name} is {describe(value)}; expected a finite number")
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
        raise InputError(f"export: data_range is {data_range!r}; expected two finite, ascending numbers such as (0, 1)")
    return low, high


def checked_rows(name: str, value: Any, data_range: tuple[float, float]) -> npt.NDArray[np.float32]:
    """A caller's data as an array (B, *data) float32.

    Raises:
        InputError: the value is no floating-point array of one row or more, or has values that are not finite or lie
            outside of data_range.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    if not isinstance(value, np.ndarray):
        raise InputError(f"export: {name} is {describe(value)}; expected a tensor or an array of shape (B, *data)")
    if not np.issubdtype(value.dtype, np.floating):
        raise InputError(
            f"export: {name} has the type {value.dtype}; expected floating-point values, scaled onto data_range as in "
            "the model's training"
        )
    if value.ndim < 2 or value.size == 0:
        raise InputError(
            f"export: {name} has shape {value.shape}; expected (B, *data) with one example or more. Add the batch axis "
            "to a single example with x[None]"
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
    except Exception as error:  # what a module holds may raise anything when it is copied
        raise InputError(
            f"export: {type(module).__name__} cannot be copied: {error_summary(error)}. What is exported is a copy: "
            "drop what the module keeps besides its weights, such as results of an earlier call"
        ) from error
    result = result.to("cpu", torch.float32).eval()
    for part in result.modules():
        for key, hook in _old_norms(part).items():
            hook.remove(part)
            del part._forward_pre_hooks[key]
    training = [f"{name or 'itself'} ({type(part).__name__})" for name, part in result.named_modules() if part.training]
    if training:
        raise InputError(
            f"export: {type(module).__name__} stays in training mode after eval(): {', '.join(training)}. A train() "
            "or eval() of its own does not reach them; let it call super().train(mode)"
        )
    return result


def _computed(module: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: copies of the `weight` that old `weight_norm` and `spectral_norm` compute before each call.

    It has a gradient, so `deepcopy` refuses it. Other results of earlier calls that a module keeps stay refused.
    """
    copies: dict[int, Any] = {}
    for part in module.modules():
        for hook in _old_norms(part).values():
            value = vars(part)[hook.name]
            copies[id(value)] = value.detach().clone()
    return copies


def _old_norms(part: nn.Module) -> dict[int, WeightNorm | SpectralNorm]:
    """The hooks of a layer's old `weight_norm` and `spectral_norm`."""
    return {k: hook for k, hook in part._forward_pre_hooks.items() if isinstance(hook, (WeightNorm, SpectralNorm))}


def _digest(module: nn.Module) -> str:
    """SHA-256 over the module's tensors in the order of their names, each with name, type and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
