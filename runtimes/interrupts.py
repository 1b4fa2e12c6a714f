"""Ctrl-C ends a call: Python runs signal handlers in the main thread alone, and not while that is inside a runner."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Calls that take less need no thread: nobody waits for them.
_FAST_SECONDS = 0.05
#: How long a call may take to obey `stop` before its thread is abandoned.
_STOP_SECONDS = 2.0
_MAIN = threading.main_thread().ident


def interruptible(work: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
    """Run `work` in another thread while this one waits for it and can be interrupted; return its result.

    Args:
        work: a long call that releases Python's global lock.
        stop: asks it to end soon. A call that does not end is abandoned in its thread, which ends with the process.
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
    except BaseException:  # raised by a signal handler
        stop()
        done.wait(_STOP_SECONDS)
        raise
    if errors:
        raise errors[0]
    return results[0]


class LongCalls:
    """Which calls of a session need a thread to be interruptible: those larger than any that was fast.

    How long a graph takes depends on its inputs' sizes alone: a call of no more bytes than a fast one needs no thread.

    Attributes:
        fast_bytes: the largest first input of a call that took less than 50 ms; −1 before there was one.
    """

    def __init__(self) -> None:
        self.fast_bytes = -1

    def run(self, nbytes: int, work: Callable[[], T], stop: Callable[[], None]) -> T:
        """Run a call whose first input is larger than `fast_bytes`; see `interruptible` for the other arguments."""
        began = time.perf_counter()
        result = interruptible(work, stop) if threading.get_ident() == _MAIN else work()
        if time.perf_counter() - began < _FAST_SECONDS:
            self.fast_bytes = max(self.fast_bytes, nbytes)
        return result
