"""Train a VAE: one loop, to be read from top to bottom.

A step is a function of weights, optimizer state and its own number: `Batches` gives batch and noise of a step, the
schedules its learning rate and KL weight. So a run that is stopped anywhere and resumed from its last checkpoint takes
the same steps: bit for bit on the same machine with the same number of threads, where PyTorch's operators are
deterministic, as those on the CPU are. Figures are fetched every few steps, and nothing is written before they are
known to be finite; the kept weights are written before the state, the state before the result.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import msgspec
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from vae_export.errors import BackendError, InputError
from vae_export.trainers import checkpoint, datasets, evaluate, logs, models, plots
from vae_export.trainers import config as configs
from vae_export.trainers.batches import Batch, Batches
from vae_export.trainers.checkpoint import Epoch, State
from vae_export.trainers.config import CheckpointConfig, DataConfig, ModelConfig, Result, TrainConfig
from vae_export.trainers.datasets import Dataset
from vae_export.trainers.download import download as download_data
from vae_export.trainers.environment import agree, memory_errors, open_fabric, release_reducer, signals, summed
from vae_export.trainers.objective import Bound, Objective, training_loss
from vae_export.trainers.schedule import groups, learning_rate, warmed_up

_CHECK_STEPS = 16  # steps between two fetches of figures from the device
_TOTALS = ("bound", "reconstruction", "kl", "examples", "seconds")
_TRAIN, _DATA = TrainConfig(), DataConfig()
#: From the data's shape (C, H, W) and range to the model's configuration.
Describe = Callable[[tuple[int, int, int], tuple[float, float]], ModelConfig]


def fit(
    out: Path,
    model: ModelConfig | Describe,
    config: TrainConfig = _TRAIN,
    data_config: DataConfig = _DATA,
    *,
    overwrite: bool = False,
    resume: bool = False,
    download: bool = False,
    checkpoint_seconds: float = 30.0,
    picture_seconds: float = 60.0,
) -> Result:
    """Train a model and write a run: checkpoint, figures and pictures.

    SIGTERM and SIGINT complete the step, save, and then end the process as they would have. Under `torchrun`, every
    process calls this with the same arguments.

    Args:
        out: the run's folder.
        model: the model's configuration, or a function that returns it, given the data's shape (C, H, W) and range.
        config: the training's configuration.
        data_config: the data's configuration.
        overwrite: replace an existing run.
        resume: continue an existing run, on the same machine bit for bit; if there is none, start it.
        download: download the data first.
        checkpoint_seconds: time between two checkpoints, which are also written inside of long epochs.
        picture_seconds: time between two sets of pictures.

    Returns:
        The figures of the kept weights on the test data.

    Raises:
        InputError: a configuration is not valid or does not fit the data, `out` exists, or a loss became NaN or
            infinite.
        BackendError: the device, the precision or the compiler is not available.
    """
    for record in (config, data_config, model):
        if not callable(record):
            record.check()
    _check_place(out, data_config, overwrite=overwrite, resume=resume)
    fabric = open_fabric(config)
    first = fabric.global_rank == 0
    log = logs.Log(out, config, first=first)
    resumed = resume and (out / configs.CONFIG).is_file()
    if first and not resumed:
        checkpoint.check_target(out, overwrite=overwrite)
        if download:
            kind, _, folder = data_config.spec.partition(":")
            download_data(kind, Path(folder).expanduser(), log.say)
    if download:
        fabric.barrier()
    dataset = datasets.load(data_config, config.seed, report=log.say)
    model = model if isinstance(model, ModelConfig) else model(dataset.shape, dataset.range)
    model.check()
    if (config.objective == "autoencoder") != (model.posterior == "deterministic"):
        raise InputError(
            f"train: objective {config.objective!r} does not fit a {model.posterior!r} posterior; a plain autoencoder "
            "has both 'autoencoder' and 'deterministic'"
        )
    dataset = dataset.for_model(model)
    run_config = CheckpointConfig(model=model, data=data_config, train=config, split=dataset.split)
    with memory_errors(out), contextlib.ExitStack() as stack:
        if fabric.world_size > 1:  # its threads must have ended before the process does
            stack.callback(torch.distributed.destroy_process_group)
        if first:
            out.mkdir(exist_ok=True)
            stack.enter_context(checkpoint.locked(out))
            if resumed:
                checkpoint.check_same(out, run_config)
            else:  # again: another process may have started here while the data was read
                checkpoint.check_target(out, overwrite=overwrite)
        fabric.barrier()
        if resumed and (result := configs.read_config(out).result):
            log.say(f"{out}: training has already ended")
            return result
        run = _Run(out, run_config, dataset, fabric, log)
        if fabric.world_size > 1:
            stack.callback(release_reducer, run)
        if not resumed:
            run.try_step()
        if first:
            checkpoint.clear(out, partial=resumed)
            checkpoint.write_config(out, run_config)
        fabric.barrier()
        if resume:
            run.restore()
        with log.events(run.step):
            with signals() as stop:
                run.train(stop, checkpoint_seconds, picture_seconds)
            return run.finish()


class _Run:
    """The state of a run, its loop, and its checkpoints."""

    def __init__(self, out: Path, config: CheckpointConfig, dataset: Dataset, fabric: Fabric, log: logs.Log) -> None:
        self.out, self.config, self.dataset, self.fabric, self.log = out, config, dataset, fabric, log
        train = config.train
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(train.seed)
            self.model = models.build(config.model)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False).to(fabric.device)
        objective: Any = Objective(self.model, train.objective)
        if train.compile:
            objective = torch.compile(objective)
        self.adamw = torch.optim.AdamW(
            groups(self.model, train),
            lr=train.learning_rate,
            fused=train.precision != "16-mixed",  # its gradients must be unscaled before they are clipped
        )
        # For one process in float32 Fabric's wrappers do nothing, and take 6 % of a small model's step.
        self.wrapped = fabric.world_size > 1 or train.precision != "32-true"
        self.objective, self.optimizer = objective.to(fabric.device), self.adamw
        if self.wrapped:
            self.objective, self.optimizer = fabric.setup(objective, self.adamw)
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.averages: list[Tensor] = list(self.average.parameters())
        self.batches = Batches(dataset.train, train, config.model.latent_shape, fabric.global_rank, fabric.world_size)
        self.environment: dict[str, str | int] = {
            "device": fabric.device.type,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        self.step = 0
        self.totals = dict.fromkeys(_TOTALS, 0.0)  # over this epoch
        self.history: tuple[Epoch, ...] = ()
        self.unwritten: dict[str, Tensor] | None = None  # the kept weights, until they are written
        self.saved_step: int | None = None
        self.saved_at = self.drawn_at = time.monotonic()

    def train(self, stop: Callable[[], int], checkpoint_seconds: float, picture_seconds: float) -> None:
        """Take the remaining steps, or those until `stop` returns the number of a signal."""
        train, fabric, per_epoch = self.config.train, self.fabric, self.batches.steps_per_epoch
        total = train.epochs * per_epoch
        pending: list[tuple[Tensor, ...]] = []  # loss, gradient norm, and (B,) bound, reconstruction and KL
        with self.log.progress(self.step, total):
            began = time.perf_counter()
            steps = range(self.step, 0 if self._patience_ended() else total)
            for batch in self.batches.ahead(steps, self._workers()):
                rate = train.learning_rate * learning_rate(self.step, train.warmup, total)
                kl_weight = train.beta * warmed_up(self.step, train.kl_warmup * per_epoch)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group["pace"]
                x, eps = batch.x.to(fabric.device), batch.eps.to(fabric.device)  # (B, C, H, W), (K, B, *latent)
                bound = self._bound(x, eps)  # each (B,), nats
                mean_kl = self._mean_kl(bound, batch) if train.free_bits else None
                losses = training_loss(bound, train.objective, kl_weight, train.free_bits, mean_kl)
                loss = losses.mean()
                if fabric.world_size > 1:  # gradients are averaged over processes: weight by their examples
                    loss = _counted(losses, batch).sum() * (fabric.world_size / batch.total)
                self.optimizer.zero_grad(set_to_none=True)
                norm = self._backward(loss)
                self.optimizer.step()
                self._average_weights()
                self.step += 1
                pending.append((loss.detach(), norm, *(_counted(part.detach(), batch) for part in bound[:3])))
                self.totals["examples"] += batch.count

                ended = self.step % per_epoch == 0
                signalled, due = stop(), time.monotonic() - self.saved_at > checkpoint_seconds
                check = ended or len(pending) == _CHECK_STEPS
                if fabric.world_size > 1:  # communicating at every step takes too long
                    signalled, due = agree(fabric, signalled, due) if check else (0, False)
                if check or signalled or due:
                    self._check_steps(pending, began)
                    if ended:
                        self._end_epoch(rate, kl_weight, picture_seconds)
                    if signalled or due:
                        self.save()
                    if signalled:
                        self._leave(signalled)
                    if ended and self._patience_ended():
                        break
                    began = time.perf_counter()
            self.save()
            signalled, _ = agree(fabric, stop(), False)  # one that arrived while the last epoch was evaluated
            if signalled:
                self._leave(signalled)

    def try_step(self) -> None:
        """A step without an update, so that a model that cannot be trained fails before an old run is removed."""
        batch = self.batches[0]
        bound = self._bound(batch.x.to(self.fabric.device), batch.eps.to(self.fabric.device))
        self._backward(-bound.bound.mean())
        self.optimizer.zero_grad(set_to_none=True)

    def restore(self) -> None:
        """Load the last checkpoint, if there is one."""
        saved = checkpoint.read_state(self.out)
        if saved is None:
            self.log.say(f"{self.out}: there is no checkpoint yet; starting at step 0")
            return
        state, tensors = saved
        if state.processes != self.fabric.world_size:
            raise InputError(
                f"train: --resume continues the run as it was, but it had {state.processes} processes and now has "
                f"{self.fabric.world_size}. Start {state.processes}, or a new run in another folder"
            )
        checkpoint.restore(self.out, state, tensors, self.model, self.average, self.adamw)
        if state.scaler:
            self.fabric.strategy.precision.load_state_dict(state.scaler)
        self.step, self.history = state.step, state.history
        if self.fabric.global_rank == 0:  # the sums over all processes, in the first one
            self.totals = dict(state.totals)
        self.saved_step = self.step
        self.log.say(f"{self.out}: continuing after step {self.step}")
        if state.environment != self.environment:
            self.log.say(
                f"{self.out}: the run started on {state.environment} and continues on {self.environment}: results "
                "differ in their last bits"
            )

    def save(self) -> None:
        """Write the kept weights, then the state, each file whole or not at all."""
        self.totals = self._all_totals()
        if self.fabric.global_rank == 0 and self.saved_step != self.step:
            tensors = checkpoint.state_tensors(self.model, self.average, self.adamw)
            record = State(
                step=self.step,
                processes=self.fabric.world_size,
                totals=self.totals,
                history=self.history,
                scaler=self.fabric.strategy.precision.state_dict(),
                environment=self.environment,
            )
            with self._writing(f"the checkpoint of step {self.step}"):
                if self.unwritten is not None:
                    checkpoint.write_weights(self.out, self.unwritten)
                checkpoint.write_state(self.out, record, tensors)
                logs.write_curve(self.out, self.history)
        if self.fabric.global_rank:
            self.totals = dict.fromkeys(_TOTALS, 0.0)
        self.unwritten = None
        self.saved_step, self.saved_at = self.step, time.monotonic()
        self.fabric.barrier()

    def finish(self) -> Result:
        """Evaluate the kept weights on the test data, and write figures and pictures."""
        kept, config = self._kept(), self.config
        self.average.load_state_dict(checkpoint.read_weights(self.out))
        measured = evaluate.on_test(self.average, self.fabric, self.dataset, config.train, config.data)
        result = msgspec.structs.replace(measured, epoch=kept.epoch, step=kept.step)
        if self.fabric.global_rank == 0:
            warnings = evaluate.warnings(result, config.model)
            for warning in warnings:
                self.log.say(f"warning: {warning}")
            with self._writing("the run's figures"):
                self._write_pictures()
                logs.write_curve(self.out, self.history)
                logs.write_metrics(self.out, result, self.dataset.split, self.history, warnings)
                checkpoint.write_config(self.out, msgspec.structs.replace(config, result=result))
        self.fabric.barrier()
        return result

    def _bound(self, x: Tensor, eps: Tensor) -> Bound:
        try:
            bound: Bound = self.objective(x, eps)
        except RuntimeError as error:
            if not self.config.train.compile or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise BackendError(
                f"train: torch.compile does not work here: {reason}. Leave --compile out, or install what is missing"
            ) from None
        return bound

    def _backward(self, loss: Tensor) -> Tensor:
        """Compute and clip the gradients; their norm before clipping."""
        clip = self.config.train.gradient_clip
        if not self.wrapped:
            loss.backward()
            return nn.utils.clip_grad_norm_(self.parameters, clip)
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(self.objective, self.optimizer, max_norm=clip, error_if_nonfinite=False)
        return cast(Tensor, norm)

    def _end_epoch(self, rate: float, kl_weight: float, picture_seconds: float) -> None:
        elbo, reconstruction, kl = evaluate.on_validation(
            self.average, self.fabric, self.dataset.validation, self.config.train
        )
        if not math.isfinite(elbo):
            raise InputError(self._diverged("validation bound", elbo, self.step - 1))
        totals = self._all_totals()
        bound, train_reconstruction, train_kl = (totals[name] / totals["examples"] for name in _TOTALS[:3])
        row = Epoch(
            epoch=len(self.history) + 1,
            step=self.step,
            learning_rate=rate,
            kl_weight=kl_weight,
            train_bound=bound,
            train_reconstruction=train_reconstruction,
            train_kl=train_kl,
            validation_bound=elbo,
            validation_reconstruction=reconstruction,
            validation_kl=kl,
            images_per_second=self.fabric.world_size * totals["examples"] / max(totals["seconds"], 1e-9),
        )
        self.history = (*self.history, row)
        self.totals = dict.fromkeys(_TOTALS, 0.0)
        if self._kept() is row:
            self.unwritten = {name: tensor.detach().clone() for name, tensor in self.average.state_dict().items()}
        with self._writing("the run's figures"):
            self.log.epoch(row)
            if self.fabric.global_rank == 0 and time.monotonic() - self.drawn_at > picture_seconds:
                self._write_pictures()
                self.drawn_at = time.monotonic()

    def _write_pictures(self) -> None:
        grids = plots.write(self.out / checkpoint.PICTURES, self.average, self.dataset, self.history)
        self.log.pictures(self.step, grids)

    def _kept(self) -> Epoch:
        """The epoch whose weights are kept, so far."""
        return checkpoint.best(self.history) if self.config.train.keep == "best" else self.history[-1]

    def _patience_ended(self) -> bool:
        patience = self.config.train.patience
        return bool(patience and self.history and len(self.history) - checkpoint.best(self.history).epoch >= patience)

    def _average_weights(self) -> None:
        """Update the averaged weights, with a smaller decay in the first steps, which are forgotten faster."""
        decay = min(self.config.train.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1.0 - decay)

    def _mean_kl(self, bound: Bound, batch: Batch) -> Tensor:
        """Mean KL of each latent dimension over the batches of all processes, (D,), without gradient."""
        mean = bound.kl_by_dimension.detach()[: batch.count].sum(0) / batch.total
        return summed(self.fabric, mean).to(mean.device)

    def _check_steps(self, pending: list[tuple[Tensor, ...]], began: float) -> None:
        """Fetch the figures of the steps since `began` from the device; add them up, unless one is not finite."""
        first = self.step - len(pending)
        losses, norms, *parts = zip(*pending, strict=True)
        sums = [torch.stack([values.sum() for values in part]) for part in parts]
        figures = torch.stack([torch.stack(losses), torch.stack(norms), *sums]).T.tolist()
        for step, (loss, norm, *terms) in enumerate(figures, first):
            if not math.isfinite(loss):
                raise InputError(self._diverged("loss", loss, step))
            if not math.isfinite(norm) and self.config.train.precision != "16-mixed":  # its scaler skips the step
                raise InputError(self._diverged("gradient norm", norm, step))
            for name, value in zip(_TOTALS, terms, strict=False):
                self.totals[name] += value  # step by step, so that a resumed run has the same sums
        pending.clear()
        totals = self.totals
        totals["seconds"] += time.perf_counter() - began
        examples = max(totals["examples"], 1.0)  # a process may have had none since the last checkpoint
        bound, kl = totals["bound"] / examples, totals["kl"] / examples
        # After a checkpoint the first process has the totals of all, seconds included.
        rate = self.fabric.world_size * totals["examples"] / max(totals["seconds"], 1e-9)
        self.log.step(self.step, len(self.history) + 1, bound, kl, rate)

    def _diverged(self, what: str, value: float, step: int) -> str:
        rows = self.batches.indices(step).tolist()
        shown = ", ".join(map(str, rows[:8])) + (f", … ({len(rows)} in all)" if len(rows) > 8 else "")
        return (
            f"train: the {what} became {value} at step {step} (epoch {step // self.batches.steps_per_epoch + 1}), on "
            f"training rows {shown}. {self._last_checkpoint()}. Lower the learning rate, or use --precision 32-true"
        )

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"train: {what} could not be written to {self.out}: {error.strerror or error}. "
                f"{self._last_checkpoint()}. Make space, and continue with --resume"
            ) from None

    def _last_checkpoint(self) -> str:
        if self.saved_step is None:
            return "No checkpoint has been written yet"
        return f"The last checkpoint, of step {self.saved_step}, is complete in {self.out}"

    def _all_totals(self) -> dict[str, float]:
        """This epoch's totals, summed over all processes."""
        sums = summed(self.fabric, torch.tensor(list(self.totals.values()), dtype=torch.float64))
        return dict(zip(self.totals, sums.tolist(), strict=True))

    def _workers(self) -> int:
        """Number of threads that prepare batches: 0 where that is faster than handing them over."""
        lazy = self.config.data.spec.partition(":")[0] in ("images", "array")
        return min(4, os.cpu_count() or 1) if lazy or self.fabric.device.type != "cpu" else 0

    def _leave(self, number: int) -> NoReturn:
        self.log.say(f"{self.out}: stopped after step {self.step} and saved; continue with --resume")
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


def _counted(values: Tensor, batch: Batch) -> Tensor:
    """(B,) without the example that stands in where a process has none left."""
    return values if batch.count == len(values) else values[: batch.count]


def _check_place(out: Path, config: DataConfig, *, overwrite: bool, resume: bool) -> None:
    if overwrite and resume:
        raise InputError("train: --resume continues a run, --force replaces it. Choose one of the two")
    kind, _, where = config.spec.partition(":")
    if kind == "images" and out.resolve().is_relative_to(Path(where).expanduser().resolve()):
        raise InputError(
            f"train: {out} lies in the folder of the training pictures. Choose a folder outside of it for the run"
        )
