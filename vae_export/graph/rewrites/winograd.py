"""Convolutions of 3 × 3 and many channels with 2.25 times fewer products: Winograd's F(2 × 2, 3 × 3).

A tile of 2 × 2 outputs reads a tile d of 4 × 4 pixels. With the kernel g they are Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A: 16
multiplications in place of 36 (Lavin, Gray: Fast Algorithms for Convolutional Neural Networks, 2016). Here each of the
16 planes of Bᵀ d B is a depthwise convolution with stride 2 and kernels of 0, 1 and −1, the product over the channels a
pointwise convolution by weights that are transformed beforehand, and Aᵀ … A are sums of planes, whose four pixels are
interleaved.

Requires: the operators of version 15 or later; constant float32 weights; 3 × 3 kernels with stride 1 and one zero
around, no groups, and so many channels that the saved products outweigh the transforms.
Ensures: the same function, but for rounding: weights are transformed in float64 and rounded once. Images of odd sizes
are padded with zeros, which only outputs read that are cut off again. Weights take 16/9 of their memory.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir

from vae_export.graph import edit

#: Fewest input and output channels for which transforms cost less than they save, measured: at 128 they cost more.
CHANNELS = 256
#: The first version in which Shape takes a part of a shape.
_OPSET = 15

_G = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]])
_B = np.array([[1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, -1.0, 1.0, 0.0], [0.0, 1.0, 0.0, -1.0]])


def apply(model: onnx_ir.Model, channels: int = CHANNELS) -> int:
    """Apply in place to convolutions with so many channels; return the number of convolutions that were rewritten."""
    if model.graph.opset_imports.get("", 0) < _OPSET:
        return 0
    return edit.rewrite(model, "Conv", functools.partial(_rewrite, channels))


def _rewrite(channels: int, graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    image, weights = node.inputs[0], edit.constant(node.inputs[1])
    if image is None or weights is None or weights.dtype != np.float32 or weights.shape[2:] != (3, 3):
        return False
    plain = edit.ints(node, "strides", [1, 1]) == edit.ints(node, "dilations", [1, 1]) == [1, 1]
    if not plain or edit.pads(node, 2) != [1] * 4 or edit.integer(node, "group", 1) != 1:
        return False
    outputs, inputs = weights.shape[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    added = np.zeros(outputs, np.float32) if bias is None else edit.constant(bias)
    if min(outputs, inputs) < channels or added is None:
        return False
    transformed = np.einsum("ik,ockl,jl->ijoc", _G, weights.astype(np.float64), _G)
    old = node.outputs[0]
    make = edit.Maker(graph, node, f"{old.name}.winograd")

    def product(row: int, column: int) -> onnx_ir.Value:
        """One of the 16 planes of Bᵀ d B, (batch, inputs, tiles, tiles), times its weights."""
        name = f"{row}{column}"
        kernel = np.tile(np.multiply.outer(_B[row], _B[column])[None, None], (inputs, 1, 1, 1)).astype(np.float32)
        attributes = {"group": inputs, "strides": [2, 2], "pads": [1, 1, 2, 2], "kernel_shape": [4, 4]}
        plane = make.node("Conv", [image, make.constant(f"plane.{name}", kernel)], attributes)
        shared = transformed[row, column, :, :, None, None].astype(np.float32)
        return make.node("Conv", [plane, make.constant(f"weight.{name}", shared)], {"kernel_shape": [1, 1]})

    def joined(four: list[onnx_ir.Value]) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """The two rows of Aᵀ: a + b + c and b − c − d."""
        first, second, third, fourth = four
        even = make.node("Add", [first, make.node("Add", [second, third])])
        return even, make.node("Sub", [make.node("Sub", [second, third]), fourth])

    columns = [joined([product(row, column) for row in range(4)]) for column in range(4)]
    pixels = [pixel for half in range(2) for pixel in joined([column[half] for column in columns])]
    four = make.node("Concat", pixels, {"axis": 1})
    shift = make.constant("bias", np.tile(added, 4).reshape(1, -1, 1, 1))
    whole = make.node("DepthToSpace", [make.node("Add", [four, shift])], {"blocksize": 2, "mode": "DCR"})
    sizes = make.node("Shape", [image], {"start": 2}, onnx_ir.DataType.INT64)
    begin, axes = make.constant("begin", np.zeros(2, np.int64)), make.constant("axes", np.array([2, 3]))
    edit.replace_node(graph, node, onnx_ir.node("Slice", [whole, begin, sizes, axes], name=f"{old.name}.cut"))
    return True
