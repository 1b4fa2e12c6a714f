"""Everything that the command line prints goes through here.

Names come from strangers' files, from packages and from the system: whatever could steer a terminal is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from vae_export.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment

#: Columns of tables in a pipe or a log, which have no width of their own.
PIPE_WIDTH = 140


def say(text: str, *, err: bool = False) -> None:
    """Print one line or several, to stdout or stderr."""
    typer.echo(printable(text), err=err)


def note(line: str) -> None:
    """Print a line to stderr: stdout may be CSV or JSON."""
    say(line, err=True)


def say_json(value: object) -> None:
    """Print plain values as JSON in ASCII."""
    import json

    typer.echo(json.dumps(value, indent=2))


def console(*, err: bool = False) -> Console:
    """A console for tables and bars on stdout or stderr: as wide as the terminal, or as COLUMNS says."""
    from rich.console import Console
    from rich.segment import Segment

    class Safe(Console):
        def render(self, *args: Any, **options: Any) -> Iterator[Segment]:
            for part in super().render(*args, **options):
                yield part if part.control else Segment(printable(part.text), part.style)

    shown = Safe(stderr=err)
    if not (shown.is_terminal or os.environ.get("COLUMNS", "").isdigit()):
        shown.width = PIPE_WIDTH
    return shown
