"""The user's cache of builds: `builds/<digest of the bundle's manifest>/<slot>/`."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import get_args

from platformdirs import user_cache_path

from vae_export.contract import build_record
from vae_export.contract.manifest import Manifest
from vae_export.contract.targets import TARGET_PATTERN, Target, Wanted, parse
from vae_export.errors import BackendError

_SLOT = re.compile(
    rf"({TARGET_PATTERN.pattern})(?:-(?:{'|'.join(name for name in get_args(Wanted) if name != 'fp32')}))?"
)


def cache() -> Path:
    """The folder of the user's own cache: VAE_EXPORT_CACHE, or where this system keeps caches."""
    named = os.environ.get("VAE_EXPORT_CACHE")
    return Path(named) if named else user_cache_path("vae_export", appauthor=False)


def slot(target: str, wanted: Wanted = "fp32") -> str:
    """The name under which the cache keeps a bundle's build for a target in a precision."""
    return target if wanted == "fp32" else f"{target}-{wanted}"


def cached(manifest: Manifest, name: str) -> Path:
    """Where the cache keeps a bundle's build of a slot, whether it is there or not."""
    return cache() / "builds" / manifest.digest / name


def cached_slots(manifest: Manifest) -> list[str]:
    """The slots in which the cache holds a build of this bundle."""
    folder = cache() / "builds" / manifest.digest
    found = (
        sorted(path.name for path in folder.iterdir() if (path / build_record.RECORD_FORMAT.file).is_file())
        if folder.is_dir()
        else []
    )
    return [name for name in found if _SLOT.fullmatch(name)]


def slot_target(name: str) -> Target:
    """The target of a slot that `cached_slots` gave."""
    found = _SLOT.fullmatch(name)
    assert found is not None
    return parse(found[1])


def check_cache() -> Path:
    """The cache, made if it is missing, that nobody but this user can reach: an engine is native code.

    Raises:
        BackendError: it belongs to another user or is open to others.
    """
    root = cache()
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
    status = root.stat()
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077):
        raise BackendError(
            f"{root}: the cache belongs to another user or is open to others, who could put native code there. "
            f"Run: chmod 700 {root} (if it is yours), or set VAE_EXPORT_CACHE to a folder of your own"
        )
    return root
