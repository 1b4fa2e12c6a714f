"""Processes and devices, signals, and running out of memory."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric

from vae_export.errors import BackendError, InputError
from vae_export.trainers.config import TrainConfig


def open_fabric(config: TrainConfig) -> Fabric:
    """Set up one process on one device, or, under `torchrun`, this process among all of them.

    Raises:
        BackendError: the device or the precision is not available.
    """
    here, everywhere = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*AMP with fp16 is not supported.*")  # it would fall back to bf16
            fabric = Fabric(
                accelerator=config.device,
                devices=here,
                num_nodes=everywhere // here,
                strategy="ddp" if everywhere > 1 else "auto",
                precision=config.precision,
            )
            if config.precision != "32-true":
                # Fabric would round data and noise as well; autocast only rounds the inputs of layers.
                fabric.strategy.precision.convert_input = lambda data: data  # type: ignore[method-assign]
            fabric.launch()
    except (RuntimeError, ValueError, Warning) as error:
        raise BackendError(
            f"train: device {config.device!r} with precision {config.precision!r} is not available here: {error}"
        ) from None
    return fabric


@contextlib.contextmanager
def memory_errors(out: Path) -> Iterator[None]:
    """Turn running out of memory, of the host or of a GPU, into a message.

    Raises:
        InputError: there is not enough memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"train: not enough memory: {reason}. Use a smaller --batch-size, fewer --draws or a smaller model. What "
            f"has been saved in {out} is complete"
        ) from None


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Catch SIGTERM and SIGINT, so that a step is completed; a second SIGINT raises `KeyboardInterrupt` at once.

    Yields a function that returns the number of the first signal that arrived, or 0.
    """
    seen = [0]

    def note(number: int, frame: FrameType | None) -> None:
        if number == seen[0] == signal.SIGINT:
            raise KeyboardInterrupt
        seen[0] = seen[0] or number

    if threading.current_thread() is not threading.main_thread():  # signal handlers can only be set in the main thread
        yield lambda: 0
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: seen[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agree(fabric: Fabric, signalled: int, due: bool) -> tuple[int, bool]:
    """Let all processes act on a signal that any of them received, and save when the first one's time has come."""
    if fabric.world_size == 1:
        return signalled, due
    flags = torch.tensor([signalled, int(due and fabric.global_rank == 0)], device=fabric.device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    signalled, both = flags.tolist()
    return signalled, bool(both)


def summed(fabric: Fabric, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of any shape summed over all processes, on the CPU; of a single process, itself."""
    if fabric.world_size == 1:
        return tensor
    total = tensor.detach().clone().to(fabric.device)
    torch.distributed.all_reduce(total)
    return total.cpu()


def release_reducer(run: Any) -> None:
    """Drop a run's wrapped objective, while the process group is still there.

    Its reducer would be the last owner of the group else, and join the group's threads with Python's lock held, for
    which such a thread may wait to free a tensor: the process would hang for ever.
    """
    del run.objective, run.optimizer
    gc.collect()
