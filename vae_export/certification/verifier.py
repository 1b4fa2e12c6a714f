"""Measure the certificate: what runs on this machine, against the reference's golden examples. No PyTorch."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae_export.certification import deviations, golden, tail
from vae_export.certification.certificate import (
    JUDGED,
    TOLERANCES,
    Certificate,
    Check,
    GraphName,
    Tolerance,
    rounding_tolerance,
)
from vae_export.certification.deviations import Deviations
from vae_export.certification.golden import Reference, Rows
from vae_export.certification.tail import Tail
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import Model
from vae_export.errors import BundleError
from vae_export.numerics import elbo, likelihoods, noise
from vae_export.numerics.elbo import Array, Float64
from vae_export.numerics.pixels import to_uint8
from vae_export.progress import Progress, silent
from vae_export.runtimes import VAE, Backend, BuildLike, Settings, open_bundle

BATCHES = (1, 2, 7, 64)
#: Rows at all batch sizes but the largest; there all of them are run.
_FEW = 16
#: Rows whose results are held at once, in bytes of the data.
_HELD = 32 << 20
_STEP = "measuring the certificate"
#: The id of the check of a fused graph that makes pictures, and of that which compares two splits of a batch.
PICTURE, SPLIT = "prior.picture.max", "splits.max"

#: What is measured, in words, with its unit, by the last two parts of an id.
_WORDS: Mapping[str, tuple[str, str]] = {
    "mean.sigma": ("error of the mean", "posterior standard deviations"),
    "kl.dimension": ("KL(reference ‖ measured) of the worst latent dimension", "nats"),
    "pixel.max": ("worst pixel", "of the range"),
    "pixel.off1": ("pixels off by more than 1/255", "share"),
    "pixel.off2": ("pixels off by more than 2/255", "share"),
    "pixel.psnr": ("PSNR", "dB"),
    "bound.max": ("ELBO", "of Σ|ELBO terms|"),
    "reconstruction.max": ("reconstruction", "of Σ|ELBO terms|"),
    "kl.max": ("KL(q(z|x) ‖ p(z))", "of Σ|ELBO terms|"),
}
_GRAPHS: Mapping[str, GraphName] = {
    "encoder": "encoder", "prior": "decoder", "decoder": "decoder", "end_to_end": "end to end", "elbo": "end to end",
}  # fmt: skip
#: What the ids' first parts say, behind the quantity.
_WHERE = {"prior": " of draws from the prior", "decoder": " of latents of data", "tail": " of more rows"}
#: What 99.9 % of the rows of a tail are within is told beside the worst.
_QUANTILE = 0.999

Precisions = str | Mapping[str, str]


def verify(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    build: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: Progress = silent,
    opened: Callable[[str], None] = lambda line: None,
) -> Certificate:
    """Measure a bundle again, on this machine, against the golden examples that it brought along.

    What is measured is the bundle's own graphs, whatever builds the cache has; or a build, where one is named.

    Nothing is written. The result may be out of tolerance: ask `Certificate.passed`, or call
    `Certificate.require`.

    Args:
        path: the bundle's folder.
        device: as for `load`.
        build: the folder of a build of this bundle, to measure in place of the bundle's own graphs.
        threads: as for `load`.
        progress: told how far it is.
        opened: called with what is measured, in one line, before it is.

    Raises:
        InputError, BundleError, BackendError: as for `load`.
    """
    bundle = Bundle(path)
    manifest = bundle.manifest
    reference = golden.decode(bundle.read(golden.FILE), manifest.golden, manifest.model)
    source: BuildLike = False if build is None else build
    runs = open_bundle(bundle, device=device, build=source, settings=Settings(threads=threads))
    try:
        opened(runs.line())
        more = None
        if set(runs.held_to.values()) != {"float32"}:
            progress("running float32 on more rows")
            costs = {graph: found.cost for graph, found in manifest.graphs.items()}
            calibration = golden.decode_calibration(bundle.read(golden.CALIBRATION_FILE), manifest.model)
            more = tail.make(*bundle.graphs(), manifest.model, costs, reference, calibration)
        return measure(
            manifest.model, runs.backend, reference, manifest.name, runs.held_to, progress=progress, more=more
        )
    finally:
        runs.backend.close()


def measure(
    model: Model,
    backend: Backend,
    reference: Reference,
    name: str,
    precision: Precisions = "float32",
    batches: Sequence[int] = BATCHES,
    progress: Progress = silent,
    more: Tail | str | None = None,
) -> Certificate:
    """Compare a backend that has a model's graphs with the reference.

    In float32 every row must stay within what rounding explains, see `certificate.rounding_tolerance`. Below it encoder
    and decoder are judged apart, each by the tolerances of its own precision and on rows of data; extremes and draws
    from the prior are reported. What is below float32 is measured on more rows, too, beside the bundle's graphs in
    float32: see `tail`.

    Args:
        model: what the graphs compute.
        backend: has them; its fused graphs are measured, too, where it has any.
        reference: what they are compared with.
        name: of the bundle.
        precision: that whose tolerances apply; for `encoder` and `decoder` apart where they differ.
        batches: to measure at; those with more examples than the reference has are left out, but for the smallest. All
            rows run at the largest, the first of them at the others.
        progress: told the share of the work that is done.
        more: those rows, or why there are none, in words; None leaves them out.

    Raises:
        BundleError: the golden examples are of a version that had no conditioning, or a graph fails at a batch or size
            that the model is said to take, or gives another shape.
        BackendError: memory has run out.
    """
    record = reference.record
    if record.draws == 0:
        raise BundleError(
            f"{name}: its golden examples do not say how far rounding may move them, as versions before 0.6 wrote "
            "them: there is nothing to hold a certificate to. Export the model again"
        )
    kinds = dict.fromkeys(("encoder", "decoder"), precision) if isinstance(precision, str) else dict(precision)
    affordable = [batch for batch in batches if batch <= max(record.examples, record.prior)]
    batches = tuple(affordable or [min(batches)])
    groups = reference.groups(model)
    meter = _Meter(model, kinds, [_size(rows.sizes) for rows in groups])
    runs = [
        (index, rows, batch, None if batch == max(several) else _FEW)
        for index, rows in enumerate(groups)
        for several in [batches if index == 0 else (max(rows.examples, rows.prior),)]
        for batch in several
    ]
    work = sum(count * rows.tensors["x"][0].size for _, rows, _, most in runs for count in _counts(rows, most))
    done = 0
    progress(_STEP, 0.0)
    for index, rows, batch, most in runs:
        run = _Run(model, backend, rows, record.seed, batch, kinds, _latent_std(rows))
        try:
            for count in meter.collect(index, rows, batch, run, most):
                done += count * rows.tensors["x"][0].size
                progress(_STEP, done / work)
        except BundleError as error:
            if index == 0:
                raise
            raise _fails_at(error, groups[0].sizes) from error
    absent = [f"{_size(size.sizes)}: {size.absent}" for size in record.sizes if size.absent]
    checks = list(meter.checks())
    examples = {
        "extremes": record.extremes,
        "held_out": record.held_out,
        "decoded": record.decoded,
        "prior": record.prior,
    }
    lower = set(kinds.values()) != {"float32"}
    if lower and not record.held_out and not model.has_samples:
        absent.append("data: the bundle has decoded noise alone. Export the model with held_out (--held-out) data")
    if isinstance(more, str):
        absent += [more] if lower else []
    elif more is not None and (found := tail_checks(model, backend, more, kinds, groups[0])):
        checks += found
        examples |= {"more calibration": more.calibration, "more prior": more.draws}
    return Certificate(
        bundle=name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        reference=record.reference,
        measured={**{k: str(v) for k, v in backend.describe().items()}, "machine": platform.machine()},
        precision=_headed(kinds),
        examples=examples,
        batches=batches,
        sizes=tuple(filter(None, meter.sizes)),
        absent=tuple(absent),
        splits_identical=meter.identical,
        checks=tuple(checks),
    )


def tail_checks(model: Model, backend: Backend, more: Tail, kinds: Mapping[str, str], rows: Rows) -> list[Check]:
    """What is below float32, on many rows: of each quantity the worst of them, which is judged like a row of data.

    Args:
        model: what the graphs compute.
        backend: has them.
        more: the rows, and what float32 gives for them.
        kinds: the precision that encoder and decoder are held to.
        rows: the golden examples, of whose data a deterministic encoder's unit is.
    """
    vae = VAE(model, backend, micro_batch=tail.BATCH)
    found: Deviations = {}
    if kinds["encoder"] != "float32":
        posterior = vae.encode(more.x)
        outputs = deviations.posterior_of(posterior)
        found |= deviations.encoded(more.posterior, outputs, _latent_std(rows))
    if kinds["decoder"] != "float32":
        held = max(1, _HELD // (more.decoded[0].nbytes * tail.BATCH)) * tail.BATCH
        parts = [slice(first, first + held) for first in range(0, len(more.z), held)]
        decoded = [
            deviations.decoded("decoder", {"sample": more.decoded[p]}, {"sample": vae.decode(more.z[p])}, model)
            for p in parts
        ]
        found |= {quantity: np.concatenate([part[quantity] for part in decoded]) for quantity in decoded[0]}
    checks = []
    for quantity, values in found.items():
        graph = quantity.partition(".")[0]
        what = quantity.partition(".")[2]
        if what not in JUDGED:
            continue
        text, unit = _in_words("tail", what, model)
        values = np.where(np.isfinite(values), values, np.finfo(np.float64).max)
        checks.append(
            Check(
                id=f"tail.{what}",
                graph=_GRAPHS[graph],
                quantity=text,
                unit=unit,
                measured=float(values.max()),
                tolerance=getattr(TOLERANCES[kinds[graph]], JUDGED[what]),
                example=int(values.argmax()),
                rows=len(values),
                quantile=float(np.quantile(values, _QUANTILE, method="higher")),
            )
        )
    return checks


def _in_words(prefix: str, what: str, model: Model) -> tuple[str, str]:
    """A quantity and its unit, by the first part of its id and the last two."""
    text, unit = _WORDS.get(what, (f"{what.partition('.')[0]}, worst", "of max|reference|"))
    if what.endswith("sigma") and model.posterior.kind == "deterministic":
        unit = "standard deviations of the latent over data"
    return text + _WHERE.get(prefix, ""), unit


def _headed(kinds: Mapping[str, str]) -> str:
    if len(set(kinds.values())) == 1:
        return kinds["encoder"]
    return ", ".join(f"{graph} {kind}" for graph, kind in kinds.items())


def _size(sizes: Mapping[str, int]) -> str | None:
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or None


def _fails_at(error: BundleError, example: Mapping[str, int]) -> BundleError:
    return BundleError(
        f"{error}. At {_size(example)} it runs: it depends on the size that it was traced at. Write sizes as "
        "x.shape[2] and x.shape[3] of the tensor at hand, without int() or len(), and no constants in split, view or "
        "kernel sizes"
    )


def _counts(rows: Rows, most: int | None) -> tuple[int, int]:
    """Examples and draws from the prior that run, where there are more than `most`."""
    counts = rows.examples, rows.prior
    return counts if most is None else (min(most, counts[0]), min(most, counts[1]))


@dataclass(frozen=True)
class _Run:
    """One size at one batch size."""

    model: Model
    backend: Backend
    rows: Rows
    seed: int
    batch: int
    kinds: Mapping[str, str]
    latent_std: Array | None

    @property
    def vae(self) -> VAE:
        """The runtime over the backend."""
        return VAE(self.model, self.backend, micro_batch=self.batch)

    @property
    def lower(self) -> bool:
        """Whether a graph is below float32."""
        return any(kind != "float32" for kind in self.kinds.values())

    def slices(self, count: int) -> Iterator[slice]:
        """Parts of rows whose results are held at once: whole batches."""
        held = max(1, _HELD // (self.rows.tensors["x"][0].nbytes * self.batch)) * self.batch
        for first in range(0, count, held):
            yield slice(first, min(first + held, count))

    def data(self, part: slice) -> tuple[Deviations, list[Array]]:
        """Deviations on rows of data, and the encoder's outputs."""
        tensors, vae = self.rows.tensors, self.vae
        x = tensors["x"][part]
        posterior = vae.encode(x)
        outputs = deviations.posterior_of(posterior)
        exact = {name: value[part] for name, value in tensors.items() if "." not in name}
        found = deviations.encoded({name: exact[name] for name in outputs}, outputs, self.latent_std)
        gaussian = posterior.logvar is not None
        fused = self.backend.graphs
        parameters: Mapping[str, Array] | None = None
        if "reconstruct" not in fused or (self.model.has_elbo and "score" not in fused):
            z = posterior.sample(self.seed, part.start) if gaussian else posterior.mode()
            parameters = vae.likelihood(np.where(np.isfinite(z), z, np.float32(0)))  # the encoder's checks tell of it
        if "reconstruct" in fused:
            sample = vae.reconstruct(x, seed=self.seed if gaussian else None, start=part.start)
        else:
            assert parameters is not None
            sample = parameters["sample"]
        found |= deviations.decoded("end_to_end", exact, {"sample": sample}, self.model)
        if self.model.has_elbo:
            if "score" in fused:
                bound = vae.elbo(x, seed=self.seed, start=part.start)
                reconstruction, kl = bound.reconstruction, bound.kl
            else:
                assert parameters is not None
                likelihood = likelihoods.of(self.model)
                reconstruction = elbo.per_example(likelihood.log_prob_terms(x, parameters))
                kl = posterior.kl()
            found |= deviations.terms(exact, reconstruction, kl)
        if self.lower:
            z = self._latents(exact, part)
            found |= deviations.decoded("decoder", exact, {"sample": vae.decode(z)}, self.model)
        return found, list(outputs.values())

    def _latents(self, exact: Mapping[str, Array], part: slice) -> Array:
        """The reference's draws from the posterior, rounded to float32, as the reference decoded them."""
        mean = exact["mean"]
        if "logvar" not in exact:
            return mean.astype(np.float32)
        eps = noise.normals(self.seed, noise.POSTERIOR, part.start, len(mean), mean[0].size).reshape(mean.shape)
        z: Array = (mean + np.exp(0.5 * exact["logvar"]) * eps).astype(np.float32)
        return z

    def prior(self, part: slice) -> tuple[Deviations, list[Array]]:
        """Deviations on draws from the prior, and the decoder's outputs."""
        tensors, shape = self.rows.tensors, self.rows.tensors["mean"].shape[1:]
        count = part.stop - part.start
        z = noise.normals(self.seed, noise.PRIOR, part.start, count, math.prod(shape)).reshape(-1, *shape)
        outputs = self.vae.likelihood(z)
        exact = {name: tensors[f"prior.{name}"][part] for name in outputs}
        found = deviations.decoded("prior", exact, outputs, self.model)
        if "generate" in self.backend.graphs:
            pictures: Array = self.vae.generate(count, self.seed, part.start, size=self.model.sizes(shape) or None)
            levels = to_uint8(exact["sample"], self.model.data.range).transpose(0, 2, 3, 1)
            found[PICTURE] = deviations.largest(pictures, levels)
        return found, list(outputs.values())


@dataclass(frozen=True)
class _Measured:
    """Deviations of one quantity at one size and batch size, from row `first` on."""

    group: int
    batch: int
    first: int
    values: Float64


class _Meter:
    """Collects deviations, and makes checks of them: each of the row that is nearest to its tolerance."""

    def __init__(self, model: Model, kinds: Mapping[str, str], sizes: Sequence[str | None]) -> None:
        self.model = model
        self.kinds = kinds
        self.sizes = list(sizes)
        self.identical = True
        self._groups: dict[int, Rows] = {}
        self._measured: dict[str, list[_Measured]] = {}
        self._wrong = {"encoder": 0, "decoder": 0}
        self._first: dict[tuple[int, str], list[Array]] = {}
        self._apart = 0.0

    def collect(self, group: int, rows: Rows, batch: int, run: _Run, most: int | None) -> Iterator[int]:
        """Run all rows of a size, or the first `most`; what is given is how many ran, part by part."""
        self._groups[group] = rows
        functions = (("encoder", run.data), ("decoder", run.prior))
        for (graph, function), count in zip(functions, _counts(rows, most), strict=True):
            for part in run.slices(count):
                found, outputs = function(part)
                self._wrong[graph] += sum(int((~np.isfinite(value)).sum()) for value in outputs)
                if part.start == 0:
                    self._compare(group, graph, outputs)
                for quantity, values in found.items():
                    measured = _Measured(group, batch, part.start, np.asarray(values, np.float64))
                    self._measured.setdefault(quantity, []).append(measured)
                yield part.stop - part.start

    def _compare(self, group: int, graph: str, outputs: list[Array]) -> None:
        """How far the first rows are from those of the batch size before."""
        first = self._first.setdefault((group, graph), outputs)
        for value, other in zip(outputs, first, strict=True):
            count = min(len(value), len(other), _FEW)
            if not np.array_equal(value[:count], other[:count]):
                self.identical = False
                apart = deviations.largest(value[:count], other[:count]).max() / max(np.abs(other[:count]).max(), 1e-30)
                self._apart = max(self._apart, float(apart))

    def checks(self) -> list[Check]:
        """One of each quantity, and of what is not finite."""
        found = [
            self._check("encoder", f"{graph}.finite", "values that are not finite", "values", self._wrong[graph], 0.0)
            for graph in ("encoder", "decoder")
        ]
        for quantity, parts in self._measured.items():
            if quantity.endswith(".mse"):
                found.append(self._psnr(quantity, parts))
            else:
                found.append(self._worst(quantity, parts))
        found.append(self._check("encoder", SPLIT, "another split of the batch", "of max|output|", self._apart, None))
        return found

    def _worst(self, quantity: str, parts: Sequence[_Measured]) -> Check:
        """The row that is nearest to its tolerance, or, where there is none, the worst."""
        best: tuple[float, float, float | None, _Measured, int] | None = None
        for part in parts:
            rows = self._groups[part.group]
            places = slice(part.first, part.first + len(part.values))
            scale = _scale(quantity, rows)[places]
            values = np.where(np.isfinite(part.values), part.values, np.inf) / scale
            tolerance = self._tolerance(quantity, rows, places)
            judged = values if tolerance is None else _shares(values, tolerance / scale)
            if tolerance is not None and not self._in_float32(quantity) and part.group == 0:
                judged = judged.copy()
                judged[: max(0, rows.extremes - part.first)] = -1.0
            place = int(np.argmax(judged))
            allowed = None if tolerance is None else float((tolerance / scale)[place])
            if best is None or judged[place] > best[0]:
                best = (float(judged[place]), float(values[place]), allowed, part, place)
        assert best is not None
        _, value, allowed, part, place = best
        text, unit = self._words(quantity)
        own = self._groups[part.group].tensors.get(f"float32.{quantity}")
        pytorch = None
        if own is not None:
            row = part.first + place
            pytorch = float(own[row] / _scale(quantity, self._groups[part.group])[row])
        return self._check(
            quantity.split(".")[0], quantity, text, unit, value, allowed,
            pytorch=pytorch, size=self.sizes[part.group], batch=part.batch, example=part.first + place,
        )  # fmt: skip

    def _psnr(self, quantity: str, parts: Sequence[_Measured]) -> Check:
        """Of the whole of all rows of a size at a batch size, the worst.

        Where it is judged extremes are left out, and data stand for themselves: what decoded noise is like says little
        of them.
        """
        prefix = quantity.split(".")[0]
        low = self._lower(prefix)
        worst = math.inf
        where = parts[0]
        for group, batch in dict.fromkeys((part.group, part.batch) for part in parts):
            mine = [part for part in parts if (part.group, part.batch) == (group, batch)]
            values = np.concatenate([part.values for part in mine])
            kinds = [values]
            if low and prefix != "prior":
                rows = self._groups[group]
                kinds = np.split(values, [rows.extremes, rows.extremes + rows.held_out])[1:]
            for values in kinds:
                if not len(values):
                    continue
                mse = float(np.mean(values)) if np.isfinite(values).all() else math.inf
                # Capped at 300 dB, far beyond float64, for results that are equal.
                decibels = -math.inf if math.isinf(mse) else -10 * math.log10(max(mse, 1e-30))
                if decibels < worst:
                    worst, where = decibels, mine[0]
        tolerance = low.psnr if low and prefix == "decoder" else None
        text, unit = self._words(f"{prefix}.pixel.psnr")
        return self._check(
            prefix, f"{prefix}.pixel.psnr", text, unit, worst, tolerance,
            at_least=True, size=self.sizes[where.group], batch=where.batch,
        )  # fmt: skip

    def _in_float32(self, quantity: str) -> bool:
        prefix = quantity.split(".")[0]
        return self._lower("end_to_end" if prefix == "elbo" else prefix) is None

    def _lower(self, prefix: str) -> Tolerance | None:
        """The tolerances of what an id begins with; None where it is in float32."""
        if prefix == "encoder":
            kind = self.kinds["encoder"]
        elif prefix in ("prior", "decoder"):
            kind = self.kinds["decoder"]
        else:
            kind = max(self.kinds.values(), key=_ORDER.index)
        return None if kind == "float32" else TOLERANCES[kind]

    def _tolerance(self, quantity: str, rows: Rows, places: slice) -> Float64 | None:
        """What is tolerated of each row, in the deviations' own unit; None of what is only reported."""
        if quantity == PICTURE:
            return self._levels(rows)[places]
        prefix = quantity.partition(".")[0]
        if self._in_float32(quantity):
            if quantity not in deviations.conditioned(self.model):
                return None
            return rounding_tolerance(quantity, rows)[places]
        low = self._lower("end_to_end" if prefix == "elbo" else prefix)
        assert low is not None
        own = self.model.has_elbo and not self.model.likelihood.nominal
        if prefix == "elbo":
            value = low.elbo if own else None
        else:
            judged = JUDGED.get(quantity.partition(".")[2]) if prefix in ("encoder", "decoder") else None
            value = None if judged is None else getattr(low, judged)
        if value is None:
            return None
        return np.asarray(value * _scale(quantity, rows), np.float64)[places]

    def _levels(self, rows: Rows) -> Float64:
        """Levels of 255 that a picture's bytes may be off by."""
        low = self._lower("prior")
        width = self.model.data.range[1] - self.model.data.range[0]
        share = np.full(rows.prior, low.pixel) if low else rounding_tolerance("prior.sample.max", rows) / width
        # Rounding puts two values that are close on both sides of a half: one level is never an error.
        return np.asarray(1 + np.floor(255 * share), np.float64)

    def _words(self, quantity: str) -> tuple[str, str]:
        prefix, _, what = quantity.partition(".")
        if quantity == PICTURE:
            return "worst byte of pictures", "levels of 255"
        return _in_words(prefix, what, self.model)

    def _check(
        self,
        prefix: str,
        quantity: str,
        text: str,
        unit: str,
        measured: float,
        tolerance: float | None,
        **where: Any,
    ) -> Check:
        # JSON has no NaN: what cannot be compared counts as infinitely far off, which nothing tolerates.
        far = float(np.finfo(np.float64).max)
        if not math.isfinite(measured):
            measured = -far if where.get("at_least") else far
        graph = _GRAPHS["prior" if quantity == "decoder.finite" else prefix]
        return Check(
            id=quantity, graph=graph, quantity=text, unit=unit, measured=float(measured), tolerance=tolerance, **where
        )


def _latent_std(rows: Rows) -> Array | None:
    """For a deterministic encoder the standard deviation of each latent, or latent channel, over the data."""
    mean = rows.tensors["mean"][rows.extremes :]
    if "logvar" in rows.tensors or not len(mean):
        return None
    std: Array = np.maximum(mean.std(axis=(0, *range(2, mean.ndim)), keepdims=True), 1e-12)
    return std


def _scale(quantity: str, rows: Rows) -> Float64:
    """See `deviations.unit`; for each row."""
    count = rows.prior if quantity.startswith("prior.") else rows.examples
    return np.broadcast_to(deviations.unit(quantity, rows.tensors), (count,))


#: Precisions from the most exact on.
_ORDER = ("float32", "tf32", "float16", "bfloat16", "int8")


def _shares(values: Float64, tolerance: Float64) -> Float64:
    """Values as shares of their tolerances; infinite where nothing is tolerated and something is off."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = values / tolerance
    return np.where(values == 0.0, 0.0, np.where(np.isnan(shares), np.inf, shares))
