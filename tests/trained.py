"""Published, trained autoencoders: their architectures, and data to try them on.

The weights are in `../shared/trained` beside the repository, or in the folder that `VAE_EXPORT_TRAINED` names. They are
no part of the project: whoever needs them asks `missing` first.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from vae_export import Source, sources
from vae_export.numerics import noise
from vae_export.sources.protocol import Trained

Pictures = npt.NDArray[np.float32]

_ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("VAE_EXPORT_TRAINED", _ROOT.parent / "shared" / "trained"))

#: What each of the VAEs of YannDubs/disentangling-vae was trained on.
VAES = {
    "VAE_mnist": "digits",
    "btcvae_dsprites": "sprites",
    "betaB_dsprites": "sprites",
    "betaH_chairs": "chairs",
    "btcvae_celeba": "faces",
    "betaB_celeba": "faces",
    "btcvae_celeba_a-5": "faces",
}
NAMES = (*VAES, "taef2")
_LATENT = 10
_DRAWS = 256


def missing() -> str | None:
    """Why there are no weights here, in words, or None."""
    if (FOLDER / "VAE_mnist.safetensors").is_file():
        return None
    return f"no trained weights in {FOLDER}; name their folder in VAE_EXPORT_TRAINED"


def load(name: str, side: int = 64) -> Trained:
    """A trained autoencoder with data that it was not trained on.

    Args:
        name: one of NAMES.
        side: the height and width of the photographs' parts for `taef2`, a multiple of 8; the others have their own.
    """
    if name == "taef2":
        held_out, calibration = photographs(side)
        described: dict[str, Any] = {"likelihood": "none", "multiple_of": 8}
        module: nn.Module = taef2()
    else:
        module = disentangled(name)
        held_out, calibration = DATA[VAES[name]](module)
        described = {"likelihood": "bernoulli", "outputs": "logits"}
    source = Source(module, held_out[:4], data_range=(0, 1), held_out=held_out, name=name, **described)
    return dataclasses.replace(sources.resolve(source), calibration=calibration)


class _Encoder(nn.Module):
    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 4, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 4, stride=2, padding=1)
        self.conv_64 = nn.Conv2d(32, 32, 4, stride=2, padding=1) if side == 64 else None
        self.lin1, self.lin2 = nn.Linear(512, 256), nn.Linear(256, 256)
        self.mu_logvar_gen = nn.Linear(256, 2 * _LATENT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in (self.conv1, self.conv2, self.conv3, self.conv_64):
            x = x if layer is None else torch.relu(layer(x))
        x = torch.relu(self.lin2(torch.relu(self.lin1(x.flatten(1)))))
        mean, logvar = self.mu_logvar_gen(x).view(-1, _LATENT, 2).unbind(-1)
        return mean, logvar


class _Decoder(nn.Module):
    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.lin1, self.lin2, self.lin3 = nn.Linear(_LATENT, 256), nn.Linear(256, 256), nn.Linear(256, 512)
        self.convT_64 = nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1) if side == 64 else None
        self.convT1 = nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1)
        self.convT2 = nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1)
        self.convT3 = nn.ConvTranspose2d(32, channels, 4, stride=2, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        for layer in (self.lin1, self.lin2, self.lin3):
            z = torch.relu(layer(z))
        z = z.view(-1, 32, 4, 4)
        for layer in (self.convT_64, self.convT1, self.convT2):
            z = z if layer is None else torch.relu(layer(z))
        logits: Tensor = self.convT3(z)
        return logits


class Disentangled(nn.Module):
    """A VAE of YannDubs/disentangling-vae; its decoder is left without the sigmoid, as logits are what scores need."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.shape = (channels, side, side)
        self.encoder, self.decoder = _Encoder(channels, side), _Decoder(channels, side)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, side, side) in [0, 1] → mean and log-variance, (B, 10) each."""
        mean, logvar = self.encoder(x)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        """(B, 10) → logits (B, C, side, side)."""
        logits: Tensor = self.decoder(z)
        return logits


def disentangled(name: str) -> Disentangled:
    """One of VAES, with its weights."""
    state = safetensors.torch.load_file(FOLDER / f"{name}.safetensors")
    module = Disentangled(state["decoder.convT3.bias"].numel(), 64 if "encoder.conv_64.bias" in state else 32)
    module.load_state_dict(state, strict=True)
    return module.eval()


class _Block(nn.Module):
    def __init__(self, channels: int, *, pool: bool = False) -> None:
        super().__init__()
        self.pool = None
        if pool:
            self.pool = nn.Sequential(
                nn.Conv2d(channels, 4 * channels, 1, bias=False), nn.GroupNorm(4, 4 * channels), nn.ReLU(),
                nn.Conv2d(4 * channels, channels, 1, bias=False),
            )  # fmt: skip
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class _Clamp(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z / 3) * 3


class Taef2(nn.Module):
    """The tiny autoencoder for FLUX.2 of madebyollin/taesd."""

    def __init__(self) -> None:
        super().__init__()
        n = 64

        def halve() -> nn.Module:
            return nn.Conv2d(n, n, 3, stride=2, padding=1, bias=False)

        def double() -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), nn.Conv2d(n, n, 3, padding=1, bias=False)]

        def blocks(count: int = 3, *, pool: bool = False) -> list[nn.Module]:
            return [_Block(n, pool=pool) for _ in range(count)]

        self.encoder = nn.Sequential(
            nn.Conv2d(3, n, 3, padding=1), *blocks(1), halve(), *blocks(), halve(), *blocks(), halve(),
            *blocks(pool=True), nn.Conv2d(n, 32, 3, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            _Clamp(), nn.Conv2d(32, n, 3, padding=1), nn.ReLU(), *blocks(pool=True), *double(), *blocks(), *double(),
            *blocks(), *double(), *blocks(1), nn.Conv2d(n, 3, 3, padding=1),
        )  # fmt: skip

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → (B, 32, H/8, W/8)."""
        z: Tensor = self.encoder(x)
        return z

    def decode(self, z: Tensor) -> Tensor:
        """(B, 32, h, w) → (B, 3, 8h, 8w), in [0, 1] or a little outside of it."""
        x: Tensor = self.decoder(z)
        return x


def taef2() -> Taef2:
    """The module with its weights, in float32."""
    module = Taef2()
    for part in ("encoder", "decoder"):
        state = safetensors.torch.load_file(FOLDER / f"taef2_{part}.safetensors")
        getattr(module, part).load_state_dict({name: value.float() for name, value in state.items()}, strict=True)
    return module.eval()


#: Data to measure the certificate on, and data to choose a lower precision by.
_Data = tuple[Pictures, Pictures]


def photographs(side: int, height: int | None = None) -> _Data:
    """Parts of scikit-learn's two photographs, taken in turns: (N, 3, height, side) each, in [0, 1]."""
    from sklearn.datasets import load_sample_images

    height = height or side
    parts = []
    for photograph in load_sample_images().images:
        rows, columns = (range(0, n - s + 1, s) for n, s in zip(photograph.shape[:2], (height, side), strict=True))
        parts += [photograph[y : y + height, x : x + side] for y in rows for x in columns]
    data = (np.stack(parts).transpose(0, 3, 1, 2) / 255).astype(np.float32)
    return data[::2], data[1::2]


def digits(module: Disentangled) -> _Data:
    """scikit-learn's digits of 8 × 8, enlarged to 22 × 22 with thinner strokes, in the middle of 32 × 32."""
    from sklearn.datasets import load_digits

    grey = np.minimum(load_digits().images * 16, 255).astype(np.uint8)
    enlarged = [Image.fromarray(image).resize((22, 22), Image.Resampling.BICUBIC) for image in grey]
    data = np.pad(np.stack([np.asarray(image) for image in enlarged]), ((0, 0), (5, 5), (5, 5)))[:, None]
    pictures = (1.8 * data / 255 - 0.6).clip(0, 1).astype(np.float32)
    return pictures[1::2], pictures[::2]


def sprites(module: Disentangled) -> _Data:
    """Squares, ellipses and hearts as dSprites has them: white on black, of six sizes, turned and moved."""
    random = np.random.default_rng(64)
    shown = np.stack([_sprite(random, index % 3) for index in range(2 * _DRAWS)])[:, None]
    return shown[::2], shown[1::2]


def _sprite(random: np.random.Generator, kind: int) -> Pictures:
    """One sprite: (64, 64), 0 or 1."""
    size, angle = random.uniform(0.5, 1.0) * 9, random.uniform(0, 2 * np.pi)
    centre = random.uniform(16, 48, 2)
    y, x = np.mgrid[:64, :64] - centre[:, None, None]
    u, v = (np.cos(angle) * x + np.sin(angle) * y) / size, (np.cos(angle) * y - np.sin(angle) * x) / size
    inside = (
        np.maximum(abs(u), abs(v)) < 0.8,
        u**2 + (2 * v) ** 2 < 1.2,
        (u**2 + v**2 - 0.6) ** 3 < u**2 * v**3,
    )[kind]
    return inside.astype(np.float32)


def faces(module: Disentangled) -> _Data:
    """Matplotlib's portrait of Grace Hopper, moved, mirrored and scaled; then the model's own draws."""
    import matplotlib.cbook

    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        portrait = Image.open(file).convert("RGB")
    shown = []
    for index in range(32):
        side, left, top = 300 + 10 * (index % 7), 110 + 6 * (index % 5), 10 + 5 * (index % 6)
        part = portrait.resize((64, 64), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        shown.append(np.asarray(part)[:, :: -1 if index % 2 else 1])
    real = (np.stack(shown).transpose(0, 3, 1, 2) / 255).astype(np.float32)
    held_out, calibration = chairs(module)
    return np.concatenate([real[:16], held_out]), np.concatenate([real[16:], calibration])


def chairs(module: Disentangled) -> _Data:
    """The model's own draws, as no pictures of its kind are at hand."""
    z = noise.normals(64, noise.LIKELIHOOD, 0, 2 * _DRAWS, _LATENT).reshape(-1, _LATENT)
    with torch.no_grad():
        drawn = torch.sigmoid(module.decode(torch.from_numpy(z))).numpy()
    return drawn[::2], drawn[1::2]


DATA: dict[str, Callable[[Disentangled], _Data]] = {
    "digits": digits,
    "sprites": sprites,
    "faces": faces,
    "chairs": chairs,
}
