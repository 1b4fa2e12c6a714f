"""How long work tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on."""

    def __call__(self, step: str, share: float | None = None) -> None:
        """Say what is done now.

        Args:
            step: its name, which the next step's replaces.
            share: of the step that is done, from 0 to 1; None where that is not known.
        """
        ...


def silent(step: str, share: float | None = None) -> None:
    """Say nothing."""
