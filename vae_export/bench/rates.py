"""The machine's own rates, which throughput is shown relative to, and a description of the machine."""

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
from typing import Any

import numpy as np

from vae_export import versions
from vae_export.runtimes import processor

_PACKAGES = ("vae-export", "onnxruntime", "openvino", "torch", "diffusers", "numpy")
_REPEATS = 3


class MachineRates:
    """The best rates of matrix products and copies so far.

    A sample takes a tenth of a second. Samples between cells meet the machine in the state in which the runners did.
    """

    def __init__(self, threads: int | None = None, *, side: int = 1024, copied: int = 64 << 20) -> None:
        """Allocate the operands.

        Args:
            threads: of the products, where the package threadpoolctl can set it for NumPy's BLAS library; None leaves
                it. Copies have one thread.
            side: of the square matrices.
            copied: bytes, more than the caches of a core.
        """
        self._threads = threads
        self._best: dict[str, float] = {}
        self._left = np.linspace(-1.0, 1.0, side * side, dtype=np.float32).reshape(side, side)
        self._right, self._product = self._left.T.copy(), np.empty_like(self._left)
        self._from = np.ones(copied // 4, np.float32)
        self._to = np.zeros_like(self._from)

    def sample(self) -> None:
        """Measure once more. Bfloat16 is measured with PyTorch, if this process has imported it."""
        flops = 2.0 * len(self._left) ** 3 / 1e9
        with _limited(self._threads):
            self._note("float32_gflops", flops, lambda: np.matmul(self._left, self._right, out=self._product))
        if torch := sys.modules.get("torch"):
            left, right = (torch.from_numpy(a).bfloat16() for a in (self._left, self._right))
            self._note("bfloat16_gflops", flops, lambda: torch.mm(left, right))
        # A copy reads and writes.
        self._note("copy_gb_per_second", 2 * self._from.nbytes / 1e9, lambda: np.copyto(self._to, self._from))

    def rates(self) -> dict[str, float]:
        """`float32_gflops`, `copy_gb_per_second` and, if measured, `bfloat16_gflops`; a multiply-add counts as 2."""
        return dict(self._best)

    def _note(self, name: str, amount: float, work: Callable[[], Any]) -> None:
        for _ in range(_REPEATS):
            began = time.perf_counter()
            work()
            self._best[name] = max(self._best.get(name, 0.0), amount / (time.perf_counter() - began))


def _limited(threads: int | None) -> AbstractContextManager[Any]:
    """A context in which NumPy's BLAS library has that many threads, where that can be set."""
    try:
        control = importlib.import_module("threadpoolctl")
    except ModuleNotFoundError:
        return contextlib.nullcontext()
    limits: AbstractContextManager[Any] = control.threadpool_limits(threads, user_api="blas")
    return limits


def machine() -> dict[str, Any]:
    """`date`, `machine` and `versions`, for the head of a recorded result. Nothing in it identifies the machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            "processor": processor.processor().model,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": {name: version for name in _PACKAGES if (version := versions.of(name))},
    }
