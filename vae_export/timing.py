"""Time calls in turns, each call on its own, and summarize the times."""

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
# At the start of a turn, threads of the previous runner may still spin, for tens of milliseconds, on the cores that
# this one's threads need: the turn waits for them, and then wakes its own threads with a few calls.
_QUIET_SECONDS, _WARM_UP_SECONDS, _WARM_UP_SHARE = 0.05, 0.01, 0.1
# The duration of a check whether the processors are free, and the block that is hashed meanwhile.
_CHECK_SECONDS, _BLOCK = 0.05, bytes(1 << 16)
#: A machine of which this process gets a smaller share is busy.
FREE = 0.75
_MIN_TURN_SECONDS = 0.1


@dataclass(frozen=True)
class Times:
    """The times of one runner's calls, in seconds.

    Attributes:
        median: of the turns' medians, so that all turns weigh the same.
        p10: 10th percentile of all calls.
        p50: 50th percentile of all calls.
        p90: 90th percentile of all calls.
        p99: 99th percentile of all calls.
        spread: the interquartile range of the turns' medians, relative to the median.
        calls: the number of timed calls.
        turns: the number of turns.
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
    """Time calls in turns, A B C, B C A, …: the times by name.

    Args:
        calls: by name; each was called before.
        seconds: for each call, over all turns. A slow call takes longer: it is called once in each of `fewest` turns.
        fewest: the least number of turns.
    """
    longest = {name: once(call) for name, call in calls.items()}
    usual = max(_MIN_TURN_SECONDS, *longest.values()) if longest else _MIN_TURN_SECONDS
    rounds = max(fewest, min(_TURNS, int(seconds / usual)))
    turns: dict[str, list[list[float]]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        first = number % max(1, len(names))  # so that none always follows the same one, whose threads may still spin
        for name in names[first:] + names[:first]:
            turns[name].append(turn(calls[name], seconds / rounds, longest[name]))
    return {name: summarize(taken) for name, taken in turns.items()}


def share(processors: int, seconds: float = _CHECK_SECONDS) -> float:
    """The share of so many processors that this process gets: 1 on an idle machine, less on a busy one.

    It is measured as CPU time per elapsed time, of one thread for each that hashes without Python's lock.
    """

    def spin(_: int) -> float:
        began, ran = time.perf_counter(), time.thread_time()
        while (passed := time.perf_counter() - began) < seconds:
            hashlib.sha256(_BLOCK)
        return (time.thread_time() - ran) / passed

    with ThreadPoolExecutor(processors) as threads:
        return sum(threads.map(spin, range(processors))) / processors


def busy(processors: int) -> str | None:
    """A message that the machine is busy; None where it is free enough to measure.

    Args:
        processors: the number that measured calls may use.
    """
    if (available := share(processors)) >= FREE:
        return None
    load = f", at a load average of {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"the machine is busy: of {processors} processors this process gets {available:.0%}{load}"


def once(call: Call) -> float:
    """The time of one call, in seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def turn(call: Call, seconds: float, usual: float) -> list[float]:
    """The times of the calls of one turn, in seconds; one call at least.

    Args:
        call: the function to time.
        seconds: of the turn. The pause before it is not longer.
        usual: about the time of a call: calls that are longer than the warm-up have none.
    """
    time.sleep(min(_QUIET_SECONDS, seconds))
    warm_up = min(_WARM_UP_SECONDS, _WARM_UP_SHARE * seconds)
    end = time.perf_counter() + warm_up
    while usual < warm_up and time.perf_counter() < end:
        call()
    began = time.perf_counter()
    times: list[float] = []
    while not times or time.perf_counter() < began + seconds:
        times.append(once(call))
    return times


def summarize(turns: list[list[float]]) -> Times:
    """Summarize the times of all turns."""
    medians = [float(np.median(times)) for times in turns]
    low, middle, high = np.quantile(medians, (0.25, 0.5, 0.75)).tolist()
    calls = [value for times in turns for value in times]
    p10, p50, p90, p99 = np.quantile(calls, (0.1, 0.5, 0.9, 0.99)).tolist()
    return Times(middle, p10, p50, p90, p99, (high - low) / middle, len(calls), len(turns))
