"""What may be used after `os.fork`: a runner's threads, and those that hold its locks, stay in the parent."""

from __future__ import annotations

import os

from vae_export.errors import BackendError

#: How many forks lie between this process and the one in which this module was imported.
count = 0


def _count_fork() -> None:
    global count
    count += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


def refusal(runner: str, why: str) -> BackendError:
    """The error for a call, in a child, of a session that its parent opened."""
    return BackendError(
        f"this VAE was loaded before os.fork, and {runner} {why}. Load the bundle again in the child, or start "
        "processes with multiprocessing.get_context('spawn')"
    )
