"""Train a VAE. One loop, to be read from top to bottom."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vae_export import noise
from vae_export.errors import BackendError, InputError
from vae_export.manifest import Data, Likelihood

from . import checkpoint, data, models
from .config import CheckpointConfig, ModelConfig, Result, TrainConfig
from .objective import Elbo, log_prob_of, terms

# Indices of noise beyond those of any training step: of the evaluation, and of the epochs' orders.
_EVALUATION = 1 << 63
_ORDER = 1 << 62


def fit(out: Path, model_config: ModelConfig, config: TrainConfig, *, overwrite: bool = False) -> Result:
    """Train a model and write its checkpoint.

    Args:
        out: the checkpoint's folder.
        model_config: what to train.
        config: how.
        overwrite: replace a checkpoint that is there.

    Returns:
        The held-out ELBO and its terms.

    Raises:
        InputError: the configuration or the data does not fit, `out` exists, or the loss became NaN.
        BackendError: the device is not there.
    """
    config.check()
    model_config.check()
    checkpoint.check_target(out, overwrite=overwrite)
    dataset = data.load(config.data, config.seed)
    if dataset.range != model_config.data_range:
        raise InputError(
            f"train: the model expects data in {list(model_config.data_range)}; {dataset.name} has "
            f"{list(dataset.range)}"
        )
    if dataset.train.shape[1:] != model_config.data_shape:
        raise InputError(
            f"train: the model expects examples of shape {model_config.data_shape}; {dataset.name} has "
            f"{dataset.train.shape[1:]}"
        )

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*AMP with fp16 is not supported.*")  # it would take bf16
            fabric = Fabric(accelerator=config.device, devices=1, precision=config.precision)
    except (RuntimeError, ValueError, Warning) as error:
        raise BackendError(
            f"train: device {config.device!r} with precision {config.precision!r} is not available here: {error}"
        ) from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        plain = models.build(model_config)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    model, optimizer = fabric.setup(plain, optimizer)
    log_prob = log_prob_of(
        Likelihood(kind=model_config.likelihood), Data(shape=model_config.data_shape, range=model_config.data_range)
    )

    steps_per_epoch = math.ceil(len(dataset.train) / config.batch_size)
    total = config.epochs * steps_per_epoch
    warmup = min(100, max(1, total // 10))
    step = seen = 0
    with _progress() as progress:
        task = progress.add_task("training", total=total, elbo="…", kl="…")
        for epoch in range(config.epochs):
            for x in _batches(dataset.train, config, epoch):
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * _schedule(step, warmup, total)
                x = fabric.to_device(x)  # (B, C, H, W)
                eps = _noise(config.seed, seen, len(x), model_config.latent).to(x.device)  # (B, latent)
                elbo = terms(log_prob, x, model(x, eps))
                loss = (elbo.kl - elbo.reconstruction).mean()  # −ELBO, nats for each example
                optimizer.zero_grad(set_to_none=True)
                fabric.backward(loss)
                norm = fabric.clip_gradients(model, optimizer, max_norm=config.gradient_clip, error_if_nonfinite=False)
                _check_finite("loss", loss, step, epoch)
                if config.precision != "16-mixed":  # whose gradient scaler skips a step that overflows
                    _check_finite("gradient's norm", norm, step, epoch)
                optimizer.step()
                step += 1
                seen += len(x)
                progress.update(task, advance=1, elbo=f"{-loss.item():.1f}", kl=f"{elbo.kl.mean().item():.1f}")

    plain.eval()
    held_out = torch.from_numpy(dataset.held_out)
    with torch.no_grad():
        eps = _noise(config.seed, _EVALUATION, len(held_out), model_config.latent)
        slices = [slice(i, i + config.batch_size) for i in range(0, len(held_out), config.batch_size)]
        pieces = [(fabric.to_device(held_out[s]), fabric.to_device(eps[s])) for s in slices]
        parts = [terms(log_prob, x, model(x, e)) for x, e in pieces]
    elbo = Elbo(*(torch.cat(column).double() for column in zip(*parts, strict=True)))
    result = Result(
        elbo=(elbo.reconstruction - elbo.kl).mean().item(),
        reconstruction=elbo.reconstruction.mean().item(),
        kl=elbo.kl.mean().item(),
    )
    _check_finite("held-out loss", elbo.kl - elbo.reconstruction, step, epoch)
    checkpoint.write(out, CheckpointConfig(model=model_config, train=config, result=result), plain, overwrite=overwrite)
    return result


def _check_finite(what: str, value: torch.Tensor | None, step: int, epoch: int) -> None:
    if value is not None and not torch.isfinite(value).all():
        raise InputError(
            f"train: the {what} became {value.sum().item()} at step {step} (epoch {epoch + 1}). "
            "Lower the learning rate, or use --precision 32-true"
        )


def _schedule(step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate: a linear rise, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _batches(train: npt.NDArray[np.float32], config: TrainConfig, epoch: int) -> Iterator[torch.Tensor]:
    order = noise.permutation(config.seed, noise.TRAINER, _ORDER + epoch, len(train))
    for first in range(0, len(train), config.batch_size):
        yield torch.from_numpy(train[order[first : first + config.batch_size]])


def _noise(seed: int, first: int, count: int, size: int) -> torch.Tensor:
    return torch.from_numpy(noise.normals(seed, noise.TRAINER, first, count, size))


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ELBO {task.fields[elbo]} nats, KL {task.fields[kl]}"),
        TimeRemainingColumn(),
    )
