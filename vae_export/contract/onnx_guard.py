"""Which operators and tensors an ONNX file has, read without the `onnx` package.

A runtime must know, before it opens a stranger's graph, that nothing in it draws random numbers, loops
without bound, needs a custom operator, reads another file, or makes much of constants alone. This walks the protobuf
wire format (the fields of onnx.proto3 that hold nodes and tensors) and skips everything else, large weights included.
Weights of the main graph may lie in one file beside it, whose verified bytes are given here: each becomes an array over
those bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vae_export.contract import onnx_attributes, onnx_constants
from vae_export.contract.onnx_constants import Constant, Graph, Node
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
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_SPARSE = 1, 5, 11, 15
_FUNCTION_NODE, _FUNCTION_DEFAULT = 7, 11
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_FLOAT, _ATTRIBUTE_INT, _ATTRIBUTE_STRING, _ATTRIBUTE_TYPE = 1, 2, 3, 4, 20
_ATTRIBUTE_FLOATS, _ATTRIBUTE_INTS, _ATTRIBUTE_STRINGS = 7, 8, 9
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE = (22, 23)
_ATTRIBUTE_MANY = (5, 6, 7, 8, 9, 10, 11)
#: In which field the value lies, by AttributeProto.AttributeType.
_ATTRIBUTE_FIELDS = {1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 8, 8: 9, 9: 10, 10: 11}
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 13, 14
#: Those, a description and metadata: what a tensor may have whose values lie beside the graph.
_TENSOR_APART = {_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION, 12, 16}
#: Where a tensor's values lie in the graph: as they are in memory, as float32, or as whole numbers.
_TENSOR_RAW, _TENSOR_FLOATS, _TENSOR_INTS = 9, 4, (5, 7)
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TYPE_SHAPE, _SHAPE_DIM, _DIM_VALUE = 1, 2, 1, 2, 1, 1
#: TensorProto.DataType of what may lie beside the graph.
_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 10: np.float16, 11: np.float64}
_FLOAT16 = 10
_SMALL, _LONGEST = onnx_constants.SMALL, 10  # bytes of a varint

#: What a field holds: a varint, bytes, or a number of fixed width, which is bytes, too.
_Field = int | memoryview | bytes


class Arrays(dict[str, npt.NDArray[Any]]):
    """The weights of a graph that lie beside it, by name: arrays over their file's bytes.

    Attributes:
        foldable: whether it was told how much the graph makes of constants alone. A backend that computes that before
            it runs anything shall not do so otherwise.
    """

    foldable: bool = True


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
    arrays: Arrays = field(default_factory=Arrays)


def check_operators(model: bytes, name: str, weights: Weights | None = None) -> Arrays:
    """Refuse a graph that is not a pure function of its inputs and its own bytes, or has much to do before it is one.

    Args:
        model: a serialized ONNX ModelProto.
        name: what to call it in messages.
        weights: the file in which its weights may lie; None where they must be in the graph.

    Returns:
        The weights that lie in that file, by name: arrays over its bytes, nothing is copied.

    Raises:
        BundleError: it has a random operator, a loop, an operator of another domain, weights in another
            file or outside of the given one, makes more of constants alone than `onnx_constants` allows, or is not
            an ONNX file.
    """
    apart = _Apart(weights or Weights("", b""))
    if model[4:8] == b"ORTM":
        raise BundleError(f"{name}: is a model in ONNX Runtime's own format, which is not read; expected ONNX")
    graph = Graph()
    for operator in _model_operators(memoryview(model), name, graph, apart if weights else None):
        if "." in operator:
            raise BundleError(f"{name}: the operator {operator} is not a standard ONNX operator. It is not run")
        if operator in _RANDOM:
            raise BundleError(
                f"{name}: the graph draws random numbers ({operator}), which no seed can reproduce. "
                "Noise must be an input: let encode return the posterior's mean and log-variance, unsampled"
            )
        if operator in _REPEATING:
            raise BundleError(f"{name}: the graph has a {operator}, which may never end. It is not run")
    folded = onnx_constants.folded(graph)
    if wrong := folded.problem(len(model) + len(apart.weights.data)):
        raise BundleError(
            f"{name}: the graph {wrong}. It is not run. Export the model again, with its result as a weight"
        )
    apart.arrays.foldable = folded.told
    return apart.arrays


def _model_operators(model: memoryview, name: str, into: Graph, apart: _Apart | None = None) -> Iterator[str]:
    """The operators of all graphs, and what the main one is, except what is in functions."""
    try:
        found = False
        for number, value in _fields(model):
            if number == _MODEL_GRAPH:
                found = True
                yield from _graph(_bytes(value), name, 0, into, apart)
            elif number == _MODEL_FUNCTIONS:
                into.nodes.append(Node("", [], [], {}))  # stands for what is made of constants in it
                for inner, node in _fields(_bytes(value)):
                    if inner == _FUNCTION_NODE:
                        yield from _node(_bytes(node), name, 0, Graph())
                    elif inner == _FUNCTION_DEFAULT:
                        yield from _attribute(_bytes(node), name, 0, {})
    except (IndexError, OverflowError, UnicodeDecodeError, ValueError) as error:
        raise BundleError(f"{name}: is not an ONNX file: {error}") from None
    if not found:
        raise BundleError(f"{name}: is not an ONNX file: it has no graph")


def _graph(graph: memoryview, name: str, depth: int, into: Graph, apart: _Apart | None = None) -> Iterator[str]:
    if depth > _DEPTH:
        raise ValueError(f"graphs are nested deeper than {_DEPTH}")
    for number, value in _fields(graph):
        if number == _GRAPH_NODE:
            yield from _node(_bytes(value), name, depth, into)
        elif number == _GRAPH_INITIALIZER:
            label, constant = _tensor(_bytes(value), name, apart)
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
    made = Node("", [], [], {})
    attributes = []
    for number, value in _fields(node):
        if number in (_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME):
            # Backends write names to the terminal as they are.
            if not (text := _text(value)).isprintable():
                raise BundleError(f"{name}: the name {text!r} has characters that cannot be printed")
            if number != _NODE_NAME:
                (made.inputs if number == _NODE_INPUT else made.outputs).append(text)
        elif number == _NODE_OP:
            operator = _text(value)
        elif number == _NODE_DOMAIN:
            domain = _text(value)
        elif number == _NODE_ATTRIBUTE:
            attributes.append(_bytes(value))
            yield from _attribute(_bytes(value), name, depth, made.attributes)
    if domain in _STANDARD and (wrong := onnx_attributes.node_problem(operator, made.inputs, made.outputs)):
        raise BundleError(f"{name}: {operator}: {wrong}. It is not run")
    for attribute in attributes:
        if wrong := _problem(attribute, len(made.outputs)):
            raise BundleError(f"{name}: {operator}: {wrong}. It is not run")
    into.nodes.append(replace(made, operator=operator))
    yield operator if domain in _STANDARD else f"{domain}.{operator}"


def _attribute(attribute: memoryview, name: str, depth: int, into: dict[str, Any]) -> Iterator[str]:
    """Its operators; its value goes into those of its node."""
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
    """The name of an input and its sizes; None for one that varies, or where it has none."""
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


def _tensor(tensor: memoryview, name: str, apart: _Apart | None) -> tuple[str, Constant]:
    """The name and the constant of a tensor; one that lies beside the graph becomes an array."""
    dims: list[int] = []
    label, kind, raw = "", 0, None
    numbers: list[Any] = []
    for number, value in _fields(tensor):
        if number == _TENSOR_EXTERNAL or (number == _TENSOR_LOCATION and value != 0):
            if apart is None:
                raise BundleError(f"{name}: weights lie in another file, which is not read. Export the model again")
            label = _read_apart(tensor, name, apart)
            array = apart.arrays[label]
            return label, onnx_constants.of(array.shape, array.dtype, array if array.size <= _SMALL else None)
        if number == _TENSOR_DIMS:
            dims += _integers(value)
        elif number == _TENSOR_NAME:
            label = _text(value)
        elif number == _TENSOR_TYPE:
            kind = _integer(value)
        elif number == _TENSOR_RAW:
            raw = _bytes(value)
        elif number == _TENSOR_FLOATS and len(numbers) <= _SMALL:
            numbers += _floats(value)[: _SMALL + 1].tolist()  # more than that are not looked at
        elif number in _TENSOR_INTS and len(numbers) <= _SMALL and _length(value) <= _LONGEST * _SMALL:
            numbers += map(_signed, _integers(value))
    dtype, count = onnx_constants.TYPES.get(kind), math.prod(dims)
    if count > len(tensor) * 8:
        raise BundleError(f"{name}: the weight {label!r} has {len(tensor)} bytes, which do not hold {dims} values")
    if count == 0 and len(dims) > 1:
        raise BundleError(f"{name}: the weight {label!r} has the sizes {dims}; expected none of them to be 0")
    values: npt.NDArray[Any] | None = None
    if dtype is not None and count <= _SMALL and kind in _TYPES:
        if raw is not None and len(raw) == count * np.dtype(dtype).itemsize:
            values = np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).astype(dtype)
        elif raw is None and len(numbers) == count and kind != _FLOAT16:
            values = np.array(numbers).astype(dtype)
    return label, onnx_constants.of(dims, dtype, values)


def _read_apart(tensor: memoryview, name: str, apart: _Apart) -> str:
    """The name of a tensor that says where in the weights' file it lies, of which there is an array then."""
    dims: list[int] = []
    once: dict[int, _Field] = {}
    entries: list[tuple[str, str]] = []
    for number, value in _fields(tensor):
        if number == _TENSOR_DIMS:
            dims += _integers(value)
        elif number == _TENSOR_EXTERNAL:
            pair = dict(_fields(_bytes(value)))
            key, said = (_text(pair.get(n, memoryview(b""))) for n in (_ENTRY_KEY, _ENTRY_VALUE))
            entries.append((key, said))
        elif number not in _TENSOR_APART or number in once:
            raise ValueError(f"a tensor whose values lie beside the graph has the field {number} as well")
        else:
            once[number] = value
    label = _text(once.get(_TENSOR_NAME, memoryview(b"")))
    where = dict(entries)

    def refuse(reason: str) -> BundleError:
        return BundleError(f"{name}: the weight {label!r} {reason}. Export the model again")

    weights, kind = apart.weights, once.get(_TENSOR_TYPE)
    if once.get(_TENSOR_LOCATION) != 1 or len(where) != len(entries) or set(where) != {"location", "offset", "length"}:
        raise refuse("does not say once, and only, in which file, from which byte on, and how long it is")
    if where["location"] != weights.location:
        raise refuse(f"lies in another file, {where['location']!r}, which is not read; expected {weights.location!r}")
    if not isinstance(kind, int) or kind not in _TYPES:
        raise refuse(f"is of the element type {kind!r}; beside a graph, {', '.join(map(str, _TYPES))} are read")
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
    return label


def _integers(value: _Field) -> list[int]:
    """Varints one after the other, or one of them."""
    if isinstance(value, int):
        return [value]
    found, at, message = [], 0, _bytes(value)
    while at < len(message):
        number, at = _varint(message, at)
        found.append(number)
    return found


def _length(value: _Field) -> int:
    """Bytes of a message; 1 of a number."""
    return 1 if isinstance(value, int) else len(value)


def _integer(value: _Field) -> int:
    if not isinstance(value, int):
        raise ValueError("a message stands where a number belongs")
    return value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _floats(value: _Field) -> npt.NDArray[np.float32]:
    """Numbers of 32 bits one after the other, or one of them."""
    if isinstance(value, int):
        raise ValueError("a number has another type than it should have")
    return np.frombuffer(value, "<f4")


def _text(value: _Field) -> str:
    return str(_bytes(value), "utf-8")


def _bytes(value: _Field) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError("a number stands where a message belongs")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, _Field]]:
    """The fields of a protobuf message and their numbers."""
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
