"""Batch normalization at inference is a multiplication and an addition: they go into the weights before it.

Requires: BatchNormalization with constant parameters, in float32 or float64.
Ensures: none of these is left. One right after a product with constant weights, which nobody else sees, is folded
into them; any other of a known rank becomes Mul and Add with constants, for `scaling` to take further. Arithmetic in
float64, rounded once. One in training mode stays, and so does one whose constants are beyond their type.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vae_export.graph.edit import FLOATING, add_constant, constant, drop, new_node, rounded
from vae_export.graph.rewrites.products import Affine, products, take_in_after

#: What the absence of the attribute means: attributes are float32.
_EPSILON = float(np.float32(1e-5))


def apply(model: onnx_ir.Model) -> int:
    """Fold them; how many there were."""
    graph, count = model.graph, 0
    for product in products(graph):
        if product.outputs.axis == 1:
            count += take_in_after(product, _read)
    count += sum(_spell_out(graph, node) for node in list(graph) if node.op_type == "BatchNormalization")
    if count:
        RemoveUnusedNodesPass()(model)
    return count


def _read(node: onnx_ir.Node, value: onnx_ir.Value) -> Affine | None:
    """What it does, by channel, as Ioffe & Szegedy (2015), algorithm 2, has it: (x - mean) / √(var + ε) · γ + β."""
    if node.domain or node.op_type != "BatchNormalization" or node.inputs[0] is not value or len(node.outputs) != 1:
        return None
    if node.attributes.get_int("training_mode", 0) or value.dtype not in FLOATING:
        return None
    found = [constant(v) for v in node.inputs[1:]]
    if any(array is None for array in found):
        return None
    gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in found)
    width = variance + node.attributes.get_float("epsilon", _EPSILON)
    if not (width > 0).all():
        return None
    scale = gamma / np.sqrt(width)
    return Affine(scale, beta - mean * scale)


def _spell_out(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    """Mul and Add in its place; whether that could be."""
    value = node.inputs[0]
    if value is None or value.shape is None or (step := _read(node, value)) is None:
        return False
    assert value.dtype is not None
    assert step.shift is not None
    scale, shift = rounded(step.scale, value.dtype), rounded(step.shift, value.dtype)
    if scale is None or shift is None:
        return False
    ones = (1,) * (len(value.shape) - 2)
    for operator, array in (("Mul", scale), ("Add", shift)):
        operand = add_constant(graph, f"{node.outputs[0].name}.{operator.lower()}.1", array.reshape(-1, *ones))
        spelled = new_node(graph, operator, [value, operand], node.outputs[0])
        graph.insert_before(node, spelled)
        value = spelled.outputs[0]
    drop(node, value)
    return True
