"""More rows than the golden examples, for graphs below float32, with the bundle's graphs in float32 as reference.

The effect of rounding to 10 or 7 bits on a posterior differs between rows by orders of magnitude: a few hundred rows
may contain none of the one in a thousand with a large error. The graphs in float32 are certified, and the tolerances
below float32 are far above their errors; so they are the reference, and give any number of rows without PyTorch and
without a larger file. The rows are the bundle's calibration data, and draws from the prior that are in no golden
example: as latents for the decoder, decoded for the encoder.
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

#: Rows, where a model is cheap. If none of them is out of tolerance, then with 95 % confidence fewer than 3 in 2,000
#: are (the rule of three: Hanley and Lippman-Hand 1983).
_MAX_ROWS = 2000
#: Multiply-adds of encoding and decoding all rows once, and bytes of all rows in and out.
_MAX_WORK, _MAX_BYTES = 3e10, 256 << 20
#: Fewer rows would add little to the golden examples.
_MIN_ROWS = 512
#: Rows that run at once.
BATCH = 64


@dataclass(frozen=True)
class Tail:
    """The rows, and float32's results for them.

    Attributes:
        x: (n, *data): calibration data, then draws from the prior, decoded.
        posterior: for x: `mean` and, where it has a variance, `logvar`: (n, *latent).
        z: (n, *latent): the mode of the calibration data's posterior, then the draws.
        decoded: for z: the decoded mean, (n, *data).
        calibration: number of the first rows, which are calibration data.
    """

    x: Array
    posterior: Mapping[str, Array]
    z: Array
    decoded: Array
    calibration: int

    @property
    def draws(self) -> int:
        """The number of rows that are draws from the prior."""
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
    """Run a bundle's own graphs on more rows than its golden examples.

    Args:
        graphs: its `encoder` and `decoder` in float32, serialized.
        weights: their external weights, by the graph's name.
        model: what they compute.
        costs: of an example in each.
        reference: the golden examples, whose size and seed apply.
        calibration: (m, *data), where m may be 0 and the size another.
        choosing: draw other rows than those of a certificate: rows that a choice was based on say less about it.

    Returns:
        The rows, or the reason why there are none.
    """
    data, latent = reference.tensors["x"].shape[1:], reference.tensors["mean"].shape[1:]
    counted = [cost for cost in costs.values() if cost]
    if len(counted) < len(costs):
        return "more rows than the golden examples: the bundle does not say what an example costs"
    each = sum(cost.at(model.sizes(latent))[0] for cost in counted)
    row_bytes = 4 * (2 * math.prod(data) + 3 * math.prod(latent))
    most = min(_MAX_ROWS, int(_MAX_WORK / max(each, 1)), _MAX_BYTES // row_bytes)
    if most < _MIN_ROWS:
        return (
            f"more rows than the golden examples: an example takes {each / 1e9:,.2g} billion multiply-adds and "
            f"{row_bytes:,} bytes"
        )
    x = stretched(calibration[:most], data) if len(calibration) else np.zeros((0, *data), np.float32)
    draws = most - len(x) if model.has_samples else 0
    if not len(x) + draws:
        return "more rows than the golden examples: there is no calibration data, and the model has no prior"
    first = reference.record.prior + choosing * _MAX_ROWS
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
