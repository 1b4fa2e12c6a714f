"""Data sets: what to train on and what to hold out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vae_export import noise
from vae_export.errors import InputError, require

_HELD_OUT = 0.2
_SPLIT = (1 << 64) - 1  # the permutation's index: no epoch's


@dataclass(frozen=True)
class DataSet:
    """A data set, split.

    Attributes:
        name: what it is, for people.
        range: the smallest and largest value.
        train: (N, C, H, W) float32.
        held_out: (M, C, H, W) float32, never trained on.
    """

    name: str
    range: tuple[float, float]
    train: npt.NDArray[np.float32]
    held_out: npt.NDArray[np.float32]


def load(spec: str, seed: int) -> DataSet:
    """Load a data set and split it, a fifth held out, by the seed.

    Args:
        spec: `digits`: the 1,797 handwritten digits of 8 × 8 pixels that ship with scikit-learn.
        seed: of the split.

    Raises:
        InputError: the data set is not known.
        BackendError: scikit-learn is not installed.
    """
    if spec != "digits":
        raise InputError(f"train: data set {spec!r} is not known; expected 'digits'")
    datasets = require("sklearn.datasets", "train", "data set 'digits'")
    images = (datasets.load_digits().images / 16.0).astype(np.float32)[:, None]  # (N, 1, 8, 8) in [0, 1]
    order = noise.permutation(seed, noise.TRAINER, _SPLIT, len(images))
    held_out, train = np.split(images[order], [round(_HELD_OUT * len(images))])
    return DataSet("scikit-learn handwritten digits", (0.0, 1.0), train, held_out)
