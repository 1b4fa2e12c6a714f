"""A transposed convolution as one convolution for each phase of its stride, with outputs interleaved.

Output p of a transposed convolution of stride s uses every s-th weight only, from the (p + pad) mod s-th on. All
outputs of one phase are a convolution of the image with those weights, flipped; phases are interleaved by reshaping. A
runtime uses its convolutions, which may be faster than its transposed ones, or support types that those do not.

Requires: constant float32 weights of one or two spatial dimensions.
Ensures: the same function, but for the order of sums.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import onnx_ir

from vae_export.graph import edit


def apply(model: onnx_ir.Model) -> int:
    """Apply in place to transposed convolutions with a stride up to the kernel's size; return their number."""
    return edit.rewrite(model, "ConvTranspose", _rewrite)


@dataclass(frozen=True)
class _Phase:
    """One phase along one dimension: the slice of its weights, and the padding before and after the image."""

    taps: slice
    before: int
    after: int


def _rewrite(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    weights = edit.constant(node.inputs[1])
    if weights is None or weights.dtype != np.float32 or weights.ndim not in (3, 4):
        return False
    kernel = weights.shape[2:]
    rank, ones = len(kernel), [1] * len(kernel)
    strides, pads = edit.ints(node, "strides", ones), edit.pads(node, rank)
    added = edit.ints(node, "output_padding", [0] * rank)
    if (
        pads is None
        or strides == ones
        or edit.ints(node, "dilations", ones) != ones
        or "output_shape" in node.attributes
    ):
        return False
    axes = []
    for axis in range(rank):
        phases = _phases(kernel[axis], strides[axis], pads[axis], pads[axis + rank], added[axis])
        if phases is None:
            return False
        axes.append(phases)
    groups = edit.integer(node, "group", 1)
    inputs, outputs = weights.shape[:2]
    # (in, out / groups, …) → (out, in / groups, …), group by group
    turned = weights.reshape(groups, inputs // groups, outputs, *kernel).swapaxes(1, 2)
    turned = turned.reshape(groups * outputs, inputs // groups, *kernel)
    (output,) = node.outputs
    name = f"{output.name}.phase"
    make = edit.Maker(graph, node, name)
    parts = []
    for number, combination in enumerate(itertools.product(*(phases for phases, _ in axes))):
        chosen = turned[(slice(None), slice(None), *(phase.taps for phase in combination))]
        flipped = np.ascontiguousarray(np.flip(chosen, tuple(range(2, 2 + rank))))
        operands = [node.inputs[0], make.constant(f"weight{number}", flipped), *node.inputs[2:]]
        attributes = {
            "kernel_shape": list(flipped.shape[2:]),
            "pads": [*(phase.before for phase in combination), *(phase.after for phase in combination)],
            "group": groups,
        }
        parts.append(make.node("Conv", operands, attributes))
    result = _interleaved(make, parts, strides)
    surplus = [extra for _, extra in axes]
    if any(surplus):
        cut = [index for index, extra in enumerate(surplus) if extra]
        ends = make.constant("ends", np.array([-surplus[index] for index in cut], np.int64))
        starts = make.constant("starts", np.zeros(len(cut), np.int64))
        along = make.constant("cut", np.array([2 + index for index in cut], np.int64))
        result = make.node("Slice", [result, starts, ends, along])
    producer = result.producer()
    assert producer is not None
    edit.replace_node(graph, node, producer)
    return True


def _phases(size: int, stride: int, before: int, after: int, added: int) -> tuple[list[_Phase], int] | None:
    """The phases along one dimension and the number of surplus outputs; None if padding would be negative."""
    if size < stride:
        return None
    # The image has n pixels, the output (n − 1) · stride + rest, the interleaved phases (n + more) · stride.
    rest = size - before - after + added
    more = -(-rest // stride) - 1
    phases = []
    for first in range(stride):
        skipped, residue = divmod(first + before, stride)
        taps = len(range(residue, size, stride))
        phases.append(_Phase(slice(residue, None, stride), taps - 1 - skipped, more + skipped))
    if min(min(phase.before, phase.after) for phase in phases) < 0:
        return None
    return phases, (more + 1) * stride - rest


def _interleaved(make: edit.Maker, parts: list[onnx_ir.Value], strides: list[int]) -> onnx_ir.Value:
    """One image from the outputs of all phases, which are ordered with the last dimension's phase fastest."""
    for axis in reversed(range(len(strides))):
        stride, dim = strides[axis], 2 + axis
        if stride == 1:
            continue
        at = make.constant(f"axis{axis}", np.array([dim + 1], np.int64))
        # (…, n, …) each → (…, n, stride, …) → (…, n · stride, …)
        joined = [
            make.node(
                "Concat", [make.node("Unsqueeze", [part, at]) for part in parts[i : i + stride]], {"axis": dim + 1}
            )
            for i in range(0, len(parts), stride)
        ]
        parts = [_merged(make, value, dim, dim == 1 + len(strides), f"merge{axis}") for value in joined]
    (result,) = parts
    return result


def _merged(make: edit.Maker, value: onnx_ir.Value, dim: int, last: bool, label: str) -> onnx_ir.Value:
    """Merge dimensions dim and dim + 1, whatever the sizes of the others."""
    head = [0] * dim + [-1]
    if last:
        return make.node("Reshape", [value, make.constant(label, np.array(head, np.int64))])
    # A Reshape infers one size only, so that of the dimension behind is read from the value.
    whole = onnx_ir.DataType.INT64
    size = make.node("Shape", [value], {"start": dim + 2, "end": dim + 3}, whole)
    shape = make.node("Concat", [make.constant(label, np.array(head, np.int64)), size], {"axis": 0}, whole)
    return make.node("Reshape", [value, shape])
