"""What the machine could do at most: its rates of float32 and bfloat16 products and of copies, and what it is."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from vae_export import versions

_PACKAGES = ("vae-export", "onnxruntime", "openvino", "torch", "diffusers", "numpy")
_SIDE = 1024
#: More than the caches of a core, less than a small machine misses.
_COPIED = 64 << 20
_REPEATS = 3


class Roof:
    """The best rates so far. Each sample is a tenth of a second: taken between cells, they meet the machine as the
    runners did.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Make the operands.

        Args:
            threads: of the products, where the package threadpoolctl is there to tell NumPy's library; None leaves
                them. Copies are of one thread.
        """
        self._threads = threads
        self._best: dict[str, float] = {}
        self._left = np.linspace(-1.0, 1.0, _SIDE * _SIDE, dtype=np.float32).reshape(_SIDE, _SIDE)
        self._right, self._product = self._left.T.copy(), np.empty_like(self._left)
        self._from = np.ones(_COPIED // 4, np.float32)
        self._to = np.zeros_like(self._from)

    def sample(self) -> None:
        """Measure once more. Bfloat16 is measured where PyTorch is in this process."""
        flops = 2.0 * _SIDE**3 / 1e9
        with _limited(self._threads):
            self._note("float32_gflops", flops, lambda: np.matmul(self._left, self._right, out=self._product))
        if torch := sys.modules.get("torch"):
            left, right = (torch.from_numpy(a).bfloat16() for a in (self._left, self._right))
            self._note("bfloat16_gflops", flops, lambda: torch.mm(left, right))
        # A copy reads and writes.
        self._note("copy_gb_per_second", 2 * _COPIED / 1e9, lambda: np.copyto(self._to, self._from))

    def rates(self) -> dict[str, float]:
        """`float32_gflops`, `copy_gb_per_second` and, where it was measured, `bfloat16_gflops`; a multiply-add is 2."""
        return dict(self._best)

    def _note(self, name: str, amount: float, work: Callable[[], Any]) -> None:
        for _ in range(_REPEATS):
            began = time.perf_counter()
            work()
            self._best[name] = max(self._best.get(name, 0.0), amount / (time.perf_counter() - began))


def _limited(threads: int | None) -> AbstractContextManager[Any]:
    """NumPy's library of products at so many threads, where that can be told."""
    try:
        control = importlib.import_module("threadpoolctl")
    except ModuleNotFoundError:
        return contextlib.nullcontext()
    limits: AbstractContextManager[Any] = control.threadpool_limits(threads, user_api="blas")
    return limits


def machine() -> dict[str, Any]:
    """For the head of a recorded result: `date`, `machine` and `versions`. Nothing in it names the machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: found for name in _PACKAGES if (found := versions.of(name))},
    }


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
