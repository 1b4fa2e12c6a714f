"""Finds group normalizations, in the two forms that exported graphs have.

PyTorch's exporter writes a Reshape to (batch, groups, …), an InstanceNormalization, a Reshape back, and Mul and Add by
channel where the module is affine. `exact_norm` writes means along one dimension after the other.

Requires: the shapes of the graph's inner values.
Ensures: the graph is not changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir

from vae_export.graph.edit import constant, only_user

_FLOATING = {onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE}
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GroupNorm:
    """A group normalization.

    Attributes:
        data: its input, (batch, channels, …).
        last: the node whose output is its result.
        groups: the number of groups; a group's channels are adjacent.
        epsilon: is added to variances.
        scale, shift: of the affine transform after it: (channels,), in the type of the data.
        nodes: all nodes that compute it, if it has the form of `exact_norm`; empty if it has PyTorch's.
    """

    data: onnx_ir.Value
    last: onnx_ir.Node
    groups: int
    epsilon: float
    scale: npt.NDArray[Any]
    shift: npt.NDArray[Any]
    nodes: tuple[onnx_ir.Node, ...] = ()


def find(graph: onnx_ir.Graph) -> list[GroupNorm]:
    """Every group normalization of a graph, in the graph's order."""
    matches = [_match_exported(node) or _match_exact(node) for node in graph]
    return [match for match in matches if match is not None]


def _match_exported(norm: onnx_ir.Node) -> GroupNorm | None:
    """PyTorch's form, by its InstanceNormalization."""
    if norm.domain or norm.op_type != "InstanceNormalization":
        return None
    grouped, scale, shift = norm.inputs[0], constant(norm.inputs[1]), constant(norm.inputs[2])
    if grouped is None or grouped.dtype not in _FLOATING or scale is None or shift is None:
        return None
    into, back = grouped.producer(), only_user(norm.outputs[0])
    if into is None or only_user(grouped) is not norm or back is None or back.op_type != "Reshape":
        return None
    data = into.inputs[0]
    if into.op_type != "Reshape" or data is None or data.shape is None or len(data.shape) < 3:
        return None
    groups, channels = len(scale), data.shape[1]
    sizes = constant(into.inputs[1])
    if sizes is None or sizes.tolist() != [0, groups, -1] or into.attributes.get_int("allowzero", 0):
        return None
    if not isinstance(channels, int) or channels % groups or not _restores(back, data):
        return None
    last = back
    factor, offset = (np.repeat(array.astype(np.float64), channels // groups) for array in (scale, shift))
    for operator in ("Mul", "Add"):
        user = only_user(last.outputs[0])
        if user is None or user.domain or user.op_type != operator:
            continue
        numbers = _by_channel(user.inputs[1 if user.inputs[0] is last.outputs[0] else 0], channels, len(data.shape))
        if numbers is None:
            continue
        last = user
        if operator == "Mul":
            factor, offset = factor * numbers, offset * numbers + 0.0  # no negative zeros
        else:
            offset = offset + numbers
    kind = grouped.dtype.numpy()
    rounded = [_rounded(array, kind) for array in (factor, offset)]
    if rounded[0] is None or rounded[1] is None:
        return None
    return GroupNorm(data, last, groups, norm.attributes.get_float("epsilon", 1e-5), rounded[0], rounded[1])


def _restores(back: onnx_ir.Node, data: onnx_ir.Value) -> bool:
    """Whether a Reshape gives the shape of `data`."""
    sizes = back.inputs[1]
    producer = None if sizes is None else sizes.producer()
    if producer is not None and producer.op_type == "Shape":
        whole = producer.attributes.get_int("start", 0) == 0 and "end" not in producer.attributes
        return producer.inputs[0] is data and whole
    array = constant(sizes)
    if array is None or data.shape is None or len(array) != len(data.shape):
        return False
    # A 0 copies the size of the same axis before the Reshape: only the batch is there the same.
    copied = 0 if back.attributes.get_int("allowzero", 0) else 1
    return all(
        size in (-1, known) or (size == 0 and axis < copied)
        for axis, (size, known) in enumerate(zip(array.tolist(), data.shape, strict=True))
    )


def _by_channel(value: onnx_ir.Value | None, channels: int, rank: int) -> _Floats | None:
    """A constant operand as one number a channel, (channels,); None if it is not that or changes the result's shape."""
    array = constant(value)
    if array is None or array.ndim > rank:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if any(size != 1 and (axis, size) != (1, channels) for axis, size in enumerate(shape)):
        return None
    return np.broadcast_to(array.reshape(-1).astype(np.float64), (channels,))


def _rounded(array: _Floats, kind: np.dtype[Any]) -> npt.NDArray[Any] | None:
    """The array in another type; None if that overflows, or leaves nothing but subnormal numbers."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        result = array.astype(kind)
    largest = np.abs(array).max(initial=0.0)
    subnormal = 0.0 < largest < np.finfo(kind).smallest_normal
    return None if subnormal or not np.isfinite(result).all() else result


def _match_exact(last: onnx_ir.Node) -> GroupNorm | None:
    """The form of `exact_norm`, by the node that gives its result."""
    nodes = [last]

    def before(node: onnx_ir.Node, operator: str, index: int = 0) -> onnx_ir.Node | None:
        """The producer of a node's input, if it is of this operator."""
        value = node.inputs[index]
        producer = None if value is None else value.producer()
        if producer is None or producer.domain or producer.op_type != operator:
            return None
        nodes.append(producer)
        return producer

    if last.domain or last.op_type != "Add" or (scaled := before(last, "Mul")) is None:
        return None
    centred, factor = before(scaled, "Sub"), before(scaled, "Div", 1)
    root = None if factor is None else before(factor, "Sqrt", 1)
    with_epsilon = None if root is None else before(root, "Add")
    if centred is None or factor is None or with_epsilon is None:
        return None
    data = centred.inputs[0]
    if data is None or data.dtype not in _FLOATING or data.shape is None or len(data.shape) < 3:
        return None
    scale, shift = constant(factor.inputs[0]), constant(last.inputs[1])
    epsilon, channels, rank = constant(with_epsilon.inputs[1]), data.shape[1], len(data.shape)
    if scale is None or shift is None or epsilon is None or epsilon.size != 1 or not isinstance(channels, int):
        return None
    if not scale.size == shift.size == channels or not scale.shape == shift.shape == (1, channels, *[1] * (rank - 2)):
        return None

    def mean(value: onnx_ir.Value | None) -> tuple[onnx_ir.Value | None, int]:
        """The operand of a mean, and over how many groups it is taken; 0 if it is no such mean."""
        groups = channels
        producer = None if value is None else value.producer()
        if producer is not None and producer.op_type == "Reshape":
            nodes.append(producer)
            spread = before(producer, "Expand")
            joined = None if spread is None else before(spread, "ReduceMean")
            grouped = None if joined is None else before(joined, "Reshape")
            sizes = None if grouped is None else constant(grouped.inputs[1])
            if joined is None or grouped is None or sizes is None or len(sizes) != 3 or not _is_mean_along(joined, 2):
                return None, 0
            groups, value = int(sizes[1]), grouped.inputs[0]
            if sizes.tolist() != [0, groups, -1] or groups < 1 or channels % groups:
                return None, 0
        for axis in range(2, rank):
            producer = None if value is None else value.producer()
            if producer is None or producer.op_type != "ReduceMean" or not _is_mean_along(producer, axis):
                return None, 0
            nodes.append(producer)
            value = producer.inputs[0]
        return value, groups

    of_data, groups = mean(centred.inputs[1])
    squares, same = mean(with_epsilon.inputs[0])
    square = None if squares is None else squares.producer()
    if of_data is not data or same != groups or square is None or square.op_type != "Mul":
        return None
    if not square.inputs[0] is square.inputs[1] is centred.outputs[0]:
        return None
    nodes.append(square)
    return GroupNorm(data, last, groups, float(epsilon.reshape(())), scale.reshape(-1), shift.reshape(-1), tuple(nodes))


def _is_mean_along(node: onnx_ir.Node, axis: int) -> bool:
    """Whether a ReduceMean is taken along this axis alone, which it keeps."""
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return axes is not None and axes.tolist() == [axis] and node.attributes.get_int("keepdims", 1) == 1
