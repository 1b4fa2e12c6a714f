"""What a person sees: every line and table of the command line goes through here.

Names come from strangers' files, from packages and from the system. They are read in a terminal and do no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from vae_export.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print a text, what steers a terminal escaped.

    Args:
        text: of one line or several.
        err: to stderr.
        nl: end it with a newline.
    """
    typer.echo(printable(text), err=err, nl=nl)


def console(*, err: bool = False) -> Console:
    """What prints tables and bars, to stdout or stderr; their texts as `say` prints them."""
    from rich.console import Console
    from rich.segment import Segment

    class Safe(Console):
        def render(self, *args: Any, **options: Any) -> Iterator[Segment]:
            for part in super().render(*args, **options):
                yield part if part.control else Segment(printable(part.text), part.style)

    made = Safe(stderr=err)
    # In a pipe or a log there is no width to ask for, and 80 columns would break every table.
    return made if made.is_terminal else Safe(width=140, stderr=err)
