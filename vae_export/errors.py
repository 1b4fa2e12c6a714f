"""What a user can be told: errors, of one base and four leaves, each with its exit code; and a warning."""

from __future__ import annotations

import importlib
from types import ModuleType


def printable(text: str) -> str:
    """A text whose control characters, bidirectional marks and invisible characters are escaped, but for line ends."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class VaeExportError(Exception):
    """The base of all expected failures. The command line shows the message, never a traceback."""

    exit_code = 2

    def __str__(self) -> str:
        """The message. Names in it may come from a stranger's file and are shown without what steers a terminal."""
        return printable(super().__str__())


class InputError(VaeExportError, ValueError):
    """An argument, an array or a file that was given is not what is needed (exit code 2)."""


class VerificationError(VaeExportError):
    """An exported graph differs from the reference by more than its budget (exit code 1)."""

    exit_code = 1


class BundleError(VaeExportError):
    """A bundle is incomplete, damaged, tampered with or newer than this version (exit code 3)."""

    exit_code = 3


class BackendError(VaeExportError):
    """A backend, a package or the hardware that was asked for is not available (exit code 4)."""

    exit_code = 4


def check_flags(verb: str, **flags: object) -> None:
    """Refuse what is neither true nor false, such as an array.

    Raises:
        InputError: a flag is no such thing.
    """
    for name, value in flags.items():
        try:
            bool(value)
        except Exception:  # arrays of several libraries, each with an error of its own
            raise InputError(f"{verb}: {name} is a {type(value).__name__}; expected True or False") from None


class TileWarning(UserWarning):
    """A call is cut into tiles, and the export measured that this visibly changes what the model gives."""


#: What an export needs: each module and the extra that brings it.
EXPORT_NEEDS = (
    *(("torch", "export"), ("onnx", "export"), ("onnx_ir", "export"), ("onnxscript", "export")),
    ("onnxruntime", "cpu"),
)

#: What training needs, likewise.
TRAIN_NEEDS = tuple((name, "train") for name in ("torch", "lightning_fabric", "sklearn", "matplotlib", "tensorboardX"))


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Args:
        module: the module to import, such as ``"torch"``.
        extra: the extra of this distribution that installs it, such as ``"export"``.
        purpose: what needs it, as the subject of the message: ``"export"``, ``"load"``.

    Raises:
        BackendError: the module is not installed. A module that is there but fails to import
            raises its own error: a broken installation is not a missing one.
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
