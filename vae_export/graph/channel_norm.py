"""Group normalization without groups in the data's shape: by means of each channel, joined where they are small.

PyTorch's exporter reshapes to groups and back. Whoever keeps the channels of a pixel beside each other, as OpenVINO
does for convolutions, has to reorder the whole image for that, twice. Here a group's mean is the mean of its channels'
means, which a pointwise convolution of one pixel makes, and so is its variance, of what is left when the mean is taken
away: the image keeps its layout.

Requires: the operators of version 18 or later.
Ensures: the same function, but for rounding. Means are taken along one dimension after the other, which keeps sums
short. A batch and sizes that vary stay so.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vae_export.graph import group_norm
from vae_export.graph.edit import Maker, replace

_OPSET = 18


def apply(model: onnx_ir.Model) -> int:
    """Rewrite every group normalization as the exporter writes it; how many there were."""
    graph = model.graph
    if graph.opset_imports.get("", 0) < _OPSET:
        return 0
    found = group_norm.find(graph)
    for match in found:
        _rewrite(graph, match)
    if found:
        RemoveUnusedNodesPass()(model)
    return len(found)


def _rewrite(graph: onnx_ir.Graph, found: group_norm.Found) -> None:
    old, data = found.last.outputs[0], found.data
    dtype = data.dtype
    assert dtype is not None
    assert data.shape is not None
    kind, rank, channels = dtype.numpy(), len(data.shape), len(found.scale)
    make = Maker(graph, found.last, f"{old.name}.by_channel")
    ones = (1,) * (rank - 2)
    share = np.full((channels, channels // found.groups, *ones), found.groups / channels, kind)
    weights = make.constant("share", share)
    scale, shift, epsilon = (
        make.constant(name, array.astype(kind).reshape(1, -1, *ones))
        for name, array in (("scale", found.scale), ("shift", found.shift), ("epsilon", np.array(found.epsilon)))
    )

    def node(operator: str, *inputs: onnx_ir.Value, **attributes: int) -> onnx_ir.Value:
        return make.node(operator, inputs, attributes, dtype)

    def mean(value: onnx_ir.Value) -> onnx_ir.Value:
        for axis in range(rank - 1, 1, -1):
            value = node("ReduceMean", value, make.constant(f"axis.{axis}", np.array([axis])), keepdims=1)
        return node("Conv", value, weights, group=found.groups)

    centred = node("Sub", data, mean(data))
    variance = mean(node("Mul", centred, centred))
    factor = node("Div", scale, node("Sqrt", node("Add", variance, epsilon)))
    result = node("Add", node("Mul", centred, factor), shift)
    result.type, result.shape = old.type, old.shape
    replace(old, result)
