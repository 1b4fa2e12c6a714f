"""The evidence lower bound in PyTorch: the training objective, and the reference of every certificate.

The same conventions as `vae_export.numerics.elbo`, written independently of it: nats, one number for each example,
Gaussian constants kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from vae_export.contract.model import Data, Likelihood

Parameters = tuple[Tensor, ...]
LogProb = Callable[[Tensor, Parameters], Tensor]


class Autoencoder(Protocol):
    """Encoder and decoder, all that the objective of an autoencoder needs."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Mean and logvar of q(z|x), (B, *latent) each, for x (B, *data); of a plain autoencoder the mean alone."""
        ...

    def decode(self, z: Tensor) -> Parameters:
        """Parameters of p(x|z), (B, *data) each, for z (B, *latent)."""
        ...


class VAE(Autoencoder, Protocol):
    """What training needs of a model: encoder, decoder and likelihood."""

    def log_prob(self) -> LogProb:
        """Log p(x|z) for each value."""
        ...


class Draws(NamedTuple):
    """K draws z from q(z|x) and the terms of every bound, in nats.

    Attributes:
        log_likelihood: (K · B,) log p(x|z), in the order of `eps`.
        mean: (B, *latent) of q(z|x).
        logvar: (B, *latent) of q(z|x).
        eps: (K, B, *latent) the noise.
        z: (K · B, *latent) mean + exp(½ logvar) · eps.
    """

    log_likelihood: Tensor
    mean: Tensor
    logvar: Tensor
    eps: Tensor
    z: Tensor

    def reconstruction(self) -> Tensor:
        """(K, B) log p(x|z)."""
        return self.log_likelihood.view(self.eps.shape[:2])

    def kl_by_dimension(self) -> Tensor:
        """(B, *latent) KL(q(z|x) || p(z)) in closed form."""
        return kl_terms(self.mean, self.logvar)

    def log_ratio(self) -> Tensor:
        """(K, B) log p(z) − log q(z|x), whose expectation is minus the KL."""
        return 0.5 * (self.logvar + self.eps.square() - self.z.view(self.eps.shape).square()).flatten(2).sum(2)


class Elbo(NamedTuple):
    """Terms of the ELBO at one draw, (B,) each, in nats: the ELBO is reconstruction − kl."""

    reconstruction: Tensor
    kl: Tensor


class Bound(NamedTuple):
    """A lower bound on log p(x) and its terms, in nats; of an autoencoder, minus the squared error.

    Attributes:
        bound: (B,).
        reconstruction: (B,) log p(x|z), averaged over the draws.
        kl: (B,) in closed form for the objective `elbo`, else estimated at the draws.
        kl_by_dimension: (B, D) in closed form, the latents flattened.
    """

    bound: Tensor
    reconstruction: Tensor
    kl: Tensor
    kl_by_dimension: Tensor


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
    """Log-probability of the nearest of 256 levels from low to high under a logistic distribution.

    Kingma et al. 2016; the outermost levels include the tails (Salimans et al. 2017, eq. 2).
    """
    half = (high - low) / 255 / 2

    def log_prob(x: Tensor, parameters: Parameters) -> Tensor:
        _, location, log_scale = parameters
        inverse = torch.exp(-log_scale)
        upper, lower = (x + half - location) * inverse, (x - half - location) * inverse
        # log(σ(u) − σ(l)) = log σ(u) + log σ(−l) + log(1 − e^(l−u)), where l − u is not formed from the two: it cancels
        inside = functional.logsigmoid(upper) + functional.logsigmoid(-lower)
        inside = inside + torch.log(-torch.expm1(-2 * half * inverse))
        tails = torch.where(x < low + half, functional.logsigmoid(upper), functional.logsigmoid(-lower))
        return torch.where((x < low + half) | (x > high - half), tails, inside)

    return log_prob


def log_prob_of(likelihood: Likelihood, data: Data) -> LogProb:
    """Log p(x|z) for each value, for any likelihood of a manifest but `none`."""
    if likelihood.kind == "bernoulli":
        return bernoulli
    if likelihood.kind == "gaussian":
        return gaussian
    if likelihood.kind == "gaussian_fixed" and likelihood.variance is not None:
        return gaussian_fixed(likelihood.variance)
    if likelihood.kind == "discretized_logistic":
        return discretized_logistic(*data.range)
    raise ValueError(f"no log-probability for {likelihood.kind}")


def draw(model: Autoencoder, log_prob: LogProb, x: Tensor, eps: Tensor) -> Draws:
    """Encode, draw z = mean + exp(½ logvar) · eps (Kingma & Welling 2014, section 2.4), decode, and score.

    Args:
        model: encoder and decoder.
        log_prob: log p(x|z) for each value, from `log_prob_of`.
        x: (B, *data).
        eps: (K, B, *latent) standard normal noise, K draws for each example.
    """
    draws = len(eps)
    mean, logvar = (_at_least_float32(t) for t in model.encode(x))
    deviation = torch.exp(0.5 * logvar)
    if draws > 1:
        z = (mean + deviation * eps).flatten(0, 1)  # (K · B, *latent)
        x = x.repeat(draws, *[1] * (x.ndim - 1))
    else:  # no axis to broadcast over: that slows the backward pass
        z = mean + deviation * eps[0]
    parameters = tuple(_at_least_float32(p) for p in model.decode(z))  # (K · B, *data) each
    return Draws(_per_example(log_prob(x, parameters)), mean, logvar, eps, z)


def elbo(model: Autoencoder, log_prob: LogProb, x: Tensor, eps: Tensor) -> Elbo:
    """The ELBO's terms at one draw: Kingma & Welling 2014, eq. 7, with the KL in closed form (appendix B).

    Args:
        model: encoder and decoder.
        log_prob: log p(x|z) for each value, from `log_prob_of`.
        x: (B, *data).
        eps: (B, *latent) standard normal noise.
    """
    drawn = draw(model, log_prob, x, eps[None])
    return Elbo(drawn.log_likelihood, _per_example(drawn.kl_by_dimension()))


class Objective(nn.Module):
    """A model with its bound, as one module to compile, to autocast and to distribute over processes."""

    def __init__(self, model: VAE, kind: str) -> None:
        """Take a model and the kind of its bound.

        Args:
            model: encoder and decoder.
            kind: `TrainConfig.objective`.
        """
        super().__init__()
        self.model = model
        self.kind = kind

    def forward(self, x: Tensor, eps: Tensor) -> Bound:
        """The bound and its terms for x (B, *data) and standard normal eps (K, B, *latent)."""
        if self.kind == "autoencoder":
            (decoded,) = self.model.decode(*self.model.encode(x))
            error = _per_example((_at_least_float32(decoded) - x).square())
            return Bound(-error, -error, torch.zeros_like(error), error.new_zeros(len(x), 0))
        drawn = draw(self.model, self.model.log_prob(), x, eps)
        by_dimension = drawn.kl_by_dimension().flatten(1)
        reconstruction = drawn.log_likelihood if len(eps) == 1 else drawn.reconstruction().mean(0)
        if self.kind == "elbo":
            kl = by_dimension.sum(1)
            return Bound(reconstruction - kl, reconstruction, kl, by_dimension)
        log_ratio = drawn.log_ratio()
        kl = -log_ratio.mean(0)
        bound = reconstruction - kl
        if self.kind == "importance_weighted":  # log 1/K Σ_k p(x, z_k) / q(z_k|x): Burda et al. 2016, eq. 8
            weights = drawn.reconstruction() + log_ratio
            bound = torch.logsumexp(weights, 0) - math.log(len(weights))
        return Bound(bound, reconstruction, kl, by_dimension)


def training_loss(bound: Bound, kind: str, beta: float, free_bits: float, mean_kl: Tensor | None) -> Tensor:
    """Minus the bound of each example, with its KL weighted and partly free, (B,).

    Args:
        bound: of `Objective`.
        kind: `TrainConfig.objective`.
        beta: weight of the KL (Higgins et al. 2017).
        free_bits: KL of each latent dimension, averaged over the batch, that costs nothing, in nats: below it the
            dimension has no gradient (Kingma et al. 2016, eq. 15).
        mean_kl: (D,) that average, over the batches of all processes; None without free bits.
    """
    if kind in ("importance_weighted", "autoencoder"):
        return -bound.bound
    kl = bound.kl
    if mean_kl is not None:
        kl = torch.where(mean_kl > free_bits, bound.kl_by_dimension, free_bits).sum(1)
    return (kl if beta == 1 else beta * kl) - bound.reconstruction


def kl_terms(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, I)) for each latent dimension (Kingma & Welling 2014, appendix B). (B, *latent)."""
    return 0.5 * (mean.square() + (torch.expm1(logvar) - logvar))


def _per_example(terms: Tensor) -> Tensor:
    """(B, …) → (B,): the sum over all but the first axis."""
    return terms.flatten(1).sum(1)


def _at_least_float32(value: Tensor) -> Tensor:
    """Sums over pixels lose too many digits in bfloat16 and float16."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
