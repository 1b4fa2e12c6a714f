"""The peak memory of a runner, measured in a process in which nothing else runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vae_export.bench.cells import VERBS, Cell
from vae_export.bench.runners import Recipe, Runner
from vae_export.bench.select import open_recipe
from vae_export.contract.bundle import Bundle
from vae_export.errors import BackendError, InputError

_STATUS = Path("/proc/self/status")
_PROGRAM = "import sys; from vae_export.bench import memory; print(memory.measure(sys.argv[1]))"


def check(runners: Sequence[Runner], status: Path = _STATUS) -> None:
    """Check before anything is timed that the peak memory of these runners can be measured.

    Raises:
        InputError: a runner needs an object that only this process has.
        BackendError: this system has no file of a process's peak memory.
    """
    for runner in runners:
        source = runner.recipe.source if runner.recipe else None
        if runner.recipe is None or not (source is None or isinstance(source, (str, Path))):
            raise InputError(
                f"bench: memory is measured in another process, and {runner.name} needs an object that only this one "
                "has. Open it from paths, with candidates, or leave memory out"
            )
    if not status.exists():
        raise BackendError("bench: memory is read from /proc, which this system does not have. Leave memory out")


def peak(runner: Runner, verbs: Sequence[str], batch: int, sizes: Mapping[str, int]) -> int:
    """The bytes by which a new process grows that opens the runner and calls each verb twice at a batch.

    Inputs and the libraries of the runner are counted; Python and NumPy are not.

    Raises:
        BackendError: the process failed.
    """
    assert runner.recipe is not None
    recipe = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(runner.recipe).items()}
    request = {"recipe": recipe, "verbs": list(verbs), "batch": batch, "sizes": dict(sizes)}
    command = [sys.executable, "-c", _PROGRAM, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BackendError(
            f"bench: the process that measures the memory of {runner.name} failed: {lines[-1]}. Leave memory out, or "
            "ask for smaller batches"
        )
    return int(done.stdout.split()[-1])


def measure(text: str) -> int:
    """Run in the other process: the bytes of a request in JSON."""
    request = json.loads(text)
    before = _status("VmRSS")
    recipe, batch, sizes = Recipe(**request["recipe"]), request["batch"], request["sizes"]
    runner = open_recipe(recipe)
    model = Bundle(recipe.bundle).manifest.model
    latent = model.latent_shape(sizes)
    random = np.random.default_rng(0)
    for verb in request["verbs"]:
        shape = model.data_shape(latent) if VERBS[verb][0] == "encoder" else latent
        value = random.standard_normal((batch, *shape), np.float32).clip(*model.data.range)
        cell = Cell(verb, batch, value, latent, sizes, seed=0, start=0, expected={})
        call = runner.prepare(cell)
        call()
        call()
    runner.close()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes; getrusage would include the process that it was forked from."""
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
