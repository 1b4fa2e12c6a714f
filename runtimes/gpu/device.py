"""The GPU: its memory, arrays that lie there, and kernels. CUDA by NVIDIA's cuda.core, without PyTorch."""

from __future__ import annotations

import math
import threading
from importlib import resources
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from vae_export.contract import cache
from vae_export.errors import BackendError, require
from vae_export.numerics import noise
from vae_export.numerics.noise import Normals
from vae_export.runtimes.failures import words
from vae_export.runtimes.gpu import driver

_THREADS = 256  # of a block
_KEPT_BYTES = 256 << 20  # of freed memory that the pool keeps for the next results
#: Messages of CUDA, ONNX Runtime and TensorRT that are out of memory.
_NO_MEMORY = ("OUT_OF_MEMORY", "out of memory", "Failed to allocate memory")
_DEVICE = 2  # kDLCUDA (dlpack.h)
LEGACY, _PER_THREAD = 1, 2  # the default streams in DLPack and in the CUDA array interface

Shape = tuple[int, ...]
Dtype = np.dtype[Any]


class DeviceArray:
    """An array on the GPU that takes part in DLPack and in the CUDA array interface: PyTorch, CuPy and JAX take it
    without a copy (`torch.from_dlpack(a)`, `cupy.from_dlpack(a)`, `jax.dlpack.from_dlpack(a)`).

    Work that fills it may still be under way: a consumer waits for that on its own stream.

    Attributes:
        shape: its dimensions.
        dtype: float32, uint8 or float64.
        ready: a CUDA event, over when the array is complete.
        shared: whether it was exported to another library.

    If several libraries or streams use it, keep a reference until their work is done: its memory is freed in the order
    of the stream that imported it last.
    """

    def __init__(self, gpu: Gpu, buffer: Any, shape: Shape, dtype: Dtype, ready: Any) -> None:
        """Wrap a buffer of the GPU's pool, complete when the event `ready` is."""
        self.shape = shape
        self.dtype = dtype
        self._gpu = gpu
        self._buffer = buffer
        self.ready = ready
        self.shared = False

    def __repr__(self) -> str:
        return f"DeviceArray({self.shape}, {self.dtype})"

    @property
    def address(self) -> int:
        """Its address on the GPU. The content is complete when `ready` is."""
        return int(self._buffer.handle)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def numpy(self) -> npt.NDArray[Any]:
        """A copy on the host, once the array is complete."""
        result = np.empty(self.shape, self.dtype)
        self._gpu.use()
        self.ready.sync()
        self._gpu.fetch(result, self.address)
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """For NumPy: `numpy.asarray(a)`."""
        if copy is False:
            raise ValueError("an array on the GPU becomes a NumPy array by a copy only")
        return self.numpy().astype(dtype or self.dtype, copy=False)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _DEVICE, self._gpu.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        self._hand_over(LEGACY if stream is None else stream)
        view: object = self._view().__dlpack__(stream=-1, max_version=max_version, dl_device=dl_device, copy=copy)
        return view

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        self._hand_over(LEGACY)
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            "stream": LEGACY,
        }

    def _hand_over(self, stream: int) -> None:
        """Have the consumer's stream wait for this array, and its memory freed only after that stream's work."""
        self.shared = True
        if stream == -1:  # the consumer synchronizes by itself
            return
        self._gpu.use()
        consumer = self._gpu.stream(stream)
        consumer.wait(self.ready)
        self._buffer.set_deallocation_stream(consumer)

    def _view(self) -> Any:
        return self._gpu.views.from_buffer(self._buffer, self.shape, dtype=self.dtype)


class Gpu:
    """One device: its context, memory pool and kernels."""

    def __init__(self, verb: str, extra: str) -> None:
        """Open the first device; `verb` and the `extra` that brings CUDA's Python packages are for messages.

        Raises:
            BackendError: there is no GPU, or a package is missing.
        """
        if problem := driver.query().problem:
            raise BackendError(f"{verb}: {problem}. `vae-export doctor` shows what is missing")
        self.core = require("cuda.core", extra, verb)
        self.views = require("cuda.core.utils", extra, verb).StridedMemoryView
        self._driver = require("cuda.bindings.driver", extra, verb)
        self.index = 0
        self.name = driver.query().gpus[0].name
        self.capability = driver.query().gpus[0].capability
        self._kernels: dict[str, Any] = {}
        self._lock = threading.Lock()
        try:
            self.use()
            # A pool of its own, which ends with the backend; meanwhile it keeps some of the freed memory.
            self.pool = self.core.DeviceMemoryResource(self.device, self.core.DeviceMemoryResourceOptions())
            threshold = self._driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
            kept = self._driver.cuuint64_t(_KEPT_BYTES)
            self._check(self._driver.cuMemPoolSetAttribute(self.pool.handle, threshold, kept)[0])
            self._pinned = self.core.LegacyPinnedMemoryResource()
        except Exception as error:  # cuda.core's error class is private
            raise self.failure(error, f"{verb}: opening the GPU") from error

    @property
    def device(self) -> Any:
        """This thread's object for the device."""
        return self.core.Device(self.index)

    def use(self) -> None:
        """Make the device current in this thread."""
        self.device.set_current()

    def stream(self, handle: int) -> Any:
        """A stream by its number in DLPack: the default streams have small ones."""
        if handle in (0, LEGACY):
            return self.core.LEGACY_DEFAULT_STREAM
        if handle == _PER_THREAD:
            return self.core.PER_THREAD_DEFAULT_STREAM
        return self.core.Stream.from_handle(handle)

    def allocate(self, size: int, stream: Any) -> Any:
        """Memory of the pool, in the order of a stream.

        Raises:
            BackendError: the GPU is out of memory.
        """
        try:
            return self.pool.allocate(size, stream=stream)
        except Exception as error:  # cuda.core's error class is private
            raise self.failure(error, f"{size:,} bytes") from None

    def pinned(self, size: int) -> Any:
        """Memory of the host that the GPU copies from and to directly.

        Raises:
            BackendError: the host is out of memory.
        """
        try:
            return self._pinned.allocate(size)
        except Exception as error:  # as above
            raise self.failure(error, f"{size:,} bytes of pinned memory") from None

    def failure(self, error: Exception, what: str) -> BackendError:
        """A BackendError for an error of CUDA."""
        if isinstance(error, BackendError):
            return error
        if any(words in str(error) for words in _NO_MEMORY):
            return BackendError(
                f"the GPU {self.name} is out of memory for {what}. Use a smaller micro_batch or fewer lanes, or close "
                "what else runs on it"
            )
        return BackendError(f"CUDA failed for {what}: {words(error)}")

    def copy(self, target: int, source: int, size: int, stream: Any) -> None:
        """Copy between addresses of the GPU and of pinned memory, in the order of a stream."""
        (code,) = self._driver.cuMemcpyAsync(target, source, size, stream.handle)
        self._check(code)

    def fetch(self, target: npt.NDArray[Any], source: int) -> None:
        """Copy from the GPU into an array of the host, and wait."""
        (code,) = self._driver.cuMemcpyDtoH(target.ctypes.data, source, target.nbytes)
        self._check(code)

    def _check(self, code: Any) -> None:
        if int(code):
            raise self.failure(RuntimeError(str(code)), "a copy")

    def launch(self, name: str, stream: Any, threads: int, *arguments: Any) -> None:
        """Run a kernel of `KERNELS` with so many threads."""
        config = self.core.LaunchConfig(grid=-(-threads // _THREADS), block=_THREADS)
        self.core.launch(stream, config, self._kernel(name), *arguments)

    def _kernel(self, name: str) -> Any:
        if name not in self._kernels:
            with self._lock:
                if not self._kernels:
                    code = compile_kernels(self.core, self.capability)
                    self._kernels.update({kernel: code.get_kernel(kernel) for kernel in KERNELS})
        return self._kernels[name]

    def normals(self, target: int, wanted: Normals, stream: Any) -> None:
        """Fill memory with the normals of an address, computed on the GPU: see `noise.normals`."""
        self._noise("vae_normals", target, wanted, stream)

    def words(self, target: int, wanted: Normals, stream: Any) -> None:
        """Fill memory with the random words of an address: see `noise.words`."""
        self._noise("vae_words", target, wanted, stream)

    def _noise(self, kernel: str, target: int, wanted: Normals, stream: Any) -> None:
        seed, numbers, first, count, size, draw = noise.check_address(
            wanted.seed, wanted.stream, wanted.first, len(wanted), wanted.size, wanted.draw
        )
        threads = count * -(-size // noise.HALVES)
        self.launch(kernel, stream, threads, *integers(target, count, size, first, seed, numbers, draw))

    def close(self) -> None:
        """Free the pool's memory, once the arrays in it are gone."""
        self.pool.close()


KERNELS = ("vae_words", "vae_normals", "vae_reparameterize")


def compile_kernels(core: ModuleType, capability: str) -> Any:
    """The kernels for a compute capability, compiled by NVRTC; kept in the user's cache.

    Raises:
        BackendError: NVRTC is missing or refuses them.
    """
    source = resources.files(__package__).joinpath("kernels.cu").read_text(encoding="utf-8")
    try:
        program = core.Program(source, "c++", core.ProgramOptions(arch=f"sm_{capability.replace('.', '')}"))
        try:
            folder = cache.check_cache() / "kernels"
        except (BackendError, OSError):  # without a cache they are compiled each time
            return program.compile("cubin")
        with core.utils.FileStreamProgramCache(folder) as compiled:
            return program.compile("cubin", cache=compiled)
    except Exception as error:  # whatever CUDA's compiler and its loader raise
        raise BackendError(
            f"the kernels that make noise on the GPU cannot be compiled: {error}. Run: pip install "
            "'nvidia-cuda-nvrtc==13.*'"
        ) from None


def integers(*values: Any) -> list[np.uint64]:
    """Addresses and numbers as a kernel takes them."""
    return [np.uint64(value) for value in values]
