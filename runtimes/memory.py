"""A budget for memory: how many examples may go through a graph at once, and in which tiles where not even one may."""

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
# keep copies in another layout, scratch for convolutions, and gaps between what an arena has given out.
SAFETY = 1.5

# Tiles of a quarter's overlap: sizes in multiples of 4 of the latent's pixels give whole steps. Below 8 of them a
# tile is more edge than picture.
_OVERLAP, _STEP, _LEAST = 0.25, 4, 8

_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")}}
_UNITS |= {f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")}

_GRAPHS = {"reconstruct": GRAPHS, "generate": ("decoder",), "score": GRAPHS}


def parse_bytes(value: Any) -> int:
    """A number of bytes from an integer or from text such as `512MiB`, `2GiB` or `1.5GB`.

    Raises:
        InputError: it is neither, or below 1 byte.
    """
    size = 0
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())):
        size = int(float(found[1]) * _UNITS.get(found[2], 0))
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
    """Bytes of memory that the machine has; without a bound where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


class Budget:
    """How the intermediate results of all calls together are kept within some bytes."""

    def __init__(self, limit: int, model: Model, costs: Mapping[str, Cost]) -> None:
        """Check that it can be kept.

        Args:
            limit: bytes.
            model: whose graphs they are.
            costs: of the encoder and the decoder.

        Raises:
            InputError: a graph's cost is not known, or a model of fixed sizes needs more.
        """
        self.limit = limit
        self._free = limit
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()  # who asks, the first one first
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
        """What so many examples need, taken from the budget for as long as they are in a graph.

        Calls of other threads that find too little left wait, in the order in which they came. More than there is
        counts as all.
        """
        need = min(self.limit, rows * self._bytes(graph, sizes))
        with self._changed:
            place = object()
            self._waiting.append(place)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is place and self._free >= need)
                self._free -= need
            finally:
                self._waiting.remove(place)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += need
                self._changed.notify_all()

    def at_least_one(self, graph: str, sizes: Mapping[str, int]) -> int:
        """The same, where examples are not cut into tiles.

        Raises:
            InputError: not even one may.
        """
        if rows := self.rows(graph, sizes):
            return rows
        shown = f" of {_sizes(sizes)}" if sizes else ""
        raise InputError(
            f"max_memory is {self.limit:,} bytes, and the {graph} needs {self._bytes(graph, sizes):,} for one "
            f"example{shown}, which cannot be cut into tiles here. Load with as much or more"
        )

    def tile(self, graph: str, sizes: Mapping[str, int]) -> Tile:
        """The largest tile that fits.

        Args:
            graph: `encoder` or `decoder`.
            sizes: of one example that does not fit.

        Raises:
            InputError: none fits, or the model has fixed sizes.
        """
        if not can_tile(self._model):
            self.at_least_one(graph, sizes)
        dims = [dim for dim, _ in units(self._model)]

        def part(count: int) -> dict[str, int]:
            """The largest tile's sizes."""
            return {dim.name: min(count * dim.multiple_of, sizes[dim.name]) for dim in dims}

        def allowed(dim: SizeDim, size: int) -> bool:
            """Whether the model takes all tiles, also those at the edge."""
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
