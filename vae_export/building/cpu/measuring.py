"""Time candidates in turns, and compare what they compute."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from vae_export import timing
from vae_export.building.contents import Contents
from vae_export.building.cpu import SearchSettings
from vae_export.building.cpu.candidates import Candidate
from vae_export.building.cpu.choosing import Timing
from vae_export.certification.golden import stretched
from vae_export.contract.build_record import ExecutionPlan
from vae_export.contract.model import parts_of
from vae_export.numerics import noise
from vae_export.runtimes import VAE, Backend, Settings
from vae_export.runtimes.backend import Array, PlannedGraph
from vae_export.runtimes.cpu.dispatch import CpuBackend

#: The least number of turns; and of first calls, all of which must be slow for a candidate not to be timed.
_MIN_TURNS, _TRIALS = 3, 3
#: Candidates that take at most this share longer than the fastest are timed once more, for twice as long.
_CLOSE = 0.15
#: Where a call takes less, in seconds, one thread may be faster than several, which have to wait for each other.
_SHORT_CALL = 2e-3


@dataclass(frozen=True)
class Measuring:
    """Runs a bundle's graphs on its own data.

    Attributes:
        contents: the bundle.
        batches: batch sizes to measure at, rising.
        sizes: of the data's named dimensions, to measure at.
        settings: how long, and what is too slow.
    """

    contents: Contents
    batches: Sequence[int]
    sizes: Mapping[str, int]
    settings: SearchSettings

    def shape(self, batch: int) -> dict[str, int]:
        """See `ExecutionPlan.exact`."""
        return {"batch": batch, **self.sizes}

    def inputs(self, graph: str, batch: int) -> dict[str, Array]:
        """The inputs of a graph for a batch: real data, and noise, at the sizes to measure at."""
        model, reference = self.contents.model, self.contents.reference
        inputs = {}
        for tensor in model.signature(graph)[0]:
            shape = model.tensor_shape(tensor, batch, self.sizes)
            if tensor.name == "x":
                rows = reference.tensors["x"][reference.record.extremes :]
                inputs["x"] = stretched(rows[np.arange(batch) % len(rows)], shape[1:])
            else:
                inputs[tensor.name] = noise.normals(0, noise.PRIOR, 0, batch, math.prod(shape[1:])).reshape(shape)
        return inputs

    def rows(
        self, graph: str, candidates: Mapping[int, Candidate], batch: int, threads: int | None = None
    ) -> Iterator[Timing]:
        """Rows without times, one of each candidate."""
        for number, candidate in candidates.items():
            parts = {part: candidate.graphs[part].plan.precision for part in parts_of(graph)}
            plan = msgspec.structs.replace(candidate.graphs[graph].plan, threads=threads)
            yield Timing(graph, batch, number, plan, parts, len(candidate.forms))

    def time(self, graph: str, candidates: Mapping[int, Candidate]) -> list[Timing]:
        """Time candidates, by their numbers, at every batch size, each in turns with all others.

        Batch sizes whose calls would take longer than `SearchSettings.max_call_seconds` have no rows.
        """
        opened: dict[str, Backend] = {}
        rows: list[Timing] = []
        try:
            for batch, larger in itertools.zip_longest(self.batches, self.batches[1:]):
                rows += self._time_batch(graph, candidates, batch, opened)
                fastest = min(row.median for row in rows if row.batch == batch)
                if larger and fastest / batch * larger > self.settings.max_call_seconds:
                    break
        finally:
            for backend in opened.values():
                backend.close()
        return rows

    def _time_batch(
        self, graph: str, candidates: Mapping[int, Candidate], batch: int, opened: dict[str, Backend]
    ) -> list[Timing]:
        inputs = self.inputs(graph, batch)
        outputs = ("sample",) if graph == "decoder" else tuple(t.name for t in self.contents.model.signature(graph)[1])
        exact = tuple(map(self.shape, self.batches))
        started: dict[str, Timing] = {}

        def start(threads: int | None) -> dict[str, timing.Call]:
            calls: dict[str, timing.Call] = {}
            for row in self.rows(graph, candidates, batch, threads):
                name = f"{row.candidate}: {row.plan}"
                if name not in opened:
                    plan = msgspec.structs.replace(row.plan, exact=exact)
                    opened[name] = self._open(graph, candidates[row.candidate].graphs[graph], plan)
                calls[name] = functools.partial(opened[name].run, graph, inputs, outputs, batch)
                started[name] = row
                calls[name]()
            return calls

        return [
            dataclasses.replace(started[name], reason=times)
            if isinstance(times, str)
            else dataclasses.replace(started[name], median=times.median, spread=times.spread)
            for name, times in time_calls(start, self.settings).items()
        ]

    def shape_difference(self, graph: str, candidate: PlannedGraph, batch: int) -> float:
        """`max_difference` between a graph's results compiled for all shapes and compiled for one shape."""
        inputs, outputs = self.inputs(graph, batch), [t.name for t in self.contents.model.signature(graph)[1]]
        results = []
        for exact in ((), (self.shape(batch),)):
            backend = self._open(graph, candidate, msgspec.structs.replace(candidate.plan, exact=exact))
            results.append(backend.run(graph, inputs, outputs, batch))
            backend.close()
        return max_difference(*results)

    def fused_ratio(self, graph: str, batches: Sequence[int], fused: Backend, parts: Backend) -> float:
        """How many times as long as its parts, on a backend without it, a fused graph takes: the geometric mean."""
        logs = []
        for batch in batches:
            calls = {"fused": self._verb(graph, fused, batch), "parts": self._verb(graph, parts, batch)}
            for call in calls.values():
                call()
            times = timing.measure(calls, self.settings.seconds, _MIN_TURNS)
            logs.append(math.log(times["fused"].median / times["parts"].median))
        return math.exp(sum(logs) / len(logs))

    def _verb(self, graph: str, backend: Backend, batch: int) -> timing.Call:
        """The call that runs a fused graph, or, on a backend without it, its parts."""
        vae = VAE(self.contents.model, backend, micro_batch=batch)
        if graph == "generate":
            return functools.partial(vae.generate, batch, size=self.sizes or None)
        x = self.inputs("encoder", batch)["x"]
        if graph == "score":
            return functools.partial(vae.elbo, x)
        seed = 0 if self.contents.model.posterior.kind == "diagonal_gaussian" else None
        return functools.partial(vae.reconstruct, x, seed)

    def _open(self, graph: str, candidate: PlannedGraph, plan: ExecutionPlan) -> CpuBackend:
        return CpuBackend({graph: [dataclasses.replace(candidate, plan=plan)]}, self.contents.model, Settings())


def time_calls(
    start: Callable[[int | None], Mapping[str, timing.Call]], settings: SearchSettings
) -> dict[str, timing.Times | str]:
    """Time calls in turns, close ones once more, and slow ones only a few times: one slow call is chance.

    Args:
        start: returns calls by name, each of which ran once, with so many threads; None is the runner's choice.
        settings: for how long, and what is slow.

    Returns:
        For each call its times, or, in words, why it was not timed.
    """
    calls = dict(start(None))
    first = _shortest_trial(calls)
    if min(first.values()) < _SHORT_CALL:
        single = dict(start(1))
        calls, first = calls | single, first | _shortest_trial(single)
    fastest = min(first.values())
    kept = {name: call for name, call in calls.items() if first[name] <= settings.max_slowdown * fastest}
    times = timing.measure(kept, settings.seconds, _MIN_TURNS)
    limit = (1 + _CLOSE) * min(each.median for each in times.values())
    close = {name: call for name, call in kept.items() if times[name].median <= limit}
    if len(close) > 1:
        times |= timing.measure(close, 2 * settings.seconds, _MIN_TURNS)
    slow = "its first {} calls took {:.1f} times as long as the fastest candidate's"
    return {name: times.get(name) or slow.format(_TRIALS, first[name] / fastest) for name in calls}


def _shortest_trial(calls: Mapping[str, timing.Call]) -> dict[str, float]:
    trials = [{name: timing.once(call) for name, call in calls.items()} for _ in range(_TRIALS)]
    return {name: min(trial[name] for trial in trials) for name in calls}


def max_difference(expected: Sequence[npt.NDArray[Any]], results: Sequence[npt.NDArray[Any]]) -> float:
    """The largest difference between outputs, relative to max|output| of each; NaN if any of them is NaN.

    Of integers, one level is no difference: a value between two levels may be rounded to either.
    """
    shares = []
    for one, other in zip(expected, results, strict=True):
        step = 1.0 if one.dtype == np.uint8 else 0.0
        difference = np.abs(one.astype(np.float64) - other).max() - step
        shares.append(float(max(difference, 0.0) / max(np.abs(one.astype(np.float64)).max(), 1e-30)))
    return float(np.max(shares))
