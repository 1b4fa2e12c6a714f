"""Faults planted in exported graphs, such as converters, passes or people make, which a certificate must refuse.

Each kind is a function that changes a graph in place and returns whether it did. Of several layers that could have the
fault only the one in the middle gets it, which is harder to detect than in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir

from vae_export.graph import read, write
from vae_export.graph.edit import Maker, add_constant, constant, integer, ints, only_user, replace, text

Graphs = Mapping[str, bytes]
Fault = Callable[[onnx_ir.Model], bool]

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_PRODUCTS = (*_CONVOLUTIONS, "Gemm", "MatMul")
_RELATIVE = 1e-3  # of one weight
_NOISE = 1e-4
_STALE = 1.05  # running variance, as of some steps before
_LEAK = 0.01
_SMALL = 1e-2  # the largest constant that is an epsilon


def plant(graphs: Graphs, kind: str) -> dict[str, dict[str, bytes]]:
    """The graphs of a model with a fault in one of them, by the name of that one. Empty if no graph can have it.

    Args:
        graphs: serialized ONNX by name: `encoder` and `decoder`. Weights are in them.
        kind: one of FAULTS.
    """
    planted = {}
    for name, graph in graphs.items():
        model = read(graph)
        if FAULTS[kind](model):
            planted[name] = {**graphs, name: write(model)}
    return planted


def _middle(nodes: list[onnx_ir.Node]) -> onnx_ir.Node | None:
    return nodes[len(nodes) // 2] if nodes else None


def _floats(value: onnx_ir.Value | None) -> npt.NDArray[Any] | None:
    """A constant of floating-point numbers that is not 0 throughout."""
    array = constant(value)
    return array if array is not None and array.dtype.kind == "f" and np.any(array) else None


def _weighted(model: onnx_ir.Model, *, square: bool = False) -> list[tuple[onnx_ir.Node, int]]:
    """Products with constant weights, and which input these are; or those alone whose weights can be transposed."""
    products = []
    for node in model.graph:
        for index in (0, 1) if node.op_type in _PRODUCTS else ():
            weights = _floats(node.inputs[index])
            if weights is not None and weights.ndim > 1:
                shape = weights.shape[2:] if node.op_type in _CONVOLUTIONS else weights.shape
                if not square or shape[0] == shape[1] > 1:
                    products.append((node, index))
    return products


def _change_weights(
    model: onnx_ir.Model, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], **which: bool
) -> bool:
    """Change the weights of the product in the middle."""
    places = _weighted(model, **which)
    if not places:
        return False
    node, index = places[len(places) // 2]
    weights = constant(node.inputs[index])
    assert weights is not None
    set_constant(node, index, np.ascontiguousarray(change(weights.copy())).astype(weights.dtype))
    return True


def another_epsilon(model: onnx_ir.Model) -> bool:
    """Ten times as large in every norm, whether it is an attribute or added before a root."""
    count = 0
    for node in list(model.graph):
        if "epsilon" in node.attributes:
            node.attributes["epsilon"] = onnx_ir.AttrFloat32("epsilon", 10 * node.attributes["epsilon"].as_float())
            count += 1
        if node.op_type == "Add" and any(
            user.op_type in ("Sqrt", "Rsqrt", "Pow") for user, _ in node.outputs[0].uses()
        ):  # fmt: skip
            for index, value in enumerate(node.inputs):
                array = _floats(value)
                if array is not None and array.size == 1 and 0 < array.item() <= _SMALL:
                    node.replace_input_with(index, add_constant(model.graph, f"{value.name}.ten", array * 10))
                    count += 1
    return count > 0


def dropped_bias(model: onnx_ir.Model) -> bool:
    """One bias is 0."""
    node = _middle([n for n in model.graph if n.op_type in _PRODUCTS and len(n.inputs) > 2 and _biased(n)])
    if node is None:
        return False
    bias = constant(node.inputs[2])
    assert bias is not None
    set_constant(node, 2, np.zeros_like(bias))
    return True


def _biased(node: onnx_ir.Node) -> bool:
    return _floats(node.inputs[2]) is not None


def one_weight(model: onnx_ir.Model) -> bool:
    """The largest weight of the first layer is off by a thousandth of itself.

    Of the first, whose input is never 0: behind a rectifier there are weights that change nothing.
    """
    places = _weighted(model)
    if not places:
        return False
    node, index = places[0]
    weights = constant(node.inputs[index])
    assert weights is not None
    changed = weights.copy()
    changed.flat[np.abs(weights).argmax()] *= 1 + _RELATIVE
    set_constant(node, index, changed)
    return True


def other_padding(model: onnx_ir.Model) -> bool:
    """One convolution repeats the edge where zeros belong."""
    node = _middle([n for n in model.graph if n.op_type == "Conv" and any(ints(n, "pads", ()))])
    if node is None:
        return False
    pads = ints(node, "pads", ())
    half = len(pads) // 2
    make = Maker(model.graph, node, "edge")
    amounts = make.constant("pads", np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64))
    node.replace_input_with(0, make.node("Pad", [node.inputs[0], amounts], {"mode": "edge"}))
    node.attributes["pads"] = onnx_ir.AttrInt64s("pads", [0] * len(pads))
    return True


def shifted_crop(model: onnx_ir.Model) -> bool:
    """One picture of features is cut out a pixel too far: a Slice if there is one, else between pads of a layer."""
    return _shift_slice(model.graph) or _shift_pads(model.graph)


def _shift_slice(graph: onnx_ir.Graph) -> bool:
    """Of a crop, which leaves something out at both ends of height and width."""
    for node in graph:
        if node.op_type == "Slice" and len(node.inputs) > 3:
            starts, ends, axes = (constant(value) for value in node.inputs[1:4])
            if starts is None or ends is None or axes is None or not {int(a) % 4 for a in axes} & {2, 3}:
                continue
            if (starts > 0).all() and (ends < -1).all():
                set_constant(node, 1, starts + 1)
                set_constant(node, 2, ends + 1)
                return True
    return False


def _shift_pads(graph: onnx_ir.Graph) -> bool:
    node = _middle([n for n in graph if n.op_type in _CONVOLUTIONS and all(ints(n, "pads", (0,)))])
    if node is None:
        return False
    pads = ints(node, "pads", ())
    half = len(pads) // 2
    moved = [pad - 1 for pad in pads[:half]] + [pad + 1 for pad in pads[half:]]
    node.attributes["pads"] = onnx_ir.AttrInt64s("pads", moved)
    return True


def bilinear(model: onnx_ir.Model) -> bool:
    """One upsampling interpolates where it should repeat."""
    node = _nearest(model)
    if node is None:
        return False
    for name, value in (("mode", "linear"), ("coordinate_transformation_mode", "half_pixel")):
        node.attributes[name] = onnx_ir.AttrString(name, value)
    return True


def nearest_from_the_other_side(model: onnx_ir.Model) -> bool:
    """One upsampling rounds its coordinates up."""
    node = _nearest(model)
    if node is None:
        return False
    node.attributes["nearest_mode"] = onnx_ir.AttrString("nearest_mode", "ceil")
    return True


def _nearest(model: onnx_ir.Model) -> onnx_ir.Node | None:
    return _middle([n for n in model.graph if n.op_type == "Resize" and text(n, "mode", "nearest") == "nearest"])


def tanh_gelu(model: onnx_ir.Model) -> bool:
    """One exact GELU is the approximation by a hyperbolic tangent."""
    node = _middle([n for n in model.graph if n.op_type == "Gelu" and text(n, "approximate", "none") == "none"])
    if node is None:
        return False
    node.attributes["approximate"] = onnx_ir.AttrString("approximate", "tanh")
    return True


def another_activation(model: onnx_ir.Model) -> bool:
    """One SiLU is a GELU, one ReLU leaks, or one that leaks does not."""
    places = []
    for node in model.graph:
        if node.op_type in ("Relu", "LeakyRelu") or _silu(node):
            places.append(node)
    node = _middle(places)
    if node is None:
        return False
    old = _silu(node) or node
    make = Maker(model.graph, old, "activation")
    operator, attributes = {"Relu": ("LeakyRelu", {"alpha": _LEAK}), "LeakyRelu": ("Relu", {})}.get(
        node.op_type, ("Gelu", {})
    )
    drop(old, make.node(operator, [node.inputs[0]], attributes))
    return True


def _silu(node: onnx_ir.Node) -> onnx_ir.Node | None:
    """The product of a sigmoid with what it was given."""
    if node.op_type != "Sigmoid":
        return None
    for user, _ in node.outputs[0].uses():
        if user.op_type == "Mul" and any(value is node.inputs[0] for value in user.inputs):
            return user
    return None


def through_float16(model: onnx_ir.Model) -> bool:
    """All weights were rounded to half precision once."""
    return _through(model, np.dtype(np.float16))


def through_bfloat16(model: onnx_ir.Model) -> bool:
    """All weights were rounded to bfloat16 once."""
    return _through(model, np.dtype(ml_dtypes.bfloat16))


def _through(model: onnx_ir.Model, dtype: np.dtype[Any]) -> bool:
    changed = False
    for node, index in _weighted(model):
        weights = constant(node.inputs[index])
        assert weights is not None
        rounded = weights.astype(dtype).astype(weights.dtype)
        changed |= not np.array_equal(rounded, weights)
        set_constant(node, index, rounded)
    return changed


def swapped_outputs(model: onnx_ir.Model) -> bool:
    """Mean and log-variance in each other's place, or the first two outputs of a decoder."""
    outputs = model.graph.outputs
    if len(outputs) < 2:
        return False
    first, second = outputs[:2]
    outputs[0], outputs[1] = second, first
    first.name, second.name, names = "swap.0", "swap.1", (first.name, second.name)
    second.name, first.name = names
    return True


def missing_clamp(model: onnx_ir.Model) -> bool:
    """The last clamp is not there; a hyperbolic tangent that keeps values within limits is one, too."""
    nodes = [n for n in model.graph if n.op_type in ("Clip", "Tanh")]
    if not nodes:
        return False
    value = nodes[-1].inputs[0]
    assert value is not None
    if nodes[-1].outputs[0].is_graph_output():  # which keeps its name
        value = Maker(model.graph, nodes[-1], "unclamped").node("Identity", [value])
    drop(nodes[-1], value)
    return True


def wrong_softmax_axis(model: onnx_ir.Model) -> bool:
    """One softmax sums over queries in place of keys."""
    node = _middle([n for n in model.graph if n.op_type == "Softmax" and integer(n, "axis", -1) == -1])
    if node is None:
        return False
    node.attributes["axis"] = onnx_ir.AttrInt64("axis", -2)
    return True


def scaling_left_out(model: onnx_ir.Model) -> bool:
    """One multiplication or division by a constant is not there."""
    node = _middle([n for n in model.graph if _scales(n) is not None])
    if node is None:
        return False
    value = node.inputs[1 - int(_scales(node) or 0)]
    assert value is not None
    if node.outputs[0].is_graph_output():
        value = Maker(model.graph, node, "unscaled").node("Identity", [value])
    drop(node, value)
    return True


def _scales(node: onnx_ir.Node) -> int | None:
    """Which input of a node is a factor that is not 1 and changes no shape."""
    for index in {"Mul": (0, 1), "Div": (1,)}.get(node.op_type, ()):
        factor = _floats(node.inputs[index])
        if factor is not None and factor.ndim < 4 and not np.allclose(factor, 1, atol=1e-3):
            return index
    return None


def transposed_kernel(model: onnx_ir.Model) -> bool:
    """The weights of one layer have rows for columns."""
    return _change_weights(model, lambda weights: weights.swapaxes(-1, -2), square=True)


def stale_statistics(model: onnx_ir.Model) -> bool:
    """One batch norm has a running variance of some steps before."""
    node = _middle([n for n in model.graph if n.op_type == "BatchNormalization"])
    if node is None:
        return False
    variance = constant(node.inputs[4])
    assert variance is not None
    set_constant(node, 4, (variance * _STALE).astype(variance.dtype))
    return True


def noise_added(model: onnx_ir.Model) -> bool:
    """The first output is off by up to a ten-thousandth of itself, by a hash of its value."""
    graph = model.graph
    output = graph.outputs[0]
    node = output.producer()
    assert node is not None
    name, output.name = output.name, "noise.before"
    make = Maker(graph, node, "noise")
    fast, small = (
        add_constant(graph, f"noise.{name}", np.float32(v)) for name, v in (("fast", 1e4), ("small", _NOISE))
    )
    steps: list[onnx_ir.Value] = []
    for operator, inputs in (
        ("Mul", lambda: [output, fast]), ("Sin", lambda: [steps[-1]]), ("Mul", lambda: [steps[-1], small]),
        ("Mul", lambda: [steps[-1], output]), ("Add", lambda: [output, steps[-1]]),
    ):  # fmt: skip
        steps.append(make.node(operator, inputs()))
    for step in steps:
        producer = step.producer()
        assert producer is not None
        graph.remove(producer)
        graph.append(producer)
    last = steps[-1]
    last.name, last.type, last.shape = name, output.type, output.shape
    graph.outputs[0] = last
    return True


def zero_channel(model: onnx_ir.Model) -> bool:
    """One layer's last channel gives 0 but for its bias."""

    def change(weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
        weights[-1] = 0
        return weights

    return _change_weights(model, change)


FAULTS: dict[str, Fault] = {
    "another epsilon": another_epsilon,
    "dropped bias": dropped_bias,
    "one weight off by 1e-3": one_weight,
    "other padding": other_padding,
    "off-by-one crop": shifted_crop,
    "bilinear for nearest": bilinear,
    "nearest rounded up": nearest_from_the_other_side,
    "tanh for exact GELU": tanh_gelu,
    "another activation": another_activation,
    "weights through float16": through_float16,
    "weights through bfloat16": through_bfloat16,
    "swapped outputs": swapped_outputs,
    "missing clamp": missing_clamp,
    "wrong softmax axis": wrong_softmax_axis,
    "scaling left out": scaling_left_out,
    "transposed kernel": transposed_kernel,
    "stale batch-norm statistics": stale_statistics,
    "noise added": noise_added,
    "zeroed channel": zero_channel,
}


def drop(node: onnx_ir.Node, instead: onnx_ir.Value) -> None:
    """Take a node with one output away; as `replace`."""
    graph = node.graph
    assert graph is not None
    replace(node.outputs[0], instead)
    graph.remove(node, safe=True)


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
