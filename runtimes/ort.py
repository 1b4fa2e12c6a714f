"""ONNX Runtime, on the CPU or on a CUDA device."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np

from vae_export.builds import Options
from vae_export.errors import BackendError, BundleError, InputError, require
from vae_export.manifest import Model
from vae_export.onnx_reader import Arrays

from . import arena, forks
from .backend import Settings
from .failures import words
from .gpu import Gpu, Shape
from .interrupts import LongCalls, interruptible
from .lanes import GpuBackend, Lane, bucket

_EXTRAS = {"cpu": "cpu", "cuda": "gpu"}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {"float32": "tensor(float)", "uint8": "tensor(uint8)", "float64": "tensor(double)"}
# To bind memory takes some 10 µs, in which so many bytes are copied.
_BOUND_BYTES = 64 << 10


class OrtSession:
    """A graph on the CPU. It may be run from many threads at once."""

    runner = "onnxruntime"

    def __init__(self, name: str, graph: bytes, model: Model, arrays: Arrays, threads: int | None) -> None:
        """Open a graph.

        Args:
            name: of the graph.
            graph: a serialized ONNX model whose bytes were verified; no path is ever opened.
            model: what it takes and gives.
            arrays: its weights that lie beside it, over verified bytes.
            threads: inside one call; None leaves it to ONNX Runtime.

        Raises:
            BackendError: ONNX Runtime is not available.
            BundleError: ONNX Runtime does not accept the graph, or finds another than the model has.
        """
        ort = _runtime("cpu")
        self.version = str(ort.__version__)
        self._arrays = arrays  # the session leans on their memory
        self._name, self._model = name, model
        self._outputs = {tensor.name: tensor for tensor in model.ends(name)[1]}
        # Where sizes stay the session's own arena is as good, and a call takes 3 µs less. In a child that was forked in
        # the midst of a call the shared one may be locked for ever.
        shared = arena.shared(ort) if model.data.named() else None
        self._arena = shared if shared and shared.whole() else None
        with self._arena.used() if self._arena else contextlib.nullcontext():
            self._session = interruptible(
                lambda: _open(ort, name, graph, model, "cpu", {}, arrays, threads, self._arena)
            )
        self._run = _shortest_run(self._session)
        self._options = ort.RunOptions
        self._long = LongCalls()
        self._running: list[None] = self._arena.running if self._arena else []  # one for each call under way
        self._forks = forks.count()
        if self._arena:  # what nobody closes gives its memory back, too
            weakref.finalize(self, self._arena.give_back).atexit = False

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Any], out: Sequence[Any] | None = None) -> list[Any]:
        """See `cpu.Session.run`."""
        if self._forks != forks.count():
            self._after_fork()
        self._running.append(None)
        try:
            if self._long.direct(inputs):
                return self._called(outputs, inputs, out, None)
            options = self._options()

            def stop() -> None:
                options.terminate = True

            def work() -> list[Any]:
                return self._called(outputs, inputs, out, options)

            return self._long.run(inputs, work, stop)
        finally:
            self._running.pop()

    def _after_fork(self) -> None:
        """Without its threads ONNX Runtime computes in the caller's; but a call under way may have held its locks."""
        if not self._arena.whole() if self._arena else self._running:
            raise forks.refuse("onnxruntime", "was computing at that moment, which nobody goes on with here")
        self._forks = forks.count()

    def release_memory(self) -> None:
        """See `cpu.Session.release_memory`. Without named sizes it takes a call of one example."""
        if self._arena:
            self._arena.give_back()
            return
        if self._forks != forks.count():
            self._after_fork()
        given = {t.name: np.zeros(self._model.tensor_shape(t, 1, {}), t.dtype) for t in self._model.ends(self._name)[0]}
        self._running.append(None)
        try:
            with contextlib.suppress(Exception):  # what could not be given back stays
                self._run([*self._outputs], given, arena.shrinking(_runtime("cpu")))
        finally:
            self._running.pop()

    def _called(
        self, outputs: Sequence[str], inputs: Mapping[str, Any], out: Sequence[Any] | None, options: Any
    ) -> list[Any]:
        if out is not None:
            return self._into(outputs, inputs, out, options)
        return self._apart(outputs, inputs, options) if self._arena else self._run(outputs, inputs, options)

    def _apart(self, outputs: Sequence[str], inputs: Mapping[str, Any], options: Any) -> list[Any]:
        """Run, the results in memory of their own: in the arena's each would keep a region for as long as it lives."""
        first = next(iter(inputs.values()))
        sizes = self._model.input_sizes(self._name, tuple(first.shape[1:]))
        return self._into(outputs, inputs, [self._empty(name, len(first), sizes) for name in outputs], options)

    def _empty(self, output: str, rows: int, sizes: Mapping[str, int]) -> Any:
        tensor = self._outputs[output]
        return np.empty(self._model.tensor_shape(tensor, rows, sizes), tensor.dtype)

    def _into(self, outputs: Sequence[str], inputs: Mapping[str, Any], out: Sequence[Any], options: Any) -> list[Any]:
        """Run, the results in these arrays: large ones are the memory that ONNX Runtime writes to."""
        if sum(target.nbytes for target in out) >= _BOUND_BYTES:
            binding = self._session.io_binding()
            for name, value in inputs.items():
                binding.bind_cpu_input(name, value)
            for name, target in zip(outputs, out, strict=True):
                binding.bind_output(name, "cpu", 0, target.dtype.type, target.shape, target.ctypes.data)
            # Another shape is one reason to fail; all others the run below tells by itself.
            with contextlib.suppress(Exception):
                self._session.run_with_iobinding(binding, options)
                return list(out)
        found = self._run(outputs, inputs, options)
        if [value.shape for value in found] != [target.shape for target in out]:
            return found
        for target, value in zip(out, found, strict=True):
            target[...] = value
        return list(out)


def open_cuda(
    graphs: Mapping[str, bytes], model: Model, options: Options, settings: Settings, arrays: Mapping[str, Arrays]
) -> GpuBackend:
    """The first CUDA device: sessions for each lane, on the lane's stream, bound to the lane's memory.

    Args:
        graphs: serialized ONNX models by name. Their bytes were verified; no path is ever opened.
        model: what they take and give.
        options: TF32 and channels last.
        settings: lanes and CUDA graphs.
        arrays: for each graph its weights that lie beside it, over verified bytes.

    Raises:
        InputError: CUDA graphs are asked for in more than one lane.
        BackendError: ONNX Runtime, CUDA's packages, or the device is not available, or it does not take a graph.
        BundleError: ONNX Runtime finds another graph than the model has.
    """
    if settings.cuda_graphs and settings.lanes > 1:
        raise InputError(
            f"load: ONNX Runtime captures CUDA graphs in one lane only; lanes is {settings.lanes}. Ask for one, for "
            "cuda_graphs=None, or build for TensorRT"
        )
    ort = _runtime("cuda")
    gpu = Gpu("load", _EXTRAS["cuda"])
    ort.preload_dlls()

    def make(lane: Lane) -> _Sessions:
        return _Sessions(ort, lane, graphs, options, settings, arrays)

    facts = {
        "backend": "onnxruntime",
        "version": ort.__version__,
        "provider": _PROVIDERS["cuda"],
        "cuda_graphs": settings.cuda_graphs is True,
        "tf32": options.tf32,
        "nhwc": options.nhwc,
    }
    return GpuBackend(gpu, model, tuple(graphs), make, settings, None, facts)


class _Sessions:
    """A lane's sessions. With CUDA graphs, a session is never shared between lanes: replaying is not thread-safe."""

    def __init__(
        self,
        ort: ModuleType,
        lane: Lane,
        graphs: Mapping[str, bytes],
        options: Options,
        settings: Settings,
        arrays: Mapping[str, Arrays],
    ) -> None:
        self._ort = ort
        self._captured = settings.cuda_graphs is True
        self._numbers = itertools.count(1)
        # ONNX Runtime keeps what it captures, and handles of CUDA's libraries, for each thread that runs a session.
        self._thread = ThreadPoolExecutor(1) if self._captured else None
        self._model = lane.model
        chosen = {
            "device_id": lane.gpu.index,
            "user_compute_stream": str(int(lane.stream.handle)),
            "use_tf32": int(options.tf32),  # it keeps 10 of float32's 23 mantissa bits
            "prefer_nhwc": int(options.nhwc),
            "enable_cuda_graph": int(self._captured),
            "cudnn_conv_algo_search": "HEURISTIC",  # the default measures anew for every batch size
        }
        self._arrays = arrays  # sessions lean on their memory
        self._sessions = {
            name: _open(ort, name, graph, lane.model, "cuda", chosen, arrays[name]) for name, graph in graphs.items()
        }

    def rows(self, graph: str, n: int, sizes: Mapping[str, int]) -> int:
        """See `Executor.rows`."""
        return bucket(n) if self._captured else n

    def prepare(self, graph: str, ends: Mapping[str, tuple[int, Shape]]) -> Callable[[], None]:
        """See `Executor.prepare`."""
        session = self._sessions[graph]
        binding = session.io_binding()
        inputs, outputs = self._model.ends(graph)
        for tensors, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for tensor in tensors:
                address, shape = ends[tensor.name]
                bind(tensor.name, "cuda", 0, np.dtype(tensor.dtype).type, list(shape), address)
        options = self._ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the lane's stream keeps order
        if self._captured:
            options.add_run_config_entry("gpu_graph_id", str(next(self._numbers)))
        if self._thread:
            thread = self._thread
            return lambda: thread.submit(session.run_with_iobinding, binding, options).result()
        return lambda: session.run_with_iobinding(binding, options)

    def close(self) -> None:
        """See `Executor.close`."""
        if self._thread:
            self._thread.shutdown()
        self._sessions = {}


def _shortest_run(session: Any) -> Callable[[Sequence[str], Mapping[str, Any], Any], list[Any]]:
    """What takes the names of outputs, inputs and options as a session's `run` does: the C++ beneath it, where this
    version of ONNX Runtime has it there.

    The Python around that looks for missing inputs, for arrays of other devices and for captured graphs, which takes a
    fifth of a small model's time. Here inputs are those of `Model.ends`, arrays of the host, and nothing is captured.
    """
    run: Callable[[Sequence[str], Mapping[str, Any], Any], list[Any]]
    run = getattr(getattr(session, "_sess", None), "run", session.run)
    return run


def _runtime(device: str) -> ModuleType:
    """ONNX Runtime, if it has the provider of a device."""
    ort = require("onnxruntime", _EXTRAS[device], "load")
    if _PROVIDERS[device] not in ort.get_available_providers():
        raise BackendError(
            f"load: device {device!r} needs ONNX Runtime's {_PROVIDERS[device]}; the installed onnxruntime "
            f"{ort.__version__} has {', '.join(ort.get_available_providers())}. Run: pip uninstall "
            f"onnxruntime; pip install 'vae-export[{_EXTRAS[device]}]'"
        )
    return ort


def session_options(ort: ModuleType, arrays: Arrays, threads: int | None = None) -> Any:
    """Settings for a session on ONNX bytes whose weights, as far as they lie beside the graph, are these arrays.

    Their memory must outlive the session. `threads` are those inside one call; None leaves it to ONNX Runtime. What
    a graph makes of constants alone is computed with each call, not while it is opened, where it was not told how
    much that is.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # a failed call raises: what it logs beside that is for no user
    if threads is not None:
        settings.intra_op_num_threads = threads
    # Bytes of its own format would be taken for what they are: unchecked by us.
    settings.add_session_config_entry("session.load_model_format", "ONNX")
    if not arrays.foldable:
        settings.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    if arrays:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
        settings.add_external_initializers(list(arrays), values)
    return settings


def _open(
    ort: ModuleType,
    name: str,
    graph: bytes,
    model: Model,
    device: str,
    options: Mapping[str, Any],
    arrays: Arrays,
    threads: int | None = None,
    memory: arena.Arena | None = None,
) -> Any:
    """A session on a device and on no other, with memory from an arena, or from one of its own."""
    settings = session_options(ort, arrays, threads)
    if memory:
        memory.use(settings)
    # A plan for each shape that was seen, each with memory of its own, is for shapes that stay.
    settings.enable_mem_pattern = not model.data.named()
    provider = _PROVIDERS[device]
    try:
        session = ort.InferenceSession(graph, settings, providers=[(provider, dict(options))], enable_fallback=0)
    except Exception as error:
        kind = BundleError if device == "cpu" else BackendError  # a device has reasons of its own
        raise kind(f"{name}: ONNX Runtime {ort.__version__} does not open it on {device}: {words(error)}") from None
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"load: {provider} was asked for, and ONNX Runtime opened {session.get_providers()[0]} "
            "instead. `vae-export doctor` shows what is missing"
        )
    inputs, outputs = model.ends(name)
    found, said = (
        [(t.name, t.type, tuple(t.shape)) for t in (*session.get_inputs(), *session.get_outputs())],
        [(t.name, _TYPES[t.dtype], t.shape) for t in (*inputs, *outputs)],
    )
    if found != said:
        raise BundleError(
            f"{name}: the manifest promises {said}, and the graph has {found}. The bundle contradicts itself: "
            "export the model again"
        )
    return session
