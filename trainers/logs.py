"""What a run shows while it trains, and the figures that it leaves: progress, CSV, TensorBoard, metrics.json."""

from __future__ import annotations

import contextlib
import csv
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from vae_export.contract import atomic
from vae_export.errors import printable
from vae_export.trainers import checkpoint
from vae_export.trainers.checkpoint import Epoch
from vae_export.trainers.config import Result, Split


class Log:
    """The log of one run; silent and without files in all processes but the first."""

    def __init__(self, path: Path, objective: str, *, first: bool) -> None:
        """Open.

        Args:
            path: the run's folder.
            objective: `TrainConfig.objective`.
            first: whether this is the process that speaks.
        """
        self._path, self._first, self._objective = path, first, objective
        self._console = Console(stderr=True, quiet=not first)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("training", total=None, figures="")
        self._writer: EventsWriter | None = None

    @contextlib.contextmanager
    def progress(self, step: int, total: int) -> Iterator[None]:
        """Show progress and write to TensorBoard, from a step on; curves beyond it, of a killed run, are dropped."""
        self._progress.update(self._task, completed=step, total=total)
        with contextlib.ExitStack() as stack:
            if self._first:
                folder = self._path / checkpoint.TENSORBOARD
                folder.mkdir(exist_ok=True)
                self._writer = EventsWriter(str(folder / "events"))
                stack.callback(self._close)
                started = SessionLog(status=SessionLog.START)
                self._writer.write_event(Event(wall_time=time.time(), step=step, session_log=started))
            stack.enter_context(self._progress)
            yield

    def _close(self) -> None:
        """What could not be written has been told when it was tried."""
        if self._writer:
            with contextlib.suppress(OSError):
                self._writer.close()

    def step(self, step: int, bound: float, kl: float, rate: float) -> None:
        """Show where training is."""
        figures = f"bound {bound:.2f} nats, KL {kl:.2f}"
        if self._objective == "autoencoder":
            figures = f"squared error {-bound:.3g}"
        figures += f", {rate:,.0f} images/s"
        self._progress.update(self._task, completed=step, figures=figures)

    def epoch(self, row: Epoch) -> None:
        """Add an epoch to TensorBoard."""
        if self._writer:
            for name, value in msgspec.to_builtins(row).items():
                if name not in ("epoch", "step"):
                    part, _, what = name.rpartition("_") if name.startswith(("train", "validation")) else ("", "", name)
                    summary = scalar(f"{part or 'run'}/{what}", value)
                    self._writer.write_event(Event(wall_time=time.time(), step=row.step, summary=summary))
            self._writer.flush()

    def say(self, message: str) -> None:
        """Tell the person something."""
        self._console.print(escape(printable(message)), highlight=False, soft_wrap=True)


def write_curve(path: Path, history: tuple[Epoch, ...]) -> None:
    """Write `metrics.csv`: one line for each epoch, the fields of `Epoch`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, Epoch.__struct_fields__, lineterminator="\n")
    writer.writeheader()
    writer.writerows(msgspec.to_builtins(row) for row in history)
    with atomic.atomic_file(path / checkpoint.CURVE) as stage:
        stage.write_text(text.getvalue(), encoding="utf-8")


def write_metrics(path: Path, result: Result, split: Split, history: tuple[Epoch, ...], warnings: list[str]) -> None:
    """Write `metrics.json`: result, data, warnings and history."""
    plain: dict[str, Any] = {"result": result, "split": split, "warnings": warnings, "history": history}
    with atomic.atomic_file(path / checkpoint.METRICS) as stage:
        stage.write_bytes(msgspec.json.format(msgspec.json.encode(plain), indent=2) + b"\n")
