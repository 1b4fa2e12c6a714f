"""Nearest-neighbour upsampling and a convolution after it, as one transposed convolution of the small image.

A convolution of an image that was upsampled by s multiplies each pixel of the small image with all weights that fall
on its s × s copies. Those weights can be added first: with kernels of K × K the transposed convolution of stride s has
kernels of (K + s − 1) × (K + s − 1), of which ((K + s − 1) / s)² meet each output in place of K². For s = 2 and K = 3
that is 4 multiplications in place of 9. The convolution's padding lies around the large image, where the small one has
no pixels either, so borders are exact.

Requires: constant float32 weights.
Ensures: the same function, but for rounding: weights are added in float64 and rounded once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir

from vae_export.graph import edit

Float64 = npt.NDArray[np.float64]


def apply(model: onnx_ir.Model) -> int:
    """Apply in place; return the number of convolutions that were rewritten."""
    return edit.rewrite(model, "Conv", _rewrite)


def _rewrite(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    image, weights = node.inputs[0], edit.constant(node.inputs[1])
    resize = image.producer() if image is not None else None
    if resize is None or weights is None or weights.dtype != np.float32:
        return False
    scales = _scales(resize)
    kernel = weights.shape[2:]
    pads = edit.pads(node, len(kernel))
    ones = [1] * len(kernel)
    if (
        scales is None
        or len(scales) != len(kernel)
        or pads is None
        or edit.ints(node, "strides", ones) != ones
        or edit.ints(node, "dilations", ones) != ones
    ):
        return False
    turned = [size - 1 - pad for size, pad in zip((*kernel, *kernel), pads, strict=True)]
    if min(turned) < 0:  # padding beyond the kernel's reach
        return False
    groups = edit.integer(node, "group", 1)
    merged = merge(weights.astype(np.float64), scales)
    # (out, in / groups, …) → (in, out / groups, …), group by group
    outputs, inputs = merged.shape[:2]
    shaped = merged.reshape(groups, outputs // groups, inputs, *merged.shape[2:]).swapaxes(1, 2)
    shaped = shaped.reshape(groups * inputs, outputs // groups, *merged.shape[2:])
    (output,) = node.outputs
    name = f"{output.name}.upsampled"
    kernels = edit.add_constant(graph, f"{name}.weight", shaped.astype(np.float32))
    operands = [resize.inputs[0], kernels, *node.inputs[2:]]
    attributes: dict[str, Any] = {
        "strides": list(scales),
        "pads": turned,
        "kernel_shape": list(shaped.shape[2:]),
        "group": groups,
    }
    edit.replace_node(graph, node, onnx_ir.node("ConvTranspose", operands, attributes, name=name))
    edit.remove_if_unused(graph, resize)
    return True


def merge(weights: Float64, scales: Sequence[int]) -> Float64:
    """The kernels of the transposed convolution: (out, in, K₁ + s₁ − 1, …), from (out, in, K₁, …), in float64.

    Output p of the convolution reads the upsampled pixel q = p + k − pad with weight k, and q is the copy r = q mod s
    of the small pixel (q − r) / s. In the transposed convolution that output and that pixel meet at r + K − 1 − k.
    """
    for axis, scale in enumerate(scales, start=2):
        size = weights.shape[axis]
        flipped = np.flip(weights, axis)
        shape = list(weights.shape)
        shape[axis] = size + scale - 1
        merged = np.zeros(shape)
        for copy in range(scale):
            window = [slice(None)] * weights.ndim
            window[axis] = slice(copy, copy + size)
            merged[tuple(window)] += flipped
        weights = merged
    return weights


def _scales(node: onnx_ir.Node) -> tuple[int, ...] | None:
    """By which whole factors a node repeats each pixel; None if it is no nearest-neighbour upsampling by them."""
    if node.op_type != "Resize" or edit.text(node, "mode", "nearest") != "nearest" or len(node.inputs) > 3:
        return None
    if edit.ints(node, "axes", []) or edit.integer(node, "antialias", 0):
        return None
    coordinates = edit.text(node, "coordinate_transformation_mode", "half_pixel")
    rounding = edit.text(node, "nearest_mode", "round_prefer_floor")
    repeats = {("asymmetric", "floor"), *itertools.product(["half_pixel"], ["round_prefer_floor", "round_prefer_ceil"])}
    scales = edit.constant(node.inputs[2]) if len(node.inputs) == 3 else None
    if (coordinates, rounding) not in repeats or scales is None or scales.ndim != 1 or len(scales) < 3:
        return None
    whole = np.rint(scales)
    if (whole != scales).any() or (whole[:2] != 1).any() or (whole < 1).any() or (whole == 1).all():
        return None
    return tuple(int(scale) for scale in whole[2:])
