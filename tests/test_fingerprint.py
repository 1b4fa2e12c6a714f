"""The fingerprint of a graph: weights do not change it, and everything else does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import zoo
from fusions import fused_bytes, graphs_of, lowered
from onnx import TensorProto, helper, numpy_helper

import vae_export
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import GRAPHS
from vae_export.graph import fingerprint


def edited(raw: bytes, edit: Callable[[onnx.ModelProto], object]) -> bytes:
    proto = onnx.ModelProto.FromString(raw)
    edit(proto)
    content: bytes = proto.SerializeToString()
    return content


def floating(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from (t for t in proto.graph.initializer if t.data_type not in (TensorProto.INT64, TensorProto.INT32))


def reweight(proto: onnx.ModelProto) -> None:
    """Other values, and stored in another of ONNX's two ways."""
    for index, tensor in enumerate(floating(proto)):
        values = numpy_helper.to_array(tensor)
        other = (values.astype(np.float32) * 0.5 + 1).astype(values.dtype)
        name, dims, kind = tensor.name, list(tensor.dims), tensor.data_type
        if index % 2:
            tensor.CopyFrom(helper.make_tensor(name, kind, dims, other.astype(np.float32).ravel()))
        else:
            tensor.CopyFrom(numpy_helper.from_array(other, name))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", zoo.MEMBERS)
def test_other_weights_are_the_same_structure(member: Any, name: str, precision: str) -> None:
    model, parts = graphs_of(member, name)
    digests = set()
    for raw in (*parts.values(), fused_bytes("reconstruct", parts, model)):
        made = raw if precision == "fp32" else lowered(raw, precision)
        other = edited(made, reweight)
        assert other != made
        assert fingerprint.digest(other) == fingerprint.digest(made)
        digests.add(fingerprint.digest(made))
    assert len(digests) == 3


def test_a_model_exported_with_other_weights_is_the_same_structure(member: Any, tmp_path: Any) -> None:
    model, parts = graphs_of(member, "mlp-gaussian")
    source = zoo.MEMBERS["mlp-gaussian"]()
    for parameter in source.module.parameters():
        parameter.data *= 0.75
    vae_export.export(source, tmp_path / "again")
    bundle = Bundle(tmp_path / "again")
    other = {part: bundle.read(bundle.manifest.graphs[part].file) for part in GRAPHS}
    for found in (parts, other):
        found["reconstruct"] = fused_bytes("reconstruct", found, model)
    for part, raw in other.items():
        assert raw != parts[part]
        assert fingerprint.digest(raw) == fingerprint.digest(parts[part])


def first(proto: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.op_type == op)


def change_integer(proto: onnx.ModelProto) -> None:
    tensor = next(t for t in proto.graph.initializer if t.data_type == TensorProto.INT64)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, tensor.name))


def change_attribute(proto: onnx.ModelProto) -> None:
    next(a for a in first(proto, "Conv").attribute if a.name == "strides").ints[0] += 1


def change_size(proto: onnx.ModelProto) -> None:
    tensor = next(floating(proto))
    tensor.CopyFrom(numpy_helper.from_array(np.zeros((*tensor.dims, 1), np.float32), tensor.name))


def change_type(proto: onnx.ModelProto) -> None:
    tensor = next(floating(proto))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


@pytest.mark.parametrize(
    "edit",
    [
        *(change_integer, change_attribute, change_size, change_type),
        lambda proto: setattr(first(proto, "Conv"), "op_type", "ConvTranspose"),
        lambda proto: proto.graph.node.pop(),
        lambda proto: setattr(next(floating(proto)), "name", "other"),
        lambda proto: setattr(proto.opset_import[0], "version", proto.opset_import[0].version + 1),
        lambda proto: setattr(proto.graph.output[0], "name", "other"),
    ],
)
def test_another_structure(member: Any, edit: Callable[[onnx.ModelProto], object]) -> None:
    raw = graphs_of(member, "conv-gaussian")[1]["encoder"]
    assert fingerprint.digest(edited(raw, edit)) != fingerprint.digest(raw)
