"""Calls in turns: every call timed on its own, and what the times amount to."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

Call = Callable[[], Any]

_TURNS = 10
# At the start of a turn threads of the runner before may still spin, for tens of milliseconds, on the cores that this
# one's threads need: that is waited out, and then a few calls wake its own.
_QUIET_SECONDS, _SETTLE_SECONDS, _SETTLE_SHARE = 0.05, 0.01, 0.1
# For how long one looks whether the processors are free, and the block that is hashed meanwhile.
_LOOK_SECONDS, _BLOCK = 0.05, bytes(1 << 16)
#: A machine of which this process gets a smaller share is busy.
FREE = 0.75
# A turn is no shorter, where the fewest turns allow it.
_TURN_SECONDS = 0.1


@dataclass(frozen=True)
class Times:
    """What one runner's calls took, in seconds.

    Attributes:
        median: of the turns' medians, which a turn with more calls does not outweigh.
        p10: the percentiles of all calls.
        p50: likewise.
        p90: likewise.
        p99: likewise.
        spread: the interquartile range of the turns' medians, as a share of the median.
        calls: how many were timed.
        turns: in how many turns.
    """

    median: float
    p10: float
    p50: float
    p90: float
    p99: float
    spread: float
    calls: int
    turns: int


def measure(calls: Mapping[str, Call], seconds: float, fewest: int = 5) -> dict[str, Times]:
    """Time calls in turns, A B C, B C A, ….

    Args:
        calls: by name; each was called before.
        seconds: for each of them, all turns together. A call that is so slow that `fewest` of them take longer is
            called so many times.
        fewest: turns, at least.
    """
    longest = {name: once(call) for name, call in calls.items()}
    usual = max(_TURN_SECONDS, *longest.values()) if longest else _TURN_SECONDS
    rounds = max(fewest, min(_TURNS, int(seconds / usual)))
    turns: dict[str, list[list[float]]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        first = number % max(1, len(names))  # each comes after another one, whose threads may still spin
        for name in names[first:] + names[:first]:
            turns[name].append(turn(calls[name], seconds / rounds, longest[name]))
    return {name: summarize(taken) for name, taken in turns.items()}


def share(processors: int, seconds: float = _LOOK_SECONDS) -> float:
    """How much of so many processors this process gets: 1 on an idle machine, a tenth where ten others want each.

    Each has a thread that computes without Python's lock; it is what the system let them run, of the time that passed.
    """

    def spin(_: int) -> float:
        began, ran = time.perf_counter(), time.thread_time()
        while (passed := time.perf_counter() - began) < seconds:
            hashlib.sha256(_BLOCK)
        return (time.thread_time() - ran) / passed

    with ThreadPoolExecutor(processors) as threads:
        return sum(threads.map(spin, range(processors))) / processors


def busy(processors: int) -> str | None:
    """That the machine is busy, in words; None where it is free enough to measure.

    Args:
        processors: that measured calls may use.
    """
    if (found := share(processors)) >= FREE:
        return None
    load = f", at a load average of {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"the machine is busy: of {processors} processors this process gets {found:.0%}{load}"


def once(call: Call) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def turn(call: Call, seconds: float, usual: float) -> list[float]:
    """Seconds of each call of one turn, one call at least.

    Args:
        call: what is timed.
        seconds: of the turn. What is waited before is as long at most.
        usual: about how long a call takes: one that is longer than it takes threads to wake counts from the first.
    """
    time.sleep(min(_QUIET_SECONDS, seconds))
    settle = min(_SETTLE_SECONDS, _SETTLE_SHARE * seconds)
    settled = time.perf_counter() + settle
    while usual < settle and time.perf_counter() < settled:
        call()
    began = time.perf_counter()
    times: list[float] = []
    while not times or time.perf_counter() < began + seconds:
        times.append(once(call))
    return times


def summarize(turns: list[list[float]]) -> Times:
    """The figures of all turns."""
    medians = [float(np.median(times)) for times in turns]
    low, middle, high = np.quantile(medians, (0.25, 0.5, 0.75)).tolist()
    everything = [value for times in turns for value in times]
    p10, p50, p90, p99 = np.quantile(everything, (0.1, 0.5, 0.9, 0.99)).tolist()
    return Times(middle, p10, p50, p90, p99, (high - low) / middle, len(everything), len(turns))
