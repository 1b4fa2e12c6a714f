"""Images larger than memory: a graph runs on overlapping tiles, and its results are blended where they overlap.

The semantics are those of diffusers' `AutoencoderKL` with `enable_tiling()`: see `Tile`.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from vae_export.contract.manifest import Tiled
from vae_export.contract.model import LatentDim, Model, SizeDim
from vae_export.errors import InputError, TileWarning
from vae_export.runtimes.backend import Array


@dataclass(frozen=True)
class Tile:
    """How an image is cut.

    Tiles lie on a grid whose step is `size` less the overlap; those at the right and at the bottom are smaller. Each
    is blended linearly with the blended tile above and then with the one to the left. That is what diffusers'
    `AutoencoderKL` does for `tile_sample_min_size=size` and `tile_overlap_factor=overlap`, and the results agree to
    float32's rounding. All models are tiled so, also `AutoencoderTiny`, whose own tiling blends otherwise. A tile does
    not see beyond its edges: results differ from untiled ones, less with larger tiles.

    Attributes:
        size: of a tile, in pixels of the data: one number for both directions, or (height, width). A multiple of the
            factor by which the model reduces sizes to the latent's.
        overlap: the share of a tile that its neighbour repeats, 0 ≤ overlap < 1.

    Raises:
        InputError: size or overlap is no such number.
    """

    size: int | tuple[int, int]
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if not (isinstance(self.overlap, (int, float, np.number)) and 0 <= self.overlap < 1):
            raise InputError(f"tile: overlap is {self.overlap!r}; expected a number from 0 on that is below 1")
        try:
            height, width = self.pixels
        except (TypeError, ValueError):
            height = width = 0
        if min(height, width) < 1:
            raise InputError(
                f"tile: size is {self.size!r}; expected pixels of the data, 1 or more: an integer or (height, width)"
            )

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.size if isinstance(self.size, (tuple, list)) else (self.size, self.size)
        return operator.index(height), operator.index(width)


#: Differences above so many levels of 255 are visible.
VISIBLE = 8.0


class Seams:
    """Warns, once for each graph, of visible differences that the export measured between tiled and untiled results."""

    def __init__(self, measured: Mapping[str, Tiled]) -> None:
        """Arguments: the measurements by graph, where there are any."""
        self._pending = {graph: one for graph, one in measured.items() if one.worst > VISIBLE}
        #: For `VAE.describe`: the visible differences, by graph.
        self.facts = {graph: str(one) for graph, one in self._pending.items()}

    def warn(self, graph: str) -> None:
        """Warn if this is the first call for a graph with visible differences. Thread-safe."""
        if self._pending.pop(graph, None):
            warnings.warn(
                f"tile: the {graph} sees more of a picture than a tile has: {self.facts[graph]}, as measured at the "
                "export. Leave tile and max_memory out, or use larger tiles, where that matters",
                TileWarning,
                stacklevel=2,
            )


#: A tile as an argument: its size alone, or a `Tile`.
TileLike = int | tuple[int, int] | Tile


def tile_of(tile: TileLike | None) -> Tile | None:
    """A `Tile` from an argument. Errors as for `Tile`."""
    return tile if tile is None or isinstance(tile, Tile) else Tile(tile)


@dataclass(frozen=True)
class Axis:
    """The tiles along one direction of an image, for one graph.

    Attributes:
        length: of the input.
        tile: length of the largest tile of the input.
        step: from the start of a tile of the input to that of the next.
        blend: over how many values two tiles of the output are blended.
        limit: how many values of a tile of the output are kept: the next tile begins there.
    """

    length: int
    tile: int
    step: int
    blend: int
    limit: int

    @property
    def starts(self) -> range:
        """Where tiles begin in the input."""
        return range(0, self.length, self.step)

    @property
    def parts(self) -> list[int]:
        """The lengths of the input's tiles."""
        return [min(self.tile, self.length - start) for start in self.starts]


def can_tile(model: Model) -> bool:
    """Whether a model takes images of other heights and widths, whose latents follow both."""
    data, latent = model.data.shape[1:], model.latent.shape[1:]
    return (
        len(data) == len(latent) == 2
        and all(isinstance(dim, SizeDim) for dim in data)
        and [dim.name for dim in data if isinstance(dim, SizeDim)]
        == [dim.name for dim in latent if isinstance(dim, LatentDim)]
    )


def units(model: Model) -> list[tuple[SizeDim, int]]:
    """Height and width of a model that `can_tile`, each with the factor by which the latent is smaller."""
    dims = (dim for dim in model.data.shape if isinstance(dim, SizeDim))
    return list(zip(dims, (dim.divided_by for dim in model.latent.shape if isinstance(dim, LatentDim)), strict=True))


def grid(model: Model, graph: str, example: tuple[int, ...], tile: Tile) -> tuple[Axis, Axis] | None:
    """The tiles of one example.

    Args:
        model: the model of the graph.
        graph: `encoder` or `decoder`.
        example: (C, H, W), the shape of one example of the input.
        tile: how to cut.

    Returns:
        The tiles down and across; None for an image that is larger than a tile in neither direction: it is not cut.

    Raises:
        InputError: the model has fixed sizes or does not take a tile's, or the overlap does not suit it.
    """
    if not can_tile(model):
        raise InputError(
            "tile: this model takes no other height and width than its own, so that its images cannot be cut into "
            "tiles. Drop tile, or export the model with named sizes"
        )
    dims = units(model)
    for (dim, _), size in zip(dims, tile.pixels, strict=True):
        if size % dim.multiple_of:
            raise InputError(
                f"tile: size is {tile.size}; expected a {dim.name} that is a multiple of {dim.multiple_of}. "
                f"Use {-(-size // dim.multiple_of) * dim.multiple_of}"
            )
    encodes = graph == "encoder"
    limits = tile.pixels if encodes else [size // stride for size, (_, stride) in zip(tile.pixels, dims, strict=True)]
    if all(length <= limit for length, limit in zip(example[1:], limits, strict=True)):
        return None
    axes = []
    for length, size, (_, stride) in zip(example[1:], tile.pixels, dims, strict=True):
        into, out = (size, size // stride) if encodes else (size // stride, size)
        axis = _axis(length, into, out, tile.overlap)
        if not _meets(axis, stride, encodes):
            raise InputError(
                f"tile: with tiles of {size} pixels, {size // stride} in the latent, and an overlap of {tile.overlap} "
                f"the parts of the image do not meet: what overlaps is no whole number of the latent's pixels. "
                f"Use overlap={_overlap(dims, tile)!r}"
            )
        axes.append(axis)
    for axis, (dim, stride) in zip(axes, dims, strict=True):
        for part in axis.parts:
            size = part if encodes else part * stride
            if not dim.allows(size):
                raise InputError(
                    f"tile: with tiles of {tile.size} and an overlap of {tile.overlap} one has {dim.name} "
                    f"{size}, and this model takes {dim}. Choose another size or overlap"
                )
    down, across = axes
    return down, across


def _axis(length: int, into: int, out: int, overlap: float) -> Axis:
    """Step and blend, each rounded towards 0 as in diffusers."""
    blend = int(out * overlap)
    return Axis(length, into, int(into * (1 - overlap)), blend, out - blend)


def _meets(axis: Axis, stride: int, encodes: bool) -> bool:
    """Whether a step in the input corresponds to the kept part of a tile of the output."""
    kept = axis.limit * stride if encodes else axis.limit
    return axis.step > 0 and kept == (axis.step if encodes else axis.step * stride)


def _overlap(dims: list[tuple[SizeDim, int]], tile: Tile) -> float:
    """The overlap nearest to the given one that suits both graphs in both directions; 0 always does."""
    latents = [size // stride for (_, stride), size in zip(dims, tile.pixels, strict=True)]
    count = math.gcd(*latents)
    for overlap in sorted((k / count for k in range(count)), key=lambda overlap: abs(overlap - tile.overlap)):
        pairs = [(latent, latent * stride, stride) for latent, (_, stride) in zip(latents, dims, strict=True)]
        if all(
            _meets(_axis(0, small, large, overlap), stride, False)
            and _meets(_axis(0, large, small, overlap), stride, True)
            for small, large, stride in pairs
        ):
            return overlap
    raise AssertionError("without an overlap tiles meet")


def run_tiled(
    run: Callable[[Array], list[Array]], x: Array, down: Axis, across: Axis, results: tuple[Array, ...]
) -> None:
    """Run a graph tile by tile and write its blended outputs to `results`.

    Memory beside the results: one tile, and the strips that the tiles below and to the right are blended with.

    Args:
        run: the graph: (B, C, h, w) → its outputs, which may be modified.
        x: (B, C, H, W) float32, the input.
        down: the tiles' rows.
        across: the tiles' columns.
        results: (B, C', H', W') for each output.
    """
    above: list[list[Array]] = []  # the bottom of each output of each column's last tile
    for row, top in enumerate(down.starts):
        below: list[list[Array]] = []
        left: list[Array] = []  # the right edge of each output of the last tile
        for column, start in enumerate(across.starts):
            cut = x[:, :, top : top + down.tile, start : start + across.tile]
            outputs = run(np.ascontiguousarray(cut))
            for index, (output, result) in enumerate(zip(outputs, results, strict=True)):
                if row:
                    _blend(above[column][index], output, down.blend, 2)
                if column:
                    _blend(left[index], output, across.blend, 3)
                kept = output[:, :, : down.limit, : across.limit]
                y, x_ = row * down.limit, column * across.limit
                result[:, :, y : y + kept.shape[2], x_ : x_ + kept.shape[3]] = kept
            # Copies: a view would keep the whole tile.
            below.append([output[:, :, max(0, output.shape[2] - down.blend) :].copy() for output in outputs])
            left = [output[:, :, :, max(0, output.shape[3] - across.blend) :].copy() for output in outputs]
        above = below


def _blend(before: Array, tile: Array, extent: int, axis: int) -> None:
    """Blend the first `extent` values of a tile along an axis with the last ones of the tile before it, in place."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if not extent:
        return
    share = np.arange(extent) / extent
    old, new = (weight.astype(np.float32).reshape(-1, *[1] * (3 - axis)) for weight in (1 - share, share))
    ends = before[:, :, -extent:] if axis == 2 else before[:, :, :, -extent:]
    begins = tile[:, :, :extent] if axis == 2 else tile[:, :, :, :extent]
    begins[...] = ends * old + begins * new
