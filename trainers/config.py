"""The configuration of a training run, and the `config.json` of its checkpoint. Imports no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from vae_export.contract.records import Record
from vae_export.errors import InputError
from vae_export.trainers import choices

FORMAT: Final = "vae_export.checkpoint"
VERSION: Final = 2
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
STATE = "training_state.safetensors"
MAX_SIZE = 1 << 16


class Section(Record, frozen=True, kw_only=True):
    """A part of a run's `config.json`. Its `repr` shows the fields that differ from their defaults."""

    def __repr__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in msgspec.structs.fields(self)}
        differ = [field.name for field in msgspec.structs.fields(self) if given[field.name] != field.default]
        return f"{type(self).__name__}({', '.join(f'{name}={given[name]!r}' for name in differ)})"


class DataConfig(Section, frozen=True, kw_only=True):
    """The data set, its split, and the transforms before the model.

    Attributes:
        spec: `digits`, `photos`, `mnist:DIR`, `fashion:DIR`, `cifar10:DIR`, `images:DIR`, `array:FILE.npy` or
            `array:FILE.npz:KEY`; see `trainers.datasets.load`.
        size: height and width in pixels of `images` and `photos`; null: 64 × 64 for `images`, 16 × 16 for `photos`.
        channels: of `images`: 1 (grey) or 3 (colour); null: 3.
        range: the interval to which 8-bit data is scaled, and in which the values of an array must lie.
        validation: share of the training data that is held out to choose the best weights, in (0, 1).
        test: share of all data that is held out for testing, in (0, 1); unused where a data set has a test set.
        binarize: `none`; `static`: each value becomes 0 or 1 once, with its own probability; `dynamic`: again at each
            training step. Validation and test data are always binarized once.
        dequantize: add uniform noise of one level's width, which makes the density of continuous data a bound
            on the probability of the discrete data (Theis et al. 2016, section 3.1).
        flip: mirror a random half of the training pictures, left to right, at each step.
    """

    spec: str = "digits"
    size: tuple[int, int] | None = None
    channels: Literal[1, 3] | None = None
    range: tuple[float, float] = (0.0, 1.0)
    validation: float = 0.1
    test: float = 0.2
    binarize: choices.Binarization = "none"
    dequantize: bool = False
    flip: bool = False

    def check(self) -> None:
        """Check types, ranges and combinations.

        Raises:
            InputError: a value is out of its range, or two options contradict each other.
        """
        _check_types(self)
        if not self.spec.isprintable():
            raise InputError(f"train: data {self.spec!r} has characters that cannot be written. Rename it")
        _check_interval("range", self.range)
        shares = self.validation, self.test
        _expect(min(shares) > 0 and sum(shares) < 1, "validation, test", shares, "positive shares whose sum is below 1")
        sides = list(self.size or (1, 1))
        _expect(all(1 <= side <= MAX_SIZE for side in sides), "size", sides, f"height and width from 1 to {MAX_SIZE:,}")
        if self.binarize != "none" and self.range != (0.0, 1.0):
            raise InputError(f"train: binarization needs data in [0, 1], got {list(self.range)}")
        if self.binarize != "none" and self.dequantize:
            raise InputError("train: binarized data has no levels left to dequantize. Choose one of the two")


class ModelConfig(Section, frozen=True, kw_only=True):
    """A model's architecture and its distributions.

    Attributes:
        model: `linear` (probabilistic PCA as a VAE), `mlp` (fully connected), `conv` (strided convolutions down,
            upsampling and convolutions up) or `resnet` (residual blocks, spatial latents).
        data_shape: one example's shape (C, H, W).
        data_range: the smallest and largest value of the data; [0, 1] for a Bernoulli likelihood.
        posterior: q(z|x): `diagonal_gaussian`, or `deterministic` for a plain autoencoder.
        likelihood: p(x|z): `bernoulli`; `gaussian` with a mean and a variance for every pixel; `gaussian_fixed`
            with a mean for every pixel and one variance; `discretized_logistic` for 8-bit data; `none` for a
            plain autoencoder.
        variance: the variance of `gaussian_fixed`, > 0; null: it is learned.
        latent: the number of latent dimensions, ≥ 1; for `resnet` the number of latent channels.
        widths: hidden units of each layer of `mlp`; channels after each halving of the size of `conv`; channels at
            each level of `resnet`, between which the size halves. `linear` has none.
        blocks: residual blocks at each level of `resnet`, ≥ 1.
        attention: self-attention in the middle of `resnet`.
        logvar_clamp: limits of the posterior's log-variance.
        sample_logvar_clamp: limits of a Gaussian likelihood's log-variance, for data whose range has width 1. Without
            the lower one, a deviation of 0.05, a pixel that is the same in all pictures has an infinite density.
        log_scale_clamp: limits of a discretized logistic likelihood's log-scale, for data whose range has width 1.
        noise_floor: smallest log-variance of a learned variance, for data whose range has width 1; by default the
            variance of rounding to 8 bits.
    """

    model: choices.ModelName = "conv"
    data_shape: tuple[int, int, int]
    data_range: tuple[float, float] = (0.0, 1.0)
    posterior: choices.PosteriorName = "diagonal_gaussian"
    likelihood: choices.LikelihoodName = "bernoulli"
    variance: float | None = None
    latent: int = 16
    widths: tuple[int, ...] = (64, 128)
    blocks: int = 1
    attention: bool = False
    logvar_clamp: tuple[float, float] = (-15.0, 10.0)
    sample_logvar_clamp: tuple[float, float] = (-6.0, 4.0)
    log_scale_clamp: tuple[float, float] = (-7.0, 2.0)
    noise_floor: float = -13.5

    @property
    def width(self) -> float:
        """Width of the data's range."""
        return self.data_range[1] - self.data_range[0]

    @property
    def sample_logvar_limits(self) -> tuple[float, float]:
        """`sample_logvar_clamp` for data of this range."""
        low, high = self.sample_logvar_clamp
        return low + 2 * math.log(self.width), high + 2 * math.log(self.width)

    @property
    def log_scale_limits(self) -> tuple[float, float]:
        """`log_scale_clamp` for data of this range."""
        low, high = self.log_scale_clamp
        return low + math.log(self.width), high + math.log(self.width)

    @property
    def noise_logvar_floor(self) -> float:
        """`noise_floor` for data of this range."""
        return self.noise_floor + 2 * math.log(self.width)

    @property
    def halvings(self) -> int:
        """How many times the model halves height and width."""
        return {"conv": len(self.widths), "resnet": len(self.widths) - 1}.get(self.model, 0)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """One latent's shape: (latent,), or (latent, h, w) for `resnet`."""
        if self.model != "resnet":
            return (self.latent,)
        _, height, width = self.data_shape
        return (self.latent, height >> self.halvings, width >> self.halvings)

    def check(self) -> None:
        """Check types, ranges and combinations.

        Raises:
            InputError: a value is out of its range, the image does not divide by the model's strides, or two options
                contradict each other.
        """
        _check_types(self)
        widths, sizes = list(self.widths), f"1 to {MAX_SIZE:,}"
        _expect(1 <= self.latent <= MAX_SIZE, "latent", self.latent, sizes)
        if self.model == "linear" and widths:
            raise InputError(f"train: model 'linear' has no hidden layers, got widths {widths}")
        positive = all(1 <= width <= MAX_SIZE for width in widths)
        _expect(positive and bool(widths or self.model == "linear"), "widths", widths, f"one or more of {sizes}")
        _expect(1 <= self.blocks <= 64, "blocks", self.blocks, "1 to 64")
        if self.model != "resnet" and (self.blocks != 1 or self.attention):
            raise InputError(f"train: blocks and attention belong to model 'resnet', got them for {self.model!r}")
        _expect(min(self.data_shape) >= 1, "data_shape", self.data_shape, "(C, H, W), each 1 or more")
        for name in ("data_range", "logvar_clamp", "sample_logvar_clamp", "log_scale_clamp"):
            _check_interval(name, getattr(self, name))
        _expect(math.isfinite(self.noise_floor), "noise_floor", self.noise_floor, "a finite number")
        self._check_likelihood()
        stride = 2**self.halvings
        if self.data_shape[1] % stride or self.data_shape[2] % stride:
            raise InputError(
                f"train: {len(widths)} widths of {self.model!r} halve the image {self.halvings} times, but "
                f"{self.data_shape[1]} × {self.data_shape[2]} is not divisible by {stride}. Give fewer widths "
                "or pad the images"
            )

    def _check_likelihood(self) -> None:
        if (self.posterior == "deterministic") != (self.likelihood == "none"):
            raise InputError(
                "train: a deterministic posterior and likelihood 'none' belong together (a plain autoencoder, "
                f"--objective autoencoder), got {self.posterior!r} and {self.likelihood!r}"
            )
        if self.model == "linear" and self.likelihood not in ("gaussian_fixed", "none"):
            raise InputError(
                f"train: model 'linear' is probabilistic PCA, whose likelihood is 'gaussian_fixed'; got "
                f"{self.likelihood!r}. For another likelihood use --model mlp"
            )
        if self.likelihood == "bernoulli" and self.data_range != (0.0, 1.0):
            raise InputError(
                f"train: a Bernoulli likelihood needs data in [0, 1], got {list(self.data_range)}. Use a Gaussian"
            )
        if self.variance is not None:
            if self.likelihood != "gaussian_fixed":
                raise InputError(f"train: variance belongs to likelihood 'gaussian_fixed', got {self.likelihood!r}")
            _expect(0 < self.variance < math.inf, "variance", self.variance, "a positive number")


class TrainConfig(Section, frozen=True, kw_only=True):
    """Objective, optimizer and evaluation of a run: everything but model and data that decides its result.

    Attributes:
        seed: of the split, the initial weights, the order of the data and the noise.
        epochs: passes over the training data, ≥ 1.
        batch_size: examples in a step of one process, ≥ 1.
        learning_rate: peak learning rate of AdamW; it falls to 0 along a cosine.
        warmup: linear warm-up of the learning rate, in steps; at most a tenth of all steps.
        weight_decay: of AdamW, on weights and not on biases or norms.
        gradient_clip: largest norm of the gradient, in nats for each example; hundreds are normal for sums over pixels.
        objective: `elbo` with the KL in closed form; `elbo_monte_carlo`, the three-term form (Kingma & Welling
            2014, eq. 6); `importance_weighted` (Burda et al. 2016, eq. 8); `autoencoder`, the squared error.
        draws: draws from the posterior for each example and step, ≥ 1: averaged for the two ELBOs, and the K
            of `importance_weighted`.
        beta: weight of the KL (Higgins et al. 2017), > 0.
        kl_warmup: linear warm-up of that weight from 0, in epochs (Bowman et al. 2016).
        free_bits: KL of each latent dimension that costs nothing, in nats (Kingma et al. 2016, eq. 15).
        ema: decay of the averaged weights, which are evaluated and exported; 0 takes the last weights.
        keep: which averaged weights are kept: those that were `best` on the validation data, or the `last`.
        patience: epochs without a better validation ELBO after which training stops; 0 never stops early.
        importance_draws: K of the importance-weighted bound on the test data.
        device: Lightning Fabric's accelerator: `auto`, `cpu`, `cuda`, `mps`.
        precision: Lightning Fabric's precision: `32-true`, `bf16-mixed`, `16-mixed`. Evaluation is in float32.
        compile: use `torch.compile`.
    """

    seed: int = 0
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 1e-4
    gradient_clip: float = 1000.0
    objective: choices.ObjectiveName = "elbo"
    draws: int = 1
    beta: float = 1.0
    kl_warmup: int = 0
    free_bits: float = 0.0
    ema: float = 0.999
    keep: choices.Kept = "best"
    patience: int = 0
    importance_draws: int = 64
    device: choices.Device = "auto"
    precision: choices.Precision = "32-true"
    compile: bool = False

    def check(self) -> None:
        """Check types, ranges and combinations.

        Raises:
            InputError: a value is out of its range, or two options contradict each other.
        """
        _check_types(self)
        _expect(0 <= self.seed < 1 << 64, "seed", self.seed, "0 to 2^64 - 1")
        for name in ("epochs", "batch_size"):
            _expect(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("warmup", "kl_warmup", "patience"):
            _expect(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("draws", "importance_draws"):
            _expect(1 <= getattr(self, name) <= MAX_SIZE, name, getattr(self, name), f"1 to {MAX_SIZE:,}")
        for name in ("learning_rate", "beta"):
            _expect(0 < getattr(self, name) < math.inf, name, getattr(self, name), "a positive number")
        for name in ("weight_decay", "free_bits"):
            _expect(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or a positive number")
        _expect(self.gradient_clip > 0, "gradient_clip", self.gradient_clip, "a positive number")
        _expect(0 <= self.ema < 1, "ema", self.ema, "at least 0 and less than 1")
        shaped = self.beta != 1 or self.kl_warmup or self.free_bits
        if shaped and self.objective in ("importance_weighted", "autoencoder"):
            raise InputError(
                f"train: objective {self.objective!r} has no separate KL term: leave out beta, kl_warmup and free_bits"
            )
        if self.free_bits and self.objective == "elbo_monte_carlo":
            raise InputError("train: free_bits needs the KL of each dimension in closed form: --objective elbo")
        if self.draws > 1 and self.objective == "autoencoder":
            raise InputError(f"train: an autoencoder draws no samples: draws must be 1, got {self.draws}")


class Split(Section, frozen=True, kw_only=True):
    """The data set of a run and how it was split.

    Attributes:
        name: of the data set, for display.
        train: number of training examples.
        validation: number of validation examples, which choose the best weights.
        test: number of test examples.
        skipped: number of files that could not be read.
        fingerprint: SHA-256 over what identifies the data: names and sizes of its files, shapes and types.
    """

    name: str
    train: int
    validation: int
    test: int
    skipped: int = 0
    fingerprint: str = ""


class Result(Section, frozen=True, kw_only=True):
    """Figures of the kept weights on the test data, in nats for each example.

    Attributes:
        elbo: reconstruction − kl, with one draw from the posterior of each example; null without a likelihood.
        reconstruction: log p(x|z).
        kl: KL(q(z|x) || p(z)), in closed form.
        log_likelihood: the importance-weighted bound on log p(x) with `TrainConfig.importance_draws` draws.
        log_likelihood_examples: number of test examples that it was measured on.
        bits_per_dimension: of the discrete data, from the ELBO; null where the data is not discrete.
        active_units: latent dimensions whose posterior mean varies over the data (Burda et al. 2016, 4.2).
        kl_by_dimension: the KL of each latent dimension, the latents flattened.
        squared_error: of the reconstruction through the posterior's mean, summed over an example's values.
        epoch: at whose end the weights were kept, counted from 1.
        step: of the optimizer at the end of that epoch.
    """

    elbo: float | None = None
    reconstruction: float | None = None
    kl: float | None = None
    log_likelihood: float | None = None
    log_likelihood_examples: int | None = None
    bits_per_dimension: float | None = None
    active_units: int | None = None
    kl_by_dimension: tuple[float, ...] | None = None
    squared_error: float | None = None
    epoch: int | None = None
    step: int | None = None


class CheckpointConfig(Section, frozen=True, kw_only=True):
    """The `config.json` of a checkpoint.

    Attributes:
        format: always `vae_export.checkpoint`.
        version: of this format: 2.
        model: the model's configuration.
        data: the data's configuration.
        train: the training's configuration.
        split: the data set and its split; null in checkpoints of version 1.
        result: figures on the test data; null until training has ended.
    """

    format: Literal["vae_export.checkpoint"] = FORMAT
    version: Literal[2] = VERSION
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    split: Split | None = None
    result: Result | None = None


#: For each model, the defaults of its `ModelConfig` and `TrainConfig` that differ from those of the records.
RECIPES: Mapping[choices.ModelName, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "linear": (
        {"likelihood": "gaussian_fixed", "latent": 10, "widths": ()},
        {"epochs": 500, "learning_rate": 1e-2, "weight_decay": 0.0, "keep": "last"},
    ),
    "mlp": ({"widths": (512,)}, {"learning_rate": 1e-3}),
    "conv": ({"likelihood": "gaussian"}, {}),
    "resnet": ({"likelihood": "gaussian_fixed", "latent": 4, "widths": (32, 64)}, {"learning_rate": 1e-3}),
}


def model_config(model: choices.ModelName, **given: Any) -> ModelConfig:
    """A `ModelConfig` of the given fields, else the model's recipe, else the record's defaults."""
    recipe = dict(RECIPES[model][0])
    if given.get("posterior") == "deterministic":
        recipe["likelihood"] = "none"
    return ModelConfig(**{**recipe, **given, "model": model})


def train_config(model: choices.ModelName, **given: Any) -> TrainConfig:
    """A `TrainConfig` of the given fields, else the model's recipe, else the record's defaults."""
    return TrainConfig(**{**RECIPES[model][1], **given})


def is_checkpoint(path: Path) -> bool:
    """Whether `path` has the files of a checkpoint with weights."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> CheckpointConfig:
    """Read a checkpoint's `config.json`, of this version or an older one.

    Raises:
        InputError: there is no checkpoint at `path`, or its `config.json` is not valid.
    """
    if not is_checkpoint(path):
        if (path / CONFIG).is_file() and (path / STATE).is_file():
            raise InputError(
                f"{path} is a run that was stopped before its first evaluation. Continue it: "
                f"vae-export train {path} --resume"
            )
        raise InputError(f"{path} is not a checkpoint: expected a folder with {CONFIG} and {WEIGHTS}")
    return read_config(path)


def read_config(path: Path) -> CheckpointConfig:
    """Read the `config.json` of a run, with or without weights.

    Raises:
        InputError: it does not exist or is not valid.
    """
    try:
        raw = (path / CONFIG).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is not a checkpoint: it has no {CONFIG}") from None
    try:
        plain = msgspec.json.decode(raw)
        if isinstance(plain, dict) and plain.get("version") == 1:
            plain = _from_version_1(plain)
        config = msgspec.convert(plain, CheckpointConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path / CONFIG} is not a checkpoint's configuration: {error}") from None
    config.model.check()
    return config


def encode(config: CheckpointConfig) -> bytes:
    """The bytes of `config.json`."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"


def _check_types(record: Record) -> None:
    """A record's constructor checks no types and no choices: decoding does."""
    try:
        msgspec.convert(msgspec.to_builtins(record), type(record))
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise InputError(f"train: {error}") from None


def _expect(allowed: bool, name: str, value: object, expected: str) -> None:
    if not allowed:
        raise InputError(f"train: {name} is {value}; expected {expected}")


def _check_interval(name: str, limits: tuple[float, float]) -> None:
    _expect(-math.inf < limits[0] < limits[1] < math.inf, name, list(limits), "two finite, rising numbers")


def _from_version_1(plain: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had digits only, no averaged weights and no validation data: its last weights were kept."""
    train = {**plain.get("train", {}), "ema": 0.0, "keep": "last"}
    return {**plain, "version": VERSION, "data": {"spec": train.pop("data", "digits")}, "train": train}
