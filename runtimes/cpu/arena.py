"""The memory of ONNX Runtime's intermediate results on the CPU: one arena for all sessions whose data have named sizes.

An arena keeps what it has for the next call. Each session with one of its own would keep what its largest call needed;
and as it grows by regions of twice the size, none of which can hold a larger tensor together with another, a call of
large tensors can need twice what they are. Here regions are wide, and the system backs what is touched alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from vae_export.runtimes import forks

#: How much address space a region has: where it is free until it is touched, more than most models need at once.
_REGION = 1 << 30 if sys.platform == "linux" else 2 << 20
# The first region is never given back: no tensor that matters is to be in it.
_FIRST_REGION = 4096
# Without it a region's last tensor would be handed all that is left, up to 128 MiB.
_UNSPLIT = 64 << 10
#: y = x, of one number (ONNX, opset 18): a run without work, after which ONNX Runtime gives regions back.
_IDENTITY = bytes.fromhex(
    "08093a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a0808011204"
    "0a02080142040a001012"
)


class Arena:
    """What sessions on the CPU get memory from.

    Attributes:
        running: one for each call under way in any session of this process.
        forks: how many forks lay before it was last known to be whole.
    """

    def __init__(self, ort: ModuleType) -> None:
        """Make it, or take the one that somebody else registered in this process."""
        self.running: list[None] = []
        self.forks = forks.count()
        memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        chosen = ort.OrtArenaCfg(
            {
                "max_mem": 0,  # no limit
                "arena_extend_strategy": 0,  # by region, not by tensor
                "initial_chunk_size_bytes": _FIRST_REGION,
                "initial_growth_chunk_size_bytes": _REGION,
                "max_dead_bytes_per_chunk": _UNSPLIT,
            }
        )
        with contextlib.suppress(Exception):  # there is one already; ONNX Runtime's errors have no common base
            ort.create_and_register_allocator(memory, chosen)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        settings.log_severity_level = 4
        self.use(settings)
        self._session = ort.InferenceSession(_IDENTITY, settings, providers=["CPUExecutionProvider"])
        self._shrink = shrinking(ort)
        self.give_back()  # only after that the next region is a wide one

    def use(self, settings: Any) -> None:
        """Have a session take its memory from here. Its weights get their own, or regions would never be free."""
        settings.add_session_config_entry("session.use_env_allocators", "1")
        settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")

    def whole(self) -> bool:
        """Whether it can be used: a call under way when this process was forked may have held its lock."""
        if self.forks != forks.count() and not self.running:
            self.forks = forks.count()
        return self.forks == forks.count()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """While something may hold its lock."""
        self.running.append(None)
        try:
            yield
        finally:
            self.running.pop()

    def give_back(self) -> None:
        """Give regions in which nothing is back to the system. Calls of other threads keep theirs."""
        if self.whole():
            with self.used(), contextlib.suppress(Exception):  # what somebody else registered need not be an arena
                self._session.run(None, {"x": np.zeros(1, np.float32)}, self._shrink)


def shrinking(ort: ModuleType) -> Any:
    """Options of a run after which its arena gives regions back in which nothing is."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


_making = threading.Lock()
_made = functools.cache(Arena)


def shared(ort: ModuleType) -> Arena:
    """The arena of this process."""
    with _making:
        return _made(ort)


def _after_fork() -> None:
    """A lock that another thread held is held for ever in the child."""
    global _making
    _making = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def trim() -> None:
    """Give memory that the C library keeps for later back to the system, where it is glibc."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
