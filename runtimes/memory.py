"""A memory budget: how many examples may go through a graph at once, and the tiles if not even one may."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from vae_export.contract.model import GRAPHS, Cost, Model, SizeDim
from vae_export.errors import InputError
from vae_export.runtimes.tiling import Axis, Tile, can_tile, units

# The manifest counts the intermediate results that PyTorch needs at once. Backends fuse some of them away, but also
# keep copies in another layout, scratch memory for convolutions, and gaps between an arena's tensors.
SAFETY = 1.5

# With an overlap of a quarter, sizes in multiples of 4 of the latent's pixels give whole steps. A tile of fewer than 8
# is more overlap than picture.
_OVERLAP, _STEP, _LEAST = 0.25, 4, 8

_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")}}
_UNITS |= {f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")}

_GRAPHS = {"reconstruct": GRAPHS, "generate": ("decoder",), "score": GRAPHS}


def parse_bytes(value: Any) -> int:
    """A number of bytes from an integer or from text such as `512MiB`, `2GiB` or `1.5GB`; InputError if below 1."""
    size = 0
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())):
        size = int(float(match[1]) * _UNITS.get(match[2], 0))
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    if size < 1:
        raise InputError(
            f"load: max_memory is {value!r}; expected bytes, 1 or more, as an integer or as text such as '512MiB', "
            "'2GiB' or '1.5GB'"
        )
    return size


@functools.cache
def of_this_machine() -> int:
    """Bytes of memory that the machine has; the largest integer if that is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


class Budget:
    """Keeps the intermediate results of all calls together within a number of bytes.

    Attributes:
        limit: bytes.
        free: bytes that no call holds.
    """

    def __init__(self, limit: int, model: Model, costs: Mapping[str, Cost]) -> None:
        """Check that a budget of `limit` bytes is large enough for a model, of whose graphs the costs are given.

        Raises:
            InputError: a graph's cost is not known, or a model of fixed sizes needs more.
        """
        self.limit = limit
        self.free = limit
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()  # one for each waiting call, first come, first served
        self._model = model
        self._costs = costs
        if missing := {"encoder", "decoder"} - set(costs):
            raise InputError(
                f"load: max_memory needs to know what an example costs, and this bundle does not say it of the "
                f"{' and the '.join(sorted(missing))}. Export the model again, or drop max_memory"
            )
        if not model.data.named():
            for graph in ("encoder", "decoder"):
                self.at_least_one(graph, {})

    def rows(self, graph: str, sizes: Mapping[str, int]) -> int:
        """How many examples of these sizes may go through a graph at once; 0 where not even one may."""
        return self.limit // max(1, self._bytes(graph, sizes))

    @contextlib.contextmanager
    def held(self, graph: str, sizes: Mapping[str, int], rows: int) -> Iterator[None]:
        """A block that holds the memory of so many examples of a graph.

        It waits, in the order of calls, until the other calls leave enough free. A need above the limit takes all.
        """
        need = min(self.limit, rows * self._bytes(graph, sizes))
        with self._changed:
            ticket = object()
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and self.free >= need)
                self.free -= need
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.free += need
                self._changed.notify_all()

    def at_least_one(self, graph: str, sizes: Mapping[str, int]) -> int:
        """As `rows`, for examples that cannot be cut into tiles.

        Raises:
            InputError: not even one fits.
        """
        if rows := self.rows(graph, sizes):
            return rows
        shown = f" of {_sizes(sizes)}" if sizes else ""
        raise InputError(
            f"max_memory is {self.limit:,} bytes, and the {graph} needs {self._bytes(graph, sizes):,} for one "
            f"example{shown}, which cannot be cut into tiles here. Load with as much or more"
        )

    def tile(self, graph: str, sizes: Mapping[str, int]) -> Tile:
        """The largest tile that fits, for an example of these sizes, which does not.

        Raises:
            InputError: no tile fits, or the model has fixed sizes.
        """
        if not can_tile(self._model):
            self.at_least_one(graph, sizes)
        dims = [dim for dim, _ in units(self._model)]

        def part(count: int) -> dict[str, int]:
            """The sizes of the largest tile of `count` units of the latent's pixels."""
            return {dim.name: min(count * dim.multiple_of, sizes[dim.name]) for dim in dims}

        def allowed(dim: SizeDim, size: int) -> bool:
            """Whether the model takes the sizes of all tiles, also of those at the edge."""
            return all(map(dim.allows, Axis(sizes[dim.name], size, round(size * (1 - _OVERLAP)), 0, 0).parts))

        most = max(sizes[dim.name] // dim.multiple_of for dim in dims)
        for count in range(most // _STEP * _STEP, _LEAST - 1, -_STEP):
            height, width = (count * dim.multiple_of for dim in dims)
            if self.rows(graph, part(count)) and allowed(dims[0], height) and allowed(dims[1], width):
                return Tile((height, width), _OVERLAP)
        raise InputError(
            f"max_memory is {self.limit:,} bytes, and the {graph} needs {self._bytes(graph, part(_LEAST)):,} for the "
            f"smallest tile, of {_sizes(part(_LEAST))}. Load with as much or more"
        )

    def _bytes(self, graph: str, sizes: Mapping[str, int]) -> int:
        return max(math.ceil(SAFETY * self._costs[part].at(sizes)[1]) for part in _GRAPHS.get(graph, (graph,)))


def _sizes(sizes: Mapping[str, int]) -> str:
    return " and ".join(f"{name} {size}" for name, size in sizes.items())
