"""The protocol of all backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vae_export.noise import Normals

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
    ) -> list[Result]:
        """Run a graph on a batch, cut into slices of at most `micro_batch` examples.

        Args:
            graph: its name.
            inputs: C-contiguous float32 arrays of this machine's byte order; `Normals`; or, where `on_gpu`, arrays of
                the GPU.
            outputs: which outputs are wanted.
            micro_batch: ≥ 1.
            on_device: leave the results on the GPU.
        """
        ...

    def draw(self, mean: Value, logvar: Value, eps: Normals) -> Result:
        """Mean + exp(½ logvar) · eps of arrays on the GPU, there. Only where `on_gpu`."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What the graphs really run on: backend, version, device, provider, threads."""
        ...

    def close(self) -> None:
        """Give back what the backend holds. It cannot run afterwards."""
        ...


def slices(n: int, micro_batch: int) -> list[slice]:
    """A batch of n examples, cut."""
    return [slice(first, min(first + micro_batch, n)) for first in range(0, n, micro_batch)]
