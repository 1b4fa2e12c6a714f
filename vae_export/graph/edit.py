"""Helpers of passes: read attributes and constants, add nodes, replace values, remove what is unused.

Requires: nodes of the main graph. A value that an inner graph (of If, Loop or Scan) uses counts as used.
Ensures: no existing constant is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir


def constant(value: onnx_ir.Value | None) -> npt.NDArray[Any] | None:
    """The array of a constant: an initializer that is not an input, or the output of a Constant node. Else None."""
    if value is None or value.is_graph_input():
        return None
    tensor = onnx_ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def add_constant(graph: onnx_ir.Graph, name: str, array: npt.NDArray[Any] | np.generic) -> onnx_ir.Value:
    """A new initializer; a number is appended to its name if another value has that name."""
    name, array = _free_name(graph, name), np.asarray(array)
    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )  # fmt: skip
    graph.register_initializer(value)
    return value


def only_user(value: onnx_ir.Value) -> onnx_ir.Node | None:
    """The node that alone uses a value, once, in the same graph; None for an output of the graph."""
    uses = tuple(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    user: onnx_ir.Node = uses[0].node
    producer = value.producer()
    graph = value.graph if producer is None else producer.graph
    return user if user.graph is graph else None


def replace(old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    """Replace all uses of a value by another one; as an output of the graph, with the old name, type and shape.

    An output of the graph renames `new`, which then must not be an input of the graph.
    """
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}.before"
        new.name, new.type, new.shape = name, old.type, old.shape
    onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _free_name(graph: onnx_ir.Graph, name: str) -> str:
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken |= {value.name for node in graph.all_nodes() for value in node.outputs}
    free, number = name, 2
    while free in taken:
        free, number = f"{name}.{number}", number + 1
    return free


def rewrite(model: onnx_ir.Model, operator: str, change: Callable[[onnx_ir.Graph, onnx_ir.Node], bool]) -> int:
    """Call `change` on every node of an operator; return the number of calls that returned True.

    Args:
        model: the graph, changed in place.
        operator: the nodes' operator.
        change: rewrites a node and returns True, or leaves it and returns False.
    """
    return sum(change(model.graph, node) for node in list(model.graph) if node.op_type == operator)


def ints(node: onnx_ir.Node, name: str, default: Sequence[int]) -> list[int]:
    """The value of an attribute of integers."""
    return list(node.attributes[name].as_ints()) if name in node.attributes else list(default)


def integer(node: onnx_ir.Node, name: str, default: int) -> int:
    """The value of an attribute of one integer."""
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def text(node: onnx_ir.Node, name: str, default: str) -> str:
    """The value of a text attribute."""
    return str(node.attributes[name].as_string()) if name in node.attributes else default


def pads(node: onnx_ir.Node, rank: int) -> list[int] | None:
    """Padding before each spatial dimension, then after each; None if it depends on the image's size (SAME)."""
    automatic = text(node, "auto_pad", "NOTSET")
    if automatic == "VALID":
        return [0] * (2 * rank)
    return ints(node, "pads", [0] * (2 * rank)) if automatic == "NOTSET" else None


def remove_if_unused(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """Remove a node if none of its outputs is used, and its inputs that nothing else uses."""
    if not any(value.uses() or value.is_graph_output() for value in node.outputs):
        taken = list(node.inputs)
        graph.remove(node, safe=True)
        drop_unused(graph, taken)


def replace_node(graph: onnx_ir.Graph, old: onnx_ir.Node, new: onnx_ir.Node) -> None:
    """Replace a node by another one; each has one output, and the new one takes the old one's name."""
    if new.graph is None:
        graph.insert_before(old, new)
    (before,), (after,) = old.outputs, new.outputs
    name = before.name
    after.shape, after.type = before.shape, before.type
    onnx_ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    taken = list(old.inputs)
    graph.remove(old, safe=True)
    before.name, after.name = None, name
    drop_unused(graph, taken)


def drop_unused(graph: onnx_ir.Graph, values: Sequence[onnx_ir.Value | None]) -> None:
    """Remove those of some values that are unused initializers."""
    for value in values:
        if value is not None and value.is_initializer() and not value.is_graph_input() and not value.uses():
            graph.initializers.pop(str(value.name), None)


class Maker:
    """Inserts nodes before a given one, and constants; all their names begin with a prefix."""

    def __init__(self, graph: onnx_ir.Graph, before: onnx_ir.Node, prefix: str) -> None:
        """`prefix` and a dot must begin no name in the graph."""
        self._graph = graph
        self._before = before
        self._prefix = prefix
        self._count = 0

    def constant(self, name: str, array: npt.NDArray[Any]) -> onnx_ir.Value:
        """An initializer; the same one if this name was used before."""
        label = f"{self._prefix}.{name}"
        known = self._graph.initializers.get(label)
        return known if known is not None else add_constant(self._graph, label, array)

    def node(
        self,
        operator: str,
        inputs: Sequence[onnx_ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        dtype: onnx_ir.DataType = onnx_ir.DataType.FLOAT,
    ) -> onnx_ir.Value:
        """Insert a node; return its only output, of this type."""
        self._count += 1
        node = onnx_ir.node(operator, inputs, attributes or {}, name=f"{self._prefix}.{self._count}.{operator}")
        (value,) = node.outputs
        value.name, value.type = f"{self._prefix}.{self._count}", onnx_ir.TensorType(dtype)
        self._graph.insert_before(self._before, node)
        return value


def name_nodes(model: onnx_ir.Model) -> None:
    """Give nodes without a unique name one that is the same at every run."""
    taken: set[str] = set()
    for number, node in enumerate(model.graph):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type.lower()}.{number}"
        taken.add(node.name)
