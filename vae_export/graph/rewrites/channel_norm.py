"""Group normalization by means of channels, without reshaping to groups.

PyTorch's exporter reshapes to groups and back. OpenVINO keeps the channels of a pixel adjacent for its convolutions,
and has to reorder the whole image for that, twice. Here a group's mean is the mean of its channels' means, computed by
a pointwise convolution of one pixel, and so is its variance, of centred values: the image keeps its layout, and so do
the means. ONNX Runtime gains nothing.

Requires: the operators of version 18 or later.
Ensures: the same function, but for rounding. Means are taken along one dimension after the other, which keeps sums
short. Dynamic batches and sizes stay dynamic. A norm of one channel a group that has the form of `exact_norm` stays.
"""

from __future__ import annotations

import numpy as np
import onnx_ir

from vae_export.graph import exact_norm, group_norm
from vae_export.graph.edit import Maker
from vae_export.graph.group_norm import GroupNorm


def apply(model: onnx_ir.Model) -> int:
    """Apply in place; return the number of group normalizations that were rewritten."""
    norms = [norm for norm in group_norm.find(model.graph) if not norm.nodes or norm.groups < len(norm.scale)]
    return exact_norm.rewrite(model, norms, "by_channel", _join)


def _join(make: Maker, norm: GroupNorm, means: onnx_ir.Value) -> onnx_ir.Value:
    dtype = norm.data.dtype
    assert dtype is not None
    assert norm.data.shape is not None
    channels, ones = len(norm.scale), (1,) * (len(norm.data.shape) - 2)
    share = np.full((channels, channels // norm.groups, *ones), norm.groups / channels, dtype.numpy())
    return make.node("Conv", (means, make.constant("share", share)), {"group": norm.groups}, dtype)
