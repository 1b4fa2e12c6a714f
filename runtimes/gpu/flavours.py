"""TensorRT and TensorRT for RTX: one Python API in packages of several names."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae_export.contract.targets import FlavourName, title
from vae_export.errors import BackendError

#: The extra that brings each flavour.
EXTRAS: Mapping[FlavourName, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
#: TensorRT below 11 has published vulnerabilities in reading engines; RTX below 1.7 is untested.
MINIMUM: Mapping[FlavourName, tuple[int, int]] = {"tensorrt": (11, 0), "tensorrt-rtx": (1, 7)}
_KEPT_MESSAGES = 50


@dataclass(frozen=True)
class Bindings:
    """A flavour's Python API, loaded.

    Attributes:
        flavour: its name.
        trt: the module.
        version: its exact version.
        logger: the only logger of this process for it: TensorRT accepts no second one.
    """

    flavour: FlavourName
    trt: Any
    version: str
    logger: Any

    @property
    def title(self) -> str:
        """The flavour's name and version, for messages."""
        return f"{title(self.flavour)} {self.version}"

    def errors(self) -> str:
        """Its error messages since the last call, from any thread, in one line."""
        with self.logger.lock:
            messages = " / ".join(dict.fromkeys(self.logger.messages))
            self.logger.messages.clear()
        return messages or "it gave no reason"


@functools.cache
def load(flavour: FlavourName) -> Bindings:
    """Load a flavour.

    Raises:
        BackendError: it is not installed, does not load, or is too old.
    """
    install = f"Run: pip install 'vae-export[{EXTRAS[flavour]}]'"
    try:
        trt = _tensorrt() if flavour == "tensorrt" else _rtx()
    except Exception as error:  # a broken installation may raise anything
        raise BackendError(f"{title(flavour)} is installed and does not load: {error}. {install}") from None
    if trt is None:
        raise BackendError(f"{title(flavour)} is not installed. {install}")
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < MINIMUM[flavour]:
        wanted = ".".join(map(str, MINIMUM[flavour]))
        raise BackendError(f"{title(flavour)} is {trt.__version__}; {wanted} or newer is needed. {install} --upgrade")
    return Bindings(flavour, trt, trt.__version__, _logger(trt))


def _tensorrt() -> Any | None:
    return importlib.import_module("tensorrt") if importlib.util.find_spec("tensorrt") else None


def _rtx() -> Any | None:
    """`tensorrt_rtx`, or the bindings with the libraries that ONNX Runtime's plugin for RTX carries."""
    if importlib.util.find_spec("tensorrt_rtx"):
        return importlib.import_module("tensorrt_rtx")
    carrier = "onnxruntime_ep_nv_tensorrt_rtx"
    if not (importlib.util.find_spec("tensorrt_rtx_bindings") and importlib.util.find_spec(carrier)):
        return None
    folder = Path(importlib.import_module(carrier).__file__ or "").parent
    if sys.platform == "linux":
        for name in ("libcudart.so.13", "libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"):
            library = min(folder.glob(f"{name}*"), default=None)
            if library:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_rtx_bindings")


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps error messages for the exception that follows."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lock = threading.Lock()
            self.messages: deque[str] = deque(maxlen=_KEPT_MESSAGES)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                with self.lock:
                    self.messages.append(" ".join(message.split()))

    return Log()
