"""The memory of ONNX Runtime's intermediate results on the CPU: one arena for all sessions whose data have named sizes.

An arena keeps its memory for the next call. With an arena of its own, each session would keep what its largest call
needed; and as an arena grows by regions of twice the size, and a tensor lies in one region, a call of large tensors can
need twice their size. Here regions are wide address ranges, of which the system backs only the pages that are touched.
Nothing that outlives a call may lie in the arena: weights have memory of their own, results are copied or bound to it.
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

#: Address space of a region: where it costs nothing until it is touched, more than most models need at once.
_REGION = 1 << 30 if sys.platform == "linux" else 2 << 20
# The first region is never released: it is too small for any tensor that matters.
_FIRST_REGION = 4096
# Otherwise a region's last tensor would get all that is left, up to 128 MiB.
_UNSPLIT = 64 << 10
#: The graph y = x of one number (ONNX, opset 18): a run of it makes ONNX Runtime release regions.
IDENTITY = bytes.fromhex(
    "08093a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a0808011204"
    "0a02080142040a001012"
)


class Arena:
    """The allocator of sessions on the CPU.

    Attributes:
        running: one entry for each call under way in any session of this process.
        forks: the number of forks when it was last known to be usable.
    """

    def __init__(self, ort: ModuleType) -> None:
        """Register an allocator, or take the one that other code registered in this process."""
        self.running: list[None] = []
        self.forks = forks.count
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
        with contextlib.suppress(Exception):  # there already is one; ONNX Runtime's errors have no common base
            ort.create_and_register_allocator(memory, chosen)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        settings.log_severity_level = 4
        self.use(settings)
        self._session = ort.InferenceSession(IDENTITY, settings, providers=["CPUExecutionProvider"])
        self._shrink = shrinking(ort)
        self.give_back()  # only after that the next region is a wide one

    def use(self, settings: Any) -> None:
        """Have a session take its memory from here, but for its weights: regions with weights would never be free."""
        settings.add_session_config_entry("session.use_env_allocators", "1")
        settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")

    def usable(self) -> bool:
        """Whether its lock is free: a call under way when this process was forked may have held it."""
        if self.forks != forks.count and not self.running:
            self.forks = forks.count
        return self.forks == forks.count

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """A block in which something may hold its lock."""
        self.running.append(None)
        try:
            yield
        finally:
            self.running.pop()

    def give_back(self) -> None:
        """Release empty regions to the system. Calls of other threads keep theirs."""
        if self.usable():
            with self.used(), contextlib.suppress(Exception):  # an allocator of other code need not be an arena
                self._session.run(None, {"x": np.zeros(1, np.float32)}, self._shrink)


def shrinking(ort: ModuleType) -> Any:
    """Options of a run after which its arena releases empty regions."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


_creating = threading.Lock()
_create = functools.cache(Arena)


def shared(ort: ModuleType) -> Arena:
    """The arena of this process."""
    with _creating:
        return _create(ort)


def _after_fork() -> None:
    """A lock that another thread held is held for ever in the child."""
    global _creating
    _creating = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def trim() -> None:
    """Release the memory that glibc keeps for later to the system."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
