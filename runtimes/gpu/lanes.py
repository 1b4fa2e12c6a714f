"""Lanes: what all backends on a GPU share.

Anything with a fixed address belongs to a lane: a stream, buffers, pinned staging, and what was prepared on them.
One call at a time uses a lane; calls queue for one. Order on the GPU is kept by streams and events alone: the host
waits only for results that it is to hold, and before it writes again into memory that a copy still reads.
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
_PLANS = 32  # prepared shapes that a lane keeps


class Executor(Protocol):
    """What runs graphs in one lane: engines' contexts or sessions, on the lane's stream."""

    def rows(self, graph: str, n: int, sizes: Mapping[str, int]) -> int:
        """At how many rows a batch of n examples of these sizes runs: n or more.

        Raises:
            InputError: it takes no such shape.
        """
        ...

    def prepare(self, graph: str, ends: Mapping[str, tuple[int, Shape]]) -> Callable[[], None]:
        """What runs a graph once, on inputs and outputs at these addresses and of these shapes.

        The addresses hold as long as it is used. What is in them now may be overwritten.
        """
        ...

    def close(self) -> None:
        """Give back what it holds. The lane's stream is idle."""
        ...


@dataclass(frozen=True)
class _Place:
    """Where a plan has an input or output: its address, one example's shape, its dtype, one example's bytes."""

    address: int
    example: Shape
    dtype: np.dtype[Any]
    row: int


@dataclass(frozen=True)
class _Plan:
    """What runs a graph on one shape, and where its inputs and outputs are."""

    places: Mapping[str, _Place]
    launch: Callable[[], None]


_Source = npt.NDArray[np.float32] | Normals | int


class Lane:
    """One stream, its memory, and what was prepared on it. One call at a time uses it.

    Attributes:
        gpu: the device.
        model: what the graphs take and give.
        stream: on which everything of this lane runs, in order.
    """

    def __init__(self, gpu: Gpu, model: Model, make: Callable[[Lane], Executor]) -> None:
        """Make a lane, and in it what runs graphs."""
        self.gpu = gpu
        self.model = model
        gpu.use()
        self.stream = gpu.device.create_stream()
        self._arena: Any = None  # inputs and outputs of the graph that runs
        self._pinned: dict[str, Any] = {}  # in: what is copied to the GPU; out: what was copied from it
        self._unread: Any = None  # an event: until it is over, a copy may read the pinned inputs
        self._held: deque[tuple[Any, Sequence[Any]]] = deque()  # arrays of others, until an event is over
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
        """See `Backend.run`."""
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
                places = [plan.places[name] for name in outputs]
                if not results and on_device:
                    results = [self.gpu.allocate(n * place.row, self.stream) for place in places]
                elif not results:
                    results = [np.empty((n, *place.example), place.dtype) for place in places]
                if on_device:
                    for result, place in zip(results, places, strict=True):
                        at, size = rows.start * place.row, (rows.stop - rows.start) * place.row
                        self.gpu.copy(int(result.handle) + at, place.address, size, self.stream)
                else:
                    self._fetch([result[rows] for result in results], [place.address for place in places])
        except InputError:  # a shape or a seed that is refused, while what was begun still reads what was borrowed
            self.stream.sync()
            raise
        if not on_device:
            return results
        ready = self._ready(borrowed)
        return [
            DeviceArray(self.gpu, result, (n, *place.example), place.dtype, ready)
            for result, place in zip(results, places, strict=True)
        ]

    def draw(self, mean: DeviceArray, logvar: DeviceArray, eps: Normals) -> DeviceArray:
        """See `Backend.draw`."""
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
        """Where an input comes from: an array of the host, noise, or an address on the GPU that is ready for us."""
        if isinstance(value, (np.ndarray, Normals)):
            return value
        if isinstance(value, DeviceArray):  # no export: who frees it, and in which order, stays as it is
            self.stream.wait(value.ready)
            borrowed.append(value)
            return value.address
        # The stream is told to the array's owner, who makes it wait until the array is complete.
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
        """What runs a graph on n examples, prepared when it is first asked for."""
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
        ends = {name: (base + offset, shape) for name, (offset, shape, _) in offsets.items()}
        places = {
            name: _Place(base + offset, shape[1:], dtype, math.prod(shape[1:]) * dtype.itemsize)
            for name, (offset, shape, dtype) in offsets.items()
        }
        self._plans[key] = _Plan(places, self._executor.prepare(graph, ends))
        if len(self._plans) > _PLANS:
            self.stream.sync()
            self._plans.popitem(last=False)
        return self._plans[key]

    def _grow(self, size: int) -> None:
        """A larger arena; what was prepared on the old one's addresses goes."""
        self.stream.sync()
        before = self._arena.size if self._arena else 0
        self._plans.clear()
        if self._arena:
            self._arena.close(self.stream)
            self._arena = None
        self._arena = self.gpu.allocate(max(size, min(2 * before, before + (64 << 20))), self.stream)

    def _fill(self, sources: Mapping[str, _Source], rows: slice, plan: _Plan) -> None:
        """Bring some rows of the inputs to where the graph reads them."""
        staged, used = [], 0
        for name, source in sources.items():
            place = plan.places[name]
            size = (rows.stop - rows.start) * place.row
            if isinstance(source, Normals):
                self.gpu.normals(place.address, source[rows], self.stream)
            elif isinstance(source, int):
                self.gpu.copy(place.address, source + rows.start * place.row, size, self.stream)
            else:
                staged.append((place.address, source[rows], used, size))
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
        """An event for all work so far. Until it is over, what was borrowed is kept, and where others have it, too,
        their default stream waits.
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
        """Give memory back, and whatever was prepared on it. The lane can be used again."""
        with contextlib.suppress(Exception):  # after a failure of CUDA nothing may work any more
            self.stream.sync()
        self._plans.clear()
        self._held.clear()
        self._pinned.clear()
        self._unread = None
        if self._arena:
            self._arena.close(self.stream)
            self._arena = None

    def close(self) -> None:
        """Give everything back, once the work that was begun is done."""
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
        """Make the lanes.

        Args:
            gpu: the device.
            model: what the graphs take and give.
            graphs: their names.
            make: what runs graphs in a lane.
            settings: how many lanes.
            largest_batch: that a graph takes at once; None for any.
            facts: for `describe`.
            closing: called when the lanes are closed.
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
        except Exception as error:  # what was made must not keep its memory until it is collected
            self._end(lanes)
            raise error if isinstance(error, VaeExportError) else gpu.failure(error, "a lane") from error
        self._count = len(lanes)
        self._warming = threading.Lock()  # two that hold some lanes each would wait for each other
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
        """See `Backend.run`."""
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
        """See `Backend.draw`."""
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
        """Wait for the calls that run, and give memory back. Calls that wait for a lane are refused."""
        if lanes := self._pool.close():
            self._end(lanes)

    def _end(self, lanes: list[Lane]) -> None:
        """Close what there is. After a failure of CUDA nothing may work any more, and nothing more is to be done."""
        steps: list[Callable[[], None]] = [lane.close for lane in lanes]
        lanes.clear()
        for step in (*steps, self._closing, self._gpu.close):
            with contextlib.suppress(Exception):
                step()


class _Pool:
    """Lanes, given out in the order in which they are asked for."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._free = list(lanes)
        self._count = len(lanes)
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()  # who asks, the first one first
        self._closed = False

    def take(self) -> Lane:
        """A lane, for this caller alone.

        Raises:
            BackendError: the lanes were closed.
        """
        with self._changed:
            place = object()
            self._waiting.append(place)
            try:
                self._changed.wait_for(lambda: self._closed or (self._free and self._waiting[0] is place))
                if self._closed:
                    raise BackendError("this VAE was closed; load the bundle again")
                return self._free.pop()
            finally:
                self._waiting.remove(place)
                self._changed.notify_all()

    def give(self, lane: Lane) -> None:
        """A lane back."""
        with self._changed:
            self._free.append(lane)
            self._changed.notify_all()

    def close(self) -> list[Lane]:
        """All lanes, once each is back; none the second time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._free) == self._count)
            self._count = 0
            lanes, self._free = self._free, []
            return lanes


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether an array is C-contiguous. Along a dimension of size 1 a stride says nothing, and libraries differ."""
    return all(
        size == 1 or stride == math.prod(shape[axis + 1 :])
        for axis, (size, stride) in enumerate(zip(shape, strides, strict=True))
    )


def _host(pinned: Any, size: int) -> npt.NDArray[np.uint8]:
    """Pinned memory as bytes."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(pinned.handle)))


def bucket(n: int) -> int:
    """At how many examples a batch of n runs where every number of them costs a captured graph: 1, 2, 4 or a
    multiple of 8, so that few graphs serve all and at most 7 examples are computed in vain.
    """
    return next((few for few in (1, 2, 4) if n <= few), -(-n // 8) * 8)
