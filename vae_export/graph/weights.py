"""Weights in one file beside a graph that would be too large with them: protobuf ends at 2 GiB.

Requires: for `inline`, the arrays of `onnx_reader.check_operators`.
Ensures: nothing but where the values of weights lie is changed. `apart` leaves what is small, such as shapes, in the
graph: whoever opens it needs their values to understand it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx_ir

#: A graph with more bytes of weights than this cannot be one file.
LIMIT = 1_900_000_000
_SMALL = 1024
_ALIGNMENT = 64


def size(model: onnx_ir.Model) -> int:
    """The bytes of all weights that are in the graph."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sum(t.nbytes for t in tensors if t is not None and not isinstance(t, onnx_ir.ExternalTensor))


def inline(model: onnx_ir.Model, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Give weights that lie beside a graph the values of these arrays."""
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = onnx_ir.tensor(array, name=name)


def apart(model: onnx_ir.Model, location: str) -> bytes | None:
    """Take the weights out of a graph that is above the limit.

    Returns:
        The content of the file `location` that belongs beside the graph, or None where the graph is small enough and
        was not changed.
    """
    if size(model) <= LIMIT:
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
