"""Which operators and tensors an ONNX file has, read without the `onnx` package.

A runtime must know, before it opens a stranger's graph, that nothing in it draws random numbers, loops
without bound, needs a custom operator or reads another file. This walks the protobuf wire format (the
fields of onnx.proto3 that hold nodes and tensors) and skips everything else, weights included.
"""

from __future__ import annotations

from collections.abc import Iterator

from vae_export.errors import BundleError

_STANDARD = {"", "ai.onnx"}
_RANDOM = {
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    *("Bernoulli", "Multinomial", "Dropout"),
}
_DEPTH = 32

# Field numbers of onnx.proto3.
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_FUNCTION_NODE, _FUNCTION_DEFAULT = 7, 11
_NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE = (22, 23)
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14


def check_operators(model: bytes, name: str) -> None:
    """Refuse a graph that is not a pure function of its inputs and its own bytes.

    Args:
        model: a serialized ONNX ModelProto.
        name: what to call it in messages.

    Raises:
        BundleError: it has a random operator, a loop, an operator of another domain, weights in another
            file, or is not an ONNX file.
    """
    if model[4:8] == b"ORTM":
        raise BundleError(f"{name}: is a model in ONNX Runtime's own format, which is not read; expected ONNX")
    for operator in _model_operators(memoryview(model), name):
        if "." in operator:
            raise BundleError(f"{name}: the operator {operator} is not a standard ONNX operator. It is not run")
        if operator in _RANDOM:
            raise BundleError(
                f"{name}: the graph draws random numbers ({operator}), which no seed can reproduce. "
                "Noise must be an input: let encode return the posterior's mean and log-variance, unsampled"
            )
        if operator == "Loop":
            raise BundleError(f"{name}: the graph has a Loop, which may never end. It is not run")


def _model_operators(model: memoryview, name: str) -> Iterator[str]:
    try:
        found = False
        for field, value in _fields(model):
            if field == _MODEL_GRAPH:
                found = True
                yield from _graph(_bytes(value), name, 0)
            elif field == _MODEL_FUNCTIONS:
                for inner, node in _fields(_bytes(value)):
                    if inner == _FUNCTION_NODE:
                        yield from _node(_bytes(node), name, 0)
                    elif inner == _FUNCTION_DEFAULT:
                        yield from _attribute(_bytes(node), name, 0)
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise BundleError(f"{name}: is not an ONNX file: {error}") from None
    if not found:
        raise BundleError(f"{name}: is not an ONNX file: it has no graph")


def _graph(graph: memoryview, name: str, depth: int) -> Iterator[str]:
    if depth > _DEPTH:
        raise ValueError(f"graphs are nested deeper than {_DEPTH}")
    for field, value in _fields(graph):
        if field == _GRAPH_NODE:
            yield from _node(_bytes(value), name, depth)
        elif field == _GRAPH_INITIALIZER:
            _tensor(_bytes(value), name)
        elif field == _GRAPH_SPARSE:
            raise BundleError(f"{name}: sparse weights are not supported")


def _node(node: memoryview, name: str, depth: int) -> Iterator[str]:
    operator = domain = ""
    for field, value in _fields(node):
        if field == _NODE_OP:
            operator = str(_bytes(value), "utf-8")
        elif field == _NODE_DOMAIN:
            domain = str(_bytes(value), "utf-8")
        elif field == _NODE_ATTRIBUTE:
            yield from _attribute(_bytes(value), name, depth)
    yield operator if domain in _STANDARD else f"{domain}.{operator}"


def _attribute(attribute: memoryview, name: str, depth: int) -> Iterator[str]:
    for field, value in _fields(attribute):
        if field in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            _tensor(_bytes(value), name)
        elif field in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            yield from _graph(_bytes(value), name, depth + 1)
        elif field in _ATTRIBUTE_SPARSE:
            raise BundleError(f"{name}: sparse weights are not supported")


def _tensor(tensor: memoryview, name: str) -> None:
    for field, value in _fields(tensor):
        if field == _TENSOR_EXTERNAL or (field == _TENSOR_LOCATION and value != 0):
            raise BundleError(f"{name}: weights lie in another file, which is not read. Export the model again")


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
