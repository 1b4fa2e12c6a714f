"""Measure a certificate on this machine, against the reference's golden examples and without PyTorch."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vae_export.certification import deviations, golden, tail
from vae_export.certification.certificate import Certificate, Check
from vae_export.certification.deviations import PICTURE as PICTURE
from vae_export.certification.deviations import Deviations
from vae_export.certification.golden import Reference, Rows
from vae_export.certification.judging import FEW, GRAPHS, Meter, counts, shown
from vae_export.certification.runs import HELD, Run, latent_std
from vae_export.certification.tail import Tail
from vae_export.certification.tolerances import JUDGED, TOLERANCES
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import Model
from vae_export.errors import BundleError
from vae_export.progress import Progress, silent
from vae_export.runtimes import VAE, Backend, BuildLike, Settings, open_bundle

BATCHES = (1, 2, 7, 64)
_STEP = "measuring the certificate"
#: The quantile over the rows of a tail that is reported beside the worst.
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
    """Measure a bundle, or a build of it, on this machine against the bundle's golden examples.

    Builds in the cache are ignored. Nothing is written. The result may be out of tolerance: see `Certificate.passed`
    and `Certificate.require`.

    Args:
        path: the bundle's folder.
        device: as for `load`.
        build: the folder of a build of this bundle, to measure instead of the bundle's own graphs.
        threads: as for `load`.
        progress: called as the measurement goes on.
        opened: called before the measurement with a line that describes what is measured.

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
            costs = {name: graph.cost for name, graph in manifest.graphs.items()}
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

    In float32 every row must stay within the effect of rounding, see `tolerances.rounding_tolerance`. Below it encoder
    and decoder are judged separately, each by the tolerances of its own precision and on rows of data; extremes and
    draws from the prior are only reported. Graphs below float32 are also measured on more rows, against the bundle's
    graphs in float32: see `tail`.

    Args:
        model: what the graphs compute.
        backend: runs them; its fused graphs are measured, too, where it has any.
        reference: the golden examples.
        name: of the bundle.
        precision: whose tolerances apply; by graph where they differ between `encoder` and `decoder`.
        batches: the batch sizes. Those larger than the number of golden examples are left out, except the smallest. All
            rows run at the largest, the first few at the others.
        progress: called with the share of the work that is done.
        more: the rows of `tail`, or the reason why there are none; None leaves them out.

    Raises:
        BundleError: the golden examples are of a version without spreads, or a graph fails at a batch or size that the
            model declares, or its outputs have another shape.
        BackendError: out of memory.
    """
    record = reference.record
    if record.draws == 0:
        raise BundleError(
            f"{name}: its golden examples, written before version 0.6, do not say how far rounding may move them, so "
            "that no tolerance follows from them. Export the model again"
        )
    kinds = dict.fromkeys(("encoder", "decoder"), precision) if isinstance(precision, str) else dict(precision)
    affordable = [batch for batch in batches if batch <= max(record.examples, record.prior)]
    batches = tuple(affordable or [min(batches)])
    groups = reference.groups(model)
    meter = Meter(model, kinds, [_size(rows.sizes) for rows in groups])
    runs = [
        (index, rows, batch, None if batch == max(several) else FEW)
        for index, rows in enumerate(groups)
        for several in [batches if index == 0 else (max(rows.examples, rows.prior),)]
        for batch in several
    ]
    work = sum(count * rows.tensors["x"][0].size for _, rows, _, most in runs for count in counts(rows, most))
    done = 0
    progress(_STEP, 0.0)
    for index, rows, batch, most in runs:
        run = Run(model, backend, rows, record.seed, batch, kinds, latent_std(rows))
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
    examples = {kind: getattr(record, kind) for kind in ("extremes", "held_out", "decoded", "prior")}
    reduced_precision = set(kinds.values()) != {"float32"}
    if reduced_precision and not record.held_out and not model.has_samples:
        absent.append("data: the bundle has only decoded noise. Export the model with held_out (--held-out) data")
    if isinstance(more, str):
        absent += [more] if reduced_precision else []
    elif more is not None and (further := tail_checks(model, backend, more, kinds, groups[0])):
        checks += further
        examples |= {"more calibration": more.calibration, "more prior": more.draws}
    return Certificate(
        bundle=name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        reference=record.reference,
        measured={**{k: str(v) for k, v in backend.describe().items()}, "machine": platform.machine()},
        precision=_precision_text(kinds),
        examples=examples,
        batches=batches,
        sizes=tuple(filter(None, meter.sizes)),
        absent=tuple(absent),
        splits_identical=meter.identical,
        checks=tuple(checks),
    )


def tail_checks(model: Model, backend: Backend, more: Tail, kinds: Mapping[str, str], rows: Rows) -> list[Check]:
    """The checks of graphs below float32 on many rows: of each quantity the worst row, judged like a row of data.

    Args:
        model: what the graphs compute.
        backend: runs them.
        more: the rows, and the results of float32 for them.
        kinds: the precisions whose tolerances apply to encoder and decoder.
        rows: the golden examples, whose data give a deterministic encoder's unit.
    """
    vae = VAE(model, backend, micro_batch=tail.BATCH)
    measured: Deviations = {}
    if kinds["encoder"] != "float32":
        posterior = vae.encode(more.x)
        outputs = deviations.posterior_of(posterior)
        measured |= deviations.encoded(more.posterior, outputs, latent_std(rows))
    if kinds["decoder"] != "float32":
        held = max(1, HELD // (more.decoded[0].nbytes * tail.BATCH)) * tail.BATCH
        parts = [slice(first, first + held) for first in range(0, len(more.z), held)]
        decoded = [
            deviations.decoded("decoder", {"sample": more.decoded[p]}, {"sample": vae.decode(more.z[p])}, model)
            for p in parts
        ]
        measured |= {quantity: np.concatenate([part[quantity] for part in decoded]) for quantity in decoded[0]}
    checks = []
    for quantity, values in measured.items():
        graph, _, what = quantity.partition(".")
        if what not in JUDGED:
            continue
        text, unit = shown(f"tail.{what}", model)
        values = np.where(np.isfinite(values), values, np.finfo(np.float64).max)
        checks.append(
            Check(
                id=f"tail.{what}",
                graph=GRAPHS[graph],
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


def _precision_text(kinds: Mapping[str, str]) -> str:
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
