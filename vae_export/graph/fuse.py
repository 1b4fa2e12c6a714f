"""The fused graphs: `reconstruct` (x, eps → sample), `generate` (z → uint8 image, channels last) and `score` (x, eps →
the ELBO and its parts).

Requires: an encoder and a decoder whose inputs and outputs are float32 and named as in `Model.signature`.
Ensures: inputs and outputs as in `Model.signature`; float32 between the two graphs and float64 in sums over an example,
whatever the precision inside of them. Nothing is computed that the outputs do not need.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vae_export.contract.model import SCORE_OUTPUTS, Model, Tensor
from vae_export.graph.edit import add_constant
from vae_export.graph.likelihood import log_prob_terms
from vae_export.graph.nodes import Formula, node


def reconstruct(encoder: onnx_ir.Model, decoder: onnx_ir.Model, model: Model) -> onnx_ir.Model:
    """x, eps → the mean of p(x|z) at z = mean + exp(½ logvar) · eps (Kingma & Welling 2014, section 2.4).

    Without a posterior variance there is no eps: z is the mean. Consumes both graphs.
    """
    inputs, outputs = model.signature("reconstruct")
    prefix_inner(encoder, "encoder")
    prefix_inner(decoder, "decoder")
    graph = encoder.graph
    posterior = {value.name: value for value in graph.outputs}
    z = _draw(graph, posterior, inputs[1]) if "logvar" in posterior else posterior["mean"]
    graph.outputs.clear()
    return finish(_follow(encoder, decoder, {"z": z}), "reconstruct", outputs)


def score(encoder: onnx_ir.Model, decoder: onnx_ir.Model, model: Model) -> onnx_ir.Model:
    """x, eps → log p(x|z) at that z, KL(q(z|x) || p(z)), and the ELBO, their difference: Kingma & Welling 2014, eq. 7.

    In nats, (batch,) float64. The KL is the closed form of appendix B. Consumes both graphs.
    """
    inputs, outputs = model.signature("score")
    prefix_inner(encoder, "encoder")
    prefix_inner(decoder, "decoder")
    graph = encoder.graph
    posterior = {value.name: value for value in graph.outputs}
    parameters = {str(value.name): value for value in decoder.graph.outputs}
    z = _draw(graph, posterior, inputs[1])
    graph.outputs.clear()
    _follow(encoder, decoder, {"z": z})
    f = Formula(graph, "score")
    mean, logvar = f.double(posterior["mean"]), f.double(posterior["logvar"])
    # exp(v) − 1 − v ≥ 0; for small v its rounding may be negative.
    excess = f("Max", f("Sub", f("Sub", f("Exp", logvar), 1.0), logvar), 0.0)
    kl_terms = f("Mul", f("Add", f("Mul", mean, mean), excess), 0.5)
    log_prob = log_prob_terms(f, graph.inputs[0], parameters, model)
    log_likelihood, kl, elbo = SCORE_OUTPUTS
    reconstruction = f.per_example(log_prob, len(inputs[0].shape), log_likelihood)
    divergence = f.per_example(kl_terms, len(inputs[1].shape), kl)
    f("Sub", reconstruction, divergence, name=elbo)
    return finish(encoder, "score", outputs)


def generate(decoder: onnx_ir.Model, model: Model) -> onnx_ir.Model:
    """Z → images (batch, H, W, C) uint8: `pixels.to_uint8` of the mean of p(x|z). Consumes the graph.

    The cast to uint8 is the last node, as TensorRT requires.
    """
    _, outputs = model.signature("generate")
    prefix_inner(decoder, "decoder")
    graph = decoder.graph
    sample = next(value for value in graph.outputs if value.name == "sample")
    sample.name = "decoder.sample"
    low, high = model.data.range
    shifted = node(graph, "Sub", [sample, add_constant(graph, "image.low", np.float32(low))], "image.shifted")
    levels = add_constant(graph, "image.levels", np.float32(255.0 / (high - low)))
    scaled = node(graph, "Mul", [shifted, levels], "image.scaled")
    black, white = (add_constant(graph, f"image.{n}", np.float32(v)) for n, v in (("black", 0.0), ("white", 255.0)))
    clamped = node(graph, "Clip", [scaled, black, white], "image.clamped")
    rounded = node(graph, "Round", [clamped], "image.rounded")
    last = node(graph, "Transpose", [rounded], "image.channels_last", {"perm": [0, 2, 3, 1]})
    node(graph, "Cast", [last], "image", {"to": onnx_ir.DataType.UINT8})
    return finish(decoder, "generate", outputs)


def _draw(graph: onnx_ir.Graph, posterior: Mapping[str | None, onnx_ir.Value], noise: Tensor) -> onnx_ir.Value:
    """Append z = mean + exp(½ logvar) · eps to an encoder, and eps to its inputs."""
    eps = _value(noise)
    graph.inputs.append(eps)
    half = add_constant(graph, "draw.half", np.float32(0.5))
    scaled = node(graph, "Mul", [posterior["logvar"], half], "draw.scaled")
    std = node(graph, "Exp", [scaled], "draw.std")
    moved = node(graph, "Mul", [std, eps], "draw.moved")
    return node(graph, "Add", [posterior["mean"], moved], "draw.z")


def prefix_inner(model: onnx_ir.Model, prefix: str) -> None:
    """Prefix every inner name, so that two graphs can be joined; inputs and outputs keep theirs.

    Inner shapes are dropped: both graphs may use one name for different sizes, and runtimes infer shapes again.
    """
    signature = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for inner in model.graph.all_nodes():
        if inner.name:  # names are optional and must be unique
            inner.name = f"{prefix}.{inner.name}"
        for value in inner.outputs:
            if id(value) not in signature:
                value.name, value.shape = f"{prefix}.{value.name}", None
    for value in list(model.graph.initializers.values()):
        value.name = f"{prefix}.{value.name}"


def _follow(first: onnx_ir.Model, second: onnx_ir.Model, join: Mapping[str, onnx_ir.Value]) -> onnx_ir.Model:
    """Append the second graph's nodes to the first; `join` maps the second's inputs to values of the first."""
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
    """Name the graph, set its outputs, and remove what they do not need."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.name = name
    model.graph.outputs.clear()
    for tensor in outputs:
        value = values[tensor.name]
        value.shape, value.dtype = onnx_ir.Shape(tensor.shape), onnx_ir.DataType.from_numpy(np.dtype(tensor.dtype))
        model.graph.outputs.append(value)
    RemoveUnusedNodesPass()(model)
    return model


def _value(tensor: Tensor) -> onnx_ir.Value:
    return onnx_ir.Value(
        name=tensor.name, shape=onnx_ir.Shape(tensor.shape), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    )
