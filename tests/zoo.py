"""Small models for the tests, with deterministic weights that need no random stream."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from vae_export.contract.manifest import Origin
from vae_export.contract.model import Data, Latent, LatentDim, Likelihood, Model, Posterior, SizeDim
from vae_export.sources.protocol import Trained
from vae_export.trainers.config import ModelConfig
from vae_export.trainers.models import build

CONFIG = b'{"zoo": true}\n'
ORIGIN = Origin(kind="module", name="zoo")


def fill(module: nn.Module) -> nn.Module:
    """Give every parameter values of a sine over its indices, scaled like a fresh initialization."""
    with torch.no_grad():
        for offset, parameter in enumerate(module.parameters()):
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            phase = torch.arange(parameter.numel(), dtype=torch.float64) * 1.618033988749895 + offset
            parameter.copy_((torch.sin(phase * 12.9898) * math.sqrt(2.0 / max(fan_in, 4))).reshape(parameter.shape))
    return module.eval()


def trainer_model(
    model: str, likelihood: str, shape: tuple[int, int, int] = (1, 8, 8), latent: int = 5, **widths: object
) -> Trained:
    """A model of our trainer."""
    config = ModelConfig(model=model, data_shape=shape, likelihood=likelihood, latent=latent, **widths)
    module = fill(build(config))
    low, high = config.data_range
    return Trained(
        module=module,
        model=Model(
            architecture=model,
            parameters=sum(p.numel() for p in module.parameters()),
            data=Data(shape=shape, range=config.data_range),
            latent=Latent(shape=config.latent_shape),
            prior="standard_normal",
            posterior=Posterior(kind="diagonal_gaussian", logvar_clamp=config.logvar_clamp),
            likelihood=module.likelihood(),
        ),
        origin=ORIGIN,
        config=CONFIG,
        example_shape=shape,
        held_out=low + (high - low) * pictures(300, shape),
        calibration=low + (high - low) * pictures(40, shape),
    )


def pictures(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Smooth patterns in [0, 1]: (count, *shape) float32."""
    grid = np.stack(np.meshgrid(*[np.arange(n) / n for n in shape], indexing="ij")).sum(0)
    phase = np.arange(count).reshape(-1, *[1] * len(shape))
    return (0.5 + 0.5 * np.sin(6.0 * grid * (1 + phase % 5) + phase)).astype(np.float32)


class Spatial(nn.Module):
    """Fully convolutional with latents (C, h, w), in a range that is not [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2.0), nn.Conv2d(4, 8, 3, 1, 1), nn.SiLU(),
            nn.Upsample(scale_factor=2.0), nn.Conv2d(8, 6, 3, 1, 1),
        )  # fmt: skip

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.down(x).chunk(2, dim=1)
        return mean, logvar.clamp(-8.0, 8.0)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        sample, logvar = self.up(z).chunk(2, dim=1)
        return sample, logvar.clamp(-6.0, 4.0)


def spatial(*, named: bool) -> Trained:
    """`Spatial`, of fixed 16 × 24 or of named height and width."""
    height, width = (SizeDim(name="height", multiple_of=4), SizeDim(name="width", multiple_of=4)) if named else (16, 24)
    h, w = (
        (LatentDim(name="height", divided_by=4), LatentDim(name="width", divided_by=4)) if named else (4, 6)
    )  # fmt: skip
    module = fill(Spatial())
    return Trained(
        module=module,
        model=Model(
            architecture="spatial",
            parameters=sum(p.numel() for p in module.parameters()),
            data=Data(shape=(3, height, width), range=(-1.0, 1.0)),
            latent=Latent(shape=(4, h, w)),
            prior="standard_normal",
            posterior=Posterior(kind="diagonal_gaussian", logvar_clamp=(-8.0, 8.0)),
            likelihood=Likelihood(kind="gaussian", logvar_clamp=(-6.0, 4.0)),
        ),
        origin=ORIGIN,
        config=CONFIG,
        example_shape=(3, 16, 24),
    )


class Overflow(nn.Module):
    """Inner values of some 1e5, which float16 cannot represent, and weights behind them that scale them back."""

    def __init__(self) -> None:
        super().__init__()
        self.down = self._layers(1, 4, stride=2)
        self.up = self._layers(2, 2, stride=1)

    @staticmethod
    def _layers(into: int, out: int, stride: int) -> nn.Sequential:
        grow = [nn.Upsample(scale_factor=2.0)] if stride == 1 else []
        return nn.Sequential(
            *grow, nn.Conv2d(into, 6, 3, stride, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, out, 3, 1, 1),
        )  # fmt: skip

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.down(x).chunk(2, dim=1)
        return mean, logvar.clamp(-8.0, 8.0)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        sample, logvar = self.up(z).chunk(2, dim=1)
        return sample, logvar.clamp(-6.0, 4.0)


def overflow() -> Trained:
    """`Overflow`, on pictures of 1 × 8 × 8."""
    module = fill(Overflow())
    with torch.no_grad():
        for layers in (module.down, module.up):
            _, large, small, _ = (layer for layer in layers if isinstance(layer, nn.Conv2d))
            large.weight *= 8e4
            large.bias *= 8e4
            small.weight /= 8e4
    return Trained(
        module=module,
        model=Model(
            architecture="overflow",
            parameters=sum(p.numel() for p in module.parameters()),
            data=Data(shape=(1, 8, 8), range=(0.0, 1.0)),
            latent=Latent(shape=(2, 4, 4)),
            prior="standard_normal",
            posterior=Posterior(kind="diagonal_gaussian", logvar_clamp=(-8.0, 8.0)),
            likelihood=Likelihood(kind="gaussian", logvar_clamp=(-6.0, 4.0)),
        ),
        origin=ORIGIN,
        config=CONFIG,
        example_shape=(1, 8, 8),
        held_out=pictures(300, (1, 8, 8)),
    )


class Plain(nn.Module):
    """A deterministic autoencoder on vectors: no variance, no likelihood, outputs without a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back = nn.Linear(12, 3), nn.Linear(3, 12)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.into(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.back(z)


def plain() -> Trained:
    """`Plain`, on data of shape (12,)."""
    return Trained(
        module=fill(Plain()),
        model=Model(
            architecture="plain",
            parameters=87,
            data=Data(shape=(12,), range=(-2.0, 2.0)),
            latent=Latent(shape=(3,)),
            prior="standard_normal",
            posterior=Posterior(kind="deterministic"),
            likelihood=Likelihood(kind="none"),
        ),
        origin=ORIGIN,
        config=CONFIG,
        example_shape=(12,),
        held_out=pictures(300, (12,)) * 2 - 1,
    )


#: Every kind of model whose export the shared tests cover.
MEMBERS = {
    "mlp-bernoulli": lambda: trainer_model("mlp", "bernoulli", widths=(32,)),
    "mlp-gaussian": lambda: trainer_model("mlp", "gaussian", widths=(16, 8)),
    "conv-bernoulli": lambda: trainer_model("conv", "bernoulli", widths=(8, 16)),
    "conv-gaussian": lambda: trainer_model("conv", "gaussian", shape=(3, 8, 12), widths=(8,)),
    "linear": lambda: trainer_model("linear", "gaussian_fixed", widths=()),
    "resnet": lambda: trainer_model(
        *("resnet", "discretized_logistic", (3, 8, 12)), widths=(8, 16), attention=True, data_range=(-1.0, 1.0)
    ),
    "spatial": lambda: spatial(named=False),
    "spatial-named": lambda: spatial(named=True),
    "plain": plain,
}
