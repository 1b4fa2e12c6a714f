"""The scalings of an attention become one, and that one goes into the projection of the queries where it can.

Requires: scaled dot products as PyTorch's exporter writes them, queries and keys each multiplied by a constant of one
number before their MatMul, or their product after it; in float32 or float64.
Ensures: of the Mul and Div by one constant number around a MatMul of two values that are computed, which nobody else
sees, none is left where the queries, or else the keys, come from a product with constant weights by way of Reshape,
Transpose, Squeeze and Unsqueeze alone, and nobody else sees them; else one is. (a q)(b k)ᵀ c = (a b c q) kᵀ. Arithmetic
in float64, rounded once; what would be beyond the type stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vae_export.graph.edit import FLOATING, constant, drop, only_user, rounded, set_constant
from vae_export.graph.rewrites.products import Affine, Product

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class _Factor:
    """A multiplication by one number."""

    node: onnx_ir.Node
    data: onnx_ir.Value
    number: float


def apply(model: onnx_ir.Model) -> int:
    """Merge them; how many went."""
    count = sum(_merge(node) for node in list(model.graph) if node.op_type == "MatMul" and not node.domain)
    if count:
        RemoveUnusedNodesPass()(model)
    return count


def _merge(matmul: onnx_ir.Node) -> int:
    operands = [value for value in matmul.inputs if value is not None and constant(value) is None]
    if len(operands) != 2 or any(value.dtype not in FLOATING for value in operands):
        return 0
    before = [_factor(value.producer()) if only_user(value) is matmul else None for value in operands]
    after = _factor(only_user(matmul.outputs[0]))
    factors = [factor for factor in (*before, after) if factor is not None]
    number = math.prod(factor.number for factor in factors)
    if not factors or number == 0.0:
        return 0
    sources = [
        value if factor is None else factor.data for value, factor in zip(operands, before, strict=True)
    ]  # fmt: skip
    users = [matmul if factor is None else factor.node for factor in before]
    for source, user in zip(sources, users, strict=True):
        product = _projection(source, user)
        if product is not None and product.after(Affine(np.full(product.outputs.count, number), None)):
            return _drop(factors)
    kept, *others = factors
    if not others or not _set(kept, number):
        return 0
    return _drop(others)


def _factor(node: onnx_ir.Node | None) -> _Factor | None:
    if node is None or node.domain or node.op_type not in ("Mul", "Div"):
        return None
    for index in (1, 0) if node.op_type == "Mul" else (1,):
        array, data = constant(node.inputs[index]), node.inputs[1 - index]
        # Both operands of a MatMul have an axis at least, so one number on one axis leaves their shape.
        if array is None or data is None or constant(data) is not None or array.size != 1 or array.ndim > 1:
            continue
        number = float(array.item())
        if node.op_type == "Div":
            number = 1.0 / number if number else math.inf
        if math.isfinite(number):
            return _Factor(node, data, number)
    return None


def _projection(value: onnx_ir.Value, user: onnx_ir.Node) -> Product | None:
    """The product that a value comes from, moved but not changed, and that nobody else sees."""
    while only_user(value) is user:
        node = value.producer()
        if node is None or node.domain:
            return None
        for candidate in (node, *(v.producer() for v in node.inputs if v is not None and node.op_type == "Add")):
            if candidate is not None and (product := Product.of(candidate)) is not None and product.last is node:
                return product
        if node.op_type not in _MOVES or node.inputs[0] is None:
            return None
        value, user = node.inputs[0], node
    return None


def _set(factor: _Factor, number: float) -> bool:
    """Make it a multiplication by another number; whether its type has that."""
    dtype = factor.data.dtype
    assert dtype is not None
    index = 1 if factor.node.inputs[0] is factor.data else 0
    old = constant(factor.node.inputs[index])
    assert old is not None
    array = rounded(np.full(old.shape, number if factor.node.op_type == "Mul" else 1.0 / number), dtype)
    if array is None:
        return False
    set_constant(factor.node, index, array)
    return True


def _drop(factors: list[_Factor]) -> int:
    for factor in factors:
        drop(factor.node, factor.data)
    return len(factors)
