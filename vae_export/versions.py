"""Versions of installed packages."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable


def of(package: str) -> str | None:
    """An installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tools(packages: Iterable[str]) -> dict[str, str]:
    """Python's version, and those of the packages that are installed: what made a bundle or a build."""
    found = {name: version for name in packages if (version := of(name))}
    return {"python": platform.python_version(), **found}
