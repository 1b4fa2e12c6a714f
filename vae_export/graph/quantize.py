"""Compute chosen convolutions and matrix products in 8-bit integers.

Each chosen node takes its activation through QuantizeLinear and DequantizeLinear, 256 levels over a range that was
measured, and its weights as integers with a scale for each output channel: the form that runtimes turn into integer
kernels. Biases, and what is between the nodes, stay float32.

With VNNI, sums are exact in 32 bits, and weights are from −127 to 127. Without it x86 adds the products of two pairs in
16 bits (vpmaddubsw), which saturate: 2 · 255 · 127 is beyond 32,767. With weights of 7 bits, from −63 to 63, they do
not: 2 · 255 · 63 = 32,130.

Requires: a graph in float32 whose nodes have names; weights that are constants.
Ensures: inputs and outputs stay float32 under their names. Zero is one of the levels, so that padded zeros are exact.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir

from vae_export.graph import edit

#: Where the weights have their output channels; of a transposed convolution with one group.
_CHANNELS = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1}
_LEVELS = 255
#: The largest weight by the number of its bits.
_LARGEST = {8: 127, 7: 63}

Range = tuple[float, float]
#: Of the weights: 7 where the processor has no VNNI.
Bits = Literal[7, 8]


def quantizable(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """The nodes that can be computed in integers, in the graph's order."""
    return [node for node in model.graph if _axis(node) is not None]


def _axis(node: onnx_ir.Node) -> int | None:
    weights = edit.constant(node.inputs[1]) if node.op_type in _CHANNELS else None
    if weights is None or weights.dtype != np.float32 or node.inputs[0] is None:
        return None
    if node.op_type == "Gemm":
        plain = edit.integer(node, "transA", 0) == 0 and all(
            node.attributes[name].as_float() == 1.0 for name in ("alpha", "beta") if name in node.attributes
        )
        return (0 if edit.integer(node, "transB", 0) else 1) if plain else None
    if node.op_type == "MatMul":
        return 1 if weights.ndim == 2 else None
    if node.op_type == "ConvTranspose" and edit.integer(node, "group", 1) != 1:
        return None
    return _CHANNELS[node.op_type]


def apply(model: onnx_ir.Model, names: Collection[str], ranges: Mapping[str, Range], bits: Bits = 8) -> None:
    """Rewrite nodes, in place.

    Args:
        model: a graph.
        names: of nodes that `quantizable` gave.
        ranges: by the name of a value, the lowest and the highest number that is to be told apart.
        bits: of the weights.
    """
    graph = model.graph
    shared: dict[int, onnx_ir.Value] = {}
    for node in quantizable(model):
        if node.name not in names:
            continue
        value, weights, axis = node.inputs[0], node.inputs[1], _axis(node)
        assert value is not None
        assert weights is not None
        assert axis is not None
        if id(value) not in shared:
            shared[id(value)] = _activation(
                edit.Maker(graph, node, f"{value.name}.int8"), value, ranges[str(value.name)]
            )
        node.replace_input_with(0, shared[id(value)])
        array = edit.constant(weights)
        assert array is not None
        node.replace_input_with(1, _weights(edit.Maker(graph, node, f"{node.name}.int8"), array, axis, bits))
        edit.drop_unused(graph, [weights])


def levels(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of 256 levels from low to high, of which one is zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max((high - low) / _LEVELS, float(np.finfo(np.float32).tiny)))
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, _LEVELS))


def _activation(made: edit.Maker, value: onnx_ir.Value, span: Range) -> onnx_ir.Value:
    scale, zero = levels(*span)
    ends = [made.constant("scale", np.asarray(scale)), made.constant("zero", np.asarray(zero))]
    steps = made.node("QuantizeLinear", [value, *ends], dtype=onnx_ir.DataType.UINT8)
    return made.node("DequantizeLinear", [steps, *ends])


def rounded(node: onnx_ir.Node, bits: Bits = 8) -> npt.NDArray[np.float64]:
    """The weights that a quantizable node would have."""
    weights, axis = edit.constant(node.inputs[1]), _axis(node)
    assert weights is not None
    assert axis is not None
    steps, scale = _steps(weights, axis, bits)
    result: npt.NDArray[np.float64] = steps * _along(scale.astype(np.float64), axis, weights.ndim)
    return result


def _steps(
    weights: npt.NDArray[np.float32], axis: int, bits: Bits
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Weights as integers, and what one step is worth in each output channel."""
    others = tuple(dim for dim in range(weights.ndim) if dim != axis)
    least, largest = np.finfo(np.float32).tiny, _LARGEST[bits]
    scale = (np.maximum(np.abs(weights).max(axis=others), least * largest) / largest).astype(np.float32)
    steps = np.rint(weights / _along(scale, axis, weights.ndim))
    return np.clip(steps, -largest, largest).astype(np.int8), scale


def _along(values: npt.NDArray[Any], axis: int, rank: int) -> npt.NDArray[Any]:
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def _weights(made: edit.Maker, weights: npt.NDArray[np.float32], axis: int, bits: Bits) -> onnx_ir.Value:
    steps, scale = _steps(weights, axis, bits)
    zero = np.zeros(len(scale), np.int8)
    parts = [made.constant("weight", steps), made.constant("scales", scale), made.constant("zeros", zero)]
    return made.node("DequantizeLinear", parts, {"axis": axis})
