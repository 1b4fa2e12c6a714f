"""The CPU: each graph on the runner that is fastest for a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vae_export.contract.model import Model
from vae_export.errors import BackendError, VaeExportError
from vae_export.numerics.noise import Normals
from vae_export.runtimes.backend import PlannedGraph, Settings, Value, slices
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
        the graph gives others, these are returned as they are, for whoever asked to refuse, or it is an error.
        """
        ...

    def release_memory(self) -> None:
        """Give back what is kept for later calls and is not used by a call now."""
        ...


class CpuBackend:
    """For each graph one session or several, by the size of the batch."""

    on_gpu = False

    def __init__(self, ways: Mapping[str, Sequence[PlannedGraph]], model: Model, settings: Settings) -> None:
        """Open graphs.

        Args:
            ways: for each graph how it runs, by rising `max_batch`, of which the last is None.
            model: what they take and give.
            settings: threads, which go before those of a way. Without them there are as many as this process may
                use: see `threads.cores`.

        Raises:
            BackendError: a runner is not available, or does not compute on this processor what it is asked for.
            BundleError: a runner does not accept a graph, or finds another than the model has.
        """
        self.graphs = frozenset(ways)
        self._model = model
        self._said = {name: [str(way.plan) for way in chosen] for name, chosen in ways.items()}  # not their bytes
        allowed, counted = cores(), set[int]()
        opened: dict[tuple[Any, ...], Session] = {}
        self._sessions: dict[str, tuple[tuple[int | None, Session], ...]] = {}
        for name, chosen in ways.items():
            rows = []
            for way in chosen:
                threads = settings.threads or min(way.plan.threads or allowed, allowed)
                counted.add(threads)
                key = (name, id(way.graph), way.plan.runner, way.plan.precision, threads, str(way.plan.exact))
                if key not in opened:
                    opened[key] = _open(name, way, model, threads)
                rows.append((way.plan.max_batch, opened[key]))
            self._sessions[name] = tuple(rows)
        self._threads = max(counted)

    def run(
        self,
        graph: str,
        inputs: Mapping[str, Value],
        outputs: Sequence[str],
        micro_batch: int,
        *,
        on_device: bool = False,
        out: Sequence[Any] | None = None,
    ) -> list[Any]:
        """See `Backend.run`."""
        first = next(iter(inputs.values()))
        n = len(first)
        if n > micro_batch:
            return self._sliced(graph, inputs, outputs, micro_batch, out)
        if len(inputs) > 1 or type(first) is Normals:
            inputs = {name: value.numpy() if type(value) is Normals else value for name, value in inputs.items()}
        for max_batch, session in self._sessions.get(graph, ()):
            if max_batch is None or n <= max_batch:
                try:
                    return session.run(outputs, inputs, out)
                except VaeExportError:
                    raise
                except Exception as error:  # the runners' exceptions have no common base
                    sizes = self._model.input_sizes(graph, tuple(first.shape[1:]))
                    raise failure(graph, f"{session.runner} {session.version}", n, sizes, error) from error
        raise BackendError("this VAE was closed; load the bundle again")

    def _sliced(
        self,
        graph: str,
        inputs: Mapping[str, Value],
        outputs: Sequence[str],
        micro_batch: int,
        out: Sequence[Any] | None,
    ) -> list[Any]:
        """Slice by slice, each written where it belongs in the whole."""
        n = len(next(iter(inputs.values())))
        results = None if out is None else list(out)
        for rows in slices(n, micro_batch):
            part = {name: value[rows] for name, value in inputs.items()}
            if results is not None:
                targets = [result[rows] for result in results]
                found = self.run(graph, part, outputs, micro_batch, out=targets)
                if found[0].shape != targets[0].shape:
                    return found
                continue
            first = self.run(graph, part, outputs, micro_batch)  # it tells the shapes
            results = [np.empty((n, *value.shape[1:]), value.dtype) for value in first]
            for result, value in zip(results, first, strict=True):
                result[rows] = value
        assert results is not None
        return results

    def warm(self, graph: str, inputs: Mapping[str, Value], outputs: Sequence[str], micro_batch: int) -> None:
        """See `Backend.warm`."""
        self.run(graph, inputs, outputs, micro_batch)

    def draw(self, mean: Value, logvar: Value, eps: Normals) -> Any:
        """See `Backend.draw`: there is no GPU here."""
        raise AssertionError("arrays on the GPU are refused before")

    def describe(self) -> dict[str, Any]:
        """What the graphs run on; where they do not all run the same way, `graphs` says how each does."""
        sessions = {s.runner: s.version for rows in self._sessions.values() for _, s in rows}
        facts: dict[str, Any] = {
            "backend": ", ".join(sessions),
            "version": ", ".join(sessions.values()),
            "device": "cpu",
            "provider": ", ".join(_PROVIDERS[runner] for runner in sessions),
            "threads": self._threads,
        }
        if len({tuple(said) for said in self._said.values()}) > 1 or any(len(said) > 1 for said in self._said.values()):
            facts["graphs"] = self._said
        return facts

    def release_memory(self) -> None:
        """See `Backend.release_memory`."""
        for session in {id(one): one for rows in self._sessions.values() for _, one in rows}.values():
            session.release_memory()
        trim()

    def close(self) -> None:
        """Drop the sessions, which gives back what they kept."""
        self._sessions = {}
        trim()


_PROVIDERS = {"onnxruntime": "CPUExecutionProvider", "openvino": "CPU"}


def _open(name: str, way: PlannedGraph, model: Model, threads: int) -> Session:
    if way.plan.runner == "openvino":
        from vae_export.runtimes.cpu.openvino import OpenVinoSession

        return OpenVinoSession(name, way.graph, model, way.plan.precision, threads, way.plan.exact)
    from vae_export.runtimes.cpu.ort import OrtSession

    return OrtSession(name, way.graph, model, way.arrays, threads)
