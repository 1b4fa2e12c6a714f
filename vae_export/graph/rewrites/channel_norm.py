"""Group normalization without groups in the data's shape: by means of each channel, joined where they are small.

PyTorch's exporter reshapes to groups and back. Whoever keeps the channels of a pixel beside each other, as OpenVINO
does for convolutions, has to reorder the whole image for that, twice. Here a group's mean is the mean of its channels'
means, which a pointwise convolution of one pixel makes, and so is its variance, of what is left when the mean is taken
away: the image keeps its layout, and so do the means.

Requires: the operators of version 18 or later.
Ensures: the same function, but for rounding. Means are taken along one dimension after the other, which keeps sums
short. A batch and sizes that vary stay so.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vae_export.graph.edit import Maker
from vae_export.graph.rewrites import exact_norm, group_norm

_OPSET = 18


def apply(model: onnx_ir.Model) -> int:
    """Rewrite every group normalization of several channels a group; how many there were."""
    graph = model.graph
    if graph.opset_imports.get("", 0) < _OPSET:
        return 0
    found = [norm for norm in group_norm.find(graph) if not norm.nodes or norm.groups < len(norm.scale)]
    for norm in found:
        exact_norm.rewrite(graph, norm, "by_channel", _join)
    if found:
        RemoveUnusedNodesPass()(model)
    return len(found)


def _join(make: Maker, found: group_norm.Found, means: onnx_ir.Value) -> onnx_ir.Value:
    dtype = found.data.dtype
    assert dtype is not None
    assert found.data.shape is not None
    channels, ones = len(found.scale), (1,) * (len(found.data.shape) - 2)
    share = np.full((channels, channels // found.groups, *ones), found.groups / channels, dtype.numpy())
    return make.node("Conv", (means, make.constant("share", share)), {"group": found.groups}, dtype)
