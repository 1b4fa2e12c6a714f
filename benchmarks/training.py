"""Training throughput: our loop beside a plain one, written by hand, and pythae's trainer, in turns.

    python benchmarks/training.py out/bench/training.json [--pythae DIR] [--case NAME] [--turns N] [--threads N]

The plain loop does what a step of ours does and nothing else: no evaluation, no checkpoints, no log. pythae has no
gradient clipping and no averaged weights of its own: hooks of its optimizer add both, so that a step is the same
work; it has no warm-up, and its schedule moves once an epoch. It is not among our dependencies:
`pip install --no-deps --target DIR pythae==0.1.2 tqdm imageio`, and give DIR; without it, its rows are left out.

Two throughputs are recorded for each loop, in training examples per second. `training`: of ours, what `fit`
itself reports: reading, steps, averaged weights and the log. Of pythae from the first step to the end of the last
epoch, with its copy of the best model after each. `whole`: the call from its beginning to its end: of ours with
reading the data set, evaluation after each epoch, checkpoint, pictures and test; of pythae with its trainer's
construction and the saved model. Of the plain loop both are the same. Runs are seconds long, so that test and
pictures at the end of ours, once a run, weigh far more in `whole` than they do in a real run. Ratios are medians of
the ratios within each turn. Exits with 1 if a bound is not met.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from machine import machine
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from vae_export.trainers import datasets, models
from vae_export.trainers.config import DataConfig, ModelConfig, TrainConfig, model_config, train_config
from vae_export.trainers.fit import fit

TURNS = 5
#: One, because two processes with two OpenMP threads each, on two shared cores, wait for each other's threads: it
#: was seen to make any of the loops 20 times slower for a minute.
THREADS = 1
OURS, PLAIN, PYTHAE = "ours", "plain loop", "pythae"
#: Of training: ours ÷ the plain loop, not less; ours ÷ pythae, more.
PLAIN_BOUND, PYTHAE_BOUND = 0.95, 1.0
#: The loops' last training ELBOs may differ by so many nats, or by this share: they draw other noise.
NATS, SHARE = 1.0, 0.03
_TEST = 100  # of the enlarged digits


@dataclass(frozen=True)
class Case:
    """What is trained, by the model's own recipe but for the options.

    Attributes:
        model: a key of `trainers.config.RECIPES`.
        data: a key of `specs`.
        epochs: so that one measurement takes two to three seconds on one core, and the whole run about four minutes.
        options: of `ModelConfig`.
    """

    model: str
    data: str
    epochs: int
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.model}, {self.data}"


CASES = (
    Case("mlp", "digits", 80, {}),
    Case("mlp", "28 × 28", 16, {}),
    Case("conv", "digits", 9, {}),
    Case("conv", "28 × 28", 3, {"likelihood": "bernoulli", "widths": (32, 64), "latent": 20}),
)


class Job(NamedTuple):
    """One turn of one case: the same for every loop."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    x: Tensor  # (N, C, H, W) float32, the training examples
    out: Path  # not there yet


class Timing(NamedTuple):
    """Seconds (or images per second) of one loop, and the training ELBO of its last epoch in nats, or NaN."""

    training: float
    whole: float
    elbo: float


def main(arguments: list[str]) -> int:
    """Time all, print the table and write the record."""
    parser = argparse.ArgumentParser(description="Training throughput, in turns.")
    parser.add_argument("out", type=Path, help="the JSON to write")
    parser.add_argument("--pythae", type=Path, help="folder into which pythae was installed")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="only this one")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--threads", type=int, default=THREADS, help="of PyTorch, for every loop")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    loops: dict[str, Callable[[Job], Timing]] = {OURS: ours, PLAIN: plain}
    rows = []
    with silence() as silent:
        try:
            with silent():
                loops[PYTHAE] = pythae(options.pythae)
        except ImportError as error:
            print(f"pythae is left out: {error}. Install it into a folder of its own, and give that: --pythae DIR")
        for case in CASES:
            if options.case in (None, case.name):
                print(f"{case.name} …", flush=True)
                with silent():
                    rows.append(measure(case, loops, options.turns))
    head = machine()
    if PYTHAE in loops:
        head["versions"][PYTHAE] = importlib.metadata.version(PYTHAE)
    head["machine"]["threads"] = torch.get_num_threads()
    about = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    options.out.write_text(json.dumps({**head, "about": about, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    show(rows)
    return int(not all(row["met"] for row in rows))


@contextlib.contextmanager
def silence() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Yield a context manager that discards what is printed in it, also by loggers that are created in it."""
    with Path(os.devnull).open("w") as nowhere:

        @contextlib.contextmanager
        def silent() -> Iterator[None]:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield

        yield silent


def measure(case: Case, loops: dict[str, Callable[[Job], Timing]], turns: int) -> dict[str, Any]:
    """All loops on one case, in turns after one epoch of each; each turn has its own seed."""
    taken: dict[str, list[Timing]] = {name: [] for name in loops}
    with tempfile.TemporaryDirectory() as folder:
        spec = specs(Path(folder))[case.data]
        for turn in range(turns + 1):
            for name, loop in loops.items():
                epochs = case.epochs if turn else 1
                job = prepare(case, spec, turn, epochs, Path(folder, f"{turn} {name}"))
                gc.collect()
                timing = loop(job)
                if turn:
                    seen = len(job.x) * epochs
                    taken[name].append(Timing(seen / timing.training, seen / timing.whole, timing.elbo))
    return record(case, job, taken)


def specs(folder: Path) -> dict[str, str]:
    """The data sets by name: scikit-learn's digits, and the same, enlarged from 8 × 8, as the files of MNIST."""
    rows = datasets.load(DataConfig(), 0).train.rows
    small = rows.read(np.arange(len(rows)))[:, 0] * 15  # (N, 8, 8) uint8, levels 0 to 16 become 0 to 240
    large = np.stack([Image.fromarray(one).resize((28, 28), Image.Resampling.BICUBIC) for one in small])
    for part, pictures in (("train", large[_TEST:]), ("t10k", large[:_TEST])):
        header = struct.pack(">4I", 0x0803, *pictures.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pictures.tobytes())
    return {"digits": "digits", "28 × 28": f"mnist:{folder}"}


def prepare(case: Case, spec: str, seed: int, epochs: int, out: Path) -> Job:
    """The configurations, and the training examples in memory for the loops that read no files."""
    data_config = DataConfig(spec=spec)
    dataset = datasets.load(data_config, seed)
    return Job(
        model=model_config(case.model, data_shape=dataset.shape, **case.options),
        data=data_config,
        train=train_config(case.model, seed=seed, epochs=epochs, device="cpu"),
        x=torch.from_numpy(dataset.train.read(np.arange(len(dataset.train)))),
        out=out,
    )


def ours(job: Job) -> Timing:
    """Our `fit`."""
    began = time.perf_counter()
    fit(job.out, job.model, job.train, job.data)
    whole = time.perf_counter() - began
    history = msgspec.json.decode((job.out / "metrics.json").read_bytes())["history"]
    training = sum(len(job.x) / row["images_per_second"] for row in history)
    return Timing(training, whole, history[-1]["train_bound"])


def plain(job: Job) -> Timing:
    """A loop as written by hand: no evaluation, no checkpoints, no log."""
    model, average = initial(job), initial(job)
    train, count = job.train, len(job.x)
    weights, averaged = list(model.parameters()), [p.detach() for p in average.parameters()]
    decayed, others = [p for p in weights if p.ndim > 1], [p for p in weights if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)
    total = train.epochs * math.ceil(count / train.batch_size)
    warmup, step = min(train.warmup, total // 10), 0
    torch.manual_seed(train.seed)

    began = time.perf_counter()
    for _ in range(train.epochs):
        running = torch.zeros(())
        order = torch.randperm(count)
        for first in range(0, count, train.batch_size):
            x = job.x[order[first : first + train.batch_size]]
            cosine = 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate * ((step + 1) / warmup if step < warmup else cosine)
            loss = negative_elbo(model, x) / len(x)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, train.gradient_clip)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averaged, weights, 1.0 - min(train.ema, (1 + step) / (10 + step)))
            running += loss.detach() * len(x)
            step += 1
        last = running.item() / count
    took = time.perf_counter() - began
    return Timing(took, took, -last)


def initial(job: Job) -> models.VAEModel:
    """The initial model of `fit`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.train.seed)
        return models.build(job.model)


def negative_elbo(model: models.VAEModel, x: Tensor) -> Tensor:
    """Summed over the batch, nats; written without `trainers.objective`."""
    mean, logvar = model.encoder(x).chunk(2, 1)
    logvar = logvar.clamp(*model.config.logvar_clamp)
    out = model.decoder(mean + torch.randn_like(mean) * torch.exp(0.5 * logvar))
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum()
    if model.config.likelihood == "bernoulli":
        return functional.binary_cross_entropy_with_logits(out, x, reduction="sum") + kl
    sample, spread = out.chunk(2, 1)
    spread = spread.clamp(*model.config.sample_logvar_clamp)
    return 0.5 * (math.log(2 * math.pi) + spread + (x - sample).square() * torch.exp(-spread)).sum() + kl


def pythae(folder: Path | None) -> Callable[[Job], Timing]:
    """Its trainer around our networks. A Gaussian likelihood becomes its squared error, a fixed variance of 1.

    Raises:
        ImportError: pythae or one of its dependencies is not installed.
    """
    if folder is not None:
        sys.path.append(str(folder))  # at the end: what we have ourselves comes first
    datasets, library, networks, trainers, callbacks = (
        importlib.import_module(f"pythae.{name}")
        for name in ("data.datasets", "models", "models.nn", "trainers", "trainers.training_callbacks")
    )
    output = importlib.import_module("pythae.models.base.base_utils").ModelOutput

    class Encoder(networks.BaseEncoder):  # type: ignore[misc, name-defined]
        def __init__(self, model: models.VAEModel) -> None:
            super().__init__()
            self.trunk, self.limits = model.encoder, model.config.logvar_clamp

        def forward(self, x: Tensor) -> Any:
            mean, logvar = self.trunk(x).chunk(2, 1)
            return output(embedding=mean, log_covariance=logvar.clamp(*self.limits))

    class Decoder(networks.BaseDecoder):  # type: ignore[misc, name-defined]
        def __init__(self, model: models.VAEModel) -> None:
            super().__init__()
            self.trunk, self.bernoulli = model.decoder, model.config.likelihood == "bernoulli"

        def forward(self, z: Tensor) -> Any:
            out = self.trunk(z)
            return output(reconstruction=torch.sigmoid(out) if self.bernoulli else out.chunk(2, 1)[0])

    class Clock(callbacks.TrainingCallback):  # type: ignore[misc, name-defined]
        began = ended = loss = 0.0

        def __init__(self, train: TrainConfig) -> None:
            self.train = train
            self.trainer: Any = None

        def on_train_begin(self, training_config: Any, **kwargs: Any) -> None:
            """Add gradient clipping and averaged weights to a step."""
            weights = list(self.trainer.model.parameters())
            averaged = [weight.detach().clone() for weight in weights]
            clip, decay = self.train.gradient_clip, self.train.ema
            steps = itertools.count()

            def average(*unused: Any) -> None:
                step = next(steps)
                with torch.no_grad():
                    torch._foreach_lerp_(averaged, weights, 1.0 - min(decay, (1 + step) / (10 + step)))

            def clipped(*unused: Any) -> None:
                nn.utils.clip_grad_norm_(weights, clip)

            self.trainer.optimizer.register_step_pre_hook(clipped)
            self.trainer.optimizer.register_step_post_hook(average)
            self.began = time.perf_counter()

        def on_epoch_end(self, training_config: Any, **kwargs: Any) -> None:
            self.ended = time.perf_counter()

        def on_log(self, training_config: Any, logs: dict[str, float], **kwargs: Any) -> None:
            self.loss = logs["train_epoch_loss"]

    def loop(job: Job) -> Timing:
        model, train = initial(job), job.train
        bernoulli = job.model.likelihood == "bernoulli"
        config = library.VAEConfig(
            input_dim=job.model.data_shape,
            latent_dim=job.model.latent,
            reconstruction_loss="bce" if bernoulli else "mse",
        )
        vae = library.VAE(config, Encoder(model), Decoder(model))
        examples = datasets.BaseDataset(job.x, torch.zeros(len(job.x)))
        clock = Clock(train)
        began = time.perf_counter()
        trainer = trainers.BaseTrainer(
            model=vae,
            train_dataset=examples,
            training_config=trainers.BaseTrainerConfig(
                output_dir=str(job.out),
                per_device_train_batch_size=train.batch_size,
                num_epochs=train.epochs,
                optimizer_cls="AdamW",
                optimizer_params={"weight_decay": train.weight_decay, "fused": True},
                scheduler_cls="CosineAnnealingLR",
                scheduler_params={"T_max": train.epochs},
                learning_rate=train.learning_rate,
                keep_best_on_train=True,
                no_cuda=True,
                seed=train.seed,
            ),
            callbacks=[clock],
        )
        clock.trainer = trainer
        trainer.train()
        whole = time.perf_counter() - began
        return Timing(clock.ended - clock.began, whole, -clock.loss if bernoulli else math.nan)

    return loop


def record(case: Case, job: Job, taken: dict[str, list[Timing]]) -> dict[str, Any]:
    """One case's row. `taken` holds images per second."""
    parts = ("training", "whole")
    speeds = {name: {part: [getattr(t, part) for t in timings] for part in parts} for name, timings in taken.items()}
    ratios = {
        name: {p: spread([a / b for a, b in zip(speeds[OURS][p], speeds[name][p], strict=True)]) for p in parts}
        for name in taken
        if name != OURS
    }
    elbos = {name: statistics.mean(timing.elbo for timing in timings) for name, timings in taken.items()}
    difference, allowed = abs(elbos[OURS] - elbos[PLAIN]), max(NATS, SHARE * abs(elbos[PLAIN]))
    bounds = {
        f"training ÷ {PLAIN} ≥ {PLAIN_BOUND}": ratios[PLAIN]["training"]["median"] >= PLAIN_BOUND,
        f"ELBO as the {PLAIN}'s, within {NATS:g} nat or {SHARE:.0%}": difference <= allowed,
    }
    if PYTHAE in taken:
        bounds[f"training ÷ {PYTHAE} > {PYTHAE_BOUND:g}"] = ratios[PYTHAE]["training"]["median"] > PYTHAE_BOUND
    return {
        "case": case.name,
        "model": {"name": case.model, "widths": job.model.widths, "latent": job.model.latent},
        "likelihood": job.model.likelihood,
        "data_shape": job.model.data_shape,
        "examples": len(job.x),
        "epochs": case.epochs,
        "batch_size": job.train.batch_size,
        "turns": len(taken[OURS]),
        "images_per_second": {name: {part: spread(speeds[name][part]) for part in parts} for name in taken},
        "ours_to": ratios,
        "train_elbo": {name: None if math.isnan(value) else value for name, value in elbos.items()},
        "bounds": bounds,
        "met": all(bounds.values()),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and range over the turns."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table: images per second, and the ratio of ours to the others in the same turns."""
    table = Table("case", "loop", "training", "ours ÷ it", "with evaluation", "ours ÷ it", "train ELBO", "")
    for row in rows:
        for name, speeds in row["images_per_second"].items():
            cells = []
            for part in ("training", "whole"):
                ratio = row["ours_to"].get(name, {}).get(part)
                cells.append(f"{speeds[part]['median']:,.0f}")
                cells.append("{median:.3f} ({min:.2f}–{max:.2f})".format(**ratio) if ratio else "")
            elbo = row["train_elbo"][name]
            cells.append("" if elbo is None else f"{elbo:.2f}")
            cells.append("" if name != OURS else "ok" if row["met"] else "[red]MISSED[/]")
            table.add_row(row["case"] if name == OURS else "", name, *cells)
    Console(width=140).print(table)
    for row in rows:
        for what, held in row["bounds"].items():
            if not held:
                print(f"MISSED: {row['case']}: {what}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
