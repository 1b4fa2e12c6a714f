"""The evidence lower bound and its parts, in NumPy, summed in float64.

Conventions: nats; one number for each example, summed over the example's dimensions; Gaussian constants
kept, so that an ELBO is a true lower bound on log p(x). The approximate posterior is a diagonal Gaussian
q(z|x) = N(mean, exp(logvar)), the prior p(z) = N(0, I).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Float64 = npt.NDArray[np.float64]

LOG_2PI = math.log(2.0 * math.pi)


def per_example(terms: Array) -> Float64:
    """Sum terms (B, …) over all axes but the first: (B,) float64."""
    total: Float64 = terms.reshape(len(terms), -1).sum(axis=1, dtype=np.float64)
    return total


def kl_terms(mean: Array, logvar: Array) -> Float64:
    """KL(q(z|x) || p(z)) for each latent dimension, in closed form: (B, *latent) float64, never negative.

    Kingma & Welling 2014, appendix B: ½ (mean² + exp(logvar) − 1 − logvar).
    """
    mean, logvar = np.asarray(mean, np.float64), np.asarray(logvar, np.float64)
    with np.errstate(over="ignore"):  # a variance above float64's largest has an infinite divergence
        return 0.5 * (mean * mean + (np.expm1(logvar) - logvar))


def kl(mean: Array, logvar: Array) -> Float64:
    """KL(q(z|x) || p(z)) in nats: (B,) float64."""
    return per_example(kl_terms(mean, logvar))


def kl_between_terms(mean_p: Array, logvar_p: Array, mean_q: Array, logvar_q: Array) -> Float64:
    """KL(p || q) between two diagonal Gaussians for each dimension, in nats: (B, *latent) float64."""
    mean_p, mean_q = np.asarray(mean_p, np.float64), np.asarray(mean_q, np.float64)
    log_ratio = np.asarray(logvar_p, np.float64) - np.asarray(logvar_q, np.float64)
    square = (mean_p - mean_q) ** 2
    with np.errstate(over="ignore", invalid="ignore"):  # below float64's smallest variance, equal means stay equal
        moved = np.where(square == 0.0, 0.0, square * np.exp(-np.asarray(logvar_q, np.float64)))
        terms: Float64 = 0.5 * (np.expm1(log_ratio) - log_ratio + moved)
    return terms


def log_prior(z: Array) -> Float64:
    """Log p(z) under the standard normal prior: (B,) float64."""
    z = np.asarray(z, np.float64)
    return per_example(-0.5 * (LOG_2PI + z * z))


def log_posterior(eps: Array, logvar: Array) -> Float64:
    """Log q(z|x) at z = mean + exp(½ logvar) · eps: (B,) float64. Shapes (B, *latent)."""
    eps = np.asarray(eps, np.float64)
    return per_example(-0.5 * (LOG_2PI + np.asarray(logvar, np.float64) + eps * eps))


def monte_carlo_elbo(log_likelihood: Array, z: Array, eps: Array, logvar: Array) -> Float64:
    """The three-term form log p(x|z) + log p(z) − log q(z|x) at one draw: (B,) float64.

    Kingma & Welling 2014, the first estimator (eq. 6). Its expectation over eps is the ELBO. As log-weights
    of `importance_weighted_bound`, K draws of it bound log p(x).
    """
    return np.asarray(log_likelihood, np.float64) + log_prior(z) - log_posterior(eps, logvar)


def importance_weighted_bound(log_weights: Array) -> Float64:
    """Log (1/K Σ_k w_k) from log-weights (K, B): (B,) float64. Burda et al. 2016, eq. 8."""
    weights = np.asarray(log_weights, np.float64)
    top = np.maximum(weights.max(axis=0), np.finfo(np.float64).min)  # finite where all weights are 0
    with np.errstate(divide="ignore"):
        bound: Float64 = top + np.log(np.exp(weights - top).mean(axis=0))
    return bound
