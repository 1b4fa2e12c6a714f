"""ONNX → ONNX. Nothing here needs PyTorch; everything needs the packages onnx and onnx-ir."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir

from vae_export.errors import InputError
from vae_export.graph import weights


def read(model: bytes, arrays: Mapping[str, npt.NDArray[Any]] | None = None) -> onnx_ir.Model:
    """Parse a serialized ModelProto into a graph that can be changed and holds all its weights.

    Args:
        model: the ModelProto's bytes.
        arrays: by name, the weights stored in another file, as `onnx_guard.check_operators` returns them.
    """
    graph: onnx_ir.Model = onnx_ir.from_proto(onnx.ModelProto.FromString(model))
    weights.inline(graph, arrays or {})
    return graph


def write(model: onnx_ir.Model, limit: int = weights.LIMIT) -> bytes:
    """Serialize a graph as a ModelProto; equal graphs give equal bytes.

    Args:
        model: the graph.
        limit: the most bytes of weights that one file may have.

    Raises:
        InputError: the graph has more weights than that.
    """
    if (size := weights.size(model)) > limit:
        raise InputError(
            f"the graph {model.graph.name} has {size:,} bytes of weights; one file can have up to {limit:,}. "
            "Build in fp16, which halves them, or use the bundle without a build: it keeps them beside its graphs"
        )
    raw: bytes = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    return raw
