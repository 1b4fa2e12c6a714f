"""Measure the figures of the trainer that have a bound.

    make trainer

Prints a table and writes JSON, with the machine and the versions. Exits with 1 if a bound is not met. The
throughput beside other loops is measured by `training.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import closed_forms
import numpy as np
import torch
from kills import difference
from machine import machine
from rich.console import Console
from rich.table import Table

from vae_export.trainers import checkpoint, datasets, evaluate
from vae_export.trainers.batches import Batches
from vae_export.trainers.config import DataConfig, TrainConfig, model_config, train_config
from vae_export.trainers.fit import fit

DIGITS = (1, 8, 8)
KILLS = 200
SEEDS = 5
#: Draws of the importance-weighted bound whose gap to the exact evidence must fall.
DRAWS = (1, 10, 100, 1000, 5000)
#: Each model for the resumed runs: options of the model and of the run.
RESUMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({}, {}),
    "mlp": ({}, {}),
    "conv": ({}, {}),
    "resnet": ({"attention": True}, {}),
}
Figure = tuple[str, float, float]  # what, measured, bound (not more than)


def main(out: Path) -> int:
    """Measure all, print the table and write `out`."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        figures = [*linear(work), *seeds(work), *resumed(work), kills()]
    table = Table("figure", "measured", "bound", "")
    for what, measured, bound in figures:
        verdict = "" if math.isinf(bound) else "ok" if measured <= bound else "[red]MISSED[/]"
        table.add_row(what, f"{measured:.4g}", "" if math.isinf(bound) else f"{bound:.4g}", verdict)
    Console(width=140).print(table)
    rows = [
        {"figure": w, "measured": float(m), "bound": None if math.isinf(b) else float(b), "met": bool(m <= b)}
        for w, m, b in figures
    ]
    out.write_text(json.dumps({**machine(), "figures": rows}, indent=2) + "\n", encoding="utf-8")
    return int(any(measured > bound for _, measured, bound in figures))


def linear(work: Path) -> list[Figure]:
    """`--model linear` by default, against probabilistic PCA and against its own exact evidence."""
    fit(work / "linear", model_config("linear", data_shape=DIGITS), train_config("linear", device="cpu"))
    _, model = checkpoint.read(work / "linear")
    dataset = datasets.load(DataConfig(), 0)
    train, test = (part.read(np.arange(len(part))) for part in (dataset.train, dataset.test))
    figures: list[Figure] = []
    for name, x, bound in (("training", train, 0.1), ("test", test, math.inf)):
        best = closed_forms.ppca_log_likelihood(train, x, 10).mean()
        elbo = closed_forms.exact_elbo(model, x).mean()
        figures.append((f"linear, {name} set: PCA's log-likelihood {best:.4f} − ELBO {elbo:.4f}", best - elbo, bound))
        if name == "training":
            figures.append(("linear, training set: ELBO above PCA's log-likelihood", max(0.0, elbo - best), 0.0))
    closed_forms.widen(model.double(), 2.0)
    x = test.astype(np.float64)
    exact, before = closed_forms.exact_evidence(model, x), math.inf
    for k in DRAWS:
        estimate = evaluate.importance_weighted(model, torch.from_numpy(x), TrainConfig(importance_draws=k), 0).numpy()
        gap = exact - estimate
        error = gap.std() / math.sqrt(len(x))
        bound = min(before, 0.02 if k == DRAWS[-1] else math.inf)
        figures.append(
            (f"evidence − bound of {k} draws, {len(x)} examples, standard error {error:.1g}", gap.mean(), bound)
        )
        figures.append((f"… below 0 by standard errors, {k} draws", max(0.0, -gap.mean() / error), 3.0))
        before = gap.mean()
    return figures


def seeds(work: Path) -> list[Figure]:
    """`--model conv` by default, five seeds."""
    results = []
    for seed in range(SEEDS):
        path = work / f"seed{seed}"
        results.append(
            fit(path, model_config("conv", data_shape=DIGITS), train_config("conv", device="cpu", seed=seed))
        )
    latent = model_config("conv", data_shape=DIGITS).latent
    collapsed = max(1 - (result.active_units or 0) / latent for result in results)
    elbos = [result.elbo or math.nan for result in results]
    shown = ", ".join(f"{elbo:.2f}" for elbo in elbos)
    return [
        (f"conv, {SEEDS} seeds: largest share of collapsed latents", collapsed, 0.2),
        (f"conv, {SEEDS} seeds: spread of the test ELBO ({shown} nats)", max(elbos) - min(elbos), math.inf),
    ]


def resumed(work: Path) -> list[Figure]:
    """Each model, stopped at three steps and resumed to the end: runs that differ from an uninterrupted one."""
    figures: list[Figure] = []
    for name, (model, run) in RESUMED.items():
        bad = 0
        described = model_config(name, data_shape=DIGITS, **model)
        config = train_config(name, device="cpu", **{"epochs": 3, "importance_draws": 1, **run})
        fit(work / name / "whole", described, config)
        for step in (7, 39, 52):
            path = work / name / str(step)
            stopped_at(step, path, described, config)
            fit(path, described, config, resume=True)
            bad += difference(work / name / "whole", path) is not None
        figures.append((f"{name}: of 3 resumed runs, those that differ in a bit", bad, 0))
    return figures


def stopped_at(step: int, path: Path, model: Any, config: TrainConfig) -> None:
    """Start a run, and send SIGTERM when it prepares the batch of a step."""
    before = Batches.__getitem__

    def item(batches: Batches, index: int) -> Any:
        if index == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(batches, index)

    Batches.__getitem__ = item  # type: ignore[method-assign]
    try:
        with contextlib.suppress(SystemExit):
            fit(path, model, config)
    finally:
        Batches.__getitem__ = before  # type: ignore[method-assign]
    kept = checkpoint.read_state(path)
    assert kept
    assert kept[0].step == step + 1


def kills() -> Figure:
    """Run `kills.py` in a process of its own, which forks."""
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    lost = int(done.stdout.rpartition("lost or different: ")[2])
    zero = done.stdout.partition("continued: ")[2].partition(" ")[0]
    return f"of {KILLS} runs killed with SIGKILL ({zero} before their first checkpoint), lost or different", lost, 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
