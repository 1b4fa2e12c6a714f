"""ONNX Runtime on the CPU."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vae_export.contract.model import Model
from vae_export.contract.onnx_guard import Arrays
from vae_export.runtimes import forks
from vae_export.runtimes.cpu import arena
from vae_export.runtimes.interrupts import LongCalls, interruptible
from vae_export.runtimes.ort_session import open_session, runtime

# Binding memory takes some 10 µs, in which so many bytes can be copied.
_BOUND_BYTES = 64 << 10


class OrtSession:
    """A graph on the CPU. It may be run from many threads at once."""

    runner = "onnxruntime"

    def __init__(self, name: str, graph: bytes, model: Model, arrays: Arrays, threads: int | None) -> None:
        """Open a graph: serialized ONNX, verified; no path is ever opened. `arrays` are its weights beside it.

        Raises:
            BackendError: ONNX Runtime is not available.
            BundleError: ONNX Runtime does not accept the graph, or its inputs and outputs are not the model's.
        """
        ort = runtime("cpu")
        self.version = str(ort.__version__)
        self._arrays = arrays  # the session uses their memory
        self._name, self._model = name, model
        self._outputs = {tensor.name: tensor for tensor in model.signature(name)[1]}
        # For fixed sizes the session's own arena is as good, and a call takes 3 µs less. In a child that was forked
        # during a call the shared one may be locked for ever.
        shared = arena.shared(ort) if model.data.named() else None
        self._arena = shared if shared and shared.usable() else None
        with self._arena.used() if self._arena else contextlib.nullcontext():
            self._session = interruptible(
                functools.partial(open_session, ort, name, graph, model, "cpu", {}, arrays, threads, self._arena)
            )
        self._run = _shortest_run(self._session)
        self._options = ort.RunOptions
        self._long = LongCalls()
        self._running: list[None] = self._arena.running if self._arena else []  # one for each call under way
        self._forks = forks.count
        if self._arena:  # a session that is collected unclosed releases its memory, too
            weakref.finalize(self, self._arena.give_back).atexit = False

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any], out: Sequence[Any] | None = None) -> list[Any]:
        """See `dispatch.Session.run`."""
        if self._forks != forks.count:
            self._after_fork()
        nbytes = next(iter(inputs.values())).nbytes
        self._running.append(None)
        try:
            if nbytes <= self._long.fast_bytes:
                return self._run_once(outputs, inputs, out, None)
            options = self._options()

            def stop() -> None:
                options.terminate = True

            def work() -> list[Any]:
                return self._run_once(outputs, inputs, out, options)

            return self._long.run(nbytes, work, stop)
        finally:
            self._running.pop()

    def _after_fork(self) -> None:
        """Without its threads ONNX Runtime computes in the caller's; but a call under way may have held its locks."""
        if not self._arena.usable() if self._arena else self._running:
            raise forks.refusal("onnxruntime", "was computing at that moment, which nobody goes on with here")
        self._forks = forks.count

    def release_memory(self) -> None:
        """See `dispatch.Session.release_memory`. Without named sizes it takes a call of one example."""
        if self._arena:
            self._arena.give_back()
            return
        if self._forks != forks.count:
            self._after_fork()
        inputs = {
            t.name: np.zeros(self._model.tensor_shape(t, 1, {}), t.dtype) for t in self._model.signature(self._name)[0]
        }
        self._running.append(None)
        try:
            with contextlib.suppress(Exception):  # after a failure the memory stays
                self._run([*self._outputs], inputs, arena.shrinking(runtime("cpu")))
        finally:
            self._running.pop()

    def _run_once(
        self, outputs: Sequence[str], inputs: Mapping[str, Any], out: Sequence[Any] | None, options: Any
    ) -> list[Any]:
        if out is not None:
            return self._into(outputs, inputs, out, options)
        return self._run_outside(outputs, inputs, options) if self._arena else self._run(outputs, inputs, options)

    def _run_outside(self, outputs: Sequence[str], inputs: Mapping[str, Any], options: Any) -> list[Any]:
        """Run, the results outside of the arena, where each would keep a region for as long as it lives."""
        first = next(iter(inputs.values()))
        sizes = self._model.input_sizes(self._name, tuple(first.shape[1:]))
        return self._into(outputs, inputs, [self._empty(name, len(first), sizes) for name in outputs], options)

    def _empty(self, output: str, rows: int, sizes: Mapping[str, int]) -> Any:
        tensor = self._outputs[output]
        return np.empty(self._model.tensor_shape(tensor, rows, sizes), tensor.dtype)

    def _into(self, outputs: Sequence[str], inputs: Mapping[str, Any], out: Sequence[Any], options: Any) -> list[Any]:
        """Run, the results in these arrays: ONNX Runtime writes to large ones directly."""
        if sum(target.nbytes for target in out) >= _BOUND_BYTES:
            binding = self._session.io_binding()
            for name, value in inputs.items():
                binding.bind_cpu_input(name, value)
            for name, target in zip(outputs, out, strict=True):
                binding.bind_output(name, "cpu", 0, target.dtype.type, target.shape, target.ctypes.data)
            # Another shape is one reason to fail; for all others the run below fails, too, and says why.
            with contextlib.suppress(Exception):
                self._session.run_with_iobinding(binding, options)
                return list(out)
        results = self._run(outputs, inputs, options)
        if [value.shape for value in results] != [target.shape for target in out]:
            return results
        for target, value in zip(out, results, strict=True):
            target[...] = value
        return list(out)


def _shortest_run(session: Any) -> Callable[[Sequence[str], Mapping[str, Any], Any], list[Any]]:
    """A session's `run`: the C++ function beneath it, where this version of ONNX Runtime has one.

    The Python around it looks for missing inputs, arrays of other devices and captured graphs, which takes a fifth of
    a small model's time. Here inputs are those of the model, arrays of the host, and nothing is captured.
    """
    run: Callable[[Sequence[str], Mapping[str, Any], Any], list[Any]]
    run = getattr(getattr(session, "_sess", None), "run", session.run)
    return run
