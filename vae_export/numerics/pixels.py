"""8-bit pictures and the data's range: the two ends of one scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def is_picture(shape: tuple[object, ...]) -> bool:
    """Whether examples of this shape, (C, H, W), can be shown: one channel or three."""
    return len(shape) == 3 and shape[0] in (1, 3)


def to_uint8(x: npt.NDArray[Any], value_range: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Map the data's range onto 0…255, clamped and rounded to even. Any shape, kept; uint8 stays as it is."""
    if x.dtype == np.uint8:
        return x
    low, high = value_range
    scaled = (np.asarray(x, np.float32) - low) * (255.0 / (high - low))
    pixels: npt.NDArray[np.uint8] = np.rint(np.clip(scaled, 0.0, 255.0)).astype(np.uint8)
    return pixels


def from_uint8(x: npt.NDArray[Any], value_range: tuple[float, float]) -> npt.NDArray[np.float32]:
    """Map 0…255 onto the data's range: x uint8, any shape, kept; float32."""
    low, high = value_range
    return x.astype(np.float32) * np.float32((high - low) / 255.0) + np.float32(low)
