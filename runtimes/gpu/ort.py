"""ONNX Runtime on a CUDA device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np

from vae_export.contract.build_record import Options
from vae_export.contract.model import Model
from vae_export.contract.onnx_guard import Arrays
from vae_export.errors import InputError
from vae_export.runtimes.backend import Settings
from vae_export.runtimes.gpu.device import Gpu, Shape
from vae_export.runtimes.gpu.lanes import GpuBackend, Lane, bucket
from vae_export.runtimes.ort_session import EXTRAS, PROVIDERS, open_session, runtime


def open_cuda(
    graphs: Mapping[str, bytes], model: Model, options: Options, settings: Settings, arrays: Mapping[str, Arrays]
) -> GpuBackend:
    """The first CUDA device: sessions for each lane, on the lane's stream, bound to the lane's memory.

    The graphs are serialized ONNX, verified; no path is ever opened. `arrays` are their weights beside them.

    Raises:
        InputError: CUDA graphs are requested in more than one lane.
        BackendError: ONNX Runtime, CUDA's packages, or the device is not available, or it does not accept a graph.
        BundleError: a graph's inputs and outputs are not the model's.
    """
    if settings.cuda_graphs and settings.lanes > 1:
        raise InputError(
            f"load: ONNX Runtime captures CUDA graphs in one lane only; lanes is {settings.lanes}. Ask for one, for "
            "cuda_graphs=None, or build for TensorRT"
        )
    ort = runtime("cuda")
    gpu = Gpu("load", EXTRAS["cuda"])
    ort.preload_dlls()

    def make(lane: Lane) -> _Sessions:
        return _Sessions(ort, lane, graphs, options, settings, arrays)

    facts = {
        "backend": "onnxruntime",
        "version": ort.__version__,
        "provider": PROVIDERS["cuda"],
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
        # ONNX Runtime keeps captured graphs, and handles of CUDA's libraries, for each thread that runs a session.
        self._thread = ThreadPoolExecutor(1) if self._captured else None
        self._model = lane.model
        chosen = {
            "device_id": lane.gpu.index,
            "user_compute_stream": str(int(lane.stream.handle)),
            "use_tf32": int(options.tf32),  # it keeps 10 of float32's 23 mantissa bits
            "prefer_nhwc": int(options.nhwc),
            "enable_cuda_graph": int(self._captured),
            "cudnn_conv_algo_search": "HEURISTIC",  # the default measures again for every batch size
        }
        self._arrays = arrays  # sessions use their memory
        self._sessions = {
            name: open_session(ort, name, graph, lane.model, "cuda", chosen, arrays[name])
            for name, graph in graphs.items()
        }

    def rows(self, graph: str, n: int, sizes: Mapping[str, int]) -> int:
        """See `Executor.rows`."""
        return bucket(n) if self._captured else n

    def prepare(self, graph: str, tensors: Mapping[str, tuple[int, Shape]]) -> Callable[[], None]:
        """See `Executor.prepare`."""
        session = self._sessions[graph]
        binding = session.io_binding()
        inputs, outputs = self._model.signature(graph)
        for side, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for tensor in side:
                address, shape = tensors[tensor.name]
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
