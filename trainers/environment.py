"""What a run meets from outside: processes and devices, signals, and the end of the memory."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
from lightning_fabric import Fabric

from vae_export.errors import BackendError, InputError
from vae_export.trainers.config import TrainConfig


def open_fabric(config: TrainConfig) -> Fabric:
    """One process on one device, or, under `torchrun`, this process among all of them."""
    here, everywhere = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*AMP with fp16 is not supported.*")  # it would take bf16
            fabric = Fabric(
                accelerator=config.device,
                devices=here,
                num_nodes=everywhere // here,
                strategy="ddp" if everywhere > 1 else "auto",
                precision=config.precision,
            )
            if config.precision != "32-true":
                # Fabric would round the data itself, and the noise; autocast rounds what goes into a layer, no more.
                fabric.strategy.precision.convert_input = lambda data: data  # type: ignore[method-assign]
            fabric.launch()
    except (RuntimeError, ValueError, Warning) as error:
        raise BackendError(
            f"train: device {config.device!r} with precision {config.precision!r} is not available here: {error}"
        ) from None
    return fabric


@contextlib.contextmanager
def enough_memory(out: Path) -> Iterator[None]:
    """Say in words that memory has ended, of the host or of a GPU.

    Raises:
        InputError: it has.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"train: not enough memory: {reason}. Take a smaller --batch-size, fewer --draws or a smaller model. What "
            f"has been saved in {out} is whole"
        ) from None


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Note SIGTERM and SIGINT for the end of the step, in place of dying in its middle; a second SIGINT ends it."""
    seen = [0]

    def note(number: int, frame: FrameType | None) -> None:
        if number == seen[0] == signal.SIGINT:
            raise KeyboardInterrupt
        seen[0] = seen[0] or number

    if threading.current_thread() is not threading.main_thread():  # where Python gives signals to nobody
        yield lambda: 0
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: seen[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
