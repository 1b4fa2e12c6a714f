"""Ctrl-C ends a call. Python runs handlers of signals in the main thread alone, and not while it is inside a runner."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

#: Calls that take less are not worth a thread: nobody waits for them.
_QUICK_SECONDS = 0.05
#: How long a call that is told to stop may take to do so, before it is left to itself.
_STOP_SECONDS = 2.0
_MAIN = threading.main_thread().ident


def interruptible(work: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
    """Do work in a thread of its own, while this one waits for it and can be interrupted.

    Args:
        work: what is long, and gives Python's lock free.
        stop: asks it to end soon. Work that does not is left behind, in a thread that ends with the process.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True).start()
    try:
        done.wait()
    except BaseException:  # what a signal's handler raised
        stop()
        done.wait(_STOP_SECONDS)
        raise
    if errors:
        raise errors[0]
    return results[0]


class LongCalls:
    """Which calls of a session are long: those in the main thread of more bytes than any that was seen to be quick.

    How long a graph takes depends on its inputs' sizes alone: calls of no more bytes than a quick one get no thread.
    """

    def __init__(self) -> None:
        self._quick = -1

    def direct(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call may be run as it is."""
        for value in inputs.values():
            return value.nbytes <= self._quick or threading.get_ident() != _MAIN
        return True

    def run(self, inputs: Mapping[str, Any], work: Callable[[], T], stop: Callable[[], None]) -> T:
        """Run a call that may be long; see `interruptible`."""
        began = time.perf_counter()
        result = interruptible(work, stop)
        if time.perf_counter() - began < _QUICK_SECONDS:
            self._quick = max(self._quick, next(iter(inputs.values())).nbytes)
        return result
