"""The user's cache of builds: `builds/<digest of the bundle's manifest>/<slot>/`.

A slot is named after the target for float32, and for each other precision after target and precision (`cpu-auto`,
`cuda-fp16`), so that a build replaces no other.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import get_args

from platformdirs import user_cache_path

from vae_export.contract import build_record
from vae_export.contract.choices import Wanted
from vae_export.contract.manifest import Manifest
from vae_export.contract.targets import TARGET_PATTERN, Target, parse
from vae_export.errors import BackendError

_SLOT = re.compile(
    rf"({TARGET_PATTERN.pattern})(?:-(?:{'|'.join(name for name in get_args(Wanted) if name != 'fp32')}))?"
)


def cache() -> Path:
    """The folder of the user's cache: VAE_EXPORT_CACHE, or the operating system's place for caches."""
    folder = os.environ.get("VAE_EXPORT_CACHE")
    return Path(folder) if folder else user_cache_path("vae_export", appauthor=False)


def slot(target: str, wanted: Wanted = "fp32") -> str:
    """The name of the slot of a build for a target in a precision."""
    return target if wanted == "fp32" else f"{target}-{wanted}"


def cached(manifest: Manifest, name: str) -> Path:
    """The folder of a bundle's build in the cache, by the slot's name; it may not exist."""
    return cache() / "builds" / manifest.digest / name


def cached_slots(manifest: Manifest) -> list[str]:
    """The slots in which the cache holds a build of this bundle."""
    folder = cache() / "builds" / manifest.digest
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    record = build_record.RECORD_FORMAT.file
    return [path.name for path in paths if (path / record).is_file() and _SLOT.fullmatch(path.name)]


def slot_target(name: str) -> Target:
    """The target of a slot that `cached_slots` returned."""
    match = _SLOT.fullmatch(name)
    assert match is not None
    return parse(match[1])


def check_cache() -> Path:
    """The folder of the user's cache, created if it is missing. Only this user can reach it: an engine is native code.

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
