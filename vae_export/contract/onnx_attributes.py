"""Nodes and attribute values of ONNX operators that a backend does not check and that may end the process.

Attributes mean the same in all operators of the standard that have them, so one table by name serves all. Arguments
are the fields of onnx.proto3's AttributeProto as they are encoded.
"""

from __future__ import annotations

from typing import Final

_INT, _INTS = 2, 7  # AttributeProto.AttributeType
_MAX_RANK, _MAX_SIZE = 64, 1 << 20

#: By name: the type, the smallest and the largest value.
_RANGES: Final[dict[str, tuple[int, int, int]]] = {
    "allowzero": (_INT, 0, 1),
    "axes": (_INTS, -_MAX_RANK, _MAX_RANK),
    "axis": (_INT, -_MAX_RANK, _MAX_RANK),
    "batch_dims": (_INT, 0, _MAX_RANK),
    "blocksize": (_INT, 1, _MAX_SIZE),
    "ceil_mode": (_INT, 0, 1),
    "dilations": (_INTS, 1, _MAX_SIZE),
    "end": (_INT, -(1 << 63), (1 << 63) - 1),
    "group": (_INT, 1, _MAX_SIZE),
    "hidden_size": (_INT, 1, _MAX_SIZE),
    "keepdims": (_INT, 0, 1),
    "kernel_shape": (_INTS, 1, _MAX_SIZE),
    "num_groups": (_INT, 1, _MAX_SIZE),
    "num_outputs": (_INT, 1, _MAX_SIZE),
    "output_padding": (_INTS, 0, _MAX_SIZE),
    "output_shape": (_INTS, 1, _MAX_SIZE),
    "pads": (_INTS, -_MAX_SIZE, _MAX_SIZE),
    "perm": (_INTS, 0, _MAX_RANK),
    "split": (_INTS, 0, (1 << 31) - 1),
    "strides": (_INTS, 1, _MAX_SIZE),
    "to": (_INT, 1, 32),
    "transA": (_INT, 0, 1),
    "transB": (_INT, 0, 1),
}

#: Operators that read or write out of bounds, or abort, for sizes that are only known at run time.
UNSAFE: Final = {"DFT", "MaxRoiPool", "ReverseSequence", "RoiAlign", "STFT"}


def node_problem(operator: str, inputs: list[str], outputs: list[str]) -> str | None:
    """What is wrong with a node itself, in words, or None.

    Args:
        operator: of the standard.
        inputs: names of its inputs; empty for one that is left out.
        outputs: likewise.
    """
    if operator in UNSAFE:
        return "it can end the process for sizes that are only known at run time. Use other operators"
    if operator == "Split" and "" in outputs:
        return f"of its {len(outputs)} outputs, {outputs.count('')} have no name; expected a name for each"
    if operator == "LayerNormalization" and "" in inputs:
        return f"of its {len(inputs)} inputs, {inputs.count('')} have no name; expected a name for each that is listed"
    return None


def problem(name: str, kind: int, number: int | None, numbers: list[int], outputs: int) -> str | None:
    """What is wrong with an attribute, in words, or None.

    Args:
        name: of the attribute.
        kind: its AttributeType.
        number: its integer as a varint, if it has one.
        numbers: its list of integers, likewise.
        outputs: the number of the node's outputs.
    """
    if name not in _RANGES:
        return None
    wanted, low, high = _RANGES[name]
    values = [value - (1 << 64) if value >> 63 else value for value in ([number or 0] if wanted == _INT else numbers)]
    if kind != wanted or (wanted == _INT and numbers) or (wanted == _INTS and number is not None):
        return f"{name} is of another type; expected {'an integer' if wanted == _INT else 'integers'}"
    if not all(low <= value <= high for value in values):
        return f"{name} is {values[0] if wanted == _INT else values}; expected {low} to {high}"
    if name == "perm" and sorted(values) != list(range(len(values))):
        return f"perm is {values}; expected each of 0 to {len(values) - 1} once"
    if name == "num_outputs" and values[0] != outputs:
        return f"num_outputs is {values[0]}; the node has {outputs} outputs"
    return None
