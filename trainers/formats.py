"""Readers of data sets: digits, photographs, IDX files, CIFAR-10, arrays; pictures are in `pictures`."""

from __future__ import annotations

import contextlib
import gzip
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from vae_export.errors import InputError, require
from vae_export.numerics import images
from vae_export.trainers import pictures
from vae_export.trainers.config import DataConfig

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]
Shape = tuple[int, int, int]
Report = Callable[[str], None]

CIFAR = "cifar-10-batches-bin"
_CHUNK = 1 << 20
_DEFLATE = 1032  # the largest number of bytes to which DEFLATE expands one byte (zlib's technical notes)
_CIFAR_ROW = 1 + 3 * 32 * 32


class Rows(Protocol):
    """Stored examples, read on demand."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def read(self, indices: Indices) -> Array:
        """The examples at `indices` as stored, (B, C, H, W): uint8 levels, or floats in the data's range."""
        ...


@dataclass(frozen=True)
class RawDataset:
    """A data set before it is split.

    Attributes:
        name: of the data set, for display.
        rows: all examples; those of a test set come last.
        shape: of one example, (C, H, W).
        dtype: of the stored values, by name.
        levels: number of equally spaced values; None for floats, which are used as they are.
        files: names and sizes of the files, the names relative to the data set's folder.
        labels: (N,) int64, if there are any.
        test: number of examples of the data set's own test set.
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
        """Number of examples."""
        return len(self.array)

    def read(self, indices: Indices) -> Array:
        """As `Rows.read`."""
        return np.asarray(self.array[indices])


def read(config: DataConfig, report: Report, memory: int) -> RawDataset:
    """Open the data set that `config.spec` names. For arguments and errors see `datasets.load`."""
    kind, _, path = config.spec.partition(":")
    if kind not in READERS:
        hint = ""
        with contextlib.suppress(InputError):
            folder = _existing(config.spec, "folder")
            hint = f". {folder} is a folder: to train on its pictures, use --data images:{config.spec}"
        forms = ", ".join(form for form, _ in READERS.values())
        raise InputError(f"train: data set {kind!r} is not known; expected {forms}{hint}")
    form, reader = READERS[kind]
    if bool(path) != (":" in form):
        raise InputError(f"train: data set {kind!r} {'takes no' if path else 'needs a'} path; expected {form}")
    if config.size is not None and kind not in ("images", "photos"):
        raise InputError(f"train: data set {kind!r} has a fixed size, got size {list(config.size)}. Leave it out")
    raw = reader(config, path) if reader else _images(config, path, report, memory)
    if config.channels not in (None, raw.shape[0]):
        raise InputError(
            f"train: channels is {config.channels}, but {raw.name} has {raw.shape[0]}. Only images:DIR converts them"
        )
    return raw


def _digits(config: DataConfig, path: str) -> RawDataset:
    digits = require("sklearn.datasets", "train", "data set 'digits'").load_digits()
    levels = digits.images.astype(np.uint8)[:, None]  # (N, 1, 8, 8), 0 to 16
    labels = digits.target.astype(np.int64)
    return RawDataset("scikit-learn handwritten digits", ArrayRows(levels), (1, 8, 8), "uint8", 17, labels=labels)


def _photos(config: DataConfig, path: str) -> RawDataset:
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
    return RawDataset("patches of scikit-learn's photographs", ArrayRows(array), (3, height, width), "uint8", 256)


def _mnist(config: DataConfig, path: str) -> RawDataset:
    name = {"mnist": "MNIST", "fashion": "Fashion-MNIST"}[config.spec.partition(":")[0]]
    folder = _existing(path, "folder")
    files, pixels, labels = [], [], []
    for part in ("train", "t10k"):
        file = idx_file(folder, f"{part}-images-idx3-ubyte")
        if file is None:
            raise InputError(
                f"{folder} has no {part}-images-idx3-ubyte or {part}-images-idx3-ubyte.gz; expected the files of "
                f"{name}. Fetch them (--download)"
            )
        files.append(file)
        pixels.append(read_idx(file, 3))
        if (labelled := idx_file(folder, f"{part}-labels-idx1-ubyte")) is not None:
            files.append(labelled)
            labels.append(read_idx(labelled, 1))
            if len(labels[-1]) != len(pixels[-1]):
                raise InputError(
                    f"{labelled} has {len(labels[-1]):,} labels; {file.name} has {len(pixels[-1]):,} pictures"
                )
    if pixels[0].shape[1:] != pixels[1].shape[1:]:
        sizes = [f"{a.shape[1]} × {a.shape[2]}" for a in pixels]
        raise InputError(f"{folder} has training pictures of {sizes[0]} and test pictures of {sizes[1]} pixels")
    array = np.concatenate(pixels)[:, None]  # (N, 1, H, W)
    return RawDataset(
        *(name, ArrayRows(array), (1, *array.shape[2:]), "uint8", 256, _identity(folder, files)),
        labels=np.concatenate(labels).astype(np.int64) if len(labels) == 2 else None,
        test=len(pixels[1]),
    )


def idx_file(folder: Path, name: str) -> Path | None:
    """The IDX file of a name such as `train-images-idx3-ubyte`, in either spelling, gzip or not; None if missing."""
    names = [spelling + suffix for spelling in (name, name.replace("-idx", ".idx")) for suffix in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: Path, rank: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of bytes with `rank` axes, gzip or not (format: http://yann.lecun.com/exdb/mnist/).

    Raises:
        InputError: the file is damaged, or another kind of file.
    """
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
            # A header can claim terabytes: do not start to read what the file cannot hold.
            while size <= limit and len(data) <= size and (chunk := file.read(_CHUNK)):
                data += chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged: {error}. Fetch it again (--download)") from None
    if not size:
        raise InputError(f"{path} is empty: its header says {list(shape)}. Fetch it again (--download)")
    if len(data) != size:
        raise InputError(
            f"{path} has {'fewer' if len(data) < size else 'more'} values than its header claims, "
            f"{' × '.join(map(str, shape))} = {size:,}. Fetch it again (--download)"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _cifar10(config: DataConfig, path: str) -> RawDataset:
    folder = _existing(path, "folder")
    if not (folder / "test_batch.bin").is_file():
        folder /= CIFAR
    files = [file for n in range(1, 6) if (file := folder / f"data_batch_{n}.bin").is_file()]
    files.append(folder / "test_batch.bin")
    if len(files) == 1 or not files[-1].is_file():
        raise InputError(
            f"{path} has no data_batch_1.bin to data_batch_5.bin or no test_batch.bin, nor has {CIFAR} in it; "
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
    labels = whole[:, 0].astype(np.int64)
    return RawDataset(
        *("CIFAR-10", rows, (3, 32, 32), "uint8", 256, _identity(folder, files)), labels=labels, test=len(parts[-1])
    )


def _images(config: DataConfig, path: str, report: Report, memory: int) -> RawDataset:
    """All readable pictures in a folder and below it. Those that Pillow thinks dangerously large are skipped."""
    folder = _existing(path, "folder")
    shape = (config.channels or 3, *(config.size or (64, 64)))
    files = pictures.find(folder)
    if not files:
        raise InputError(f"{folder} has no pictures in it ({', '.join(sorted(images.SUFFIXES))})")
    kept = np.empty((len(files), *shape), np.uint8) if len(files) * math.prod(shape) <= memory else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        reasons = pictures.decode(files, shape, kept, report)
    skipped = tuple(
        f"{file.relative_to(folder).as_posix()}: {reason}"
        for file, reason in zip(files, reasons, strict=True)
        if reason
    )
    if len(skipped) == len(files):
        raise InputError(
            f"{folder} has {len(files):,} files with a picture's suffix, and none can be read: "
            f"{'; '.join(skipped[:3])}{'; …' if len(skipped) > 3 else ''}"
        )
    readable = [file for file, reason in zip(files, reasons, strict=True) if not reason]
    good = np.array([not reason for reason in reasons])
    rows: Rows = pictures.PictureRows(readable, shape) if kept is None else ArrayRows(kept[good] if skipped else kept)
    name = f"pictures in {folder.resolve().name}"
    return RawDataset(name, rows, shape, "uint8", 256, _identity(folder, readable), skipped=skipped)


def _array(config: DataConfig, path: str) -> RawDataset:
    name, _, key = path.rpartition(":")
    name, key = (name, key) if name.endswith(".npz") else (path, "")
    file = _existing(name, "file")
    array = _open_npz(file, key) if file.suffix == ".npz" else _open_npy(file)
    if array.dtype.name not in ("uint8", "bool", "float16", "float32", "float64"):  # in either byte order
        raise InputError(
            f"{file} has dtype {array.dtype}; expected uint8, bool, float16, float32 or float64. Convert it: "
            "array.astype(numpy.float32)"
        )
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise InputError(f"{file} has shape {array.shape}; expected (N, C, H, W) or (N, H, W), no axis of length 0")
    if array.ndim == 4 and array.shape[3] in (1, 3) and array.shape[1] not in (1, 3):
        raise InputError(
            f"{file} has shape {array.shape}, whose channels look to be last; expected (N, C, H, W). Save it as "
            "array.transpose(0, 3, 1, 2)"
        )
    array = array.reshape(len(array), 1, *array.shape[1:]) if array.ndim == 3 else array
    dtype, levels = array.dtype.name, {"uint8": 256, "bool": 2}.get(array.dtype.name)
    if levels == 2:
        array = array.view(np.uint8)
        check_values(file, array, (0, 1))
    elif levels is None:
        check_values(file, array, config.range)
    files = _identity(file.parent, [file]) + (((key, 0),) if key else ())
    return RawDataset(
        file.name, ArrayRows(array), (array.shape[1], array.shape[2], array.shape[3]), dtype, levels, files
    )


def _open_npy(path: Path) -> Array:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy's reader raises arbitrary exceptions on damaged files
        raise InputError(f"{path} is not a plain NumPy array: {error}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(f"{path} is not a plain NumPy array; is it an .npz?")
    return array


def _open_npz(path: Path, key: str) -> Array:
    try:
        # Opened here, because NumPy leaves a file open that is not an archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = list(arrays)
            key = names[0] if not key and len(names) == 1 else key
            array = np.asarray(arrays[key]) if key in names else None
    except Exception as error:  # NumPy's reader raises arbitrary exceptions on damaged files
        raise InputError(f"{path} is not a NumPy archive of plain arrays: {error}") from None
    if array is None:
        raise InputError(f"{path} has the arrays {', '.join(names) or 'none'}; name one: array:{path}:KEY")
    return array


def check_values(path: Path, array: Array, value_range: tuple[float, float], chunk: int = _CHUNK) -> None:
    """Check that all values, converted to float32 in chunks of about `chunk` values, lie in the range.

    Raises:
        InputError: a value is outside of the range, or NaN.
    """
    low, high = map(np.float32, value_range)
    step = max(1, chunk // math.prod(array.shape[1:]))
    for first in range(0, len(array), step):
        with np.errstate(all="ignore"):
            values = np.asarray(array[first : first + step]).astype(np.float32)
        wrong = ~((values >= low) & (values <= high))
        if wrong.any():
            where = tuple(np.argwhere(wrong)[0])
            raise InputError(
                f"{path}: row {first + where[0]} has the value {values[where]:g}; expected values from {low:g} to "
                f"{high:g}. Scale the array, or state its range (--range)"
            )


def _existing(path: str, kind: str) -> Path:
    """The path in a data set's `spec`, which must be a `"folder"` or a `"file"`.

    Raises:
        InputError: it does not exist, or is something else.
    """
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:  # `~name` of a user who does not exist
        raise InputError(f"{path} does not exist: {error}") from None
    if not (expanded.is_dir() if kind == "folder" else expanded.is_file()):
        raise InputError(f"{expanded} {'is not a' if expanded.exists() else 'does not exist; expected a'} {kind}")
    return expanded


def _identity(folder: Path, files: Sequence[Path]) -> tuple[tuple[str, int], ...]:
    """Names relative to a folder, and sizes in bytes."""
    return tuple((file.relative_to(folder).as_posix(), file.stat().st_size) for file in files)


#: For each kind of data set, the form of its `spec` and its reader; `pictures` reads images.
READERS: Mapping[str, tuple[str, Callable[[DataConfig, str], RawDataset] | None]] = {
    "digits": ("digits", _digits),
    "photos": ("photos", _photos),
    "mnist": ("mnist:DIR", _mnist),
    "fashion": ("fashion:DIR", _mnist),
    "cifar10": ("cifar10:DIR", _cifar10),
    "images": ("images:DIR", None),
    "array": ("array:FILE.npy or array:FILE.npz:KEY", _array),
}
