"""The files of the package that a call passes through on its way to ONNX Runtime: `load`, and then `decode`.

Run: python benchmarks/hops.py BUNDLE

Counted are the files whose functions a call enters until ONNX Runtime creates its session or returns its result. Both
calls were made before, so that nothing is imported, and what is queried once in a process is not counted (the GPU's
driver). `path` is the call stack at the creation of the session, across the thread that makes it interruptible. A file
is returned to if a file that it has called, directly or not, calls it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import vae_export

ROOT = Path(vae_export.__file__).parent
SESSION = "onnxruntime_inference_collection.py"


@dataclass
class Trace:
    """Files in the order of their first entry, those on the way to the session, and those that are returned to."""

    files: dict[str, None] = field(default_factory=dict)
    path: list[str] = field(default_factory=list)
    returns: dict[str, None] = field(default_factory=dict)


def _stack(frame: FrameType | None) -> list[str]:
    """The package's files on a stack, the innermost first."""
    files = []
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT):
            files.append(path.relative_to(ROOT).as_posix())
        frame = frame.f_back
    return files


@contextlib.contextmanager
def traced() -> Iterator[Trace]:
    """Trace this thread and all threads that are started in the block."""
    trace, start = Trace(), threading.Thread.start
    callers: dict[int, list[str]] = {}

    def started(thread: threading.Thread) -> None:
        callers[id(thread)] = _stack(sys._getframe(1))
        start(thread)

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or trace.path:
            return
        own = _stack(frame)
        stack = [file for file, _ in groupby(own + callers.get(id(threading.current_thread()), []))]
        if frame.f_code.co_filename.endswith(SESSION) and frame.f_code.co_name == "__init__":
            trace.path = stack[::-1]
        elif own and Path(frame.f_code.co_filename) == ROOT / own[0]:
            trace.files.setdefault(own[0])
            if own[0] in stack[1:]:
                trace.returns.setdefault(f"{own[0]} (from {stack[1]})")

    # A profile does not tell which thread started another one: only `start` itself knows its caller.
    threading.Thread.start = started  # type: ignore[method-assign]
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield trace
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        threading.Thread.start = start  # type: ignore[method-assign]


def main(bundle: str) -> None:
    """Print the figures."""
    vae_export.load(bundle).close()
    with traced() as loading:
        vae = vae_export.load(bundle)
    z = np.zeros((1, *vae.model.latent_shape(dict.fromkeys(vae.model.data.named(), 64))), np.float32)
    for _ in range(3):  # a fast call tells that its size needs no thread
        vae.decode(z)
    with traced() as decoding:
        vae.decode(z)
    for name, trace in (("load", loading), ("decode", decoding)):
        print(f"{name}: {len(trace.files)} files: {', '.join(trace.files)}")
        if trace.path:
            print(f"  path: {len(trace.path)} files: {' → '.join(trace.path)}")
        print(f"  returned to: {', '.join(trace.returns) or 'none'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
