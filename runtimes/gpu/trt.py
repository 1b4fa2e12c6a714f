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
    """Open a build's engines. They were compared with this machine before (`builds.mismatch`).

    Args:
        engines: their verified bytes by name.
        model: what they take and give.
        options: profiles and flags of the build.
        engine: what made them.
        settings: lanes and CUDA graphs.

    Raises:
        BackendError: there is no GPU, a package is missing, or TensorRT refuses an engine.
        BundleError: an engine is not what the record says.
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
    """An engine, and for RTX what it has compiled on this GPU so far."""

    def __init__(self, bindings: Bindings, runtime: Any, name: str, content: bytes, model: Model) -> None:
        self.bindings = bindings
        self.name = name
        bindings.said()
        self.engine = runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            raise BackendError(f"{name}: {bindings.title} does not open the engine: {bindings.said()}")
        _check_ends(bindings, name, self.engine, model)
        trt = bindings.trt
        self.config = self.engine.create_runtime_config()
        self.config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._cache = None
        self._file: Path | None = None
        if bindings.flavour == "tensorrt-rtx":
            # Compile for a shape when it is first seen, not behind it: what is captured must be the fast kernels.
            self.config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            self._cache = self.config.create_runtime_cache()
            with contextlib.suppress(BackendError, OSError):  # without the cache it compiles again
                self._file = _cache_file(bindings, content)
                if self._file.is_file():
                    self._cache.deserialize(self._file.read_bytes())  # refused by itself where it does not fit
            self.config.set_runtime_cache(self._cache)

    def context(self) -> Any:
        """A new execution context, its memory not set."""
        context = self.engine.create_execution_context(self.config)
        if context is None:
            raise BackendError(f"{self.name}: {self.bindings.title} gives no context: {self.bindings.said()}")
        return context

    def save_cache(self) -> None:
        """Keep what RTX has compiled for the next process."""
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
        found = targets.choose(self._profiles, at, sizes) or targets.choose(self._profiles, n, sizes)
        if found is None:
            asked = ", ".join([f"batch {n}", *(f"{name} {size}" for name, size in sizes.items())])
            raise InputError(
                f"{graph}: {asked} is in none of the build's profiles ({'; '.join(map(str, self._profiles))}). "
                "Build with --batch and --size that hold it"
            )
        return found[1]

    def prepare(self, graph: str, ends: Mapping[str, tuple[int, Shape]]) -> Callable[[], None]:
        """See `Executor.prepare`."""
        opened, stream = self._opened[graph], self._lane.stream
        handle = int(stream.handle)
        opened.bindings.said()
        context = opened.context()
        inputs = {tensor.name for tensor in self._lane.model.signature(graph)[0]}
        first = ends[self._lane.model.signature(graph)[0][0].name][1]
        sizes = self._lane.model.input_sizes(graph, first[1:])
        chosen = targets.choose(self._profiles, first[0], sizes)
        assert chosen is not None
        done = [context.set_optimization_profile_async(chosen[0], handle)]
        context.set_device_memory(int(self._scratch.handle), self._size)
        for name, (address, shape) in ends.items():
            if name in inputs:
                done.append(context.set_input_shape(name, shape))
            done.append(context.set_tensor_address(name, address))
        if not all(done) or context.infer_shapes():
            raise BackendError(f"{graph}: {opened.bindings.title} refuses the shapes: {opened.bindings.said()}")

        def enqueue() -> None:
            if not context.execute_async_v3(handle):
                raise BackendError(f"{graph}: {opened.bindings.title} failed: {opened.bindings.said()}")

        if self._wanted is False:
            return enqueue
        enqueue()  # what the shapes change is done by the first run, which must not be captured
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
            with contextlib.suppress(Exception):  # it ends the capture, and complains of one that is invalid
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


def _check_ends(bindings: Bindings, name: str, engine: Any, model: Model) -> None:
    """Refuse an engine with other inputs and outputs than the model has."""
    trt = bindings.trt
    types = {trt.DataType.FLOAT: "float32", trt.DataType.UINT8: "uint8"}

    def text(kind: str, tensor: Tensor) -> str:
        return f"{kind} {tensor.name} {tensor.dtype} {[d if isinstance(d, int) else -1 for d in tensor.shape]}"

    expected = [
        text(kind, t) for kind, ends in zip(("INPUT", "OUTPUT"), model.signature(name), strict=True) for t in ends
    ]
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = [
        f"{engine.get_tensor_mode(n).name} {n} {types.get(engine.get_tensor_dtype(n), engine.get_tensor_dtype(n))} "
        f"{[int(size) for size in engine.get_tensor_shape(n)]}"
        for n in names
    ]
    if sorted(found) != sorted(expected):
        raise BundleError(f"{name}: the engine has {found}; the model has {expected}. Build it again")


def _cache_file(bindings: Bindings, content: bytes) -> Path:
    """Where what RTX has compiled of an engine on this GPU is kept.

    Raises:
        BackendError: as `builds.check_cache`.
    """
    found = driver.query()
    key = f"{bindings.version} {found.cuda} {found.gpus[0].name} {hashlib.sha256(content).hexdigest()}"
    return cache.check_cache() / "runtime" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
