"""A convolution and a pointwise one after it are one convolution.

Requires: convolutions with constant weights, in float32 or float64.
Ensures: a convolution whose result only a pointwise one sees (kernel and stride 1, no groups, no padding) and that
one are one convolution, with the first one's strides, padding and dilation, where that takes no more multiplications.
Its weights are W₂ W₁ and its bias W₂ b₁ + b₂, in float64, rounded once; what would be beyond their type stays.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vae_export.graph.edit import Floats, drop, only_user
from vae_export.graph.rewrites.products import Product, products


def apply(model: onnx_ir.Model) -> int:
    """Merge them; how many pointwise convolutions went."""
    count = 0
    for second in products(model.graph):
        if second.node.op_type != "Conv" or second.group > 1 or second.pads or math.prod(second.kernel) > 1:
            continue
        data = second.node.inputs[0]
        assert data is not None
        before = data.producer()
        if any(stride > 1 for stride in second.node.attributes.get_ints("strides", ())) or before is None:
            continue
        if before.op_type == "Conv" and only_user(data) is second.node and (first := Product.of(before)) is not None:
            count += _merge(first, second)
    if count:
        RemoveUnusedNodesPass()(model)
    return count


def _merge(first: Product, second: Product) -> bool:
    """Put the second into the first; whether it was worth it and could be."""
    size = math.prod(first.kernel)
    apart = first.weight.size + second.weight.size
    if second.outputs.count * first.inputs.count * size > apart:
        return False
    matrix = second.weight[0, :, :, 0]
    weight = np.einsum("om,mik->oik", matrix, _dense(first))
    bias = second.bias
    if first.bias is not None:
        bias = matrix @ first.bias + (0.0 if bias is None else bias)
    if not first.store(weight[None], bias):
        return False
    data, result = first.result, second.result
    data.shape, data.type = result.shape, result.type
    drop(second.node, data)
    return True


def _dense(product: Product) -> Floats:
    """The weights of a convolution in groups as those of one without: (outputs, inputs, places)."""
    group, outputs, inputs, places = product.weight.shape
    dense = np.zeros((group, outputs, group, inputs, places))
    index = np.arange(group)
    dense[index, :, index] = product.weight
    return dense.reshape(group * outputs, group * inputs, places)
