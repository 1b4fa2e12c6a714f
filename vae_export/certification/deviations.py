"""Deviations of results from a reference's: one number for each example and quantity.

The same functions measure an exported graph, PyTorch in float32, and the reference itself under perturbation by half a
unit in the last place; so the effect of rounding on a quantity and that of an export are comparable numbers.

Quantities have stable ids, `ROWS.WHAT.HOW`:

| id | value, for each example |
|---|---|
| `encoder.OUTPUT.max` | the largest absolute error of an output of the encoder |
| `encoder.mean.sigma` | the largest error of the mean, in standard deviations of the posterior; for a deterministic \
encoder in standard deviations of the latent over the data |
| `encoder.kl.dimension` | KL(reference ‖ measured) of the worst latent dimension, nats |
| `prior.OUTPUT.max` | the largest absolute error of an output of the decoder, on draws from the prior |
| `decoder.OUTPUT.max` | the same, on latents of data |
| `end_to_end.sample.max` | the same of the decoded mean, of data that are encoded, sampled and decoded |
| `….pixel.max`, `.off1`, `.off2`, `.mse` | of the decoded mean relative to the data's range: the largest error, the \
shares of values with errors of more than 1/255 and 2/255, the mean squared error |
| `elbo.bound.max`, `elbo.reconstruction.max`, `elbo.kl.max` | the absolute error of the ELBO and of its terms, nats |
| `prior.picture.max` | the largest error of a byte of pictures, in levels of 255 |
| `splits.max` | not for each example: the largest difference between batch sizes, relative to the largest output |
| `tail.WHAT.HOW` | below float32, the quantities on data that have tolerances, on many more rows: see `tail` |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vae_export.contract.model import DECODER_OUTPUTS, ENCODER_OUTPUTS, Model
from vae_export.numerics import elbo
from vae_export.numerics.elbo import Array, Float64

if TYPE_CHECKING:
    from vae_export.runtimes.posterior import Posterior

Outputs = Mapping[str, Array]
Deviations = dict[str, Float64]

#: The ids of the checks of a fused graph that gives pictures, and of splits of a batch.
PICTURE, SPLIT = "prior.picture.max", "splits.max"
#: One level of 8-bit pictures, relative to the data's range.
LEVEL = 1 / 255
_TINY = 1e-30


def conditioned(model: Model) -> tuple[str, ...]:
    """The ids of quantities with a spread, how far rounding moves them, from which their float32 tolerance follows."""
    ids = [f"encoder.{name}.max" for name in ENCODER_OUTPUTS[model.posterior.kind]]
    if model.posterior.kind == "diagonal_gaussian":
        ids += ["encoder.mean.sigma", "encoder.kl.dimension"]
    ids += [f"prior.{name}.max" for name in DECODER_OUTPUTS[model.likelihood.kind]]
    ids.append("end_to_end.sample.max")
    if model.has_elbo:
        ids += ["elbo.bound.max", "elbo.reconstruction.max", "elbo.kl.max"]
    return tuple(ids)


def encoded(reference: Outputs, measured: Outputs, latent_std: Array | None = None) -> Deviations:
    """Deviations of the encoder's outputs.

    Args:
        reference: `mean` and, where the posterior has a variance, `logvar`: (n, *latent).
        measured: the same.
        latent_std: for a deterministic encoder the standard deviation of each latent over the data, which broadcasts
            with the mean; None leaves `encoder.mean.sigma` out.
    """
    result = {f"encoder.{name}.max": largest(measured[name], value) for name, value in reference.items()}
    error = np.abs(np.asarray(measured["mean"], np.float64) - reference["mean"])
    if "logvar" not in reference:
        if latent_std is not None:
            result["encoder.mean.sigma"] = _row_max(error / latent_std)
        return result
    logvar = reference["logvar"]
    result["encoder.mean.sigma"] = _row_max(error * np.exp(-0.5 * logvar))
    terms = elbo.kl_between_terms(reference["mean"], logvar, measured["mean"], measured["logvar"])
    result["encoder.kl.dimension"] = _row_max(terms)
    return result


def posterior_of(encoded: Posterior) -> Outputs:
    """The outputs of a runtime's encoder, by the names of `model.ENCODER_OUTPUTS`."""
    return {"mean": encoded.mean} | ({} if encoded.logvar is None else {"logvar": encoded.logvar})


def decoded(rows: str, reference: Outputs, measured: Outputs, model: Model) -> Deviations:
    """Deviations of the decoder's outputs, for those in `measured`.

    Args:
        rows: the ids' first part: `prior`, `decoder` or `end_to_end`.
        reference: (n, *data) by the names of `model.DECODER_OUTPUTS`.
        measured: all or some of the same.
        model: whose data's range is that of the pixels.
    """
    result = {f"{rows}.{name}.max": largest(value, reference[name]) for name, value in measured.items()}
    if "sample" in measured:
        low, high = model.data.range
        error = np.abs(np.asarray(measured["sample"], np.float64) - reference["sample"]) / (high - low)
        error = error.reshape(len(error), -1)
        result[f"{rows}.pixel.max"] = error.max(axis=1)
        result[f"{rows}.pixel.off1"] = (error > LEVEL).mean(axis=1)
        result[f"{rows}.pixel.off2"] = (error > 2 * LEVEL).mean(axis=1)
        result[f"{rows}.pixel.mse"] = np.square(error).mean(axis=1)
    return result


def terms(reference: Outputs, reconstruction: Array, kl: Array) -> Deviations:
    """Deviations of the ELBO's terms, nats.

    Args:
        reference: `reconstruction` and `kl`, (n,).
        reconstruction: log p(x|z), (n,).
        kl: KL(q(z|x) ‖ p(z)), (n,).
    """
    bound = (reconstruction - kl) - (reference["reconstruction"] - reference["kl"])
    return {
        "elbo.bound.max": np.abs(bound),
        "elbo.reconstruction.max": np.abs(reconstruction - reference["reconstruction"]),
        "elbo.kl.max": np.abs(kl - reference["kl"]),
    }


def unit(quantity: str, tensors: Outputs) -> Float64 | float:
    """What a quantity's errors are relative to: max|reference|, Σ|ELBO terms| of each row, or 1 where it has a unit.

    Args:
        quantity: an id.
        tensors: the golden examples that it was measured on.
    """
    rows, what, how = quantity.split(".")
    if rows == "elbo":
        return np.asarray(tensors["scale"], np.float64)
    if how != "max" or what in ("pixel", "picture"):
        return 1.0
    values = tensors[f"prior.{what}" if rows == "prior" else what]
    return max(float(np.abs(values).max()), _TINY)


def largest(measured: npt.NDArray[Any], reference: npt.NDArray[Any]) -> Float64:
    """The largest absolute error of each row: (n, …) → (n,). NaN and infinity are kept."""
    return _row_max(np.abs(np.asarray(measured, np.float64) - reference))


def _row_max(values: Array) -> Float64:
    worst: Float64 = values.reshape(len(values), -1).max(axis=1)
    return worst
