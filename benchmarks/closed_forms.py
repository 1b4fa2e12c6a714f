"""What is known exactly of the linear model: probabilistic PCA, and a VAE that is its own (float64 NumPy).

A linear decoder with one noise variance has x ~ N(b, W Wᵀ + σ² I) (Tipping & Bishop 1999, eq. 8), so that the
evidence that a VAE only bounds can be computed.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from vae_export.trainers.models import VAEModel

Floats = npt.NDArray[np.floating]


def ppca_log_likelihood(train: Floats, x: Floats, latent: int) -> Floats:
    """Log p(x) of each of x (N, …) under probabilistic PCA of maximum likelihood on train (M, …), in nats.

    Tipping & Bishop 1999, eqs. 7 and 8: the noise variance is the mean of the eigenvalues that are left out.
    """
    data = train.reshape(len(train), -1).astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(data.T, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    noise = values[latent:].mean()
    principal = vectors[:, :latent]
    covariance = (principal * (values[:latent] - noise)) @ principal.T + noise * np.eye(len(values))
    return _gaussian(x, data.mean(axis=0), covariance)


def exact_evidence(model: VAEModel, x: Floats) -> Floats:
    """Log p(x) of each of x (N, …) under a linear model, in nats."""
    weight, bias, noise = _linear(model)
    return _gaussian(x, bias, weight @ weight.T + noise * np.eye(len(bias)))


def exact_elbo(model: VAEModel, x: Floats) -> Floats:
    """The ELBO of each of x (N, …) with the expectation over q(z|x) in closed form, in nats.

    E_q |x − W z − b|² = |x − W mean − b|² + Σ_j variance_j |w_j|².
    """
    weight, bias, noise = _linear(model)
    flat = x.reshape(len(x), -1).astype(np.float64)
    with torch.no_grad():
        mean, logvar = (t.numpy() for t in model.double().encode(torch.from_numpy(x).double()))
    error = ((flat - mean @ weight.T - bias) ** 2).sum(axis=1) + np.exp(logvar) @ (weight**2).sum(axis=0)
    reconstruction = -0.5 * (flat.shape[1] * math.log(2 * math.pi * noise) + error / noise)
    return reconstruction - 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(axis=1)


def widen(model: VAEModel, factor: float) -> None:
    """Multiply the variance of a linear model's q(z|x)."""
    with torch.no_grad():
        model.encoder[-1].logvar += math.log(factor)


def _linear(model: VAEModel) -> tuple[Floats, Floats, float]:
    layer = model.decoder[0]
    noise = model.likelihood().variance
    assert noise is not None
    return layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy(), noise


def _gaussian(x: Floats, mean: Floats, covariance: Floats) -> Floats:
    error = x.reshape(len(x), -1).astype(np.float64) - mean
    _, determinant = np.linalg.slogdet(covariance)
    distance = (error * np.linalg.solve(covariance, error.T).T).sum(axis=1)
    return -0.5 * (len(mean) * math.log(2 * math.pi) + determinant + distance)
