"""The evidence lower bound in PyTorch: the training objective, and the reference of every certificate.

The same conventions as `vae_export.elbo`, written independently of it: nats, one number for each example,
Gaussian constants kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from vae_export.manifest import Data, Likelihood

Parameters = tuple[Tensor, ...]
LogProb = Callable[[Tensor, Parameters], Tensor]
Outputs = tuple[Tensor, Tensor, Parameters]


class Autoencoder(Protocol):
    """What the objective needs of a model."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X (B, *data) → mean and logvar, (B, *latent) each."""
        ...

    def decode(self, z: Tensor) -> Parameters:
        """Z (B, *latent) → the parameters of p(x|z), (B, *data) each."""
        ...


class Elbo(NamedTuple):
    """One draw's terms, (B,) nats: the ELBO is reconstruction − kl."""

    reconstruction: Tensor
    kl: Tensor


def bernoulli(x: Tensor, parameters: Parameters) -> Tensor:
    """Log p(x|z) for each value: minus the binary cross-entropy of the logits. (B, *data)."""
    _, logits = parameters
    return -functional.binary_cross_entropy_with_logits(logits, x, reduction="none")


def gaussian(x: Tensor, parameters: Parameters) -> Tensor:
    """Log N(x; sample, exp(sample_logvar)) for each value. (B, *data)."""
    sample, logvar = parameters
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - sample).square() * torch.exp(-logvar))


def gaussian_fixed(variance: float) -> LogProb:
    """Log N(x; sample, variance) for each value, as a function of x and the parameters."""

    def log_prob(x: Tensor, parameters: Parameters) -> Tensor:
        (sample,) = parameters
        return -0.5 * (math.log(2 * math.pi * variance) + (x - sample).square() / variance)

    return log_prob


def discretized_logistic(low: float, high: float) -> LogProb:
    """log-probability of the nearest of 256 levels from low to high under a logistic distribution.

    Kingma et al. 2016; the outermost levels take the tails (Salimans et al. 2017, eq. 2).
    """
    half = (high - low) / 255 / 2

    def log_prob(x: Tensor, parameters: Parameters) -> Tensor:
        _, location, log_scale = parameters
        upper = (x + half - location) * torch.exp(-log_scale)
        lower = (x - half - location) * torch.exp(-log_scale)
        # log(σ(u) − σ(l)) = log σ(u) + log σ(−l) + log(1 − e^(l−u))
        inside = functional.logsigmoid(upper) + functional.logsigmoid(-lower)
        inside = inside + torch.log(-torch.expm1(lower - upper))
        tails = torch.where(x < low + half, functional.logsigmoid(upper), functional.logsigmoid(-lower))
        return torch.where((x < low + half) | (x > high - half), tails, inside)

    return log_prob


def log_prob_of(likelihood: Likelihood, data: Data) -> LogProb:
    """Log p(x|z) for each value, for the likelihood that a manifest names. Not for `none`."""
    if likelihood.kind == "bernoulli":
        return bernoulli
    if likelihood.kind == "gaussian":
        return gaussian
    if likelihood.kind == "gaussian_fixed" and likelihood.variance is not None:
        return gaussian_fixed(likelihood.variance)
    if likelihood.kind == "discretized_logistic":
        return discretized_logistic(*data.range)
    raise ValueError(f"no log-probability for {likelihood.kind}")


def run(model: Autoencoder, x: Tensor, eps: Tensor) -> Outputs:
    """Encode, draw z = mean + exp(½ logvar) · eps (Kingma & Welling 2014, section 2.4), and decode.

    Args:
        model: encoder and decoder.
        x: (B, *data).
        eps: (B, *latent) standard normal noise.

    Returns:
        mean and logvar, (B, *latent) each, and the parameters of p(x|z), (B, *data) each.
    """
    mean, logvar = model.encode(x)
    return mean, logvar, model.decode(mean + torch.exp(0.5 * logvar) * eps)


def terms(log_prob: LogProb, x: Tensor, outputs: Outputs) -> Elbo:
    """The ELBO's terms: Kingma & Welling 2014, eq. 7, with the KL in closed form (appendix B).

    Args:
        log_prob: log p(x|z) for each value, from `log_prob_of`.
        x: (B, *data).
        outputs: of `run`.
    """
    mean, logvar, parameters = outputs
    return Elbo(log_prob(x, parameters).flatten(1).sum(1), kl_terms(mean, logvar).flatten(1).sum(1))


def elbo(model: Autoencoder, log_prob: LogProb, x: Tensor, eps: Tensor) -> Elbo:
    """The ELBO's terms of a model at one draw; arguments as for `run` and `terms`."""
    return terms(log_prob, x, run(model, x, eps))


def kl_terms(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, I)) for each latent dimension (Kingma & Welling 2014, appendix B). (B, *latent)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
