"""Write a file or a folder atomically: a reader, or a crash, sees the old content or the new one, never a mixture.

Everything is written to a hidden stage beside the target, flushed to disk and then renamed.
"""

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
    """Check that a folder may be written to `path`.

    Raises:
        InputError: something is at `path` already and overwrite is false, or it is not a folder.
    """
    check_name(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path} exists and is not a folder. Choose another path")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already. Choose another path, or overwrite it on purpose (--force)")


def check_name(path: Path) -> None:
    """Raise InputError for a path that no file can have: with a NUL character, or not encodable."""
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
    """Yield a new, empty folder beside `path` to write into; it becomes `path` on success and is removed on failure.

    A crash at any moment leaves what was at `path`, or the complete new folder. Where the system cannot exchange two
    folders atomically (all but Linux), the old one has a hidden name beside `path` for a moment; the next writer puts
    it back. The next writer also removes what killed writers left, on file systems that have locks.

    Args:
        path: the folder.
        overwrite: replace the folder that is there.
        check: raises InputError for a folder that must not be replaced. It sees what was moved away from `path` before
            any of it is deleted; where it raises, that is put back.

    Raises:
        InputError: as `check_target`, or something appeared at `path` that must not be replaced.
    """
    check_target(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked_stage(path, path.name) as own:
        stage = own / _NEW
        stage.mkdir(parents=True)
        yield stage
        for folder, _, names in os.walk(stage, topdown=False):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        _put(stage, path, overwrite=overwrite, check=check)
        _sync(path.parent)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path` to write to; it becomes `path` on success and is removed on failure.

    Missing parent folders are created. What is not a regular file, such as a device, is written to directly. The next
    writer removes what killed writers left, on file systems that have locks.
    """
    check_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        yield path
        return
    with _locked_stage(path, path.stem, path.suffix) as stage:
        yield stage
        _sync(stage)
        stage.replace(path)
        _sync(path.parent)


_NEW, _OLD = "new", "old"


@contextlib.contextmanager
def _locked_stage(path: Path, stem: str, suffix: str = "") -> Iterator[Path]:
    """A hidden path beside `path`, locked while its writer lives; what is there at the end is removed."""
    from filelock import FileLock, Timeout  # takes 10 ms, and only writers need it

    _remove_leftovers(path, f".{glob.escape(stem)}.{'?' * _TOKEN}.partial{glob.escape(suffix)}{_LOCK}")
    for _ in range(_TRIES):
        stage = path.parent / f".{stem}.{secrets.token_hex(_TOKEN // 2)}.partial{suffix}"
        lock = FileLock(f"{stage}{_LOCK}")
        try:
            lock.acquire(blocking=False)
            break
        except Timeout:  # another writer, cleaning up, locked it between its creation and its locking here
            continue
        except (OSError, NotImplementedError):  # a network file system without locks: no writer knows who lives
            break
    try:
        yield stage
    finally:
        _remove(stage)
        lock.release()
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()  # Windows unlinks it on release


_LOCK = ".lock"
_TOKEN = 8  # hexadecimal digits
_TRIES = 10


def _remove_leftovers(path: Path, pattern: str) -> None:
    """Remove what killed writers of `path` left; a folder that they had moved away from `path` is put back first."""
    from filelock import FileLock

    for file in path.parent.glob(pattern):
        left = file.with_name(file.name.removesuffix(_LOCK))
        if file.is_symlink() or left.is_symlink():
            continue
        with contextlib.suppress(OSError, NotImplementedError):  # its writer lives, or there are no locks
            with FileLock(file).acquire(blocking=False):
                if (left / _OLD).is_dir() and not path.exists():
                    (left / _OLD).rename(path)
                _remove(left)
            file.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put(stage: Path, path: Path, *, overwrite: bool, check: Callable[[Path], None]) -> None:
    """Move the folder `stage` to `path`; what was there, if it may be replaced, is then inside the stage's parent."""
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
    moved = stage if swapped else stage.parent / _OLD
    try:
        check_target(moved, overwrite=True)
        check(moved)
        if not swapped:
            stage.rename(path)
    except BaseException:
        if swapped:
            _exchange(stage, path)
        else:
            moved.rename(path)
        raise


def _rename(new: Path, path: Path) -> None:
    """Rename a folder to a path that must not exist.

    Raises:
        FileExistsError: it exists.
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
    """Exchange two folders atomically; False where the system cannot."""
    return _renameat2(one, other, 2)  # RENAME_EXCHANGE


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    """Linux's rename with flags (linux/fs.h, fcntl.h); False where it is missing or failed."""
    if sys.platform != "linux":
        return False
    here = -100  # AT_FDCWD
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(here, os.fsencode(old), here, os.fsencode(new), flags) == 0


def _sync(path: Path) -> None:
    """Flush a file or folder to disk. Windows flushes only through handles that may write, and opens no folder."""
    windows = sys.platform == "win32"
    if windows and (path.is_dir() or not os.access(path, os.W_OK)):
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
