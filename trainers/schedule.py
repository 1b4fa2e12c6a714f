"""Learning rate and KL weight of each step, and the optimizer's parameter groups."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from vae_export.trainers.config import TrainConfig


def learning_rate(step: int, warmup: int, total: int) -> float:
    """Learning rate relative to its peak: linear warm-up, at most a tenth of all steps, then half a cosine to 0."""
    warmup = min(warmup, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmed_up(step: int, warmup: int) -> float:
    """Linear warm-up from 0 to 1 over `warmup` steps; 1 if there are none."""
    return min(1.0, step / warmup) if warmup else 1.0


def groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: by weight decay, and by `pace`, a factor of the learning rate.

    Weight decay applies to weights only: there is no reason to pull biases, norms and variances to 0. A learned noise
    variance has a learning rate of 0.01 or more: it is one number for all pixels, and as long as it exceeds the
    squared errors, the latents do not earn their KL and collapse.
    """
    ahead = max(1.0, 0.01 / config.learning_rate)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kind = (config.weight_decay if parameter.ndim > 1 else 0.0, ahead if name == "noise_logvar" else 1.0)
        groups.setdefault(kind, []).append(parameter)
    return [{"params": p, "weight_decay": decay, "pace": pace} for (decay, pace), p in groups.items()]
