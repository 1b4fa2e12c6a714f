"""A bundle's encoder and decoder with the inputs and outputs of Hugging Face Optimum's ONNX export of a VAE.

Requires: an encoder and a decoder whose inputs and outputs are float32 and named as in `Model.signature`; data
(C, H, W) and latents (C, h, w).
Ensures: the encoder takes `sample` and gives `latent_parameters`, mean and logvar one after the other along the
channels, or, where it is deterministic, `latent_sample`; the decoder takes `latent_sample` and gives `sample`. Sizes
that vary have Optimum's names, in which an output's size is an expression of the input's, such as
`sample_height / 8`: Optimum computes it to make room for the output. Every node that is left is as it was.
"""

from __future__ import annotations

import onnx_ir

from vae_export.contract.model import LatentDim, Model, SizeDim, Tensor
from vae_export.graph.fuse import finish, prefix_inner

_AXES = ("channels", "height", "width")


def encoder(graph: onnx_ir.Model, model: Model) -> onnx_ir.Model:
    """Sample → latent_parameters or latent_sample. The graph is used up."""
    data, latent = model.data.shape, model.latent.shape
    axes = {dim.name: f"sample_{axis}" for dim, axis in zip(data, _AXES, strict=True) if isinstance(dim, SizeDim)}
    taken = tuple(axes[dim.name] if isinstance(dim, SizeDim) else dim for dim in data)
    given = tuple(_expression(axes[dim.name], "/", dim) if isinstance(dim, LatentDim) else dim for dim in latent)
    prefix_inner(graph, "encoder")
    _rename_input(graph, "sample", taken)
    ends = list(graph.graph.outputs)
    if len(ends) == 1:
        ends[0].name = "latent_sample"
        return finish(graph, "vae_encoder", (_tensor("latent_sample", given),))
    node = onnx_ir.node("Concat", ends, {"axis": 1}, name="latent_parameters.node")
    node.outputs[0].name = "latent_parameters"
    node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph.graph.append(node)
    channels = given[0]
    assert isinstance(channels, int)
    return finish(graph, "vae_encoder", (_tensor("latent_parameters", (2 * channels, *given[1:])),))


def decoder(graph: onnx_ir.Model, model: Model) -> onnx_ir.Model:
    """latent_sample → sample: the mean of p(x|z). The graph is used up."""
    data, latent = model.data.shape, model.latent.shape
    follows = {dim.name: (axis, dim) for dim, axis in zip(latent, _AXES, strict=True) if isinstance(dim, LatentDim)}
    taken = tuple(
        f"latent_{axis}" if isinstance(dim, LatentDim) else dim for dim, axis in zip(latent, _AXES, strict=True)
    )
    given: list[int | str] = []
    for dim in data:
        if isinstance(dim, SizeDim):
            axis, latent_dim = follows[dim.name]
            given.append(_expression(f"latent_{axis}", "*", latent_dim))
        else:
            given.append(dim)
    prefix_inner(graph, "decoder")
    _rename_input(graph, "latent_sample", taken)
    return finish(graph, "vae_decoder", (_tensor("sample", tuple(given)),))


def _rename_input(graph: onnx_ir.Model, name: str, shape: tuple[int | str, ...]) -> None:
    value = graph.graph.inputs[0]
    value.name, value.shape = name, onnx_ir.Shape(("batch_size", *shape))


def _tensor(name: str, shape: tuple[int | str, ...]) -> Tensor:
    return Tensor(name=name, dtype="float32", shape=("batch_size", *shape))


def _expression(axis: str, operator: str, dim: LatentDim) -> str:
    return axis if dim.divided_by == 1 else f"{axis} {operator} {dim.divided_by}"
