"""What passes have in common: constants that are read and made, and values that take the place of others.

Requires: nodes of the main graph. What inner graphs (of If, Loop and Scan) use counts as used.
Ensures: a constant that somebody else uses as well, or that whoever runs the graph may replace, is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir

Floats = npt.NDArray[np.float64]

#: The types whose arithmetic is folded.
FLOATING = {onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE}


def constant(value: onnx_ir.Value | None) -> npt.NDArray[Any] | None:
    """The array of a value that never changes: an initializer that is no input, or what a Constant node gives."""
    if value is None or value.is_graph_input():
        return None
    tensor = onnx_ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def add_constant(graph: onnx_ir.Graph, name: str, array: npt.NDArray[Any] | np.generic) -> onnx_ir.Value:
    """A new initializer, of this name where it is free."""
    name, array = _free_name(graph, name), np.asarray(array)
    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )  # fmt: skip
    graph.register_initializer(value)
    return value


def set_constant(node: onnx_ir.Node, index: int, array: npt.NDArray[Any]) -> None:
    """Give a node's input a constant. An initializer that only this node uses stays, with another value.

    Args:
        node: a node of the main graph.
        index: which of its inputs; those up to it are made where it has fewer.
        array: the new value, in the type that the graph shall have.
    """
    graph = node.graph
    assert isinstance(graph, onnx_ir.Graph)
    old = node.inputs[index] if index < len(node.inputs) else None
    if old is not None and old.is_initializer() and not old.is_graph_input() and only_user(old) is node:
        tensor = onnx_ir.tensor(array, name=old.name)
        old.const_value, old.shape, old.type = tensor, onnx_ir.Shape(array.shape), onnx_ir.TensorType(tensor.dtype)
        return
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    name = f"{node.outputs[0].name}.{index}" if old is None else f"{old.name}.folded"
    node.replace_input_with(index, add_constant(graph, name, array))


def only_user(value: onnx_ir.Value) -> onnx_ir.Node | None:
    """The node of the same graph that is the only one to use a value, once; None where the graph gives it out."""
    uses = tuple(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    user: onnx_ir.Node = uses[0].node
    producer = value.producer()
    graph = value.graph if producer is None else producer.graph
    return user if user.graph is graph else None


def replace(old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    """Everybody who used one value uses another one, that only nodes use which are about to go.

    Where the graph gives the old one out, the new one gets its name, type and shape.
    """
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}.before"
        new.name, new.type, new.shape = name, old.type, old.shape
    onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def drop(node: onnx_ir.Node, instead: onnx_ir.Value) -> None:
    """Take a node with one output away; as `replace`."""
    graph = node.graph
    assert graph is not None
    replace(node.outputs[0], instead)
    graph.remove(node, safe=True)


def new_node(
    graph: onnx_ir.Graph, operator: str, inputs: list[onnx_ir.Value | None], like: onnx_ir.Value, **attributes: Any
) -> onnx_ir.Node:
    """A node that is not in the graph yet, with one output of another value's type and shape."""
    name = _free_name(graph, f"{like.name}.{operator.lower()}")
    node = onnx_ir.node(operator, inputs, attributes, name=f"{name}.node")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, like.type, like.shape
    return node


def rounded(array: Floats, dtype: onnx_ir.DataType) -> npt.NDArray[Any] | None:
    """Float64 in the type of a graph, rounded once; None where that type has no such numbers, or only roughly."""
    kind = dtype.numpy()
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        result = array.astype(kind)
    largest = np.abs(array).max(initial=0.0)
    # Below the normal numbers the steps between them grow against the numbers: harmless beside a larger one.
    coarse = 0.0 < largest < np.finfo(kind).smallest_normal
    return None if coarse or not np.isfinite(result).all() else result


def _free_name(graph: onnx_ir.Graph, name: str) -> str:
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken |= {value.name for node in graph.all_nodes() for value in node.outputs}
    free, number = name, 2
    while free in taken:
        free, number = f"{name}.{number}", number + 1
    return free


def rewrite(model: onnx_ir.Model, operator: str, change: Callable[[onnx_ir.Graph, onnx_ir.Node], bool]) -> int:
    """Offer every node of an operator to a function that rewrites it, or leaves it and returns False.

    Returns:
        How many were rewritten.
    """
    return sum(change(model.graph, node) for node in list(model.graph) if node.op_type == operator)


def ints(node: onnx_ir.Node, name: str, default: Sequence[int]) -> list[int]:
    """An attribute of integers."""
    return list(node.attributes[name].as_ints()) if name in node.attributes else list(default)


def integer(node: onnx_ir.Node, name: str, default: int) -> int:
    """An attribute of one integer."""
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def text(node: onnx_ir.Node, name: str, default: str) -> str:
    """An attribute of text."""
    return str(node.attributes[name].as_string()) if name in node.attributes else default


def pads(node: onnx_ir.Node, rank: int) -> list[int] | None:
    """The zeros before each spatial dimension and then those behind; None where they depend on the image's size."""
    automatic = text(node, "auto_pad", "NOTSET")
    if automatic == "VALID":
        return [0] * (2 * rank)
    return ints(node, "pads", [0] * (2 * rank)) if automatic == "NOTSET" else None


def remove_if_unused(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """Remove a node of which nothing is used."""
    if not any(value.uses() or value.is_graph_output() for value in node.outputs):
        taken = list(node.inputs)
        graph.remove(node, safe=True)
        drop_unused(graph, taken)


def replace_node(graph: onnx_ir.Graph, old: onnx_ir.Node, new: onnx_ir.Node) -> None:
    """Put a node where another one is, its only output in the place of the other's, under the other's name."""
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
    """Remove those of some values that are initializers which nobody uses any more."""
    for value in values:
        if value is not None and value.is_initializer() and not value.is_graph_input() and not value.uses():
            graph.initializers.pop(str(value.name), None)


class Maker:
    """Makes nodes before a given one, whose names begin with a prefix."""

    def __init__(self, graph: onnx_ir.Graph, before: onnx_ir.Node, prefix: str) -> None:
        """Begin; no name in the graph begins with the prefix and a dot."""
        self._graph = graph
        self._before = before
        self._prefix = prefix
        self._count = 0

    def constant(self, name: str, array: npt.NDArray[Any]) -> onnx_ir.Value:
        """An initializer; one that was made under this name before is taken again."""
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
        """A node with one output of this type."""
        self._count += 1
        made = onnx_ir.node(operator, inputs, attributes or {}, name=f"{self._prefix}.{self._count}.{operator}")
        (value,) = made.outputs
        value.name, value.type = f"{self._prefix}.{self._count}", onnx_ir.TensorType(dtype)
        self._graph.insert_before(self._before, made)
        return value


def name_nodes(model: onnx_ir.Model) -> None:
    """Give nodes that have no name of their own one that is the same at every run."""
    taken: set[str] = set()
    for number, node in enumerate(model.graph):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type.lower()}.{number}"
        taken.add(node.name)
