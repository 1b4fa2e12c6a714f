"""Moves weights between a graph and a file beside it: a protobuf message cannot exceed 2 GiB.

Requires: for `inline`, the arrays of `onnx_guard.check_operators`.
Ensures: only where weights are stored changes. `apart` leaves constants below 1 KiB, such as shapes, in the graph:
shape inference needs their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx_ir

#: The most bytes of weights that a graph of one file has, with room for its nodes below 2 GiB.
LIMIT = 1_900_000_000
_SMALL = 1024
_ALIGNMENT = 64


def size(model: onnx_ir.Model) -> int:
    """The bytes of all weights that are stored in the graph."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sum(t.nbytes for t in tensors if t is not None and not isinstance(t, onnx_ir.ExternalTensor))


def inline(model: onnx_ir.Model, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Store weights in the graph: by name, the arrays that were in another file."""
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = onnx_ir.tensor(array, name=name)


def apart(model: onnx_ir.Model, location: str, limit: int = LIMIT) -> bytes | None:
    """Move the weights of a large graph into another file.

    Args:
        model: the graph, changed in place.
        location: the other file's name, in the graph's folder.
        limit: a graph with no more bytes of weights is not changed.

    Returns:
        The other file's content, or None if the graph was not changed.
    """
    if size(model) <= limit:
        return None
    pieces: list[bytes] = []
    end = 0
    for value in model.graph.initializers.values():
        tensor: Any = value.const_value  # of an initializer it is never None
        if tensor.nbytes < _SMALL:
            continue
        padding = -end % _ALIGNMENT
        pieces += [bytes(padding), tensor.tobytes()]
        value.const_value = onnx_ir.ExternalTensor(
            location, end + padding, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=tensor.name
        )
        end += padding + tensor.nbytes
    return b"".join(pieces)
