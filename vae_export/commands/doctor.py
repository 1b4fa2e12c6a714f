"""`vae-export doctor`."""

from __future__ import annotations

import typer

from vae_export.commands import options, terminal
from vae_export.errors import BackendError


def doctor(json: options.Json = False) -> None:
    """Show what is installed, what can be loaded, what is missing and how to get it."""
    from vae_export.commands import diagnosis, tables

    facts = diagnosis.examine()
    if json:
        terminal.say_json(facts)
    else:
        for table in tables.diagnosis(facts):
            terminal.console().print(table)
    for problem in facts["problems"]:
        terminal.note(f"problem: {problem}")
    if "problem" in facts["onnxruntime"]:
        raise typer.Exit(BackendError.exit_code)
