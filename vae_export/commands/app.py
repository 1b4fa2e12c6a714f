"""The command line: its verbs, and how failures and signals become messages and exit codes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Annotated, Any, NoReturn, cast

import typer
import typer.core

from vae_export import __version__
from vae_export.commands import terminal
from vae_export.commands.bench import bench
from vae_export.commands.build import build
from vae_export.commands.demo import demo
from vae_export.commands.doctor import doctor
from vae_export.commands.export import export
from vae_export.commands.inspect import inspect
from vae_export.commands.run import reconstruct, sample, score
from vae_export.commands.train import train
from vae_export.commands.verify import verify
from vae_export.errors import InputError, VaeExportError, printable

#: Exit codes: of shells for a process that SIGPIPE ended, and EX_SOFTWARE of sysexits.h.
BROKEN_PIPE, SOFTWARE = 141, 70

#: Typer's own class or click's, depending on typer's version.
_USAGE_ERROR = cast("type[Any]", typer.BadParameter.__base__)


@contextlib.contextmanager
def _printable_usage() -> Iterator[None]:
    """Escape usage errors, which quote what was typed, such as the name of a stranger's file."""
    try:
        yield
    except _USAGE_ERROR as error:
        error.message = printable(error.message)
        raise


class _Verbs(typer.core.TyperGroup):
    @_printable_usage()
    def make_context(self, *args: Any, **options: Any) -> Any:
        return super().make_context(*args, **options)

    @_printable_usage()
    def invoke(self, ctx: Any) -> Any:
        return super().invoke(ctx)


app = typer.Typer(
    name="vae-export",
    cls=_Verbs,
    help="Take a trained variational autoencoder from PyTorch to a verified bundle, and run it without PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (demo, train, export, verify, build, inspect, sample, reconstruct, score, bench, doctor):
    app.command()(verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        terminal.say(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command line itself."""


_terminated = False


def main() -> None:
    """Run the command line. An expected failure prints one message and exits with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for a table's lines
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BaseException as error:
        # Typer and rich exit with 1 when the reader of a pipe is gone.
        if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(BROKEN_PIPE)
        if _terminated:  # whatever was raised: an import that is cut short raises an error of its own
            sys.exit(128 + signal.SIGTERM)
        if isinstance(error, VaeExportError):
            _exit(str(error), error.exit_code)
        if isinstance(error, MemoryError):
            _exit(f"not enough memory: {error or 'ask for fewer or smaller examples'}", InputError.exit_code)
        if isinstance(error, OSError):
            _exit(f"{error.filename or 'file system'}: {error.strerror or error}", InputError.exit_code)
        if not isinstance(error, Exception):
            raise
        terminal.say(traceback.format_exc(), err=True)
        _exit(
            f"this is a fault of vae_export itself: {type(error).__name__}: {error}. "
            "Please report it, with the lines above and what `vae-export doctor` prints",
            SOFTWARE,
        )


def _exit(message: str, code: int) -> NoReturn:
    terminal.say(f"error: {message}", err=True)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    global _terminated
    _terminated = True
    sys.exit(128 + signal.SIGTERM)
