"""The protocols of backends: what opened graphs are run through, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vae_export.contract.build_record import ExecutionPlan
from vae_export.contract.choices import Precision
from vae_export.contract.model import Model
from vae_export.contract.onnx_guard import Arrays
from vae_export.contract.targets import Runner
from vae_export.numerics.noise import Normals

Array = npt.NDArray[np.float32]
#: An output of a graph: float32, or uint8 images; on the host, or a `gpu.DeviceArray`.
Result = Any
#: An input of a graph: an array of the host or of the GPU, or the address of noise, drawn where it is needed.
Value = Any


@dataclass(frozen=True)
class Settings:
    """How a backend runs its graphs. Results do not depend on it beyond rounding.

    Attributes:
        threads: inside one call on the CPU; None leaves it to the backend.
        lanes: on a GPU: how many calls run at once, each with a stream and buffers of its own; more calls wait.
        cuda_graphs: replay captured CUDA graphs; None does so with TensorRT where a graph can be captured.
    """

    threads: int | None = None
    lanes: int = 1
    cuda_graphs: bool | None = None


_PLAIN = ExecutionPlan(file="", runner="onnxruntime")


@dataclass(frozen=True)
class PlannedGraph:
    """A graph and how it runs on the CPU.

    Attributes:
        graph: serialized ONNX. Its bytes were verified, and its operators checked; no path is ever opened.
        plan: runner, precision, threads, and the batches that it is for; by default ONNX Runtime in float32, with as
            many threads as it takes, for all batches.
        arrays: weights that lie beside the graph, over verified bytes, which must stay.
    """

    graph: bytes
    plan: ExecutionPlan = _PLAIN
    arrays: Arrays = field(default_factory=Arrays)


def planned(graph: bytes, runner: Runner = "onnxruntime", precision: Precision = "fp32") -> PlannedGraph:
    """A graph that runs at all batches in the same way, with as many threads as the runner takes."""
    return PlannedGraph(graph, ExecutionPlan(file="", runner=runner, precision=precision))


class Backend(Protocol):
    """Graphs, opened from verified bytes, that run named inputs to named outputs.

    `run` may be called from many threads at once.
    """

    @property
    def graphs(self) -> frozenset[str]:
        """The names of its graphs: `encoder`, `decoder`, and in builds fused ones."""
        ...

    @property
    def on_gpu(self) -> bool:
        """Whether it is a `DeviceBackend`."""
        ...

    def run(
        self,
        graph: str,
        inputs: Mapping[str, Value],
        outputs: Sequence[str],
        micro_batch: int,
        *,
        out: Sequence[Result] | None = None,
    ) -> list[Result]:
        """Run a graph on a batch, cut into slices of at most `micro_batch` examples.

        Args:
            graph: its name.
            inputs: C-contiguous float32 arrays in native byte order, or `Normals`.
            outputs: names of the outputs to return.
            micro_batch: ≥ 1.
            out: C-contiguous, writable arrays of the host, one for each of `outputs`, of its result's shape and dtype,
                which share no memory with the inputs: the results are written there, and these arrays returned.

        Raises:
            BundleError: the graph fails in a node, or a result has another shape than the model says.
            BackendError: the runner fails, or the backend was closed.
        """
        ...

    def warm(self, graph: str, inputs: Mapping[str, Value], outputs: Sequence[str], micro_batch: int) -> None:
        """Run a graph once wherever later calls may run it: on a GPU in every lane. Arguments: see `run`."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What the graphs really run on: backend, version, device, provider, threads."""
        ...

    def release_memory(self) -> None:
        """Release the memory that is kept for later calls. It can run afterwards."""
        ...

    def close(self) -> None:
        """Release everything that the backend holds. It cannot run afterwards."""
        ...


class DeviceBackend(Backend, Protocol):
    """A backend on a GPU: it also takes arrays that lie there, and can leave results there."""

    def run(
        self,
        graph: str,
        inputs: Mapping[str, Value],
        outputs: Sequence[str],
        micro_batch: int,
        *,
        on_device: bool = False,
        out: Sequence[Result] | None = None,
    ) -> list[Result]:
        """See `Backend.run`. With `on_device`, which excludes `out`, results are `gpu.DeviceArray`s."""
        ...

    def draw(self, mean: Value, logvar: Value, eps: Normals) -> Result:
        """Compute mean + exp(½ logvar) · eps of arrays on the GPU, there."""
        ...


def slices(n: int, micro_batch: int) -> list[slice]:
    """A batch of n examples, cut into slices of at most `micro_batch`."""
    return [slice(first, min(first + micro_batch, n)) for first in range(0, n, micro_batch)]


def result_shape(model: Model, graph: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of each output of a graph for one example whose named dimensions have these sizes."""
    return model.tensor_shape(model.signature(graph)[1][0], 1, sizes)[1:]
