"""Folders whose record lists every file with its size and SHA-256: bundles and builds.

The content of such a folder is not trusted. Only listed files are read; each is read once, checked against its size
and SHA-256, and the bytes that were checked are the bytes that are used. Links and special files are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Generic, TypeVar

from vae_export.contract import atomic
from vae_export.contract.records import File, FolderRecord, RecordFormat
from vae_export.errors import BundleError, InputError

#: Bytes: a larger record is not read.
_RECORD_LIMIT = 16 << 20
#: Bytes that are read at once.
_PIECE = 16 << 20

T = TypeVar("T", bound=FolderRecord)


class RecordFolder(Generic[T]):
    """An opened folder: its record is verified; `read` and `check` verify its files.

    Its files are held open (except on Windows), so that a folder that is replaced on disk stays readable as it was.

    Attributes:
        path: the folder.
        record: its verified record.
    """

    def __init__(self, path: str | os.PathLike[str], format: RecordFormat[T]) -> None:
        """Open the folder at `path` and check its record.

        Args:
            path: the folder.
            format: of its record.

        Raises:
            InputError: there is no folder at `path`.
            BundleError: its record is missing, damaged, inconsistent or newer than this version.
        """
        self.path = Path(path)
        self._format = format
        self._kept: dict[str, bytes] = {}
        if not self.path.is_dir():
            problem = "is a file" if self.path.exists() else "does not exist"
            raise InputError(
                f"{self.path} {problem}; expected the folder of a {format.folder} "
                f"(vae-export {format.command} makes one)"
            )
        self._open: dict[str, BinaryIO] = {}
        weakref.finalize(self, _close, self._open)
        self.record: T = self._open_all()
        self._checked: set[str] = set()

    def read(self, name: str) -> bytes:
        """The verified content of a listed file.

        Raises:
            BundleError: the file is not listed, missing, not a regular file, or damaged.
        """
        if name not in self.record.files:
            raise BundleError(f"{self.path}: {name} is not listed in the {self._format.name} and is not read")
        if name in self._kept:
            return self._kept.pop(name)
        content = self._content(name, self.record.files[name])
        self._checked.add(name)
        return content

    def check(self, keep: Collection[str] = ()) -> None:
        """Verify every listed file that was not read yet.

        Args:
            keep: files whose content stays in memory until `read` returns it, so that they are read once.

        Raises:
            BundleError: as `read`.
        """
        for name in self.record.files:
            if name not in self._checked:
                content = self._content(name, self.record.files[name], keep=name in keep)
                self._checked.add(name)
                if name in keep:
                    self._kept[name] = content

    def _open_all(self) -> T:
        """Read the record and open every file that it lists.

        A folder that is replaced meanwhile loses its files: then the one that is at the path now is opened.
        """
        while True:
            with _held(self.path) as folder:
                if (record := self._try_open(folder)) is not None:
                    return record
            _close(self._open)

    def _try_open(self, folder: os.stat_result) -> T | None:
        """Read the record and open its files; None if another folder is at the path by then."""
        try:
            record = self._format.decode(self._content(self._format.file, None))
            if sys.platform != "win32":  # there an open file would keep the folder from being replaced
                for name in record.files:
                    with contextlib.suppress(BundleError):  # `read` says why
                        self._open[name] = self._opened(name)
        except BundleError:
            if self._is_still(folder):
                raise
        return record if self._is_still(folder) else None

    def _is_still(self, folder: os.stat_result) -> bool:
        return not self.path.is_dir() or os.path.samestat(folder, self.path.stat())

    def _opened(self, name: str) -> BinaryIO:
        """Open a file of the folder.

        Raises:
            BundleError: it or a folder on the way is a link, or it cannot be opened.
        """
        path = self.path.joinpath(*PurePosixPath(name).parts)
        for part in (path, *path.parents):
            if part == self.path:
                break
            if part.is_symlink():
                raise BundleError(
                    f"{path}: {part.name} is a symbolic link. Copy the {self._format.folder} with its files instead"
                )
        try:
            return open(path, "rb", buffering=0, opener=_opener)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}. {self._format.remedy}") from None

    def unlisted(self) -> list[str]:
        """Files in the folder that the record does not list. They are never read."""
        present = {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if not p.is_dir()}
        return sorted(present - set(self.record.files) - {self._format.file})

    def _content(self, name: str, expected: File | None, *, keep: bool = True) -> bytes:
        """A file's verified content; with `keep` false it is verified piece by piece, and empty bytes are returned."""
        path = self.path.joinpath(*PurePosixPath(name).parts)
        digest, pieces = hashlib.sha256(), []
        held = self._open.get(name)
        try:
            with contextlib.nullcontext(held) if held else self._opened(name) as file:
                left = self._check_status(path, os.fstat(file.fileno()), expected) + 1
                file.seek(0)
                while left and (piece := file.read(min(left, _PIECE))):
                    left -= len(piece)
                    digest.update(piece)
                    if keep:
                        pieces.append(piece)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}. {self._format.remedy}") from None
        if expected and (left != 1 or digest.hexdigest() != expected.sha256):
            raise BundleError(
                f"{path}: its SHA-256 is not the one in the {self._format.name}: it was damaged or changed. "
                f"{self._format.remedy}"
            )
        return b"".join(pieces)

    def _check_status(self, path: Path, status: os.stat_result, expected: File | None) -> int:
        """Raise for what is not a regular file of the expected size; return the largest size that may be read."""
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path}: is not a plain file")
        if status.st_nlink > 1:
            raise BundleError(
                f"{path}: is a hard link, so that it can be changed from outside the {self._format.folder}. "
                f"Copy the {self._format.folder} with its content instead"
            )
        limit = _RECORD_LIMIT if expected is None else expected.size
        if status.st_size > limit or (expected and status.st_size != limit):
            raise BundleError(
                f"{path}: has {status.st_size} bytes, expected {'at most ' * (expected is None)}{limit}. "
                f"It is truncated or was changed. {self._format.remedy}"
            )
        return limit


def _close(opened: dict[str, BinaryIO]) -> None:
    for file in opened.values():
        file.close()
    opened.clear()


@contextlib.contextmanager
def _held(path: Path) -> Iterator[os.stat_result]:
    """The status of the folder at `path`, held open so that no other folder can get its inode number."""
    if sys.platform == "win32":  # cannot open a folder
        yield path.stat()
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        yield os.fstat(handle)
    finally:
        os.close(handle)


def _opener(path: str, flags: int) -> int:
    """Open without following a link, and without waiting for the writer of a FIFO."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def check_target(path: Path, format: RecordFormat[T], *, overwrite: bool) -> None:
    """Check that a folder of this format may be written to `path`.

    Raises:
        InputError: something is at `path` and overwrite is false, or it is not a whole folder of this format, or it
            holds other files, which would be lost.
    """
    atomic.check_target(path, overwrite=overwrite)
    if path.is_dir() and any(path.iterdir()):
        try:
            others = RecordFolder(path, format).unlisted()
        except BundleError as error:
            raise InputError(
                f"{path} exists and is not a whole {format.folder} ({error}). Remove it yourself or choose another path"
            ) from None
        if others:
            raise InputError(
                f"{path} holds files that are not the {format.folder}'s: {', '.join(others[:5])}. Move them away, or "
                "choose another path"
            )


def list_files(folder: Path) -> dict[str, File]:
    """The records of all files in a folder, for `FolderRecord.files`."""
    records = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        records[path.relative_to(folder).as_posix()] = File(size=path.stat().st_size, sha256=digest)
    return records


@contextlib.contextmanager
def create(path: Path, format: RecordFormat[T], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder to fill, its record last. On success it becomes the folder at `path`, whole or not at all.

    Raises:
        InputError: as `check_target`.
    """
    check_target(path, format, overwrite=overwrite)
    with atomic.atomic_folder(
        path, overwrite=overwrite, check=lambda folder: check_target(folder, format, overwrite=True)
    ) as stage:
        yield stage
