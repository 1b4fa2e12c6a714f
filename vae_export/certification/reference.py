"""The reference of a certificate: the PyTorch model in float64 on the golden examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vae_export.certification import deviations, golden, rounding
from vae_export.certification.deviations import Deviations
from vae_export.certification.golden import EXTREMES, Reference, Rows, stretched
from vae_export.certification.torch_model import TorchModel
from vae_export.contract.manifest import Golden, GoldenSize
from vae_export.contract.model import Cost, Model, SizeDim
from vae_export.errors import InputError
from vae_export.numerics import likelihoods, noise
from vae_export.progress import Progress, silent
from vae_export.sources.protocol import Trained

#: The seed of the golden examples' noise, and of the choice of rows.
SEED = 2014
#: The most rows of data, and of draws from the prior.
ROWS = 256
_MIN_ROWS = 3
#: Multiply-adds of encoding and decoding all rows once, above which there are fewer of them.
_MAX_WORK = 3e10
#: Multiply-adds of a row, above which most rows are of a smaller size, where sizes are named.
_MAX_WORK_PER_ROW = 8e9
#: Multiply-adds of the rows of a further size: above the first PyTorch in float32 is their reference, above the second
#: they are not measured.
_MAX_FLOAT64_WORK, _MAX_FLOAT32_WORK = 1e10, 8e11
_MAX_ACTIVATIONS = 1 << 29  # bytes of intermediate results at once
_MAX_BYTES = 256 << 20  # of all rows of a size, inputs and results
#: Perturbed runs. Tolerances follow from the largest deviation over them, and from the median over rows.
DRAWS = 3
_MAX_WORK_FOR_ALL_DRAWS = 1e9  # multiply-adds of a row, above which there is one perturbed run less
#: The size of the largest further size, relative to the example's, in each direction.
_LARGE = 3
#: Rows of a further size, and draws from the prior, where float64 is affordable.
_FURTHER = 2

Array = npt.NDArray[Any]


def rows(costs: Mapping[str, Cost], sizes: Mapping[str, int], row_bytes: int = 0, most: int = ROWS) -> int:
    """The number of rows of data, and of draws from the prior, that a model of these costs is measured on.

    Args:
        costs: of its encoder and decoder.
        sizes: of the data's named dimensions.
        row_bytes: the size of a row of golden examples.
        most: the most rows.
    """
    affordable = min(_MAX_WORK / max(_each(costs, sizes), 1), _MAX_BYTES / max(row_bytes, 1))
    return min(most, max(_MIN_ROWS, int(affordable)))


def order(count: int) -> npt.NDArray[np.intp]:
    """The order in which so many rows of held-out data become golden examples."""
    return noise.permutation(SEED, noise.VERIFIER, 0, count)


def compute(source: Trained, costs: Mapping[str, Cost], progress: Progress = silent, most: int = ROWS) -> Reference:
    """Run the PyTorch model in float64 on held-out data, extremes and prior draws; see `golden`.

    The same rows run perturbed (see `rounding`), to measure how far float32 rounding can move each of them, and in
    float32. With named sizes a few rows of the smallest size, of one that is not square, of the example's and of one
    three times as large in each direction run as well; where float64 would take long, in float32 alone.

    The ELBO's terms are those of `trainers.objective`, in PyTorch, independent of the runtime's in NumPy.

    Args:
        source: the model.
        costs: of its encoder and decoder, on which the number of rows and their sizes depend.
        progress: called with the share of the multiply-adds that are done.
        most: the most rows of data, and of draws from the prior.

    Raises:
        InputError: the model's outputs contradict its description, or it fails at a size that it declares.
    """
    model = source.model
    base = _base(source, costs, most)
    draws = base.draws
    plans, recorded = [base], []
    for sizes in _further_sizes(source, base.sizes):
        plan = _further(source, costs, sizes, draws)
        if plan.multiply_adds > _MAX_FLOAT32_WORK:
            work = f"{_each(costs, sizes) / 1e9:,.0f} billion multiply-adds an example"
            recorded.append(GoldenSize(sizes=sizes, absent=f"not measured: {work}"))
            continue
        plans.append(plan)
        recorded.append(GoldenSize(sizes=sizes, examples=plan.examples, prior=plan.prior))
    runs = _Runs(source)
    total, done = sum(plan.seconds for plan in plans), 0.0
    groups: list[Rows] = []
    for plan in plans:

        def tell(share: float, plan: _Plan = plan, done: float = done) -> None:
            progress("computing the reference in float64", (done + share * plan.seconds) / total)

        first = groups[0] if groups else None
        groups.append(_run(runs, model, plan, first, tell))
        done += plan.seconds
    precision = "float64"
    if reduced := runs.exact.reduced_precisions:
        precision = f"float64, of which it computes some in {', '.join(sorted(reduced))} all the same"
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
    """The rows of one size, and how they run.

    Attributes:
        sizes: of the named dimensions.
        held_out: (n, *data), data of this size.
        examples: number of rows of x: extremes, then held_out, then decoded draws from the prior.
        prior: number of draws from the prior.
        batch: number of rows that run at once.
        multiply_adds: of running all rows once.
        draws: number of perturbed runs; 0 where the reference is in float32.
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
        """An estimate of its time, in multiply-adds of float64; float32 takes a fifth."""
        return self.multiply_adds * (self.draws + 1.2 if self.draws else 0.2) + 1.0


def _each(costs: Mapping[str, Cost], sizes: Mapping[str, int]) -> int:
    """Multiply-adds of encoding and decoding one example."""
    return sum(cost.at(sizes)[0] for cost in costs.values())


def _batch(costs: Mapping[str, Cost], sizes: Mapping[str, int]) -> int:
    bytes_each = 2 * max(cost.at(sizes)[1] for cost in costs.values())  # counted in float32
    return min(64, max(1, _MAX_ACTIVATIONS // max(bytes_each, 1)))


def _base(source: Trained, costs: Mapping[str, Cost], most: int) -> _Plan:
    """The plan of most rows: of the example's size, halved until they are affordable."""
    model, sizes = source.model, source.sizes()
    named = model.data.named()
    while sizes and _each(costs, sizes) > _MAX_WORK_PER_ROW:
        half = {name: size // 2 // named[name].multiple_of * named[name].multiple_of for name, size in sizes.items()}
        if not all(named[name].allows(size) for name, size in half.items()) or min(half.values()) < 1:
            break
        sizes = half
    data = model.data_shape(model.latent_shape(sizes))
    count = rows(costs, sizes, 64 * math.prod(data), most)  # x, decoded means, outputs for prior draws
    held_out = np.zeros((0, *data), np.float32)
    if source.held_out is not None:
        chosen = order(len(source.held_out))[:count]
        held_out = stretched(np.asarray(source.held_out[np.sort(chosen)], np.float32), data)
    multiply_adds = float((EXTREMES + 2 * count) * _each(costs, sizes))
    draws = DRAWS - (_each(costs, sizes) > _MAX_WORK_FOR_ALL_DRAWS)
    return _Plan(sizes, held_out, EXTREMES + count, count, _batch(costs, sizes), multiply_adds, draws)


def _further(source: Trained, costs: Mapping[str, Cost], sizes: Mapping[str, int], draws: int) -> _Plan:
    """The plan of a few rows of another size: in float64 where that is affordable, otherwise one in float32."""
    data = source.model.data_shape(source.model.latent_shape(sizes))
    exact = 2 * _FURTHER * _each(costs, sizes) <= _MAX_FLOAT64_WORK
    count = _FURTHER if exact else 1
    multiply_adds = float(2 * count * _each(costs, sizes))
    none = np.zeros((0, *data), np.float32)
    return _Plan(sizes, none, count, count, _batch(costs, sizes), multiply_adds, draws if exact else 0)


def _further_sizes(source: Trained, base: Mapping[str, int]) -> list[dict[str, int]]:
    """The smallest size, one that is not square, the example's, and `_LARGE` times the base's and the example's.

    Equal ones, and the base's, are left out.
    """
    named, example = source.model.data.named(), source.sizes()
    if not named:
        return []
    smallest = {name: dim.multiple_of * -(-dim.min // dim.multiple_of) for name, dim in named.items()}
    skewed = {name: size + (index + 1) * named[name].multiple_of for index, (name, size) in enumerate(base.items())}
    large = [{name: _LARGE * size for name, size in sizes.items()} for sizes in (base, example)]
    further: list[dict[str, int]] = []
    for sizes in (smallest, skewed, dict(example), *large):
        allowed = {name: _at_most(named[name], size) for name, size in sizes.items()}
        if allowed != dict(base) and allowed not in further:
            further.append(allowed)
    return further


def _at_most(dim: SizeDim, size: int) -> int:
    """The size, or the dimension's largest if that is smaller."""
    return size if dim.max is None else min(size, dim.max // dim.multiple_of * dim.multiple_of)


class _Runs:
    """The model in float64, perturbed, and in float32."""

    def __init__(self, source: Trained) -> None:
        self.exact = TorchModel(source, torch.float64)
        self.single = TorchModel(source, torch.float32)
        self.perturbed = TorchModel(source, torch.float64)

    def prepared(self, draw: int) -> tuple[TorchModel, rounding.Perturbed]:
        """The model with the perturbed weights of a draw, and the context that perturbs its results."""
        perturbation = rounding.Perturbed(SEED + draw)
        rounding.perturb_weights(self.perturbed.module, self.exact.module, perturbation)
        return self.perturbed, perturbation


def _run(runs: _Runs, model: Model, plan: _Plan, base: Rows | None, tell: Callable[[float], None]) -> Rows:
    """Run the rows of one size: exact, in float32, and perturbed.

    Args:
        runs: the PyTorch model.
        model: its description.
        plan: the rows.
        base: the rows of the base size, from whose data those of other sizes are cut; None for the base size itself.
        tell: called with the share that is done.
    """
    latent = model.latent_shape(plan.sizes)
    size = math.prod(latent)
    z = noise.normals(SEED, noise.PRIOR, 0, plan.prior, size).reshape(-1, *latent)
    eps = noise.normals(SEED, noise.POSTERIOR, 0, plan.examples, size).reshape(-1, *latent)
    exact = runs.exact if plan.draws else runs.single
    total, done = (plan.draws + 2 if plan.draws else 1) * (plan.prior + plan.examples), 0

    def sliced(count: int, function: Callable[[slice], dict[str, Array]]) -> dict[str, Array]:
        nonlocal done
        results: list[dict[str, Array]] = []
        for first in range(0, count, plan.batch):
            part = slice(first, min(first + plan.batch, count))
            results.append(function(part))
            done += part.stop - part.start
            tell(done / total)
        return {name: np.concatenate([result[name] for result in results]) for name in results[0]}

    prior = sliced(plan.prior, lambda part: exact.decode(z[part], plan.sizes))
    data = model.data_shape(latent)
    if base is None:
        known = np.concatenate([golden.extremes(data, model.data.range), plan.held_out])
        decoded = np.clip(prior["sample"], *model.data.range).astype(np.float32)
        x = np.concatenate([known, decoded[: plan.examples - len(known)]])
    else:
        x = stretched(base.tensors["x"][base.extremes :][: plan.examples], data)
    results = sliced(len(x), lambda part: exact.whole(x[part], eps[part], plan.sizes))
    _check_claims(model, results, prior)
    tensors: golden.Tensors = {"x": x, **results, **{f"prior.{name}": value for name, value in prior.items()}}

    def measured(other: TorchModel) -> Deviations:
        """Deviations of another run, of those quantities that have a spread."""

        def on_prior(part: slice) -> Deviations:
            outputs = other.decode(z[part], plan.sizes)
            return deviations.decoded("prior", {name: prior[name][part] for name in outputs}, outputs, model)

        def on_data(part: slice) -> Deviations:
            outputs = other.whole(x[part], eps[part], plan.sizes)
            exact = {name: value[part] for name, value in results.items()}
            values = deviations.encoded({name: exact[name] for name in other.encoder.outputs}, outputs)
            values |= deviations.decoded("end_to_end", exact, {"sample": outputs["sample"]}, model)
            return values | (
                deviations.terms(exact, outputs["reconstruction"], outputs["kl"]) if "kl" in outputs else {}
            )

        values = sliced(plan.prior, on_prior) | sliced(len(x), on_data)
        return {name: value for name, value in values.items() if name in deviations.conditioned(model)}

    if not plan.draws:
        assert base is not None
        return Rows(plan.sizes, tensors | _assumed(model, base, Rows(plan.sizes, tensors)))
    tensors |= {f"float32.{name}": value for name, value in measured(runs.single).items()}
    for draw in range(plan.draws):
        other, perturbation = runs.prepared(draw)
        with perturbation:
            moved = measured(other)
        for name, value in moved.items():
            tensors[f"spread.{name}"] = np.maximum(tensors.get(f"spread.{name}", value), value)
    return Rows(plan.sizes, tensors, EXTREMES if base is None else 0)


def _assumed(model: Model, base: Rows, rows: Rows) -> golden.Tensors:
    """The spread of rows whose reference is in float32: twice that of the base's median row, in the quantity's unit.

    Twice, because both the measured results and the reference are rounded.
    """
    tensors: golden.Tensors = {}
    for quantity in deviations.conditioned(model):
        relative = base.tensors[f"spread.{quantity}"] / deviations.unit(quantity, base.tensors)
        unit = deviations.unit(quantity, rows.tensors)
        count = rows.prior if quantity.startswith("prior.") else rows.examples
        tensors[f"spread.{quantity}"] = np.broadcast_to(2.0 * float(np.median(relative)) * unit, (count,)).copy()
        tensors[f"float32.{quantity}"] = np.zeros(count)
    return tensors


def _check_claims(model: Model, posterior: golden.Tensors, prior: golden.Tensors) -> None:
    """Raise where a model's outputs contradict its description."""
    for name, value in (*posterior.items(), *prior.items()):
        if not np.isfinite(value).all():
            raise InputError(f"export: the model's {name} has values that are not finite, in float64 in PyTorch")
    clamps = (
        ("logvar", posterior.get("logvar"), model.posterior.logvar_clamp),
        ("sample_logvar", prior.get("sample_logvar"), model.likelihood.logvar_clamp),
        ("log_scale", prior.get("log_scale"), model.likelihood.log_scale_clamp),
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
