"""Judge measured deviations: one check for each quantity, of the row that is nearest to its tolerance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae_export.certification import deviations
from vae_export.certification.certificate import Check, GraphName
from vae_export.certification.deviations import PICTURE, SPLIT
from vae_export.certification.golden import Rows
from vae_export.certification.runs import Run
from vae_export.certification.tolerances import JUDGED, TOLERANCES, Tolerance, rounding_tolerance
from vae_export.contract.model import Model
from vae_export.numerics.elbo import Array, Float64

#: Rows at all batch sizes but the largest, at which all rows run.
FEW = 16

#: The shown name of a quantity and its unit, by its id or the last two parts of it.
_NAMES: Mapping[str, tuple[str, str]] = {
    "encoder.finite": ("values that are not finite", "values"),
    "decoder.finite": ("values that are not finite", "values"),
    PICTURE: ("worst byte of pictures", "levels of 255"),
    SPLIT: ("another split of the batch", "relative to max|output|"),
    "mean.sigma": ("error of the mean", "posterior standard deviations"),
    "kl.dimension": ("KL(reference ‖ measured) of the worst latent dimension", "nats"),
    "pixel.max": ("worst pixel", "relative to the data's range"),
    "pixel.off1": ("pixels off by more than 1/255", "share"),
    "pixel.off2": ("pixels off by more than 2/255", "share"),
    "pixel.psnr": ("PSNR", "dB"),
    "bound.max": ("ELBO", "relative to Σ|ELBO terms|"),
    "reconstruction.max": ("reconstruction", "relative to Σ|ELBO terms|"),
    "kl.max": ("KL(q(z|x) ‖ p(z))", "relative to Σ|ELBO terms|"),
}
#: The shown name of the rows, behind the quantity's, by the first part of an id.
_ROWS = {"prior": " of draws from the prior", "decoder": " of latents of data", "tail": " of more rows"}
#: The graph of a check, by the first part of its id.
GRAPHS: Mapping[str, GraphName] = {
    "encoder": "encoder", "prior": "decoder", "decoder": "decoder", "end_to_end": "end to end", "elbo": "end to end",
    "splits": "encoder",
}  # fmt: skip
#: Precisions, the most accurate first.
_ORDER = ("float32", "tf32", "float16", "bfloat16", "int8")


def shown(quantity: str, model: Model) -> tuple[str, str]:
    """The shown name of a quantity and its unit, by its id."""
    if quantity in _NAMES:
        return _NAMES[quantity]
    rows, _, what = quantity.partition(".")
    text, unit = _NAMES.get(what, (f"{what.partition('.')[0]}, worst", "relative to max|reference|"))
    if what.endswith("sigma") and model.posterior.kind == "deterministic":
        unit = "standard deviations of the latent over data"
    return text + _ROWS.get(rows, ""), unit


def counts(rows: Rows, most: int | None) -> tuple[int, int]:
    """The rows of data and the draws from the prior that run: `most` of each at most, or all."""
    limit = max(rows.examples, rows.prior) if most is None else most
    return min(limit, rows.examples), min(limit, rows.prior)


@dataclass(frozen=True)
class _Measured:
    """Deviations of one quantity at one size and batch size, from row `first` on."""

    group: int
    batch: int
    first: int
    values: Float64


class Meter:
    """Collects the deviations of all runs, and judges them.

    Attributes:
        model: what the graphs compute.
        kinds: the precisions whose tolerances apply to encoder and decoder.
        sizes: of the data's named dimensions, as they are shown, by group; None where there are none.
        identical: whether all batch sizes gave bitwise identical outputs.
    """

    def __init__(self, model: Model, kinds: Mapping[str, str], sizes: Sequence[str | None]) -> None:
        self.model = model
        self.kinds = kinds
        self.sizes = list(sizes)
        self.identical = True
        self._groups: dict[int, Rows] = {}
        self._measured: dict[str, list[_Measured]] = {}
        self._not_finite = {"encoder": 0, "decoder": 0}
        self._first: dict[tuple[int, str], list[Array]] = {}
        self._split_error = 0.0

    def collect(self, group: int, rows: Rows, batch: int, run: Run, most: int | None) -> Iterator[int]:
        """Run all rows of a size, or the first `most`, in parts. Yields the number of rows of each part."""
        self._groups[group] = rows
        functions = (("encoder", run.data), ("decoder", run.prior))
        for (graph, function), count in zip(functions, counts(rows, most), strict=True):
            for part in run.slices(count):
                measured, outputs = function(part)
                self._not_finite[graph] += sum(int((~np.isfinite(value)).sum()) for value in outputs)
                if part.start == 0:
                    self._compare(group, graph, outputs)
                for quantity, values in measured.items():
                    entry = _Measured(group, batch, part.start, np.asarray(values, np.float64))
                    self._measured.setdefault(quantity, []).append(entry)
                yield part.stop - part.start

    def _compare(self, group: int, graph: str, outputs: list[Array]) -> None:
        """Compare the first rows with those at the first batch size."""
        first = self._first.setdefault((group, graph), outputs)
        for value, other in zip(outputs, first, strict=True):
            count = min(len(value), len(other), FEW)
            if not np.array_equal(value[:count], other[:count]):
                self.identical = False
                error = deviations.largest(value[:count], other[:count]).max() / max(np.abs(other[:count]).max(), 1e-30)
                self._split_error = max(self._split_error, float(error))

    def checks(self) -> list[Check]:
        """One for each quantity, for values that are not finite, and for splits of the batch."""
        checks = [self._check(f"{graph}.finite", count, 0.0) for graph, count in self._not_finite.items()]
        for quantity, parts in self._measured.items():
            checks.append(self._psnr(parts, quantity) if quantity.endswith(".mse") else self._worst(parts, quantity))
        return [*checks, self._check(SPLIT, self._split_error, None)]

    def _worst(self, parts: Sequence[_Measured], quantity: str) -> Check:
        """The check of the row that is nearest to its tolerance, or, without tolerances, of the worst row."""
        worst: tuple[float, float, float | None, _Measured, int] | None = None
        for part in parts:
            rows = self._groups[part.group]
            indices = slice(part.first, part.first + len(part.values))
            scale = _scale(quantity, rows)[indices]
            values = np.where(np.isfinite(part.values), part.values, np.inf) / scale
            tolerances = self._tolerances(quantity, rows, indices)
            ranks = values if tolerances is None else _shares(values, tolerances / scale)
            if tolerances is not None and self._limits(quantity) and part.group == 0:
                ranks = ranks.copy()
                ranks[: max(0, rows.extremes - part.first)] = -1.0
            index = int(np.argmax(ranks))
            tolerance = None if tolerances is None else float((tolerances / scale)[index])
            if worst is None or ranks[index] > worst[0]:
                worst = (float(ranks[index]), float(values[index]), tolerance, part, part.first + index)
        assert worst is not None
        _, value, tolerance, part, row = worst
        rows = self._groups[part.group]
        single = rows.tensors.get(f"float32.{quantity}")
        pytorch = None if single is None else float(single[row] / _scale(quantity, rows)[row])
        return self._check(
            quantity, value, tolerance, pytorch=pytorch, size=self.sizes[part.group], batch=part.batch, example=row
        )

    def _psnr(self, parts: Sequence[_Measured], quantity: str) -> Check:
        """The check of the lowest PSNR over all rows of a size at a batch size.

        Below float32, extremes are left out, and data are not averaged with decoded noise, which says little of them.
        """
        prefix = quantity.partition(".")[0]
        limits = self._limits(quantity)
        lowest, where = math.inf, parts[0]
        for group, batch in dict.fromkeys((part.group, part.batch) for part in parts):
            chosen = [part for part in parts if (part.group, part.batch) == (group, batch)]
            kinds = [np.concatenate([part.values for part in chosen])]
            if limits and prefix != "prior":
                rows = self._groups[group]
                kinds = np.split(kinds[0], [rows.extremes, rows.extremes + rows.held_out])[1:]
            for values in filter(len, kinds):
                mse = float(np.mean(values)) if np.isfinite(values).all() else math.inf
                # At most 300 dB, far beyond float64, for results that are equal.
                decibels = -math.inf if math.isinf(mse) else -10 * math.log10(max(mse, 1e-30))
                if decibels < lowest:
                    lowest, where = decibels, chosen[0]
        tolerance = limits.psnr if limits and prefix == "decoder" else None
        size = self.sizes[where.group]
        return self._check(f"{prefix}.pixel.psnr", lowest, tolerance, at_least=True, size=size, batch=where.batch)

    def _limits(self, quantity: str) -> Tolerance | None:
        """The tolerances that apply to a quantity below float32; None where it is in float32."""
        graph = GRAPHS[quantity.partition(".")[0]]
        kind = self.kinds.get(graph) or max(self.kinds.values(), key=_ORDER.index)
        return None if kind == "float32" else TOLERANCES[kind]

    def _tolerances(self, quantity: str, rows: Rows, indices: slice) -> Float64 | None:
        """The tolerances of some rows, in the deviations' own unit; None for what is only reported."""
        limits = self._limits(quantity)
        if quantity == PICTURE:
            return self._levels(rows, limits)[indices]
        if limits is None:
            known = quantity in deviations.conditioned(self.model)
            return rounding_tolerance(quantity, rows)[indices] if known else None
        prefix, _, what = quantity.partition(".")
        value: float | None = None
        if prefix == "elbo":
            value = limits.elbo if self.model.has_elbo and not self.model.likelihood.nominal else None
        elif prefix in ("encoder", "decoder") and what in JUDGED:
            value = getattr(limits, JUDGED[what])
        return None if value is None else np.asarray(value * _scale(quantity, rows), np.float64)[indices]

    def _levels(self, rows: Rows, limits: Tolerance | None) -> Float64:
        """The tolerances of pictures' bytes, in levels of 255."""
        width = self.model.data.range[1] - self.model.data.range[0]
        share = np.full(rows.prior, limits.pixel) if limits else rounding_tolerance("prior.sample.max", rows) / width
        # Two values close to a half may be rounded to different levels: one level is never an error.
        return np.asarray(1 + np.floor(255 * share), np.float64)

    def _check(self, quantity: str, measured: float, tolerance: float | None, **where: Any) -> Check:
        # JSON has no NaN: what is not finite becomes the largest deviation, which never passes.
        largest = float(np.finfo(np.float64).max)
        if not math.isfinite(measured):
            measured = -largest if where.get("at_least") else largest
        text, unit = shown(quantity, self.model)
        graph = GRAPHS[quantity.partition(".")[0]]
        return Check(
            id=quantity, graph=graph, quantity=text, unit=unit, measured=float(measured), tolerance=tolerance, **where
        )


def _scale(quantity: str, rows: Rows) -> Float64:
    """`deviations.unit` for each row."""
    count = rows.prior if quantity.startswith("prior.") else rows.examples
    return np.broadcast_to(deviations.unit(quantity, rows.tensors), (count,))


def _shares(values: Float64, tolerances: Float64) -> Float64:
    """Values relative to their tolerances; infinite where a tolerance is 0 and the value is not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = values / tolerances
    return np.where(values == 0.0, 0.0, np.where(np.isnan(shares), np.inf, shares))
