"""What an ONNX graph may contain, checked without the `onnx` package and before a backend opens it.

A graph that is not trusted must draw no random numbers, not loop without bound, need no custom operator, read no other
file, and not compute much out of constants alone. This walks the protobuf wire format (the fields of onnx.proto3 that
hold nodes and tensors) and skips everything else, large weights included. Weights of the main graph may be external, in
one file beside it whose verified bytes are passed in: each becomes an array over those bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vae_export.contract import onnx_attributes, onnx_constants
from vae_export.contract.onnx_graph import SMALL, TYPES, Constant, Graph, Node, constant
from vae_export.errors import BundleError

_STANDARD = {"", "ai.onnx"}
RANDOM = {
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    *("Bernoulli", "Multinomial", "Dropout"),
}
LOOPS = {"Loop", "Scan", "SequenceMap"}
_DEPTH = 32

# Field numbers of onnx.proto3.
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_SPARSE = 1, 5, 11, 15
_FUNCTION_NODE, _FUNCTION_DEFAULT = 7, 11
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_FLOAT, _ATTRIBUTE_INT, _ATTRIBUTE_STRING, _ATTRIBUTE_TYPE = 1, 2, 3, 4, 20
_ATTRIBUTE_FLOATS, _ATTRIBUTE_INTS, _ATTRIBUTE_STRINGS = 7, 8, 9
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE = (22, 23)
_ATTRIBUTE_MANY = (5, 6, 7, 8, 9, 10, 11)
#: The field of the value, by AttributeProto.AttributeType.
_ATTRIBUTE_FIELDS = {1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 8, 8: 9, 9: 10, 10: 11}
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 13, 14
#: The fields that an external tensor may have: those, a description and metadata.
_TENSOR_EXTERNAL_FIELDS = {_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION, 12, 16}
#: A tensor's values in the graph: as in memory, as float32, or as integers.
_TENSOR_RAW, _TENSOR_FLOATS, _TENSOR_INTS = 9, 4, (5, 7)
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TYPE_SHAPE, _SHAPE_DIM, _DIM_VALUE = 1, 2, 1, 2, 1, 1
#: TensorProto.DataType of external tensors.
_EXTERNAL_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 10: np.float16, 11: np.float64}
_FLOAT16 = 10
_MAX_VARINT = 10  # bytes

#: The content of a field: a varint, a message, or the bytes of a number of fixed width.
_Field = int | memoryview | bytes


class Arrays(dict[str, npt.NDArray[Any]]):
    """The external weights of a graph, by name: arrays over their file's bytes.

    Attributes:
        foldable: whether a backend may fold constants: it is known how much the graph computes out of them.
    """

    foldable: bool = True


@dataclass(frozen=True)
class Weights:
    """The verified content of the one file in which external weights of a graph may be.

    Attributes:
        location: the file's name, by which the graph must refer to it.
        data: its bytes.
    """

    location: str
    data: bytes


@dataclass(frozen=True)
class _External:
    """The file of external weights, and those that were read from it."""

    weights: Weights
    arrays: Arrays = field(default_factory=Arrays)


def check_operators(model: bytes, name: str, weights: Weights | None = None) -> Arrays:
    """Check that a graph is a pure function of its inputs and its own bytes, and can be opened in bounded time.

    Args:
        model: a serialized ONNX ModelProto.
        name: of the graph, for messages.
        weights: the file of its external weights; None where they must be in the graph.

    Returns:
        The external weights by name: arrays over the file's bytes, nothing is copied.

    Raises:
        BundleError: it has a random operator, a loop, an operator of another domain, weights in another file or
            outside of the given one, computes more out of constants alone than `onnx_constants` allows, or is not an
            ONNX file.
    """
    external = _External(weights or Weights("", b""))
    if model[4:8] == b"ORTM":
        raise BundleError(f"{name}: is a model in ONNX Runtime's own format (ORT); expected ONNX")
    graph = Graph()
    for operator in operators(model, name, graph, external if weights else None):
        if "." in operator:
            raise BundleError(f"{name}: the operator {operator} is not a standard ONNX operator. It is not run")
        if operator in RANDOM:
            raise BundleError(
                f"{name}: the graph draws random numbers ({operator}), which no seed can reproduce. "
                "Noise must be an input: let encode return the posterior's mean and log-variance, unsampled"
            )
        if operator in LOOPS:
            raise BundleError(f"{name}: the graph has a {operator}, which may never end. It is not run")
    folding = onnx_constants.estimate(graph)
    if wrong := folding.problem(len(model) + len(external.weights.data)):
        raise BundleError(
            f"{name}: the graph {wrong}. It is not run. Export the model again, with its result as a weight"
        )
    external.arrays.foldable = folding.complete
    return external.arrays


def operators(model: bytes, name: str, into: Graph, external: _External | None = None) -> Iterator[str]:
    """Yield the operators of a model, its subgraphs and functions included, and read its main graph into `into`.

    Raises:
        BundleError: it is not an ONNX file, or has weights that are not read.
    """
    try:
        has_graph = False
        for number, value in _fields(memoryview(model)):
            if number == _MODEL_GRAPH:
                has_graph = True
                yield from _graph(_bytes(value), name, 0, into, external)
            elif number == _MODEL_FUNCTIONS:
                into.nodes.append(Node("", [], [], {}))  # stands for the constants in it
                for inner, node in _fields(_bytes(value)):
                    if inner == _FUNCTION_NODE:
                        yield from _node(_bytes(node), name, 0, Graph())
                    elif inner == _FUNCTION_DEFAULT:
                        yield from _attribute(_bytes(node), name, 0, {})
    except (IndexError, OverflowError, UnicodeDecodeError, ValueError) as error:
        raise BundleError(f"{name}: is not an ONNX file: {error}") from None
    if not has_graph:
        raise BundleError(f"{name}: is not an ONNX file: it has no graph")


def _graph(graph: memoryview, name: str, depth: int, into: Graph, external: _External | None = None) -> Iterator[str]:
    if depth > _DEPTH:
        raise ValueError(f"graphs are nested deeper than {_DEPTH}")
    for number, value in _fields(graph):
        if number == _GRAPH_NODE:
            yield from _node(_bytes(value), name, depth, into)
        elif number == _GRAPH_INITIALIZER:
            label, constant = _tensor(_bytes(value), name, external)
            if label in into.constants:
                raise ValueError(f"there are two weights {label!r}")
            into.constants[label] = constant
        elif number == _GRAPH_INPUT:
            label, shape = _value(_bytes(value))
            into.inputs[label] = shape
        elif number == _GRAPH_SPARSE:
            raise BundleError(f"{name}: sparse weights are not supported")


def _node(node: memoryview, name: str, depth: int, into: Graph) -> Iterator[str]:
    operator = domain = ""
    result = Node("", [], [], {})
    attributes = []
    for number, value in _fields(node):
        if number in (_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME):
            # Backends print names unescaped.
            if not (text := _text(value)).isprintable():
                raise BundleError(f"{name}: the name {text!r} has characters that cannot be printed")
            if number != _NODE_NAME:
                (result.inputs if number == _NODE_INPUT else result.outputs).append(text)
        elif number == _NODE_OP:
            operator = _text(value)
        elif number == _NODE_DOMAIN:
            domain = _text(value)
        elif number == _NODE_ATTRIBUTE:
            attributes.append(_bytes(value))
            yield from _attribute(_bytes(value), name, depth, result.attributes)
    if domain in _STANDARD and (wrong := onnx_attributes.node_problem(operator, result.inputs, result.outputs)):
        raise BundleError(f"{name}: {operator}: {wrong}. It is not run")
    for attribute in attributes:
        if wrong := _problem(attribute, len(result.outputs)):
            raise BundleError(f"{name}: {operator}: {wrong}. It is not run")
    into.nodes.append(replace(result, operator=operator))
    yield operator if domain in _STANDARD else f"{domain}.{operator}"


def _attribute(attribute: memoryview, name: str, depth: int, into: dict[str, Any]) -> Iterator[str]:
    """Yield the operators of an attribute's graphs, and put its value into those of its node."""
    once: dict[int, _Field] = {}
    many: dict[int, list[Any]] = {kind: [] for kind in _ATTRIBUTE_MANY}
    for number, value in _fields(attribute):
        if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            many[number].append(_tensor(_bytes(value), name, None)[1])
        elif number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            many[number].append(inner := Graph())
            yield from _graph(_bytes(value), name, depth + 1, inner)
        elif number in _ATTRIBUTE_SPARSE:
            raise BundleError(f"{name}: sparse weights are not supported")
        elif number == _ATTRIBUTE_INTS:
            many[number] += map(_signed, _integers(value))
        elif number == _ATTRIBUTE_STRINGS:
            many[number].append(bytes(_bytes(value)))
        elif number == _ATTRIBUTE_FLOATS:
            many[number] += _floats(value).tolist()
        elif number in once:
            raise ValueError(f"an attribute has the field {number} twice")
        else:
            once[number] = value
    label, kind = _text(once.get(_ATTRIBUTE_NAME, memoryview(b""))), once.get(_ATTRIBUTE_TYPE)
    if label in into or not isinstance(kind, int) or kind not in _ATTRIBUTE_FIELDS or len(many[_ATTRIBUTE_TENSOR]) > 1:
        raise ValueError(f"the attribute {label!r} is not there once, of one type and value")
    chosen = _ATTRIBUTE_FIELDS[kind]
    if chosen == _ATTRIBUTE_FLOAT:
        into[label] = float(_floats(once.get(chosen, bytes(4)))[0])
    elif chosen == _ATTRIBUTE_INT:
        into[label] = _signed(_integer(once.get(chosen, 0)))
    elif chosen == _ATTRIBUTE_STRING:
        into[label] = bytes(_bytes(once.get(chosen, memoryview(b""))))
    elif chosen in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH):
        into[label] = next(iter(many[chosen]), None)
    else:
        into[label] = many.get(chosen)


def _problem(attribute: memoryview, outputs: int) -> str | None:
    """See `onnx_attributes.problem`."""
    once: dict[int, _Field] = {}
    numbers: list[int] = []
    for number, value in _fields(attribute):
        if number == _ATTRIBUTE_INTS:
            numbers += _integers(value)
        else:
            once[number] = value
    kind, single = _integer(once.get(_ATTRIBUTE_TYPE, 0)), once.get(_ATTRIBUTE_INT)
    label = _text(once.get(_ATTRIBUTE_NAME, memoryview(b"")))
    return onnx_attributes.problem(label, kind, None if single is None else _integer(single), numbers, outputs)


def _value(message: memoryview) -> tuple[str, list[int | None] | None]:
    """The name of an input and its sizes: None for a dimension that varies, or where there is no shape."""
    label, shape = "", None
    for number, value in _fields(message):
        if number == _VALUE_NAME:
            label = _text(value)
        elif number == _VALUE_TYPE:
            for kind, tensor in _fields(_bytes(value)):
                for inner, dims in _fields(_bytes(tensor)) if kind == _TYPE_TENSOR else ():
                    if inner == _TYPE_SHAPE:
                        shape = (shape or []) + [
                            dict(_fields(_bytes(dim))).get(_DIM_VALUE)
                            for field_number, dim in _fields(_bytes(dims))
                            if field_number == _SHAPE_DIM
                        ]
    return label, None if shape is None else [None if size is None else _integer(size) for size in shape]


def _tensor(tensor: memoryview, name: str, external: _External | None) -> tuple[str, Constant]:
    """The name and the constant of a tensor; an external one becomes an array."""
    dims: list[int] = []
    label, kind, raw = "", 0, None
    numbers: list[Any] = []
    for number, value in _fields(tensor):
        if number == _TENSOR_EXTERNAL or (number == _TENSOR_LOCATION and value != 0):
            if external is None:
                raise BundleError(f"{name}: weights are in another file, which is not read. Export the model again")
            label = _read_external(tensor, name, external)
            array = external.arrays[label]
            return label, constant(array.shape, array.dtype, array if array.size <= SMALL else None)
        if number == _TENSOR_DIMS:
            dims += _integers(value)
        elif number == _TENSOR_NAME:
            label = _text(value)
        elif number == _TENSOR_TYPE:
            kind = _integer(value)
        elif number == _TENSOR_RAW:
            raw = _bytes(value)
        elif number == _TENSOR_FLOATS and len(numbers) <= SMALL:
            numbers += _floats(value)[: SMALL + 1].tolist()  # more are not needed
        elif number in _TENSOR_INTS and len(numbers) <= SMALL and _length(value) <= _MAX_VARINT * SMALL:
            numbers += map(_signed, _integers(value))
    dtype, count = TYPES.get(kind), math.prod(dims)
    if count > len(tensor) * 8:
        raise BundleError(f"{name}: the weight {label!r} has {len(tensor)} bytes, which do not hold {dims} values")
    if count == 0 and len(dims) > 1:
        raise BundleError(f"{name}: the weight {label!r} has the sizes {dims}; expected none of them to be 0")
    values: npt.NDArray[Any] | None = None
    if dtype is not None and count <= SMALL and kind in _EXTERNAL_TYPES:
        if raw is not None and len(raw) == count * np.dtype(dtype).itemsize:
            values = np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).astype(dtype)
        elif raw is None and len(numbers) == count and kind != _FLOAT16:
            values = np.array(numbers).astype(dtype)
    return label, constant(dims, dtype, values)


def _read_external(tensor: memoryview, name: str, external: _External) -> str:
    """Read an external tensor into `external.arrays`, and return its name."""
    dims: list[int] = []
    once: dict[int, _Field] = {}
    entries: list[tuple[str, str]] = []
    for number, value in _fields(tensor):
        if number == _TENSOR_DIMS:
            dims += _integers(value)
        elif number == _TENSOR_EXTERNAL:
            pair = dict(_fields(_bytes(value)))
            key, text = (_text(pair.get(n, memoryview(b""))) for n in (_ENTRY_KEY, _ENTRY_VALUE))
            entries.append((key, text))
        elif number not in _TENSOR_EXTERNAL_FIELDS or number in once:
            raise ValueError(f"an external tensor has the field {number} as well")
        else:
            once[number] = value
    label = _text(once.get(_TENSOR_NAME, memoryview(b"")))
    where = dict(entries)

    def refuse(reason: str) -> BundleError:
        return BundleError(f"{name}: the weight {label!r} {reason}. Export the model again")

    weights, kind = external.weights, once.get(_TENSOR_TYPE)
    if once.get(_TENSOR_LOCATION) != 1 or len(where) != len(entries) or set(where) != {"location", "offset", "length"}:
        raise refuse("must state its file, offset and length, once each and nothing else")
    if where["location"] != weights.location:
        raise refuse(f"is in another file, {where['location']!r}, which is not read; expected {weights.location!r}")
    if not isinstance(kind, int) or kind not in _EXTERNAL_TYPES:
        raise refuse(f"has the element type {kind!r}; external weights may have {', '.join(map(str, _EXTERNAL_TYPES))}")
    if not label or label in external.arrays:
        raise refuse("has no name, or the name of another weight")
    dtype = np.dtype(_EXTERNAL_TYPES[kind]).newbyteorder("<")
    numbers = [where[key] for key in ("offset", "length")]
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers):
        raise refuse(f"has offset {numbers[0]!r} and length {numbers[1]!r}; expected non-negative integers")
    offset, length = map(int, numbers)
    count = math.prod(dims)
    if length != count * dtype.itemsize or offset % dtype.itemsize:
        raise refuse(f"has {length} bytes from byte {offset} on, which do not hold {dims} values of {dtype.name}")
    if offset + length > len(weights.data):
        raise refuse(f"ends at byte {offset + length} of {weights.location}, which has {len(weights.data)}")
    external.arrays[label] = np.frombuffer(weights.data, dtype, count, offset).reshape(dims)
    return label


def _integers(value: _Field) -> list[int]:
    """The numbers of a packed field of varints, or of a single varint."""
    if isinstance(value, int):
        return [value]
    numbers, at, message = [], 0, _bytes(value)
    while at < len(message):
        number, at = _varint(message, at)
        numbers.append(number)
    return numbers


def _length(value: _Field) -> int:
    """The bytes of a message; 1 for a number."""
    return 1 if isinstance(value, int) else len(value)


def _integer(value: _Field) -> int:
    if not isinstance(value, int):
        raise ValueError("a message where a number is expected")
    return value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _floats(value: _Field) -> npt.NDArray[np.float32]:
    """The numbers of a packed field of float32, or a single one."""
    if isinstance(value, int):
        raise ValueError("a varint where a float32 is expected")
    return np.frombuffer(value, "<f4")


def _text(value: _Field) -> str:
    return str(_bytes(value), "utf-8")


def _bytes(value: _Field) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError("a number where a message is expected")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, _Field]]:
    """Yield the fields of a protobuf message with their numbers."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        # Other readers cut a key to 32 bits, or stop at field 0: they would see another message than this.
        if number == 0 or key >> 32:
            raise ValueError(f"{number} is not a field number")
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
        yield number, message[at : at + length] if kind == 2 else bytes(message[at : at + length])
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
