"""How many threads a call on the CPU may use: the cores that this process is allowed, not those that the host has."""

from __future__ import annotations

import math
import os
from pathlib import Path


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores that this process may use: those of its affinity, at most as many as the quota of its control group.

    Threads of one core count once, where Linux tells which they are.
    """
    limit, allowed = quota(cgroup), _allowed()
    return allowed if limit is None else max(1, min(allowed, math.ceil(limit)))


def _allowed() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed, siblings = os.sched_getaffinity(0), set()
    for cpu in allowed:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(allowed)
    return len(siblings)


def quota(root: Path) -> float | None:
    """The CPU quota of the control group at `root`, in processors; None is no limit.

    A container sees its own group there. Version 2 has `quota period` in `cpu.max`, version 1 a file for each
    (Linux: Documentation/admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst), both in µs.
    """
    try:
        microseconds, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            microseconds, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        processors = int(microseconds) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return processors if processors > 0 else None
