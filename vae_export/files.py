"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from vae_export.errors import InputError


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a place at which no folder can be made.

    Raises:
        InputError: something is at `path` already and overwrite is false, or it is not a folder.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path} exists and is not a folder. Choose another path")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already. Choose another path, or overwrite it on purpose (--force)")


@contextlib.contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a new folder beside `path` to write into; on success it becomes `path`, on failure it goes.

    A crash at any moment leaves what was at `path`, or the complete new folder. Where the system cannot
    exchange two folders at once, there is a moment in which the old one has a hidden name beside `path`.

    Raises:
        InputError: as `check_target`.
    """
    check_target(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    stage.mkdir()
    try:
        yield stage
        for folder, _, names in os.walk(stage, topdown=False):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        if path.exists():
            _swap(stage, path)
        else:
            stage.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a new file's path beside `path` to write to; on success it becomes `path`, on failure it goes.

    Folders on the way are made. What is no plain file, such as a device, is written to directly.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        yield path
        return
    stage = path.parent / f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}"
    try:
        yield stage
        _sync(stage)
        stage.replace(path)
        _sync(path.parent)
    finally:
        stage.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # Windows cannot open a folder to flush it
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(new: Path, old: Path) -> None:
    """Put the folder `new` at `old` and the old one at `new`, at once where the system can."""
    if sys.platform == "linux":
        exchange, here = 2, -100  # RENAME_EXCHANGE, AT_FDCWD (linux/fs.h, fcntl.h)
        renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
        if renameat2 and renameat2(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0:
            return
    aside = old.parent / f".{old.name}.{secrets.token_hex(4)}.old"
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
