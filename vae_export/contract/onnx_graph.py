"""The parts of an ONNX graph that constant folding depends on: nodes, constants, and sizes of the inputs.

Small constants, which may be shapes, have their values here; of all others only the shape, as a broadcast view of a
single number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

#: Constants of up to so many numbers have their values here.
SMALL: Final = 1024
MAX_RANK: Final = 64
#: The number of elements of a constant whose size the graph alone does not determine.
UNKNOWN: Final = 1 << 62

#: TensorProto.DataType to NumPy's; of bfloat16 only the size is right, of narrower types and strings not even that.
TYPES: Final[dict[int, npt.DTypeLike]] = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_,
    10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64, 14: np.complex64, 15: np.complex128, 16: np.uint16,
}  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """A value that does not depend on the graph's inputs.

    Attributes:
        most: an upper bound of its number of elements.
        width: bytes of an element.
        array: an array of its shape and type, where they are known.
        known: whether the array's numbers are the constant's, too.
    """

    most: int
    width: int = 16
    array: npt.NDArray[Any] | None = None
    known: bool = False


@dataclass(frozen=True)
class Node:
    """A node: attributes are whole numbers, lists of them, floats, bytes, `Constant` or `Graph`."""

    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Graph:
    """A graph, as far as constant folding needs it.

    Attributes:
        inputs: sizes by name; None for a dimension that varies, or for all of them.
        constants: initializers by name.
        nodes: in their order.
    """

    inputs: dict[str, list[int | None] | None] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)


def constant(shape: Sequence[int], dtype: npt.DTypeLike | None, values: npt.NDArray[Any] | None = None) -> Constant:
    """A constant of a shape and type, with its values where they are given.

    Raises:
        OverflowError: it would have 2^58 elements or more.
        ValueError: the shape is invalid.
    """
    count = math.prod(shape)
    if count >= 1 << 58:
        raise OverflowError(f"{count} elements")
    if dtype is None or len(shape) > MAX_RANK:
        return Constant(count)
    if values is not None:
        return Constant(count, values.itemsize, values.reshape(shape), known=True)
    kind = np.dtype(dtype)
    return Constant(count, kind.itemsize, np.broadcast_to(np.zeros((), kind), tuple(shape)))
