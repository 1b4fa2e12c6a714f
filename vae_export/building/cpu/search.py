"""What runs a bundle fastest on this machine's processor: measured, and held to the certificate.

Candidates are a runner, graph passes, a precision and a number of threads. Each is timed with the others in turns, for
each graph and batch; the fastest is chosen, of those that are as fast within the noise the first. A lower precision is
chosen for a graph only where it is faster than float32 by more than the noise.
A fused graph is used where it beats its parts. The choice as a whole is measured like any build, and what does not hold
is taken out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from vae_export import graph as graphs
from vae_export import timing
from vae_export.building import mixed_precision
from vae_export.certification import tail, verifier
from vae_export.certification.certificate import Certificate, Check, beyond_half
from vae_export.certification.golden import Reference, stretched
from vae_export.certification.tolerances import output_tolerance
from vae_export.contract import build_record
from vae_export.contract.build_record import ExecutionPlan, Measurement, Options
from vae_export.contract.model import GRAPHS, Cost, Model, parts_of
from vae_export.contract.targets import Precision, Runner
from vae_export.errors import BackendError, VaeExportError, VerificationError
from vae_export.graph import edit, fuse, quantize, rewrites
from vae_export.numerics import noise
from vae_export.numerics.pixels import is_picture
from vae_export.progress import Progress
from vae_export.runtimes import VAE, Settings, processor
from vae_export.runtimes.backend import Backend, PlannedGraph, planned
from vae_export.runtimes.cpu.dispatch import CpuBackend

Array = npt.NDArray[np.float32]
#: A graph and the identity of a candidate for it.
Place = tuple[str, int]

#: Precisions from the most exact to the least.
_RANK: Mapping[Precision, int] = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3}
#: A fused graph is left out where its parts are more than so many times as fast.
WORTH = 1.02
#: The forms to try. Of those that are equally fast the first is taken: the one that multiplies least.
_FORMS: Mapping[Runner, tuple[tuple[str, ...], ...]] = {
    "onnxruntime": (("upsampling", "phases", "winograd"), ("upsampling", "phases"), ()),
    "openvino": (
        ("upsampling", "channel_norm", "winograd"),
        ("upsampling", "channel_norm"),
        ("channel_norm",),
        (),
    ),
}
#: Seconds of measuring for each candidate, graph and batch, unless asked for otherwise.
SECONDS = 0.5
#: Turns of slow calls, at least.
_TURNS = 3
#: What takes this many times as long as the fastest in each of so many calls, which take turns, is not timed further.
_HOPELESS, _TRIALS = 2.0, 3
#: Differences below this share are noise, however quiet the machine was; and above that they are none, however loud.
_NOISE, _MOST_NOISE = 0.01, 0.05
#: A lower precision saves this share of float32's time, and more than the turns differ, or is not chosen over it.
_GAIN = 0.05
#: Those that are not slower by more than this share are timed once more, for twice as long.
_CLOSE = 0.15
#: No larger batch is measured whose call would take longer, in seconds.
_LONGEST = 8.0
#: Where a call takes less than this, one thread may be faster than several, which have to wait for each other.
_SHORT = 2e-3
#: Where encoder and decoder together take longer, in seconds, fused graphs are not made: each would hold the weights
#: once more, to save a millisecond.
_LONG = 0.25
#: What a graph with nodes that can be kept may use of its budget, measured alone, where float32 is there to fall back
#: on: encoder and decoder share it. What was asked for may use it all; where the whole then does not hold, half is
#: tried, and so on, down to the last.
_SHARE, _LAST_SHARE = 0.5, 0.1
#: Rows on which lowered graphs are measured; all where that many take less than so many seconds; in batches of so many.
_ROWS, _QUICK, _FEW = 24, 0.5, 8


@dataclass(frozen=True)
class Candidate:
    """A way to run all graphs.

    Attributes:
        runner: what runs them.
        precision: of the heavy nodes.
        forms: those of `passes.FORMS` that were asked for.
        graphs: their bytes by name.
        changed: for each graph, the passes and how many places they changed.
        kept: for each graph, nodes that stayed in float32, and why.
        precisions: for each graph, what it is really in.
    """

    runner: Runner
    precision: Precision
    forms: tuple[str, ...]
    graphs: dict[str, bytes]
    changed: dict[str, dict[str, int]]
    kept: dict[str, dict[str, str]] = field(default_factory=dict)
    precisions: dict[str, Precision] = field(default_factory=dict)

    def way(
        self, graph: str, threads: int | None, max_batch: int | None = None, exact: tuple[dict[str, int], ...] = ()
    ) -> PlannedGraph:
        """For the backend."""
        plan = ExecutionPlan(
            max_batch=max_batch,
            file="",
            runner=self.runner,
            precision=self.precisions[graph],
            threads=threads,
            exact=exact,
            passes={name: count for name, count in self.changed[graph].items() if count},
            kept=self.kept.get(graph, {}),
        )
        return PlannedGraph(self.graphs[graph], plan)


@dataclass(frozen=True)
class Timed:
    """A candidate for one graph and batch, and what its calls took."""

    candidate: Candidate
    threads: int | None
    batch: int
    times: timing.Times | None
    verdict: str


@dataclass(frozen=True)
class Tuned:
    """What was chosen.

    Attributes:
        variants: for each graph, how it runs, by rising batch, and the graph's bytes.
        measurements: everything that was measured.
        absent: what could not be a candidate here, and why.
        certificate: of the whole.
        calibrated: the rows that activations were recorded on: see `Build.calibrated`.
    """

    variants: dict[str, list[tuple[ExecutionPlan, bytes]]]
    measurements: tuple[Measurement, ...]
    absent: tuple[str, ...]
    certificate: Certificate
    calibrated: Mapping[str, int]


class _NoGainError(VerificationError):
    """What was asked for is no faster than float32, so that keeping more nodes in float32 would not help."""


class Tuner:
    """Finds the fastest way to run a bundle here that holds."""

    def __init__(
        self,
        sources: Mapping[str, bytes],
        model: Model,
        reference: Reference,
        calibration: Array,
        costs: Mapping[str, Cost | None],
        options: Options,
        batches: Sequence[int],
        sizes: Mapping[str, int],
        name: str,
        seconds: float,
        progress: Progress,
    ) -> None:
        """Run the passes that always pay, and see how long a small certificate takes.

        Args:
            sources: the encoder and the decoder, with their weights in them.
            model: what they compute.
            reference: the golden examples.
            calibration: (n, *data) to record activations on; n may be 0.
            costs: of an example in each, which decide on how many rows more a lower precision is judged.
            options: precision, budget and passes.
            batches: batch sizes to measure at.
            sizes: of the data's named dimensions, to measure at.
            name: of the bundle.
            seconds: of measuring for each candidate, graph and batch.
            progress: called with the name of each step.
        """
        self.model, self.reference, self.options, self.name = model, reference, options, name
        self.seconds, self.progress = seconds, progress
        self.batches, self.sizes = sorted(set(batches)), dict(sizes)
        self.calibration, self.sources, self.costs = calibration, sources, costs
        self.allowed = rewrites.select("all") if options.passes is None else options.passes
        self.basic = [passed for passed in self.allowed if passed not in rewrites.FORMS]
        self.absent: list[str] = []
        self.processor = processor.processor()
        self.bits: quantize.Bits = 8 if "vnni" in processor.features() else 7
        self._busy: str | None = None
        self.runners = self._runners()
        self.base: dict[str, bytes] = {}
        self.changed: dict[str, dict[str, int]] = {}
        for graph in GRAPHS:
            read = graphs.read(sources[graph])
            self.changed[graph] = rewrites.optimize(read, self.basic)
            edit.name_nodes(read)
            self.base[graph] = graphs.write(read)
        self.timed: dict[str, list[Timed]] = {}
        self._compared: dict[tuple[str, int, int], float] = {}
        self._inexact: set[Place] = set()
        self._made: dict[Precision, dict[str, mixed_precision.ReducedPrecision]] = {}
        self._activations: dict[str, dict[str, mixed_precision.Activation]] | None = None
        self.share = _SHARE if options.precision == "auto" else 1.0
        self._rounded: dict[bytes, bytes] = {}
        self._large: list[mixed_precision.Large | None] = []
        self._more: dict[bool, tail.Tail | str] = {}
        self.small = reference.first(_ROWS)
        began = time.perf_counter()
        self._quickly({graph: [planned(self.base[graph])] for graph in GRAPHS})
        if time.perf_counter() - began < _QUICK:
            self.small = reference

    def run(self) -> Tuned:
        """Measure and choose.

        Raises:
            BackendError: what the precision needs is not installed or not in this processor.
            VerificationError: nothing holds.
        """
        first: VerificationError | None = None
        while True:
            try:
                return self._run()
            except _NoGainError:
                raise
            except VerificationError as error:
                first = first or error  # those of smaller shares name what would hold
                # Only where nodes were kept as the budget allowed can more of them be kept.
                kept = self.options.precision in ("fp16", "int8") and any(self._made.values())
                if not kept or self.share <= _LAST_SHARE:
                    raise first from None
                self.share /= 2
                self._made, self.timed, self.absent, self._compared, self._inexact = {}, {}, [], {}, set()

    def _run(self) -> Tuned:
        candidates = list(self._candidates())
        for graph in GRAPHS:
            self.progress(f"measuring the {graph}")
            self.timed[graph] = self._time(graph, candidates)
        best: dict[int, Candidate] = {}
        whole = sum(min(row.times.median for row in self.timed[part] if row.times) for part in GRAPHS)
        if whole > _LONG:
            self.absent.append(f"fused graphs: one call takes {whole:.2f} s, of which they would save next to nothing")
        else:  # one is not fast where neither of its parts is
            best = {id(row.candidate): row.candidate for part in GRAPHS for row in self._choose(part, {})}
            for candidate in best.values():
                self._fuse(candidate)
            if not any("reconstruct" in candidate.graphs for candidate in best.values()):
                self._fuse(candidates[0])
                best[id(candidates[0])] = candidates[0]
        for graph in sorted({name for candidate in best.values() for name in candidate.graphs} - set(GRAPHS)):
            self.progress(f"measuring the {graph}")
            self.timed[graph] = self._time(graph, [c for c in best.values() if graph in c.graphs])
        refused: dict[Place, str] = {}
        while True:
            chosen = self._chosen(refused)
            ways = {graph: self._ways(graph, rows) for graph, rows in chosen.items()}
            self.progress("measuring the certificate")
            measured = self._judged(ways)
            if not measured.passed:
                self._refuse(measured, chosen, refused)
            elif not self._take_back_exact(chosen) and not self._beside_float32(measured, chosen, refused):
                break
        dropped = self._fusions(chosen)
        if dropped:
            ways = {graph: way for graph, way in ways.items() if graph not in dropped}
            measured = self._judged(ways)
            if not measured.passed:  # the fused graphs hold, and their parts by themselves do not
                dropped, ways = {}, {graph: self._ways(graph, rows) for graph, rows in chosen.items()}
                measured = self._judged(ways)
            measured.require()
        measurements = tuple(self._records(chosen, refused, dropped))
        rows: Mapping[str, int] = {}
        if self._activations is not None:
            rows = mixed_precision.calibrated(self.model, self.reference, self.calibration)[1]
        return Tuned(self._variants(ways), measurements, tuple(self.absent), measured, rows)

    def _runners(self) -> list[Runner]:
        """What can be used here; OpenVINO where it is installed."""
        found: list[Runner] = ["onnxruntime"]
        try:
            from vae_export.runtimes.cpu import openvino

            self.capabilities = openvino.capabilities()
            found.append("openvino")
        except BackendError as error:
            self.capabilities = frozenset()
            self.absent.append(_line(error))
        return found

    def _candidates(self) -> Iterator[Candidate]:
        """The most exact first."""
        asked = self.options.precision
        wanted: tuple[Precision, ...] = ("fp32", "bf16", "int8") if asked == "auto" else (asked,)
        found = able = 0
        for kind in wanted:
            for runner in self.runners:
                if problem := self._cannot(runner, kind):
                    self.absent.append(problem)
                    continue
                able += 1
                for candidate in self._forms(runner, kind):
                    found += 1
                    yield candidate
        if not found:
            reasons = "; ".join(self.absent)
            if not able:
                raise BackendError(
                    f"build: nothing computes in {asked} on this processor, {self.processor.model}: {reasons}. "
                    "Build with --precision fp32 or auto"
                )
            raise VerificationError(
                f"build: nothing of {self.name} holds in {asked}: {reasons}. Build with --precision fp32 or auto"
            )

    def _cannot(self, runner: Runner, kind: Precision) -> str | None:
        """Why a runner does not compute in a precision here, or None."""
        if kind == "bf16":
            if runner == "onnxruntime":
                return "ONNX Runtime has no bf16 convolutions on the CPU"
            if "BF16" not in self.capabilities:
                return f"{self.processor.model} has no bfloat16"
        if kind == "fp16" and runner == "openvino":
            return "OpenVINO computes a graph in float16 as one in float32"
        return None

    def _forms(self, runner: Runner, kind: Precision) -> Iterator[Candidate]:
        """The candidates of a runner and a precision; forms that change nothing are left out."""
        lowered = self._lowered(kind)
        if lowered is None:
            return
        kinds: dict[str, Precision] = {graph: kind if graph in lowered else "fp32" for graph in GRAPHS}
        kept = {graph: low.kept for graph, low in lowered.items()}
        known: set[tuple[bytes, ...]] = set()
        for forms in _FORMS[runner]:
            if not set(forms) <= set(self.allowed):
                continue
            made: dict[str, bytes] = {}
            changed = {}
            for graph in GRAPHS:
                read = graphs.read(lowered[graph].graph if graph in lowered else self.base[graph])
                counts = rewrites.optimize(read, forms)
                changed[graph] = {**self.changed[graph], **counts}
                made[graph] = graphs.write(read)
            key = tuple(hashlib.sha256(made[graph]).digest() for graph in GRAPHS)
            if key in known:
                continue
            known.add(key)
            yield Candidate(runner, kind, forms, made, changed, dict(kept), dict(kinds))

    def _fuse(self, candidate: Candidate) -> None:
        """Add the fused graphs; not across two precisions of OpenVINO, which computes a whole graph in one."""
        made, kinds, changed, kept = candidate.graphs, candidate.precisions, candidate.changed, candidate.kept

        def read() -> tuple[Any, Any]:
            return graphs.read(made["encoder"]), graphs.read(made["decoder"])

        model = self.model
        if is_picture(model.data.shape):
            made["generate"] = graphs.write(fuse.generate(read()[1], model))
        if "bf16" not in kinds.values() or len(set(kinds.values())) == 1:
            made["reconstruct"] = graphs.write(fuse.reconstruct(*read(), model))
            if model.has_elbo:
                made["score"] = graphs.write(fuse.score(*read(), model))
        for graph in made.keys() - set(GRAPHS):
            inside = parts_of(graph)
            changed[graph] = {k: sum(changed[p][k] for p in inside) for k in changed["decoder"]}
            kept[graph] = {f"{p}.{node}": why for p in inside for node, why in kept.get(p, {}).items()}
            kinds[graph] = next((kinds[p] for p in inside if kinds[p] != "fp32"), "fp32")

    def _lowered(self, kind: Precision) -> dict[str, mixed_precision.ReducedPrecision] | None:
        """Encoder and decoder in a lower precision, as far as each by itself holds; None where neither does.

        It is measured with the last runner that computes in it; made once.
        """
        if kind == "fp32":
            return {}
        if kind in self._made:
            return self._made[kind] or None
        runner = [runner for runner in self.runners if not self._cannot(runner, kind)][-1]
        found = self._made[kind] = {}
        for graph in GRAPHS:
            self.progress(f"{kind}: the {graph}")

            last: list[str] = []

            def problem(made: bytes, graph: str = graph, last: list[str] = last) -> str | None:
                reason = self._problem(graph, planned(made, runner, kind), self.share)
                if reason is not None:
                    last.append(reason)
                return reason

            if kind == "bf16":  # the runner's own: it rounds every node, and holds or does not
                if (reason := self._problem(graph, planned(self.base[graph], runner, kind), 1.0)) is None:
                    found[graph] = mixed_precision.ReducedPrecision(self.base[graph], {})
                else:
                    self.absent.append(f"the {graph} in bf16: {reason}")
                continue
            low = mixed_precision.choose(graph, self.base[graph], kind, self._seen(graph), problem, self.bits)
            if low is None:
                why = f"every node would have to stay in float32{'; ' + last[-1] if last else ''}"
                self.absent.append(f"the {graph} in {kind}{self._seven(kind)}: {why}")
            else:
                found[graph] = low
        return found or None

    def _seven(self, kind: Precision) -> str:
        """That 8-bit graphs have weights of 7 bits here, and why."""
        if kind != "int8" or self.bits == 8:
            return ""
        return f", with weights of 7 bits, as this processor, {self.processor.model}, has no VNNI"

    def _seen(self, graph: str) -> Mapping[str, mixed_precision.Activation]:
        """Activations of a graph in float32; recorded once."""
        if self._activations is None:
            self._activations = mixed_precision.record_both(self.base, self.model, self.reference, self.calibration)
        return self._activations[graph]

    def _problem(self, graph: str, way: PlannedGraph, share: float) -> str | None:
        """What is out of a share of the budget, with this graph alone in another way than float32.

        It is measured on few golden examples, and if they hold, on the rows of `tail`. Half precision is judged by
        arithmetic that rounds, and in a large size, too.
        """
        way = self._rounding(way)
        ways = {other: [way if other == graph else planned(self.base[other])] for other in GRAPHS}
        try:
            measured = self._quickly(ways)
            self._tail(choosing=True)
            for more in self._more.values():  # those that judge, too, where they refused what was chosen without them
                if isinstance(more, tail.Tail) and all(_within(check, share) for check in measured.checks):
                    measured = self._quickly(ways, more)
            if way.plan.precision == "fp16" and (large := self._large_inputs()):
                problem = large.problem(graph, way.graph, self.model)
                if problem is not None:
                    return problem
        except VaeExportError as error:
            return _line(error)
        wrong = [check for check in measured.checks if not _within(check, share)]
        if not wrong:
            return None
        return f"{wrong[0]}" + f", of which it may use {share:g} alone" * wrong[0].passed

    def _rounding(self, way: PlannedGraph) -> PlannedGraph:
        """A way of running a graph in float16, as hardware computes it that has float16; all others as they are."""
        if way.plan.precision != "fp16":
            return way
        if way.graph not in self._rounded:
            self._rounded[way.graph] = mixed_precision.rounding(way.graph)
        return dataclasses.replace(way, graph=self._rounded[way.graph])

    def _large_inputs(self) -> mixed_precision.Large | None:
        """Inputs of a large size; made once."""
        if not self._large:
            self._large.append(mixed_precision.large(self.base, self.model, self.reference))
        return self._large[0]

    def _tail(self, *, choosing: bool) -> tail.Tail | str:
        """More rows for what is below float32: to choose by, or to judge what was chosen. Made once."""
        if choosing not in self._more:
            self.progress("running float32 on more rows")
            self._more[choosing] = tail.make(
                *(self.sources, {}, self.model, self.costs, self.reference, self.calibration), choosing=choosing
            )
        return self._more[choosing]

    def _quickly(self, ways: Mapping[str, Sequence[PlannedGraph]], more: tail.Tail | str | None = None) -> Certificate:
        """On few golden examples, and at one batch, which is no larger than there are rows."""
        record = self.small.record
        batches = (min(_FEW, max(record.examples, record.prior)),)
        return self._certificate(ways, self.small, batches=batches, more=more)

    def _judged(self, ways: Mapping[str, Sequence[PlannedGraph]]) -> Certificate:
        """The certificate of what runs; where it holds, and half precision that rounds does not, of that."""
        lower = any(way.plan.precision != "fp32" for each in ways.values() for way in each)
        more = self._tail(choosing=False) if lower else None
        measured = self._certificate(ways, self.reference, more=more)
        rounded = {graph: [self._rounding(way) for way in each] for graph, each in ways.items()}
        if measured.passed and rounded != ways:
            self.progress("measuring float16 with every value rounded")
            judged = self._certificate(rounded, self.reference, more=more)
            return measured if judged.passed else judged
        return measured

    def _certificate(
        self,
        ways: Mapping[str, Sequence[PlannedGraph]],
        reference: Reference,
        *,
        batches: Sequence[int] = verifier.BATCHES,
        more: tail.Tail | str | None = None,
    ) -> Certificate:
        backend = CpuBackend(ways, self.model, Settings())
        try:
            kinds = [(graph, way.plan.precision) for graph, each in ways.items() for way in each]
            held_to = build_record.held_to(kinds, self.options.budget if self.options.precision == "auto" else None)
            return verifier.measure(self.model, backend, reference, self.name, held_to, batches=batches, more=more)
        finally:
            backend.close()

    def _time(self, graph: str, candidates: Sequence[Candidate]) -> list[Timed]:
        """Time candidates at every batch, those with equal graphs once."""
        unique: dict[tuple[Any, ...], Candidate] = {}
        for candidate in candidates:
            key = (candidate.runner, candidate.precisions[graph], candidate.graphs[graph])
            unique.setdefault(key, candidate)
        opened: dict[tuple[int, int | None], Backend] = {}
        rows: list[Timed] = []
        found = list(unique.values())
        if len(found) == 1 and graph not in GRAPHS:
            return [Timed(found[0], None, batch, None, "the only one") for batch in self._measured_batches()]
        self._look_whether_busy()
        try:
            for candidate in found:
                opened[id(candidate), None] = self._open(graph, candidate, None)
            for batch in self.batches:
                rows += self._time_batch(graph, found, batch, opened)
                fastest = min(row.times.median for row in rows if row.times and row.batch == batch)
                larger = [other for other in self.batches if other > batch]
                if larger and fastest / batch * larger[0] > _LONGEST:
                    break  # larger batches run like this one
        finally:
            for backend in opened.values():
                backend.close()
        return rows

    def _look_whether_busy(self) -> None:
        """Tell once, and for the record, that others use the processors."""
        if self._busy is None and (found := timing.busy(self.processor.threads)):
            self._busy = f"{found}. What was measured is less sure, and a faster way may not be told from a slower one"
            self.progress(self._busy)
            self.absent.append(self._busy)

    def _open(self, graph: str, candidate: Candidate, threads: int | None) -> Backend:
        way = candidate.way(graph, threads, exact=tuple(map(self._shape, self.batches)))
        return CpuBackend({graph: [way]}, self.model, Settings())

    def _shape(self, batch: int) -> dict[str, int]:
        """See `ExecutionPlan.exact`."""
        return {"batch": batch, **self.sizes}

    def _measured_batches(self) -> list[int]:
        """Those at which the decoder was measured."""
        return list(dict.fromkeys(row.batch for row in self.timed["decoder"]))

    def _time_batch(
        self,
        graph: str,
        candidates: Sequence[Candidate],
        batch: int,
        opened: dict[tuple[int, int | None], Backend],
    ) -> list[Timed]:
        inputs = self._inputs(graph, batch)
        outputs = ("sample",) if graph == "decoder" else tuple(t.name for t in self.model.signature(graph)[1])
        threads: list[int | None] = [None]
        calls: dict[tuple[int, int | None], timing.Call] = {}
        first: dict[tuple[int, int | None], float] = {}
        by_id = {id(candidate): candidate for candidate in candidates}
        for number in threads:
            for candidate in candidates:
                key = (id(candidate), number)
                if key not in opened:
                    opened[key] = self._open(graph, candidate, number)
                backend = opened[key]

                def call(backend: Backend = backend) -> Any:
                    return backend.run(graph, inputs, outputs, batch)

                call()
                calls[key] = call
            new = [key for key in calls if key not in first]
            trials = [{key: timing.once(calls[key]) for key in new} for _ in range(_TRIALS)]
            first |= {key: min(trial[key] for trial in trials) for key in new}
            if number is None and min(first.values()) < _SHORT:
                threads.append(1)
        hopeless = {key for key, seconds in first.items() if seconds > _HOPELESS * min(first.values())}
        timed = {key: call for key, call in calls.items() if key not in hopeless}
        times = self._measure(timed, self.seconds)
        fastest = min(found.median for found in times.values())
        close = {key: timed[key] for key, found in times.items() if found.median <= (1 + _CLOSE) * fastest}
        if len(close) > 1:
            times |= self._measure(close, 2 * self.seconds)
        return [
            Timed(
                by_id[key[0]],
                key[1],
                batch,
                times.get(key),
                f"its first {_TRIALS} calls took {first[key] / min(first.values()):.1f} times the fastest's"
                if key in hopeless
                else "slower",
            )
            for key in calls
        ]

    def _measure(
        self, calls: Mapping[tuple[int, int | None], timing.Call], seconds: float
    ) -> dict[tuple[int, int | None], timing.Times]:
        found = timing.measure({str(key): call for key, call in calls.items()}, seconds, _TURNS)
        return {key: found[str(key)] for key in calls}

    def _inputs(self, graph: str, batch: int) -> dict[str, Array]:
        """Real data and noise, at the sizes to measure at."""
        made = {}
        for tensor in self.model.signature(graph)[0]:
            shape = self.model.tensor_shape(tensor, batch, self.sizes)
            if tensor.name == "x":
                rows = self.reference.tensors["x"][self.reference.record.extremes :]
                made["x"] = stretched(rows[np.arange(batch) % len(rows)], shape[1:])
            else:
                size = math.prod(shape[1:])
                made[tensor.name] = noise.normals(0, noise.PRIOR, 0, batch, size).reshape(shape)
        return made

    def _choose(self, graph: str, refused: Mapping[Place, str]) -> list[Timed]:
        """For each batch the best of those that were not refused: see `choose`."""
        return choose(graph, [row for row in self.timed[graph] if _why_not(graph, row.candidate, refused) is None])

    def _chosen(self, refused: Mapping[Place, str]) -> dict[str, list[Timed]]:
        """What was chosen for each graph. A fused graph is in the precisions of its parts, or left out."""
        chosen = {graph: self._choose(graph, refused) for graph in GRAPHS}
        kinds = {graph: rows[0].candidate.precisions[graph] for graph, rows in chosen.items()}
        for graph in [name for name in self.timed if name not in GRAPHS]:
            left = [
                row
                for row in self.timed[graph]
                if _why_not(graph, row.candidate, refused) is None
                and all(row.candidate.precisions[part] == kinds[part] for part in parts_of(graph))
            ]
            if left:
                chosen[graph] = choose(graph, left)
        return chosen

    def _refuse(self, measured: Certificate, chosen: Mapping[str, list[Timed]], refused: dict[Place, str]) -> None:
        """Take out what was chosen for the graph that is out of its budget.

        Where that may be encoder or decoder, it is what is the least precise, or, in one precision, the most changed.
        A fused graph is out for all forms of a runner's precision at once: it is a convenience.

        Raises:
            VerificationError: a graph would have no candidate left.
        """
        failed = measured.nearest
        blamed = {verifier.PICTURE: "generate"}.get(failed.id, failed.graph)
        if blamed == "end to end":
            blamed = "score" if failed.id.startswith("elbo.") else "reconstruct"
        places = [(graph, row.candidate) for graph, rows in chosen.items() for row in rows if graph == blamed] or [
            (graph, row.candidate) for graph in GRAPHS for row in chosen[graph]
        ]
        graph, worst = max(places, key=lambda place: (_RANK[place[1].precisions[place[0]]], len(place[1].forms)))
        alike = [worst]
        if graph not in GRAPHS:
            kind = (worst.runner, worst.precision)
            alike += [t.candidate for t in self.timed[graph] if (t.candidate.runner, t.candidate.precision) == kind]
        refused |= {(graph, id(candidate)): f"refused: {failed}" for candidate in alike}
        if not all(self._left(graph, refused) for graph in GRAPHS):
            measured.require()

    def _take_back_exact(self, chosen: Mapping[str, list[Timed]]) -> bool:
        """Compile for no shape of its own what computes something else there: the certificate may have other shapes.

        What is allowed is what rounding explains: another order of sums.

        Returns:
            Whether there was any.
        """
        found = False
        for graph, rows in chosen.items():
            allowed = output_tolerance(graph, self.reference.groups(self.model)[0])
            for row in rows:
                place = (graph, id(row.candidate))
                if row.candidate.runner == "openvino" and place not in self._inexact:
                    if (*place, row.batch) not in self._compared:
                        self._compared[*place, row.batch] = self._apart(graph, row)
                    apart = self._compared[*place, row.batch]
                    if not apart <= allowed:  # what is not a number is none that agrees
                        found = True
                        self._inexact.add(place)
                        kind = row.candidate.precisions[graph]
                        self.absent.append(
                            f"the {graph} in {kind}, compiled for batch {row.batch}, differs from itself by "
                            f"{apart:.3g} of the largest, allowed {allowed:.3g}: it is compiled for all shapes only"
                        )
        return found

    def _beside_float32(
        self, measured: Certificate, chosen: Mapping[str, list[Timed]], refused: Mapping[Place, str]
    ) -> bool:
        """Time float32, too, where what was asked for loses more than half precision may: it has to be faster then.

        Returns:
            Whether there was anything to time: the choice is another then.

        Raises:
            VerificationError: nothing is left in the precision that was asked for.
        """
        kinds = {graph: chosen[graph][0].candidate.precisions[graph] for graph in GRAPHS}
        found = False
        for graph, kind in kinds.items():
            known = {row.candidate.precisions[graph] for row in self.timed[graph]}
            lost = None if "fp32" in known else beyond_half(measured.checks, graph)
            if lost is None:
                continue
            found = True
            self.progress(f"measuring the {graph} beside float32")
            full = [candidate for runner in self.runners for candidate in self._forms(runner, "fp32")]
            low = {id(row.candidate): row.candidate for row in self.timed[graph]}.values()
            self.timed[graph] = self._time(graph, [*full, *low])
            holding = [row for row in self.timed[graph] if _why_not(graph, row.candidate, refused) is None]
            if reason := no_gain(graph, holding, kind):
                self.absent.append(f"the {graph} in {kind} loses more than half precision may: {lost}; and {reason}")
                kinds[graph] = "fp32"
        if found and set(kinds.values()) == {"fp32"}:
            raise _NoGainError(
                f"build: {self.options.precision} is not worth what it loses of {self.name}: {'; '.join(self.absent)}. "
                "Build with --precision fp32 or auto"
            )
        return found

    def _apart(self, graph: str, row: Timed) -> float:
        """How far a graph that is compiled for one shape is from itself compiled for all, as a share of the largest."""
        inputs, outputs = self._inputs(graph, row.batch), tuple(t.name for t in self.model.signature(graph)[1])
        found = []
        for exact in ((), (self._shape(row.batch),)):
            way = row.candidate.way(graph, row.threads, exact=exact)
            backend = CpuBackend({graph: [way]}, self.model, Settings())
            found.append(backend.run(graph, inputs, outputs, row.batch))
            backend.close()
        shares = []
        for one, other in zip(*found, strict=True):
            step = 1.0 if one.dtype == np.uint8 else 0.0  # what lies between two levels may be rounded to either
            apart = np.abs(one.astype(np.float64) - other).max() - step
            shares.append(float(max(apart, 0.0) / max(np.abs(one.astype(np.float64)).max(), 1e-30)))
        return float(np.max(shares))  # not a number if one of them is none

    def _left(self, graph: str, refused: Mapping[Place, str]) -> bool:
        """Whether a graph has a candidate that was not refused."""
        return any(_why_not(graph, row.candidate, refused) is None for row in self.timed[graph])

    def _ways(self, graph: str, rows: Sequence[Timed]) -> list[PlannedGraph]:
        """Neighbours that run the same way are one; the last is for all larger batches."""
        merged: list[PlannedGraph] = []
        for row in rows:
            whole = row.candidate.runner != "openvino" or (graph, id(row.candidate)) in self._inexact
            exact = () if whole else (self._shape(row.batch),)
            way = row.candidate.way(graph, row.threads, row.batch, exact)
            if merged and _planned(merged[-1], max_batch=row.batch, exact=exact) == way:
                way = _planned(way, exact=(*merged.pop().plan.exact, *exact))
            merged.append(way)
        return [*merged[:-1], _planned(merged[-1], max_batch=None)]

    def _requires(self, way: PlannedGraph) -> tuple[str, ...]:
        """See `ExecutionPlan.requires`."""
        if way.plan.precision == "int8" and self.bits == 8:
            return ("vnni",)
        return ("bf16",) if way.plan.precision == "bf16" else ()

    def _fusions(self, chosen: Mapping[str, list[Timed]]) -> dict[str, str]:
        """The fused graphs that do not beat their parts, and by how much they lose."""
        ways = {graph: self._ways(graph, rows) for graph, rows in chosen.items()}
        dropped = {}
        backend = CpuBackend(ways, self.model, Settings())
        parts = CpuBackend({graph: ways[graph] for graph in GRAPHS}, self.model, Settings())
        try:
            for graph in ways.keys() - set(GRAPHS):
                self.progress(f"measuring the {graph} against its parts")
                ratios = [self._against_parts(graph, row.batch, backend, parts) for row in chosen[graph]]
                ratio = math.exp(sum(map(math.log, ratios)) / len(ratios))
                if ratio > WORTH:
                    dropped[graph] = f"its parts are {ratio:.2f} times as fast"
        finally:
            backend.close()
            parts.close()
        return dropped

    def _against_parts(self, graph: str, batch: int, fused: Backend, parts: Backend) -> float:
        x = self._inputs("encoder", batch)["x"]
        seed = 0 if self.model.posterior.kind == "diagonal_gaussian" else None

        def call(backend: Backend) -> timing.Call:
            vae = VAE(self.model, backend, micro_batch=batch)
            verbs: dict[str, timing.Call] = {
                "score": lambda: vae.elbo(x),
                "reconstruct": lambda: vae.reconstruct(x, seed),
                "generate": lambda: vae.generate(batch, size=self.sizes or None),
            }
            return verbs[graph]

        calls = {"fused": call(fused), "parts": call(parts)}
        for each in calls.values():
            each()
        times = timing.measure(calls, self.seconds, _TURNS)
        return times["fused"].median / times["parts"].median

    def _records(
        self, chosen: Mapping[str, list[Timed]], refused: Mapping[Place, str], dropped: Mapping[str, str]
    ) -> Iterator[Measurement]:
        for graph, rows in self.timed.items():
            for row in rows:
                candidate = row.candidate
                verdict = _why_not(graph, candidate, refused) or self._slow(graph, candidate, chosen) or row.verdict
                if any(row is one for one in chosen.get(graph, ())):
                    verdict = dropped.get(graph, "chosen")
                yield Measurement(
                    graph=graph,
                    batch=row.batch,
                    runner=candidate.runner,
                    precision=candidate.precisions[graph],
                    passes=tuple(name for name, count in candidate.changed[graph].items() if count),
                    threads=row.threads,
                    median_us=round(row.times.median * 1e6, 1) if row.times else None,
                    spread=round(row.times.spread, 3) if row.times else None,
                    verdict=verdict,
                )

    def _slow(self, graph: str, candidate: Candidate, chosen: Mapping[str, list[Timed]]) -> str | None:
        """That float32 stays though a lower precision holds; or, for a fused graph, that its parts are in others."""
        for part in parts_of(graph):
            kind = chosen[part][0].candidate.precisions[part]
            if candidate.precisions[part] == kind:
                continue
            if graph != part:
                return f"the {part} is in {kind}"
            if kind == "fp32":
                return no_gain(graph, self.timed[graph], candidate.precisions[graph])
        return None

    def _variants(self, ways: Mapping[str, Sequence[PlannedGraph]]) -> dict[str, list[tuple[ExecutionPlan, bytes]]]:
        """For the record: files are named after what is in them, and made once."""
        found: dict[str, list[tuple[ExecutionPlan, bytes]]] = {}
        for graph, used in ways.items():
            files: dict[bytes, str] = {}
            found[graph] = []
            for way in used:
                if way.graph not in files:
                    files[way.graph] = f"{graph}.onnx" if not files else f"{graph}.{len(files)}.onnx"
                named = _planned(way, file=files[way.graph], requires=self._requires(way))
                found[graph].append((named.plan, way.graph))
        return found


def _planned(way: PlannedGraph, **changes: Any) -> PlannedGraph:
    """The same graph with another plan."""
    return dataclasses.replace(way, plan=msgspec.structs.replace(way.plan, **changes))


def choose(graph: str, rows: Sequence[Timed]) -> list[Timed]:
    """For each batch the fastest; within the noise, the one that comes first.

    All batches are in one precision, that which is fastest over all of them: how large a batch is must not decide how
    exact a result is. One that is lower than float32 is chosen only where `no_gain` has nothing against it.

    Args:
        graph: its name.
        rows: what was measured, and not refused; the most exact first.
    """
    by_batch = _by_batch(rows)

    def cost(kind: Precision) -> float:
        total = 0.0
        for here in by_batch.values():
            fastest = _fastest(here)
            same = _fastest([row for row in here if row.candidate.precisions[graph] == kind])
            total += math.log(_median(same) if same else _HOPELESS * (_median(fastest) if fastest else 1.0))
        return total

    kinds = dict.fromkeys(row.candidate.precisions[graph] for row in rows)
    kind = min((kind for kind in kinds if no_gain(graph, rows, kind) is None), key=cost)
    chosen = []
    for here in by_batch.values():
        same = [row for row in here if row.candidate.precisions[graph] == kind]
        fastest = _fastest(same)
        if fastest is None:  # those that were fast are out: whatever was not refused will do
            chosen.append(same[0])
            continue
        assert fastest.times is not None
        limit = _median(fastest) * (1 + min(_MOST_NOISE, max(_NOISE, fastest.times.spread / 2)))
        chosen.append(next(row for row in same if row.times and _median(row) <= limit))
    return chosen


def no_gain(graph: str, rows: Sequence[Timed], kind: Precision) -> str | None:
    """Why a precision is not worth what it loses: it is no faster than float32, beyond what the turns differ.

    Args:
        graph: its name.
        rows: what was measured.
        kind: the precision.

    Returns:
        None where it is faster, is float32 itself, or was not measured beside it.
    """
    gains, noise_levels = [], []
    for here in _by_batch(rows).values():
        full = _fastest([row for row in here if row.candidate.precisions[graph] == "fp32"])
        low = _fastest([row for row in here if row.candidate.precisions[graph] == kind])
        if full is None:
            continue
        if low is None:  # it was too slow to be timed
            gains.append(math.log(1 / _HOPELESS))
            noise_levels.append(_GAIN)
            continue
        gains.append(math.log(_median(full) / _median(low)))
        noise_levels.append(max(_GAIN, *(row.times.spread / 2 for row in (full, low) if row.times)))
    if kind == "fp32" or not gains:
        return None
    gain, least = math.exp(sum(gains) / len(gains)), 1 + sum(noise_levels) / len(noise_levels)
    if gain > least:
        return None
    return f"it is {gain:.2f} times as fast as float32, and more than {least:.2f} is what counts: float32 stays"


def _by_batch(rows: Sequence[Timed]) -> dict[int, list[Timed]]:
    found: dict[int, list[Timed]] = {}
    for row in rows:
        found.setdefault(row.batch, []).append(row)
    return found


def _fastest(rows: Sequence[Timed]) -> Timed | None:
    return min((row for row in rows if row.times), key=_median, default=None)


def _why_not(graph: str, candidate: Candidate, refused: Mapping[Place, str]) -> str | None:
    """Why a candidate is out for a graph: by itself, or because a graph is that this one has in it."""
    places = [(name, id(candidate)) for name in (graph, *parts_of(graph))]
    return next((refused[place] for place in places if place in refused), None)


def _within(check: Check, share: float) -> bool:
    """Whether a check uses no more than a share of its tolerance. Not-a-number never does.

    Of a ratio in decibels, which must be at least so large, half the tolerance is 6 dB more.
    """
    if check.tolerance is None:
        return True
    if check.at_least:
        return check.measured >= check.tolerance - 20 * math.log10(share)
    return check.measured <= share * check.tolerance


def _median(row: Timed) -> float:
    assert row.times is not None
    return row.times.median


def _line(error: Exception) -> str:
    """A message in one line, for a record."""
    return " ".join(str(error).split())
