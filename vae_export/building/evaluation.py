"""Evaluate graphs in reduced precision on this machine's CPU, against the tolerances of their precision.

Where a build says that a graph stays in float32, or that nothing passes in a precision, the reason comes from
`Evaluator.problem`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vae_export.building import mixed_precision
from vae_export.building.contents import Contents
from vae_export.building.mixed_precision import Activation, LargeInputs, ReducedPrecision
from vae_export.certification import tail, verifier
from vae_export.certification.certificate import Certificate, Check
from vae_export.certification.golden import Reference
from vae_export.certification.tail import Tail
from vae_export.contract import build_record
from vae_export.contract.choices import Precision
from vae_export.contract.model import GRAPHS
from vae_export.contract.targets import Runner
from vae_export.errors import VaeExportError
from vae_export.progress import Progress
from vae_export.runtimes import Backend, Settings, processor
from vae_export.runtimes.backend import PlannedGraph, planned
from vae_export.runtimes.cpu.dispatch import CpuBackend

if TYPE_CHECKING:
    from vae_export.graph.quantize import Bits

#: Graphs by name, and for each how it runs, by rising batch size.
Plans = Mapping[str, Sequence[PlannedGraph]]
#: The batch size of quick evaluations; and how long float32 may take, in seconds, for all golden examples to be used.
_BATCH, _QUICK_SECONDS = 8, 0.5


class Evaluator:
    """Measures what graphs lose of a bundle.

    Half precision on ONNX Runtime is evaluated with every value rounded, as hardware computes it: the kernels for the
    CPU leave roundings out.
    """

    def __init__(
        self, contents: Contents, base: Mapping[str, bytes], rows: int, budget: Precision | None, progress: Progress
    ) -> None:
        """Evaluate graphs of a bundle; `base` has its encoder and decoder in float32, after graph passes.

        `problem` uses so many golden rows. With a budget, the tolerances are no looser than those of that precision.
        """
        self._contents, self._base, self._budget, self._progress = contents, base, budget, progress
        self._few = contents.reference.first(rows)
        self._tails: dict[bool, Tail | str] = {}

    def use_all_rows_if_quick(self) -> None:
        """Let `problem` use all golden examples where float32 takes little time."""
        began = time.perf_counter()
        self.problem("decoder", planned(self._base["decoder"]))
        if time.perf_counter() - began < _QUICK_SECONDS:
            self._few = self._contents.reference

    def problem(self, graph: str, reduced: PlannedGraph, share: float = 1.0) -> str | None:
        """Which tolerance is exceeded with one graph in reduced precision and the other in float32.

        It is measured on few golden examples; if these pass, on the rows that `tail` computed; and half precision at a
        large size, too, where the model takes one.

        Returns:
            The first check that uses more than this share of its tolerance, or why the graph does not run; None where
            all pass.
        """
        rounded, model = self._rounding(reduced), self._contents.model
        graphs = {other: [rounded if other == graph else planned(self._base[other])] for other in GRAPHS}
        try:
            with self._opened(graphs) as backend:
                failed = _first_beyond(self._measure(backend, graphs, self._few, (_BATCH,)).checks, share)
                golden, held_to = self._few.groups(model)[0], self._held_to(graphs)
                for rows in self._tails.values():
                    if failed is None and isinstance(rows, Tail):
                        failed = _first_beyond(verifier.tail_checks(model, backend, rows, held_to, golden), share)
            if failed is None and rounded is not reduced and self._large:
                return self._large.problem(graph, rounded.graph, model)
        except VaeExportError as error:
            return one_line(error)
        return failed

    def reduce(
        self, precision: Precision, runner: Runner = "onnxruntime", share: float = 1.0, bits: Bits = 8
    ) -> tuple[dict[str, ReducedPrecision], list[str]]:
        """Encoder and decoder with as few nodes in float32 as their tolerances need: see `problem`.

        OpenVINO itself rounds every node to bfloat16: such a graph passes as a whole or not at all.

        Returns:
            The graphs that pass; and of each other one why it stays in float32.
        """
        passing: dict[str, ReducedPrecision] = {}
        absent = []
        for graph, base in self._base.items():
            rounded = runner == "onnxruntime" and precision != "int8"
            self._progress(f"{precision}: the {graph}" + ", evaluated with every value rounded" * rounded)

            def problem(content: bytes, graph: str = graph) -> str | None:
                return self.problem(graph, planned(content, runner, precision), share)

            if precision == "bf16" and runner == "openvino":
                result = problem(base) or ReducedPrecision(base, {})
            else:
                seen = {} if precision == "bf16" else self.recorded[graph]  # bfloat16 has float32's range
                result = mixed_precision.choose(graph, base, precision, seen, problem, bits)
            if isinstance(result, ReducedPrecision):
                passing[graph] = result
            else:
                words = f", with weights of 7 bits, as this processor, {processor.processor().model}, has no VNNI"
                absent.append(f"the {graph} in {precision}{words * (bits == 7 and precision == 'int8')}: {result}")
        return passing, absent

    @functools.cached_property
    def recorded(self) -> dict[str, dict[str, Activation]]:
        """The activations of encoder and decoder: see `mixed_precision.record_both`."""
        inputs = self._contents
        return mixed_precision.record_both(self._base, inputs.model, inputs.reference, inputs.calibration)

    @property
    def calibrated(self) -> dict[str, int]:
        """How many rows of each kind activations were recorded on; none where they were not needed."""
        inputs, used = self._contents, "recorded" in vars(self)
        return mixed_precision.calibration_rows(inputs.model, inputs.reference, inputs.calibration)[1] if used else {}

    def certificate(self, graphs: Plans) -> Certificate:
        """The certificate of what runs; if that passes and float16 with every value rounded fails, of the latter."""
        reduced = any(each.plan.precision != "fp32" for plans in graphs.values() for each in plans)
        more, reference = self.tail() if reduced else None, self._contents.reference
        with self._opened(graphs) as backend:
            measured = self._measure(backend, graphs, reference, verifier.BATCHES, more)
        # By content: plans that share a graph share its session, too.
        contents = {each.graph: self._rounding(each).graph for plans in graphs.values() for each in plans}
        rounded = {g: [dataclasses.replace(p, graph=contents[p.graph]) for p in plans] for g, plans in graphs.items()}
        if measured.passed and rounded != graphs:
            self._progress("measuring float16 with every value rounded")
            with self._opened(rounded) as backend:
                judged = self._measure(backend, graphs, reference, verifier.BATCHES, more)
            return measured if judged.passed else judged
        return measured

    def tail(self, *, choosing: bool = False) -> Tail | str:
        """More rows for what is below float32, to choose by or to judge the choice; computed once. See `tail.make`."""
        if choosing not in self._tails:
            self._progress("running float32 on more rows")
            inputs = self._contents
            self._tails[choosing] = tail.make(
                *(inputs.graphs, {}, inputs.model, inputs.costs, inputs.reference, inputs.calibration),
                choosing=choosing,
            )
        return self._tails[choosing]

    def _measure(
        self,
        backend: Backend,
        graphs: Plans,
        reference: Reference,
        batches: Sequence[int],
        more: Tail | str | None = None,
    ) -> Certificate:
        model, name = self._contents.model, self._contents.name
        return verifier.measure(model, backend, reference, name, self._held_to(graphs), batches=batches, more=more)

    def _held_to(self, graphs: Plans) -> dict[str, str]:
        kinds = ((graph, each.plan.precision) for graph, plans in graphs.items() for each in plans)
        return build_record.held_to(kinds, self._budget)

    def _opened(self, graphs: Plans) -> contextlib.closing[CpuBackend]:
        return contextlib.closing(CpuBackend(graphs, self._contents.model, Settings()))

    def _rounding(self, reduced: PlannedGraph) -> PlannedGraph:
        """Half precision that ONNX Runtime runs, with every value rounded; all others as they are."""
        if reduced.plan.runner != "onnxruntime" or reduced.plan.precision not in ("fp16", "bf16"):
            return reduced
        return dataclasses.replace(reduced, graph=mixed_precision.rounding(reduced.graph))

    @functools.cached_property
    def _large(self) -> LargeInputs | None:
        return mixed_precision.large_inputs(self._base, self._contents.model, self._contents.reference)


def within(check: Check, share: float) -> bool:
    """Whether a check uses no more than a share of its tolerance. NaN never does.

    Of a ratio in decibels, which must be at least its tolerance, half the tolerance is 6 dB more.
    """
    if check.tolerance is None:
        return True
    if check.at_least:
        return check.measured >= check.tolerance - 20 * math.log10(share)
    return check.measured <= share * check.tolerance


def one_line(error: Exception) -> str:
    """The message of an error in one line, for a record."""
    return " ".join(str(error).split())


def _first_beyond(checks: Sequence[Check], share: float) -> str | None:
    failed = next((check for check in checks if not within(check, share)), None)
    return None if failed is None else f"{failed}" + f", of which this graph alone may use {share:g}" * failed.passed
