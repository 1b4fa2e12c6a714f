"""The likelihoods p(x|z) in NumPy: log-probability and sampling, one class for each.

Every class reads the decoder's outputs by the names in `model.DECODER_OUTPUTS`, as (B, *data) arrays.
Sums are in float64. The PyTorch counterparts, written independently, are in `trainers/objective.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from vae_export.contract.model import Data, Model
from vae_export.contract.model import Likelihood as Record
from vae_export.errors import InputError
from vae_export.numerics import noise
from vae_export.numerics.elbo import LOG_2PI, Array, Float64

Outputs = Mapping[str, Array]


class Likelihood(Protocol):
    """p(x|z), its parameters given by the decoder's outputs."""

    def log_prob_terms(self, x: Array, outputs: Outputs) -> Float64:
        """Log p(x|z) in nats for each value of x: (B, *data) float64."""
        ...

    def sample(self, outputs: Outputs, seed: int, first: int) -> Array:
        """A draw x ~ p(x|z) for examples first, first + 1, …: (B, *data) float32."""
        ...


class Bernoulli:
    """x in [0, 1] with probability σ(logits) of being 1. For grey values the bound is the usual relaxation."""

    def log_prob_terms(self, x: Array, outputs: Outputs) -> Float64:
        """X · l − log(1 + e^l), in a form that does not overflow for any logit l."""
        logits = np.asarray(outputs["logits"], np.float64)
        return x * logits - np.maximum(logits, 0.0) - np.log1p(np.exp(-np.abs(logits)))

    def sample(self, outputs: Outputs, seed: int, first: int) -> Array:
        """0 or 1."""
        mean = outputs["sample"]
        return (_uniforms(mean, seed, first) < mean).astype(np.float32)


class Gaussian:
    """A mean and a log-variance for every value."""

    def log_prob_terms(self, x: Array, outputs: Outputs) -> Float64:
        """−½ (log 2π + logvar + (x − mean)² / variance)."""
        return _gaussian_terms(x, outputs["sample"], np.asarray(outputs["sample_logvar"], np.float64))

    def sample(self, outputs: Outputs, seed: int, first: int) -> Array:
        """Mean plus deviation times a standard normal draw."""
        return _gaussian_sample(outputs["sample"], _exp(0.5 * outputs["sample_logvar"]), seed, first)


class GaussianFixed:
    """A mean for every value and one variance, from the manifest."""

    def __init__(self, record: Record) -> None:
        assert record.variance is not None  # the manifest's own check
        self._logvar = math.log(record.variance)
        self._deviation = math.sqrt(record.variance)

    def log_prob_terms(self, x: Array, outputs: Outputs) -> Float64:
        """−½ (log 2π + log variance + (x − mean)² / variance)."""
        return _gaussian_terms(x, outputs["sample"], np.float64(self._logvar))

    def sample(self, outputs: Outputs, seed: int, first: int) -> Array:
        """Mean plus deviation times a standard normal draw."""
        return _gaussian_sample(outputs["sample"], np.float32(self._deviation), seed, first)


class DiscretizedLogistic:
    """A logistic distribution, discretized to the 256 levels of 8-bit data that span the data's range.

    Kingma et al. 2016 (inverse autoregressive flow), appendix; the outermost levels take the tails, as in
    Salimans et al. 2017 (PixelCNN++), eq. 2.
    """

    LEVELS = 256

    def __init__(self, data: Data) -> None:
        self._low, self._high = data.range
        self._step = (self._high - self._low) / (self.LEVELS - 1)

    def log_prob_terms(self, x: Array, outputs: Outputs) -> Float64:
        """Log of σ((x + ½ step − location) / scale) − σ((x − ½ step − location) / scale)."""
        centered = np.asarray(x, np.float64) - outputs["location"]
        # Beyond these limits e^x or the product with x would overflow float64.
        inverse = np.exp(-np.clip(np.asarray(outputs["log_scale"], np.float64), -600.0, 600.0))
        upper, lower = (centered + self._step / 2) * inverse, (centered - self._step / 2) * inverse
        # σ(u) − σ(l) = σ(u) σ(−l) (1 − e^(l−u)), which does not cancel.
        width = self._step * inverse
        inside = _log_sigmoid(upper) + _log_sigmoid(-lower) + np.log(-np.expm1(-width))
        at_low, at_high = x < self._low + self._step / 2, x > self._high - self._step / 2
        return np.where(at_low, _log_sigmoid(upper), np.where(at_high, _log_sigmoid(-lower), inside))

    def sample(self, outputs: Outputs, seed: int, first: int) -> Array:
        """The level nearest to location + scale · logit(u), within the range."""
        location = outputs["location"]
        uniform = _uniforms(location, seed, first)
        drawn = location + _exp(outputs["log_scale"]) * (np.log(uniform) - np.log1p(-uniform))
        level = np.clip(np.rint((drawn - self._low) / self._step), 0, self.LEVELS - 1)
        sample: Array = (self._low + level * self._step).astype(np.float32)
        return sample


_KINDS: Mapping[str, Callable[[Record, Data], Likelihood]] = {
    "bernoulli": lambda record, data: Bernoulli(),
    "gaussian": lambda record, data: Gaussian(),
    "gaussian_fixed": lambda record, data: GaussianFixed(record),
    "discretized_logistic": lambda record, data: DiscretizedLogistic(data),
}


def of(model: Model) -> Likelihood:
    """The likelihood of a model.

    Raises:
        InputError: the model has no likelihood.
    """
    if model.likelihood.kind not in _KINDS:
        raise InputError(
            "this model has no likelihood p(x|z), and so neither an ELBO nor samples of p(x|z). "
            "Export it again, with the likelihood that it was trained with, if there is one"
        )
    return _KINDS[model.likelihood.kind](model.likelihood, model.data)


def sigmoid(value: Array) -> Float64:
    """1 / (1 + e^−value), in a form that does not overflow: float64 of the same shape."""
    value = np.asarray(value, np.float64)
    small = np.exp(-np.abs(value))
    result: Float64 = np.where(value >= 0, 1.0, small) / (1.0 + small)
    return result


def _gaussian_terms(x: Array, mean: Array, logvar: Float64 | np.float64) -> Float64:
    error = np.asarray(x, np.float64) - mean
    with np.errstate(over="ignore", invalid="ignore"):  # for a variance below float64's smallest, an error of 0 stays 0
        scaled = np.where(error == 0.0, 0.0, error * error * np.exp(-logvar))
    terms: Float64 = -0.5 * (LOG_2PI + logvar + scaled)
    return terms


def _gaussian_sample(mean: Array, deviation: Array | np.float32, seed: int, first: int) -> Array:
    eps = noise.normals(seed, noise.LIKELIHOOD, first, len(mean), mean[0].size)
    drawn: Array = mean + deviation * eps.reshape(mean.shape)
    return drawn


def _exp(value: Array) -> Array:
    """e^value, infinite on overflow, without a warning."""
    with np.errstate(over="ignore"):
        result: Array = np.exp(value)
    return result


def _uniforms(like: Array, seed: int, first: int) -> Float64:
    return noise.uniforms(seed, noise.LIKELIHOOD, first, len(like), like[0].size).reshape(like.shape)


def _log_sigmoid(value: Float64) -> Float64:
    result: Float64 = np.minimum(value, 0.0) - np.log1p(np.exp(-np.abs(value)))
    return result
