"""Multiplications and additions of constants around convolutions and matrix products go into their weights.

Requires: convolutions and matrix products with constant weights, in float32 or float64.
Ensures: Mul, Div, Add, Sub and Neg with constants that are one number, or one a channel, are folded into the weights
and the bias of the product right before them or right after them, where nobody else sees what lies between. A
multiplication always; an addition before a product only where no zeros are padded in, and never before a transposed
convolution. Arithmetic in float64, rounded once; what would be beyond the weights' type stays.
"""

from __future__ import annotations

import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vae_export.graph.rewrites.products import Product, products, take_in_after, take_in_before


def apply(model: onnx_ir.Model) -> int:
    """Fold them; how many steps went."""
    count = 0
    for product in products(model.graph):
        count += take_in_after(product, product.outputs.read)
        # Its weights may be others now.
        if (again := Product.of(product.node)) is not None:
            count += take_in_before(again, again.inputs.read)
    if count:
        RemoveUnusedNodesPass()(model)
    return count
