"""TensorRT and TensorRT for RTX engines, on CUDA streams, replayed as CUDA graphs."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vae_export.contract import cache, targets
from vae_export.contract.atomic import atomic_file
from vae_export.contract.build_record import Engine, Options
from vae_export.contract.model import Model, Tensor
from vae_export.errors import BackendError, BundleError, InputError
from vae_export.runtimes.backend import Settings
from vae_export.runtimes.gpu import driver, flavours
from vae_export.runtimes.gpu.device import Gpu, Shape
from vae_export.runtimes.gpu.flavours import Bindings
from vae_export.runtimes.gpu.lanes import GpuBackend, Lane, bucket


def open_engines(
    engines: Mapping[str, bytes], model: Model, options: Options, engine: Engine, settings: Settings
) -> GpuBackend:
    """Open a build's engines: verified bytes that match this machine (`compatibility.mismatch`).

    Raises:
        BackendError: there is no GPU, a package is missing, or TensorRT refuses an engine.
        BundleError: an engine's inputs and outputs are not the model's.
    """
    bindings = flavours.load(engine.flavour)
    gpu = Gpu("load", flavours.EXTRAS[engine.flavour])
    runtime = bindings.trt.Runtime(bindings.logger)
    opened = {name: _Opened(bindings, runtime, name, content, model) for name, content in engines.items()}

    def make(lane: Lane) -> _Contexts:
        return _Contexts(lane, opened, options, settings)

    def closing() -> None:
        for graph in opened.values():
            graph.save_cache()
        opened.clear()  # the engines, with their weights on the GPU

    return GpuBackend(
        gpu,
        model,
        tuple(engines),
        make,
        settings,
        max(profile.batch[2] for profile in options.profiles),
        {
            "backend": engine.flavour,
            "version": bindings.version,
            "provider": targets.title(engine.flavour),
            "cuda_graphs": "where a shape can be captured" if settings.cuda_graphs is None else settings.cuda_graphs,
            "profiles": "; ".join(map(str, options.profiles)),
        },
        closing,
    )


class _Opened:
    """An engine, and for RTX the cache of the kernels that it has compiled on this GPU."""

    def __init__(self, bindings: Bindings, runtime: Any, name: str, content: bytes, model: Model) -> None:
        self.bindings = bindings
        self.name = name
        bindings.errors()
        self.engine = runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            raise BackendError(f"{name}: {bindings.title} does not open the engine: {bindings.errors()}")
        _check_signature(bindings, name, self.engine, model)
        trt = bindings.trt
        self.config = self.engine.create_runtime_config()
        self.config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache = None
        self._file: Path | None = None
        if bindings.flavour == "tensorrt-rtx":
            # Compile for a shape at its first call, not in the background: a CUDA graph must capture the fast kernels.
            self.config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            self._cache = self.config.create_runtime_cache()
            with contextlib.suppress(BackendError, OSError):  # without the cache it compiles again
                self._file = _cache_file(bindings, content)
                if self._file.is_file():
                    self._cache.deserialize(self._file.read_bytes())  # TensorRT refuses one that does not fit
            self.config.set_runtime_cache(self._cache)

    def context(self) -> Any:
        """A new execution context, its memory not set."""
        context = self.engine.create_execution_context(self.config)
        if context is None:
            raise BackendError(f"{self.name}: {self.bindings.title} gives no context: {self.bindings.errors()}")
        return context

    def save_cache(self) -> None:
        """Keep RTX's compiled kernels for the next process."""
        content = self._cache.serialize() if self._cache is not None and self._file else None
        if content is None or self._file is None:
            return
        with contextlib.suppress(BackendError, OSError):
            cache.check_cache()
            with atomic_file(self._file) as stage:
                stage.write_bytes(bytes(content))


class _Contexts:
    """A lane's execution contexts: one for each shape, all on the same scratch memory.

    A captured graph holds its context's state, so that no context is ever set to another shape.
    """

    def __init__(self, lane: Lane, opened: Mapping[str, _Opened], options: Options, settings: Settings) -> None:
        self._lane = lane
        self._opened = opened
        self._profiles = options.profiles
        self._largest = max(profile.batch[2] for profile in options.profiles)
        self._wanted = settings.cuda_graphs
        self._size = max(1, *(graph.engine.device_memory_size_v2 for graph in opened.values()))
        self._scratch = lane.gpu.allocate(self._size, lane.stream)

    def rows(self, graph: str, n: int, sizes: Mapping[str, int]) -> int:
        """See `Executor.rows`."""
        at = n if self._wanted is False else min(bucket(n), self._largest)
        chosen = targets.choose(self._profiles, at, sizes) or targets.choose(self._profiles, n, sizes)
        if chosen is None:
            shape = ", ".join([f"batch {n}", *(f"{name} {size}" for name, size in sizes.items())])
            raise InputError(
                f"{graph}: {shape} is in none of the build's profiles ({'; '.join(map(str, self._profiles))}). "
                "Build with --batch and --size that hold it"
            )
        return chosen[1]

    def prepare(self, graph: str, tensors: Mapping[str, tuple[int, Shape]]) -> Callable[[], None]:
        """See `Executor.prepare`."""
        opened, stream = self._opened[graph], self._lane.stream
        handle = int(stream.handle)
        opened.bindings.errors()
        context = opened.context()
        inputs = {tensor.name for tensor in self._lane.model.signature(graph)[0]}
        first = tensors[self._lane.model.signature(graph)[0][0].name][1]
        sizes = self._lane.model.input_sizes(graph, first[1:])
        chosen = targets.choose(self._profiles, first[0], sizes)
        assert chosen is not None
        done = [context.set_optimization_profile_async(chosen[0], handle)]
        context.set_device_memory(int(self._scratch.handle), self._size)
        for name, (address, shape) in tensors.items():
            if name in inputs:
                done.append(context.set_input_shape(name, shape))
            done.append(context.set_tensor_address(name, address))
        if not all(done) or context.infer_shapes():
            raise BackendError(f"{graph}: {opened.bindings.title} refuses the shapes: {opened.bindings.errors()}")

        def enqueue() -> None:
            if not context.execute_async_v3(handle):
                raise BackendError(f"{graph}: {opened.bindings.title} failed: {opened.bindings.errors()}")

        if self._wanted is False:
            return enqueue
        enqueue()  # the first run at new shapes also sets them up, which must not be captured
        stream.sync()
        if opened.bindings.flavour == "tensorrt-rtx" and not context.is_stream_capturable(handle):
            if self._wanted:
                raise BackendError(f"{graph}: {opened.bindings.title} cannot capture it as a CUDA graph")
            return enqueue
        builder = stream.create_graph_builder()
        try:
            builder.begin_building("thread_local")
            enqueue()
            builder.end_building()
            captured = builder.complete()
        except Exception as error:  # cuda.core's error class is private
            with contextlib.suppress(Exception):  # it ends the capture, with an error if that is invalid
                builder.close()
            if self._wanted:
                what = f"{graph}: {opened.bindings.title} cannot capture it as a CUDA graph"
                raise BackendError(f"{what}: {error}") from error
            return enqueue
        builder.close()
        captured.upload(stream)
        # The context must live as long as its graph.
        return lambda kept=context: captured.launch(stream)  # type: ignore[misc]

    def close(self) -> None:
        """See `Executor.close`."""
        self._scratch.close(self._lane.stream)


def _check_signature(bindings: Bindings, name: str, engine: Any, model: Model) -> None:
    """Refuse an engine with other inputs and outputs than the model has."""
    trt = bindings.trt
    types = {trt.DataType.FLOAT: "float32", trt.DataType.UINT8: "uint8"}

    def text(kind: str, tensor: Tensor) -> str:
        return f"{kind} {tensor.name} {tensor.dtype} {[d if isinstance(d, int) else -1 for d in tensor.shape]}"

    expected = [
        text(kind, t) for kind, side in zip(("INPUT", "OUTPUT"), model.signature(name), strict=True) for t in side
    ]
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    actual = [
        f"{engine.get_tensor_mode(n).name} {n} {types.get(engine.get_tensor_dtype(n), engine.get_tensor_dtype(n))} "
        f"{[int(size) for size in engine.get_tensor_shape(n)]}"
        for n in names
    ]
    if sorted(actual) != sorted(expected):
        raise BundleError(f"{name}: the engine has {actual}; the model has {expected}. Build it again")


def _cache_file(bindings: Bindings, content: bytes) -> Path:
    """The file for RTX's compiled kernels of an engine on this GPU.

    Raises:
        BackendError: as for `cache.check_cache`.
    """
    here = driver.query()
    key = f"{bindings.version} {here.cuda} {here.gpus[0].name} {hashlib.sha256(content).hexdigest()}"
    return cache.check_cache() / "runtime" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
