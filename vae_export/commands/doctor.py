"""`vae-export doctor`."""

from __future__ import annotations

import typer

from vae_export.commands import options, terminal
from vae_export.errors import BackendError


def doctor(json: options.Json = False) -> None:
    """Show what is installed, what can be loaded, what is missing and how to get it."""
    from vae_export.commands import diagnosis, tables

    found = diagnosis.examine()
    if json:
        terminal.say_json(found)
    else:
        for table in tables.diagnosis(found):
            terminal.console().print(table)
    for problem in found["problems"]:
        terminal.note(f"problem: {problem}")
    if "problem" in found["onnxruntime"]:
        raise typer.Exit(BackendError.exit_code)
