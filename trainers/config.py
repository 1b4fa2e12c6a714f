"""What a training run is made of, and the `config.json` of its checkpoint. Free of PyTorch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final, Literal

import msgspec

from vae_export.errors import InputError
from vae_export.manifest import Record

FORMAT: Final = "vae_export.checkpoint"
VERSION: Final = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_LARGEST = 1 << 16


class ModelConfig(Record, frozen=True, kw_only=True):
    """A model.

    Attributes:
        model: `mlp` (fully connected) or `conv` (strided convolutions down, upsampling and convolutions up).
        data_shape: one example's shape (C, H, W).
        data_range: the smallest and largest value of the data; [0, 1] for a Bernoulli likelihood.
        likelihood: p(x|z): `bernoulli`, or `gaussian` with a mean and a variance for every pixel.
        latent: the number of latent dimensions, ≥ 1.
        widths: hidden units of each layer of `mlp`; channels at each halving of the size of `conv`.
        logvar_clamp: limits of the posterior's log-variance.
        sample_logvar_clamp: limits of a Gaussian likelihood's log-variance. The lower one is the variance
            floor: without it, a pixel that is the same in all pictures drives its density to infinity.
    """

    model: Literal["mlp", "conv"] = "conv"
    data_shape: tuple[int, int, int]
    data_range: tuple[float, float] = (0.0, 1.0)
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    latent: int = 16
    widths: tuple[int, ...] = (64, 128)
    logvar_clamp: tuple[float, float] = (-15.0, 10.0)
    sample_logvar_clamp: tuple[float, float] = (-6.0, 4.0)

    def check(self) -> None:
        """Refuse what no model can be made of.

        Raises:
            InputError: a size is below 1, or the image does not divide by the model's strides.
        """
        if not 1 <= self.latent <= _LARGEST:
            raise InputError(f"train: latent is {self.latent}; expected 1 to {_LARGEST:,}")
        if not self.widths or min(self.widths) < 1 or max(self.widths) > _LARGEST:
            raise InputError(
                f"train: widths are {list(self.widths)}; expected one or more numbers from 1 to {_LARGEST:,}"
            )
        if min(self.data_shape) < 1:
            raise InputError(f"train: data shape is {self.data_shape}; expected (C, H, W) of positive numbers")
        if self.likelihood == "bernoulli" and self.data_range != (0.0, 1.0):
            raise InputError(
                f"train: a Bernoulli likelihood needs data in [0, 1], got {list(self.data_range)}. Take a Gaussian"
            )
        for name in ("data_range", "logvar_clamp", "sample_logvar_clamp"):
            low, high = getattr(self, name)
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise InputError(f"train: {name} is [{low}, {high}]; expected two finite, rising numbers")
        stride = 2 ** len(self.widths)
        if self.model == "conv" and (self.data_shape[1] % stride or self.data_shape[2] % stride):
            raise InputError(
                f"train: {len(self.widths)} widths halve the image {len(self.widths)} times, but "
                f"{self.data_shape[1]} × {self.data_shape[2]} does not divide by {stride}. Give fewer widths "
                "or pad the images"
            )


class TrainConfig(Record, frozen=True, kw_only=True):
    """A training run.

    Attributes:
        data: what to train on: `digits`.
        seed: of the split, the initial weights, the order of the data and the noise.
        epochs: passes over the training data, ≥ 1.
        batch_size: examples in a step, ≥ 1.
        learning_rate: of AdamW at its peak; it falls to 0 along a cosine.
        weight_decay: of AdamW.
        gradient_clip: the largest norm of the gradient, of nats for each example. It is a guard against a
            step that destroys the model: losses are sums over pixels, and norms of hundreds are normal.
        device: Lightning Fabric's accelerator: `auto`, `cpu`, `cuda`, `mps`.
        precision: Lightning Fabric's precision: `32-true`, `bf16-mixed`, `16-mixed`.
    """

    data: str = "digits"
    seed: int = 0
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    gradient_clip: float = 1000.0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"

    def check(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            InputError: a number is out of its range.
        """
        if self.epochs < 1 or self.batch_size < 1:
            raise InputError(f"train: epochs and batch size must be 1 or more, got {self.epochs} and {self.batch_size}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"train: the learning rate must be positive, got {self.learning_rate}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0 and self.gradient_clip > 0):
            raise InputError(
                "train: the weight decay must not be negative and the gradient clip must be positive, got "
                f"{self.weight_decay} and {self.gradient_clip}"
            )
        if not 0 <= self.seed < 1 << 64:
            raise InputError(f"train: the seed must be from 0 to 2^64 - 1, got {self.seed}")


class Result(Record, frozen=True, kw_only=True):
    """How training ended. All in nats for each held-out example, one draw from the posterior.

    Attributes:
        elbo: reconstruction − kl.
        reconstruction: log p(x|z).
        kl: KL(q(z|x) || p(z)).
    """

    elbo: float
    reconstruction: float
    kl: float


class CheckpointConfig(Record, frozen=True, kw_only=True):
    """The `config.json` of a checkpoint.

    Attributes:
        format: always `vae_export.checkpoint`.
        version: of this format: 1.
        model: what was trained.
        train: how.
        result: on the held-out data.
    """

    format: Literal["vae_export.checkpoint"] = FORMAT
    version: Literal[1] = VERSION
    model: ModelConfig
    train: TrainConfig
    result: Result


def is_checkpoint(path: Path) -> bool:
    """Whether `path` looks like a checkpoint of this trainer."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> CheckpointConfig:
    """Read a checkpoint's `config.json`.

    Raises:
        InputError: there is no checkpoint at `path`, or its configuration is not one.
    """
    if not is_checkpoint(path):
        raise InputError(f"{path} is not a checkpoint: expected a folder with {CONFIG} and {WEIGHTS}")
    try:
        config = msgspec.json.decode((path / CONFIG).read_bytes(), type=CheckpointConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path / CONFIG} is not a checkpoint's configuration: {error}") from None
    config.model.check()
    return config


def encode(config: CheckpointConfig) -> bytes:
    """The bytes of `config.json`."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"
