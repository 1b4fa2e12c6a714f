"""A user's own PyTorch module as a source."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vae_export.errors import InputError
from vae_export.manifest import (
    DECODER_OUTPUTS,
    Data,
    Latent,
    LatentDim,
    Likelihood,
    LikelihoodKind,
    Model,
    Origin,
    Posterior,
    SizeDim,
)
from vae_export.sources.adapter import ADAPTER, Adapter
from vae_export.sources.protocol import Trained

Outputs = Literal["logits", "mean"]


@dataclass(frozen=True, kw_only=True)
class _Options:
    variance: float | None = None
    multiple_of: int | None = None
    outputs: Outputs | None = None
    held_out: npt.NDArray[np.float32] | None = None
    name: str | None = None
    nominal: bool = False
    scaling: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True)
class Source(_Options):
    """A trained module and what it cannot say itself.

    Attributes:
        module: has `encode` and `decode`, or pythae's `encoder` and `decoder`; see `adapter.Adapter` for what they may
            return. It is copied, to the CPU, in float32 and evaluation mode.
        example: (B, *data) float32, B ≥ 1: data such as the model was trained on.
        likelihood: p(x|z): `bernoulli`, `gaussian`, `gaussian_fixed`, `discretized_logistic` or `none`.
        data_range: the smallest and the largest value of the data.
        variance: that of `gaussian_fixed`.
        multiple_of: the data are pictures (C, H, W) whose height and width may be any multiples of this.
        outputs: what a Bernoulli decoder's one tensor holds, where it does not say so: `logits` or `mean`.
        held_out: (M, *data) float32 that the model was not trained on, for the certificate.
        name: of the architecture; the class's otherwise.
        nominal: the model was not trained with this likelihood: it is a convention.
        scaling: for latent diffusion, which works on (z − shift) · scaling.
        shift: see scaling.
    """

    module: nn.Module
    example: Tensor | npt.NDArray[Any]
    likelihood: str
    data_range: tuple[float, float]


def resolve(source: Source) -> Trained:
    """Look at a module's outputs, and describe it.

    Raises:
        InputError: it is not a module, what is said of it is wrong, or its outputs cannot be exported: they are not
            recognized, drawn, or depend on the rest of the batch.
    """
    if not isinstance(source.module, nn.Module):
        raise InputError(f"export: got a {type(source.module).__name__} for the module; expected a torch.nn.Module")
    if source.likelihood not in get_args(LikelihoodKind):
        known = ", ".join(get_args(LikelihoodKind))
        raise InputError(f"export: likelihood is {source.likelihood!r}; expected one of {known}")
    if source.outputs not in (None, *get_args(Outputs)):
        raise InputError(f"export: outputs is {source.outputs!r}; expected 'logits' or 'mean'")
    name = source.name or type(source.module).__name__
    low, high = _data_range(source.data_range)
    x = _example(source.example, low, high)
    module = Adapter(_quiet_copy(source.module), source.likelihood, source.outputs).eval()
    posterior = _twice("encode", module.encode, x)
    _check_shapes(posterior, len(x))
    _twice("decode", module.decode, posterior[0])
    _check_training(module)
    _check_alone("encode", module.encode, x)
    latent = tuple(posterior[0].shape[1:])
    parameters = _call(module.decode, posterior[0])
    wanted = DECODER_OUTPUTS[source.likelihood]
    if len(parameters) != len(wanted):
        raise InputError(
            f"export: decode gives {len(parameters)} tensor{'s' * (len(parameters) != 1)}; a {source.likelihood} "
            f"likelihood needs {', '.join(wanted)}. Pass another likelihood, or: {ADAPTER}"
        )
    wrong = [tuple(p.shape) for p in parameters if p.shape != x.shape]
    if wrong:
        raise InputError(
            f"export: decode gives shape {wrong[0]} for data of shape {tuple(x.shape)}; expected the data's. {ADAPTER}"
        )
    shape, latent_shape = _sizes(tuple(x.shape[1:]), latent, source.multiple_of)
    state = source.module.state_dict()
    try:
        model = Model(
            architecture=name,
            parameters=sum(p.numel() for p in source.module.parameters()),
            data=Data(shape=shape, range=(low, high)),
            latent=Latent(shape=latent_shape, scaling=source.scaling, shift=source.shift),
            prior="standard_normal",
            posterior=Posterior(kind="diagonal_gaussian" if len(posterior) == 2 else "deterministic"),
            likelihood=Likelihood(
                kind=cast("LikelihoodKind", source.likelihood), variance=source.variance, nominal=source.nominal
            ),
        )
    except ValueError as error:
        raise InputError(f"export: {error}") from None
    held_out = source.held_out
    return Trained(
        module=module,
        model=model,
        origin=Origin(kind="module", name=name, weights_sha256=_digest(state)),
        config=json.dumps({"module": name, "likelihood": source.likelihood}, indent=2).encode() + b"\n",
        example_shape=tuple(x.shape[1:]),
        held_out=None if held_out is None else np.asarray(held_out, np.float32),
    )


def from_factory(
    name: str,
    *,
    shape: tuple[int, ...] | None = None,
    likelihood: str | None = None,
    data_range: tuple[float, float] | None = None,
    **options: Any,
) -> Trained:
    """Call `package.module:factory`, which returns a `Source`, or a module that the arguments describe.

    Args:
        name: the factory, found as Python finds modules, and in the folder that one stands in.
        shape: one example's, of a bare module.
        likelihood: of a bare module.
        data_range: of a bare module.
        options: variance, multiple_of and outputs, as of `Source`, of a bare module.

    Raises:
        InputError: there is no such factory, it fails, or what it returns is neither, or as `resolve`.
    """
    made = _made(name)
    said = {"shape": shape, "likelihood": likelihood, "data_range": data_range}
    if isinstance(made, Source):
        given = [key for key, value in {**said, **options}.items() if value is not None]
        if given:
            raise InputError(f"export: {name} returns a Source, which says everything itself. Drop {', '.join(given)}")
        return resolve(made)
    if not isinstance(made, nn.Module):
        raise InputError(
            f"export: {name} returns a {type(made).__name__}; expected a vae_export.Source or a torch.nn.Module"
        )
    missing = [f"--{key.removeprefix('data_')}" for key, value in said.items() if value is None]
    if shape is None or likelihood is None or data_range is None:
        raise InputError(f"export: {name} returns a bare module. Say what it is of: {', '.join(missing)}")
    low, high = _data_range(data_range)
    # Smooth, the same everywhere, and touching both ends.
    wave = np.sin(np.arange(2 * int(np.prod(shape))) * 0.7).reshape(2, *shape)
    example = (low + (high - low) * (0.5 + 0.5 * wave)).astype(np.float32).clip(low, high)
    return resolve(Source(made, example, likelihood, data_range, **options))


def _made(name: str) -> Any:
    place, _, attribute = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise InputError(f"export: importing {place} fails: {error}") from None
            raise InputError(
                f"export: there is no module {place!r} in the current folder or installed. The form is "
                "package.module:factory"
            ) from None
        except Exception as error:
            raise InputError(f"export: importing {place} fails: {type(error).__name__}: {error}") from error
        factory = getattr(module, attribute, None)
        if not callable(factory):
            found = "nothing" if factory is None else f"a {type(factory).__name__}"
            raise InputError(
                f"export: {place} has {found} called {attribute!r}; expected a function that returns the model"
            )
        try:
            return factory()
        except Exception as error:
            raise InputError(f"export: {name}() fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)


def _data_range(given: Any) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in given)
    except (TypeError, ValueError):
        raise InputError(f"export: data_range is {given!r}; expected two numbers such as (0, 1)") from None
    if not (np.isfinite([low, high]).all() and low < high):
        raise InputError(f"export: data_range is {given!r}; expected two finite, rising numbers")
    return low, high


def _example(given: Any, low: float, high: float) -> Tensor:
    """The example as a batch on the CPU."""
    x = torch.as_tensor(given) if isinstance(given, (Tensor, np.ndarray)) else None
    if x is None:
        raise InputError(f"export: example is a {type(given).__name__}; expected a tensor or an array (B, *data)")
    if x.dtype != torch.float32:
        raise InputError(f"export: example has dtype {str(x.dtype).removeprefix('torch.')}; expected float32")
    if x.ndim < 2 or len(x) == 0:
        raise InputError(f"export: example has shape {tuple(x.shape)}; expected a batch (B, *data), such as x[None]")
    x = x.detach().cpu()
    if not torch.isfinite(x).all():
        raise InputError("export: example has values that are not finite")
    if float(x.min()) < low or float(x.max()) > high:
        raise InputError(
            f"export: example has values from {float(x.min()):g} to {float(x.max()):g}, outside of data_range "
            f"[{low:g}, {high:g}]. Scale it as for training, or say the range"
        )
    return x


def _quiet_copy(module: nn.Module) -> nn.Module:
    """The user's module is left as it is."""
    try:
        return copy.deepcopy(module).cpu().float().eval()
    except Exception as error:  # whatever a part of theirs raises
        raise InputError(
            f"export: {type(module).__name__} cannot be copied: {type(error).__name__}: {error}. Export a module of "
            "parameters and layers alone"
        ) from error


def _call(function: Any, value: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        result: tuple[Tensor, ...] = function(value)
    return result


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """With PyTorch's random state of a seed; the caller's is given back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _twice(method: str, function: Any, value: Tensor) -> tuple[Tensor, ...]:
    """The outputs, if they are the same under two seeds."""
    with _seeded(1):
        first = _call(function, value)
    with _seeded(2):
        second = _call(function, value)
    if any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)):
        raise InputError(
            f"export: {method} gives other values when it is run again: it draws random numbers, such as a sample of "
            f"the posterior or dropout, and a graph must not. {ADAPTER}"
        )
    return first


def _check_training(module: nn.Module) -> None:
    active = [
        name.removeprefix("module.")
        for name, child in module.named_modules()
        if child.training and isinstance(child, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm))
    ]
    if active:
        raise InputError(
            f"export: {', '.join(active[:5])} stay in training mode after eval(): dropout would be drawn, and batch "
            "norm would take its statistics from the batch. Do not override train()"
        )


def _check_alone(method: str, function: Any, x: Tensor) -> None:
    """An example's outputs may not depend on the others of its batch."""
    low, high = x.min(), x.max()
    together = _call(function, torch.cat([x[:1], low + high - x[:1], x[:1] * 0.5 + low * 0.5]))
    try:
        alone = _call(function, x[:1])
        same = all(
            torch.allclose(one[0], several[0], rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-6, equal_nan=True)
            for one, several in zip(alone, together, strict=True)
        )
    except ValueError:  # batch norm refuses statistics of one value
        same = False
    if not same:
        raise InputError(
            f"export: {method} gives an example other values in another batch: batch norm without running "
            "statistics does. Train with track_running_stats=True, or use another norm"
        )


def _check_shapes(posterior: tuple[Tensor, ...], batch: int) -> None:
    shapes = [tuple(value.shape) for value in posterior]
    if len(set(shapes)) > 1:
        raise InputError(
            f"export: encode gives a mean of shape {shapes[0]} and a log-variance of {shapes[1]}. {ADAPTER}"
        )
    if len(shapes[0]) not in (2, 4) or shapes[0][0] != batch:
        raise InputError(
            f"export: encode gives latents of shape {shapes[0]} for a batch of {batch}; expected (B, D) or (B, C, h, "
            f"w). {ADAPTER}"
        )
    if not all(torch.isfinite(value).all() for value in posterior):
        raise InputError(
            "export: encode gives values that are not finite for the example; a deviation of 0 or less does"
        )


def _sizes(
    data: tuple[int, ...], latent: tuple[int, ...], multiple_of: int | None
) -> tuple[tuple[int | SizeDim, ...], tuple[int | LatentDim, ...]]:
    """The shapes, with named height and width where those may vary."""
    if multiple_of is None:
        return data, latent
    if len(data) != 3 or len(latent) != 3:
        raise InputError(
            f"export: multiple_of is for pictures (C, H, W) with latents (C, h, w); got {data} with latents {latent}"
        )
    names = ("height", "width")
    if any(size % multiple_of or size % small or multiple_of % (size // small) for size, small in _pairs(data, latent)):
        raise InputError(
            f"export: multiple_of is {multiple_of}, and the example {data} has latents {latent}: both sizes must be "
            "multiples of it, and it a multiple of pixels to a latent"
        )
    sized = tuple(SizeDim(name=name, multiple_of=multiple_of, min=multiple_of) for name in names)
    divided = tuple(
        LatentDim(name=name, divided_by=size // small)
        for name, (size, small) in zip(names, _pairs(data, latent), strict=True)
    )
    return (data[0], *sized), (latent[0], *divided)


def _pairs(data: tuple[int, ...], latent: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip(data[1:], latent[1:], strict=True))


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 over the tensors' names and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if isinstance(state[name], Tensor):
            value = state[name].detach().cpu().contiguous()
            digest.update(name.encode() + str(value.dtype).encode() + str(tuple(value.shape)).encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
