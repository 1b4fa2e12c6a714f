"""The terms of log p(x|z) as nodes: what `numerics.likelihoods` computes in NumPy.

Requires: x and the decoder's outputs in float32, named as in `contract.model.DECODER_OUTPUTS`.
Ensures: one term for each value of x, in nats, with a relative error of a few roundings: computed in float32 where no
step cancels or leaves float32's range, in float64 otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx_ir

from vae_export.contract.model import Model
from vae_export.graph.nodes import Formula
from vae_export.numerics.elbo import LOG_2PI
from vae_export.numerics.likelihoods import DiscretizedLogistic

_Parameters = Mapping[str, onnx_ir.Value]
_Value = onnx_ir.Value


def log_prob_terms(f: Formula, x: _Value, parameters: _Parameters, model: Model) -> _Value:
    """Append log p(x|z) for each value of x: (batch, *data), float32 or float64.

    Args:
        f: appends to the graph.
        x: the data, (batch, *data) float32.
        parameters: the decoder's outputs by name.
        model: the model, with a likelihood other than `none`.
    """
    return _KINDS[model.likelihood.kind](f, x, parameters, model)


def _bernoulli(f: Formula, x: _Value, parameters: _Parameters, model: Model) -> _Value:
    """The term x · l − log(1 + e^l) as (x − 1) max(l, 0) − x max(−l, 0) − log(1 + e^−|l|).

    All parts have one sign and one of the first two is 0, so float32 suffices. For small u the rounded w = 1 + u has
    lost most of u, which is corrected to first order: log(1 + u) = log(w + r) = log w + r / w + O(r²), where
    r = u − (w − 1) is exact.
    """
    logits = parameters["logits"]
    negated = f("Neg", logits)
    missed = f("Sub", f("Mul", f("Sub", x, 1.0), f("Relu", logits)), f("Mul", x, f("Relu", negated)))
    u = f("Exp", f("Min", logits, negated))
    w = f("Add", u, 1.0)
    lost = f("Sub", u, f("Sub", w, 1.0))
    log1p = f("Add", f("Log", w), f("Div", lost, w))
    return f("Sub", missed, log1p)


def _gaussian(f: Formula, x: _Value, parameters: _Parameters, model: Model) -> _Value:
    """−½ (log 2π + logvar + (x − mean)² / variance).

    In float64: the logarithm and the square may have opposite signs, and exp(−logvar) leaves float32's range early.
    """
    logvar = f.double(parameters["sample_logvar"])
    error = f("Sub", f.double(x), f.double(parameters["sample"]))
    square = f("Mul", f("Mul", error, error), f("Exp", f("Neg", logvar)))
    return f("Mul", f("Add", f("Add", logvar, LOG_2PI), square), -0.5)


def _gaussian_fixed(f: Formula, x: _Value, parameters: _Parameters, model: Model) -> _Value:
    """−½ (log 2π + log variance + (x − mean)² / variance), in float64 for the signs of its parts."""
    variance = model.likelihood.variance
    assert variance is not None  # the manifest's own check
    error = f("Sub", f.double(x), f.double(parameters["sample"]))
    square = f("Mul", f("Mul", error, error), 1.0 / variance)
    return f("Mul", f("Add", square, LOG_2PI + math.log(variance)), -0.5)


def _discretized_logistic(f: Formula, x: _Value, parameters: _Parameters, model: Model) -> _Value:
    """Log of σ(u) − σ(l) at half a step above and below x; the outermost levels take the tails.

    Kingma et al. 2016, appendix; Salimans et al. 2017, eq. 2. As log σ(u) + log σ(−l) + log(1 − e^(l−u)), which does
    not cancel; in float64, because x ± half a step does.
    """
    low, high = model.data.range
    step = (high - low) / (DiscretizedLogistic.LEVELS - 1)
    centered = f("Sub", f.double(x), f.double(parameters["location"]))
    inverse = f("Exp", f("Neg", f.double(parameters["log_scale"])))
    above = _log_sigmoid(f, f("Mul", f("Add", centered, step / 2), inverse))
    below = _log_sigmoid(f, f("Mul", f("Sub", step / 2, centered), inverse))
    # 1 − e^−w = 2t / (1 + t) for t = tanh(½ w): as exact for small w as expm1, which ONNX does not have.
    t = f("Tanh", f("Mul", inverse, step / 2))
    width = f("Log", f("Div", f("Mul", t, 2.0), f("Add", t, 1.0)))
    inside = f("Add", f("Add", above, below), width)
    at_high = f("Greater", x, high - step / 2)
    return f("Where", f("Less", x, low + step / 2), above, f("Where", at_high, below, inside))


def _log_sigmoid(f: Formula, value: _Value) -> _Value:
    """min(v, 0) − log(1 + e^−|v|)."""
    tail = f("Log", f("Add", f("Exp", f("Neg", f("Abs", value))), 1.0))
    return f("Sub", f("Min", value, 0.0), tail)


_KINDS: Mapping[str, Callable[[Formula, _Value, _Parameters, Model], _Value]] = {
    "bernoulli": _bernoulli,
    "gaussian": _gaussian,
    "gaussian_fixed": _gaussian_fixed,
    "discretized_logistic": _discretized_logistic,
}
