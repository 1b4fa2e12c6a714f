"""What a run shows while it trains, and the figures that it leaves: progress, CSV, TensorBoard, metrics.json."""

from __future__ import annotations

import contextlib
import csv
import io
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar

from vae_export.contract import atomic
from vae_export.errors import printable
from vae_export.trainers import checkpoint
from vae_export.trainers.checkpoint import Epoch
from vae_export.trainers.config import Result, Split, TrainConfig


class Log:
    """Progress bar, messages and TensorBoard events of a run. Every process but the first has a silent one."""

    def __init__(self, path: Path, config: TrainConfig, *, first: bool) -> None:
        """Create the log of the run in `path`; `first` is true in the process of rank 0."""
        self._path, self._first, self._config = path, first, config
        self._console = Console(stderr=True, quiet=not first)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
        )
        self._task = self._progress.add_task("training", total=None, figures="")
        self._validation = ""
        self._writer: EventsWriter | None = None

    @contextlib.contextmanager
    def events(self, step: int) -> Iterator[None]:
        """Write TensorBoard events from a step on. Those of a killed run beyond the step are dropped by TensorBoard."""
        if not self._first:
            yield
            return
        folder = self._path / checkpoint.TENSORBOARD
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._event(step, session_log=SessionLog(status=SessionLog.START))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a failed write was reported when it was tried
                self._writer.close()
            self._writer = None

    @contextlib.contextmanager
    def progress(self, step: int, total: int) -> Iterator[None]:
        """Show a progress bar that starts at a step."""
        self._progress.update(self._task, completed=step, total=total)
        with self._progress:
            yield

    def step(self, step: int, epoch: int, bound: float, kl: float, rate: float) -> None:
        """Update the progress bar: means of bound and KL over this epoch so far in nats, `rate` in images/s."""
        plain = self._config.objective == "autoencoder"
        figures = f"squared error {-bound:.3g}" if plain else f"bound {bound:.2f} nats"
        figures += self._validation + ("" if plain else f", KL {kl:.2f}") + f", {rate:,.0f} images/s"
        description = f"epoch {epoch}/{self._config.epochs}"
        self._progress.update(self._task, completed=step, description=description, figures=figures)

    def epoch(self, row: Epoch) -> None:
        """Write an epoch's figures to TensorBoard, and show its validation figure from now on."""
        bound = row.validation_bound
        shown = f"{-bound:.3g}" if self._config.objective == "autoencoder" else f"{bound:.2f}"
        self._validation = f", validation {shown}"
        if self._writer:
            for name, value in msgspec.to_builtins(row).items():
                if name not in ("epoch", "step"):
                    part, _, what = name.rpartition("_") if name.startswith(("train", "validation")) else ("", "", name)
                    self._event(row.step, summary=scalar(f"{part or 'run'}/{what}", value))
            self._writer.flush()

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Write grids of pictures, by their name, to TensorBoard."""
        if self._writer:
            for name, picture in pictures.items():
                pixels = np.asarray(picture)  # (H, W) or (H, W, 3) uint8
                summary = image(f"pictures/{name}", pixels, dataformats="HW" if pixels.ndim == 2 else "HWC")
                self._event(step, summary=summary)
            self._writer.flush()

    def say(self, message: str) -> None:
        """Print a message to stderr."""
        self._console.print(escape(printable(message)), highlight=False, soft_wrap=True)

    def _event(self, step: int, **content: Any) -> None:
        assert self._writer
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))


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
