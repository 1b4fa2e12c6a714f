"""Conversion between 8-bit pictures and the data's range."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def is_picture(shape: tuple[object, ...]) -> bool:
    """Whether examples of this shape are pictures: (1 or 3, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)


def to_uint8(x: npt.NDArray[Any], value_range: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Map the data's range to 0…255, clamped and rounded half to even: uint8 of the same shape. uint8 is kept."""
    if x.dtype == np.uint8:
        return x
    low, high = value_range
    scaled = (np.asarray(x, np.float32) - low) * (255.0 / (high - low))
    pixels: npt.NDArray[np.uint8] = np.rint(np.clip(scaled, 0.0, 255.0)).astype(np.uint8)
    return pixels


def from_uint8(x: npt.NDArray[Any], value_range: tuple[float, float]) -> npt.NDArray[np.float32]:
    """Map uint8, 0…255, to the data's range: float32 of the same shape."""
    low, high = value_range
    return x.astype(np.float32) * np.float32((high - low) / 255.0) + np.float32(low)
