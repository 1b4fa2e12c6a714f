"""Weight-independent fingerprint of a graph."""

from __future__ import annotations

import hashlib

import onnx

_FLOATING = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}


def digest(model: bytes) -> str:
    """SHA-256, in hexadecimal, of a serialized graph without the values of its floating-point weights.

    Graphs with equal digests have one architecture: an engine of one can be refitted with the weights of the other.
    """
    proto = onnx.ModelProto.FromString(model)
    for tensor in proto.graph.initializer:
        if tensor.data_type in _FLOATING:
            for field in ("raw_data", "float_data", "int32_data", "double_data"):
                tensor.ClearField(field)
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
