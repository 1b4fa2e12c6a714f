"""Measure the error of tiling: a model's graphs run in tiles, against the same graphs run on the whole picture.

A norm over the whole picture, or attention, has less input in a tile, and a convolution has an edge where there is
none. The error depends on the model and is not one of the export; it is measured so that a call in tiles can report it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vae_export.certification.certificate import Check
from vae_export.contract.manifest import Tiled
from vae_export.contract.model import Cost, Model, SizeDim
from vae_export.errors import InputError
from vae_export.runtimes import VAE, Backend, Tile
from vae_export.runtimes.tiling import can_tile, units

Array = npt.NDArray[Any]

_ROWS = 2
_OVERLAP, _STEP, _MIN_TILE = 0.25, 4, 8  # of the latent's pixels: the smallest tiles of a memory budget
_MAX_TILE = 128  # of the data's pixels: larger tiles would cost more than the rest of the export
_DARKEST = 0.3  # brightness at the far end of a side
_MAX_WORK = 5e10  # multiply-adds of running all pictures once, above which there is only one
_NO_NOISE = 1e-15  # 300 dB


def measure_tiles(
    model: Model, backend: Backend, examples: Array, costs: Mapping[str, Cost] | None = None
) -> dict[str, Tiled]:
    """Run both graphs on pictures in tiles and whole, and compare the pixels.

    The pictures are examples enlarged to two and a half tiles by two. In the last, brightness decreases towards a
    corner: parts of photographs differ in brightness, and parts of enlarged noise do not. The decoder's input is the
    encoder's output for them, the kind of latents that it was trained on.

    Args:
        model: what the graphs compute.
        backend: runs them.
        examples: (N, C, H, W) float32 in the data's range, N ≥ 1: data rather than extremes. The first two are used.
        costs: of the graphs: where two pictures would take long, one is used. None is no limit.

    Returns:
        By graph; empty for models that cannot be tiled, or take no picture that is larger than a tile.
    """
    if not can_tile(model):
        return {}
    tile, size = _cut(model, examples.shape[2:])
    if all(length <= most for length, most in zip(size, tile.pixels, strict=True)):
        return {}
    x = _enlarged(np.asarray(examples[:_ROWS], np.float32), size)
    low = np.float32(model.data.range[0])
    x[-1:] = low + (x[-1:] - low) * _falling_light(size)
    sizes = model.input_sizes("encoder", x.shape[1:])
    if costs and len(x) * sum(cost.at(sizes)[0] for cost in costs.values()) > _MAX_WORK:
        x = x[-1:]
    vae = VAE(model, backend, micro_batch=1)
    try:
        whole = vae.encode(x).mode()
        parts = vae.encode(x, tile=tile).mode()
        decoded = vae.decode(whole)
        pairs = {"encoder": (vae.decode(parts), decoded), "decoder": (vae.decode(whole, tile=tile), decoded)}
    except InputError:  # the sizes of this picture or of its last tiles are not allowed
        return {}
    return {graph: _compared(*pair, model, tile, size) for graph, pair in pairs.items()}


def checks(measured: Mapping[str, Tiled]) -> tuple[Check, ...]:
    """Checks of a certificate for the results of `measure_tiles`. They have no tolerance."""
    result: list[Check] = []
    for graph, one in measured.items():
        rows: Sequence[tuple[str, str, str, float]] = (
            ("max", "worst pixel", "levels of 255", one.worst),
            ("off1", "pixels off by more than 1/255", "share", one.off1),
            ("off2", "pixels off by more than 2/255", "share", one.off2),
            ("psnr", "PSNR", "dB", one.psnr),
        )
        where = f"in tiles of {one.tile[0]} × {one.tile[1]}, against the whole"
        size = f"height {one.size[0]}, width {one.size[1]}"
        result += [
            Check(
                id=f"tiles.{graph}.pixel.{name}", graph="encoder" if graph == "encoder" else "decoder",
                quantity=f"{quantity} {where}", unit=unit, measured=value, size=size,
            )
            for name, quantity, unit, value in rows
        ]  # fmt: skip
    return tuple(result)


def _cut(model: Model, example: tuple[int, ...]) -> tuple[Tile, tuple[int, int]]:
    """A tile of about the example, and a picture of two and a half of them by two."""
    tiles, sizes = [], []
    for (dim, stride), length, times in zip(units(model), example, (2.5, 2.0), strict=True):
        step = math.lcm(_STEP * stride, dim.multiple_of)
        least = -(-_MIN_TILE * stride // step) * step
        tile = max(least, min(length, _MAX_TILE) // step * step)
        tiles.append(tile)
        sizes.append(_allowed(dim, int(times * tile)))
    return Tile((tiles[0], tiles[1]), _OVERLAP), (sizes[0], sizes[1])


def _allowed(dim: SizeDim, wanted: int) -> int:
    """The largest size of a dimension up to `wanted` and to its limit."""
    most = wanted if dim.max is None else min(wanted, dim.max)
    return max(1, most // dim.multiple_of) * dim.multiple_of


def _enlarged(x: Array, size: tuple[int, int]) -> Array:
    """Pictures (B, C, H, W) at another size, linearly interpolated between the centres of their pixels."""
    for axis, wanted in zip((2, 3), size, strict=True):
        length = x.shape[axis]
        places = np.clip((np.arange(wanted) + 0.5) * (length / wanted) - 0.5, 0, length - 1)
        before = np.minimum(places.astype(np.intp), max(0, length - 2))
        share = (places - before).astype(np.float32).reshape(-1, *[1] * (3 - axis))
        after = np.minimum(before + 1, length - 1)
        x = x.take(before, axis) * (1 - share) + x.take(after, axis) * share
    return np.ascontiguousarray(x)


def _falling_light(size: tuple[int, int]) -> Array:
    """A factor from 1 in the first corner to _DARKEST² in the last: (H, W) float32."""
    down, across = (np.linspace(1, _DARKEST, length, dtype=np.float32) for length in size)
    return np.outer(down, across).astype(np.float32)


def _compared(tiled: Array, whole: Array, model: Model, tile: Tile, size: tuple[int, int]) -> Tiled:
    low, high = model.data.range
    first, second = (np.clip(value.astype(np.float64), low, high) for value in (tiled, whole))
    levels = np.abs(first - second) * (255 / (high - low))
    rms = float(np.sqrt(np.mean(levels * levels))) / 255
    return Tiled(
        tile=tile.pixels,
        size=size,
        worst=float(levels.max()),
        off1=float((levels > 1).mean()),
        off2=float((levels > 2).mean()),
        psnr=-20 * math.log10(max(rms, _NO_NOISE)),
    )
