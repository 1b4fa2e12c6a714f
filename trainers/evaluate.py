"""Figures on held-out data: ELBO, importance-weighted bound, bits per dimension, active latents."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import Tensor

from vae_export.numerics import noise
from vae_export.trainers.config import DataConfig, ModelConfig, Result, TrainConfig
from vae_export.trainers.datasets import TEST, VALIDATION, Dataset, Subset
from vae_export.trainers.environment import summed
from vae_export.trainers.models import VAEModel
from vae_export.trainers.objective import draw, elbo, kl_terms

#: The importance-weighted bound is measured on this many test examples at most.
IMPORTANCE_EXAMPLES = 1000
#: A latent dimension is active if its posterior mean has more than this variance (Burda et al. 2016, 4.2).
ACTIVE = 0.01
# Examples, or draws, decoded at once. On a CPU larger batches are slower: their memory is allocated anew each time.
_ROWS_CPU, _ROWS = 64, 1024

P = ParamSpec("P")
R = TypeVar("R")


def _exactly(measure: Callable[P, R]) -> Callable[P, R]:
    """Compute without gradients, and in float32 even where PyTorch would use TF32 on a GPU."""

    @functools.wraps(measure)
    def measured(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return measure(*args, **kwargs)

    return measured


@_exactly
def on_validation(model: VAEModel, fabric: Fabric, data: Subset, config: TrainConfig) -> tuple[float, float, float]:
    """Mean ELBO, reconstruction and KL, in nats; for an autoencoder minus the squared error, the same again, and 0.

    The model is in float32 and in evaluation mode. Each process measures a share of the data.
    """
    total = torch.zeros(3, dtype=torch.float64)
    for x, first in _slices(data, fabric, np.arange(len(data))):
        if model.config.posterior == "deterministic":
            total[0] -= (model.decode(*model.encode(x))[0] - x).cpu().double().square().sum()
        else:
            eps = _noise(model.config, config.seed, first, len(x), VALIDATION).to(x.device)
            terms = elbo(model, model.log_prob(), x, eps)
            total[0] += terms.reconstruction.cpu().double().sum()
            total[1] += terms.kl.cpu().double().sum()
        total[2] += len(x)
    reconstruction, kl, count = summed(fabric, total).tolist()
    return (reconstruction - kl) / count, reconstruction / count, kl / count


@_exactly
def on_test(model: VAEModel, fabric: Fabric, data: Dataset, config: TrainConfig, data_config: DataConfig) -> Result:
    """All figures of a `Result` but `epoch` and `step`, on the test data; arguments as for `on_validation`."""
    test, size = data.test, math.prod(model.config.latent_shape)
    sums = torch.zeros(3, dtype=torch.float64)  # squared error, reconstruction, log-likelihood
    moments = torch.zeros(3, size, dtype=torch.float64)  # of the latents: KL, mean, mean²
    # Evenly spaced, because the first examples may be the easiest.
    bounded = np.arange(0, len(test), -(-len(test) // IMPORTANCE_EXAMPLES))
    variational = model.config.posterior == "diagonal_gaussian"
    for x, first in _slices(test, fabric, np.arange(len(test))):
        mean, *logvar = model.encode(x)
        flat = mean.flatten(1).cpu().double()
        moments[1:] += torch.stack([flat.sum(0), flat.square().sum(0)])
        sums[0] += (model.decode(mean)[0] - x).cpu().double().square().sum()
        if variational:
            moments[0] += kl_terms(mean, *logvar).flatten(1).cpu().double().sum(0)
            eps = _noise(model.config, config.seed, first, len(x), TEST).to(x.device)
            sums[1] += elbo(model, model.log_prob(), x, eps).reconstruction.cpu().double().sum()
    for x, first in _slices(test, fabric, bounded) if variational else ():
        sums[2] += importance_weighted(model, x, config, first).sum()
    error, reconstruction, log_likelihood = summed(fabric, sums).tolist()
    kl, mean, square = summed(fabric, moments) / len(test)
    result = Result(active_units=int((square - mean.square() > ACTIVE).sum()), squared_error=error / len(test))
    if not variational:
        return result
    bound = reconstruction / len(test) - kl.sum().item()
    return msgspec.structs.replace(
        result,
        elbo=bound,
        reconstruction=reconstruction / len(test),
        kl=kl.sum().item(),
        log_likelihood=log_likelihood / len(bounded),
        log_likelihood_examples=len(bounded),
        bits_per_dimension=bits_per_dimension(bound, data, model.config, data_config),
        kl_by_dimension=tuple(kl.tolist()),
    )


@_exactly
def importance_weighted(model: VAEModel, x: Tensor, config: TrainConfig, first: int) -> Tensor:
    """Lower bound log 1/K Σ_k p(x, z_k) / q(z_k|x) on log p(x), which rises with K (Burda et al. 2016, eq. 8).

    Args:
        model: in evaluation mode.
        x: (B, C, H, W) on the model's device.
        config: its `importance_draws` is K, and its seed that of the noise.
        first: index of the noise of the first example.

    Returns:
        (B,) float64 nats on the CPU.
    """
    at_once = max(1, _rows(x.device) // len(x))
    total = torch.full((len(x),), -math.inf, dtype=torch.float64)
    for start in range(0, config.importance_draws, at_once):
        draws = range(start, min(start + at_once, config.importance_draws))
        eps = torch.stack([_noise(model.config, config.seed, first, len(x), TEST + k) for k in draws]).to(x)
        drawn = draw(model, model.log_prob(), x, eps)
        weights = drawn.reconstruction().cpu().double() + drawn.log_ratio().cpu().double()
        total = torch.logaddexp(total, torch.logsumexp(weights, 0))
    return total - math.log(config.importance_draws)


def bits_per_dimension(elbo: float, data: Dataset, model: ModelConfig, config: DataConfig) -> float | None:
    """Upper bound on the code length of each value under this model, in bits: −ELBO / (values · log 2).

    With uniform noise of one level's width added, a density bounds the probability of the discrete data: the level's
    width enters the bound (Theis et al. 2016, eq. 3). None for other continuous data.
    """
    values = math.prod(data.shape)
    if model.likelihood == "discretized_logistic" or (model.likelihood == "bernoulli" and data.levels == 2):
        return -elbo / (values * math.log(2))
    if config.dequantize and data.levels:
        width = (data.range[1] - data.range[0]) / data.levels
        return -(elbo + values * math.log(width)) / (values * math.log(2))
    return None


def warnings(result: Result, model: ModelConfig) -> list[str]:
    """Warnings about a result: posterior collapse, with what to try against it."""
    latents, active = math.prod(model.latent_shape), result.active_units or 0
    if model.posterior == "deterministic" or active > 0.8 * latents:
        return []
    return [
        f"posterior collapse: {latents - active} of {latents} latent dimensions are inactive (their posterior mean "
        f"has a variance of at most {ACTIVE} over the test data). To activate them, try --kl-warmup 20, "
        "--free-bits 0.1, a smaller --beta or a likelihood with less noise; otherwise use a smaller --latent"
    ]


def _slices(data: Subset, fabric: Fabric, rows: npt.NDArray[np.intp]) -> Iterator[tuple[Tensor, int]]:
    """This process's share of some rows, in batches (B, C, H, W), each with the index of its first one in `rows`."""
    at_once = _rows(fabric.device)
    for number, first in enumerate(range(0, len(rows), at_once)):
        if number % fabric.world_size == fabric.global_rank:
            yield torch.from_numpy(data.read(rows[first : first + at_once])).to(fabric.device), first


def _rows(device: torch.device) -> int:
    return _ROWS_CPU if device.type == "cpu" else _ROWS


def _noise(config: ModelConfig, seed: int, first: int, count: int, draw: int) -> Tensor:
    shape = config.latent_shape
    eps = noise.normals(seed, noise.TRAINER, first, count, math.prod(shape), draw)
    return torch.from_numpy(eps).reshape(count, *shape)
