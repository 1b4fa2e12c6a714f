"""The protocol of all backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


class Backend(Protocol):
    """Graphs, opened from verified bytes, that run named inputs to named outputs.

    `run` may be called from many threads at once.
    """

    def run(self, graph: str, inputs: dict[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run `encoder` or `decoder` on C-contiguous float32 arrays of this machine's byte order."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What the graphs really run on: backend, version, device, provider, threads."""
        ...

    def close(self) -> None:
        """Give back what the backend holds. It cannot run afterwards."""
        ...
