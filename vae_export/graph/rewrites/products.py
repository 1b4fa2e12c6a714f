"""Convolutions and matrix products with constant weights, and the steps by channel that their weights can take in.

Requires: what `edit` does.
Ensures: weights and biases are computed in float64 and rounded once; where a result is beyond their type, nothing is
changed.

A product is y = W x + b for each place. With y' = p y + q and x = s x' + t, channel by channel, it is
y' = (p W s) x' + (p (W t + b) + q): linearity. Only W t depends on the place: zeros that are padded in are not
shifted, and at the edges of a transposed convolution fewer weights meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir

from vae_export.graph.edit import FLOATING, Floats, constant, new_node, only_user, replace, rounded, set_constant

_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class Affine:
    """value · scale + shift, channel by channel: both (channels,) float64. Without a shift nothing is added."""

    scale: Floats
    shift: Floats | None

    def then(self, other: Affine) -> Affine:
        """This one and another one after it."""
        shift = other.shift
        if self.shift is not None:
            shift = self.shift * other.scale + (0.0 if shift is None else shift)
        return Affine(self.scale * other.scale, shift)


#: What a node does to one of its inputs, if it is a step that can be taken in.
Reader = Callable[[onnx_ir.Node, onnx_ir.Value], Affine | None]


@dataclass(frozen=True)
class Channels:
    """The axis of a value along which a constant may vary, its size there, and the value's rank."""

    axis: int
    count: int
    rank: int

    def spread(self, value: onnx_ir.Value | None) -> Floats | None:
        """A constant operand as one number a channel: (count,) float64; None where it is not that.

        It must not change the shape of what it is combined with.
        """
        array = constant(value)
        if array is None or array.ndim > self.rank:
            return None
        shape = (1,) * (self.rank - array.ndim) + array.shape
        if any(size not in ((1, self.count) if axis == self.axis else (1,)) for axis, size in enumerate(shape)):
            return None
        return np.broadcast_to(array.reshape(-1).astype(np.float64), (self.count,))

    def fit(self, value: onnx_ir.Value) -> bool:
        """Whether a value is known to have this rank and so many channels."""
        shape = value.shape
        return shape is not None and len(shape) == self.rank and shape[self.axis] == self.count

    def read(self, node: onnx_ir.Node, value: onnx_ir.Value) -> Affine | None:
        """What a node of elementary arithmetic with a constant does to a value: a `Reader`."""
        if node.domain or node.op_type not in ("Mul", "Div", "Add", "Sub", "Neg"):
            return None
        ones = np.ones(self.count)
        if node.op_type == "Neg":
            return Affine(-ones, None)
        first = node.inputs[0] is value
        number = self.spread(node.inputs[1] if first else node.inputs[0])
        if number is None or (node.op_type == "Div" and not (first and number.all())):
            return None
        if node.op_type in ("Mul", "Div"):
            return Affine(number if node.op_type == "Mul" else 1.0 / number, None)
        if node.op_type == "Add":
            return Affine(ones, number)
        return Affine(ones, -number) if first else Affine(-ones, number)


@dataclass(frozen=True)
class Product:
    """A Conv, ConvTranspose, Gemm or MatMul, with the Add after a MatMul that is its bias.

    Attributes:
        node: the product.
        last: the node that gives its result: itself, or the Add.
        group: of how many convolutions side by side it is made.
        outputs, inputs: the channels of result and data.
    """

    node: onnx_ir.Node
    last: onnx_ir.Node
    group: int
    outputs: Channels
    inputs: Channels

    @classmethod
    def of(cls, node: onnx_ir.Node) -> Product | None:
        """A node as a product; None where it is another one, or its weights or bias are not constant floats."""
        if node.domain or node.op_type not in (*_CONVOLUTIONS, "Gemm", "MatMul"):
            return None
        data, weights = node.inputs[:2]
        array = constant(weights)
        if data is None or weights is None or array is None or data is weights or weights.dtype not in FLOATING:
            return None
        last, group = node, 1
        if node.op_type in _CONVOLUTIONS:
            group = node.attributes.get_int("group", 1)
            ends = (array.shape[0], array.shape[1] * group)
            out, into = ends if node.op_type == "Conv" else reversed(ends)
            outputs, inputs = Channels(1, out, array.ndim), Channels(1, into, array.ndim)
        elif node.op_type == "Gemm":
            into, out = reversed(array.shape) if node.attributes.get_int("transB", 0) else array.shape
            outputs = Channels(1, out, 2)
            inputs = Channels(0 if node.attributes.get_int("transA", 0) else 1, into, 2)
        else:
            if array.ndim != 2:
                return None
            # Of a rank that is not known only the last axis is known to be there.
            rank = 1 if data.shape is None else len(data.shape)
            outputs, inputs = (Channels(rank - 1, size, rank) for size in reversed(array.shape))
            user = only_user(node.outputs[0])
            if user is not None and user.op_type == "Add" and outputs.read(user, node.outputs[0]) is not None:
                last = user
        product = cls(node, last, group, outputs, inputs)
        return None if product._bias_value is not None and product.bias is None else product

    @property
    def result(self) -> onnx_ir.Value:
        """What it gives."""
        return self.last.outputs[0]

    @cached_property
    def weight(self) -> Floats:
        """Its weights: (group, outputs of a group, inputs of a group, places of the kernel) float64."""
        array = self._array.astype(np.float64)
        if self.node.op_type == "Gemm":
            array = array * self.node.attributes.get_float("alpha", 1.0)
        if self._outputs_first:
            return array.reshape(self.group, -1, array.shape[1], math.prod(array.shape[2:]))
        array = array.reshape(self.group, self.inputs.count // self.group, array.shape[1], math.prod(array.shape[2:]))
        return array.swapaxes(1, 2)

    @cached_property
    def bias(self) -> Floats | None:
        """What is added: (outputs,) float64, or None."""
        along = Channels(0, self.outputs.count, 1) if self.node.op_type in _CONVOLUTIONS else self.outputs
        found = along.spread(self._bias_value)
        if found is not None and self.node.op_type == "Gemm":
            found = found * self.node.attributes.get_float("beta", 1.0)
        return found

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of a convolution's kernel; () for a matrix product."""
        return self._array.shape[2:]

    @property
    def pads(self) -> bool:
        """Whether a convolution may see zeros around its data."""
        kind = self.node.attributes.get_string("auto_pad", "NOTSET")
        if kind in ("SAME_UPPER", "SAME_LOWER"):
            return math.prod(self.kernel) > 1
        return kind == "NOTSET" and any(self.node.attributes.get_ints("pads", ()))

    @property
    def adds_exactly(self) -> bool:
        """Whether what is added to its data comes to the same at every place of its result."""
        return self.node.op_type != "ConvTranspose" and not self.pads

    def after(self, step: Affine) -> bool:
        """Take in a step that follows; as `store`."""
        bias = step.shift
        if self.bias is not None:
            bias = self.bias * step.scale + (0.0 if bias is None else bias)
        return self.store(self.weight * step.scale.reshape(self.group, -1, 1, 1), bias)

    def before(self, step: Affine) -> bool:
        """Take in a step that comes before; as `store`. It may shift only where the product `adds_exactly`."""
        bias = self.bias
        if step.shift is not None:
            moved = (self.weight * step.shift.reshape(self.group, 1, -1, 1)).sum((2, 3)).reshape(-1)
            bias = moved if bias is None else moved + bias
        return self.store(self.weight * step.scale.reshape(self.group, 1, -1, 1), bias)

    def store(self, weight: Floats, bias: Floats | None) -> bool:
        """Set weights and bias. After it this object is used up: `of` reads the node anew.

        Args:
            weight: in the order of `weight`; another number of groups, outputs or inputs becomes the node's.
            bias: (outputs,), or None for one that has none.

        Returns:
            Whether their type has these numbers. Where it has not, nothing is changed.
        """
        dtype = onnx_ir.DataType.from_numpy(self._array.dtype)
        ordered = weight if self._outputs_first else weight.swapaxes(1, 2)
        shape = (ordered.shape[0] * ordered.shape[1], ordered.shape[2], *self.kernel)
        weights = rounded(ordered.reshape(shape), dtype)
        biases = None if bias is None else rounded(bias, dtype)
        if weights is None or (bias is not None and biases is None):
            return False
        set_constant(self.node, 1, weights)
        for name in ("alpha", "beta"):
            self.node.attributes.pop(name, None)
        if weight.shape[0] != self.group:
            self.node.attributes["group"] = onnx_ir.AttrInt64("group", weight.shape[0])
        if biases is not None:
            self._set_bias(biases)
        return True

    def _set_bias(self, array: npt.NDArray[Any]) -> None:
        if self.node.op_type != "MatMul":
            set_constant(self.node, 2, array)
        elif self.last is not self.node:
            set_constant(self.last, self._bias_index, array)
        else:
            graph, old = self.node.graph, self.node.outputs[0]
            assert isinstance(graph, onnx_ir.Graph)
            add = new_node(graph, "Add", [None, None], old)
            graph.insert_after(self.node, add)
            replace(old, add.outputs[0])
            add.replace_input_with(0, old)
            set_constant(add, 1, array)

    @cached_property
    def _array(self) -> npt.NDArray[Any]:
        array = constant(self.node.inputs[1])
        assert array is not None
        return array

    @property
    def _outputs_first(self) -> bool:
        """Whether the first axis of the weights, as the node has them, is the result's channels."""
        return self.node.op_type == "Conv" or bool(self.node.attributes.get_int("transB", 0))

    @property
    def _bias_index(self) -> int:
        """Which input of `last` is the bias."""
        if self.node.op_type != "MatMul":
            return 2
        return 0 if self.last.inputs[1] is self.node.outputs[0] else 1

    @property
    def _bias_value(self) -> onnx_ir.Value | None:
        if self.node.op_type == "MatMul" and self.last is self.node:
            return None
        return self.last.inputs[self._bias_index] if len(self.last.inputs) > self._bias_index else None


def products(graph: onnx_ir.Graph) -> Iterator[Product]:
    """The products of a graph in its order, each read when it is its turn: earlier ones may be changed, or go."""
    for node in list(graph):
        if node.graph is graph and (product := Product.of(node)) is not None:
            yield product


def take_in_after(product: Product, read: Reader) -> int:
    """Fold the steps that follow a product, and nobody else sees, into it.

    Returns:
        How many there were.
    """
    steps: list[onnx_ir.Node] = []
    value, whole = product.result, None
    while (user := only_user(value)) is not None and (step := read(user, value)) is not None:
        whole = step if whole is None else whole.then(step)
        value = user.outputs[0]
        steps.append(user)
    if whole is None or not product.after(whole):
        return 0
    result = Product.of(product.node)
    assert result is not None
    _bypass(steps, value, result.result)
    return len(steps)


def take_in_before(product: Product, read: Reader) -> int:
    """Fold the steps that come before a product, and nobody else sees, into it, as far as that is exact.

    Returns:
        How many there were.
    """
    steps: list[onnx_ir.Node] = []
    first = product.node.inputs[0]
    assert first is not None
    value, whole = first, None
    while only_user(value) is (steps[-1] if steps else product.node) and (node := value.producer()) is not None:
        data = next((v for v in node.inputs if v is not None and constant(v) is None), None)
        if data is None or not product.inputs.fit(data) or (step := read(node, data)) is None:
            break
        joined = step if whole is None else step.then(whole)
        if joined.shift is not None and not product.adds_exactly:
            break
        whole, value = joined, data
        steps.append(node)
    if whole is None or not product.before(whole):
        return 0
    _bypass(steps[::-1], first, value)
    return len(steps)


def _bypass(steps: list[onnx_ir.Node], last: onnx_ir.Value, instead: onnx_ir.Value) -> None:
    """Use another value instead of the last of a chain, and drop the chain."""
    replace(last, instead)
    graph = steps[0].graph
    assert graph is not None
    graph.remove(steps[::-1], safe=True)
