"""The fused graphs: `reconstruct` (x, eps → sample) and `generate` (z → uint8 image, channels last).

Requires: an encoder and a decoder whose inputs and outputs are float32 and named as in `Model.ends`.
Ensures: inputs and outputs as in `Model.ends`; what joins the two is computed in float32, whatever the precision
inside of them; no output that is not asked for is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vae_export.manifest import Model, Tensor


def reconstruct(encoder: onnx_ir.Model, decoder: onnx_ir.Model, model: Model) -> onnx_ir.Model:
    """x, eps → the mean of p(x|z) at z = mean + exp(½ logvar) · eps (Kingma & Welling 2014, section 2.4).

    A deterministic encoder has no eps: z is its mean. Both models are used up.
    """
    inputs, outputs = model.ends("reconstruct")
    prefix_inner(encoder, "encoder")
    prefix_inner(decoder, "decoder")
    graph = encoder.graph
    ends = {value.name: value for value in graph.outputs}
    z = ends["mean"]
    if "logvar" in ends:
        eps = _value(inputs[1])
        graph.inputs.append(eps)
        half = _constant(graph, "draw.half", np.float32(0.5))
        scaled = _node(graph, "Mul", [ends["logvar"], half], "draw.scaled")
        std = _node(graph, "Exp", [scaled], "draw.std")
        moved = _node(graph, "Mul", [std, eps], "draw.moved")
        z = _node(graph, "Add", [z, moved], "draw.z")
    graph.outputs.clear()
    return finish(_follow(encoder, decoder, {"z": z}), "reconstruct", outputs)


def generate(decoder: onnx_ir.Model, model: Model) -> onnx_ir.Model:
    """Z → images (batch, H, W, C) uint8: `pixels.to_uint8` of the mean of p(x|z). The model is used up.

    The cast to uint8 is the last node, as TensorRT wants it.
    """
    _, outputs = model.ends("generate")
    prefix_inner(decoder, "decoder")
    graph = decoder.graph
    sample = next(value for value in graph.outputs if value.name == "sample")
    sample.name = "decoder.sample"
    low, high = model.data.range
    shifted = _node(graph, "Sub", [sample, _constant(graph, "image.low", np.float32(low))], "image.shifted")
    levels = _constant(graph, "image.levels", np.float32(255.0 / (high - low)))
    scaled = _node(graph, "Mul", [shifted, levels], "image.scaled")
    black, white = (_constant(graph, f"image.{n}", np.float32(v)) for n, v in (("black", 0.0), ("white", 255.0)))
    clamped = _node(graph, "Clip", [scaled, black, white], "image.clamped")
    rounded = _node(graph, "Round", [clamped], "image.rounded")
    last = _node(graph, "Transpose", [rounded], "image.channels_last", {"perm": [0, 2, 3, 1]})
    _node(graph, "Cast", [last], "image", {"to": onnx_ir.DataType.UINT8})
    return finish(decoder, "generate", outputs)


def prefix_inner(model: onnx_ir.Model, prefix: str) -> None:
    """Put a prefix before every inner name, so that two graphs can be joined. Ends keep theirs.

    Inner shapes go: both graphs may call sizes that differ by one name, and whoever opens a graph infers them again.
    """
    ends = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        if node.name:  # a name is optional, and given twice it is an error
            node.name = f"{prefix}.{node.name}"
        for value in node.outputs:
            if id(value) not in ends:
                value.name, value.shape = f"{prefix}.{value.name}", None
    for value in list(model.graph.initializers.values()):
        value.name = f"{prefix}.{value.name}"


def _follow(first: onnx_ir.Model, second: onnx_ir.Model, join: Mapping[str, onnx_ir.Value]) -> onnx_ir.Model:
    """Put the second model's nodes behind the first's; `join` says what the second's inputs become."""
    for value in second.graph.inputs:
        assert value.name is not None
        onnx_ir.convenience.replace_all_uses_with(value, join[value.name])
    weights = list(second.graph.initializers.values())
    second.graph.initializers.clear()
    for value in weights:
        first.graph.register_initializer(value)
    nodes = list(second.graph)
    second.graph.outputs.clear()
    second.graph.remove(nodes)
    first.graph.extend(nodes)
    return first


def finish(model: onnx_ir.Model, name: str, outputs: tuple[Tensor, ...]) -> onnx_ir.Model:
    """Name the graph, set its outputs, and drop what they do not need."""
    found = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.name = name
    model.graph.outputs.clear()
    for tensor in outputs:
        value = found[tensor.name]
        value.shape, value.dtype = (
            onnx_ir.Shape(tensor.shape),
            onnx_ir.DataType[tensor.dtype.upper().replace("FLOAT32", "FLOAT")],
        )
        model.graph.outputs.append(value)
    RemoveUnusedNodesPass()(model)
    return model


def _value(tensor: Tensor) -> onnx_ir.Value:
    return onnx_ir.Value(
        name=tensor.name, shape=onnx_ir.Shape(tensor.shape), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    )


def _constant(graph: onnx_ir.Graph, name: str, value: np.float32) -> onnx_ir.Value:
    constant = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape([]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
        const_value=onnx_ir.tensor(np.asarray(value), name=name),
    )  # fmt: skip
    graph.register_initializer(constant)
    return constant


def _node(
    graph: onnx_ir.Graph,
    operator: str,
    inputs: list[onnx_ir.Value],
    output: str,
    attributes: Mapping[str, Any] | None = None,
) -> onnx_ir.Value:
    """Append a node with one float32 output."""
    node = onnx_ir.node(operator, inputs, attributes or {}, name=f"{output}.node")
    value = node.outputs[0]
    value.name, value.type = output, onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph.append(node)
    return value
