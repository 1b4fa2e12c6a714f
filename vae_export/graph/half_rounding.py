"""Evaluate a graph in half precision as hardware does that rounds every value between two nodes.

ONNX Runtime on the CPU computes most nodes of float16 in float32 and leaves out the roundings between them, so that it
finds what a GPU rounds, or overflows. Here each value that the graph has in float16 or bfloat16 is computed in float32
and rounded by a pair of casts: what is beyond the range becomes infinite. Sums inside of a convolution, a product or a
reduction are in float32, as on GPUs, and their results are rounded.

Requires: a graph as `precision.lower` gives it, or one whose nodes each compute in one type.
Ensures: no node computes in half precision; inputs and outputs keep names, types and shapes.
"""

from __future__ import annotations

import onnx_ir
from onnx_ir import DataType

from vae_export.graph.half import infer_types

_HALVES = {DataType.FLOAT16, DataType.BFLOAT16}
#: What gives numbers that it was given, which are rounded already.
_MOVES = {
    *("Reshape", "Transpose", "Concat", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand", "Gather", "Flatten"),
    *("Identity", "DepthToSpace", "SpaceToDepth", "Pad", "Tile", "Relu", "Max", "Min", "MaxPool", "Neg", "Abs"),
    *("Clip", "Where"),
}
#: An attribute says what type these give.
_TYPED = {"Cast", "Constant", "ConstantOfShape", "EyeLike"}


def apply(model: onnx_ir.Model) -> int:
    """Rewrite a graph, in place.

    Returns:
        How many values are rounded.
    """
    infer_types(model)
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.dtype in _HALVES:
            assert value.const_value is not None
            array = value.const_value.numpy().astype(DataType.FLOAT.numpy())
            value.const_value, value.type = onnx_ir.tensor(array, name=value.name), onnx_ir.TensorType(DataType.FLOAT)
    rounded = 0
    for node in list(graph):
        for value in node.outputs:
            low = value.dtype
            if low not in _HALVES:
                continue
            rounded += node.op_type not in _MOVES
            if node.op_type in _TYPED:
                _cast_behind(graph, node, value, DataType.FLOAT)
                continue
            value.type = onnx_ir.TensorType(DataType.FLOAT)
            if node.op_type not in _MOVES:
                half = _cast_behind(graph, node, value, low)
                cast = half.producer()
                assert cast is not None
                _cast_behind(graph, cast, half, DataType.FLOAT)
    return rounded


def _cast_behind(graph: onnx_ir.Graph, node: onnx_ir.Node, value: onnx_ir.Value, to: DataType) -> onnx_ir.Value:
    """What uses a node's value uses it in another type."""
    cast = onnx_ir.node("Cast", [value], {"to": to}, name=f"{value.name}.{to.name.lower()}.cast")
    (result,) = cast.outputs
    result.name, result.shape, result.type = f"{value.name}.{to.name.lower()}", value.shape, onnx_ir.TensorType(to)
    for use in list(value.uses()):
        if use.node is not cast:
            use.node.replace_input_with(use.idx, result)
    graph.insert_after(node, cast)
    return result
