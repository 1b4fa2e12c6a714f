"""ONNX Runtime, on the CPU or on a CUDA device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np

from vae_export.builds import Options
from vae_export.errors import BackendError, BundleError, InputError, require
from vae_export.manifest import Model
from vae_export.noise import Normals
from vae_export.onnx_reader import Arrays

from .backend import Settings, Value, slices
from .gpu import Gpu, Shape
from .lanes import GpuBackend, Lane, bucket

_EXTRAS = {"cpu": "cpu", "cuda": "gpu"}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {"float32": "tensor(float)", "uint8": "tensor(uint8)"}


class OrtBackend:
    """The CPU: one session for each graph. Sessions are safe to run from many threads."""

    on_gpu = False

    def __init__(
        self, graphs: Mapping[str, bytes], model: Model, settings: Settings, arrays: Mapping[str, Arrays]
    ) -> None:
        """Open graphs.

        Args:
            graphs: serialized ONNX models by name. Their bytes were verified; no path is ever opened.
            model: what they take and give.
            settings: threads.
            arrays: for each graph its weights that lie beside it, over verified bytes.

        Raises:
            BackendError: ONNX Runtime is not available.
            BundleError: ONNX Runtime does not accept a graph, or finds another than the model has.
        """
        ort = _runtime("cpu")
        self._version = ort.__version__
        self._threads = settings.threads
        self.graphs = frozenset(graphs)
        self._arrays = arrays  # sessions lean on their memory
        self._sessions = {
            name: _open(ort, name, graph, model, "cpu", {}, arrays[name], settings.threads)
            for name, graph in graphs.items()
        }

    def run(
        self,
        graph: str,
        inputs: Mapping[str, Value],
        outputs: Sequence[str],
        micro_batch: int,
        *,
        on_device: bool = False,
    ) -> list[Any]:
        """See `Backend.run`."""
        first = next(iter(inputs.values()))
        if len(first) > micro_batch:
            return self._sliced(graph, inputs, outputs, micro_batch)
        if len(inputs) > 1 or type(first) is Normals:
            inputs = {name: value.numpy() if type(value) is Normals else value for name, value in inputs.items()}
        try:
            result: list[Any] = self._sessions[graph].run(outputs, inputs)
        except KeyError:
            raise BackendError("this VAE was closed; load the bundle again") from None
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BackendError(f"ONNX Runtime {self._version} failed in the {graph}: {error}") from error
        return result

    def _sliced(self, graph: str, inputs: Mapping[str, Value], outputs: Sequence[str], micro_batch: int) -> list[Any]:
        n = len(next(iter(inputs.values())))
        results: list[Any] = []
        for rows in slices(n, micro_batch):
            parts = self.run(graph, {name: value[rows] for name, value in inputs.items()}, outputs, micro_batch)
            results = results or [np.empty((n, *part.shape[1:]), part.dtype) for part in parts]
            for result, part in zip(results, parts, strict=True):
                result[rows] = part
        return results

    def draw(self, mean: Value, logvar: Value, eps: Normals) -> Any:
        """See `Backend.draw`: there is no GPU here."""
        raise AssertionError("arrays on the GPU are refused before")

    def describe(self) -> dict[str, Any]:
        """What the graphs run on."""
        return {
            "backend": "onnxruntime",
            "version": self._version,
            "device": "cpu",
            "provider": _PROVIDERS["cpu"],
            "threads": self._threads or "one for each core",
        }

    def close(self) -> None:
        """Drop the sessions, and then the weights that they lean on."""
        self._sessions = {}
        self._arrays = {}


def open_cuda(
    graphs: Mapping[str, bytes], model: Model, options: Options, settings: Settings, arrays: Mapping[str, Arrays]
) -> GpuBackend:
    """The first CUDA device: sessions for each lane, on the lane's stream, bound to the lane's memory.

    Args:
        graphs: as for `OrtBackend`.
        model: what they take and give.
        options: TF32 and channels last.
        settings: lanes and CUDA graphs.
        arrays: as for `OrtBackend`.

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


def session_options(ort: ModuleType, arrays: Arrays) -> Any:
    """Settings for a session on ONNX bytes whose weights, as far as they lie beside the graph, are these arrays.

    Their memory must outlive the session.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    # Bytes of its own format would be taken for what they are: unchecked by us.
    settings.add_session_config_entry("session.load_model_format", "ONNX")
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
) -> Any:
    """A session on a device and on no other."""
    settings = session_options(ort, arrays)
    if threads is not None:
        settings.intra_op_num_threads = threads
    # A plan for each shape that was seen, each with memory of its own, is for shapes that stay.
    settings.enable_mem_pattern = not model.data.named()
    provider = _PROVIDERS[device]
    try:
        session = ort.InferenceSession(graph, settings, providers=[(provider, dict(options))], enable_fallback=0)
    except Exception as error:
        kind = BundleError if device == "cpu" else BackendError  # a device has reasons of its own
        raise kind(f"{name}: ONNX Runtime {ort.__version__} does not open it on {device}: {error}") from None
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
