"""More rows than the golden examples for what computes below float32, beside the bundle's own graphs in float32.

What rounding to 10 or 7 bits does to a posterior differs from row to row by orders of magnitude: a few hundred rows may
hold none of the one in a thousand that is far off. The graphs in float32 are certified, and what is tolerated below
float32 is far above what they are off by; so they are the reference, and any number of rows can be had of them without
PyTorch and without a larger file. The rows are the bundle's calibration data, and draws from the prior that no golden
example is made of: by themselves for the decoder, decoded for the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vae_export.certification.deviations import posterior_of
from vae_export.certification.golden import Reference, stretched
from vae_export.contract.model import Cost, Model
from vae_export.contract.onnx_guard import Weights
from vae_export.errors import BackendError
from vae_export.numerics import noise
from vae_export.runtimes import VAE, open_backend

Array = npt.NDArray[np.float32]

#: Rows, where a model is cheap. If none of so many is beyond a tolerance, then at 95 % fewer than 3 of 2,000 are (the
#: rule of three: Hanley and Lippman-Hand 1983).
_MOST = 2000
#: Multiply-adds of encoding and decoding all rows once, bytes of all rows in and out, and the rows below which they
#: would tell little that the golden examples do not.
_WORK, _HELD, _FEWEST = 3e10, 256 << 20, 512
#: Rows that run at once.
BATCH = 64


@dataclass(frozen=True)
class Tail:
    """The rows, and what float32 gives for them.

    Attributes:
        x: (n, *data): calibration data, then draws from the prior, decoded.
        posterior: for x: `mean` and, where it has a variance, `logvar`: (n, *latent).
        z: (n, *latent): the mode of the calibration data's posterior, then the draws.
        decoded: for z: the decoded mean, (n, *data).
        calibration: how many of the rows, the first ones, are calibration data.
    """

    x: Array
    posterior: Mapping[str, Array]
    z: Array
    decoded: Array
    calibration: int

    @property
    def draws(self) -> int:
        """How many of the rows are draws from the prior."""
        return len(self.x) - self.calibration


def make(
    graphs: Mapping[str, bytes],
    weights: Mapping[str, Weights],
    model: Model,
    costs: Mapping[str, Cost | None],
    reference: Reference,
    calibration: Array,
    *,
    choosing: bool = False,
) -> Tail | str:
    """Run a bundle's own graphs on more rows than it has golden examples of.

    Args:
        graphs: its `encoder` and `decoder` in float32, serialized.
        weights: those that lie beside them, by the graph's name.
        model: what they compute.
        costs: of an example in each.
        reference: the golden examples, whose size and seed are taken.
        calibration: (m, *data), where m may be 0 and the size another.
        choosing: draw others than those that a certificate is measured on: rows that a choice was made by tell less
            of it than rows that it has not seen.

    Returns:
        Why there are no more rows, in words, where there are none.
    """
    data, latent = reference.tensors["x"].shape[1:], reference.tensors["mean"].shape[1:]
    counted = [cost for cost in costs.values() if cost]
    if len(counted) < len(costs):
        return "more rows than the golden examples: the bundle does not say what an example costs"
    each = sum(cost.at(model.sizes(latent))[0] for cost in counted)
    row_bytes = 4 * (2 * math.prod(data) + 3 * math.prod(latent))
    most = min(_MOST, int(_WORK / max(each, 1)), _HELD // row_bytes)
    if most < _FEWEST:
        return (
            f"more rows than the golden examples: an example takes {each / 1e9:,.2g} billion multiply-adds and "
            f"{row_bytes:,} bytes"
        )
    x = stretched(calibration[:most], data) if len(calibration) else np.zeros((0, *data), np.float32)
    draws = most - len(x) if model.has_samples else 0
    if not len(x) + draws:
        return "more rows than the golden examples: there is no calibration data, and the model has no prior"
    first = reference.record.prior + choosing * _MOST
    z = noise.normals(reference.record.seed, noise.PRIOR, first, draws, math.prod(latent))
    z = z.reshape(draws, *latent)
    try:
        backend = open_backend(graphs, model, device="cpu", weights=weights)
    except BackendError as error:
        return f"more rows than the golden examples: {' '.join(str(error).split())}"
    with VAE(model, backend, micro_batch=BATCH) as vae:
        sampled = vae.decode(z) if draws else np.zeros((0, *data), np.float32)
        finite = np.isfinite(sampled.reshape(draws, math.prod(data))).all(axis=1)  # others are no reference
        z, sampled = z[finite], sampled[finite]
        x = np.clip(np.concatenate([x, sampled]), *model.data.range)
        posterior = vae.encode(x)
        outputs = posterior_of(posterior)
        count = len(x) - len(z)
        decoded = np.concatenate([vae.decode(posterior.mean[:count]), sampled]) if count else sampled
        z = np.concatenate([posterior.mean[:count], z])
    return Tail(x, outputs, z, decoded, count)
