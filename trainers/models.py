"""The models: an encoder to q(z|x) and a decoder to p(x|z).

All have `encode(x) -> (mean, logvar)`, or `(mean,)` for a plain autoencoder, and `decode(z) -> parameters of p(x|z)` in
the order of `contract.model.DECODER_OUTPUTS`. They have no randomness: the objective draws from the posterior.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from vae_export.contract.model import Data, Likelihood
from vae_export.trainers.config import ModelConfig
from vae_export.trainers.objective import LogProb, Parameters, gaussian, log_prob_of


class VAEModel(nn.Module):
    """An encoder and a decoder network with their distributions."""

    def __init__(self, config: ModelConfig, encoder: nn.Module, decoder: nn.Module) -> None:
        """Take the networks.

        Args:
            config: of the model.
            encoder: (B, C, H, W) → (B, posterior_channels(config) · latent, …).
            decoder: (B, *latent) → (B, channels(config), H, W).
        """
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = decoder
        if config.likelihood == "gaussian_fixed" and config.variance is None:
            self.noise_logvar = nn.Parameter(torch.tensor(2 * math.log(config.width)))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Mean and logvar of q(z|x), (B, *latent) each, or the mean alone, for x (B, C, H, W)."""
        out: Tensor = self.encoder(x)
        if self.config.posterior == "deterministic":
            return (out,)
        mean, logvar = out.chunk(2, dim=1)
        return mean, logvar.clamp(*self.config.logvar_clamp)

    def decode(self, z: Tensor) -> Parameters:
        """Parameters of p(x|z), (B, C, H, W) each, for z (B, *latent)."""
        out: Tensor = self.decoder(z)
        if self.config.likelihood == "bernoulli":
            return torch.sigmoid(out), out
        if self.config.likelihood == "gaussian":
            sample, logvar = out.chunk(2, dim=1)
            return sample, logvar.clamp(*self.config.sample_logvar_limits)
        if self.config.likelihood == "discretized_logistic":
            location, log_scale = out.chunk(2, dim=1)
            log_scale = log_scale.clamp(*self.config.log_scale_limits)
            return _clipped_mean(location, log_scale, *self.config.data_range), location, log_scale
        return (out,)

    def likelihood(self) -> Likelihood:
        """The likelihood as a manifest records it, with the current value of a learned variance."""
        kind, variance = self.config.likelihood, self.config.variance
        if kind == "gaussian_fixed" and variance is None:
            variance = math.exp(self._noise_logvar().item())
        return Likelihood(
            kind=kind,
            variance=variance,
            logvar_clamp=self.config.sample_logvar_limits if kind == "gaussian" else None,
            log_scale_clamp=self.config.log_scale_limits if kind == "discretized_logistic" else None,
        )

    def log_prob(self) -> LogProb:
        """Log p(x|z) for each value, differentiable with respect to a learned variance; not for likelihood `none`."""
        if self.config.likelihood == "gaussian_fixed" and self.config.variance is None:
            logvar = self._noise_logvar()
            return lambda x, parameters: gaussian(x, (*parameters, logvar))
        return log_prob_of(self.likelihood(), Data(shape=self.config.data_shape, range=self.config.data_range))

    def _noise_logvar(self) -> Tensor:
        """Log-variance with a smooth floor, below which there is still a gradient."""
        floor = self.config.noise_logvar_floor
        return floor + functional.softplus(self.noise_logvar - floor)


def build(config: ModelConfig) -> VAEModel:
    """Build a model with initial weights drawn from PyTorch's random state.

    Raises:
        InputError: the configuration is not valid (`ModelConfig.check`).
    """
    config.check()
    return _MODELS[config.model](config)


def channels(config: ModelConfig) -> int:
    """Number of the decoder's output channels: for each channel of x one, or two for likelihoods of two parameters."""
    return config.data_shape[0] * (2 if config.likelihood in ("gaussian", "discretized_logistic") else 1)


def posterior_channels(config: ModelConfig) -> int:
    """Number of the encoder's outputs for each latent dimension: mean and log-variance, or the mean alone."""
    return 1 if config.posterior == "deterministic" else 2


class _LogVariance(nn.Module):
    """(B, D) means → (B, 2 D): appends a learned log-variance for each dimension, the same for all x."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros(latent))

    def forward(self, mean: Tensor) -> Tensor:
        return torch.cat([mean, self.logvar.expand_as(mean)], dim=1)


def linear(config: ModelConfig) -> VAEModel:
    """Linear encoder and decoder with one noise variance: probabilistic PCA as a VAE (Lucas et al. 2019, section 4).

    The exact posterior's covariance does not depend on x, so neither does the encoder's.
    """
    size = math.prod(config.data_shape)
    logvar = [_LogVariance(config.latent)] if config.posterior == "diagonal_gaussian" else []
    return VAEModel(
        config,
        nn.Sequential(nn.Flatten(), nn.Linear(size, config.latent), *logvar),
        nn.Sequential(nn.Linear(config.latent, size), nn.Unflatten(1, config.data_shape)),
    )


def mlp(config: ModelConfig) -> VAEModel:
    """Fully connected with tanh (Kingma & Welling 2014, appendix C)."""
    _, height, width = config.data_shape
    into = [math.prod(config.data_shape), *config.widths]
    back = [config.latent, *reversed(config.widths)]
    hidden = [layer for a, b in pairwise(into) for layer in (nn.Linear(a, b), nn.Tanh())]
    unhidden = [layer for a, b in pairwise(back) for layer in (nn.Linear(a, b), nn.Tanh())]
    out = channels(config)
    return VAEModel(
        config,
        nn.Sequential(nn.Flatten(), *hidden, nn.Linear(into[-1], posterior_channels(config) * config.latent)),
        nn.Sequential(*unhidden, nn.Linear(back[-1], out * height * width), nn.Unflatten(1, (out, height, width))),
    )


def conv(config: ModelConfig) -> VAEModel:
    """Strided 3×3 convolutions down; nearest-neighbour upsampling and 3×3 convolutions up."""
    colours, height, width = config.data_shape
    height, width = height >> config.halvings, width >> config.halvings
    down = [colours, *config.widths]
    up = [*reversed(config.widths), config.widths[0]]
    features = config.widths[-1] * height * width
    return VAEModel(
        config,
        nn.Sequential(
            *[layer for a, b in pairwise(down) for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.SiLU())],
            nn.Flatten(),  # (B, features)
            nn.Linear(features, posterior_channels(config) * config.latent),
        ),
        nn.Sequential(
            nn.Linear(config.latent, features),
            nn.Unflatten(1, (config.widths[-1], height, width)),
            nn.SiLU(),
            *[
                layer
                for a, b in pairwise(up)
                for layer in (nn.Upsample(scale_factor=2.0), nn.Conv2d(a, b, 3, 1, 1), nn.SiLU())
            ],
            nn.Conv2d(up[-1], channels(config), 3, 1, 1),
        ),
    )


def resnet(config: ModelConfig) -> VAEModel:
    """Residual blocks with spatial latents: the shape of latent-diffusion autoencoders (Rombach et al. 2022)."""
    widths, blocks = config.widths, config.blocks
    top = widths[-1]

    def middle() -> list[nn.Module]:
        return [_Block(top, top), *([_Attention(top)] if config.attention else []), _Block(top, top)]

    def level(a: int, b: int) -> list[nn.Module]:
        return [_Block(a if i == 0 else b, b) for i in range(blocks)]

    down: list[nn.Module] = [nn.Conv2d(config.data_shape[0], widths[0], 3, 1, 1), *level(widths[0], widths[0])]
    for a, b in pairwise(widths):
        down += [nn.Conv2d(a, a, 3, 2, 1), *level(a, b)]
    up: list[nn.Module] = [nn.Conv2d(config.latent, top, 3, 1, 1), *middle(), *level(top, top)]
    for a, b in pairwise(reversed(widths)):
        up += [nn.Upsample(scale_factor=2.0), nn.Conv2d(a, a, 3, 1, 1), *level(a, b)]
    ends = [
        [_norm(top), nn.SiLU(), nn.Conv2d(top, posterior_channels(config) * config.latent, 3, 1, 1)],
        [_norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], channels(config), 3, 1, 1)],
    ]
    return VAEModel(config, nn.Sequential(*down, *middle(), *ends[0]), nn.Sequential(*up, *ends[1]))


class _Block(nn.Module):
    """(B, a, H, W) → (B, b, H, W): two normalized 3×3 convolutions with a shortcut (He et al. 2016)."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _norm(a), nn.SiLU(), nn.Conv2d(a, b, 3, 1, 1), _norm(b), nn.SiLU(), nn.Conv2d(b, b, 3, 1, 1)
        )
        self.shortcut = nn.Identity() if a == b else nn.Conv2d(a, b, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.shortcut(x) + self.body(x)
        return result


class _Attention(nn.Module):
    """(B, C, H, W) → the same: self-attention over all positions with one head and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=3)  # (B, 1, H·W, C)
        attended = functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = x + self.out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))
        return result


def _norm(width: int) -> nn.GroupNorm:
    """Group norm over at most 8 groups of 4 channels or more (Wu & He 2018).

    A group of one channel has no variance where a picture has a constant value, and dividing by it amplifies rounding.
    """
    groups = next(n for n in (8, 4, 2, 1) if n == 1 or (width % n == 0 and width // n >= 4))
    return nn.GroupNorm(groups, width)


def _clipped_mean(location: Tensor, log_scale: Tensor, low: float, high: float) -> Tensor:
    """The mean of a logistic distribution whose tails lie at low and high: ∫ σ((location − t) / scale) dt + low.

    The discretized logistic's mean is the midpoint sum of this integral over its 255 steps; the two differ by less
    than 0.1 levels from a scale of a third of a level on, and by half a level for a scale of 0.
    """
    scale = torch.exp(log_scale)
    above = functional.softplus((location - low) / scale) - functional.softplus((location - high) / scale)
    return low + scale * above


_MODELS = {"linear": linear, "mlp": mlp, "conv": conv, "resnet": resnet}
