"""Lanes, which all backends on a GPU share.

Everything with a fixed address belongs to a lane: a stream, buffers, pinned staging memory, and plans that use them.
One call at a time uses a lane; calls queue for one. Streams and events alone keep order on the GPU: the host waits only
for results that it returns, and before it overwrites memory that a copy still reads. A shape has one execution context,
which never changes, because a captured graph holds its state.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vae_export.contract.model import Model
from vae_export.errors import BackendError, InputError, VaeExportError
from vae_export.numerics.noise import Normals
from vae_export.runtimes.backend import Settings, Value, slices
from vae_export.runtimes.gpu.device import LEGACY, DeviceArray, Gpu, Shape, integers

_ALIGNMENT = 256
_PLANS = 32  # shapes whose plans a lane keeps


class Executor(Protocol):
    """Runs graphs in one lane: engines' contexts or sessions, on the lane's stream."""

    def rows(self, graph: str, n: int, sizes: Mapping[str, int]) -> int:
        """The number of rows, n or more, at which a batch of n examples of these sizes runs.

        Raises:
            InputError: it does not accept the shape.
        """
        ...

    def prepare(self, graph: str, tensors: Mapping[str, tuple[int, Shape]]) -> Callable[[], None]:
        """A function that runs a graph once, on inputs and outputs at these addresses and of these shapes.

        The addresses stay valid for as long as it is used. Their content now may be overwritten.
        """
        ...

    def close(self) -> None:
        """Release what it holds. The lane's stream is idle."""
        ...


@dataclass(frozen=True)
class _Buffer:
    """An input or output of a plan: its address, one example's shape, its dtype, one example's bytes."""

    address: int
    example: Shape
    dtype: np.dtype[Any]
    row: int


@dataclass(frozen=True)
class _Plan:
    """The function that runs a graph on one shape, and its inputs and outputs."""

    buffers: Mapping[str, _Buffer]
    launch: Callable[[], None]


_Source = npt.NDArray[np.float32] | Normals | int


class Lane:
    """One stream, its memory, and its plans. One call at a time uses it.

    Attributes:
        gpu: the device.
        model: the inputs and outputs of the graphs.
        stream: everything of this lane runs on it, in order.
    """

    def __init__(self, gpu: Gpu, model: Model, make: Callable[[Lane], Executor]) -> None:
        """Create the stream, and the executor of graphs."""
        self.gpu = gpu
        self.model = model
        gpu.use()
        self.stream = gpu.device.create_stream()
        self._arena: Any = None  # inputs and outputs of the graph that runs
        self._pinned: dict[str, Any] = {}  # in: copied to the GPU; out: copied from it
        self._unread: Any = None  # an event: until then a copy may read the pinned inputs
        self._held: deque[tuple[Any, Sequence[Any]]] = deque()  # borrowed arrays, until an event
        self._plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()
        self._named = bool(model.data.named())
        try:
            self._executor = make(self)
        except BaseException:
            self.stream.close()
            raise

    def run(
        self,
        graph: str,
        inputs: Mapping[str, Value],
        outputs: Sequence[str],
        micro_batch: int,
        on_device: bool,
        out: Sequence[Any] | None = None,
    ) -> list[Any]:
        """See `DeviceBackend.run`."""
        self.gpu.use()
        n, *example = next(iter(inputs.values())).shape
        sizes = self.model.input_sizes(graph, tuple(example)) if self._named else {}
        borrowed: list[Any] = []
        sources = {name: self._source(name, value, borrowed) for name, value in inputs.items()}
        results = [] if out is None else list(out)  # memory of the GPU, or arrays of the host
        try:
            for rows in slices(n, micro_batch):
                plan = self._plan(graph, rows.stop - rows.start, sizes)
                self._fill(sources, rows, plan)
                plan.launch()
                buffers = [plan.buffers[name] for name in outputs]
                if not results and on_device:
                    results = [self.gpu.allocate(n * buffer.row, self.stream) for buffer in buffers]
                elif not results:
                    results = [np.empty((n, *buffer.example), buffer.dtype) for buffer in buffers]
                if on_device:
                    for result, buffer in zip(results, buffers, strict=True):
                        at, size = rows.start * buffer.row, (rows.stop - rows.start) * buffer.row
                        self.gpu.copy(int(result.handle) + at, buffer.address, size, self.stream)
                else:
                    self._fetch([result[rows] for result in results], [buffer.address for buffer in buffers])
        except InputError:  # a refused shape or seed; launched work may still read borrowed arrays
            self.stream.sync()
            raise
        if not on_device:
            return results
        ready = self._ready(borrowed)
        return [
            DeviceArray(self.gpu, result, (n, *buffer.example), buffer.dtype, ready)
            for result, buffer in zip(results, buffers, strict=True)
        ]

    def draw(self, mean: DeviceArray, logvar: DeviceArray, eps: Normals) -> DeviceArray:
        """See `DeviceBackend.draw`."""
        self.gpu.use()
        count = math.prod(mean.shape)
        target = self.gpu.allocate(mean.nbytes, self.stream)
        borrowed: list[Any] = []
        z = int(target.handle)
        mean_at, logvar_at = (self._source("posterior", part, borrowed) for part in (mean, logvar))
        self.gpu.normals(z, eps, self.stream)
        self.gpu.launch("vae_reparameterize", self.stream, count, *integers(z, mean_at, logvar_at, z, count))
        return DeviceArray(self.gpu, target, mean.shape, mean.dtype, self._ready(borrowed))

    def _source(self, name: str, value: Value, borrowed: list[Any]) -> _Source:
        """The source of an input: an array of the host, noise, or an address on the GPU whose content is complete."""
        if isinstance(value, (np.ndarray, Normals)):
            return value
        if isinstance(value, DeviceArray):  # not exported: the order in which it is freed stays the same
            self.stream.wait(value.ready)
            borrowed.append(value)
            return value.address
        # The array's owner is given the stream, and makes it wait until the array is complete.
        try:
            view = self.gpu.views.from_any_interface(value, stream_ptr=int(self.stream.handle))
        except Exception as error:  # another library's export, which may raise anything
            raise InputError(f"{name} is a {type(value).__name__} that CUDA cannot take: {error}") from None
        if view.device_id != self.gpu.index:
            raise InputError(f"{name} lies on device {view.device_id}; this VAE runs on device {self.gpu.index}")
        if view.strides is not None and not _is_contiguous(view.shape, view.strides):
            raise InputError(f"{name} is not contiguous on the GPU; pass {name}.contiguous() or a copy")
        borrowed.append(view)
        return int(view.ptr)

    def _plan(self, graph: str, n: int, sizes: Mapping[str, int]) -> _Plan:
        """The plan that runs a graph on n examples, prepared at its first use."""
        rows = self._executor.rows(graph, n, sizes)
        key = (graph, rows, *sizes.items())
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        offsets, total = {}, 0
        for tensor in (*self.model.signature(graph)[0], *self.model.signature(graph)[1]):
            shape, dtype = self.model.tensor_shape(tensor, rows, sizes), np.dtype(tensor.dtype)
            offsets[tensor.name] = total, shape, dtype
            total += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if self._arena is None or self._arena.size < total:
            self._grow(total)
        base = int(self._arena.handle)
        tensors = {name: (base + offset, shape) for name, (offset, shape, _) in offsets.items()}
        buffers = {
            name: _Buffer(base + offset, shape[1:], dtype, math.prod(shape[1:]) * dtype.itemsize)
            for name, (offset, shape, dtype) in offsets.items()
        }
        self._plans[key] = _Plan(buffers, self._executor.prepare(graph, tensors))
        if len(self._plans) > _PLANS:
            self.stream.sync()
            self._plans.popitem(last=False)
        return self._plans[key]

    def _grow(self, size: int) -> None:
        """Replace the arena by a larger one; the plans on its addresses are dropped."""
        self.stream.sync()
        before = self._arena.size if self._arena else 0
        self._plans.clear()
        if self._arena:
            self._arena.close(self.stream)
            self._arena = None
        self._arena = self.gpu.allocate(max(size, min(2 * before, before + (64 << 20))), self.stream)

    def _fill(self, sources: Mapping[str, _Source], rows: slice, plan: _Plan) -> None:
        """Copy or draw some rows of the inputs to the addresses that the graph reads."""
        staged, used = [], 0
        for name, source in sources.items():
            buffer = plan.buffers[name]
            size = (rows.stop - rows.start) * buffer.row
            if isinstance(source, Normals):
                self.gpu.normals(buffer.address, source[rows], self.stream)
            elif isinstance(source, int):
                self.gpu.copy(buffer.address, source + rows.start * buffer.row, size, self.stream)
            else:
                staged.append((buffer.address, source[rows], used, size))
                used += size
        if staged:
            if self._unread is not None:
                self._unread.sync()
            pinned = self._staging("in", used)
            memory = _host(pinned, used)
            for address, part, offset, size in staged:
                memory[offset : offset + size] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
                self.gpu.copy(address, int(pinned.handle) + offset, size, self.stream)
            self._unread = self.stream.record()

    def _ready(self, borrowed: Sequence[Any]) -> Any:
        """An event for all work so far. Until then, borrowed arrays are kept, and the default stream waits if other
        libraries have them, too.
        """
        ready = self.stream.record()
        while self._held and self._held[0][0].is_done:
            self._held.popleft()
        if borrowed:
            self._held.append((ready, borrowed))
            if not all(isinstance(array, DeviceArray) and not array.shared for array in borrowed):
                self.gpu.stream(LEGACY).wait(ready)
        return ready

    def _fetch(self, targets: Sequence[npt.NDArray[Any]], addresses: Sequence[int]) -> None:
        """Copy results to the host and wait for them."""
        pinned = self._staging("out", sum(target.nbytes for target in targets))
        used = 0
        for target, address in zip(targets, addresses, strict=True):
            self.gpu.copy(int(pinned.handle) + used, address, target.nbytes, self.stream)
            used += target.nbytes
        self.stream.sync()
        memory, used = _host(pinned, used), 0
        for target in targets:
            target.reshape(-1).view(np.uint8)[:] = memory[used : used + target.nbytes]
            used += target.nbytes

    def _staging(self, which: str, size: int) -> Any:
        if which not in self._pinned or self._pinned[which].size < size:
            self.stream.sync()
            self._pinned.pop(which, None)
            self._pinned[which] = self.gpu.pinned(size)
        return self._pinned[which]

    def reset(self) -> None:
        """Release memory and plans. The lane can be used again."""
        with contextlib.suppress(Exception):  # after a failure of CUDA every call may fail
            self.stream.sync()
        self._plans.clear()
        self._held.clear()
        self._pinned.clear()
        self._unread = None
        if self._arena:
            self._arena.close(self.stream)
            self._arena = None

    def close(self) -> None:
        """Release everything, once the launched work is done."""
        self.gpu.use()
        self.reset()
        self._executor.close()
        self.stream.close()


class GpuBackend:
    """Graphs on a GPU: calls from many threads queue for its lanes."""

    on_gpu = True

    def __init__(
        self,
        gpu: Gpu,
        model: Model,
        graphs: Sequence[str],
        make: Callable[[Lane], Executor],
        settings: Settings,
        largest_batch: int | None,
        facts: Mapping[str, Any],
        closing: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the lanes, as many as the settings say.

        `make` creates the executor of a lane, `largest_batch` is the largest that a graph takes at once (None for any),
        `facts` are for `describe`, and `closing` is called after the lanes are closed.
        """
        self.graphs = frozenset(graphs)
        self._gpu = gpu
        self._largest = largest_batch
        self._facts = {**facts, "device": "cuda", "gpu": gpu.name, "lanes": settings.lanes}
        self._closing = closing
        lanes: list[Lane] = []
        try:
            for _ in range(settings.lanes):
                lanes.append(Lane(gpu, model, make))
        except Exception as error:  # otherwise the lanes so far keep their memory until they are collected
            self._end(lanes)
            raise error if isinstance(error, VaeExportError) else gpu.failure(error, "a lane") from error
        self._count = len(lanes)
        self._warming = threading.Lock()  # two calls that hold some lanes each would wait for each other
        self._pool = _Pool(lanes)

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
        """See `DeviceBackend.run`."""
        with self._lane(graph) as lane:
            return lane.run(graph, inputs, outputs, self._at_once(micro_batch), on_device, out)

    def warm(self, graph: str, inputs: Mapping[str, Value], outputs: Sequence[str], micro_batch: int) -> None:
        """See `Backend.warm`: in all lanes, held at once, so that none is warmed twice."""
        with self._warming, contextlib.ExitStack() as stack:
            lanes = [stack.enter_context(self._lane(graph)) for _ in range(self._count)]
            for lane in lanes:
                lane.run(graph, inputs, outputs, self._at_once(micro_batch), on_device=False)

    def release_memory(self) -> None:
        """See `Backend.release_memory`: in all lanes, each when no call uses it."""
        with self._warming, contextlib.ExitStack() as stack:
            for lane in [stack.enter_context(self._lane("release of memory")) for _ in range(self._count)]:
                self._gpu.use()
                lane.reset()

    def _at_once(self, micro_batch: int) -> int:
        return min(micro_batch, self._largest or micro_batch)

    def draw(self, mean: Value, logvar: Value, eps: Normals) -> DeviceArray:
        """See `DeviceBackend.draw`."""
        with self._lane("draw from the posterior") as lane:
            return lane.draw(mean, logvar, eps)

    @contextlib.contextmanager
    def _lane(self, what: str) -> Iterator[Lane]:
        lane = self._pool.take()
        try:
            yield lane
        except InputError:
            raise
        except (KeyboardInterrupt, SystemExit):
            lane.reset()
            raise
        except Exception as error:  # cuda.core's, TensorRT's and ONNX Runtime's errors have no common base
            lane.reset()
            raise self._gpu.failure(error, f"the {what}") from error
        finally:
            self._pool.give(lane)

    def describe(self) -> dict[str, Any]:
        """What the graphs run on."""
        return dict(self._facts)

    def close(self) -> None:
        """Wait for the running calls, and release memory. Calls that wait for a lane are refused."""
        if lanes := self._pool.close():
            self._end(lanes)

    def _end(self, lanes: list[Lane]) -> None:
        """Close the lanes and the GPU. After a failure of CUDA each step may fail, and no error is of use."""
        steps: list[Callable[[], None]] = [lane.close for lane in lanes]
        lanes.clear()
        for step in (*steps, self._closing, self._gpu.close):
            with contextlib.suppress(Exception):
                step()


class _Pool:
    """Lanes, first come, first served."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._free = list(lanes)
        self._count = len(lanes)
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()  # one for each waiting call, in order
        self._closed = False

    def take(self) -> Lane:
        """A lane, for this caller alone.

        Raises:
            BackendError: the lanes were closed.
        """
        with self._changed:
            ticket = object()
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._closed or (self._free and self._waiting[0] is ticket))
                if self._closed:
                    raise BackendError("this VAE was closed; load the bundle again")
                return self._free.pop()
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def give(self, lane: Lane) -> None:
        """Return a lane."""
        with self._changed:
            self._free.append(lane)
            self._changed.notify_all()

    def close(self) -> list[Lane]:
        """All lanes, once each was returned; none at the second call."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._free) == self._count)
            self._count = 0
            lanes, self._free = self._free, []
            return lanes


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether an array is C-contiguous. Strides of dimensions of size 1 are arbitrary: libraries differ."""
    return all(
        size == 1 or stride == math.prod(shape[axis + 1 :])
        for axis, (size, stride) in enumerate(zip(shape, strides, strict=True))
    )


def _host(pinned: Any, size: int) -> npt.NDArray[np.uint8]:
    """Pinned memory as bytes."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(pinned.handle)))


def bucket(n: int) -> int:
    """The number of examples at which a batch of n runs where each number needs a captured graph: 1, 2, 4 or a
    multiple of 8, so that few graphs serve all batches and at most 7 examples are wasted.
    """
    return next((few for few in (1, 2, 4) if n <= few), -(-n // 8) * 8)
