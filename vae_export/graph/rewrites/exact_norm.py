"""Group normalization in a form whose sums are short and whose variance is of what is left without the mean.

PyTorch's exporter writes an InstanceNormalization. ONNX Runtime sums a whole group in one row there, by which the mean
and the variance of a nearly constant picture are off by hundreds of times what rounding explains; its
GroupNormalization takes the mean of squares less the square of the mean, which is worse by another order.

Requires: the operators of version 18 or later.
Ensures: the same function, but for rounding. Means are taken along one dimension after the other, then over a group's
channels; squares are those of centred values. A batch and sizes that vary stay so. `match` finds what is written.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vae_export.graph.edit import FLOATING, Maker, constant, replace
from vae_export.graph.rewrites import group_norm

_OPSET = 18
#: Makes of the means of channels, (batch, channels, 1, …), those of their groups, in the same shape.
Join = Callable[[Maker, group_norm.Found, onnx_ir.Value], onnx_ir.Value]


def apply(model: onnx_ir.Model) -> int:
    """Rewrite every group normalization as the exporter writes it; how many there were."""
    graph = model.graph
    if graph.opset_imports.get("", 0) < _OPSET:
        return 0
    found = [norm for norm in group_norm.find(graph) if not norm.nodes]
    for norm in found:
        rewrite(graph, norm, "exact", _join)
    if found:
        RemoveUnusedNodesPass()(model)
    return len(found)


def rewrite(graph: onnx_ir.Graph, found: group_norm.Found, name: str, join: Join) -> None:
    """Write a normalization by its centred values.

    Args:
        graph: has it.
        found: the normalization.
        name: of the form, for the names of its values.
        join: see `Join`; it is not called for groups of one channel.
    """
    old, data = found.last.outputs[0], found.data
    dtype = data.dtype
    assert dtype is not None
    assert data.shape is not None
    kind, rank = dtype.numpy(), len(data.shape)
    make = Maker(graph, found.last, f"{old.name}.{name}")
    ones = (1,) * (rank - 2)
    scale, shift, epsilon = (
        make.constant(label, array.astype(kind).reshape(1, -1, *ones))
        for label, array in (("scale", found.scale), ("shift", found.shift), ("epsilon", np.array(found.epsilon)))
    )

    def node(operator: str, *inputs: onnx_ir.Value) -> onnx_ir.Value:
        return make.node(operator, inputs, None, dtype)

    def mean(value: onnx_ir.Value) -> onnx_ir.Value:
        for axis in range(rank - 1, 1, -1):
            axes = make.constant(f"axis.{axis}", np.array([axis]))
            value = make.node("ReduceMean", (value, axes), {"keepdims": 1}, dtype)
        return value if found.groups == len(found.scale) else join(make, found, value)

    centred = node("Sub", data, mean(data))
    variance = mean(node("Mul", centred, centred))
    factor = node("Div", scale, node("Sqrt", node("Add", variance, epsilon)))
    result = node("Add", node("Mul", centred, factor), shift)
    result.type, result.shape = old.type, old.shape
    replace(old, result)


def _join(make: Maker, found: group_norm.Found, means: onnx_ir.Value) -> onnx_ir.Value:
    channels, dtype = len(found.scale), found.data.dtype
    assert found.data.shape is not None
    assert dtype is not None
    groups = make.constant("groups", np.array([0, found.groups, -1]))
    axis, each = (
        make.constant("axis.2", np.array([2])),
        make.constant("each", np.array([1, 1, channels // found.groups])),
    )
    back = make.constant("channels", np.array([0, channels, *[1] * (len(found.data.shape) - 2)]))
    value = make.node("Reshape", (means, groups), None, dtype)
    value = make.node("ReduceMean", (value, axis), {"keepdims": 1}, dtype)
    return make.node("Reshape", (make.node("Expand", (value, each), None, dtype), back), None, dtype)


def match(last: onnx_ir.Node) -> group_norm.Found | None:
    """A normalization in this form, by the node that gives its result; or None."""
    nodes = [last]

    def before(node: onnx_ir.Node, operator: str, index: int = 0) -> onnx_ir.Node | None:
        """What gives a node's input, if it is of this operator."""
        value = node.inputs[index]
        producer = None if value is None else value.producer()
        if producer is None or producer.domain or producer.op_type != operator:
            return None
        nodes.append(producer)
        return producer

    if last.domain or last.op_type != "Add" or (scaled := before(last, "Mul")) is None:
        return None
    centred, factor = before(scaled, "Sub"), before(scaled, "Div", 1)
    root = None if factor is None else before(factor, "Sqrt", 1)
    with_epsilon = None if root is None else before(root, "Add")
    if centred is None or factor is None or with_epsilon is None:
        return None
    data = centred.inputs[0]
    if data is None or data.dtype not in FLOATING or data.shape is None or len(data.shape) < 3:
        return None
    scale, shift = constant(factor.inputs[0]), constant(last.inputs[1])
    epsilon, channels, rank = constant(with_epsilon.inputs[1]), data.shape[1], len(data.shape)
    if scale is None or shift is None or epsilon is None or epsilon.size != 1 or not isinstance(channels, int):
        return None
    if not scale.size == shift.size == channels or not scale.shape == shift.shape == (1, channels, *[1] * (rank - 2)):
        return None

    def mean(value: onnx_ir.Value | None) -> tuple[onnx_ir.Value | None, int]:
        """What a mean is taken of, and over how many groups; 0 where it is no such mean."""
        groups = channels
        producer = None if value is None else value.producer()
        if producer is not None and producer.op_type == "Reshape":
            nodes.append(producer)
            spread = before(producer, "Expand")
            joined = None if spread is None else before(spread, "ReduceMean")
            grouped = None if joined is None else before(joined, "Reshape")
            sizes = None if grouped is None else constant(grouped.inputs[1])
            if joined is None or grouped is None or sizes is None or len(sizes) != 3 or not _over(joined, 2):
                return None, 0
            groups, value = int(sizes[1]), grouped.inputs[0]
            if sizes.tolist() != [0, groups, -1] or groups < 1 or channels % groups:
                return None, 0
        for axis in range(2, rank):
            producer = None if value is None else value.producer()
            if producer is None or producer.op_type != "ReduceMean" or not _over(producer, axis):
                return None, 0
            nodes.append(producer)
            value = producer.inputs[0]
        return value, groups

    of_data, groups = mean(centred.inputs[1])
    squares, same = mean(with_epsilon.inputs[0])
    square = None if squares is None else squares.producer()
    if of_data is not data or same != groups or square is None or square.op_type != "Mul":
        return None
    if not square.inputs[0] is square.inputs[1] is centred.outputs[0]:
        return None
    nodes.append(square)
    return group_norm.Found(
        data, last, groups, float(epsilon.reshape(())), scale.reshape(-1), shift.reshape(-1), tuple(nodes)
    )


def _over(node: onnx_ir.Node, axis: int) -> bool:
    """Whether a ReduceMean is taken along this axis alone, and keeps it."""
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return axes is not None and axes.tolist() == [axis] and node.attributes.get_int("keepdims", 1) == 1
