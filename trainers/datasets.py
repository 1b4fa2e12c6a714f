"""Data sets: their split into training, validation and test examples, and the transforms before the model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import numpy as np
import numpy.typing as npt

from vae_export.errors import InputError
from vae_export.numerics import noise
from vae_export.trainers import formats
from vae_export.trainers.config import DataConfig, ModelConfig, Split
from vae_export.trainers.formats import Array, ArrayRows, RawDataset, Report, Rows

Indices = npt.NDArray[np.intp]
Floats = npt.NDArray[np.float32]

# Draws in the trainer's stream of noise, one for each purpose, so that no two meet whatever the sizes are. The draws
# from the posterior of training examples count from 0, those of validation and test examples from here.
VALIDATION, TEST = 1 << 61, 1 << 62
FLIP, BINARIZE, DEQUANTIZE = range(1 << 63, (1 << 63) + 3)
ONCE = 3  # added to BINARIZE or DEQUANTIZE: noise of an example that is drawn once, not at each training step
ORDER = (1 << 63) + 6
_SPLIT = (1 << 64) - 1  # an index of draw 0, as in version 0.1.0
_LEVELS = 256
_FINGERPRINT_ROWS = 64  # rows of an array that enter its fingerprint


@dataclasses.dataclass(frozen=True)
class Transform:
    """From stored values to the model's input: scaling, dequantization, binarization, flips.

    Attributes:
        config: selects the steps.
        seed: of the noise.
        levels: number of levels of the stored values; None for floats.
        quantize: round to the nearest of 256 levels.
    """

    config: DataConfig
    seed: int
    levels: int | None
    quantize: bool

    def __call__(self, raw: Array, rows: Indices, first: int | None) -> Floats:
        """Transform a batch.

        Args:
            raw: (B, C, H, W), as stored.
            rows: (B,), the examples' indices in the whole data set, which address noise that is drawn once.
            first: number of training examples seen before the first one, which addresses noise that is drawn at
                each training step. None: all noise is drawn once, and nothing is flipped.

        Returns:
            (B, C, H, W) float32 in the data's range.
        """
        low, high = self.config.range
        if self.config.dequantize:
            # Theis et al. 2016, section 3.1: level k of L becomes uniform in [k, k + 1) / L.
            uniform = self._uniforms(DEQUANTIZE, raw.shape, rows, first)
            x = (low + (raw + uniform) * ((high - low) / (self.levels or _LEVELS))).astype(np.float32)
        else:
            x = self._values(raw)
        if self.config.binarize != "none":
            anew = first if self.config.binarize == "dynamic" else None
            x = (self._uniforms(BINARIZE, raw.shape, rows, anew) < x).astype(np.float32)
        if self.config.flip and first is not None:
            # After binarization, so that an example that is binarized once is mirrored, not binarized again.
            mirrored = noise.words(self.seed, noise.TRAINER, first, len(raw), 1, FLIP) % 2 == 1
            x = np.where(mirrored[:, :, None, None], x[..., ::-1], x)
        return np.ascontiguousarray(x)

    def _values(self, raw: Array) -> Floats:
        low, high = self.config.range
        if self.quantize:
            share = raw / (self.levels - 1) if self.levels else (raw.astype(np.float64) - low) / (high - low)
            nearest = np.rint(np.clip(share, 0, 1) * (_LEVELS - 1)).astype(np.uint8)
            return np.linspace(low, high, _LEVELS).astype(np.float32)[nearest]
        if self.levels:
            return np.linspace(low, high, self.levels).astype(np.float32)[raw]
        return raw.astype(np.float32)

    def _uniforms(self, draw: int, shape: tuple[int, ...], rows: Indices, first: int | None) -> npt.NDArray[np.float64]:
        size = math.prod(shape[1:])
        if first is not None:
            return noise.uniforms(self.seed, noise.TRAINER, first, len(rows), size, draw).reshape(shape)
        uniform = np.empty((len(rows), size))
        for index, row in enumerate(rows):
            uniform[index] = noise.uniforms(self.seed, noise.TRAINER, int(row), 1, size, draw + ONCE)
        return uniform.reshape(shape)


@dataclasses.dataclass(frozen=True, repr=False)
class Subset:
    """The training, validation or test examples of a data set.

    Attributes:
        rows: the whole data set.
        indices: (N,), the indices of this subset's examples in `rows`, in this order.
        labels: (N,) int64, if the data set has labels.
        transform: from stored values to the model's input.
    """

    rows: Rows
    indices: Indices
    labels: npt.NDArray[np.int64] | None
    transform: Transform

    def __repr__(self) -> str:
        """The number of examples."""
        return f"Subset({len(self):,} of {len(self.rows):,} examples)"

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.indices)

    def read(self, indices: Indices) -> Floats:
        """Examples for evaluation: the same at each call and in each batch.

        Args:
            indices: (B,), from 0 to N - 1.

        Returns:
            (B, C, H, W) float32 in the data's range; never flipped; binarized or dequantized once.

        Raises:
            InputError: a picture can no longer be read.
        """
        rows = self.indices[indices]
        return self.transform(self.rows.read(rows), rows, None)

    def fixed(self, limit: int) -> Floats | None:
        """All examples, if `draw` has no noise and they are in memory and take at most `limit` bytes.

        Returns:
            (N, C, H, W) float32 in the data's range, or None.
        """
        config = self.transform.config
        drawn = config.flip or config.dequantize or config.binarize == "dynamic"
        if drawn or not isinstance(self.rows, ArrayRows):
            return None
        if 4 * len(self) * math.prod(self.rows.read(self.indices[:1]).shape) > limit:
            return None
        return self.read(np.arange(len(self)))

    def draw(self, indices: Indices, first: int) -> Floats:
        """Examples for training, with noise that is drawn at each training step.

        A slice ``draw(indices[a:b], first + a)`` is that slice of the whole batch.

        Args:
            indices: (B,), from 0 to N - 1.
            first: number of training examples seen before the first one, from 0 to 2^62.

        Returns:
            (B, C, H, W) float32 in the data's range.

        Raises:
            InputError: a picture can no longer be read.
        """
        rows = self.indices[indices]
        return self.transform(self.rows.read(rows), rows, first)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set that is split by the seed.

    Attributes:
        name: of the data set, for display.
        shape: of an example, (C, H, W).
        range: the smallest and largest value.
        levels: number of equally spaced values, before uniform noise is added: 256 for 8-bit data, 17 for digits, 2
            after binarization; None for continuous data.
        train: the training examples.
        validation: the examples that choose the best weights.
        test: the examples that are held out to the end.
        split: the record of the split.
        skipped: files that cannot be read, each with the reason.
    """

    name: str
    shape: tuple[int, int, int]
    range: tuple[float, float]
    levels: int | None
    train: Subset
    validation: Subset
    test: Subset
    split: Split
    skipped: tuple[str, ...]

    def quantized(self) -> Dataset:
        """The same examples, rounded to the nearest of 256 levels, as a discretized logistic likelihood needs.

        Raises:
            InputError: they are binarized or dequantized.
        """
        transform = dataclasses.replace(self.train.transform, quantize=True)
        if transform.config.binarize != "none" or transform.config.dequantize:
            raise InputError(
                "train: likelihood 'discretized_logistic' needs data with 256 levels, which binarized or dequantized "
                "data does not have. Choose one of them"
            )
        parts = {
            name: dataclasses.replace(getattr(self, name), transform=transform)
            for name in ("train", "validation", "test")
        }
        return dataclasses.replace(self, levels=_LEVELS, **parts)

    def for_model(self, model: ModelConfig) -> Dataset:
        """These examples, rounded to 256 levels if the model's likelihood needs that.

        Raises:
            InputError: the model's likelihood, range or shape does not fit the data.
        """
        config, likelihood = self.train.transform.config, model.likelihood
        dataset = self.quantized() if likelihood == "discretized_logistic" else self
        if config.dequantize and likelihood == "bernoulli":
            raise InputError(
                "train: dequantized data is continuous, and a Bernoulli likelihood needs 0s and 1s. Use a Gaussian one"
            )
        if config.binarize != "none" and likelihood != "bernoulli":
            raise InputError(
                f"train: binarized data needs likelihood 'bernoulli', got {likelihood!r}: a density of 0s and 1s "
                "has no upper limit"
            )
        if self.range != model.data_range:
            raise InputError(
                f"train: the model expects data in {list(model.data_range)}; {self.name} has {list(self.range)}"
            )
        if self.shape != model.data_shape:
            raise InputError(
                f"train: the model expects examples of shape {model.data_shape}; {self.name} has {self.shape}"
            )
        return dataset


def load(config: DataConfig, seed: int, *, report: Report = lambda message: None, memory: int = 2 << 30) -> Dataset:
    """Open a data set and split it by the seed.

    Args:
        config: the data set and its transforms. `config.spec` is one of

            - `digits`: the 1,797 handwritten digits of 8 × 8 pixels that ship with scikit-learn;
            - `photos`: patches of scikit-learn's two photographs;
            - `mnist:DIR`, `fashion:DIR`: the four IDX files, gzip or not;
            - `cifar10:DIR`: the binary version;
            - `images:DIR`: all pictures in a folder and below it, scaled and cut to one size;
            - `array:FILE.npy`, `array:FILE.npz:KEY`: (N, C, H, W) or (N, H, W) of uint8, bool or floats.
        seed: of the split and of all noise.
        report: called with lines of progress.
        memory: bytes that decoded pictures may take; of more, each is decoded again whenever it is read.

    Raises:
        InputError: the data is unknown, missing, damaged or too small, or options contradict each other.
        BackendError: scikit-learn is needed and not installed.
    """
    config.check()
    raw = formats.read(config, report, memory)
    if raw.skipped:
        some = "; ".join(raw.skipped[:3]) + ("; …" if len(raw.skipped) > 3 else "")
        report(f"warning: {len(raw.skipped)} files could not be read and are skipped: {some}")
    if config.dequantize and raw.levels is None:
        raise InputError(
            f"train: {raw.name} has no levels to dequantize, its values are {raw.dtype}; expected uint8 or bool. "
            "Leave dequantization out"
        )
    transform = Transform(config, seed, raw.levels, quantize=False)
    train, validation, test = (
        Subset(raw.rows, rows, None if raw.labels is None else raw.labels[rows], transform)
        for rows in split_rows(raw, config, seed)
    )
    levels = raw.levels if config.binarize == "none" else 2
    split = Split(
        name=raw.name,
        train=len(train),
        validation=len(validation),
        test=len(test),
        skipped=len(raw.skipped),
        fingerprint=_fingerprint(config, raw),
    )
    return Dataset(
        *(raw.name, raw.shape, config.range, levels, train, validation, test), split=split, skipped=raw.skipped
    )


def split_rows(raw: RawDataset, config: DataConfig, seed: int) -> tuple[Indices, Indices, Indices]:
    """The indices of training, validation and test examples, at least one each.

    Raises:
        InputError: there are too few examples.
    """
    count = len(raw.rows) - raw.test
    needed = 2 if raw.test else 3
    if count < needed:
        raise InputError(
            f"train: {raw.name} has {count} example{'s' * (count != 1)} to train on; expected {needed} or more: "
            f"at least one each for training{' and validation' if raw.test else ', validation and test'}"
            + "".join(f". Skipped: {reason}" for reason in raw.skipped[:3])
        )
    order = noise.permutation(seed, noise.TRAINER, _SPLIT, count)
    held_out = 0 if raw.test else min(max(1, round(config.test * count)), count - 2)
    validation = held_out + min(max(1, round(config.validation * count)), count - held_out - 1)
    test = np.arange(count, count + raw.test) if raw.test else order[:held_out]
    return order[validation:], order[held_out:validation], test


def _fingerprint(config: DataConfig, raw: RawDataset) -> str:
    """SHA-256 over what identifies the data and is cheap to read, without its path."""
    kind, files = config.spec.partition(":")[0], raw.files
    if kind == "array":
        files = ()  # an array is identified by some of its rows, not by its name
    facts = [kind, files, raw.shape, raw.dtype, len(raw.rows), raw.test]
    identity = hashlib.sha256(json.dumps(facts).encode())
    if kind == "array":
        some = np.linspace(0, len(raw.rows) - 1, min(len(raw.rows), _FINGERPRINT_ROWS)).astype(np.intp)
        identity.update(np.ascontiguousarray(raw.rows.read(some)).tobytes())
    return identity.hexdigest()
