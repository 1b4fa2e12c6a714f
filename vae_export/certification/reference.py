"""The reference of a certificate: the PyTorch model in float64 on the golden examples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vae_export.certification import deviations, golden, rounding
from vae_export.certification.deviations import Deviations
from vae_export.certification.golden import EXTREMES, Reference, Rows
from vae_export.contract.manifest import Golden, GoldenSize
from vae_export.contract.model import Cost, Model, SizeDim
from vae_export.errors import InputError
from vae_export.numerics import likelihoods, noise
from vae_export.progress import Progress, silent
from vae_export.sources.protocol import Decoder, Encoder, Trained
from vae_export.trainers.objective import kl_terms, log_prob_of

#: The seed of the golden examples' noise, and of the choice of rows.
SEED = 2014
#: The most rows of data, and of draws from the prior.
ROWS = 256
_FEWEST = 3
#: Multiply-adds of encoding and decoding all rows once, above which there are fewer of them.
_WORK = 3e10
#: Multiply-adds of a row, above which most rows are of a smaller size, where sizes are named.
_WORK_OF_A_ROW = 8e9
#: Multiply-adds of the rows of a further size: above the first PyTorch in float32 is their reference, above the second
#: they are not measured.
_WORK_OF_A_SIZE, _TOO_MUCH = 1e10, 8e11
_MEMORY = 1 << 29  # of intermediate results at once
_HELD = 256 << 20  # bytes of all rows of a size, inputs and results
#: Perturbed runs. Tolerances lean on the largest of them, and on the median over rows.
DRAWS = 3
_COSTLY = 1e9  # multiply-adds of a row, above which there is one perturbed run less
#: How many times as large as the example a further size is in each direction.
_LARGE = 3
#: Rows of a further size, and draws from the prior, where float64 is affordable.
_FURTHER = 2

Array = npt.NDArray[Any]


def rows(costs: Mapping[str, Cost], sizes: Mapping[str, int], row_bytes: int = 0, most: int = ROWS) -> int:
    """How many rows of data, and as many draws from the prior, a model of these costs is measured on.

    Args:
        costs: of its encoder and decoder.
        sizes: of the data's named dimensions.
        row_bytes: that a row of golden examples takes.
        most: the most rows.
    """
    affordable = min(_WORK / max(_each(costs, sizes), 1), _HELD / max(row_bytes, 1))
    return min(most, max(_FEWEST, int(affordable)))


def order(count: int) -> npt.NDArray[np.intp]:
    """The order in which so many rows of held-out data become golden examples."""
    return noise.permutation(SEED, noise.VERIFIER, 0, count)


def compute(source: Trained, costs: Mapping[str, Cost], progress: Progress = silent, most: int = ROWS) -> Reference:
    """Run the PyTorch model in float64 on held-out data, extremes and prior draws; see `golden`.

    The same rows are run perturbed (see `rounding`), which tells how far float32 rounding can move each of them, and in
    float32. With named sizes a few rows of the smallest size, of one that is not square, of the example's and of one
    three times as large in each direction are run as well; where float64 would take long, in float32 alone.

    The ELBO's terms are those of `trainers.objective`: PyTorch's, not the runtime's NumPy ones.

    Args:
        source: the model.
        costs: of its encoder and decoder; they decide how many rows there are, of which sizes.
        progress: told the share of the multiply-adds that are done.
        most: the most rows of data, and of draws from the prior.

    Raises:
        InputError: the model gives what it is not said to give, or fails at a size that it is said to take.
    """
    model = source.model
    base = _base(source, costs, most)
    draws = base.draws
    plans, recorded = [base], []
    for sizes in _further_sizes(source, base.sizes):
        plan = _further(source, costs, sizes, draws)
        if plan.multiply_adds > _TOO_MUCH:
            work = f"{_each(costs, sizes) / 1e9:,.0f} billion multiply-adds an example"
            recorded.append(GoldenSize(sizes=sizes, absent=f"not measured: {work}"))
            continue
        plans.append(plan)
        recorded.append(GoldenSize(sizes=sizes, examples=plan.examples, prior=plan.prior))
    runs = _Runs(source, draws)
    total, done = sum(plan.seconds for plan in plans), 0.0
    groups: list[Rows] = []
    for plan in plans:

        def tell(share: float, plan: _Plan = plan, done: float = done) -> None:
            progress("computing the reference in float64", (done + share * plan.seconds) / total)

        first = groups[0] if groups else None
        groups.append(_run(runs, model, plan, first, tell))
        done += plan.seconds
    precision = "float64"
    if runs.exact.lower:
        precision = f"float64, of which it computes some in {', '.join(sorted(runs.exact.lower))} all the same"
    record = Golden(
        seed=SEED,
        reference=f"PyTorch {torch.__version__} {precision}",
        extremes=EXTREMES,
        held_out=len(base.held_out),
        decoded=base.examples - EXTREMES - len(base.held_out),
        prior=base.prior,
        draws=draws,
        sizes=tuple(recorded),
    )
    return Reference(record, groups[0].tensors, tuple(groups[1:]))


@dataclass(frozen=True)
class _Plan:
    """What is run at one size.

    Attributes:
        sizes: of the named dimensions.
        held_out: (n, *data) of it.
        examples: rows of data in all; extremes come first, and what is missing behind held_out is decoded.
        prior: draws from the prior.
        batch: how many rows run at once.
        multiply_adds: of running all rows once.
        draws: perturbed runs; 0 where the reference is in float32.
    """

    sizes: Mapping[str, int]
    held_out: npt.NDArray[np.float32]
    examples: int
    prior: int
    batch: int
    multiply_adds: float
    draws: int

    @property
    def seconds(self) -> float:
        """How long it takes, in units of one run of all rows in float64, of which one in float32 takes a fifth."""
        return self.multiply_adds * (self.draws + 1.2 if self.draws else 0.2) + 1.0


def _each(costs: Mapping[str, Cost], sizes: Mapping[str, int]) -> int:
    """Multiply-adds of encoding and decoding one example."""
    return sum(cost.at(sizes)[0] for cost in costs.values())


def _batch(costs: Mapping[str, Cost], sizes: Mapping[str, int]) -> int:
    bytes_each = 2 * max(cost.at(sizes)[1] for cost in costs.values())  # counted in float32
    return min(64, max(1, _MEMORY // max(bytes_each, 1)))


def _base(source: Trained, costs: Mapping[str, Cost], most: int) -> _Plan:
    """Most rows: of the example's size, or of half of it as often as it takes to afford them."""
    model, sizes = source.model, source.sizes()
    named = model.data.named()
    while sizes and _each(costs, sizes) > _WORK_OF_A_ROW:
        half = {name: size // 2 // named[name].multiple_of * named[name].multiple_of for name, size in sizes.items()}
        if not all(named[name].allows(size) for name, size in half.items()) or min(half.values()) < 1:
            break
        sizes = half
    data = model.data_shape(model.latent_shape(sizes))
    count = rows(costs, sizes, 64 * math.prod(data), most)  # x, decoded means, outputs for prior draws
    held_out = np.zeros((0, *data), np.float32)
    if source.held_out is not None:
        chosen = order(len(source.held_out))[:count]
        held_out = _resized(np.asarray(source.held_out[np.sort(chosen)], np.float32), data)
    multiply_adds = float((EXTREMES + 2 * count) * _each(costs, sizes))
    draws = DRAWS - (_each(costs, sizes) > _COSTLY)
    return _Plan(sizes, held_out, EXTREMES + count, count, _batch(costs, sizes), multiply_adds, draws)


def _further(source: Trained, costs: Mapping[str, Cost], sizes: Mapping[str, int], draws: int) -> _Plan:
    """A few rows of another size: in float64 where that is affordable, otherwise one in float32."""
    data = source.model.data_shape(source.model.latent_shape(sizes))
    exact = 2 * _FURTHER * _each(costs, sizes) <= _WORK_OF_A_SIZE
    count = _FURTHER if exact else 1
    multiply_adds = float(2 * count * _each(costs, sizes))
    none = np.zeros((0, *data), np.float32)
    return _Plan(sizes, none, count, count, _batch(costs, sizes), multiply_adds, draws if exact else 0)


def _further_sizes(source: Trained, base: Mapping[str, int]) -> list[dict[str, int]]:
    """The smallest size, one that is not square, the example's, and `_LARGE` times that, as far as they differ.

    Where the largest may be too much, there is `_LARGE` times the base, too.
    """
    named, example = source.model.data.named(), source.sizes()
    if not named:
        return []
    smallest = {name: dim.multiple_of * -(-dim.min // dim.multiple_of) for name, dim in named.items()}
    skewed = {name: size + (index + 1) * named[name].multiple_of for index, (name, size) in enumerate(base.items())}
    large = [{name: _LARGE * size for name, size in sizes.items()} for sizes in (base, example)]
    found: list[dict[str, int]] = []
    for sizes in (smallest, skewed, dict(example), *large):
        allowed = {name: _at_most(named[name], size) for name, size in sizes.items()}
        if allowed != dict(base) and allowed not in found:
            found.append(allowed)
    return found


def _at_most(dim: SizeDim, size: int) -> int:
    """The size, or the largest that the dimension takes."""
    return size if dim.max is None else min(size, dim.max // dim.multiple_of * dim.multiple_of)


def _resized(x: npt.NDArray[np.float32], data: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Rows of another size: cut, or continued from their beginning."""
    if x.shape[1:] == data:
        return x
    wide = [(0, 0), *((0, max(0, n - m)) for n, m in zip(data, x.shape[1:], strict=True))]
    return np.ascontiguousarray(np.pad(x, wide, mode="wrap")[(slice(None), *map(slice, data))])


class _Runs:
    """The model in float64, perturbed, and in float32."""

    def __init__(self, source: Trained, draws: int) -> None:
        self.exact = _Torch(source, torch.float64)
        self.single = _Torch(source, torch.float32)
        self.perturbed = _Torch(source, torch.float64)
        self.draws = draws

    def prepared(self, draw: int) -> tuple[_Torch, rounding.Perturbed]:
        """The perturbed model with the weights of a draw, and what perturbs its results."""
        perturbation = rounding.Perturbed(SEED + draw)
        rounding.perturb_weights(self.perturbed.module, self.exact.module, perturbation)
        return self.perturbed, perturbation


def _run(runs: _Runs, model: Model, plan: _Plan, base: Rows | None, tell: Callable[[float], None]) -> Rows:
    """All runs of the rows of one size.

    Args:
        runs: the model.
        model: what it computes.
        plan: which rows.
        base: the rows of the example's size, whose data those of other sizes are made of; None for themselves.
        tell: told the share that is done.
    """
    latent = model.latent_shape(plan.sizes)
    size = math.prod(latent)
    z = noise.normals(SEED, noise.PRIOR, 0, plan.prior, size).reshape(-1, *latent)
    eps = noise.normals(SEED, noise.POSTERIOR, 0, plan.examples, size).reshape(-1, *latent)
    exact = runs.exact if plan.draws else runs.single
    total, done = (plan.draws + 2 if plan.draws else 1) * (plan.prior + plan.examples), 0

    def sliced(count: int, function: Callable[[slice], dict[str, Array]]) -> dict[str, Array]:
        nonlocal done
        found: list[dict[str, Array]] = []
        for first in range(0, count, plan.batch):
            part = slice(first, min(first + plan.batch, count))
            found.append(function(part))
            done += part.stop - part.start
            tell(done / total)
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    prior = sliced(plan.prior, lambda part: exact.decode(z[part], plan.sizes))
    data = model.data_shape(latent)
    if base is None:
        known = np.concatenate([golden.extremes(data, model.data.range), plan.held_out])
        decoded = np.clip(prior["sample"], *model.data.range).astype(np.float32)
        x = np.concatenate([known, decoded[: plan.examples - len(known)]])
    else:
        x = _resized(base.tensors["x"][base.extremes :][: plan.examples], data)
    results = sliced(len(x), lambda part: exact.whole(x[part], eps[part], plan.sizes))
    _check_claims(model, results, prior)
    tensors: golden.Tensors = {"x": x, **results, **{f"prior.{name}": value for name, value in prior.items()}}

    def run(other: _Torch) -> dict[str, Array]:
        found = sliced(plan.prior, lambda part: _prior_deviations(other, model, z, tensors, part, plan.sizes))
        return found | sliced(len(x), lambda part: _deviations(other, model, x, eps, tensors, part, plan.sizes))

    if not plan.draws:
        assert base is not None
        return Rows(plan.sizes, tensors | _assumed(model, base, Rows(plan.sizes, tensors)))
    tensors |= {f"float32.{name}": value for name, value in run(runs.single).items()}
    for draw in range(plan.draws):
        other, perturbation = runs.prepared(draw)
        with perturbation:
            found = run(other)
        for name, value in found.items():
            known = tensors.get(f"spread.{name}", value)
            tensors[f"spread.{name}"] = np.maximum(known, value)
    return Rows(plan.sizes, tensors, EXTREMES if base is None else 0)


def _assumed(model: Model, base: Rows, rows: Rows) -> golden.Tensors:
    """The spread of rows whose reference is in float32: twice that of the base's median row, in the quantity's unit.

    Twice, because both what is measured and what it is compared with are rounded.
    """
    found: golden.Tensors = {}
    for quantity in deviations.conditioned(model):
        relative = base.tensors[f"spread.{quantity}"] / deviations.unit(quantity, base.tensors)
        unit = deviations.unit(quantity, rows.tensors)
        count = rows.prior if quantity.startswith("prior.") else rows.examples
        found[f"spread.{quantity}"] = np.broadcast_to(2.0 * float(np.median(relative)) * unit, (count,)).copy()
        found[f"float32.{quantity}"] = np.zeros(count)
    return found


def _deviations(
    other: _Torch,
    model: Model,
    x: Array,
    eps: Array,
    tensors: golden.Tensors,
    part: slice,
    sizes: Mapping[str, int],
) -> Deviations:
    """How far another run is off on some rows of data."""
    got = other.whole(x[part], eps[part], sizes)
    exact = {name: tensors[name][part] for name in got}
    posterior = {name: exact[name] for name in other.encoder.outputs}
    found = deviations.encoded(posterior, got)
    found |= deviations.decoded("end_to_end", exact, {"sample": got["sample"]}, model)
    if "kl" in got:
        found |= deviations.terms(exact, got["reconstruction"], got["kl"])
    return _conditioned(found, model)


def _prior_deviations(
    other: _Torch, model: Model, z: Array, tensors: golden.Tensors, part: slice, sizes: Mapping[str, int]
) -> Deviations:
    """How far another run is off on some draws from the prior."""
    got = other.decode(z[part], sizes)
    exact = {name: tensors[f"prior.{name}"][part] for name in got}
    return _conditioned(deviations.decoded("prior", exact, got, model), model)


def _conditioned(found: Deviations, model: Model) -> Deviations:
    known = deviations.conditioned(model)
    return {name: value for name, value in found.items() if name in known}


class _Torch:
    """The PyTorch model at one precision, on NumPy arrays."""

    def __init__(self, source: Trained, dtype: torch.dtype) -> None:
        self.module = copy.deepcopy(source.module).to(dtype).eval()
        self.model = source.model
        self.dtype = dtype
        self.encoder, self.decoder = Encoder(self.module, source.model), Decoder(self.module, source.model)
        self.likelihood = None
        if source.model.has_elbo:
            self.likelihood = log_prob_of(source.model.likelihood, source.model.data)
        #: Precisions below its own that the model computed in.
        self.lower: set[str] = set()

    def decode(self, z: Array, sizes: Mapping[str, int]) -> dict[str, Array]:
        """The decoder's outputs by name, float64."""
        with torch.no_grad():
            return _arrays(self._named("decode", self.decoder, self._tensor(z), sizes))

    def whole(self, x: Array, eps: Array, sizes: Mapping[str, int]) -> dict[str, Array]:
        """The posterior, the decoded mean at the latent that is drawn from it, and the ELBO's terms, float64.

        The latent is rounded to float32, as every runtime's is.
        """
        with torch.no_grad():
            values = self._tensor(x)
            posterior = self._named("encode", self.encoder, values, sizes)
            z = posterior["mean"].float()
            if "logvar" in posterior:
                deviation = torch.exp(0.5 * posterior["logvar"])
                z = (posterior["mean"] + deviation * self._tensor(eps)).float()
            parameters = self._named("decode", self.decoder, z.to(self.dtype), sizes)
            found = {**posterior, "sample": parameters["sample"]}
            if self.likelihood and "logvar" in posterior:
                # Whatever the model's precision, the terms are formed and summed in float64: what remains is
                # the model's own error.
                mean, logvar = posterior["mean"].double(), posterior["logvar"].double()
                terms = self.likelihood(values.double(), tuple(p.double() for p in parameters.values())).flatten(1)
                kl = kl_terms(mean, logvar).flatten(1)
                scale = terms.abs().sum(1) + kl.abs().sum(1)
                found |= {"reconstruction": terms.sum(1), "kl": kl.sum(1), "scale": scale}
            return _arrays(found)

    def _tensor(self, value: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(value)).to(self.dtype)

    def _named(
        self, method: str, wrapper: Encoder | Decoder, value: Tensor, sizes: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """The outputs by name, their shapes checked, and the precisions watched in which they are computed."""
        try:
            with _Watch() as watch:
                outputs = dict(zip(wrapper.outputs, wrapper(value), strict=True))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if not sizes:
                raise
            named = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InputError(
                f"export: {method} of the PyTorch model fails at {named}, which its sizes allow: "
                f"{str(error).strip().partition(chr(10))[0]}. Give the sizes that it takes"
            ) from error
        self.lower |= {name for name in watch.seen if self.dtype == torch.float64}
        latent = self.model.latent_shape(sizes)
        expected = latent if method == "encode" else self.model.data_shape(latent)
        for name, output in outputs.items():
            if tuple(output.shape) != (len(value), *expected):
                raise InputError(
                    f"export: {method} gave {name} of shape {tuple(output.shape)} for a batch of {len(value)}; "
                    f"expected {(len(value), *expected)}"
                )
        return outputs


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


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
