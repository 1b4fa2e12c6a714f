"""Convert the convolutions and matrix products of a graph to float16 or bfloat16.

Requires: a graph whose floating-point values are float32.
Ensures: inputs and outputs stay float32 under their names. Convolutions and matrix products, and nodes between them,
are in half precision, and so are their weights. Nodes before the first and after the last of them stay in float32:
scaling of the input, and what turns the last product into parameters of a distribution. So do nodes that lose accuracy
in half precision wherever they are: normalizations, softmax, sums and exponentials. Shapes and integers stay.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vae_export.errors import InputError
from vae_export.graph import group_norm

HalfPrecision = Literal["fp16", "bf16"]

_TYPES = {
    "fp16": (onnx_ir.DataType.FLOAT16, np.dtype(np.float16)),
    "bf16": (onnx_ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
#: Operators with most of the arithmetic.
_HEAVY = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
#: Operators that stay in float32 wherever they are.
_KEPT = {
    *("InstanceNormalization", "GroupNormalization", "LayerNormalization", "BatchNormalization"),
    *("LpNormalization", "RMSNormalization", "Softmax", "LogSoftmax", "Softplus", "Exp", "Log", "Pow", "Sqrt"),
    *("Reciprocal", "Div", "Erf", "ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"),
    *("CumSum", "Einsum", "If", "Scan"),
    # An attribute determines the type of their outputs.
    *("Cast", "Constant", "ConstantOfShape", "EyeLike"),
}
#: Inputs that must be float32 whatever the type of the others: the region of interest and the scales of Resize.
_FLOAT_INPUTS = {"Resize": (1, 2)}
#: The first version of the standard operators in which convolutions take bfloat16.
_BF16_OPSET = 22


def floats(model: onnx_ir.Model) -> list[onnx_ir.Value]:
    """The float32 outputs of the graph's nodes."""
    infer_types(model)
    return [value for node in model.graph for value in node.outputs if value.dtype == onnx_ir.DataType.FLOAT]


def heavy(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """The convolutions and matrix products, in the graph's order."""
    return [node for node in model.graph if node.op_type in _HEAVY]


def to_half(model: onnx_ir.Model, precision: HalfPrecision, name: str, kept: Collection[str] = ()) -> onnx_ir.Model:
    """A graph in half precision. Consumes `model`.

    Args:
        model: a graph in float32.
        precision: `fp16` or `bf16`.
        name: the graph's name in messages.
        kept: names of nodes that stay in float32.

    Raises:
        InputError: a weight is beyond the precision's range.
    """
    if precision == "bf16" and model.opset_imports[""] < _BF16_OPSET:
        newer = onnx.version_converter.convert_version(onnx_ir.to_proto(model), _BF16_OPSET)
        model = onnx_ir.from_proto(newer)
    infer_types(model)
    half, kind = _TYPES[precision]
    graph = model.graph
    norms = {node for norm in group_norm.find(graph) for node in norm.nodes}
    chosen = {node for node in _half_nodes(graph) - norms if node.name not in kept}
    casts: dict[tuple[int, onnx_ir.DataType], onnx_ir.Value] = {}
    for node in list(graph):
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (onnx_ir.DataType.FLOAT, half):
                continue
            reduced = node in chosen and index not in _FLOAT_INPUTS.get(node.op_type, ())
            wanted = half if reduced else onnx_ir.DataType.FLOAT
            if value.dtype == wanted:
                continue
            key = (id(value), wanted)
            if key not in casts:
                casts[key] = _cast(graph, node, value, wanted, kind, name)
            node.replace_input_with(index, casts[key])
        if node in chosen:
            for value in node.outputs:
                if value.dtype == onnx_ir.DataType.FLOAT:
                    value.dtype = half
                    _keep_for_branches(graph, node, value)
    for index, value in enumerate(graph.outputs):
        if value.dtype == half:
            graph.outputs[index] = _output(graph, value)
    RemoveUnusedNodesPass()(model)  # float32 weights that were converted
    return model


def infer_types(model: onnx_ir.Model) -> None:
    """Set the type of every value of the graph."""
    if any(value.dtype is None for node in model.graph for value in node.outputs if value.name):
        typed = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(onnx_ir.to_proto(model)))
        types = {value.name: value.type for node in typed.graph for value in node.outputs}
        for node in model.graph:
            for value in node.outputs:
                value.type = types[value.name]


def _keep_for_branches(graph: onnx_ir.Graph, node: onnx_ir.Node, value: onnx_ir.Value) -> None:
    """Give inner graphs, which stay in float32, a float32 copy of a value in half precision."""
    inner = [use for use in value.uses() if use.node.graph is not graph]
    if inner:
        full = onnx_ir.DataType.FLOAT
        cast = onnx_ir.node("Cast", [value], {"to": full}, name=f"{value.name}.inner.cast")
        cast.outputs[0].name, cast.outputs[0].shape = f"{value.name}.inner", value.shape
        cast.outputs[0].type = onnx_ir.TensorType(full)
        graph.insert_after(node, cast)
        for use in inner:
            use.node.replace_input_with(use.idx, cast.outputs[0])


def _half_nodes(graph: onnx_ir.Graph) -> set[onnx_ir.Node]:
    """Convolutions and matrix products, and nodes between two of them that are not in `_KEPT`."""
    nodes = list(graph)
    behind: set[onnx_ir.Node] = set()  # after a heavy one
    for node in nodes:
        before = (value.producer() for value in node.inputs if value is not None)
        if any(p is not None and (p in behind or p.op_type in _HEAVY) for p in before):
            behind.add(node)
    ahead: set[onnx_ir.Node] = set()  # before a heavy one
    for node in reversed(nodes):
        users = (user.node for value in node.outputs for user in value.uses())
        if any(user in ahead or user.op_type in _HEAVY for user in users):
            ahead.add(node)
    between = behind & ahead
    return {node for node in nodes if node.op_type in _HEAVY or (node in between and node.op_type not in _KEPT)}


def _cast(
    graph: onnx_ir.Graph,
    before: onnx_ir.Node,
    value: onnx_ir.Value,
    dtype: onnx_ir.DataType,
    kind: np.dtype[np.generic],
    name: str,
) -> onnx_ir.Value:
    """A value in another type: a converted weight, or the output of a Cast inserted before its first user."""
    label = f"{value.name}.{dtype.name.lower()}"
    if value.const_value is not None and value.is_initializer():
        weights = value.const_value.numpy()
        with np.errstate(over="ignore"):
            converted = weights.astype(kind)
        if not np.isfinite(converted.astype(np.float32)).all():
            largest, others = "float16 ends at 65504", "bf16 or fp32"
            if dtype == onnx_ir.DataType.BFLOAT16:
                largest, others = "bfloat16 ends at 3.39e+38", "fp32"
            raise InputError(
                f"build: {name}: the weight {value.name} has values up to {np.abs(weights).max():.3g}; {largest}. "
                f"Build with --precision {others}"
            )
        result = onnx_ir.Value(
            name=label, shape=value.shape, type=onnx_ir.TensorType(dtype),
            const_value=onnx_ir.tensor(converted, dtype=dtype, name=label),
        )  # fmt: skip
        graph.register_initializer(result)
        return result
    node = onnx_ir.node("Cast", [value], {"to": dtype}, name=f"{label}.cast")
    node.outputs[0].name, node.outputs[0].shape = label, value.shape
    node.outputs[0].type = onnx_ir.TensorType(dtype)
    graph.insert_before(before, node)
    return node.outputs[0]


def _output(graph: onnx_ir.Graph, value: onnx_ir.Value) -> onnx_ir.Value:
    """A float32 output under the name of one in half precision."""
    name, value.name = value.name, f"{value.name}.lower"
    node = onnx_ir.node("Cast", [value], {"to": onnx_ir.DataType.FLOAT}, name=f"{name}.cast")
    node.outputs[0].name, node.outputs[0].shape = name, value.shape
    node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph.append(node)
    return node.outputs[0]
