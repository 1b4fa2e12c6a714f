"""Which operators and tensors an ONNX file has, read without the `onnx` package.

A runtime must know, before it opens a stranger's graph, that nothing in it draws random numbers, loops
without bound, needs a custom operator or reads another file. This walks the protobuf wire format (the
fields of onnx.proto3 that hold nodes and tensors) and skips everything else, weights included. Weights of the main
graph may lie in one file beside it, whose verified bytes are given here: each becomes an array over those bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vae_export import onnx_attributes
from vae_export.errors import BundleError

_STANDARD = {"", "ai.onnx"}
_RANDOM = {
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    *("Bernoulli", "Multinomial", "Dropout"),
}
_REPEATING = {"Loop", "Scan", "SequenceMap"}
_DEPTH = 32

# Field numbers of onnx.proto3.
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_FUNCTION_NODE, _FUNCTION_DEFAULT = 7, 11
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_INTS, _ATTRIBUTE_TYPE = 1, 3, 8, 20
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE = (22, 23)
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 13, 14
#: Those, a description and metadata: what a tensor may have whose values lie beside the graph.
_TENSOR_APART = {_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION, 12, 16}
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
#: TensorProto.DataType of what may lie beside the graph.
_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 10: np.float16, 11: np.float64}

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Weights:
    """The verified content of the one file in which weights of a graph may lie.

    Attributes:
        location: its name, as the graph must say it.
        data: its bytes.
    """

    location: str
    data: bytes


@dataclass(frozen=True)
class _Apart:
    """The weights that were found to lie beside the graph."""

    weights: Weights
    arrays: Arrays = field(default_factory=dict)


def check_operators(model: bytes, name: str, weights: Weights | None = None) -> Arrays:
    """Refuse a graph that is not a pure function of its inputs and its own bytes.

    Args:
        model: a serialized ONNX ModelProto.
        name: what to call it in messages.
        weights: the file in which its weights may lie; None where they must be in the graph.

    Returns:
        The weights that lie in that file, by name: arrays over its bytes, nothing is copied.

    Raises:
        BundleError: it has a random operator, a loop, an operator of another domain, weights in another
            file or outside of the given one, or is not an ONNX file.
    """
    apart = _Apart(weights) if weights else None
    if model[4:8] == b"ORTM":
        raise BundleError(f"{name}: is a model in ONNX Runtime's own format, which is not read; expected ONNX")
    for operator in _model_operators(memoryview(model), name, apart):
        if "." in operator:
            raise BundleError(f"{name}: the operator {operator} is not a standard ONNX operator. It is not run")
        if operator in _RANDOM:
            raise BundleError(
                f"{name}: the graph draws random numbers ({operator}), which no seed can reproduce. "
                "Noise must be an input: let encode return the posterior's mean and log-variance, unsampled"
            )
        if operator in _REPEATING:
            raise BundleError(f"{name}: the graph has a {operator}, which may never end. It is not run")
    return apart.arrays if apart else {}


def _model_operators(model: memoryview, name: str, apart: _Apart | None = None) -> Iterator[str]:
    try:
        found = False
        for number, value in _fields(model):
            if number == _MODEL_GRAPH:
                found = True
                yield from _graph(_bytes(value), name, 0, apart)
            elif number == _MODEL_FUNCTIONS:
                for inner, node in _fields(_bytes(value)):
                    if inner == _FUNCTION_NODE:
                        yield from _node(_bytes(node), name, 0)
                    elif inner == _FUNCTION_DEFAULT:
                        yield from _attribute(_bytes(node), name, 0)
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise BundleError(f"{name}: is not an ONNX file: {error}") from None
    if not found:
        raise BundleError(f"{name}: is not an ONNX file: it has no graph")


def _graph(graph: memoryview, name: str, depth: int, apart: _Apart | None = None) -> Iterator[str]:
    if depth > _DEPTH:
        raise ValueError(f"graphs are nested deeper than {_DEPTH}")
    for number, value in _fields(graph):
        if number == _GRAPH_NODE:
            yield from _node(_bytes(value), name, depth)
        elif number == _GRAPH_INITIALIZER:
            _tensor(_bytes(value), name, apart)
        elif number == _GRAPH_SPARSE:
            raise BundleError(f"{name}: sparse weights are not supported")


def _node(node: memoryview, name: str, depth: int) -> Iterator[str]:
    operator = domain = ""
    outputs, attributes = 0, []
    for number, value in _fields(node):
        if number in (_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME):
            outputs += number == _NODE_OUTPUT
            # Backends write names to the terminal as they are.
            if not (text := str(_bytes(value), "utf-8")).isprintable():
                raise BundleError(f"{name}: the name {text!r} has characters that cannot be printed")
        elif number == _NODE_OP:
            operator = str(_bytes(value), "utf-8")
        elif number == _NODE_DOMAIN:
            domain = str(_bytes(value), "utf-8")
        elif number == _NODE_ATTRIBUTE:
            attributes.append(_bytes(value))
            yield from _attribute(_bytes(value), name, depth)
    for attribute in attributes:
        if wrong := _problem(attribute, outputs):
            raise BundleError(f"{name}: {operator}: {wrong}. It is not run")
    yield operator if domain in _STANDARD else f"{domain}.{operator}"


def _attribute(attribute: memoryview, name: str, depth: int) -> Iterator[str]:
    for number, value in _fields(attribute):
        if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            _tensor(_bytes(value), name, None)
        elif number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            yield from _graph(_bytes(value), name, depth + 1)
        elif number in _ATTRIBUTE_SPARSE:
            raise BundleError(f"{name}: sparse weights are not supported")


def _problem(attribute: memoryview, outputs: int) -> str | None:
    """See `onnx_attributes.problem`."""
    once: dict[int, int | memoryview] = {}
    numbers: list[int] = []
    for number, value in _fields(attribute):
        if number == _ATTRIBUTE_INTS:
            numbers += [value] if isinstance(value, int) else _packed(value)
        else:
            once[number] = value
    kind, single = once.get(_ATTRIBUTE_TYPE, 0), once.get(_ATTRIBUTE_INT)
    if not isinstance(kind, int) or isinstance(single, memoryview):
        raise ValueError("a message stands where a number belongs")
    label = str(_bytes(once.get(_ATTRIBUTE_NAME, memoryview(b""))), "utf-8")
    return onnx_attributes.problem(label, kind, single, numbers, outputs)


def _tensor(tensor: memoryview, name: str, apart: _Apart | None) -> None:
    for number, value in _fields(tensor):
        if number == _TENSOR_EXTERNAL or (number == _TENSOR_LOCATION and value != 0):
            if apart is None:
                raise BundleError(f"{name}: weights lie in another file, which is not read. Export the model again")
            _read_apart(tensor, name, apart)
            return


def _read_apart(tensor: memoryview, name: str, apart: _Apart) -> None:
    """An array over the weights' file for a tensor that says where in it it lies."""
    dims: list[int] = []
    once: dict[int, int | memoryview] = {}
    entries: list[tuple[str, str]] = []
    for number, value in _fields(tensor):
        if number == _TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif number == _TENSOR_EXTERNAL:
            pair = dict(_fields(_bytes(value)))
            key, said = (str(_bytes(pair.get(n, memoryview(b""))), "utf-8") for n in (_ENTRY_KEY, _ENTRY_VALUE))
            entries.append((key, said))
        elif number not in _TENSOR_APART or number in once:
            raise ValueError(f"a tensor whose values lie beside the graph has the field {number} as well")
        else:
            once[number] = value
    label = str(_bytes(once.get(_TENSOR_NAME, memoryview(b""))), "utf-8")
    where = dict(entries)

    def refuse(reason: str) -> BundleError:
        return BundleError(f"{name}: the weight {label!r} {reason}. Export the model again")

    weights, kind = apart.weights, once.get(_TENSOR_TYPE)
    if once.get(_TENSOR_LOCATION) != 1 or len(where) != len(entries) or set(where) != {"location", "offset", "length"}:
        raise refuse("does not say once, and only, in which file, from which byte on, and how long it is")
    if where["location"] != weights.location:
        raise refuse(f"lies in another file, {where['location']!r}, which is not read; expected {weights.location!r}")
    if not isinstance(kind, int) or kind not in _TYPES:
        raise refuse(f"is of the element type {kind}; beside a graph, {', '.join(map(str, _TYPES))} are read")
    if not label or label in apart.arrays:
        raise refuse("has no name of its own")
    dtype = np.dtype(_TYPES[kind]).newbyteorder("<")
    numbers = [where[key] for key in ("offset", "length")]
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers):
        raise refuse(f"has offset {numbers[0]!r} and length {numbers[1]!r}; expected whole numbers from 0 on")
    offset, length = map(int, numbers)
    count = math.prod(dims)
    if length != count * dtype.itemsize or offset % dtype.itemsize:
        raise refuse(f"has {length} bytes from byte {offset} on, which do not hold {dims} values of {dtype.name}")
    if offset + length > len(weights.data):
        raise refuse(f"ends at byte {offset + length} of {weights.location}, which has {len(weights.data)}")
    apart.arrays[label] = np.frombuffer(weights.data, dtype, count, offset).reshape(dims)


def _packed(message: memoryview) -> list[int]:
    """Numbers one after the other."""
    found, at = [], 0
    while at < len(message):
        value, at = _varint(message, at)
        found.append(value)
    return found


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a message belongs")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: (number, varint or bytes). Fixed-width numbers come as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        # Other readers cut a key to 32 bits, or stop at field 0: they would see another message than this.
        if number == 0 or key >> 32:
            raise ValueError(f"{number} is no field number")
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == 2:
            length, at = _varint(message, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"unknown protobuf wire type {kind}")
        if at + length > len(message):
            raise ValueError("a field ends after its message")
        yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte == 0 and shift:
                raise ValueError("a number is not in its shortest form")
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")
