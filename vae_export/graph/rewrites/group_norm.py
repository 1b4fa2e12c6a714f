"""Group normalization as one operator.

Requires: the operators of version 18 or later, and a runtime that knows those of version 21.
Ensures: what PyTorch's exporter writes for it, Reshape to groups, InstanceNormalization, Reshape back, and Mul and Add
by channel where they follow, or what `exact_norm` makes of that, is one GroupNormalization that keeps its sums in
float32. Where one was found, the graph's operators are those of version 21 at least; where none was, nothing is
changed. A batch and sizes that vary stay so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.version_converter import ConvertVersionPass

from vae_export.graph.edit import FLOATING, add_constant, constant, new_node, only_user, replace, rounded
from vae_export.graph.rewrites.products import Affine, Channels

_OPSETS = range(18, 21)
_OPSET = 21
#: The first version of the file format that may hold it.
_IR_VERSION = 10


@dataclass(frozen=True)
class Found:
    """A group normalization.

    Attributes:
        data: what it takes, (batch, channels, …).
        last: the node that gives its result.
        groups: of channels beside each other.
        epsilon: is added to variances.
        scale, shift: by channel, in the type of the data.
        nodes: all that compute it, where it is in the form of `exact_norm`.
    """

    data: onnx_ir.Value
    last: onnx_ir.Node
    groups: int
    epsilon: float
    scale: npt.NDArray[Any]
    shift: npt.NDArray[Any]
    nodes: tuple[onnx_ir.Node, ...] = ()


def apply(model: onnx_ir.Model) -> int:
    """Write them as one operator; how many there were."""
    graph = model.graph
    if graph.opset_imports.get("", 0) < _OPSETS.start:
        return 0
    found = find(graph)
    if not found:
        return 0
    if graph.opset_imports[""] in _OPSETS:
        ConvertVersionPass(_OPSET)(model)
        model.ir_version = max(model.ir_version, _IR_VERSION)
    for match in found:
        _rewrite(graph, match)
    RemoveUnusedNodesPass()(model)
    return len(found)


def find(graph: onnx_ir.Graph) -> list[Found]:
    """Every group normalization of a graph, as PyTorch's exporter writes it or as `exact_norm` does."""
    from vae_export.graph.rewrites import exact_norm  # which writes what is found here

    matches = [_match(node) or exact_norm.match(node) for node in graph]
    return [match for match in matches if match is not None]


def _match(norm: onnx_ir.Node) -> Found | None:
    if norm.domain or norm.op_type != "InstanceNormalization":
        return None
    grouped, scale, shift = norm.inputs[0], constant(norm.inputs[1]), constant(norm.inputs[2])
    if grouped is None or grouped.dtype not in FLOATING or scale is None or shift is None:
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
    along = Channels(1, channels, len(data.shape))
    last, step = back, Affine(*(np.repeat(a.astype(np.float64), channels // groups) for a in (scale, shift)))
    for operator in ("Mul", "Add"):
        user = only_user(last.outputs[0])
        if user is not None and user.op_type == operator and (more := along.read(user, last.outputs[0])) is not None:
            last, step = user, step.then(more)
    assert step.shift is not None
    arrays = [rounded(array, grouped.dtype) for array in (step.scale, step.shift)]
    if arrays[0] is None or arrays[1] is None:
        return None
    return Found(data, last, groups, norm.attributes.get_float("epsilon", 1e-5), arrays[0], arrays[1])


def _restores(back: onnx_ir.Node, data: onnx_ir.Value) -> bool:
    """Whether a Reshape gives the shape that some data has."""
    sizes = back.inputs[1]
    producer = None if sizes is None else sizes.producer()
    if producer is not None and producer.op_type == "Shape":
        whole = producer.attributes.get_int("start", 0) == 0 and "end" not in producer.attributes
        return producer.inputs[0] is data and whole
    array = constant(sizes)
    if array is None or data.shape is None or len(array) != len(data.shape):
        return False
    # A 0 takes the size that stands at the same place before the Reshape: only the batch does.
    copied = 0 if back.attributes.get_int("allowzero", 0) else 1
    return all(
        size in (-1, known) or (size == 0 and axis < copied)
        for axis, (size, known) in enumerate(zip(array.tolist(), data.shape, strict=True))
    )


def _rewrite(graph: onnx_ir.Graph, found: Found) -> None:
    old = found.last.outputs[0]
    inputs = [
        add_constant(graph, f"{old.name}.{name}", array)
        for name, array in (("scale", found.scale), ("bias", found.shift))
    ]
    attributes = {
        "num_groups": found.groups,
        "epsilon": found.epsilon,
        "stash_type": int(onnx_ir.DataType.FLOAT),
    }
    node = new_node(graph, "GroupNormalization", [found.data, *inputs], old, **attributes)
    graph.insert_before(found.last, node)
    replace(old, node.outputs[0])
