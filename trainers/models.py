"""The models: an encoder to a diagonal Gaussian and a decoder to p(x|z), each a few dozen lines.

All have `encode(x) -> (mean, logvar)` and `decode(z) -> parameters of p(x|z)`, in the order of
`manifest.DECODER_OUTPUTS`, and no randomness: the draw from the posterior is the objective's.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .objective import Outputs, run


class VAEModel(nn.Module):
    """Two trunks and what turns their outputs into distributions."""

    def __init__(self, config: ModelConfig, encoder: nn.Module, decoder: nn.Module) -> None:
        """Join the trunks.

        Args:
            config: the model's description.
            encoder: (B, C, H, W) → (B, 2 · latent).
            decoder: (B, latent) → (B, channels(config), H, W).
        """
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """X (B, C, H, W) → mean and logvar of q(z|x), (B, latent) each."""
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar.clamp(*self.config.logvar_clamp)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Z (B, latent) → (sample, logits) or (sample, sample_logvar), (B, C, H, W) each."""
        out = self.decoder(z)
        if self.config.likelihood == "bernoulli":
            return torch.sigmoid(out), out
        sample, logvar = out.chunk(2, dim=1)
        return sample, logvar.clamp(*self.config.sample_logvar_clamp)

    def forward(self, x: Tensor, eps: Tensor) -> Outputs:
        """Encode, draw with the noise eps (B, latent), decode: see `objective.run`. For training."""
        return run(self, x, eps)


def build(config: ModelConfig) -> VAEModel:
    """Make a model with fresh weights from PyTorch's random state.

    Raises:
        InputError: the configuration is not a model (`ModelConfig.check`).
    """
    config.check()
    return _MODELS[config.model](config)


def channels(config: ModelConfig) -> int:
    """The decoder's output channels: one for each of x's, or a mean and a log-variance for each."""
    return config.data_shape[0] * (2 if config.likelihood == "gaussian" else 1)


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
        nn.Sequential(nn.Flatten(), *hidden, nn.Linear(into[-1], 2 * config.latent)),
        nn.Sequential(*unhidden, nn.Linear(back[-1], out * height * width), nn.Unflatten(1, (out, height, width))),
    )


def conv(config: ModelConfig) -> VAEModel:
    """Strided 3×3 convolutions down; nearest-neighbour upsampling and 3×3 convolutions up."""
    depth = len(config.widths)
    colours, height, width = config.data_shape
    height, width = height >> depth, width >> depth
    down = [colours, *config.widths]
    up = [*reversed(config.widths), config.widths[0]]
    features = config.widths[-1] * height * width
    return VAEModel(
        config,
        nn.Sequential(
            *[layer for a, b in pairwise(down) for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.SiLU())],
            nn.Flatten(),  # (B, features)
            nn.Linear(features, 2 * config.latent),
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


_MODELS = {"mlp": mlp, "conv": conv}
