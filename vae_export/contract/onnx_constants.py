"""What a graph computes out of constants alone: how many bytes and how many steps a backend folds while it opens it.

A backend that folds constants computes before anybody can bound or end it, so this is estimated without computing.
Small constants, of which shapes are made, have their values here; of all others only the shape, as a view of a single
number. Where sizes are not told by the graph alone, that is said, and the graph is for backends that do not fold.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

#: What may be made of constants: bytes and multiply-adds (or elements that are read or written), and how many more for
#: each byte of the model. A product of two matrices of 1,600 x 1,600 needs 2^32.
_BYTES, _BYTES_EACH = 1 << 28, 4
_STEPS, _STEPS_EACH = 1 << 32, 64
#: Constants of up to so many numbers have their values here.
SMALL: Final = 1024
_MAX_RANK = 64
#: As many elements has what is not told at all, and so many bytes has what is told roughly at most.
_UNTOLD, _ROUGH = 1 << 62, 1 << 20
#: To what nothing is resized, nor by how much.
_LARGEST: Final = 1 << 20

#: TensorProto.DataType to NumPy's; of bfloat16 only the size is right, of narrower types and strings not even that.
TYPES: Final[dict[int, npt.DTypeLike]] = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_,
    10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64, 14: np.complex64, 15: np.complex128, 16: np.uint16,
}  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """A value that does not depend on what is computed on.

    Attributes:
        most: how many elements it has at most.
        width: bytes of an element.
        array: of its shape and type, where that is told; its numbers mean nothing where they are not known.
        known: whether the array's numbers are its own.
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
    """A graph.

    Attributes:
        inputs: sizes by name; None for a dimension that varies, or for all of them.
        constants: initializers by name.
        nodes: in their order.
    """

    inputs: dict[str, list[int | None] | None] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)


Given = Sequence[Constant | None]
Made = tuple[list[Constant], int]
_Scope = ChainMap[str, Constant | None]


@dataclass
class Folded:
    """What is computed out of constants alone.

    Attributes:
        size: bytes.
        steps: multiply-adds, or elements.
        told: whether that is all. Otherwise there are constants of sizes that the graph alone does not tell.
        worst: the operator that makes most bytes or takes most steps, and how many.
        fatal: what ends the process of a backend that computes it, in words.
    """

    size: int = 0
    steps: int = 0
    told: bool = True
    worst: tuple[float, str] = (0.0, "")
    fatal: str | None = None

    def problem(self, model: int) -> str | None:
        """Why this shall not be computed for a model of so many bytes, in words, or None."""
        if self.fatal:
            return self.fatal
        size, steps = _BYTES + _BYTES_EACH * model, _STEPS + _STEPS_EACH * model
        if self.size <= size and self.steps <= steps:
            return None
        found = (
            f"{self.size:,} bytes (at most {size:,})"
            if self.size > size
            else f"{self.steps:,} steps (at most {steps:,})"
        )
        return f"computes {found} out of constants alone, most of it by {self.worst[1]}"

    def add(self, operator: str, size: int, steps: int) -> None:
        """Count a node."""
        self.size += size
        self.steps += steps
        self.worst = max(self.worst, (max(size / _BYTES, steps / _STEPS), operator))


def folded(graph: Graph) -> Folded:
    """What a backend computes of a graph while it opens it, at most."""
    found = Folded()
    _walk(graph, ChainMap(), found)
    return found


def of(shape: Sequence[int], dtype: npt.DTypeLike | None, values: npt.NDArray[Any] | None = None) -> Constant:
    """A constant of a shape and type, with its values where they are given.

    Raises:
        OverflowError: nothing has so many elements.
        ValueError: there is no such shape.
    """
    count = math.prod(shape)
    if count >= 1 << 58:
        raise OverflowError(f"{count} elements")
    if dtype is None or len(shape) > _MAX_RANK:
        return Constant(count)
    if values is not None:
        return Constant(count, values.itemsize, values.reshape(shape), known=True)
    kind = np.dtype(dtype)
    return Constant(count, kind.itemsize, np.broadcast_to(np.zeros((), kind), tuple(shape)))


def _walk(graph: Graph, outer: _Scope, found: Folded) -> None:
    """Follow what is constant through a graph. What is None in the scope is computed from inputs."""
    scope = outer.new_child({**dict.fromkeys(graph.inputs), **graph.constants})
    for node in graph.nodes:
        if any(name and name not in scope for name in node.inputs) or any(
            name and name in scope for name in node.outputs
        ):
            found.told = False  # whoever sorts the nodes, or takes names otherwise, sees another graph
        inner = [value for value in node.attributes.values() if isinstance(value, Graph)]
        for branch in inner:
            _walk(branch, scope, found)
        results = _outputs(node, graph, scope, found, branches=bool(inner))
        scope.update(zip(node.outputs, results, strict=False))


def _outputs(node: Node, graph: Graph, scope: _Scope, found: Folded, *, branches: bool) -> Sequence[Constant | None]:
    many = len(node.outputs)
    given = [scope.get(name) if name else None for name in node.inputs]
    found.fatal = found.fatal or _fatal(node.operator, given)
    computed = any(value is None and name for name, value in zip(node.inputs, given, strict=True))
    try:
        if node.operator in ("Shape", "Size") and node.inputs:
            return [_shape(node, graph, given[0])]
        if computed:
            return [None] * many
        if node.operator == "Constant":
            return [_literal(node)]
        made = None if branches else _made(node, given)
    except OverflowError:
        found.add(node.operator, _UNTOLD, 0)
        return [Constant(_UNTOLD)] * many
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        made = None  # a backend finds out what is wrong with it
    size = sum(value.most * value.width for value in made[0]) if made else 0
    if made is None or (size > _ROUGH and any(value.most < _UNTOLD and value.array is None for value in made[0])):
        found.told = False
        return [Constant(_UNTOLD)] * many
    results, steps = made
    found.add(node.operator, size, steps)
    return [*results, *[Constant(_UNTOLD)] * (many - len(results))]


def _fatal(operator: str, given: Given) -> str | None:
    """What of an operator's constants a backend does not survive, which it does not look for, in words, or None."""
    arrays = [value.array if value and value.known else None for value in given]
    second, third, fourth = [*arrays, None, None, None, None][1:4]
    if operator == "Div" and second is not None and second.dtype.kind == "i" and (second == -1).any():
        return "divides whole numbers by -1, which the smallest of them does not survive"
    if operator in ("Resize", "Upsample"):
        for sizes in (third, fourth) if operator == "Resize" else (second,):
            if sizes is not None and not ((sizes > 0) & (sizes <= _LARGEST)).all():
                return f"has a {operator} by {sizes.tolist()}; expected numbers above 0, up to {_LARGEST}"
    return None


def _shape(node: Node, graph: Graph, value: Constant | None) -> Constant | None:
    """Of a constant or an input, its sizes, where they are fixed; of what is computed, some that are not told here."""
    name = node.inputs[0]
    sizes: Sequence[int | None] | None
    if value is not None:
        sizes = None if value.array is None else value.array.shape
    elif name in graph.inputs:
        sizes = graph.inputs[name]
        if sizes is None:
            return None
    else:
        sizes = None
    start, end = node.attributes.get("start", 0), node.attributes.get("end", _MAX_RANK)
    if sizes is None:
        if node.operator == "Size":
            return of((), np.int64) if value is None else None
        return Constant(max(0, min(end - start, _MAX_RANK)) if start >= 0 <= end else _MAX_RANK, 8)
    taken = sizes if node.operator == "Size" else sizes[start:end]
    if None in taken:
        return None  # it varies, and nobody folds what comes of it
    numbers = np.array(taken, np.int64)
    return (
        of((), np.int64, np.array(np.prod(numbers)))
        if node.operator == "Size"
        else of(numbers.shape, np.int64, numbers)
    )


def _literal(node: Node) -> Constant:
    """What a Constant gives."""
    for value in node.attributes.values():
        if isinstance(value, Constant):
            return value
        if isinstance(value, (int, float, list)):
            kind = (
                np.float32
                if isinstance(value, float) or (value and isinstance(value, list) and isinstance(value[0], float))
                else np.int64
            )
            numbers = np.array(value, kind)
            return of(numbers.shape, kind, numbers) if numbers.size <= SMALL else of(numbers.shape, kind)
    return Constant(_UNTOLD)


def _made(node: Node, given: Given) -> Made | None:
    """What a node makes of constants, and in how many steps; None where that is not told."""
    operator = node.operator
    if any(value and value.most == _UNTOLD for value in given):
        return None
    if operator in _SAME:
        first = _needed(given, 0)
        return [_blank(first)], 4 * sum(value.most for value in given if value)
    if operator in _COMPUTED or operator in _ELEMENTWISE or operator in ("Cast", "CastLike", "Where"):
        return _elementwise(node, given)
    if operator.startswith("Reduce") or operator in ("ArgMax", "ArgMin"):
        return _reduced(node, given)
    if operator in _RULES:
        return _RULES[operator](node, given)
    return None


def _needed(given: Given, index: int) -> Constant:
    value = given[index]
    if value is None:
        raise ValueError("an input is missing")
    return value


def _array(given: Given, index: int) -> npt.NDArray[Any]:
    """An input of which the shape must be told."""
    array = _needed(given, index).array
    if array is None:
        raise ValueError("its shape is not told")
    return array


def _numbers(given: Given, index: int) -> list[Any] | None:
    """The numbers of an input that may be missing.

    Raises:
        ValueError: they are not told.
    """
    value = given[index] if index < len(given) else None
    if value is None:
        return None
    if not value.known or value.array is None:
        raise ValueError("its numbers are not told")
    return list(value.array.reshape(-1).tolist())


def _told(node: Node, name: str, given: Given, index: int) -> list[Any] | None:
    """Numbers of an input or, in earlier versions of an operator, of an attribute."""
    found = node.attributes.get(name)
    return _numbers(given, index) if found is None else list(found)


def _blank(value: Constant, dtype: npt.DTypeLike | None = None) -> Constant:
    """As large, of other numbers."""
    if value.array is None:
        return Constant(value.most, value.width if dtype is None else np.dtype(dtype).itemsize)
    return of(value.array.shape, value.array.dtype if dtype is None else dtype)


def _moved(value: Constant, array: npt.NDArray[Any]) -> Constant:
    """The numbers of a value, in another order, or some of them."""
    return of(array.shape, array.dtype, array if value.known else None)


def _one(value: Constant) -> Made:
    return [value], value.most


def _elementwise(node: Node, given: Given) -> Made:
    values = [value for value in given if value is not None]
    dtype: npt.DTypeLike | None = None
    if node.operator == "Cast":
        dtype = TYPES.get(node.attributes["to"])
        if dtype is None:
            return [Constant(values[0].most)], values[0].most
    elif node.operator == "CastLike":
        dtype, values = _array(given, 1).dtype, values[:1]
    elif node.operator in _TRUTHS:
        dtype = np.bool_
    typed = values[1 if node.operator == "Where" else 0]
    arrays = [value.array for value in values if value.array is not None]
    if len(arrays) < len(values):
        most = math.prod(value.most for value in values)
        return [Constant(most, typed.width if dtype is None else np.dtype(dtype).itemsize)], 4 * most
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    kind = arrays[values.index(typed)].dtype if dtype is None else np.dtype(dtype)
    count = math.prod(shape)
    if not all(value.known for value in values) or count > SMALL:
        return [of(shape, kind)], 4 * count
    with np.errstate(all="ignore"):
        if dtype is not None and node.operator.startswith("Cast"):
            if kind == np.uint16:  # it may stand for bfloat16
                return [of(shape, kind)], 4 * count
            result = arrays[0].astype(kind)
        elif node.operator == "Where":
            result = np.where(*arrays)
        elif node.operator in _COMPUTED:
            result = arrays[0]
            for operand in arrays[1:]:
                result = _COMPUTED[node.operator](result, operand)
            if len(arrays) == 1 and node.operator not in ("Min", "Max"):
                result = _COMPUTED[node.operator](result)
        else:
            return [of(shape, kind)], 4 * count
    return [of(shape, kind, np.asarray(result).astype(kind))], 4 * count


def _divided(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """As C++ does it: whole numbers towards 0."""
    if left.dtype.kind == "f":
        return np.asarray(left / right)
    if not right.all():
        raise ValueError("it divides by 0")
    quotient = np.floor_divide(left, right)
    return np.asarray(quotient + ((quotient < 0) & (quotient * right != left)))


_COMPUTED: Final[dict[str, Callable[..., Any]]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _divided, "Min": np.minimum, "Max": np.maximum,
    "Neg": np.negative, "Abs": np.abs, "Floor": np.floor, "Ceil": np.ceil, "Round": np.round, "Sqrt": np.sqrt,
    "Equal": np.equal, "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal, "And": np.logical_and, "Or": np.logical_or, "Not": np.logical_not,
}  # fmt: skip
_TRUTHS: Final = {
    *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf"),
}
_ELEMENTWISE: Final = {
    *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cos", "Cosh", "Sin", "Sinh", "Tan", "Tanh", "Exp", "Log"),
    *("Erf", "Reciprocal", "Sign", "Pow", "Mod", "Sum", "Mean", "Xor", "IsNaN", "IsInf", "BitwiseAnd", "BitwiseOr"),
    *("BitwiseXor", "BitwiseNot", "BitShift", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Relu", "LeakyRelu"),
    *("PRelu", "Elu", "Selu", "Celu", "Gelu", "Mish", "Softplus", "Softsign", "ThresholdedRelu", "Shrink"),
}
#: What gives as many elements as the first input has, in its type.
_SAME: Final = {
    *("Clip", "CumSum", "Trilu", "Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "LayerNormalization"),
    *("InstanceNormalization", "GroupNormalization", "RMSNormalization", "ScatterND", "ScatterElements", "Scatter"),
    *("ReverseSequence",),
}


def _reduced(node: Node, given: Given) -> Made:
    value = _needed(given, 0)
    index = node.operator.startswith("Arg")
    kind: npt.DTypeLike | None = np.int64 if index else None
    if value.array is None:
        return [_blank(value, kind)], value.most
    shape = value.array.shape
    axes = [node.attributes.get("axis", 0)] if index else _told(node, "axes", given, 1)
    if not axes:
        axes = [] if node.attributes.get("noop_with_empty_axes") else list(range(len(shape)))
    chosen = {axis % max(len(shape), 1) for axis in axes}
    keep = node.attributes.get("keepdims", 1)
    made = [1 if axis in chosen else size for axis, size in enumerate(shape) if keep or axis not in chosen]
    if value.known and (reduce := _REDUCED.get(node.operator)) and chosen:
        result = np.asarray(reduce(value.array, axis=tuple(chosen))).astype(value.array.dtype)
        return [of(made, result.dtype, result)], value.most
    return [of(made, value.array.dtype if kind is None else kind)], value.most


_REDUCED: Final[dict[str, Callable[..., Any]]] = {
    "ReduceSum": np.sum, "ReduceProd": np.prod, "ReduceMax": np.max, "ReduceMin": np.min
}  # fmt: skip


def _transposed(node: Node, given: Given) -> Made:
    value = _needed(given, 0)
    return _one(
        _blank(value) if value.array is None else _moved(value, value.array.transpose(node.attributes.get("perm")))
    )


def _reshaped(node: Node, given: Given) -> Made:
    value = _needed(given, 0)
    target = _needed(given, 1) if node.operator == "Reshape" else None
    if value.array is None or (target and not target.known):
        return _one(Constant(value.most, value.width))
    old = value.array.shape
    shape: list[int] = []
    if node.operator == "Reshape":
        kept = not node.attributes.get("allowzero")
        shape = [old[i] if size == 0 and kept else size for i, size in enumerate(_numbers(given, 1) or [])]
        if -1 in shape:
            rest = math.prod(size for size in shape if size != -1)
            shape[shape.index(-1)] = value.most // rest
    elif node.operator == "Flatten":
        axis = node.attributes.get("axis", 1)
        shape = [math.prod(old[:axis]), math.prod(old[axis:])]
    elif node.operator == "Squeeze":
        axes = _told(node, "axes", given, 1)
        gone = [i for i, size in enumerate(old) if size == 1] if axes is None else [axis % len(old) for axis in axes]
        shape = [size for i, size in enumerate(old) if i not in gone]
    else:
        axes = _told(node, "axes", given, 1) or []
        rank = len(old) + len(axes)
        added, sizes = {axis % rank for axis in axes}, iter(old)
        shape = [1 if i in added else next(sizes, 1) for i in range(rank)]
    if math.prod(shape) != value.most:
        raise ValueError("it has another number of elements")
    return _one(of(shape, value.array.dtype, value.array if value.known else None))


def _sliced(node: Node, given: Given) -> Made:
    value = _needed(given, 0)
    try:
        array = _array(given, 0)
        starts, ends = _told(node, "starts", given, 1), _told(node, "ends", given, 2)
        axes, steps = _told(node, "axes", given, 3), _numbers(given, 4)
    except ValueError:
        return _one(_blank(Constant(value.most, value.width)))
    if starts is None or ends is None:
        raise ValueError("an input is missing")
    chosen = [slice(None)] * array.ndim
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        chosen[axes[i] if axes else i] = slice(start, end, steps[i] if steps else 1)
    return _one(_moved(value, array[tuple(chosen)]))


def _split(node: Node, given: Given) -> Made:
    value, many = _needed(given, 0), len(node.outputs)
    try:
        array, sizes = _array(given, 0), _told(node, "split", given, 1)
    except ValueError:
        return [Constant(value.most, value.width)] * many, value.most * many
    axis = node.attributes.get("axis", 0)
    each = -(-array.shape[axis] // many)
    ends = np.cumsum(sizes).tolist() if sizes else [each * (i + 1) for i in range(many)]
    return [_moved(value, part) for part in np.split(array, ends[:-1], axis)], value.most


def _joined(node: Node, given: Given) -> Made:
    values = [_needed(given, i) for i in range(len(given))]
    most = sum(value.most for value in values)
    arrays = [value.array for value in values if value.array is not None]
    if len(arrays) < len(values):
        return _one(Constant(most, max(value.width for value in values)))
    axis = node.attributes["axis"]
    if most <= SMALL and all(value.known for value in values):
        result = np.concatenate(arrays, axis)
        return _one(of(result.shape, result.dtype, result))
    shape = list(arrays[0].shape)
    shape[axis] = sum(array.shape[axis] for array in arrays)
    return _one(of(shape, arrays[0].dtype))


def _gathered(node: Node, given: Given) -> Made:
    value, chosen = _needed(given, 0), _needed(given, 1)
    if node.operator == "GatherElements":
        return _one(
            Constant(chosen.most, value.width)
            if chosen.array is None
            else of(chosen.array.shape, _array(given, 0).dtype)
        )
    if value.array is None or chosen.array is None:
        return _one(Constant(value.most * chosen.most, value.width))
    shape, indices = value.array.shape, chosen.array.shape
    if node.operator == "GatherND":
        at = node.attributes.get("batch_dims", 0) + indices[-1]
        return _one(of([*indices[:-1], *shape[at:]], value.array.dtype))
    axis = node.attributes.get("axis", 0) % len(shape)
    if value.known and chosen.known and value.most * chosen.most <= SMALL**2:
        result = np.take(value.array, chosen.array, axis)
        if result.size <= SMALL:
            return _one(of(result.shape, result.dtype, result))
    return _one(of([*shape[:axis], *indices, *shape[axis + 1 :]], value.array.dtype))


def _filled(node: Node, given: Given) -> Made:
    shape, value = _numbers(given, 0) or [], node.attributes.get("value")
    array = np.zeros(1, np.float32) if value is None else value.array
    if min(shape, default=0) < 0 or array is None:
        raise ValueError("there is no such shape")
    known = (value is None or value.known) and math.prod(shape) <= SMALL
    return _one(of(shape, array.dtype, np.full(shape, array.reshape(-1)[0]) if known else None))


def _expanded(node: Node, given: Given) -> Made:
    value, array, target = _needed(given, 0), _array(given, 0), _numbers(given, 1) or []
    if node.operator == "Tile":
        shape = [size * times for size, times in zip(array.shape, target, strict=True)]
        return _one(of(shape, array.dtype))
    rank = max(array.ndim, len(target))
    old, new = [1] * (rank - array.ndim) + list(array.shape), [1] * (rank - len(target)) + target
    shape = [b if a == 1 else a for a, b in zip(old, new, strict=True)]
    known = value.known and math.prod(shape) <= SMALL
    return _one(of(shape, array.dtype, np.broadcast_to(array, shape) if known else None))


def _counted(node: Node, given: Given) -> Made:
    (start,), (end,), (step,) = (_numbers(given, i) or [0] for i in range(3))
    count = max(math.ceil((end - start) / step), 0)
    kind = _array(given, 0).dtype
    return _one(of((count,), kind, (start + step * np.arange(count)).astype(kind) if count <= SMALL else None))


def _padded(node: Node, given: Given) -> Made:
    array, pads, axes = _array(given, 0), _told(node, "pads", given, 1), _numbers(given, 3)
    if pads is None:
        raise ValueError("an input is missing")
    shape, half = list(array.shape), len(pads) // 2
    for i in range(half):
        shape[axes[i] if axes else i] += pads[i] + pads[half + i]
    return _one(of(shape, array.dtype))


def _resized(node: Node, given: Given) -> Made:
    array = _array(given, 0)
    scales, sizes = _numbers(given, len(given) - 1 if node.operator == "Upsample" else 2), _numbers(given, 3)
    stretched = node.attributes.get("keep_aspect_ratio_policy", b"stretch") == b"stretch"
    if node.attributes.get("axes") or not stretched or not (scales or sizes):
        raise ValueError("its sizes are not told")
    shape = sizes or [math.floor(size * scale) for size, scale in zip(array.shape, scales or [], strict=True)]
    made = of(shape, array.dtype)
    return [made], (made.most + array.size) * 4**array.ndim  # a cubic one reads 4 values in each direction


def _multiplied(node: Node, given: Given) -> Made:
    left, right = _array(given, 0), _array(given, 1)
    if node.operator == "Gemm":
        left = left.T if node.attributes.get("transA") else left
        right = right.T if node.attributes.get("transB") else right
    inner = left.shape[-1]
    if inner != right.shape[-2:][0]:
        raise ValueError("its matrices do not fit")
    rows, columns = left.shape[-2:-1], right.shape[-1:] if right.ndim > 1 else ()
    made = of([*np.broadcast_shapes(left.shape[:-2], right.shape[:-2]), *rows, *columns], left.dtype)
    return [made], made.most * inner


def _summed(node: Node, given: Given) -> Made:
    """Einsum, over labels of one letter."""
    into, arrow, out = node.attributes["equation"].decode().replace(" ", "").partition("->")
    if not arrow or "." in into:
        raise ValueError("its labels are not told")
    sizes: dict[str, int] = {}
    for i, labels in enumerate(into.split(",")):
        for label, size in zip(labels, _array(given, i).shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))  # 1 goes with any
    return [of([sizes[label] for label in out], _array(given, 0).dtype)], math.prod(sizes.values())


def _convolved(node: Node, given: Given) -> Made:
    data, weights, get = _array(given, 0), _array(given, 1), node.attributes.get
    if get("auto_pad", b"NOTSET") != b"NOTSET":
        raise ValueError("its padding is not told")
    rank = data.ndim - 2
    ones, pads = [1] * rank, get("pads") or [0] * 2 * rank
    strides, dilations = get("strides") or ones, get("dilations") or ones
    spatial = [
        (data.shape[2 + i] + pads[i] + pads[rank + i] - dilations[i] * (weights.shape[2 + i] - 1) - 1) // strides[i] + 1
        for i in range(rank)
    ]
    made = of([data.shape[0], weights.shape[0], *spatial], data.dtype)
    return [made], made.most * math.prod(weights.shape[1:])


def _quantized(node: Node, given: Given) -> Made:
    zero = given[2].array if len(given) > 2 and given[2] else None
    kind = _array(given, 1).dtype if node.operator == "DequantizeLinear" else np.uint8 if zero is None else zero.dtype
    return _one(_blank(_needed(given, 0), kind))


_RULES: Final[dict[str, Callable[[Node, Given], Made]]] = {
    "Identity": lambda node, given: _one(_needed(given, 0)),
    "Transpose": _transposed,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshaped),
    "Slice": _sliced,
    "Split": _split,
    "Concat": _joined,
    **dict.fromkeys(("Gather", "GatherElements", "GatherND"), _gathered),
    "ConstantOfShape": _filled,
    **dict.fromkeys(("Expand", "Tile"), _expanded),
    "Range": _counted,
    "Pad": _padded,
    **dict.fromkeys(("Resize", "Upsample"), _resized),
    "EyeLike": lambda node, given: _one(_blank(_needed(given, 0), TYPES.get(node.attributes.get("dtype", 11)))),
    **dict.fromkeys(("MatMul", "Gemm"), _multiplied),
    "Einsum": _summed,
    "Conv": _convolved,
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantized),
}
