"""What can be tried on this processor: runners × forms of the graphs × precisions, and why something cannot.

The reasons are the build's `absent`: a package is missing, the processor lacks a precision, or a graph in reduced
precision exceeds a tolerance (`building.evaluation`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vae_export import graph as graphs
from vae_export.building import contents
from vae_export.building.contents import Contents
from vae_export.building.cpu import SearchSettings
from vae_export.building.evaluation import Evaluator, one_line
from vae_export.building.mixed_precision import ReducedPrecision
from vae_export.contract.build_record import ExecutionPlan, Options
from vae_export.contract.choices import Precision
from vae_export.contract.model import GRAPHS, parts_of
from vae_export.contract.targets import Runner
from vae_export.errors import BackendError, VerificationError
from vae_export.graph import quantize, rewrites
from vae_export.progress import Progress
from vae_export.runtimes import processor
from vae_export.runtimes.backend import PlannedGraph
from vae_export.runtimes.cpu import openvino

#: No smaller share of its tolerance is tried for a graph of which nodes can be kept in float32.
MIN_SHARE = 0.1
#: The forms to try, for each runner. Of equally fast ones the first is chosen: the one with the fewest multiplications.
FORMS: Mapping[Runner, tuple[tuple[str, ...], ...]] = {
    "onnxruntime": (("upsampling", "phases", "winograd"), ("upsampling", "phases"), ()),
    "openvino": (
        ("upsampling", "channel_norm", "winograd"),
        ("upsampling", "channel_norm"),
        ("channel_norm",),
        (),
    ),
}


@dataclass(frozen=True)
class Candidate:
    """A way to run all graphs.

    Attributes:
        forms: those of `rewrites.FORMS` that were applied.
        graphs: encoder, decoder, and fused graphs once they are needed; each with the plan that runs it at every batch
            size, with as many threads as the runner takes.
    """

    forms: tuple[str, ...]
    graphs: Mapping[str, PlannedGraph]


class Candidates:
    """Makes candidates of a bundle.

    Attributes:
        runners: what runs graphs here, and the precisions that the processor has, in OpenVINO's words.
        evaluator: measures what graphs in reduced precision lose.
        notes: what is missing on this machine, or disturbs.
        absent: what cannot be tried, and why.
        share: of its tolerance, that a graph in reduced precision may use.
    """

    def __init__(self, inputs: Contents, options: Options, settings: SearchSettings, progress: Progress) -> None:
        """Run the passes that always make graphs cheaper, and look for runners."""
        self.options, self._inputs, self._settings, self._progress = options, inputs, settings, progress
        self._allowed = rewrites.select("all") if options.passes is None else options.passes
        always = [name for name in self._allowed if name not in rewrites.FORMS]
        self._base, self._passes = inputs.simplified(always)
        self._processor = processor.processor()
        self._bits: quantize.Bits = 8 if "vnni" in processor.features() else 7
        self.runners: dict[Runner, frozenset[str]] = {}
        self.notes: list[str] = []
        for runner in settings.runners:
            try:
                self.runners[runner] = openvino.capabilities() if runner == "openvino" else frozenset()
            except BackendError as error:
                self.notes.append(one_line(error))
        auto = options.precision == "auto"
        self.evaluator = Evaluator(inputs, self._base, settings.rows, options.budget if auto else None, progress)
        self.evaluator.use_all_rows_if_quick()
        self.restart(settings.share if auto else 1.0)

    def restart(self, share: float) -> None:
        """Drop graphs in reduced precision and what was absent; later ones may use this share of their tolerance."""
        self.share = share
        self.absent: list[str] = []
        self._reduced: dict[Precision, dict[str, ReducedPrecision]] = {}

    def can_keep_more(self) -> bool:
        """Whether more nodes of graphs in reduced precision could be kept in float32."""
        return self.options.precision in ("fp16", "int8") and any(self._reduced.values()) and self.share > MIN_SHARE

    def all(self) -> list[Candidate]:
        """Every candidate, the most exact first.

        Raises:
            BackendError: no runner computes in the precision that was asked for on this processor.
            VerificationError: no graph passes in it.
        """
        wanted = self.options.precision
        possible = False
        candidates: list[Candidate] = []
        for precision in self._settings.precisions if wanted == "auto" else (wanted,):
            for runner in self.runners:
                if problem := self._cannot(runner, precision):
                    self.absent.append(problem)
                else:
                    possible = True
                    candidates += self.of(runner, precision)
        if candidates:
            return candidates
        reasons = f"{'; '.join([*self.notes, *self.absent])}. Build with --precision fp32 or auto"
        if possible:
            raise VerificationError(f"build: nothing of {self._inputs.name} passes in {wanted}: {reasons}")
        raise BackendError(f"build: nothing computes in {wanted} on this processor, {self._processor.model}: {reasons}")

    def of(self, runner: Runner, precision: Precision) -> Iterator[Candidate]:
        """The candidates of a runner and a precision. Forms that change nothing are left out."""
        reduced = self._in_precision(precision)
        if precision != "fp32" and not reduced:
            return
        known: list[list[bytes]] = []
        for forms in FORMS[runner]:
            if not set(forms) <= set(self._allowed):
                continue
            plans = {}
            for graph in GRAPHS:
                start = reduced.get(graph) or ReducedPrecision(self._base[graph], {})
                model = graphs.read(start.graph)
                passes = self._passes[graph] | rewrites.optimize(model, forms)
                kind: Precision = precision if graph in reduced else "fp32"
                plans[graph] = self._planned(graphs.write(model), runner, kind, passes, start.kept)
            if (written := [each.graph for each in plans.values()]) not in known:
                known.append(written)
                yield Candidate(forms, plans)

    def fused(self, candidate: Candidate) -> Candidate:
        """The candidate with fused graphs; not across two precisions of OpenVINO, which has one for a whole graph."""
        encoder, decoder = (candidate.graphs[graph] for graph in GRAPHS)
        kinds = {encoder.plan.precision, decoder.plan.precision}
        without = ("reconstruct", "score") if "bf16" in kinds and len(kinds) > 1 else ()
        plans = dict(candidate.graphs)
        for graph, content in contents.fused(encoder.graph, decoder.graph, self._inputs.model, without).items():
            inside = {part: candidate.graphs[part].plan for part in parts_of(graph)}
            passes = {name: sum(plan.passes.get(name, 0) for plan in inside.values()) for name in rewrites.PASSES}
            kept = {f"{part}.{node}": why for part, plan in inside.items() for node, why in plan.kept.items()}
            kind: Precision = next((plan.precision for plan in inside.values() if plan.precision != "fp32"), "fp32")
            plans[graph] = self._planned(content, encoder.plan.runner, kind, passes, kept)
        return dataclasses.replace(candidate, graphs=plans)

    def _planned(
        self, content: bytes, runner: Runner, precision: Precision, passes: Mapping[str, int], kept: dict[str, str]
    ) -> PlannedGraph:
        needed = {"bf16": ("bf16",), "int8": ("vnni",) if self._bits == 8 else ()}
        plan = ExecutionPlan(
            file="",
            runner=runner,
            precision=precision,
            passes={name: count for name, count in passes.items() if count},
            kept=kept,
            requires=needed.get(precision, ()),
        )
        return PlannedGraph(content, plan)

    def _cannot(self, runner: Runner, precision: Precision) -> str | None:
        """Why a runner does not compute in a precision here, or None."""
        if precision == "bf16" and runner == "onnxruntime":
            return "ONNX Runtime has no bf16 convolutions on the CPU"
        if precision == "bf16" and "BF16" not in self.runners[runner]:
            return f"{self._processor.model} has no bfloat16"
        if precision == "fp16" and runner == "openvino":
            return "OpenVINO computes a graph in float16 as one in float32"
        return None

    def _in_precision(self, precision: Precision) -> dict[str, ReducedPrecision]:
        """Those of encoder and decoder that pass, evaluated on the last runner that computes in this precision."""
        if precision == "fp32":
            return {}
        if precision not in self._reduced:
            self.evaluator.tail(choosing=True)
            runner = [runner for runner in self.runners if not self._cannot(runner, precision)][-1]
            share = 1.0 if precision == "bf16" else self.share  # OpenVINO keeps no node of a bf16 graph in float32
            self._reduced[precision], absent = self.evaluator.reduce(precision, runner, share, self._bits)
            self.absent += absent
        return self._reduced[precision]
