"""The protocol of all backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vae_export.contract.build_record import ExecutionPlan
from vae_export.contract.onnx_guard import Arrays
from vae_export.contract.targets import Precision, Runner
from vae_export.numerics.noise import Normals

Array = npt.NDArray[np.float32]
#: What a graph gives: float32, or uint8 images; on the host, or a `gpu.DeviceArray`.
Result = Any
#: What a graph takes: an array of the host or of the GPU, or noise that is to be made where it is needed.
Value = Any


@dataclass(frozen=True)
class Settings:
    """How a backend runs what it was given. Results do not depend on it.

    Attributes:
        micro_batch: the most examples that go through a graph at once.
        threads: inside one call on the CPU; None leaves it to the backend.
        lanes: on a GPU: how many calls run at once, each with a stream and buffers of its own; more calls wait.
        cuda_graphs: replay captured CUDA graphs; None does so with TensorRT where a graph can be captured.
    """

    micro_batch: int = 64
    threads: int | None = None
    lanes: int = 1
    cuda_graphs: bool | None = None


@dataclass(frozen=True)
class PlannedGraph:
    """A graph and how it runs on the CPU.

    Attributes:
        graph: serialized ONNX. Its bytes were verified, and its operators checked; no path is ever opened.
        plan: runner, precision, threads, and the batches that it is for.
        arrays: weights that lie beside the graph, over verified bytes, which must stay.
    """

    graph: bytes
    plan: ExecutionPlan
    arrays: Arrays = field(default_factory=Arrays)


def planned(
    graph: bytes, runner: Runner = "onnxruntime", precision: Precision = "fp32", arrays: Arrays | None = None
) -> PlannedGraph:
    """A graph that runs at all batches in the same way, with as many threads as the runner takes."""
    return PlannedGraph(graph, ExecutionPlan(file="", runner=runner, precision=precision), arrays or Arrays())


class Backend(Protocol):
    """Graphs, opened from verified bytes, that run named inputs to named outputs.

    `run` may be called from many threads at once.
    """

    @property
    def graphs(self) -> frozenset[str]:
        """The names of the graphs that it has: `encoder`, `decoder`, and in builds fused ones."""
        ...

    @property
    def on_gpu(self) -> bool:
        """Whether it takes arrays that lie on the GPU, and can leave results there."""
        ...

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
        """Run a graph on a batch, cut into slices of at most `micro_batch` examples.

        Args:
            graph: its name.
            inputs: C-contiguous float32 arrays of this machine's byte order; `Normals`; or, where `on_gpu`, arrays of
                the GPU.
            outputs: which outputs are wanted.
            micro_batch: ≥ 1.
            on_device: leave the results on the GPU.
            out: C-contiguous, writable arrays of the host, one for each of `outputs`, of its result's shape and dtype,
                which share no memory with the inputs: the results are written there, and these arrays returned. Not
                with on_device.
        """
        ...

    def warm(self, graph: str, inputs: Mapping[str, Value], outputs: Sequence[str], micro_batch: int) -> None:
        """Run a graph once wherever later calls may run it: on a GPU in every lane. Arguments: see `run`."""
        ...

    def draw(self, mean: Value, logvar: Value, eps: Normals) -> Result:
        """Mean + exp(½ logvar) · eps of arrays on the GPU, there. Only where `on_gpu`."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What the graphs really run on: backend, version, device, provider, threads."""
        ...

    def release_memory(self) -> None:
        """Give back what is kept for later calls. It can run afterwards."""
        ...

    def close(self) -> None:
        """Give back what the backend holds. It cannot run afterwards."""
        ...


def slices(n: int, micro_batch: int) -> list[slice]:
    """A batch of n examples, cut."""
    return [slice(first, min(first + micro_batch, n)) for first in range(0, n, micro_batch)]
