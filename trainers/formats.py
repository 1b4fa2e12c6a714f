"""Readers: from the name of a data set to its examples, which stay where they are until they are asked for."""

from __future__ import annotations

import gzip
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from vae_export.errors import InputError, require
from vae_export.trainers.config import DataConfig

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]
Shape = tuple[int, int, int]
Report = Callable[[str], None]

CIFAR: Final = "cifar-10-batches-bin"
SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_KEPT = 2 << 30  # bytes of decoded pictures that are kept in memory; more are decoded again each time
_CHUNK = 1 << 20
_DEFLATE = 1032  # one packed byte becomes at most so many (zlib's technical notes)
_CIFAR_ROW = 1 + 3 * 32 * 32
_CLEAR = {"1", "L", "P", "RGB", "CMYK", "YCbCr"}  # Pillow's modes that convert without loss of meaning


class Rows(Protocol):
    """Examples that are read when they are asked for."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, indices: Indices) -> Array:
        """The examples at these indices as they are stored, (B, C, H, W): uint8 levels, or floats in the range."""
        ...


@dataclass(frozen=True)
class Found:
    """A data set before it is split.

    Attributes:
        name: what it is, for people.
        rows: all examples.
        shape: of one, (C, H, W).
        dtype: of the stored values, by name.
        levels: how many equally spaced values there are; None for floats, whose values are taken as they are.
        files: names and sizes of the files, without the path to them.
        labels: (N,) int64, where there are any.
        test: so many examples at the end are a test set of its own.
        skipped: files that cannot be read, each with the reason.
    """

    name: str
    rows: Rows
    shape: Shape
    dtype: str
    levels: int | None
    files: tuple[tuple[str, int], ...] = ()
    labels: npt.NDArray[np.int64] | None = None
    test: int = 0
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class ArrayRows:
    """The rows of an array (N, C, H, W) in memory or in a mapped file."""

    array: Array

    def __len__(self) -> int:
        """How many there are."""
        return len(self.array)

    def read(self, indices: Indices) -> Array:
        """As `Rows.read`."""
        return np.asarray(self.array[indices])


@dataclass(frozen=True)
class Pictures:
    """Picture files, decoded each time they are asked for."""

    files: Sequence[Path]
    shape: Shape

    def __len__(self) -> int:
        """How many there are."""
        return len(self.files)

    def read(self, indices: Indices) -> Array:
        """As `Rows.read`.

        Raises:
            InputError: a file that was readable when training began no longer is.
        """
        files = [self.files[index] for index in indices]
        rows = np.empty((len(files), *self.shape), np.uint8)
        for file, reason in zip(files, _decode(files, self.shape, rows, lambda message: None), strict=True):
            if reason:
                raise InputError(f"{file} was readable when training began and no longer is: {reason}. Restore it")
        return rows


def find(config: DataConfig, report: Report) -> Found:
    """Open the data set that a configuration names.

    Args:
        config: `spec`, `size`, `channels` and `range` count here.
        report: is told how reading goes on.

    Raises:
        InputError: the data set is not known, not there, damaged, or not of a kind that can be trained on.
        BackendError: scikit-learn, which brings `digits` and `photos`, is not installed.
    """
    kind, _, where = config.spec.partition(":")
    if kind not in _READERS:
        forms = ", ".join(form for form, _ in _READERS.values())
        raise InputError(f"train: data set {kind!r} is not known; expected {forms}")
    form, reader = _READERS[kind]
    if bool(where) != (":" in form):
        raise InputError(f"train: data set {kind!r} {'takes no' if where else 'needs a'} path; expected {form}")
    if config.size is not None and kind not in ("images", "photos"):
        raise InputError(f"train: data set {kind!r} has a size of its own, got size {list(config.size)}. Leave it out")
    found = reader(config, where, report)
    if config.channels not in (None, found.shape[0]):
        raise InputError(
            f"train: channels is {config.channels}, but {found.name} has {found.shape[0]}. Only images:DIR converts "
            "them"
        )
    return found


def _digits(config: DataConfig, where: str, report: Report) -> Found:
    digits = require("sklearn.datasets", "train", "data set 'digits'").load_digits()
    levels = digits.images.astype(np.uint8)[:, None]  # (N, 1, 8, 8), 0 to 16
    labels = digits.target.astype(np.int64)
    return Found("scikit-learn handwritten digits", ArrayRows(levels), (1, 8, 8), "uint8", 17, labels=labels)


def _photos(config: DataConfig, where: str, report: Report) -> Found:
    photos = require("sklearn.datasets", "train", "data set 'photos'").load_sample_images().images
    height, width = config.size or (16, 16)
    patches = []
    for photo in photos:  # (H, W, 3) uint8
        rows, columns = photo.shape[0] // height, photo.shape[1] // width
        if not rows * columns:
            raise InputError(
                f"train: size is {[height, width]}, but a photograph has {photo.shape[0]} × {photo.shape[1]} pixels. "
                "Give a smaller size"
            )
        cut = photo[: rows * height, : columns * width].reshape(rows, height, columns, width, 3)
        patches.append(cut.transpose(0, 2, 4, 1, 3).reshape(-1, 3, height, width))
    array = np.concatenate(patches)
    return Found("patches of scikit-learn's photographs", ArrayRows(array), (3, height, width), "uint8", 256)


def _mnist(config: DataConfig, where: str, report: Report) -> Found:
    name = {"mnist": "MNIST", "fashion": "Fashion-MNIST"}[config.spec.partition(":")[0]]
    folder = _path(where, "folder")
    files, images, labels = [], [], []
    for part in ("train", "t10k"):
        file = idx_file(folder, f"{part}-images-idx3-ubyte")
        if file is None:
            raise InputError(
                f"{folder} has no {part}-images-idx3-ubyte or {part}-images-idx3-ubyte.gz; expected the files of "
                f"{name}. Fetch them (--download)"
            )
        files.append(file)
        images.append(_read_idx(file, 3))
        if (labelled := idx_file(folder, f"{part}-labels-idx1-ubyte")) is not None:
            files.append(labelled)
            labels.append(_read_idx(labelled, 1))
            if len(labels[-1]) != len(images[-1]):
                raise InputError(
                    f"{labelled} has {len(labels[-1]):,} labels; {file.name} has {len(images[-1]):,} pictures"
                )
    if images[0].shape[1:] != images[1].shape[1:]:
        sizes = [f"{a.shape[1]} × {a.shape[2]}" for a in images]
        raise InputError(f"{folder} has training pictures of {sizes[0]} and test pictures of {sizes[1]} pixels")
    array = np.concatenate(images)[:, None]  # (N, 1, H, W)
    return Found(
        *(name, ArrayRows(array), (1, *array.shape[2:]), "uint8", 256, _identity(folder, files)),
        labels=np.concatenate(labels).astype(np.int64) if len(labels) == 2 else None,
        test=len(images[1]),
    )


def idx_file(folder: Path, name: str) -> Path | None:
    """The IDX file of a name such as `train-images-idx3-ubyte`, in either spelling, packed or not; None without."""
    names = [spelling + suffix for spelling in (name, name.replace("-idx", ".idx")) for suffix in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_idx(path: Path, rank: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of bytes (format: http://yann.lecun.com/exdb/mnist/), packed by gzip or not."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            header = file.read(4 + 4 * rank)
            magic = struct.pack(">I", 0x0800 | rank)
            if not header.startswith(magic) or len(header) < 4 + 4 * rank:
                raise InputError(
                    f"{path} begins with {header.hex() or 'nothing'}; expected {magic.hex()}, an IDX file of unsigned "
                    f"bytes, and {rank} sizes. Fetch it again (--download)"
                )
            shape = struct.unpack(f">{rank}I", header[4:])
            size, limit = math.prod(shape), path.stat().st_size * (_DEFLATE if packed else 1) - len(header)
            data = bytearray()
            # A header can promise terabytes: what the file cannot hold is not even begun to be read.
            while size <= limit and len(data) <= size and (chunk := file.read(_CHUNK)):
                data += chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged: {error}. Fetch it again (--download)") from None
    if not size:
        raise InputError(f"{path} is empty: its header says {list(shape)}. Fetch it again (--download)")
    if len(data) != size:
        raise InputError(
            f"{path} has {'fewer' if len(data) < size else 'more'} values than its header promises, "
            f"{' × '.join(map(str, shape))} = {size:,}. Fetch it again (--download)"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _cifar10(config: DataConfig, where: str, report: Report) -> Found:
    folder = _path(where, "folder")
    if not (folder / "test_batch.bin").is_file():
        folder /= CIFAR
    files = [file for n in range(1, 6) if (file := folder / f"data_batch_{n}.bin").is_file()]
    files.append(folder / "test_batch.bin")
    if len(files) == 1 or not files[-1].is_file():
        raise InputError(
            f"{where} has no data_batch_1.bin to data_batch_5.bin or no test_batch.bin, nor has {CIFAR} in it; "
            "expected the binary version of CIFAR-10. Fetch it (--download)"
        )
    parts = []
    for file in files:
        part = np.fromfile(file, np.uint8)
        if not len(part) or len(part) % _CIFAR_ROW:
            raise InputError(
                f"{file} has {len(part):,} bytes; expected a multiple of {_CIFAR_ROW:,}: rows of a label and "
                "3 × 32 × 32 values. Fetch it again (--download)"
            )
        parts.append(part.reshape(-1, _CIFAR_ROW))
        if (wrong := np.flatnonzero(parts[-1][:, 0] > 9)).size:
            raise InputError(
                f"{file}: row {wrong[0]} has the label {parts[-1][wrong[0], 0]}; expected 0 to 9. "
                "Fetch it again (--download)"
            )
    whole = np.concatenate(parts)
    rows = ArrayRows(whole[:, 1:].reshape(-1, 3, 32, 32))
    files_found = _identity(folder, files)
    labels = whole[:, 0].astype(np.int64)
    return Found("CIFAR-10", rows, (3, 32, 32), "uint8", 256, files_found, labels=labels, test=len(parts[-1]))


def _images(config: DataConfig, where: str, report: Report) -> Found:
    folder = _path(where, "folder")
    shape = (config.channels or 3, *(config.size or (64, 64)))
    files = _walk(folder)
    if not files:
        raise InputError(f"{folder} has no pictures in it ({', '.join(sorted(SUFFIXES))})")
    kept = np.empty((len(files), *shape), np.uint8) if len(files) * math.prod(shape) <= _KEPT else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        reasons = _decode(files, shape, kept, report)
    skipped = tuple(
        f"{file.relative_to(folder).as_posix()}: {reason}"
        for file, reason in zip(files, reasons, strict=True)
        if reason
    )
    if len(skipped) == len(files):
        raise InputError(
            f"{folder} has {len(files):,} files that end as pictures do, and none can be read: "
            f"{'; '.join(skipped[:3])}{'; …' if len(skipped) > 3 else ''}"
        )
    readable = [file for file, reason in zip(files, reasons, strict=True) if not reason]
    good = np.array([not reason for reason in reasons])
    rows: Rows = Pictures(readable, shape) if kept is None else ArrayRows(kept[good] if skipped else kept)
    name = f"pictures in {folder.resolve().name}"
    return Found(name, rows, shape, "uint8", 256, _identity(folder, readable), skipped=skipped)


def _walk(folder: Path) -> list[Path]:
    """All pictures below a folder, sorted. Linked folders are entered, each folder once, so that loops end."""
    found, seen = [], {folder.resolve()}
    for place, folders, names in os.walk(folder, followlinks=True):
        found += [Path(place, name) for name in names]
        below = {Path(place, name).resolve(): name for name in sorted(folders)}
        folders[:] = [name for real, name in below.items() if real not in seen]
        seen.update(below)
    pictures = [path for path in found if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(pictures, key=lambda path: path.relative_to(folder).as_posix())


def _decode(files: Sequence[Path], shape: Shape, rows: Array | None, report: Report) -> list[str]:
    """Decode pictures into `rows`, if there are any to fill. Why each one failed; empty where it did not."""

    def decode(index: int) -> str:
        try:
            picture = _picture(files[index], shape)
        except UnidentifiedImageError:
            return "it is no picture" if files[index].stat().st_size else "it is empty"
        except Exception as error:  # Pillow's readers raise whatever their formats raise on damaged files
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


def _picture(path: Path, shape: Shape) -> npt.NDArray[np.uint8]:
    """One picture, upright, scaled so that its shorter side fits and cut to its centre: (C, H, W)."""
    channels, height, width = shape
    with Image.open(path) as file:
        frames = getattr(file, "n_frames", 1)
        if frames > 1 and file.format != "MPO":  # the other frames of an MPO are previews that cameras add
            raise InputError(f"it has {frames} frames")
        side = 2 * max(height, width)
        file.draft(None, (side, side))  # a JPEG is decoded at a fraction of its size, still twice what is needed
        upright = ImageOps.exif_transpose(file)
        picture = _eight_bit(upright, file.format).convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _eight_bit(picture: Image.Image, kind: str | None) -> Image.Image:
    """The picture without transparency, on black, and with 8 bits, of which Pillow would cut 16 off at 255."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and kind == "PNG"):
        return Image.fromarray(((np.asarray(picture).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, picture.convert("RGBA"))
    if picture.mode not in _CLEAR:
        raise InputError(f"it has more than 8 bits or unusual colours (mode {picture.mode})")
    return picture


def _array(config: DataConfig, where: str, report: Report) -> Found:
    name, _, key = where.rpartition(":")
    name, key = (name, key) if name.endswith(".npz") else (where, "")
    path = _path(name, "file")
    array = _open_npz(path, key) if path.suffix == ".npz" else _open_npy(path)
    if array.dtype.name not in ("uint8", "bool", "float16", "float32", "float64"):  # in either byte order
        raise InputError(
            f"{path} has dtype {array.dtype}; expected uint8, bool, float16, float32 or float64. Convert it: "
            "array.astype(numpy.float32)"
        )
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise InputError(f"{path} has shape {array.shape}; expected (N, C, H, W) or (N, H, W), nothing of it 0")
    if array.ndim == 4 and array.shape[3] in (1, 3) and array.shape[1] not in (1, 3):
        raise InputError(
            f"{path} has shape {array.shape}, whose channels look to be last; expected (N, C, H, W). Save it as "
            "array.transpose(0, 3, 1, 2)"
        )
    array = array.reshape(len(array), 1, *array.shape[1:]) if array.ndim == 3 else array
    dtype, levels = array.dtype.name, {"uint8": 256, "bool": 2}.get(array.dtype.name)
    if levels == 2:
        array = array.view(np.uint8)
        _check_values(path, array, (0, 1))
    elif levels is None:
        _check_values(path, array, config.range)
    files = _identity(path.parent, [path]) + (((key, 0),) if key else ())
    return Found(path.name, ArrayRows(array), (array.shape[1], array.shape[2], array.shape[3]), dtype, levels, files)


def _open_npy(path: Path) -> Array:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy's reader raises whatever its parts raise on damaged files
        raise InputError(f"{path} is not a plain NumPy array: {error}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(f"{path} is not a plain NumPy array; is it an .npz?")
    return array


def _open_npz(path: Path, key: str) -> Array:
    try:
        # Opened here: where it is no archive, NumPy would leave its own file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = list(arrays)
            key = names[0] if not key and len(names) == 1 else key
            array = np.asarray(arrays[key]) if key in names else None
    except Exception as error:  # NumPy's reader raises whatever its parts raise on damaged files
        raise InputError(f"{path} is not a NumPy archive of plain arrays: {error}") from None
    if array is None:
        raise InputError(f"{path} has the arrays {', '.join(names) or 'none'}; name one: array:{path}:KEY")
    return array


def _check_values(path: Path, array: Array, value_range: tuple[float, float]) -> None:
    """Refuse an array with a value out of the range. What counts is the value as float32, as models get it."""
    low, high = map(np.float32, value_range)
    step = max(1, _CHUNK // math.prod(array.shape[1:]))
    for first in range(0, len(array), step):
        with np.errstate(all="ignore"):
            chunk = np.asarray(array[first : first + step]).astype(np.float32)
        wrong = ~((chunk >= low) & (chunk <= high))
        if wrong.any():
            where = tuple(np.argwhere(wrong)[0])
            raise InputError(
                f"{path}: row {first + where[0]} has the value {chunk[where]:g}; expected values from {low:g} to "
                f"{high:g}. Scale the array, or give its range (--range)"
            )


def _path(where: str, what: str) -> Path:
    """The folder or file that a data set's name gives."""
    try:
        path = Path(where).expanduser()
    except RuntimeError as error:  # the home of a user who is not there
        raise InputError(f"{where} is not there: {error}") from None
    if not (path.is_dir() if what == "folder" else path.is_file()):
        raise InputError(f"{path} {'is no' if path.exists() else 'does not exist; expected a'} {what}")
    return path


def _identity(folder: Path, files: Sequence[Path]) -> tuple[tuple[str, int], ...]:
    return tuple((file.relative_to(folder).as_posix(), file.stat().st_size) for file in files)


_READERS: Mapping[str, tuple[str, Callable[[DataConfig, str, Report], Found]]] = {
    "digits": ("digits", _digits),
    "photos": ("photos", _photos),
    "mnist": ("mnist:DIR", _mnist),
    "fashion": ("fashion:DIR", _mnist),
    "cifar10": ("cifar10:DIR", _cifar10),
    "images": ("images:DIR", _images),
    "array": ("array:FILE.npy or array:FILE.npz:KEY", _array),
}
