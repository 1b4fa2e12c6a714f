"""Encoders and decoders of the zoo, what is fused of them, and how their results are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import zoo
from onnx import TensorProto, helper, numpy_helper

from vae_export import graph
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import GRAPHS, Model
from vae_export.graph import fuse
from vae_export.graph.half import to_half
from vae_export.numerics import noise

Graphs = dict[str, bytes]
Arrays = dict[str, np.ndarray]

#: Every member and what can be fused of it: vectors are no pictures.
FUSIONS = [(name, fusion) for name in zoo.MEMBERS for fusion in ("reconstruct", "generate")]
FUSIONS.remove(("plain", "generate"))
#: Of two ways through the same arithmetic, as a share of the largest value: some 80 units in the last place.
CLOSE = 5e-6


def graphs_of(member: Callable[[str], Any], name: str) -> tuple[Model, Graphs]:
    """A member's description and the bytes of its encoder and decoder."""
    bundle = Bundle(member(name).bundle)
    manifest = bundle.manifest
    return manifest.model, {part: bundle.read(manifest.graphs[part].file) for part in GRAPHS}


def fused_bytes(fusion: str, parts: Graphs, model: Model) -> bytes:
    decoder = graph.read(parts["decoder"])
    if fusion == "generate":
        return graph.write(fuse.generate(decoder, model))
    return graph.write(fuse.reconstruct(graph.read(parts["encoder"]), decoder, model))


def lowered(raw: bytes, precision: Any, name: str = "graph") -> bytes:
    return graph.write(to_half(graph.read(raw), precision, name))


def run(raw: bytes, feed: Mapping[str, np.ndarray]) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def shapes(model: Model) -> list[dict[str, int]]:
    """Sizes to try: two where they are named."""
    return [{"height": 8, "width": 20}, {"height": 32, "width": 12}] if model.data.named() else [{}]


def inputs(model: Model, name: str, batch: int, size: Mapping[str, int]) -> Arrays:
    """A graph's inputs: patterns in the data's range, and addressed noise."""
    found: Arrays = {}
    low, high = model.data.range
    for tensor in model.signature(name)[0]:
        shape = model.tensor_shape(tensor, batch, size)
        if tensor.name == "x":
            found["x"] = (zoo.pictures(batch, shape[1:]) * (high - low) + low).astype(np.float32)
        else:
            stream = noise.POSTERIOR if tensor.name == "eps" else noise.PRIOR
            found[tensor.name] = noise.normals(7, stream, 3, batch, math.prod(shape[1:])).reshape(shape)
    return found


def close(got: Arrays, expected: Arrays, share: float) -> None:
    """Of one shape, finite, and off by at most a share of the largest value."""
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name].shape == value.shape
        assert got[name].dtype == value.dtype
        assert np.isfinite(got[name]).all()
        assert np.abs(got[name] - value).max() <= share * np.abs(value).max(), name


def check_ends(proto: onnx.ModelProto, model: Model, name: str) -> None:
    types = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}

    def end(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int | str, ...]]:
        tensor = value.type.tensor_type
        return value.name, tensor.elem_type, tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)

    for found, wanted in zip((proto.graph.input, proto.graph.output), model.signature(name), strict=True):
        assert [end(value) for value in found] == [(t.name, types[t.dtype], t.shape) for t in wanted]


def check_needed(proto: onnx.ModelProto) -> None:
    """Every node and every weight is on the way to an output, and every name is there once."""
    needed = {value.name for value in proto.graph.output}
    for node in reversed(proto.graph.node):
        assert needed & set(node.output), f"{node.op_type} {node.name} is not needed"
        needed |= set(node.input)
    weights = [tensor.name for tensor in proto.graph.initializer]
    assert set(weights) <= needed
    names = weights + [name for node in proto.graph.node for name in node.output]
    assert len(set(names)) == len(names)


def model_of(
    nodes: list[Any], into: list[Any], out: list[Any], weights: Arrays, values: Any = None, opset: int = 20
) -> bytes:
    """A serialized graph of float32 inputs and outputs, given as (name, shape). The types of inner values are
    inferred, as those of a bundle's are, if none are given.
    """
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in end] for end in (into, out)]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    inner = [helper.make_tensor_value_info(*value) for value in values or ()]
    made = helper.make_graph(nodes, "test", *ends, tensors, value_info=inner)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    raw: bytes = (onnx.shape_inference.infer_shapes(model) if values is None else model).SerializeToString()
    return raw
