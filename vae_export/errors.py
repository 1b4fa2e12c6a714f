"""Errors, one base class and four subclasses, each with its exit code; and a warning."""

from __future__ import annotations

import importlib
from types import ModuleType


def printable(text: str) -> str:
    """A text with escaped control characters, bidirectional marks and invisible characters; line ends are kept."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class VaeExportError(Exception):
    """The base of all expected failures. The command line shows the message, never a traceback."""

    exit_code = 2

    def __str__(self) -> str:
        """The message. Names in it may come from untrusted files: control characters are escaped."""
        return printable(super().__str__())


class InputError(VaeExportError, ValueError):
    """An argument, an array or an input file is invalid (exit code 2)."""


class VerificationError(VaeExportError):
    """An exported graph differs from the reference by more than its tolerance (exit code 1)."""

    exit_code = 1


class BundleError(VaeExportError):
    """A bundle is incomplete, damaged, inconsistent or newer than this version (exit code 3)."""

    exit_code = 3


class BackendError(VaeExportError):
    """A requested backend, package or device is not available (exit code 4)."""

    exit_code = 4


def check_flags(verb: str, **flags: object) -> None:
    """Check that flags have a truth value.

    Raises:
        InputError: one has none, such as an array.
    """
    for name, value in flags.items():
        try:
            bool(value)
        except Exception:  # arrays of several libraries, each with an error of its own
            raise InputError(f"{verb}: {name} is a {type(value).__name__}; expected True or False") from None


class TileWarning(UserWarning):
    """A call runs in tiles, which visibly changes the results, as measured at the export."""


#: The modules that an export needs, each with the extra that installs it.
EXPORT_NEEDS = (
    *(("torch", "export"), ("onnx", "export"), ("onnx_ir", "export"), ("onnxscript", "export")),
    ("onnxruntime", "cpu"),
)

#: The modules that training needs, likewise.
TRAIN_NEEDS = tuple((name, "train") for name in ("torch", "lightning_fabric", "sklearn", "matplotlib", "tensorboardX"))


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: the module to import, such as ``"torch"``.
        extra: the extra of this distribution that installs it, such as ``"export"``.
        purpose: the beginning of the message, such as ``"export"`` or ``"load"``.

    Raises:
        BackendError: the module is not installed; the message names the extra. A module that is installed but fails to
            import raises its own error: a broken installation is not a missing one.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
    raise BackendError(
        f"{purpose}: the Python package {module.partition('.')[0]!r} is not installed. "
        f"Run: pip install 'vae-export[{extra}]'"
    )
