"""OpenVINO on the CPU: a graph, compiled once for all shapes, and again for each shape that is known beforehand.

A request belongs to one choice of outputs, and their memory is set again at every call: used with fewer outputs, a
request would write into results that callers hold.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np

from vae_export.contract.model import Model, Tensor
from vae_export.errors import BackendError, BundleError, require
from vae_export.runtimes import forks
from vae_export.runtimes.failures import words
from vae_export.runtimes.interrupts import LongCalls

_HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}
_EXTRA = "openvino"


def runtime(verb: str) -> ModuleType:
    """The package `openvino`.

    Raises:
        BackendError: it is not installed.
    """
    return require("openvino", _EXTRA, verb)


def capabilities() -> frozenset[str]:
    """The precisions that this processor computes in natively, by OpenVINO's names: FP32, BF16, INT8 and others."""
    return frozenset(runtime("build").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def compiled(core: Any, model: Any, options: Mapping[str, Any]) -> Any:
    """A model, compiled for the CPU in a thread that ends with it.

    OpenVINO gives the compiling thread an alternate signal stack, and does not restore the old one if models are
    freed in the order of their creation: the next signal that Python handles would then crash the process.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(core.compile_model, model, "CPU", dict(options)).result()


class OpenVinoSession:
    """A compiled graph. It may be run from many threads: while it runs, each call has a request of its own."""

    runner = "openvino"

    def __init__(
        self,
        name: str,
        graph: bytes,
        model: Model,
        precision: str,
        threads: int | None,
        exact: Sequence[Mapping[str, int]] = (),
    ) -> None:
        """Compile a graph: serialized ONNX, verified; no path is ever opened.

        With the precision `bf16` OpenVINO computes in bfloat16 wherever it can; `fp32` and `int8` keep each node's. For
        each of the shapes `exact` (see `ExecutionPlan.exact`) the first call of it compiles the graph once more.

        Raises:
            BackendError: OpenVINO is not installed, or does not compute in this precision here.
            BundleError: OpenVINO does not accept the graph, or its inputs and outputs are not the model's.
        """
        self._ov = runtime("load")
        self._name, self._model = name, model
        self.version = str(self._ov.__version__)
        self._inputs, self._outputs = ({t.name: t for t in tensors} for tensors in model.signature(name))
        hint = _HINTS[precision]
        # Without a hint OpenVINO chooses bfloat16 by itself. Pinned threads of two processes would share a core.
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            core = self._ov.Core()
            read = core.read_model(graph, b"")
            self._compiled = compiled(core, read, options)
        except Exception as error:  # OpenVINO's exceptions have no base but RuntimeError
            raise BundleError(f"{name}: OpenVINO {self.version} does not open it: {words(error)}") from None
        self._check_signature()
        used = self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if used != hint:
            raise BackendError(
                f"load: {name}: {precision} was asked for, and OpenVINO {self.version} computes in {used} on this "
                "processor. Build for it: vae-export build BUNDLE --target cpu"
            )
        # A request writes each output to the memory that was set last, also an output that is no longer requested: into
        # a result that the caller holds, or has freed. So each choice of outputs has requests of its own.
        self._requests: dict[tuple[Any, ...], deque[Any]] = {}
        self._fixed: dict[str, int] | None = None if model.data.named() else {}
        # By the shape of the first input, which determines those of the others.
        self._exact: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}
        for sizes in exact:
            batch, named = sizes["batch"], {name: size for name, size in sizes.items() if name != "batch"}
            shapes = {name: model.tensor_shape(tensor, batch, named) for name, tensor in self._inputs.items()}
            self._exact[next(iter(shapes.values()))] = shapes
        self._compiled_exactly: dict[tuple[int, ...], Any] = {}
        self._compiling = threading.Lock()

        partial = self._ov.PartialShape  # not through self: the cycle would keep the memory of an unclosed session

        def compile_for(shapes: Mapping[str, tuple[int, ...]]) -> Any:
            fixed = read.clone()
            fixed.reshape({name: partial(list(shape)) for name, shape in shapes.items()})
            return compiled(core, fixed, options)

        self._compile_for = compile_for
        self._long = LongCalls()
        self._forks = forks.count

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any], out: Sequence[Any] | None = None) -> list[Any]:
        """See `dispatch.Session.run`."""
        if self._forks != forks.count:
            raise forks.refusal("openvino", "has no threads in a child, so that a call would never end")
        first = next(iter(inputs.values()))
        exact = first.shape if first.shape in self._exact else None
        idle = self._requests.setdefault((exact, *outputs), deque())
        try:
            request = idle.pop()
        except IndexError:
            request = self._compiled_for(exact).create_infer_request()
        tensor = self._ov.Tensor
        for name, value in inputs.items():
            request.set_tensor(name, tensor(value, shared_memory=True))
        results = list(out) if out is not None else [self._empty(name, first.shape) for name in outputs]
        targets = [tensor(result, shared_memory=True) for result in results]
        for name, target in zip(outputs, targets, strict=True):
            request.set_tensor(name, target)
        if first.nbytes <= self._long.fast_bytes:
            request.infer()
        else:
            self._long.run(first.nbytes, request.infer, request.cancel)
        idle.append(request)
        # A result that is smaller than its array is written to the array's beginning, without an error.
        if any(target.shape != self._ov.Shape(result.shape) for target, result in zip(targets, results, strict=True)):
            return [np.array(target.data) for target in targets]
        return results

    def release_memory(self) -> None:
        """See `dispatch.Session.release_memory`."""
        if self._forks != forks.count:  # it cannot run here
            return
        self._requests.clear()  # each holds its tensors, also those of its last caller
        for compiled in (self._compiled, *list(self._compiled_exactly.values())):
            compiled.release_memory()

    def _compiled_for(self, shape: tuple[int, ...] | None) -> Any:
        """The graph compiled for this shape of its first input alone, on the first call; None: for all shapes."""
        if shape is None:
            return self._compiled
        with self._compiling:
            if shape not in self._compiled_exactly:
                self._compiled_exactly[shape] = self._compile_for(self._exact[shape])
            return self._compiled_exactly[shape]

    def _empty(self, output: str, shape: tuple[int, ...]) -> Any:
        model, tensor = self._model, self._outputs[output]
        sizes = model.input_sizes(self._name, tuple(shape[1:])) if self._fixed is None else self._fixed
        return np.empty(model.tensor_shape(tensor, shape[0], sizes), tensor.dtype)

    def _check_signature(self) -> None:
        for verb, expected, ports in (
            ("takes", self._inputs, self._compiled.inputs),
            ("gives", self._outputs, self._compiled.outputs),
        ):
            promised = {name: (tensor.dtype, _sizes(tensor)) for name, tensor in expected.items()}
            actual = {}
            for port in ports:
                names = sorted(port.get_names())  # the output of a removed no-op has the name of its input, too
                shape = tuple(d.get_length() if d.is_static else None for d in port.get_partial_shape())
                name = next((name for name in names if name in expected), names[0])
                actual[name] = (str(port.get_element_type().to_dtype()), shape)
            if promised != actual:
                raise BundleError(
                    f"{self._name}: the manifest promises that it {verb} {promised}, and OpenVINO finds {actual}. The "
                    "bundle contradicts itself: export the model again"
                )


def _sizes(tensor: Tensor) -> tuple[int | None, ...]:
    """Sizes as OpenVINO has them: None for a named one."""
    return tuple(dim if isinstance(dim, int) else None for dim in tensor.shape)
