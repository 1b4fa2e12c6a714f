"""What a training run is made of, and the `config.json` of its checkpoint. Free of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from vae_export.contract.records import Record
from vae_export.errors import InputError

FORMAT: Final = "vae_export.checkpoint"
VERSION: Final = 2
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
STATE = "training_state.safetensors"
_LARGEST = 1 << 16


class DataConfig(Record, frozen=True, kw_only=True):
    """The data, and how it is split and changed before a model sees it.

    Attributes:
        spec: `digits`, `photos`, `mnist:DIR`, `fashion:DIR`, `cifar10:DIR`, `images:DIR`, `array:FILE.npy` or
            `array:FILE.npz:KEY`; see `trainers.data`.
        size: height and width of the pictures of `images` and `photos`, in pixels; null for their default.
        channels: of the pictures of `images`: 1 (grey) or 3 (colour); null for colour.
        range: the values onto which 8-bit data is scaled, and between which an array's values must be.
        validation: share of the training data that is held out to choose the best weights, > 0.
        test: share of all data that is held out to the end, > 0; data with a test set of its own has that.
        binarize: `none`; `static`: every value becomes 0 or 1 once, with its own probability; `dynamic`: it
            does so anew each time it is trained on. Validation and test data are binarized once.
        dequantize: add uniform noise of one level's width, which makes the density of continuous data a bound
            on the probability of the discrete data (Theis et al. 2016, section 3.1).
        flip: mirror half of the training pictures, left to right, anew each time.
    """

    spec: str = "digits"
    size: tuple[int, int] | None = None
    channels: Literal[1, 3] | None = None
    range: tuple[float, float] = (0.0, 1.0)
    validation: float = 0.1
    test: float = 0.2
    binarize: Literal["none", "static", "dynamic"] = "none"
    dequantize: bool = False
    flip: bool = False

    def check(self) -> None:
        """Refuse what no data can be.

        Raises:
            InputError: a number is out of its range, or two options contradict each other.
        """
        _valid(self)
        if not self.spec.isprintable():
            raise InputError(f"train: data {self.spec!r} has characters that cannot be written. Rename it")
        _rising("train: range", self.range)
        if not (0 < self.validation < 1 and 0 < self.test < 1 and self.validation + self.test < 1):
            raise InputError(
                "train: validation and test must be shares above 0 that leave something to train on, got "
                f"{self.validation} and {self.test}"
            )
        if self.size is not None and not all(1 <= side <= _LARGEST for side in self.size):
            raise InputError(f"train: size is {list(self.size)}; expected height and width from 1 to {_LARGEST:,}")
        if self.binarize != "none" and self.range != (0.0, 1.0):
            raise InputError(f"train: binarization needs data in [0, 1], got {list(self.range)}")
        if self.binarize != "none" and self.dequantize:
            raise InputError("train: binarized data has no levels left to dequantize. Choose one of the two")


class ModelConfig(Record, frozen=True, kw_only=True):
    """A model.

    Attributes:
        model: `linear` (probabilistic PCA as a VAE), `mlp` (fully connected), `conv` (strided convolutions down,
            upsampling and convolutions up) or `resnet` (residual blocks, spatial latents).
        data_shape: one example's shape (C, H, W).
        data_range: the smallest and largest value of the data; [0, 1] for a Bernoulli likelihood.
        posterior: q(z|x): `diagonal_gaussian`, or `deterministic` for a plain autoencoder.
        likelihood: p(x|z): `bernoulli`; `gaussian` with a mean and a variance for every pixel; `gaussian_fixed`
            with a mean for every pixel and one variance; `discretized_logistic` for 8-bit data; `none` for a
            plain autoencoder.
        variance: the one variance of `gaussian_fixed`, > 0; null learns it.
        latent: the number of latent dimensions, ≥ 1; for `resnet` the latents' channels.
        widths: hidden units of each layer of `mlp`; channels at each halving of the size of `conv`; channels at
            each level of `resnet`, between which the size halves. `linear` has none.
        blocks: residual blocks at each level of `resnet`, ≥ 1.
        attention: whether the middle of `resnet` has self-attention.
        logvar_clamp: limits of the posterior's log-variance.
        sample_logvar_clamp: limits of a Gaussian likelihood's log-variance for each pixel, for data of a range of
            width 1. The lower one is the variance floor, e^-6, a deviation of 0.05: without it, a pixel that is the
            same in all pictures drives its density to infinity.
        log_scale_clamp: limits of a discretized logistic likelihood's log-scale, for data of a range of width 1.
        noise_floor: of a learned variance, likewise: the variance of rounding to 8 bits by default.
    """

    model: Literal["linear", "mlp", "conv", "resnet"] = "conv"
    data_shape: tuple[int, int, int]
    data_range: tuple[float, float] = (0.0, 1.0)
    posterior: Literal["diagonal_gaussian", "deterministic"] = "diagonal_gaussian"
    likelihood: Literal["bernoulli", "gaussian", "gaussian_fixed", "discretized_logistic", "none"] = "bernoulli"
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
        """Of the data's range."""
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
        """How often the model halves height and width."""
        return {"conv": len(self.widths), "resnet": len(self.widths) - 1}.get(self.model, 0)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """One latent's shape: (latent,), or (latent, h, w) for `resnet`."""
        if self.model != "resnet":
            return (self.latent,)
        _, height, width = self.data_shape
        return (self.latent, height >> self.halvings, width >> self.halvings)

    def check(self) -> None:
        """Refuse what no model can be made of.

        Raises:
            InputError: a size is below 1, the image does not divide by the model's strides, or two choices
                contradict each other.
        """
        _valid(self)
        if not 1 <= self.latent <= _LARGEST:
            raise InputError(f"train: latent is {self.latent}; expected 1 to {_LARGEST:,}")
        if self.model == "linear" and self.widths:
            raise InputError(f"train: model 'linear' has no hidden layers, got widths {list(self.widths)}")
        if (self.model != "linear" and not self.widths) or any(not 1 <= w <= _LARGEST for w in self.widths):
            raise InputError(
                f"train: widths are {list(self.widths)}; expected one or more numbers from 1 to {_LARGEST:,}"
            )
        if not 1 <= self.blocks <= 64:
            raise InputError(f"train: blocks is {self.blocks}; expected 1 to 64")
        if self.model != "resnet" and (self.blocks != 1 or self.attention):
            raise InputError(f"train: blocks and attention belong to model 'resnet', got them for {self.model!r}")
        if min(self.data_shape) < 1:
            raise InputError(f"train: data shape is {self.data_shape}; expected (C, H, W) of positive numbers")
        for name in ("data_range", "logvar_clamp", "sample_logvar_clamp", "log_scale_clamp"):
            _rising(f"train: {name}", getattr(self, name))
        if not math.isfinite(self.noise_floor):
            raise InputError(f"train: noise_floor must be finite, got {self.noise_floor}")
        self._check_likelihood()
        stride = 2**self.halvings
        if self.data_shape[1] % stride or self.data_shape[2] % stride:
            raise InputError(
                f"train: {len(self.widths)} widths of {self.model!r} halve the image {self.halvings} times, but "
                f"{self.data_shape[1]} × {self.data_shape[2]} does not divide by {stride}. Give fewer widths "
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
                f"{self.likelihood!r}. Take --model mlp for another one"
            )
        if self.likelihood == "bernoulli" and self.data_range != (0.0, 1.0):
            raise InputError(
                f"train: a Bernoulli likelihood needs data in [0, 1], got {list(self.data_range)}. Take a Gaussian"
            )
        if self.variance is not None:
            if self.likelihood != "gaussian_fixed":
                raise InputError(f"train: variance belongs to likelihood 'gaussian_fixed', got {self.likelihood!r}")
            if not (math.isfinite(self.variance) and self.variance > 0):
                raise InputError(f"train: variance must be positive, got {self.variance}")


class TrainConfig(Record, frozen=True, kw_only=True):
    """A training run. Everything here decides what comes out of it; where it runs and logs does not.

    Attributes:
        seed: of the split, the initial weights, the order of the data and the noise.
        epochs: passes over the training data, ≥ 1.
        batch_size: examples in a step of one process, ≥ 1.
        learning_rate: of AdamW at its peak; it falls to 0 along a cosine.
        warmup: steps in which the learning rate rises, at most a tenth of all.
        weight_decay: of AdamW, on weights and not on biases or norms.
        gradient_clip: the largest norm of the gradient, of nats for each example. It is a guard against a
            step that destroys the model: losses are sums over pixels, and norms of hundreds are normal.
        objective: `elbo` with the KL in closed form; `elbo_monte_carlo`, the three-term form (Kingma & Welling
            2014, eq. 6); `importance_weighted` (Burda et al. 2016, eq. 8); `autoencoder`, the squared error.
        draws: draws from the posterior for each example and step, ≥ 1: averaged for the two ELBOs, and the K
            of `importance_weighted`.
        beta: weight of the KL (Higgins et al. 2017), > 0.
        kl_warmup: epochs over which that weight rises linearly from 0 (Bowman et al. 2016).
        free_bits: nats for each latent dimension that cost nothing (Kingma et al. 2016, eq. 15).
        ema: decay of the averaged weights, which are evaluated and exported; 0 takes the last weights.
        keep: which averaged weights are the result: those that were `best` on the validation data, or the `last`.
        patience: epochs without a better validation ELBO after which training stops; 0 never stops early.
        importance_draws: K of the test set's importance-weighted bound.
        device: Lightning Fabric's accelerator: `auto`, `cpu`, `cuda`, `mps`.
        precision: Lightning Fabric's precision: `32-true`, `bf16-mixed`, `16-mixed`. Evaluation is in float32.
        compile: whether `torch.compile` is used.
    """

    seed: int = 0
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 1e-4
    gradient_clip: float = 1000.0
    objective: Literal["elbo", "elbo_monte_carlo", "importance_weighted", "autoencoder"] = "elbo"
    draws: int = 1
    beta: float = 1.0
    kl_warmup: int = 0
    free_bits: float = 0.0
    ema: float = 0.999
    keep: Literal["best", "last"] = "best"
    patience: int = 0
    importance_draws: int = 64
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    compile: bool = False

    def check(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            InputError: a number is out of its range, or two choices contradict each other.
        """
        _valid(self)
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
        for name in ("warmup", "kl_warmup", "patience"):
            if getattr(self, name) < 0:
                raise InputError(f"train: {name} must not be negative, got {getattr(self, name)}")
        for name in ("draws", "importance_draws"):
            if not 1 <= getattr(self, name) <= _LARGEST:
                raise InputError(f"train: {name} is {getattr(self, name)}; expected 1 to {_LARGEST:,}")
        if not 0 <= self.ema < 1:
            raise InputError(f"train: ema must be at least 0 and below 1, got {self.ema}")
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise InputError(f"train: beta must be positive, got {self.beta}")
        if not (math.isfinite(self.free_bits) and self.free_bits >= 0):
            raise InputError(f"train: free_bits must not be negative, got {self.free_bits}")
        shaped = self.beta != 1 or self.kl_warmup or self.free_bits
        if shaped and self.objective in ("importance_weighted", "autoencoder"):
            raise InputError(
                f"train: objective {self.objective!r} has no KL term of its own: beta, kl_warmup and free_bits "
                "do not go with it"
            )
        if self.free_bits and self.objective == "elbo_monte_carlo":
            raise InputError("train: free_bits needs the KL of each dimension in closed form: --objective elbo")
        if self.draws > 1 and self.objective == "autoencoder":
            raise InputError("train: an autoencoder draws nothing; draws must be 1")


class Split(Record, frozen=True, kw_only=True):
    """The data that a run saw.

    Attributes:
        name: of the data, for people.
        train: examples trained on.
        validation: examples that chose the best weights.
        test: examples held out to the end.
        skipped: files that could not be read.
        fingerprint: SHA-256 over what identifies the data: names and sizes of its files, shapes and types.
    """

    name: str
    train: int
    validation: int
    test: int
    skipped: int = 0
    fingerprint: str = ""


class Result(Record, frozen=True, kw_only=True):
    """How training ended, measured with the weights that were kept, on the test data. Nats for each example.

    Attributes:
        elbo: reconstruction − kl, at one draw from the posterior of each example; null without a likelihood.
        reconstruction: log p(x|z).
        kl: KL(q(z|x) || p(z)), in closed form.
        log_likelihood: the importance-weighted bound on log p(x) with `TrainConfig.importance_draws` draws.
        log_likelihood_examples: test examples that it was measured on.
        bits_per_dimension: of the discrete data, from the ELBO; null where the data is not discrete.
        active_units: latent dimensions whose posterior mean varies over the data (Burda et al. 2016, 4.2).
        kl_by_dimension: the KL of each latent dimension, the latents flattened.
        squared_error: of the reconstruction through the posterior's mean, summed over an example's values.
        epoch: whose weights were kept.
        step: of the optimizer at its end.
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


class CheckpointConfig(Record, frozen=True, kw_only=True):
    """The `config.json` of a checkpoint.

    Attributes:
        format: always `vae_export.checkpoint`.
        version: of this format: 2.
        model: what is trained.
        data: on what.
        train: how.
        split: the data that was found; null in checkpoints of version 1.
        result: on the test data; null until training has ended.
    """

    format: Literal["vae_export.checkpoint"] = FORMAT
    version: Literal[2] = VERSION
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    split: Split | None = None
    result: Result | None = None


#: What differs from the records' defaults for each model, where nobody says otherwise.
RECIPES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "linear": (
        {"likelihood": "gaussian_fixed", "latent": 10, "widths": ()},
        {"epochs": 500, "learning_rate": 1e-2, "weight_decay": 0.0, "keep": "last"},
    ),
    "mlp": ({"widths": (512,)}, {"learning_rate": 1e-3}),
    "conv": ({"likelihood": "gaussian"}, {}),
    "resnet": ({"likelihood": "gaussian_fixed", "latent": 4, "widths": (32, 64)}, {"learning_rate": 1e-3}),
}


def model_config(model: str, **given: Any) -> ModelConfig:
    """A model's configuration: what is given, else the model's recipe, else the defaults of `ModelConfig`."""
    recipe = dict(RECIPES[model][0])
    if given.get("posterior") == "deterministic":
        recipe["likelihood"] = "none"
    return ModelConfig(**{**recipe, **given, "model": model})


def train_config(model: str, **given: Any) -> TrainConfig:
    """A run's configuration: what is given, else the model's recipe, else the defaults of `TrainConfig`."""
    return TrainConfig(**{**RECIPES[model][1], **given})


def is_checkpoint(path: Path) -> bool:
    """Whether `path` looks like a checkpoint of this trainer that has weights."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> CheckpointConfig:
    """Read a checkpoint's `config.json`, of this version or an older one.

    Raises:
        InputError: there is no checkpoint at `path`, or its configuration is not one.
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
    """Read the `config.json` of a run that may have no weights yet.

    Raises:
        InputError: it is not there, or not a configuration.
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


def check_same(path: Path, asked: CheckpointConfig) -> None:
    """Refuse to go on with a run as something else. Where its data lies may change; what it is may not.

    Raises:
        InputError: a field has another value than in the run's `config.json`.
    """
    recorded = read_config(path)
    for part in ("model", "data", "train", "split"):
        if getattr(recorded, part) is not None:
            check_fields(path, part, getattr(recorded, part), msgspec.structs.asdict(getattr(asked, part)))


def check_fields(path: Path, part: str, recorded: Record, asked: Mapping[str, Any]) -> None:
    """The same for some fields of a part of the configuration.

    Raises:
        InputError: a field has another value.
    """
    for name, new in asked.items():
        old = getattr(recorded, name)
        if name == "spec":
            old, new = old.partition(":")[0], new.partition(":")[0]
        if old != new and name != "name":
            raise InputError(
                f"train: --resume continues the run in {path} as it was, but {part}.{name} was {old!r} and is now "
                f"{new!r}. Take the old value, or start a new run in another folder"
            )


def _valid(record: Record) -> None:
    """Refuse, in words, what a constructor does not: values of another type, and choices that do not exist."""
    try:
        msgspec.convert(msgspec.to_builtins(record), type(record))
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise InputError(f"train: {error}") from None


def _from_version_1(plain: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knew digits only, and had neither averaged weights nor validation data: its last were kept."""
    train = {**plain.get("train", {}), "ema": 0.0, "keep": "last"}
    return {**plain, "version": VERSION, "data": {"spec": train.pop("data", "digits")}, "train": train}


def encode(config: CheckpointConfig) -> bytes:
    """The bytes of `config.json`."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"


def _rising(what: str, limits: tuple[float, float]) -> None:
    low, high = limits
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"{what} is [{low}, {high}]; expected two finite, rising numbers")
