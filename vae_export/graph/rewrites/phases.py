"""A transposed convolution → one convolution for each phase of its stride, and their outputs interleaved.

Output p of a transposed convolution of stride s takes every s-th weight only, from the (p + pad) mod s-th on. All
outputs of one phase are a convolution of the image with those weights, turned around; the phases are put between each
other by reshaping. Nothing is multiplied by zeros that a stride puts in, and a runtime uses its convolutions, which
may be better than its transposed ones, or take types that those do not.

Requires: float32 weights that are constants, of one or two spatial dimensions.
Ensures: the same function, but for the order of sums.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import onnx_ir

from vae_export.graph import edit


def apply(model: onnx_ir.Model) -> int:
    """Rewrite every transposed convolution with a stride, in place, but those whose kernel is less than the stride.

    Returns:
        How many were rewritten.
    """
    return edit.rewrite(model, "ConvTranspose", _rewrite)


@dataclass(frozen=True)
class _Phase:
    """One phase along one dimension: which weights, and the zeros before and after the image."""

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
        found = _phases(kernel[axis], strides[axis], pads[axis], pads[axis + rank], added[axis])
        if found is None:
            return False
        axes.append(found)
    groups = edit.integer(node, "group", 1)
    inputs, outputs = weights.shape[:2]
    # (in, out / groups, …) → (out, in / groups, …), group by group
    turned = weights.reshape(groups, inputs // groups, outputs, *kernel).swapaxes(1, 2)
    turned = turned.reshape(groups * outputs, inputs // groups, *kernel)
    (output,) = node.outputs
    name = f"{output.name}.phase"
    made = edit.Maker(graph, node, name)
    parts = []
    for number, phases in enumerate(itertools.product(*(found for found, _ in axes))):
        chosen = turned[(slice(None), slice(None), *(phase.taps for phase in phases))]
        flipped = np.ascontiguousarray(np.flip(chosen, tuple(range(2, 2 + rank))))
        taken = [node.inputs[0], made.constant(f"weight{number}", flipped), *node.inputs[2:]]
        attributes = {
            "kernel_shape": list(flipped.shape[2:]),
            "pads": [*(phase.before for phase in phases), *(phase.after for phase in phases)],
            "group": groups,
        }
        parts.append(made.node("Conv", taken, attributes))
    result = _interleaved(made, parts, strides)
    surplus = [extra for _, extra in axes]
    if any(surplus):
        cut = [index for index, extra in enumerate(surplus) if extra]
        ends = made.constant("ends", np.array([-surplus[index] for index in cut], np.int64))
        first = made.constant("starts", np.zeros(len(cut), np.int64))
        where = made.constant("cut", np.array([2 + index for index in cut], np.int64))
        result = made.node("Slice", [result, first, ends, where])
    producer = result.producer()
    assert producer is not None
    edit.replace_node(graph, node, producer)
    return True


def _phases(size: int, stride: int, before: int, after: int, added: int) -> tuple[list[_Phase], int] | None:
    """The phases along one dimension, and how many outputs too many they give; None where padding would be negative."""
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


def _interleaved(made: edit.Maker, parts: list[onnx_ir.Value], strides: list[int]) -> onnx_ir.Value:
    """Outputs of all phases, the last dimension's changing fastest, as one image."""
    for axis in reversed(range(len(strides))):
        stride, dim = strides[axis], 2 + axis
        if stride == 1:
            continue
        at = made.constant(f"axis{axis}", np.array([dim + 1], np.int64))
        # (…, n, …) each → (…, n, stride, …) → (…, n · stride, …)
        joined = [
            made.node(
                "Concat", [made.node("Unsqueeze", [part, at]) for part in parts[i : i + stride]], {"axis": dim + 1}
            )
            for i in range(0, len(parts), stride)
        ]
        parts = [_merged(made, value, dim, dim == 1 + len(strides), f"merge{axis}") for value in joined]
    (result,) = parts
    return result


def _merged(made: edit.Maker, value: onnx_ir.Value, dim: int, last: bool, label: str) -> onnx_ir.Value:
    """Dimensions dim and dim + 1 as one, whatever the sizes of the others."""
    head = [0] * dim + [-1]
    if last:
        return made.node("Reshape", [value, made.constant(label, np.array(head, np.int64))])
    # One size is left to be inferred, so that of the dimension behind is asked of the graph.
    whole = onnx_ir.DataType.INT64
    size = made.node("Shape", [value], {"start": dim + 2, "end": dim + 3}, whole)
    shape = made.node("Concat", [made.constant(label, np.array(head, np.int64)), size], {"axis": 0}, whole)
    return made.node("Reshape", [value, shape])
