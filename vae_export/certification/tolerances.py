"""Tolerances: what a measured deviation from the reference may be, by precision.

float32's follow from the reference's own conditioning, see `rounding_tolerance`; those of lower precisions are in
`TOLERANCES`, in terms of what users of encoder and decoder notice, each with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from vae_export.certification.deviations import unit
from vae_export.certification.golden import Rows
from vae_export.contract.records import Record
from vae_export.numerics.elbo import Float64

#: float32's tolerance in spreads: twice what the runners need, so that another processor's kernels have room
#: (docs/certificate.md has measurements of right and of faulty exports, and the size of faults that are not detected).
SPREADS: Final = 16.0
#: The least spread, in the quantity's unit: a result is itself rounded, by half a unit in the last place at most.
LEAST_SPREAD: Final = 2.0**-24


def rounding_tolerance(quantity: str, rows: Rows) -> Float64:
    """The tolerance of a quantity in float32, for each row, in the same unit as its deviations: (n,) float64.

    It is SPREADS times the row's spread (how far rounding moves it), or that of the median row if that is larger: a
    few draws may agree by chance. A KL divergence is quadratic in the error, and so is its tolerance.
    """
    spread = rows.tensors[f"spread.{quantity}"]
    scale = unit(quantity, rows.tensors)
    least = 0.0 if quantity.split(".")[-1] in ("sigma", "dimension") else LEAST_SPREAD
    relative = np.maximum(spread / scale, max(float(np.median(spread / scale)), least))
    tolerance: Float64 = SPREADS ** (2 if quantity == "encoder.kl.dimension" else 1) * relative * scale
    return tolerance


def output_tolerance(graph: str, rows: Rows) -> float:
    """The tolerance between two computations of a graph's outputs in float32, relative to max|output|.

    Args:
        graph: `encoder`; any other has the tolerance of the decoder's outputs for draws from the prior.
        rows: the golden examples.
    """
    prefix = "spread.encoder." if graph == "encoder" else "spread.prior."
    quantities = [name.removeprefix("spread.") for name in rows.tensors if name.startswith(prefix)]
    shares = [
        float(np.median(rounding_tolerance(name, rows) / unit(name, rows.tensors)))
        for name in quantities
        if name.endswith(".max")
    ]
    return max(shares)


class Tolerance(Record, frozen=True, kw_only=True):
    """The tolerances of a precision below float32, on rows of data.

    Attributes:
        sigma: the error of the posterior's mean, in standard deviations of the posterior; of a deterministic encoder in
            standard deviations of the latent over the data.
        kl: KL(reference ‖ measured) of the worst latent dimension, nats.
        off1: the share of decoded values with an error of more than 1/255 of the data's range.
        off2: likewise of more than 2/255.
        pixel: the largest error of a decoded value, relative to the data's range.
        psnr: the lowest PSNR of the decoded values, dB.
        elbo: the error of the ELBO and of its terms, relative to Σ|ELBO terms|; where the model was trained with its
            likelihood.
    """

    sigma: float
    kl: float
    off1: float
    off2: float
    pixel: float
    psnr: float
    elbo: float


_HALF = Tolerance(sigma=0.05, kl=2e-3, off1=1e-2, off2=1e-3, pixel=8 / 255, psnr=50.0, elbo=1e-3)
_COARSE = Tolerance(sigma=0.25, kl=5e-2, off1=0.5, off2=0.1, pixel=24 / 255, psnr=38.0, elbo=1e-2)

#: By precision. float32 has none: see `rounding_tolerance`.
TOLERANCES: Mapping[str, Tolerance] = {
    # Products are rounded to 10 bits of mantissa (2^-11 = 5e-4 each) and summed in float32; in float16 intermediate
    # results are rounded so, too. An error of the mean of a twentieth of a posterior deviation, 0.00125 nats, is small
    # beside the draw. Nearly all of 255 levels are the same, and the others are not visible.
    "tf32": _HALF,
    "float16": _HALF,
    # 7 bits of mantissa (2^-8 = 4e-3): eight times float16's errors. A quarter of a deviation is 0.03 nats. Errors of
    # several levels side by side become visible first, in flat areas: at 38 dB the RMS error is 3 levels.
    "bfloat16": _COARSE,
    # 256 levels over the range of an activation: half a level is 2^-9 of the range, the same order as bfloat16's.
    "int8": _COARSE,
}

#: The tolerance that applies to a quantity on data below float32, by the last two parts of its id.
JUDGED: Mapping[str, str] = {
    "mean.sigma": "sigma",
    "kl.dimension": "kl",
    "pixel.max": "pixel",
    "pixel.off1": "off1",
    "pixel.off2": "off2",
    "pixel.psnr": "psnr",
}
