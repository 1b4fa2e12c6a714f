"""ONNX → ONNX: one pass a file. None needs PyTorch; all need the packages onnx and onnx-ir."""

from __future__ import annotations

import onnx
import onnx_ir


def read(model: bytes) -> onnx_ir.Model:
    """A serialized ModelProto as a graph that can be changed."""
    graph: onnx_ir.Model = onnx_ir.from_proto(onnx.ModelProto.FromString(model))
    return graph


def write(model: onnx_ir.Model) -> bytes:
    """The bytes of a graph, the same for the same graph."""
    raw: bytes = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    return raw
