"""Search for the fastest way to run a bundle on this machine's CPU that passes its certificate.

Candidates (`candidates`) take turns (`measuring`); the fastest are chosen (`choosing`), and the choice as a whole gets
a certificate like any build. While a check fails, the candidate that is to blame is refused, and the next one chosen.

Why a build was refused, or a candidate was not chosen, stands in three places: `Measurement.verdict` of each timed
candidate (`choosing.verdicts`), `Build.absent` of what could not be tried or was taken back (`candidates`, and here),
and the error that ends a search: nothing passes in the precision (`Candidates.all`), the failed checks of the last
certificate (`CpuSearch.run`), or no gain over float32 (`NoGainError`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from vae_export import timing
from vae_export.building.contents import Artifacts, Contents
from vae_export.building.cpu import SearchSettings, choosing
from vae_export.building.cpu.candidates import Candidate, Candidates
from vae_export.building.cpu.choosing import Table, Timing
from vae_export.building.cpu.measuring import Measuring
from vae_export.building.evaluation import Plans
from vae_export.certification import certificate, tolerances
from vae_export.certification.certificate import Certificate
from vae_export.contract.build_record import BuiltGraph, Measurement, Options
from vae_export.contract.model import GRAPHS
from vae_export.errors import VerificationError
from vae_export.graph import fingerprint
from vae_export.progress import Progress
from vae_export.runtimes import Settings, processor
from vae_export.runtimes.backend import PlannedGraph
from vae_export.runtimes.cpu.dispatch import CpuBackend


class NoGainError(VerificationError):
    """The precision is no faster than float32. Nothing is gained by keeping more nodes in float32."""


def search(
    contents: Contents,
    options: Options,
    batches: Sequence[int],
    sizes: Mapping[str, int],
    settings: SearchSettings,
    progress: Progress,
) -> Artifacts:
    """Time what can run a bundle here, at these batches and sizes of the data's named dimensions, and choose.

    Raises:
        BackendError: what the precision needs is not installed or not in this processor.
        VerificationError: nothing passes its certificate, or the precision is no faster than float32.
    """
    candidates = Candidates(contents, options, settings, progress)
    measuring = Measuring(contents, sorted(set(batches)), sizes, settings)
    first: VerificationError | None = None
    while True:
        try:
            return CpuSearch(candidates, measuring, progress).run()
        except NoGainError:
            raise
        except VerificationError as error:
            first = first or error  # it states the whole tolerance
            if not candidates.can_keep_more():
                raise first from None
            candidates.restart(candidates.share / 2)


class CpuSearch:
    """One search; another one follows with fewer nodes in reduced precision, if its certificate fails."""

    def __init__(self, candidates: Candidates, measuring: Measuring, progress: Progress) -> None:
        """Make the candidates. Errors as for `search`."""
        self._factory, self._measuring, self._progress = candidates, measuring, progress
        self._settings, self._contents = measuring.settings, measuring.contents
        self._table: dict[str, list[Timing]] = {}
        self._candidates = dict(enumerate(candidates.all()))
        self._refused: dict[tuple[str, int], str] = {}
        #: Graphs of candidates that are compiled for all shapes only; and rows whose static shape was compared.
        self._dynamic: set[tuple[str, int]] = set()
        self._compared: set[tuple[str, int, int]] = set()

    def run(self) -> Artifacts:
        """Measure and choose. Errors as for `search`."""
        for graph in GRAPHS:
            self._time(graph, self._candidates)
        self._time_fused()
        while True:
            chosen = choosing.choose_all(self._table, self._refused, self._settings)
            graphs = {graph: self._plans(rows) for graph, rows in chosen.items()}
            self._progress("measuring the certificate")
            measured = self._factory.evaluator.certificate(graphs)
            if measured.passed:
                if not self._take_back_static_shapes(chosen) and not self._compare_with_float32(measured, chosen):
                    break
                continue
            self._refused |= choosing.blame(measured.nearest, chosen, self._table)
            if not all(choosing.left(self._table, graph, self._refused) for graph in GRAPHS):
                measured.require()
        if dropped := self._slower_than_parts(graphs, chosen):
            kept = {graph: plans for graph, plans in graphs.items() if graph not in dropped}
            if (alone := self._factory.evaluator.certificate(kept)).passed:
                graphs, measured = kept, alone
            else:  # the fused graphs pass, and their parts by themselves do not
                dropped = {}
        named = {graph: _named(graph, plans) for graph, plans in graphs.items()}
        return Artifacts(
            files={each.plan.file: each.graph for plans in named.values() for each in plans},
            graphs={
                graph: BuiltGraph(
                    file=plans[-1].plan.file,
                    onnx_sha256=hashlib.sha256(plans[-1].graph).hexdigest(),
                    structure=fingerprint.digest(plans[-1].graph),
                    variants=tuple(each.plan for each in plans),
                )
                for graph, plans in named.items()
            },
            certificate=measured,
            measurements=tuple(
                Measurement(
                    graph=row.graph,
                    batch=row.batch,
                    runner=row.plan.runner,
                    precision=row.plan.precision,
                    passes=tuple(row.plan.passes),
                    threads=row.plan.threads,
                    median_us=round(row.median * 1e6, 1) if row.median < math.inf else None,
                    spread=round(row.spread, 3) if row.median < math.inf else None,
                    verdict=verdict,
                )
                for row, verdict in choosing.verdicts(self._table, chosen, self._refused, dropped, self._settings)
            ),
            absent=(*self._factory.notes, *self._factory.absent),
            calibrated=self._factory.evaluator.calibrated,
        )

    def _time(self, graph: str, numbers: Iterable[int]) -> None:
        """Time candidates in this order, those with equal graphs once."""
        unique: dict[object, int] = {}
        for number in numbers:
            each = self._candidates[number].graphs[graph]
            unique.setdefault((each.plan.runner, each.plan.precision, each.graph), number)
        candidates = {number: self._candidates[number] for number in unique.values()}
        self._progress(f"measuring the {graph}")
        if len(candidates) == 1 and graph not in GRAPHS:
            batches = choosing.by_batch(self._table["decoder"])
            rows = [row for batch in batches for row in self._measuring.rows(graph, candidates, batch)]
            self._table[graph] = [dataclasses.replace(row, reason="the only one") for row in rows]
            return
        known = any("the machine is busy" in note for note in self._factory.notes)
        if not known and (busy := timing.busy(processor.processor().threads)):
            busy += ". Timings are less certain, and a faster way may not be told from a slower one"
            self._factory.notes.append(busy)
            self._progress(busy)
        self._table[graph] = self._measuring.time(graph, candidates)

    def _time_fused(self) -> None:
        """Fuse the graphs of the candidates that are fast for a part: no other fused graph is fast."""
        seconds = sum(min(row.median for row in self._table[part]) for part in GRAPHS)
        if seconds > self._settings.max_fusable_seconds:
            reason = f"one call takes {seconds:.2f} s, of which they would save next to nothing"
            self._factory.absent.append(f"fused graphs: {reason}")
            return
        best = dict.fromkeys(r.candidate for part in GRAPHS for r in choosing.choose(self._table[part], self._settings))
        for number in best:
            self._candidates[number] = self._factory.fused(self._candidates[number])
        if not any("reconstruct" in self._candidates[number].graphs for number in best):
            self._candidates[0] = self._factory.fused(self._candidates[0])
            best[0] = None
        for graph in sorted({name for number in best for name in self._candidates[number].graphs} - set(GRAPHS)):
            self._time(graph, [number for number in best if graph in self._candidates[number].graphs])

    def _plans(self, rows: Sequence[Timing]) -> list[PlannedGraph]:
        """Rows of one graph as plans: neighbours that run alike are one, and the last is for all larger batch sizes."""
        plans: list[PlannedGraph] = []
        for row in rows:
            static = row.plan.runner == "openvino" and (row.graph, row.candidate) not in self._dynamic
            exact = (self._measuring.shape(row.batch),) if static else ()
            plan = msgspec.structs.replace(row.plan, max_batch=row.batch, exact=exact)
            planned = PlannedGraph(self._candidates[row.candidate].graphs[row.graph].graph, plan)
            if plans and _replaced(plans[-1], max_batch=row.batch, exact=exact) == planned:
                planned = _replaced(planned, exact=(*plans.pop().plan.exact, *exact))
            plans.append(planned)
        return [*plans[:-1], _replaced(plans[-1], max_batch=None)]

    def _take_back_static_shapes(self, chosen: Table) -> bool:
        """Disable shape specialization where it changes results by more than rounding; whether there was any.

        The certificate may have been measured at other shapes.
        """
        before = len(self._dynamic)
        golden = self._contents.reference.groups(self._contents.model)[0]
        for row in (row for rows in chosen.values() for row in rows if row.plan.runner == "openvino"):
            key = (row.graph, row.candidate)
            if key in self._dynamic or (*key, row.batch) in self._compared:
                continue
            self._compared.add((*key, row.batch))
            planned = dataclasses.replace(self._candidates[row.candidate].graphs[row.graph], plan=row.plan)
            difference = self._measuring.shape_difference(row.graph, planned, row.batch)
            tolerance = tolerances.output_tolerance(row.graph, golden)
            if not difference <= tolerance:  # NaN never passes
                self._dynamic.add(key)
                self._factory.absent.append(
                    f"{row.graph} in {row.plan.precision}: static-shape and dynamic-shape results at batch {row.batch} "
                    f"differ by {difference:.3g} of max|output|, tolerance {tolerance:.3g}: it is compiled for all "
                    "shapes only"
                )
        return len(self._dynamic) > before

    def _compare_with_float32(self, measured: Certificate, chosen: Table) -> bool:
        """Time float32, too, where a graph loses more than half precision may: it must be faster than float32 then.

        Returns whether there was any; raises NoGainError if nothing is left in the precision that was asked for.
        """
        kinds = {graph: chosen[graph][0].plan.precision for graph in GRAPHS}
        full: dict[int, Candidate] = {}
        for graph, kind in kinds.items():
            rows = self._table[graph]
            lost = certificate.beyond_half(measured.checks, graph)
            if lost is None or any(row.plan.precision == "fp32" for row in rows):
                continue
            if not full:
                exact = (each for runner in self._factory.runners for each in self._factory.of(runner, "fp32"))
                full = dict(enumerate(exact, len(self._candidates)))
                self._candidates |= full
            self._time(graph, [*full, *dict.fromkeys(row.candidate for row in rows)])
            left = choosing.left(self._table, graph, self._refused)
            if reason := choosing.no_gain(left, kind, self._settings):
                self._factory.absent.append(
                    f"the {graph} in {kind} loses more than half precision may: {lost}; and {reason}"
                )
                kinds[graph] = "fp32"
        if full and set(kinds.values()) == {"fp32"}:
            raise NoGainError(
                f"build: {self._factory.options.precision} is not worth what it loses of {self._contents.name}: "
                f"{'; '.join(self._factory.absent)}. Build with --precision fp32 or auto"
            )
        return bool(full)

    def _slower_than_parts(self, graphs: Plans, chosen: Table) -> dict[str, str]:
        """The fused graphs that do not beat their parts, and by how much they lose."""
        dropped, model = {}, self._contents.model
        with (
            contextlib.closing(CpuBackend(graphs, model, Settings())) as fused,
            contextlib.closing(CpuBackend({graph: graphs[graph] for graph in GRAPHS}, model, Settings())) as parts,
        ):
            for graph in fused.graphs - parts.graphs:
                self._progress(f"measuring the {graph} against its parts")
                ratio = self._measuring.fused_ratio(graph, [row.batch for row in chosen[graph]], fused, parts)
                if ratio > self._settings.max_fused_ratio:
                    dropped[graph] = f"its parts are {ratio:.2f} times as fast"
        return dropped


def _replaced(planned: PlannedGraph, **changes: object) -> PlannedGraph:
    return dataclasses.replace(planned, plan=msgspec.structs.replace(planned.plan, **changes))


def _named(graph: str, plans: Sequence[PlannedGraph]) -> list[PlannedGraph]:
    """With a file name for each different content."""
    files: dict[bytes, str] = {}
    for each in plans:
        files.setdefault(each.graph, f"{graph}.{len(files)}.onnx" if files else f"{graph}.onnx")
    return [_replaced(each, file=files[each.graph]) for each in plans]
