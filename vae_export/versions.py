"""Versions of installed packages."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable


def of(package: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tools(packages: Iterable[str]) -> dict[str, str]:
    """The versions of Python and of those packages that are installed."""
    installed = {name: version for name in packages if (version := of(name))}
    return {"python": platform.python_version(), **installed}
