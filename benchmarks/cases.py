"""What is timed, as data."""

from __future__ import annotations

from typing import Any

from vae_export import bench

#: By name: the options of `zoo.trainer_model`. The weights do not matter for speed; the zoo's need no training.
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"model": "mlp", "likelihood": "bernoulli", "shape": (1, 28, 28), "latent": 20, "widths": (512,)},
    "conv": {"model": "conv", "likelihood": "bernoulli", "shape": (1, 28, 28), "latent": 20, "widths": (32, 64)},
}
BATCHES = (1, 8, 64)
RUNTIMES = (bench.Eager.name, bench.Bare.name, bench.Ours.name)
