"""What may be used after `os.fork`: threads of a runner stay in the parent, and so does who holds its locks."""

from __future__ import annotations

import os

from vae_export.errors import BackendError

_forks = 0


def _forked() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def count() -> int:
    """How many forks lie between this process and the one in which this module was imported."""
    return _forks


def refuse(runner: str, why: str) -> BackendError:
    """The error of a call in a child for a session that its parent opened."""
    return BackendError(
        f"this VAE was loaded before os.fork, and {runner} {why}. Load the bundle again in the child, or start "
        "processes with multiprocessing.get_context('spawn')"
    )
