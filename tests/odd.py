"""Unusual configurations of diffusers' autoencoders, drawn with fixed seeds, and modules that can have every fault."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from zoo import CONFIG, ORIGIN, pictures

from vae_export.contract.model import Data, Latent, Likelihood, Model, Posterior
from vae_export.numerics import noise
from vae_export.sources.protocol import Trained

_COUNT = 12
#: Of both log-variances of `Everything`.
CLAMP = (-3.0, 0.5)
Config = dict[str, Any]


def _kl(random: np.random.Generator) -> Config:
    groups, levels = int(random.choice([1, 2, 3, 4, 5, 8])), int(random.integers(1, 4))
    widths = [groups * int(random.integers(1, 4)) * (1 if groups > 2 else 4) for _ in range(levels)]
    quantized = bool(random.integers(2))
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": groups,
        "layers_per_block": int(random.integers(1, 3)),
        "latent_channels": int(random.choice([1, 3, 5, 7, 16])),
        "mid_block_add_attention": bool(random.integers(2)),
        "act_fn": str(random.choice(["silu", "relu", "gelu", "mish"])),
        "use_quant_conv": quantized,
        "use_post_quant_conv": quantized,
    }


def _asymmetric(random: np.random.Generator) -> Config:
    groups, levels = int(random.choice([1, 2, 4, 5])), int(random.integers(2, 4))
    down, up = ([groups * int(random.integers(1, 5)) for _ in range(levels)] for _ in range(2))
    return {
        "_class_name": "AsymmetricAutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "down_block_out_channels": down,
        "layers_per_down_block": int(random.integers(1, 3)),
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "up_block_out_channels": [*up[:-1], down[-1]],
        "layers_per_up_block": int(random.integers(1, 3)),
        "norm_num_groups": groups,
        "latent_channels": int(random.choice([1, 3, 5, 7])),
        "act_fn": str(random.choice(["silu", "relu", "gelu"])),
    }


def _tiny(random: np.random.Generator) -> Config:
    levels, width = int(random.integers(2, 4)), int(random.choice([3, 5, 8, 12, 20]))
    return {
        "_class_name": "AutoencoderTiny",
        "encoder_block_out_channels": [width] * levels,
        "decoder_block_out_channels": [width] * levels,
        "num_encoder_blocks": [int(n) for n in random.integers(1, 4, levels)],
        "num_decoder_blocks": [int(n) for n in random.integers(1, 4, levels)],
        "latent_channels": int(random.choice([1, 3, 5, 16])),
        "act_fn": str(random.choice(["relu", "silu", "gelu"])),
    }


def _dc(random: np.random.Generator) -> Config:
    head, levels = int(random.choice([2, 4, 8])), int(random.integers(2, 4))
    widths = [head * int(random.integers(1, 4))]
    while len(widths) < levels:  # the shortcuts around a change of size take whole multiples
        widths.append(widths[-1] * int(random.integers(1, 3)))
    blocks = ["ResBlock"] * (levels - 1) + [str(random.choice(["ResBlock", "EfficientViTBlock"]))]
    scales: list[list[int]] = [[]] * (levels - 1) + [[[], [3], [5]][random.integers(3)]]
    return {
        "_class_name": "AutoencoderDC",
        "latent_channels": head,
        "attention_head_dim": head,
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": [2 * width for width in widths],
        "decoder_block_out_channels": [2 * width for width in widths],
        "encoder_layers_per_block": [1] * levels,
        "decoder_layers_per_block": [int(n) for n in random.integers(1, 3, levels)],
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "upsample_block_type": str(random.choice(["interpolate", "pixel_shuffle"])),
        "downsample_block_type": str(random.choice(["pixel_unshuffle", "conv"])),
        "decoder_norm_types": str(random.choice(["rms_norm", "batch_norm"])),
        "decoder_act_fns": str(random.choice(["silu", "relu"])),
    }


def _draw() -> dict[str, Config]:
    families = {"kl": _kl, "asymmetric": _asymmetric, "tiny": _tiny, "dc": _dc}
    return {
        f"odd-{name}-{index}": family(np.random.default_rng([number, index]))
        for number, (name, family) in enumerate(families.items())
        for index in range(_COUNT)
    }


#: Twelve of each family, for `zoo_diffusers.model` and `zoo_diffusers.write`.
CONFIGS = _draw()


class _Attention(nn.Module):
    """Softmax attention over the places of a picture of features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.into(x).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        weights = torch.softmax(query @ key.transpose(1, 2) * x.shape[1] ** -0.5, dim=-1)
        result: Tensor = x + self.out((weights @ value).transpose(1, 2).reshape(x.shape))
        return result


class _Norms(nn.Module):
    """Batch norm, which no layer before it can absorb, then group norm; with statistics unlike the initial ones."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.batch, self.group = nn.BatchNorm2d(width), nn.GroupNorm(groups, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.group(self.batch(torch.nn.functional.leaky_relu(x, 0.2)))
        return result


class Everything(nn.Module):
    """A VAE whose encoder and decoder can have every kind of fault.

    Both clamps of log-variances are reached on ordinary data.
    """

    def __init__(self, channels: int, width: int, groups: int, latent: int) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1), _Norms(width, groups), nn.GELU(),
            nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1), nn.ReLU(), _Attention(width),
        )  # fmt: skip
        self.to_latent = nn.Conv2d(width, 2 * latent, 3, stride=2, padding=1)
        self.up = nn.Sequential(
            nn.Conv2d(latent, width, 3, padding=1), _Norms(width, groups), nn.GELU(), _Attention(width),
            nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2), nn.ReLU(),
        )  # fmt: skip
        self.to_data = nn.Conv2d(width, 2 * channels, 3, padding=1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) → mean and log-variance (B, latent, H/4, W/4), the latter in [−3, 0.5]."""
        mean, logvar = (self.to_latent(self.down(x)) * 0.7).chunk(2, dim=1)
        return mean, (3 * logvar - 1).clamp(*CLAMP)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, latent, h, w) → mean and log-variance (B, C, 4h, 4w), the latter in [−3, 0.5]."""
        features = self.up(z)[..., 1:-1, 1:-1]
        mean, logvar = (self.to_data(features) * 0.7).chunk(2, dim=1)
        return mean, (3 * logvar - 1).clamp(*CLAMP)


#: Channels, width, groups of norms, latents, height and width of the data.
EVERYTHING: dict[str, tuple[int, int, int, int, int, int]] = {
    "every-8": (1, 8, 4, 3, 8, 8),
    "every-12": (1, 12, 3, 2, 12, 8),
    "every-10": (3, 10, 5, 4, 8, 12),
    "every-16": (3, 16, 1, 4, 16, 16),
    "every-6": (3, 6, 2, 5, 8, 16),
    "every-20": (1, 20, 4, 1, 16, 8),
}


def everything(name: str) -> Trained:
    """The model of a name in EVERYTHING, with weights and statistics that are the same everywhere.

    Weights are independent (He et al., 2015), so that a fault in an early layer reaches the results.
    """
    channels, width, groups, latent, *size = EVERYTHING[name]
    module = Everything(channels, width, groups, latent).eval()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            values = noise.normals(index, noise.TRAINER, 0, 1, parameter.numel()).reshape(parameter.shape)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.copy_(torch.from_numpy(values) * (2 / fan_in) ** 0.5)
        for child in module.modules():
            if isinstance(child, (nn.BatchNorm2d, nn.GroupNorm)):
                child.weight.add_(1)
            if isinstance(child, nn.BatchNorm2d):
                places = torch.arange(width)
                child.running_mean.copy_(0.2 * torch.sin(places))
                child.running_var.copy_(1 + 0.5 * torch.cos(places))
    shape = (channels, *size)
    return Trained(
        module=module,
        model=Model(
            architecture="everything",
            parameters=sum(p.numel() for p in module.parameters()),
            data=Data(shape=shape, range=(0.0, 1.0)),
            latent=Latent(shape=(latent, *(n // 4 for n in size))),
            prior="standard_normal",
            posterior=Posterior(kind="diagonal_gaussian", logvar_clamp=CLAMP),
            likelihood=Likelihood(kind="gaussian", logvar_clamp=CLAMP),
        ),
        origin=ORIGIN,
        config=CONFIG,
        example_shape=shape,
        held_out=pictures(300, shape),
    )
