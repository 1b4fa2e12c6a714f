"""16 bits as hardware computes them: a graph in half precision as one in float32 that rounds every value.

ONNX Runtime on the CPU computes most float16 nodes in float32 and omits the roundings between them: it neither rounds
nor overflows where a GPU does. Here each value that is float16 or bfloat16 in the graph is computed in float32 and
rounded by a pair of casts; beyond the range it becomes infinite. Sums within a convolution, a matrix product or a
reduction are in float32, as on GPUs, and their results are rounded.

Requires: a graph as `half.to_half` returns it, or one whose nodes each compute in one type.
Ensures: no node computes in half precision; inputs and outputs keep names, types and shapes.
"""

from __future__ import annotations

import onnx_ir
from onnx_ir import DataType

from vae_export.graph.half import infer_types

_HALVES = {DataType.FLOAT16, DataType.BFLOAT16}
#: Operators whose outputs are among the numbers of their inputs, or their negatives, and so need no rounding.
_MOVES = {
    *("Reshape", "Transpose", "Concat", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand", "Gather", "Flatten"),
    *("Identity", "DepthToSpace", "SpaceToDepth", "Pad", "Tile", "Relu", "Max", "Min", "MaxPool", "Neg", "Abs"),
    *("Clip", "Where"),
}
#: Operators whose output type is an attribute.
_TYPED = {"Cast", "Constant", "ConstantOfShape", "EyeLike"}


def apply(model: onnx_ir.Model) -> int:
    """Apply in place; return the number of values that are rounded."""
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
            half = value.dtype
            if half not in _HALVES:
                continue
            rounded += node.op_type not in _MOVES
            if node.op_type in _TYPED:
                _cast_behind(graph, node, value, DataType.FLOAT)
                continue
            value.type = onnx_ir.TensorType(DataType.FLOAT)
            if node.op_type not in _MOVES:
                rounded_value = _cast_behind(graph, node, value, half)
                cast = rounded_value.producer()
                assert cast is not None
                _cast_behind(graph, cast, rounded_value, DataType.FLOAT)
    return rounded


def _cast_behind(graph: onnx_ir.Graph, node: onnx_ir.Node, value: onnx_ir.Value, to: DataType) -> onnx_ir.Value:
    """Cast a node's output to another type for all its users; return the Cast's output."""
    cast = onnx_ir.node("Cast", [value], {"to": to}, name=f"{value.name}.{to.name.lower()}.cast")
    (result,) = cast.outputs
    result.name, result.shape, result.type = f"{value.name}.{to.name.lower()}", value.shape, onnx_ir.TensorType(to)
    for use in list(value.uses()):
        if use.node is not cast:
            use.node.replace_input_with(use.idx, result)
    graph.insert_after(node, cast)
    return result
