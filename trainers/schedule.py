"""What the optimizer is told: learning rate and KL weight of each step, and what it does to which parameter."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from vae_export.trainers.config import TrainConfig


def learning_rate(step: int, warmup: int, total: int) -> float:
    """Share of the peak: a linear rise over `warmup` steps, a tenth of all at most, then half a cosine to 0."""
    warmup = min(warmup, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmed_up(step: int, warmup: int) -> float:
    """A rise from 0 to 1 over `warmup` steps; 1 where there are none."""
    return min(1.0, step / warmup) if warmup else 1.0


def groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameters by what the optimizer does to them.

    Weight decay is for weights: pulling biases, norms and variances to 0 is no prior that anybody holds. A
    learned noise variance is one number on which all pixels agree, and until it has come down to the size of
    the errors, the latents are not worth their KL and collapse: so it goes ahead, at 0.01 or more for each step.
    """
    ahead = max(1.0, 0.01 / config.learning_rate)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kind = (config.weight_decay if parameter.ndim > 1 else 0.0, ahead if name == "noise_logvar" else 1.0)
        groups.setdefault(kind, []).append(parameter)
    return [{"params": p, "weight_decay": decay, "pace": pace} for (decay, pace), p in groups.items()]
