"""The reference of a certificate: the PyTorch model in float64 on the golden examples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vae_export import elbo, golden, likelihoods, noise
from vae_export.errors import InputError
from vae_export.golden import EXTREMES, Reference
from vae_export.manifest import Cost, Golden, Model, SizeDim
from vae_export.sources.protocol import Decoder, Encoder, Trained
from vae_export.trainers.objective import kl_terms, log_prob_of

#: The seed of the golden examples' noise, and of the choice of rows.
SEED = 2014
_ROWS = 256  # of data, and of prior draws
_FEWEST = 7  # the largest batch of those that every certificate has
#: Multiply-adds of encoding and decoding all rows once, above which there are fewer of them.
_WORK = 2e11
_MEMORY = 1 << 30  # of intermediate results at once


def rows(costs: Mapping[str, Cost], sizes: Mapping[str, int]) -> int:
    """How many rows of data, and as many draws from the prior, a model of these costs is measured on."""
    each = sum(cost.at(sizes)[0] for cost in costs.values())
    return min(_ROWS, max(_FEWEST, int(_WORK / max(each, 1))))


def compute(source: Trained, costs: Mapping[str, Cost]) -> Reference:
    """Run the PyTorch model in float64 on held-out data, extremes and prior draws; see `golden`.

    The ELBO's terms are those of `trainers.objective`: PyTorch's, not the runtime's NumPy ones.

    Args:
        source: the model.
        costs: of its encoder and decoder; they decide how many rows there are, and how many run at once.

    Raises:
        InputError: the model gives what it is not said to give.
    """
    model, seed = source.model, SEED
    count = rows(costs, source.sizes())
    bytes_each = 2 * max(cost.at(source.sizes())[1] for cost in costs.values())  # counted in float32
    batch = min(64, max(1, _MEMORY // max(bytes_each, 1)))
    exact, single = _Torch(source, torch.float64, batch), _Torch(source, torch.float32, batch)
    latent = model.latent_shape(source.sizes())
    size = math.prod(latent)
    z = noise.normals(seed, noise.PRIOR, 0, count, size).reshape(-1, *latent)
    prior = exact.decode(z)
    held_out = np.zeros((0, *source.example_shape), np.float32)
    if source.held_out is not None:
        chosen = noise.permutation(seed, noise.VERIFIER, 0, len(source.held_out))[:count]
        held_out = np.asarray(source.held_out[np.sort(chosen)], np.float32)
    decoded = np.clip(prior["sample"], *model.data.range).astype(np.float32)[: count - len(held_out)]
    x = np.concatenate([golden.extremes(source.example_shape, model.data.range), held_out, decoded])

    posterior = exact.encode(x)
    _check_claims(model, posterior, prior)
    eps = noise.normals(seed, noise.POSTERIOR, 0, len(x), size).reshape(-1, *latent)
    tensors: golden.Tensors = {"x": x, **posterior, **exact.terms(x, eps)}
    tensors |= {f"prior.{name}": value for name, value in prior.items()}
    own = single.encode(x) | {f"prior.{name}": value for name, value in single.decode(z).items()}
    if "logvar" in posterior:
        divergence = elbo.kl_between_terms(posterior["mean"], posterior["logvar"], own["mean"], own["logvar"])
        tensors["float32.divergence"] = divergence.reshape(len(x), -1).max(axis=1)
    if "scale" in tensors:
        terms = single.terms(x, eps)
        tensors |= {f"float32.{name}": terms[name] for name in ("reconstruction", "kl")}
    for name, value in own.items():
        tensors[f"float32.{name}"] = np.abs(value - tensors[name]).reshape(len(value), -1).max(axis=1)
    precision = "float64"
    if exact.lower:
        precision = f"float64, of which it computes some in {', '.join(sorted(exact.lower))} all the same"
    record = Golden(
        seed=seed,
        reference=f"PyTorch {torch.__version__} {precision}",
        extremes=EXTREMES,
        held_out=len(held_out),
        decoded=len(decoded),
        prior=count,
    )
    return Reference(record, tensors)


class _Torch:
    """The PyTorch model at one precision, on NumPy arrays, in slices of at most `batch` examples."""

    def __init__(self, source: Trained, dtype: torch.dtype, batch: int) -> None:
        self.batch = batch
        module = copy.deepcopy(source.module).to(dtype).eval()
        self.model = source.model
        self.dtype = dtype
        self.encoder, self.decoder = Encoder(module, source.model), Decoder(module, source.model)
        self.likelihood = None
        if source.model.likelihood.kind != "none":
            self.likelihood = log_prob_of(source.model.likelihood, source.model.data)
        #: Precisions below its own that the model computed in.
        self.lower: set[str] = set()

    def encode(self, x: npt.NDArray[np.float32]) -> golden.Tensors:
        return self._run(lambda part: self._named("encode", self.encoder, part), x)

    def decode(self, z: npt.NDArray[np.float32]) -> golden.Tensors:
        return self._run(lambda part: self._named("decode", self.decoder, part), z)

    def terms(self, x: npt.NDArray[np.float32], eps: npt.NDArray[np.float32]) -> golden.Tensors:
        """The decoded mean at the drawn latent, and the ELBO's terms where the model has them."""
        return self._run(self._terms, x, eps)

    def _terms(self, x: Tensor, eps: Tensor) -> dict[str, Tensor]:
        posterior = self.encoder(x)
        if len(posterior) == 1:
            return {"sample": self.decoder(posterior[0])[0]}
        mean, logvar = posterior
        parameters = self.decoder(mean + torch.exp(0.5 * logvar) * eps)
        result = {"sample": parameters[0]}
        if self.likelihood:
            # Whatever the model's precision, the terms are formed and summed in float64: what remains is
            # the model's own error.
            x, mean, logvar = x.double(), mean.double(), logvar.double()
            terms = self.likelihood(x, tuple(p.double() for p in parameters)).flatten(1)
            kl = kl_terms(mean, logvar).flatten(1)
            scale = terms.abs().sum(1) + kl.abs().sum(1)
            result |= {"reconstruction": terms.sum(1), "kl": kl.sum(1), "scale": scale}
        return result

    def _named(self, method: str, wrapper: Encoder | Decoder, value: Tensor) -> dict[str, Tensor]:
        """The outputs by name, their shapes checked, and the precisions watched in which they are computed."""
        with _Watch() as watch:
            outputs = dict(zip(wrapper.outputs, wrapper(value), strict=True))
        self.lower |= {name for name in watch.seen if self.dtype == torch.float64}
        into = tuple(value.shape[1:])
        sized = zip(self.model.data.shape, into, strict=True) if method == "encode" else ()
        named = {dim.name: size for dim, size in sized if isinstance(dim, SizeDim)}
        expected = self.model.latent_shape(named) if method == "encode" else self.model.data_shape(into)
        for name, output in outputs.items():
            if tuple(output.shape) != (len(value), *expected):
                raise InputError(
                    f"export: {method} gave {name} of shape {tuple(output.shape)} for a batch of {len(value)}; "
                    f"expected {(len(value), *expected)}"
                )
        return outputs

    def _run(self, function: Callable[..., dict[str, Tensor]], *arrays: npt.NDArray[np.float32]) -> golden.Tensors:
        parts = []
        with torch.no_grad():
            for first in range(0, len(arrays[0]), self.batch):
                inputs = [torch.from_numpy(a[first : first + self.batch]).to(self.dtype) for a in arrays]
                parts.append(function(*inputs))
        return {name: torch.cat([part[name] for part in parts]).double().numpy() for name in parts[0]}


class _Watch(TorchDispatchMode):
    """Notes floating-point results that are not float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                self.seen.add(str(value.dtype).removeprefix("torch."))
        return result


def _check_claims(model: Model, posterior: golden.Tensors, prior: golden.Tensors) -> None:
    """Refuse a source that says of its model what its outputs contradict."""
    for name, value in (*posterior.items(), *prior.items()):
        if not np.isfinite(value).all():
            raise InputError(f"export: the model's {name} has values that are not finite, in float64 in PyTorch")
    clamps = (
        ("logvar", posterior.get("logvar"), model.posterior.logvar_clamp),
        ("sample_logvar", prior.get("sample_logvar"), model.likelihood.logvar_clamp),
    )
    for name, values, clamp in clamps:
        if values is not None and clamp and not (clamp[0] <= values.min() and values.max() <= clamp[1]):
            raise InputError(
                f"export: {name} is said to be clamped to {list(clamp)}, and the model gives values from "
                f"{values.min():g} to {values.max():g}"
            )
    if model.likelihood.kind == "bernoulli":
        error = np.abs(prior["sample"] - likelihoods.sigmoid(prior["logits"])).max()
        if error > 1e-6:
            raise InputError(
                f"export: decode must return (sample, logits) with sample = sigmoid(logits); they differ by {error:.3g}"
            )
