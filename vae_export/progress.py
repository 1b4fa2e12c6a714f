"""How long work tells how far it is, and a bar that shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console


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


@contextlib.contextmanager
def bar(console: Console) -> Iterator[Progress]:
    """Show the step that is under way, with a bar and the time that is left where its share is known.

    Where the console is no terminal, nothing is shown.
    """
    if not console.is_terminal:
        yield silent
        return
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Shown

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Shown(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console, transient=True) as shown:
        task, now = shown.add_task("", total=None), ""

        def tell(step: str, share: float | None = None) -> None:
            nonlocal task, now
            if step != now:
                shown.remove_task(task)
                task, now = shown.add_task(step, total=None if share is None else 1.0), step
            if share is not None:
                shown.update(task, total=1.0, completed=share)

        yield tell
