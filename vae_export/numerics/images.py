"""Read and write examples as pictures or arrays, for the command line."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vae_export.contract.atomic import atomic_file
from vae_export.contract.model import Data
from vae_export.errors import InputError
from vae_export.numerics.pixels import is_picture, to_uint8

if TYPE_CHECKING:  # arrays need no Pillow
    from PIL import Image

Array = npt.NDArray[Any]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
_MIN_SIDE = 48  # pixels of the shorter side of a picture in a grid
PLAIN_MODES = {"1", "L", "P", "RGB", "CMYK", "YCbCr"}  # Pillow's modes without transparency and with 8 bits at most


def grid(x: Array, value_range: tuple[float, float], columns: int | None = None) -> Image.Image:
    """Arrange pictures in a grid row by row, small ones enlarged, with white lines between them.

    Args:
        x: (B, 1 or 3, H, W) in value_range, or uint8.
        value_range: the values of black and of white.
        columns: pictures in a row; None makes the grid about square.
    """
    from PIL import Image

    pixels = to_uint8(x, value_range)
    count, _, height, width = pixels.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    scale = max(1, -(-_MIN_SIDE // min(height, width)))
    pixels = pixels.repeat(scale, axis=2).repeat(scale, axis=3)
    height, width, gap = height * scale, width * scale, max(2, scale // 2)
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, pixels.shape[1]), 255, np.uint8)
    for index, tile in enumerate(pixels):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = tile.transpose(1, 2, 0)
    return Image.fromarray(canvas[..., 0] if canvas.shape[2] == 1 else canvas)


def pairs(above: Array, below: Array, value_range: tuple[float, float], columns: int = 12) -> Image.Image:
    """A grid of pictures, rows of `above` and of `below` by turns. Arguments as for `grid`."""
    above, below = to_uint8(above, value_range), to_uint8(below, value_range)
    rows = []
    for first in range(0, len(above), columns):
        for part in (above[first : first + columns], below[first : first + columns]):
            blank = np.full((columns - len(part), *part.shape[1:]), 255, np.uint8)
            rows += [part, blank]
    return grid(np.concatenate(rows), value_range, columns)


def write(path: Path, x: Array, data: Data, below: Array | None = None) -> None:
    """Write examples as a grid of pictures (`.png`) or as an array (`.npy`).

    Args:
        path: the file; its suffix selects the format.
        x: (B, *data) float32, or uint8 pictures.
        data: shape and range.
        below: reconstructions: for a picture shown under x, for an array written instead of x.

    Raises:
        InputError: as `check_target`.
    """
    check_target(path, data)
    with atomic_file(path) as stage:
        if path.suffix.lower() == ".npy":
            with stage.open("wb") as file:
                np.save(file, x if below is None else below)
        else:
            (grid(x, data.range) if below is None else pairs(x, below, data.range)).save(stage)


def check_target(path: Path, data: Data) -> None:
    """Check, before anything is computed, that `write` can write a file.

    Raises:
        InputError: a suffix other than `.png` and `.npy`, or `.png` for examples that are not pictures.
    """
    if path.suffix.lower() not in (".png", ".npy"):
        raise InputError(f"{path}: expected a file that ends in .png (pictures) or .npy (array)")
    if path.suffix.lower() == ".png" and not is_picture(data.shape):
        raise InputError(f"{path}: only data of shape (1 or 3, H, W) can be shown; write .npy instead")


def read(spec: str, data: Data, *, resize: bool = False) -> Array:
    """Read examples: a picture, a folder of pictures, `array.npy`, or `arrays.npz:key`.

    Arrays are returned as they are, `.npy` memory-mapped; the runtime checks them. Pictures become uint8 with the
    number of channels that `data` has.

    Args:
        spec: path of a file or folder, with `:key` for `.npz`.
        data: the expected shape.
        resize: scale pictures of another size to the expected one.

    Returns:
        (B, *data) in the file's dtype, or uint8 for pictures.

    Raises:
        InputError: it is missing, damaged, or has another format or size.
    """
    name, _, key = spec.rpartition(":")
    path = Path(name) if name.endswith(".npz") else Path(spec)
    if not path.is_dir() and not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise InputError(f"{path} {problem}; expected a picture, a folder, array.npy or arrays.npz:key")
    if path.suffix == ".npz":
        return _read_npz(path, key if name.endswith(".npz") else "")
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy's reader raises whatever its parts raise on damaged files
            raise InputError(f"{path} is not a plain NumPy array: {error}") from None
        if not isinstance(array, np.ndarray):
            raise InputError(f"{path} is not a plain NumPy array; is it an .npz?")
        return array
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    files = [file for file in files if file.is_file()]
    if not files:
        raise InputError(f"{path} has no pictures in it ({', '.join(sorted(SUFFIXES))})")
    pictures = [_read_picture(file, data, resize) for file in files]
    for file, picture in zip(files, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise InputError(
                f"{file} has {picture.shape[2]} × {picture.shape[1]} pixels and {files[0].name} has "
                f"{pictures[0].shape[2]} × {pictures[0].shape[1]}; pictures of one folder must have one size"
            )
    return np.stack(pictures)


def _read_npz(path: Path, key: str) -> Array:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
            if key in names:
                return np.asarray(arrays[key])
    except Exception as error:  # NumPy's reader raises whatever its parts raise on damaged files
        raise InputError(f"{path} is not a NumPy archive: {error}") from None
    raise InputError(f"{path} has the arrays {', '.join(names) or 'none'}; name one: {path}:KEY")


def _read_picture(path: Path, data: Data, resize: bool) -> Array:
    from PIL import Image

    if not is_picture(data.shape):
        raise InputError(f"{path}: this bundle's data are no pictures; pass array.npy or arrays.npz:key")
    channels, height, width = data.shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                frames, mode = getattr(file, "n_frames", 1), file.mode
                clear = mode in PLAIN_MODES and "transparency" not in file.info
                picture = file.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's readers raise whatever their formats raise on damaged files
        raise InputError(f"{path} is not a picture that can be read: {error}") from None
    if not clear or frames > 1:
        what = f"{frames} frames" if frames > 1 else f"transparency or more than 8 bits (mode {mode})"
        raise InputError(f"{path} has {what}; convert it to one 8-bit grey or RGB picture")
    if isinstance(height, int) and isinstance(width, int) and picture.size != (width, height):
        if not resize:
            raise InputError(
                f"{path} has {picture.size[0]} × {picture.size[1]} pixels; this bundle expects {width} × {height} "
                "(width × height). Add --resize to scale it"
            )
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
