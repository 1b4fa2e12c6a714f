"""The CPU: each graph on the runner that is fastest for a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vae_export.contract.model import Model
from vae_export.errors import BackendError, BundleError, VaeExportError
from vae_export.numerics.noise import Normals
from vae_export.runtimes.backend import PlannedGraph, Settings, Value, result_shape, slices
from vae_export.runtimes.cpu.arena import trim
from vae_export.runtimes.failures import failure
from vae_export.runtimes.threads import cores


class Session(Protocol):
    """An opened graph. It may be run from many threads at once."""

    runner: str
    version: str

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any], out: Sequence[Any] | None = None) -> list[Any]:
        """Named inputs to named outputs, arrays of the host.

        With `out` the results are written into these arrays, which have the shapes that the manifest promises. Where
        the graph's have others, those results are returned instead, for the caller to refuse, or it is an error.
        """
        ...

    def release_memory(self) -> None:
        """Release the memory that is kept for later calls and that no call uses now."""
        ...


class CpuBackend:
    """For each graph one session or several, by the size of the batch."""

    on_gpu = False

    def __init__(self, plans: Mapping[str, Sequence[PlannedGraph]], model: Model, settings: Settings) -> None:
        """Open graphs, for each its plans by rising `max_batch`, of which the last is None.

        The threads of `settings` override those of a plan. Without either there are as many as this process may use:
        see `threads.cores`.

        Raises:
            BackendError: a runner is not available, or does not compute in a plan's precision on this processor.
            BundleError: a runner does not accept a graph, or the graph's inputs and outputs are not the model's.
        """
        self.graphs = frozenset(plans)
        self._model = model
        self._plans = {name: [one.plan for one in chosen] for name, chosen in plans.items()}  # not the graphs' bytes
        # The shape of a graph's results for one example, where it is the same in every call.
        self._shapes = {} if model.data.named() else {name: result_shape(model, name, {}) for name in plans}
        allowed, counted = cores(), set[int]()
        opened: dict[tuple[Any, ...], Session] = {}
        self._sessions: dict[str, tuple[tuple[int | None, Session], ...]] = {}
        for name, chosen in plans.items():
            rows = []
            for one in chosen:
                threads = settings.threads or min(one.plan.threads or allowed, allowed)
                counted.add(threads)
                key = (name, id(one.graph), one.plan.runner, one.plan.precision, threads, str(one.plan.exact))
                if key not in opened:
                    opened[key] = open_session(name, one, model, threads)
                rows.append((one.plan.max_batch, opened[key]))
            self._sessions[name] = tuple(rows)
        self._threads = max(counted)

    def run(
        self,
        graph: str,
        inputs: Mapping[str, Value],
        outputs: Sequence[str],
        micro_batch: int,
        *,
        out: Sequence[Any] | None = None,
    ) -> list[Any]:
        """See `Backend.run`."""
        first = next(iter(inputs.values()))
        n, example = first.shape[0], tuple(first.shape[1:])
        if n > micro_batch:
            return self._sliced(graph, inputs, outputs, micro_batch, out)
        if len(inputs) > 1 or type(first) is Normals:
            inputs = {name: value.numpy() if type(value) is Normals else value for name, value in inputs.items()}
        for max_batch, session in self._sessions.get(graph, ()):
            if max_batch is None or n <= max_batch:
                try:
                    results = session.run(outputs, inputs, out)
                except VaeExportError:
                    raise
                except Exception as error:  # the runners' exceptions have no common base
                    sizes = self._model.input_sizes(graph, example)
                    raise failure(graph, f"{session.runner} {session.version}", n, sizes, error) from error
                shape = (n, *self._result_shape(graph, example))
                for result in results:
                    if result.shape != shape:
                        raise BundleError(
                            f"the {graph} gave shape {result.shape}; the manifest promises {shape}. The bundle "
                            "contradicts itself: export the model again"
                        )
                return results
        raise BackendError("this VAE was closed; load the bundle again")

    def _sliced(
        self,
        graph: str,
        inputs: Mapping[str, Value],
        outputs: Sequence[str],
        micro_batch: int,
        out: Sequence[Any] | None,
    ) -> list[Any]:
        """Run slice by slice; each result is written to its rows of the whole."""
        n = len(next(iter(inputs.values())))
        for rows in slices(n, micro_batch):
            part = {name: value[rows] for name, value in inputs.items()}
            if out is not None:
                self.run(graph, part, outputs, micro_batch, out=[result[rows] for result in out])
                continue
            first = self.run(graph, part, outputs, micro_batch)  # its shapes are checked, those of `out` are trusted
            out = [np.empty((n, *value.shape[1:]), value.dtype) for value in first]
            for result, value in zip(out, first, strict=True):
                result[rows] = value
        assert out is not None
        return list(out)

    def _result_shape(self, graph: str, example: tuple[int, ...]) -> tuple[int, ...]:
        shape = self._shapes.get(graph)
        return result_shape(self._model, graph, self._model.input_sizes(graph, example)) if shape is None else shape

    def warm(self, graph: str, inputs: Mapping[str, Value], outputs: Sequence[str], micro_batch: int) -> None:
        """See `Backend.warm`."""
        self.run(graph, inputs, outputs, micro_batch)

    def describe(self) -> dict[str, Any]:
        """What the graphs run on; where they do not all run the same way, `graphs` has each graph's plans."""
        sessions = {s.runner: s.version for rows in self._sessions.values() for _, s in rows}
        facts: dict[str, Any] = {
            "backend": ", ".join(sessions),
            "version": ", ".join(sessions.values()),
            "device": "cpu",
            "provider": ", ".join(_PROVIDERS[runner] for runner in sessions),
            "threads": self._threads,
        }
        plans = {name: [str(plan) for plan in chosen] for name, chosen in self._plans.items()}
        if len({tuple(texts) for texts in plans.values()}) > 1 or any(len(texts) > 1 for texts in plans.values()):
            facts["graphs"] = plans
        return facts

    def release_memory(self) -> None:
        """See `Backend.release_memory`."""
        for session in {id(one): one for rows in self._sessions.values() for _, one in rows}.values():
            session.release_memory()
        trim()

    def close(self) -> None:
        """Drop the sessions, which releases their memory."""
        self._sessions = {}
        trim()


_PROVIDERS = {"onnxruntime": "CPUExecutionProvider", "openvino": "CPU"}


def open_session(name: str, one: PlannedGraph, model: Model, threads: int) -> Session:
    """Open a graph on the runner of its plan. Errors: as `CpuBackend`."""
    if one.plan.runner == "openvino":
        from vae_export.runtimes.cpu.openvino import OpenVinoSession

        return OpenVinoSession(name, one.graph, model, one.plan.precision, threads, one.plan.exact)
    from vae_export.runtimes.cpu.ort import OrtSession

    return OrtSession(name, one.graph, model, one.arrays, threads)
