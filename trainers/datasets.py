"""Data sets: what to train on, what to hold out, and what is done to examples before a model sees them."""

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
from vae_export.trainers.config import DataConfig, Split

Indices = npt.NDArray[np.intp]
Floats = npt.NDArray[np.float32]

# Addresses in the trainer's stream: a draw for each purpose, so that none meets another whatever the sizes are. The
# draws from the posterior of what is trained on count from 0.
VALIDATION, TEST = 1 << 61, 1 << 62  # the draws from the posterior count from there
_FLIP, _BINARIZE, _DEQUANTIZE = range(1 << 63, (1 << 63) + 3)
_ONCE = 3  # added to a purpose: the noise of a row, drawn once, and not that of a training step
ORDER = (1 << 63) + 6
_SPLIT = (1 << 64) - 1  # an index; of draw 0, as version 0.1.0 had it
_LEVELS = 256
_LOOKED_AT = 64  # rows that are part of what identifies an array
_PARTS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Change:
    """What becomes of stored values before a model sees them.

    Attributes:
        config: says what is done.
        seed: of the noise.
        levels: how many the stored values have; None for floats.
        quantize: round to the nearest of 256 levels.
    """

    config: DataConfig
    seed: int
    levels: int | None
    quantize: bool

    def __call__(self, raw: formats.Array, rows: Indices, first: int | None) -> Floats:
        """Change a batch.

        Args:
            raw: (B, C, H, W), as stored.
            rows: (B,), the examples' indices in the whole data set: addresses of noise that is drawn once.
            first: the number of the first example among all that were ever trained on: the address of noise
                that is drawn anew each time. None draws nothing anew.

        Returns:
            (B, C, H, W) float32 in the range.
        """
        low, high = self.config.range
        if self.config.dequantize:
            # Theis et al. 2016, section 3.1: level k of L becomes uniform in [k, k + 1) / L.
            uniform = self._uniforms(_DEQUANTIZE, raw.shape, rows, first)
            x = (low + (raw + uniform) * ((high - low) / (self.levels or _LEVELS))).astype(np.float32)
        else:
            x = self._values(raw)
        if self.config.binarize != "none":
            anew = first if self.config.binarize == "dynamic" else None
            x = (self._uniforms(_BINARIZE, raw.shape, rows, anew) < x).astype(np.float32)
        if self.config.flip and first is not None:
            # Last, so that an example that was binarized once is mirrored and not binarized again.
            mirrored = noise.words(self.seed, noise.TRAINER, first, len(raw), 1, _FLIP) % 2 == 1
            x = np.where(mirrored[:, :, None, None], x[..., ::-1], x)
        return np.ascontiguousarray(x)

    def _values(self, raw: formats.Array) -> Floats:
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
            uniform[index] = noise.uniforms(self.seed, noise.TRAINER, int(row), 1, size, draw + _ONCE)
        return uniform.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Part:
    """The training, validation or test examples of a data set.

    Attributes:
        rows: the whole data set.
        indices: (N,), which of them are in this part, in this order.
        labels: (N,) int64, where the data set has them.
        change: what becomes of stored values.
    """

    rows: formats.Rows
    indices: Indices
    labels: npt.NDArray[np.int64] | None
    change: Change

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.indices)

    def read(self, indices: Indices) -> Floats:
        """Examples as they are evaluated: the same at each call, whatever is read along with them.

        Args:
            indices: (B,), from 0 to N - 1.

        Returns:
            (B, C, H, W) float32 in the data's range; never flipped; binarized or dequantized once.

        Raises:
            InputError: a picture can no longer be read.
        """
        rows = self.indices[indices]
        return self.change(self.rows.read(rows), rows, None)

    def fixed(self, limit: int) -> Floats | None:
        """All examples, if they are in memory, take no more than `limit` bytes and are trained on as they are read.

        Returns:
            (N, C, H, W) float32 in the data's range, or None.
        """
        config = self.change.config
        drawn = config.flip or config.dequantize or config.binarize == "dynamic"
        if drawn or not isinstance(self.rows, formats.ArrayRows):
            return None
        if 4 * len(self) * math.prod(self.rows.read(self.indices[:1]).shape) > limit:
            return None
        return self.read(np.arange(len(self)))

    def draw(self, indices: Indices, first: int) -> Floats:
        """Examples as they are trained on, with noise that is drawn anew for each of them.

        A slice ``draw(indices[a:b], first + a)`` is that slice of the whole batch.

        Args:
            indices: (B,), from 0 to N - 1.
            first: the number of the first of them among all examples that were ever trained on, from 0 to 2^62.

        Returns:
            (B, C, H, W) float32 in the data's range.

        Raises:
            InputError: a picture can no longer be read.
        """
        rows = self.indices[indices]
        return self.change(self.rows.read(rows), rows, first)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set, split once and for all by the seed.

    Attributes:
        name: what it is, for people.
        shape: of an example, (C, H, W).
        range: the smallest and largest value.
        levels: how many equally spaced values there are, before uniform noise is added: 256 for 8-bit data,
            17 for digits, 2 once binarized; None for continuous data.
        train: what is trained on.
        validation: what chooses the best weights.
        test: what is held out to the end.
        split: the record of it.
        skipped: files that could not be read, each with the reason.
    """

    name: str
    shape: tuple[int, int, int]
    range: tuple[float, float]
    levels: int | None
    train: Part
    validation: Part
    test: Part
    split: Split
    skipped: tuple[str, ...]

    def quantized(self) -> DataSet:
        """The same examples, rounded to the nearest of 256 levels, as a discretized logistic likelihood needs.

        Raises:
            InputError: they are binarized or dequantized.
        """
        change = dataclasses.replace(self.train.change, quantize=True)
        if change.config.binarize != "none" or change.config.dequantize:
            raise InputError(
                "train: likelihood 'discretized_logistic' is of data with 256 levels, which binarized or dequantized "
                "data has not. Choose one of them"
            )
        parts = {name: dataclasses.replace(getattr(self, name), change=change) for name in _PARTS}
        return dataclasses.replace(self, levels=_LEVELS, **parts)


def load(config: DataConfig, seed: int, *, report: formats.Report = lambda message: None) -> DataSet:
    """Open a data set and split it by the seed.

    Args:
        config: which one, and what is done to it. `config.spec` is one of

            - `digits`: the 1,797 handwritten digits of 8 × 8 pixels that ship with scikit-learn;
            - `photos`: patches of the two photographs that do;
            - `mnist:DIR`, `fashion:DIR`: the four IDX files, packed or not;
            - `cifar10:DIR`: the binary version;
            - `images:DIR`: all pictures in a folder and below it, scaled and cut to one size;
            - `array:FILE.npy`, `array:FILE.npz:KEY`: (N, C, H, W) or (N, H, W) of uint8, bool or floats.
        seed: of the split and of all noise.
        report: is told how reading goes on.

    Raises:
        InputError: the data is not known, not there, damaged or too little, or options contradict each other.
        BackendError: scikit-learn is needed and not installed.
    """
    config.check()
    found = formats.find(config, report)
    if config.dequantize and found.levels is None:
        raise InputError(
            f"train: {found.name} has no levels to dequantize, its values are {found.dtype}; expected uint8 or bool. "
            "Leave dequantization out"
        )
    change = Change(config, seed, found.levels, quantize=False)
    train, validation, test = (
        Part(found.rows, rows, None if found.labels is None else found.labels[rows], change)
        for rows in _split(found, config, seed)
    )
    levels = found.levels if config.binarize == "none" else 2
    split = Split(
        name=found.name,
        train=len(train),
        validation=len(validation),
        test=len(test),
        skipped=len(found.skipped),
        fingerprint=_fingerprint(config, found),
    )
    return DataSet(
        *(found.name, found.shape, config.range, levels, train, validation, test),
        split=split,
        skipped=found.skipped,
    )


def _split(found: formats.Found, config: DataConfig, seed: int) -> tuple[Indices, Indices, Indices]:
    """The rows of training, validation and test: shares of all rows, at least one each."""
    count = len(found.rows) - found.test
    needed = 2 if found.test else 3
    if count < needed:
        raise InputError(
            f"train: {found.name} has {count} example{'s' * (count != 1)} to train on; expected {needed} or more: "
            f"one each to train on, to validate {'with' if found.test else 'and to test with'}"
            + "".join(f". Skipped: {reason}" for reason in found.skipped[:3])
        )
    order = noise.permutation(seed, noise.TRAINER, _SPLIT, count)
    held_out = 0 if found.test else min(max(1, round(config.test * count)), count - 2)
    validation = held_out + min(max(1, round(config.validation * count)), count - held_out - 1)
    test = np.arange(count, count + found.test) if found.test else order[:held_out]
    return order[validation:], order[held_out:validation], test


def _fingerprint(config: DataConfig, found: formats.Found) -> str:
    """SHA-256 over what identifies the data at no cost. Where it lies is no part of that."""
    kind, files = config.spec.partition(":")[0], found.files
    if kind == "array":
        files = ()  # its name is no part of it: its rows are looked at
    facts = [kind, files, found.shape, found.dtype, len(found.rows), found.test]
    identity = hashlib.sha256(json.dumps(facts).encode())
    if kind == "array":
        some = np.linspace(0, len(found.rows) - 1, min(len(found.rows), _LOOKED_AT)).astype(np.intp)
        identity.update(np.ascontiguousarray(found.rows.read(some)).tobytes())
    return identity.hexdigest()
