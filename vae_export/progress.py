"""Reports of progress, and a bar that shows them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console


class Progress(Protocol):
    """A function that is called as work goes on."""

    def __call__(self, step: str, share: float | None = None) -> None:
        """Report progress.

        Args:
            step: name of the current step.
            share: of the step that is done, from 0 to 1; None where it is not known.
        """
        ...


def silent(step: str, share: float | None = None) -> None:
    """Report nothing."""


@contextlib.contextmanager
def bar(console: Console) -> Iterator[Progress]:
    """Show the current step, with a bar and the remaining time where its share is known.

    Nothing is shown where the console is not a terminal.
    """
    if not console.is_terminal:
        yield silent
        return
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Shown

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Shown(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console, transient=True) as shown:
        task, current = shown.add_task("", total=None), ""

        def report(step: str, share: float | None = None) -> None:
            nonlocal task, current
            if step != current:
                shown.remove_task(task)
                task, current = shown.add_task(step, total=None if share is None else 1.0), step
            if share is not None:
                shown.update(task, total=1.0, completed=share)

        yield report
