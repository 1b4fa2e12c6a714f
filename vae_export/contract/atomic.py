"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from vae_export.errors import InputError


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a place at which no folder can be made.

    Raises:
        InputError: something is at `path` already and overwrite is false, or it is not a folder.
    """
    check_name(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path} exists and is not a folder. Choose another path")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already. Choose another path, or overwrite it on purpose (--force)")


def check_name(path: Path) -> None:
    """Refuse what no file can be called."""
    try:
        if 0 not in os.fsencode(path):
            return
    except UnicodeEncodeError:
        pass
    raise InputError(f"{str(path)!r} is no name of a file. Choose another path")


@contextlib.contextmanager
def atomic_folder(
    path: Path, *, overwrite: bool = False, check: Callable[[Path], None] = lambda folder: None
) -> Iterator[Path]:
    """Give a new folder beside `path` to write into; on success it becomes `path`, on failure it goes.

    A crash at any moment leaves what was at `path`, or the complete new folder. Where the system cannot
    exchange two folders at once, there is a moment in which the old one has a hidden name beside `path`; the next
    writer puts it back. What writers left that were killed is removed, on systems that have `flock`.

    Args:
        path: the folder.
        overwrite: replace the folder that is there.
        check: raises InputError for a folder that must not be replaced. It sees what was taken away from `path` before
            any of it is deleted; where it refuses, that is put back.

    Raises:
        InputError: as `check_target`, or something appeared at `path` that must not be replaced.
    """
    check_target(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    with _locked_folder(path) as own:
        stage = own / _NEW
        stage.mkdir()
        yield stage
        for folder, _, names in os.walk(stage, topdown=False):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        _put(stage, path, overwrite=overwrite, check=check)
        _sync(path.parent)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a new file's path beside `path` to write to; on success it becomes `path`, on failure it goes.

    Folders on the way are made. What is no plain file, such as a device, is written to directly. What writers left
    that were killed is removed, on systems that have `flock`.
    """
    check_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        yield path
        return
    for left in path.parent.glob(f".{glob.escape(path.stem)}.*.partial{glob.escape(path.suffix)}"):
        with contextlib.suppress(OSError), _dead(left):
            left.unlink()
    stage, handle = _claim(lambda: _beside(path, path.stem, path.suffix), lambda new: new.open("xb").close())
    try:
        yield stage
        _sync(stage)
        stage.replace(path)
        _sync(path.parent)
    finally:
        stage.unlink(missing_ok=True)
        os.close(handle)


_NEW, _OLD = "new", "old"


def _beside(path: Path, stem: str, suffix: str = "") -> Path:
    return path.parent / f".{stem}.{secrets.token_hex(4)}.partial{suffix}"


@contextlib.contextmanager
def _locked_folder(path: Path) -> Iterator[Path]:
    """A new hidden folder beside `path`, locked for as long as its writer lives, and removed at the end."""
    own, handle = _claim(lambda: _beside(path, path.name), Path.mkdir)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        os.close(handle)


def _claim(name: Callable[[], Path], make: Callable[[Path], None]) -> tuple[Path, int]:
    """Make something hidden and lock it, so that no other writer takes it for a dead one's. Its path and handle."""
    while True:
        path = name()
        make(path)
        if sys.platform == "win32":
            return path, os.open(os.devnull, os.O_RDONLY)
        handle = os.open(path, os.O_RDONLY)
        if _lock(handle) is not False and path.exists() and os.path.samestat(os.fstat(handle), path.lstat()):
            return path, handle
        os.close(handle)  # somebody who cleans up was between making and locking


def _lock(handle: int) -> bool | None:
    """Lock an open file or folder until its handle closes. False if another has it, None if there are no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None  # a network's file system, on which nobody can tell who lives
    return True


@contextlib.contextmanager
def _dead(path: Path) -> Iterator[None]:
    """Hold what a dead writer left.

    Raises:
        OSError: its writer lives, or that cannot be told.
    """
    if sys.platform == "win32":
        raise OSError(errno.ENOTSUP, "no locks")
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if _lock(handle) is not True or not os.path.samestat(os.fstat(handle), path.lstat()):
            raise BlockingIOError(errno.EWOULDBLOCK, "its writer lives")
        yield
    finally:
        os.close(handle)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed writers of the folder left; what they had moved away is put back first."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if not left.is_dir() or left.is_symlink():
            continue
        with contextlib.suppress(OSError), _dead(left):
            if (left / _OLD).is_dir() and not path.exists():
                (left / _OLD).rename(path)
            shutil.rmtree(left)


def _put(stage: Path, path: Path, *, overwrite: bool, check: Callable[[Path], None]) -> None:
    """Put the folder `stage` at `path`; what was there, if it may be replaced, is then in the place of `stage`."""
    if not (overwrite and path.exists()):
        try:
            _rename(stage, path)
            return
        except FileExistsError:
            if not overwrite:
                raise InputError(
                    f"{path} appeared while this was written, by another writer. Nothing was replaced: choose another "
                    "path, or overwrite it on purpose (--force)"
                ) from None
    check_target(path, overwrite=True)
    check(path)
    swapped = _exchange(stage, path)
    if not swapped:
        path.rename(stage.parent / _OLD)
    taken = stage if swapped else stage.parent / _OLD
    try:
        check_target(taken, overwrite=True)
        check(taken)
    except BaseException:
        if swapped:
            _exchange(stage, path)
        else:
            taken.rename(path)
        raise
    if not swapped:
        stage.rename(path)


def _rename(new: Path, path: Path) -> None:
    """Rename a folder to where nothing is.

    Raises:
        FileExistsError: something is there.
    """
    if _renameat2(new, path, 1):  # RENAME_NOREPLACE
        return
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    try:
        new.rename(path)
    except OSError as error:  # a folder never replaces a file or a folder that has something in it
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders at once; False where the system cannot."""
    return _renameat2(one, other, 2)  # RENAME_EXCHANGE


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    """Linux's rename with flags (linux/fs.h, fcntl.h); False where it is not there or failed."""
    if sys.platform != "linux":
        return False
    here = -100  # AT_FDCWD
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(here, os.fsencode(old), here, os.fsencode(new), flags) == 0


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # Windows cannot open a folder to flush it
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
