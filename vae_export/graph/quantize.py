"""Quantize selected convolutions and matrix products to 8-bit integers.

The activation of each selected node passes through QuantizeLinear and DequantizeLinear, with 256 levels over a measured
range; its weights are integers with a scale for each output channel. Runtimes turn this form into integer kernels.
Biases, and values between the nodes, stay float32.

With VNNI, sums are exact in 32 bits, and weights are from −127 to 127. Without it x86 adds the products of two pairs in
16 bits (vpmaddubsw), which saturate: 2 · 255 · 127 is beyond 32,767. With weights of 7 bits, from −63 to 63, they do
not: 2 · 255 · 63 = 32,130.

Requires: a graph in float32 whose nodes have names, and constant weights.
Ensures: inputs and outputs stay float32 under their names. Zero is one of the levels, so that padding is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir

from vae_export.graph import edit

#: The axis of the weights' output channels, by operator; a transposed convolution must have one group.
_CHANNELS = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1}
_LEVELS = 255
#: The largest integer weight by the number of its bits.
_LARGEST = {8: 127, 7: 63}

Range = tuple[float, float]
#: Bits of the weights: 7 for processors without VNNI.
Bits = Literal[7, 8]


def quantizable(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """The nodes that can be quantized, in the graph's order."""
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
    """Quantize nodes, in place.

    Args:
        model: the graph.
        names: names of nodes among those of `quantizable`.
        ranges: by the name of a node's activation, the lowest and the highest number that it represents.
        bits: bits of the weights.
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
            make = edit.Maker(graph, node, f"{value.name}.int8")
            shared[id(value)] = _activation(make, value, ranges[str(value.name)])
        node.replace_input_with(0, shared[id(value)])
        array = edit.constant(weights)
        assert array is not None
        node.replace_input_with(1, _weights(edit.Maker(graph, node, f"{node.name}.int8"), array, axis, bits))
        edit.drop_unused(graph, [weights])


def levels(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of 256 levels from `low` to `high`, one of which is zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max((high - low) / _LEVELS, float(np.finfo(np.float32).tiny)))
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, _LEVELS))


def _activation(make: edit.Maker, value: onnx_ir.Value, span: Range) -> onnx_ir.Value:
    scale, zero = levels(*span)
    grid = [make.constant("scale", np.asarray(scale)), make.constant("zero", np.asarray(zero))]
    steps = make.node("QuantizeLinear", [value, *grid], dtype=onnx_ir.DataType.UINT8)
    return make.node("DequantizeLinear", [steps, *grid])


def rounded(node: onnx_ir.Node, bits: Bits = 8) -> npt.NDArray[np.float64]:
    """The dequantized weights that a quantizable node would have, in float64."""
    weights, axis = edit.constant(node.inputs[1]), _axis(node)
    assert weights is not None
    assert axis is not None
    steps, scale = _steps(weights, axis, bits)
    result: npt.NDArray[np.float64] = steps * _along(scale.astype(np.float64), axis, weights.ndim)
    return result


def _steps(
    weights: npt.NDArray[np.float32], axis: int, bits: Bits
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Weights as integers, and the scale of each output channel."""
    others = tuple(dim for dim in range(weights.ndim) if dim != axis)
    least, largest = np.finfo(np.float32).tiny, _LARGEST[bits]
    scale = (np.maximum(np.abs(weights).max(axis=others), least * largest) / largest).astype(np.float32)
    steps = np.rint(weights / _along(scale, axis, weights.ndim))
    return np.clip(steps, -largest, largest).astype(np.int8), scale


def _along(values: npt.NDArray[Any], axis: int, rank: int) -> npt.NDArray[Any]:
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def _weights(make: edit.Maker, weights: npt.NDArray[np.float32], axis: int, bits: Bits) -> onnx_ir.Value:
    steps, scale = _steps(weights, axis, bits)
    zero = np.zeros(len(scale), np.int8)
    parts = [make.constant("weight", steps), make.constant("scales", scale), make.constant("zeros", zero)]
    return make.node("DequantizeLinear", parts, {"axis": axis})
