"""Group normalization as short sums of centred values, which keeps the variance of nearly constant pictures.

PyTorch's exporter writes an InstanceNormalization. ONNX Runtime sums a whole group in one row there: mean and variance
of a nearly constant picture are off by hundreds of times what rounding explains. Its GroupNormalization subtracts the
square of the mean from the mean of squares, which is ten times worse again, and up to 15 % slower.

Requires: the operators of version 18 or later.
Ensures: the same function, but for rounding. Means are taken along one dimension after the other, then over a group's
channels; squares are those of centred values. Dynamic batches and sizes stay dynamic. `group_norm.find` finds the
result again.

The exporter applies it to every graph; it is not among `PASSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vae_export.graph import group_norm
from vae_export.graph.edit import Maker, replace
from vae_export.graph.group_norm import GroupNorm

_OPSET = 18
#: Averages the means of channels, (batch, channels, 1, …), over each group; the shape stays.
Join = Callable[[Maker, GroupNorm, onnx_ir.Value], onnx_ir.Value]


def apply(model: onnx_ir.Model) -> int:
    """Rewrite every group normalization of PyTorch's form, in place; return their number."""
    return rewrite(model, [norm for norm in group_norm.find(model.graph) if not norm.nodes], "exact", _join)


def rewrite(model: onnx_ir.Model, norms: Sequence[GroupNorm], form: str, join: Join) -> int:
    """Write normalizations by their centred values, in place.

    Args:
        model: the graph.
        norms: what `group_norm.find` found in it.
        form: a name for the names of new values.
        join: see `Join`; not called where every channel is a group.

    Returns:
        The number of normalizations that were rewritten: 0 where the graph's operators are too old.
    """
    if not norms or model.graph.opset_imports.get("", 0) < _OPSET:
        return 0
    for norm in norms:
        _rewrite(model.graph, norm, form, join)
    RemoveUnusedNodesPass()(model)
    return len(norms)


def _rewrite(graph: onnx_ir.Graph, norm: GroupNorm, form: str, join: Join) -> None:
    old, data = norm.last.outputs[0], norm.data
    dtype = data.dtype
    assert dtype is not None
    assert data.shape is not None
    kind, rank = dtype.numpy(), len(data.shape)
    make = Maker(graph, norm.last, f"{old.name}.{form}")
    ones = (1,) * (rank - 2)
    scale, shift, epsilon = (
        make.constant(label, array.astype(kind).reshape(1, -1, *ones))
        for label, array in (("scale", norm.scale), ("shift", norm.shift), ("epsilon", np.array(norm.epsilon)))
    )

    def node(operator: str, *inputs: onnx_ir.Value) -> onnx_ir.Value:
        return make.node(operator, inputs, None, dtype)

    def mean(value: onnx_ir.Value) -> onnx_ir.Value:
        for axis in range(rank - 1, 1, -1):
            axes = make.constant(f"axis.{axis}", np.array([axis]))
            value = make.node("ReduceMean", (value, axes), {"keepdims": 1}, dtype)
        return value if norm.groups == len(norm.scale) else join(make, norm, value)

    centred = node("Sub", data, mean(data))
    variance = mean(node("Mul", centred, centred))
    factor = node("Div", scale, node("Sqrt", node("Add", variance, epsilon)))
    result = node("Add", node("Mul", centred, factor), shift)
    result.type, result.shape = old.type, old.shape
    replace(old, result)


def _join(make: Maker, norm: GroupNorm, means: onnx_ir.Value) -> onnx_ir.Value:
    channels, dtype = len(norm.scale), norm.data.dtype
    assert norm.data.shape is not None
    assert dtype is not None
    groups = make.constant("groups", np.array([0, norm.groups, -1]))
    axis = make.constant("axis.2", np.array([2]))
    each = make.constant("each", np.array([1, 1, channels // norm.groups]))
    back = make.constant("channels", np.array([0, channels, *[1] * (len(norm.data.shape) - 2)]))
    value = make.node("Reshape", (means, groups), None, dtype)
    value = make.node("ReduceMean", (value, axis), {"keepdims": 1}, dtype)
    return make.node("Reshape", (make.node("Expand", (value, each), None, dtype), back), None, dtype)
