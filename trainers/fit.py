"""Train a VAE. One loop, to be read from top to bottom.

A step is a function of the weights, the optimizer and its own number: `feed.Feed` makes the batch and the noise
from the number, the schedules make the learning rate and the KL's weight from it. So a run that is stopped
anywhere and goes on from its last checkpoint takes the same steps: to the bit, on the same machine with as many
threads, where PyTorch's operators are deterministic, as those on the CPU are.
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
from safetensors import SafetensorError
from torch import Tensor, nn

from vae_export.errors import BackendError, InputError
from vae_export.trainers import checkpoint, datasets, evaluate, logs, models, plots
from vae_export.trainers import config as configs
from vae_export.trainers.batches import Batch, Feed
from vae_export.trainers.checkpoint import Epoch, State
from vae_export.trainers.config import CheckpointConfig, DataConfig, ModelConfig, Result, TrainConfig
from vae_export.trainers.datasets import DataSet
from vae_export.trainers.download import fetch
from vae_export.trainers.environment import enough_memory, open_fabric, signals
from vae_export.trainers.objective import Bound, Objective, shaped
from vae_export.trainers.schedule import groups, learning_rate, warmed_up

#: Steps after which figures are fetched from the device and looked at.
_GLANCE = 16
_TRAIN, _DATA = TrainConfig(), DataConfig()
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
    """Train a model and leave a run: checkpoint, figures and pictures.

    SIGTERM and SIGINT save at the end of the step, and then end the process as they would have. Under
    `torchrun`, every process calls this with the same arguments.

    Args:
        out: the run's folder.
        model: what to train, or a function that says it of the data's shape (C, H, W) and range.
        config: how.
        data_config: on what.
        overwrite: replace a run that is there.
        resume: continue the run that is there, on the same machine bit for bit; without one, begin.
        download: fetch the data first, if it is one of those that can be fetched.
        checkpoint_seconds: between two checkpoints, which lie at the end of an epoch or, in long epochs, inside.
        picture_seconds: between two sets of pictures.

    Returns:
        The figures of the kept weights on the test data.

    Raises:
        InputError: the configuration or the data does not fit, `out` exists, or a loss became NaN or infinite.
        BackendError: the device, the precision or the compiler is not there.
    """
    for record in (config, data_config, model):
        if not callable(record):
            record.check()
    _check_place(out, data_config, overwrite=overwrite, resume=resume)
    fabric = open_fabric(config)
    log = logs.Log(out, config.objective, first=fabric.global_rank == 0)
    going_on = resume and (out / configs.CONFIG).is_file()
    if fabric.global_rank == 0 and not going_on:
        checkpoint.check_target(out, overwrite=overwrite)
        if download:
            kind, _, folder = data_config.spec.partition(":")
            fetch(kind, Path(folder).expanduser(), log.say)
    if download:
        fabric.barrier()
    dataset, model_config = _dataset(data_config, config, model, log)
    asked = CheckpointConfig(model=model_config, data=data_config, train=config, split=dataset.split)
    with enough_memory(out), contextlib.ExitStack() as stack:
        if fabric.world_size > 1:  # its threads must have ended before the process does
            stack.callback(torch.distributed.destroy_process_group)
        if fabric.global_rank == 0:
            out.mkdir(exist_ok=True)
            stack.enter_context(checkpoint.claimed(out))
            if going_on:
                configs.check_same(out, asked)
            else:  # once more, because reading data takes long, and now nobody else can begin there
                checkpoint.check_target(out, overwrite=overwrite)
        fabric.barrier()
        if going_on and (result := configs.read_config(out).result):
            log.say(f"{out}: training has ended already")
            return result
        run = _Run(out, asked, dataset, fabric, log)
        if not going_on:
            run.try_out()
        if fabric.global_rank == 0:
            checkpoint.clear(out, partial=going_on)
            checkpoint.write_config(out, asked)
        fabric.barrier()
        if resume:
            run.restore()
        with signals() as stop:
            run.train(stop, checkpoint_seconds, picture_seconds)
        return run.finish()


class _Run:
    """A run: what changes from step to step, and how it is kept."""

    def __init__(self, out: Path, config: CheckpointConfig, dataset: DataSet, fabric: Fabric, log: logs.Log) -> None:
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
            fused=train.precision != "16-mixed",  # whose gradients must be unscaled before they are clipped
        )
        # Fabric's wrappers have nothing to do for one process in float32, and cost a small model 6 % of a step.
        self.wrapped = fabric.world_size > 1 or train.precision != "32-true"
        self.objective, self.optimizer = objective.to(fabric.device), self.adamw
        if self.wrapped:
            self.objective, self.optimizer = fabric.setup(objective, self.adamw)
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.averages: list[Tensor] = list(self.average.parameters())
        self.feed = Feed(dataset.train, train, config.model.latent_shape, fabric.global_rank, fabric.world_size)
        self.environment: dict[str, str | int] = {
            "device": fabric.device.type,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        self.step = 0
        self.totals = dict.fromkeys(_TOTALS, 0.0)  # of this epoch
        self.history: tuple[Epoch, ...] = ()
        self.unwritten: dict[str, Tensor] | None = None  # the weights to keep, if they are not in the folder yet
        self.saved_step: int | None = None
        self.saved_at = self.drawn_at = time.monotonic()

    def train(self, stop: Callable[[], int], checkpoint_seconds: float, picture_seconds: float) -> None:
        """Take the steps that are left.

        Args:
            stop: the number of the signal that came, or 0.
            checkpoint_seconds: as in `fit`.
            picture_seconds: as in `fit`.
        """
        train, fabric, per_epoch = self.config.train, self.fabric, self.feed.steps_per_epoch
        total = train.epochs * per_epoch
        pending: list[tuple[Tensor, ...]] = []  # loss, gradient's norm, each example's bound, reconstruction and KL
        with self.log.progress(self.step, total):
            began = time.perf_counter()
            for batch in self.feed.ahead(range(self.step, total if not self._patience_ended() else 0), self._workers()):
                rate = train.learning_rate * learning_rate(self.step, train.warmup, total)
                kl_weight = train.beta * warmed_up(self.step, train.kl_warmup * per_epoch)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group["pace"]
                x, eps = batch.x.to(fabric.device), batch.eps.to(fabric.device)  # (B, C, H, W), (K, B, *latent)
                bound = self._bound(x, eps)  # each (B,), nats
                mean_kl = self._mean_kl(bound, batch) if train.free_bits else None
                losses = shaped(bound, train.objective, kl_weight, train.free_bits, mean_kl)
                loss = losses.mean()
                if fabric.world_size > 1:  # whose gradients are averaged: the mean over the examples of all of them
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
                glance = ended or len(pending) == _GLANCE
                if fabric.world_size > 1:  # to ask the others at every step takes too long
                    signalled, due = self._agree(signalled, due) if glance else (0, False)
                if glance or signalled or due:
                    self._look(pending, began)
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
            signalled, _ = self._agree(stop(), False)  # that came while the last epoch was evaluated
            if signalled:
                self._leave(signalled)

    def try_out(self) -> None:
        """A step that changes nothing: what cannot work fails before an old run makes room for this one."""
        batch = self.feed[0]
        bound = self._bound(batch.x.to(self.fabric.device), batch.eps.to(self.fabric.device))
        self._backward(-bound.bound.mean())
        self.optimizer.zero_grad(set_to_none=True)

    def restore(self) -> None:
        """Go back to the last checkpoint, if there is one.

        Raises:
            InputError: it is damaged, or of another number of processes.
        """
        kept = checkpoint.read_state(self.out)
        if kept is None:
            self.log.say(f"{self.out}: there is no checkpoint yet; starting at step 0")
            return
        state, tensors = kept
        if state.processes != self.fabric.world_size:
            raise InputError(
                f"train: --resume continues the run as it was, but it had {state.processes} processes and now has "
                f"{self.fabric.world_size}. Start as many, or a new run in another folder"
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        try:
            for name, tensor in tensors.items():
                part, _, rest = name.partition("/")
                parts[part][rest] = tensor
            if state.history:  # better to know now that the kept weights are damaged than at the end
                self.average.load_state_dict(checkpoint.read_weights(self.out))
            self.model.load_state_dict(parts["model"])
            self.average.load_state_dict(parts["average"])
            plain = self.adamw.state_dict()
            for index, name in enumerate(self._optimized()):
                if f"{name}/step" in parts["optimizer"]:  # none yet, if float16's scaler has skipped every step
                    plain["state"][index] = {key: parts["optimizer"][f"{name}/{key}"] for key in _MOMENTS}
            self.adamw.load_state_dict(plain)
        except (KeyError, RuntimeError, SafetensorError, OSError) as error:
            raise InputError(
                f"train: the checkpoint in {self.out} does not hold this model's weights: {error}. Its files are "
                "damaged or have been changed. Train again in another folder"
            ) from None
        if state.scaler:
            self.fabric.strategy.precision.load_state_dict(state.scaler)
        self.step, self.history = state.step, state.history
        if self.fabric.global_rank == 0:  # the first process has what all have summed up
            self.totals = dict(state.totals)
        self.saved_step = self.step
        self.log.say(f"{self.out}: continuing after step {self.step}")
        if state.environment != self.environment:
            self.log.say(
                f"{self.out}: it ran on {state.environment} and goes on on {self.environment}: other last bits"
            )

    def save(self) -> None:
        """Write the kept weights and the state, both whole or not at all; the state is the later one.

        Raises:
            InputError: there is no room, or no right, to write. What was there is still whole.
        """
        self.totals = self._all_totals()
        if self.fabric.global_rank == 0 and self.saved_step != self.step:
            tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
            tensors |= {f"average/{name}": tensor for name, tensor in self.average.state_dict().items()}
            state = self.adamw.state_dict()["state"]
            for index, name in enumerate(self._optimized()):
                if index in state:
                    tensors |= {f"optimizer/{name}/{key}": state[index][key] for key in _MOMENTS}
            scaler = self.fabric.strategy.precision.state_dict()
            record = State(
                step=self.step,
                processes=self.fabric.world_size,
                totals=self.totals,
                history=self.history,
                scaler=scaler,
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
        """Measure the kept weights on the test data, and write figures and pictures."""
        kept, config = self._kept(), self.config
        self.average.load_state_dict(checkpoint.read_weights(self.out))
        measured = evaluate.on_test(self.average, self.fabric, self.dataset, config.train, config.data)
        result = msgspec.structs.replace(measured, epoch=kept.epoch, step=kept.step)
        if self.fabric.global_rank == 0:
            warned = evaluate.warnings(result, config.model)
            for warning in warned:
                self.log.say(f"warning: {warning}")
            with self._writing("the run's figures"):
                plots.write(self.out / checkpoint.PICTURES, self.average, self.dataset, self.history)
                logs.write_curve(self.out, self.history)
                logs.write_metrics(self.out, result, self.dataset.split, self.history, warned)
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
                f"train: torch.compile does not work here: {reason}. Leave --compile out, or install what it needs"
            ) from None
        return bound

    def _backward(self, loss: Tensor) -> Tensor:
        """Leave the gradients, clipped; their norm before that."""
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
                plots.write(self.out / checkpoint.PICTURES, self.average, self.dataset, self.history)
                self.drawn_at = time.monotonic()

    def _kept(self) -> Epoch:
        """The epoch whose weights are the run's result, so far."""
        return checkpoint.best(self.history) if self.config.train.keep == "best" else self.history[-1]

    def _patience_ended(self) -> bool:
        patience = self.config.train.patience
        return bool(patience and self.history and len(self.history) - checkpoint.best(self.history).epoch >= patience)

    def _average_weights(self) -> None:
        """Average the weights, over fewer steps at first: they are worth little then."""
        decay = min(self.config.train.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1.0 - decay)

    def _mean_kl(self, bound: Bound, batch: Batch) -> Tensor:
        """(D,) of the whole batch, of all processes; without gradient."""
        mean = bound.kl_by_dimension.detach()[: batch.count].sum(0) / batch.total
        return evaluate.summed(self.fabric, mean).to(mean.device)

    def _look(self, pending: list[tuple[Tensor, ...]], began: float) -> None:
        """Fetch what the last steps, since `began`, left on the device; refuse what is not finite, show the rest."""
        first = self.step - len(pending)
        losses, norms, *parts = zip(*pending, strict=True)
        sums = [torch.stack([values.sum() for values in part]) for part in parts]
        figures = torch.stack([torch.stack(losses), torch.stack(norms), *sums]).T.tolist()
        for step, (loss, norm, *terms) in enumerate(figures, first):
            if not math.isfinite(loss):
                raise InputError(self._diverged("loss", loss, step))
            if not math.isfinite(norm) and self.config.train.precision != "16-mixed":  # whose scaler skips the step
                raise InputError(self._diverged("gradient's norm", norm, step))
            for name, value in zip(_TOTALS, terms, strict=False):  # step by step: the same wherever a run is stopped
                self.totals[name] += value
        pending.clear()
        totals = self.totals
        totals["seconds"] += time.perf_counter() - began
        examples = max(totals["examples"], 1.0)  # a process may have had none since the last checkpoint
        bound, kl = totals["bound"] / examples, totals["kl"] / examples
        # Of several processes, the first may have the totals of all, seconds too: its share counts for each.
        rate = self.fabric.world_size * totals["examples"] / max(totals["seconds"], 1e-9)
        self.log.step(self.step, bound, kl, rate)

    def _diverged(self, what: str, value: float, step: int) -> str:
        rows = self.feed.indices(step).tolist()
        shown = ", ".join(map(str, rows[:8])) + (f", … ({len(rows)} in all)" if len(rows) > 8 else "")
        return (
            f"train: the {what} became {value} at step {step} (epoch {step // self.feed.steps_per_epoch + 1}), on "
            f"training rows {shown}. {self._last_checkpoint()}. Lower the learning rate, or use --precision 32-true"
        )

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"train: {what} could not be written to {self.out}: {error.strerror or error}. "
                f"{self._last_checkpoint()}. Make room, and continue with --resume"
            ) from None

    def _last_checkpoint(self) -> str:
        if self.saved_step is None:
            return "There is no checkpoint yet"
        return f"The last checkpoint, of step {self.saved_step}, is whole in {self.out}"

    def _agree(self, signalled: int, due: bool) -> tuple[int, bool]:
        """What any process has been told to do, all do."""
        if self.fabric.world_size == 1:
            return signalled, due
        flags = torch.tensor([signalled, int(due and self.fabric.global_rank == 0)], device=self.fabric.device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        signalled, both = flags.tolist()
        return signalled, bool(both)

    def _all_totals(self) -> dict[str, float]:
        """This epoch's, over all processes."""
        sums = evaluate.summed(self.fabric, torch.tensor(list(self.totals.values()), dtype=torch.float64))
        return dict(zip(self.totals, sums.tolist(), strict=True))

    def _optimized(self) -> list[str]:
        """Names of the parameters in the optimizer's order."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in self.adamw.param_groups for parameter in group["params"]]

    def _workers(self) -> int:
        """Threads that make batches: where reading is slow or the device could wait for the host."""
        lazy = self.config.data.spec.partition(":")[0] in ("images", "array")
        return min(4, os.cpu_count() or 1) if lazy or self.fabric.device.type != "cpu" else 0

    def _leave(self, number: int) -> NoReturn:
        self.log.say(f"{self.out}: stopped after step {self.step} and saved; go on with --resume")
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_TOTALS = ("bound", "reconstruction", "kl", "examples", "seconds")


def _counted(values: Tensor, batch: Batch) -> Tensor:
    """(B,) without the example that stands in where a process has none."""
    return values if batch.count == len(values) else values[: batch.count]


def _check_place(out: Path, config: DataConfig, *, overwrite: bool, resume: bool) -> None:
    if overwrite and resume:
        raise InputError("train: --resume continues a run, --force replaces it. Choose one of the two")
    kind, _, where = config.spec.partition(":")
    if kind == "images" and out.resolve().is_relative_to(Path(where).expanduser().resolve()):
        raise InputError(
            f"train: {out} lies in the folder of the pictures, to which the run would add its own. Choose a folder "
            "outside of it"
        )


def _dataset(
    config: DataConfig, train: TrainConfig, described: ModelConfig | Describe, log: logs.Log
) -> tuple[DataSet, ModelConfig]:
    """The data and the model, if they fit each other.

    Raises:
        InputError: the data cannot be read, or has another range or shape than the model.
    """
    dataset = datasets.load(config, train.seed, report=log.say)
    if dataset.skipped:
        some = "; ".join(dataset.skipped[:3]) + ("; …" if len(dataset.skipped) > 3 else "")
        log.say(f"warning: {len(dataset.skipped)} files could not be read and are left out: {some}")
    model = described if isinstance(described, ModelConfig) else described(dataset.shape, dataset.range)
    model.check()
    if (train.objective == "autoencoder") != (model.posterior == "deterministic"):
        raise InputError(
            f"train: objective {train.objective!r} does not fit a {model.posterior!r} posterior; a plain autoencoder "
            "has both 'autoencoder' and 'deterministic'"
        )
    if model.likelihood == "discretized_logistic":
        dataset = dataset.quantized()
    if config.dequantize and model.likelihood == "bernoulli":
        raise InputError(
            "train: dequantized data is continuous, and a Bernoulli likelihood is of 0s and 1s. Take a Gaussian one"
        )
    if config.binarize != "none" and model.likelihood != "bernoulli":
        raise InputError(
            f"train: binarized data needs likelihood 'bernoulli', got {model.likelihood!r}: a density of 0s and 1s "
            "has no upper limit"
        )
    if dataset.range != model.data_range:
        raise InputError(
            f"train: the model expects data in {list(model.data_range)}; {dataset.name} has {list(dataset.range)}"
        )
    if dataset.shape != model.data_shape:
        raise InputError(
            f"train: the model expects examples of shape {model.data_shape}; {dataset.name} has {dataset.shape}"
        )
    return dataset, model
