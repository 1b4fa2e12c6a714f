"""Checks of values that records hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath


def is_sha256(text: str) -> bool:
    """Whether a text is 64 lower-case hexadecimal digits."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def check_text(*texts: str) -> None:
    """Raise ValueError for control characters and other text that is not printable."""
    for text in texts:
        if not text.isprintable():
            raise ValueError(f"printable text expected, got {text!r}")


def check_paths(paths: Iterable[str]) -> None:
    """Raise ValueError for what is not a plain relative path with forward slashes."""
    for path in paths:
        pure = PurePosixPath(path)
        if (
            str(pure) != path
            or not pure.parts
            or not path.isprintable()
            or pure.is_absolute()
            or ".." in pure.parts
            or re.search(r"[\\:\0]", path)
        ):
            raise ValueError(f"file {path!r}: a plain path inside the folder expected")
