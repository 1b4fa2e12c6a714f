"""ONNX → ONNX: one pass a file. None needs PyTorch; all need the packages onnx and onnx-ir."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir

from vae_export.errors import InputError
from vae_export.graph import weights


def read(model: bytes, arrays: Mapping[str, npt.NDArray[Any]] | None = None) -> onnx_ir.Model:
    """A serialized ModelProto as a graph that can be changed, with its weights in it.

    Args:
        model: its bytes.
        arrays: the weights that lie beside it: what `onnx_reader.check_operators` gave.
    """
    graph: onnx_ir.Model = onnx_ir.from_proto(onnx.ModelProto.FromString(model))
    weights.inline(graph, arrays or {})
    return graph


def write(model: onnx_ir.Model) -> bytes:
    """The bytes of a graph, the same for the same graph.

    Raises:
        InputError: it has more weights than one file can have.
    """
    if (found := weights.size(model)) > weights.LIMIT:
        raise InputError(
            f"the graph {model.graph.name} has {found:,} bytes of weights; one file can have up to {weights.LIMIT:,}. "
            "Build in fp16, which halves them, or use the bundle without a build: it keeps them beside its graphs"
        )
    raw: bytes = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    return raw
