"""Open a bundle, trusting nothing in it, and create one atomically.

A bundle is data from a stranger. Only listed files are read; each is read once, checked against its size
and SHA-256, and the bytes that were checked are the bytes that are used. Links and special files are
refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from vae_export import files
from vae_export import manifest as manifests
from vae_export.errors import BundleError, InputError
from vae_export.manifest import File, Manifest

MANIFEST = "manifest.json"
#: A manifest larger than this is not read.
_MANIFEST_LIMIT = 16 << 20
_PIECE = 16 << 20


class Bundle:
    """An opened bundle. Nothing but the manifest has been read; `read` and `check` do the rest.

    Attributes:
        path: the bundle's folder.
        manifest: its verified manifest.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the bundle at `path` and check its manifest.

        Raises:
            InputError: there is no folder at `path`.
            BundleError: its manifest is missing, damaged, newer than this version or was changed.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            found = "is a file" if self.path.exists() else "does not exist"
            raise InputError(f"{self.path} {found}; expected the folder of a bundle (vae-export export makes one)")
        self.manifest: Manifest = manifests.decode(self._content(MANIFEST, None))
        self._checked: set[str] = set()

    def read(self, name: str) -> bytes:
        """The verified content of a listed file.

        Raises:
            BundleError: the file is not listed, missing, not a plain file, or its content was changed.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name} is not listed in the manifest and is not read")
        content = self._content(name, self.manifest.files[name])
        self._checked.add(name)
        return content

    def check(self) -> None:
        """Verify every listed file that was not read yet.

        Raises:
            BundleError: as `read`.
        """
        for name in self.manifest.files:
            if name not in self._checked:
                self._content(name, self.manifest.files[name], keep=False)
                self._checked.add(name)

    def unlisted(self) -> list[str]:
        """Files in the folder that the manifest does not list. They are never read."""
        found = (p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if not p.is_dir())
        return sorted(set(found) - set(self.manifest.files) - {MANIFEST})

    def _content(self, name: str, expected: File | None, *, keep: bool = True) -> bytes:
        """A file's content, checked; with `keep` false it is only checked, piece by piece."""
        path = self.path.joinpath(*PurePosixPath(name).parts)
        digest, pieces = hashlib.sha256(), []
        try:
            for part in (path, *path.parents):
                if part == self.path:
                    break
                if part.is_symlink():
                    raise BundleError(f"{path}: {part.name} is a symbolic link. Copy the bundle with its files instead")
            with open(path, "rb", opener=_opener) as file:
                left = _check_status(path, os.fstat(file.fileno()), expected) + 1
                while left and (piece := file.read(min(left, _PIECE))):
                    left -= len(piece)
                    digest.update(piece)
                    if keep:
                        pieces.append(piece)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}. Export or copy the bundle again") from None
        if expected and (left != 1 or digest.hexdigest() != expected.sha256):
            raise BundleError(
                f"{path}: its SHA-256 is not the one in the manifest: it was damaged or changed. "
                "Export or copy the bundle again"
            )
        return b"".join(pieces)


def _check_status(path: Path, status: os.stat_result, expected: File | None) -> int:
    """Refuse what is not a plain file of the expected size. Gives the largest size that may be read."""
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: is not a plain file")
    if status.st_nlink != 1:
        raise BundleError(
            f"{path}: is a hard link, so that it can be changed from outside the bundle. "
            "Copy the bundle with its content instead"
        )
    limit = _MANIFEST_LIMIT if expected is None else expected.size
    if status.st_size > limit or (expected and status.st_size != limit):
        raise BundleError(
            f"{path}: has {status.st_size} bytes, expected {'at most ' * (expected is None)}{limit}. "
            "It is truncated or was changed; export or copy the bundle again"
        )
    return limit


def _opener(path: str, flags: int) -> int:
    """Open neither a link nor, waiting for somebody to write, a FIFO."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


@contextlib.contextmanager
def create(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to fill and to end with `write_manifest`. On success it becomes the bundle at `path`.

    Raises:
        InputError: something is at `path` and overwrite is false, or what is there is not just a bundle.
    """
    check_target(path, overwrite=overwrite)
    with files.atomic_folder(path, overwrite=overwrite) as stage:
        yield stage


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a place at which `create` cannot make a bundle. Errors as there."""
    files.check_target(path, overwrite=overwrite)
    if path.is_dir() and any(path.iterdir()):
        try:
            strangers = Bundle(path).unlisted()
        except BundleError as error:
            raise InputError(
                f"{path} exists and is not a whole bundle ({error}). Remove it yourself, or choose another path"
            ) from None
        if strangers:
            raise InputError(
                f"{path} holds files that are not the bundle's: {', '.join(strangers[:5])}. Move them away, or "
                "choose another path"
            )


def list_files(folder: Path) -> dict[str, File]:
    """The records of all files in a folder, for the manifest's `files`."""
    records = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        records[path.relative_to(folder).as_posix()] = File(size=path.stat().st_size, sha256=digest)
    return records


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into the folder of a bundle that is being made."""
    (folder / MANIFEST).write_bytes(manifests.encode(manifest))
