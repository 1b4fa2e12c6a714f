"""Folders of pictures: found, decoded, scaled and cut to one size."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from vae_export.errors import InputError
from vae_export.numerics.images import PLAIN_MODES, SUFFIXES

Pixels = npt.NDArray[np.uint8]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class PictureRows:
    """Rows of picture files, decoded whenever they are read."""

    files: Sequence[Path]
    shape: Shape

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.files)

    def read(self, indices: npt.NDArray[np.intp]) -> Pixels:
        """As `formats.Rows.read`.

        Raises:
            InputError: a file that was readable when training began no longer is.
        """
        files = [self.files[index] for index in indices]
        rows = np.empty((len(files), *self.shape), np.uint8)
        for file, reason in zip(files, decode(files, self.shape, rows, lambda message: None), strict=True):
            if reason:
                raise InputError(f"{file} was readable when training began and no longer is: {reason}. Restore it")
        return rows


def find(folder: Path) -> list[Path]:
    """All picture files in a folder and below it, sorted. Linked folders are entered, each once, so that loops end."""
    paths, seen = [], {folder.resolve()}
    for parent, folders, names in os.walk(folder, followlinks=True):
        paths += [Path(parent, name) for name in names]
        below = {Path(parent, name).resolve(): name for name in sorted(folders)}
        folders[:] = [name for real, name in below.items() if real not in seen]
        seen.update(below)
    pictures = [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(pictures, key=lambda path: path.relative_to(folder).as_posix())


def decode(files: Sequence[Path], shape: Shape, rows: Pixels | None, report: Callable[[str], None]) -> list[str]:
    """Decode pictures, into `rows` if given. For each the reason why it cannot be read, or an empty string."""

    def decode(index: int) -> str:
        try:
            picture = _picture(files[index], shape)
        except UnidentifiedImageError:
            return "it is not a picture" if files[index].stat().st_size else "it is empty"
        except Exception as error:  # Pillow's readers raise arbitrary exceptions on damaged files
            return str(error) or type(error).__name__
        if rows is not None:
            rows[index] = picture
        return ""

    reasons = []
    with ThreadPoolExecutor() as pool:
        for reason in pool.map(decode, range(len(files))):
            reasons.append(reason)
            if len(reasons) % 1000 == 0:
                report(f"{len(reasons):,} of {len(files):,} pictures read")
    return reasons


def _picture(path: Path, shape: Shape) -> Pixels:
    """One picture (C, H, W), upright, its shorter side scaled to fit and its centre cut out."""
    channels, height, width = shape
    with Image.open(path) as file:
        frames = getattr(file, "n_frames", 1)
        if frames > 1 and file.format != "MPO":  # the other frames of an MPO are previews that cameras add
            raise InputError(f"it has {frames} frames")
        side = 2 * max(height, width)
        file.draft(None, (side, side))  # decodes a JPEG at a fraction of its size, but at least twice the needed one
        upright = ImageOps.exif_transpose(file)
        picture = _eight_bit(upright, file.format).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _eight_bit(picture: Image.Image, kind: str | None) -> Image.Image:
    """The picture with 8 bits, where Pillow would clip 16 bits at 255, and with transparency replaced by black."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and kind == "PNG"):
        return Image.fromarray(((np.asarray(picture).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, picture.convert("RGBA"))
    if picture.mode not in PLAIN_MODES:
        raise InputError(f"it has more than 8 bits or unusual colours (mode {picture.mode})")
    return picture
