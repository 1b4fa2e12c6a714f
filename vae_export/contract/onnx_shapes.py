"""What one node computes out of constants: shapes, small values and the number of steps, inferred by operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vae_export.contract.onnx_graph import SMALL, TYPES, UNKNOWN, Constant, Node, constant

Inputs = Sequence[Constant | None]
#: Results, and in how many steps (multiply-adds, or elements that are read or written).
Inferred = tuple[list[Constant], int]


def infer(node: Node, inputs: Inputs) -> Inferred | None:
    """A node's results for constant inputs, and its steps; None where they cannot be inferred.

    Raises:
        OverflowError: as `constant`.
        ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError: nor can they here, or the node
            is invalid.
    """
    operator = node.operator
    if any(value and value.most == UNKNOWN for value in inputs):
        return None
    if operator in _SAME:
        return [_like(_needed(inputs, 0))], 4 * sum(value.most for value in inputs if value)
    if operator in _COMPUTED or operator in _ELEMENTWISE or operator in ("Cast", "CastLike", "Where"):
        return _elementwise(node, inputs)
    if operator.startswith("Reduce") or operator in ("ArgMax", "ArgMin"):
        return _reduce(node, inputs)
    if operator in _RULES:
        return _RULES[operator](node, inputs)
    return None


def _needed(inputs: Inputs, index: int) -> Constant:
    value = inputs[index]
    if value is None:
        raise ValueError("an input is missing")
    return value


def _array(inputs: Inputs, index: int) -> npt.NDArray[Any]:
    """An array of an input's shape.

    Raises:
        ValueError: it is missing, or its shape is not known.
    """
    array = _needed(inputs, index).array
    if array is None:
        raise ValueError("an input's shape is not known")
    return array


def _numbers(inputs: Inputs, index: int) -> list[Any] | None:
    """The numbers of an input; None where it is left out.

    Raises:
        ValueError: they are not known.
    """
    value = inputs[index] if index < len(inputs) else None
    if value is None:
        return None
    if not value.known or value.array is None:
        raise ValueError("an input's numbers are not known")
    return list(value.array.reshape(-1).tolist())


def _numbers_of(node: Node, name: str, inputs: Inputs, index: int) -> list[Any] | None:
    """The numbers of an input or, in earlier versions of an operator, of an attribute."""
    value = node.attributes.get(name)
    return _numbers(inputs, index) if value is None else list(value)


def _like(value: Constant, dtype: npt.DTypeLike | None = None) -> Constant:
    """A constant of the same size, whose numbers are not known."""
    if value.array is None:
        return Constant(value.most, value.width if dtype is None else np.dtype(dtype).itemsize)
    return constant(value.array.shape, value.array.dtype if dtype is None else dtype)


def _rearranged(value: Constant, array: npt.NDArray[Any]) -> Constant:
    """A constant that has a value's numbers in another order, or some of them."""
    return constant(array.shape, array.dtype, array if value.known else None)


def _single(value: Constant) -> Inferred:
    return [value], value.most


def _elementwise(node: Node, inputs: Inputs) -> Inferred:
    values = [value for value in inputs if value is not None]
    dtype: npt.DTypeLike | None = None
    if node.operator == "Cast":
        dtype = TYPES.get(node.attributes["to"])
        if dtype is None:
            return [Constant(values[0].most)], values[0].most
    elif node.operator == "CastLike":
        dtype, values = _array(inputs, 1).dtype, values[:1]
    elif node.operator in _BOOLEAN:
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
        return [constant(shape, kind)], 4 * count
    with np.errstate(all="ignore"):
        if dtype is not None and node.operator.startswith("Cast"):
            if kind == np.uint16:  # it may stand for bfloat16
                return [constant(shape, kind)], 4 * count
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
            return [constant(shape, kind)], 4 * count
    return [constant(shape, kind, np.asarray(result).astype(kind))], 4 * count


def _divide(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """C++'s division, which rounds integers towards 0."""
    if left.dtype.kind == "f":
        return np.asarray(left / right)
    if not right.all():
        raise ValueError("division by 0")
    quotient = np.floor_divide(left, right)
    return np.asarray(quotient + ((quotient < 0) & (quotient * right != left)))


_COMPUTED: Final[dict[str, Callable[..., Any]]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _divide, "Min": np.minimum, "Max": np.maximum,
    "Neg": np.negative, "Abs": np.abs, "Floor": np.floor, "Ceil": np.ceil, "Round": np.round, "Sqrt": np.sqrt,
    "Equal": np.equal, "Less": np.less, "LessOrEqual": np.less_equal, "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal, "And": np.logical_and, "Or": np.logical_or, "Not": np.logical_not,
}  # fmt: skip
_BOOLEAN: Final = {
    *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf"),
}
_ELEMENTWISE: Final = {
    *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cos", "Cosh", "Sin", "Sinh", "Tan", "Tanh", "Exp", "Log"),
    *("Erf", "Reciprocal", "Sign", "Pow", "Mod", "Sum", "Mean", "Xor", "IsNaN", "IsInf", "BitwiseAnd", "BitwiseOr"),
    *("BitwiseXor", "BitwiseNot", "BitShift", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Relu", "LeakyRelu"),
    *("PRelu", "Elu", "Selu", "Celu", "Gelu", "Mish", "Softplus", "Softsign", "ThresholdedRelu", "Shrink"),
}
#: Operators whose result has the shape and type of the first input.
_SAME: Final = {
    *("Clip", "CumSum", "Trilu", "Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "LayerNormalization"),
    *("InstanceNormalization", "GroupNormalization", "RMSNormalization", "ScatterND", "ScatterElements", "Scatter"),
    *("ReverseSequence",),
}


def _reduce(node: Node, inputs: Inputs) -> Inferred:
    value = _needed(inputs, 0)
    index = node.operator.startswith("Arg")
    kind: npt.DTypeLike | None = np.int64 if index else None
    if value.array is None:
        return [_like(value, kind)], value.most
    shape = value.array.shape
    axes = [node.attributes.get("axis", 0)] if index else _numbers_of(node, "axes", inputs, 1)
    if not axes:
        axes = [] if node.attributes.get("noop_with_empty_axes") else list(range(len(shape)))
    chosen = {axis % max(len(shape), 1) for axis in axes}
    keep = node.attributes.get("keepdims", 1)
    reduced = [1 if axis in chosen else size for axis, size in enumerate(shape) if keep or axis not in chosen]
    if value.known and (reduce := _REDUCTIONS.get(node.operator)) and chosen:
        result = np.asarray(reduce(value.array, axis=tuple(chosen))).astype(value.array.dtype)
        return [constant(reduced, result.dtype, result)], value.most
    return [constant(reduced, value.array.dtype if kind is None else kind)], value.most


_REDUCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "ReduceSum": np.sum, "ReduceProd": np.prod, "ReduceMax": np.max, "ReduceMin": np.min
}  # fmt: skip


def _transpose(node: Node, inputs: Inputs) -> Inferred:
    value = _needed(inputs, 0)
    if value.array is None:
        return _single(_like(value))
    return _single(_rearranged(value, value.array.transpose(node.attributes.get("perm"))))


def _reshape(node: Node, inputs: Inputs) -> Inferred:
    value = _needed(inputs, 0)
    target = _needed(inputs, 1) if node.operator == "Reshape" else None
    if value.array is None or (target and not target.known):
        return _single(Constant(value.most, value.width))
    old = value.array.shape
    shape: list[int] = []
    if node.operator == "Reshape":
        kept = not node.attributes.get("allowzero")
        shape = [old[i] if size == 0 and kept else size for i, size in enumerate(_numbers(inputs, 1) or [])]
        if -1 in shape:
            rest = math.prod(size for size in shape if size != -1)
            shape[shape.index(-1)] = value.most // rest
    elif node.operator == "Flatten":
        axis = node.attributes.get("axis", 1)
        shape = [math.prod(old[:axis]), math.prod(old[axis:])]
    elif node.operator == "Squeeze":
        axes = _numbers_of(node, "axes", inputs, 1)
        removed = [i for i, size in enumerate(old) if size == 1] if axes is None else [axis % len(old) for axis in axes]
        shape = [size for i, size in enumerate(old) if i not in removed]
    else:
        axes = _numbers_of(node, "axes", inputs, 1) or []
        rank = len(old) + len(axes)
        added, sizes = {axis % rank for axis in axes}, iter(old)
        shape = [1 if i in added else next(sizes, 1) for i in range(rank)]
    if math.prod(shape) != value.most:
        raise ValueError("the number of elements changes")
    return _single(constant(shape, value.array.dtype, value.array if value.known else None))


def _slice(node: Node, inputs: Inputs) -> Inferred:
    value = _needed(inputs, 0)
    try:
        array = _array(inputs, 0)
        starts, ends = _numbers_of(node, "starts", inputs, 1), _numbers_of(node, "ends", inputs, 2)
        axes, steps = _numbers_of(node, "axes", inputs, 3), _numbers(inputs, 4)
    except ValueError:
        return _single(Constant(value.most, value.width))
    if starts is None or ends is None:
        raise ValueError("an input is missing")
    chosen = [slice(None)] * array.ndim
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        chosen[axes[i] if axes else i] = slice(start, end, steps[i] if steps else 1)
    return _single(_rearranged(value, array[tuple(chosen)]))


def _split(node: Node, inputs: Inputs) -> Inferred:
    value, many = _needed(inputs, 0), len(node.outputs)
    try:
        array, sizes = _array(inputs, 0), _numbers_of(node, "split", inputs, 1)
    except ValueError:
        return [Constant(value.most, value.width)] * many, value.most * many
    axis = node.attributes.get("axis", 0)
    each = -(-array.shape[axis] // many)
    ends = np.cumsum(sizes).tolist() if sizes else [each * (i + 1) for i in range(many)]
    return [_rearranged(value, part) for part in np.split(array, ends[:-1], axis)], value.most


def _concat(node: Node, inputs: Inputs) -> Inferred:
    values = [_needed(inputs, i) for i in range(len(inputs))]
    most = sum(value.most for value in values)
    arrays = [value.array for value in values if value.array is not None]
    if len(arrays) < len(values):
        return _single(Constant(most, max(value.width for value in values)))
    axis = node.attributes["axis"]
    if most <= SMALL and all(value.known for value in values):
        result = np.concatenate(arrays, axis)
        return _single(constant(result.shape, result.dtype, result))
    shape = list(arrays[0].shape)
    shape[axis] = sum(array.shape[axis] for array in arrays)
    return _single(constant(shape, arrays[0].dtype))


def _gather(node: Node, inputs: Inputs) -> Inferred:
    value, chosen = _needed(inputs, 0), _needed(inputs, 1)
    if node.operator == "GatherElements":
        if chosen.array is None:
            return _single(Constant(chosen.most, value.width))
        return _single(constant(chosen.array.shape, _array(inputs, 0).dtype))
    if value.array is None or chosen.array is None:
        return _single(Constant(value.most * chosen.most, value.width))
    shape, indices = value.array.shape, chosen.array.shape
    if node.operator == "GatherND":
        at = node.attributes.get("batch_dims", 0) + indices[-1]
        return _single(constant([*indices[:-1], *shape[at:]], value.array.dtype))
    axis = node.attributes.get("axis", 0) % len(shape)
    if value.known and chosen.known and value.most * chosen.most <= SMALL**2:
        result = np.take(value.array, chosen.array, axis)
        if result.size <= SMALL:
            return _single(constant(result.shape, result.dtype, result))
    return _single(constant([*shape[:axis], *indices, *shape[axis + 1 :]], value.array.dtype))


def _fill(node: Node, inputs: Inputs) -> Inferred:
    shape, value = _numbers(inputs, 0) or [], node.attributes.get("value")
    array = np.zeros(1, np.float32) if value is None else value.array
    if min(shape, default=0) < 0 or array is None:
        raise ValueError("the shape is invalid")
    known = (value is None or value.known) and math.prod(shape) <= SMALL
    return _single(constant(shape, array.dtype, np.full(shape, array.reshape(-1)[0]) if known else None))


def _expand(node: Node, inputs: Inputs) -> Inferred:
    value, array, target = _needed(inputs, 0), _array(inputs, 0), _numbers(inputs, 1) or []
    if node.operator == "Tile":
        shape = [size * times for size, times in zip(array.shape, target, strict=True)]
        return _single(constant(shape, array.dtype))
    rank = max(array.ndim, len(target))
    old, new = [1] * (rank - array.ndim) + list(array.shape), [1] * (rank - len(target)) + target
    shape = [b if a == 1 else a for a, b in zip(old, new, strict=True)]
    known = value.known and math.prod(shape) <= SMALL
    return _single(constant(shape, array.dtype, np.broadcast_to(array, shape) if known else None))


def _range(node: Node, inputs: Inputs) -> Inferred:
    (start,), (end,), (step,) = (_numbers(inputs, i) or [0] for i in range(3))
    count = max(math.ceil((end - start) / step), 0)
    kind = _array(inputs, 0).dtype
    return _single(constant((count,), kind, (start + step * np.arange(count)).astype(kind) if count <= SMALL else None))


def _pad(node: Node, inputs: Inputs) -> Inferred:
    array, pads, axes = _array(inputs, 0), _numbers_of(node, "pads", inputs, 1), _numbers(inputs, 3)
    if pads is None:
        raise ValueError("an input is missing")
    shape, half = list(array.shape), len(pads) // 2
    for i in range(half):
        shape[axes[i] if axes else i] += pads[i] + pads[half + i]
    return _single(constant(shape, array.dtype))


def _resize(node: Node, inputs: Inputs) -> Inferred:
    array = _array(inputs, 0)
    scales, sizes = _numbers(inputs, len(inputs) - 1 if node.operator == "Upsample" else 2), _numbers(inputs, 3)
    stretched = node.attributes.get("keep_aspect_ratio_policy", b"stretch") == b"stretch"
    if node.attributes.get("axes") or not stretched or not (scales or sizes):
        raise ValueError("its sizes are not known")
    shape = sizes or [math.floor(size * scale) for size, scale in zip(array.shape, scales or [], strict=True)]
    result = constant(shape, array.dtype)
    return [result], (result.most + array.size) * 4**array.ndim  # cubic interpolation reads 4 values in each direction


def _matmul(node: Node, inputs: Inputs) -> Inferred:
    left, right = _array(inputs, 0), _array(inputs, 1)
    if node.operator == "Gemm":
        left = left.T if node.attributes.get("transA") else left
        right = right.T if node.attributes.get("transB") else right
    inner = left.shape[-1]
    if inner != right.shape[-2:][0]:
        raise ValueError("the matrices' sizes do not match")
    rows, columns = left.shape[-2:-1], right.shape[-1:] if right.ndim > 1 else ()
    result = constant([*np.broadcast_shapes(left.shape[:-2], right.shape[:-2]), *rows, *columns], left.dtype)
    return [result], result.most * inner


def _einsum(node: Node, inputs: Inputs) -> Inferred:
    """Einsum, over labels of one letter."""
    into, arrow, out = node.attributes["equation"].decode().replace(" ", "").partition("->")
    if not arrow or "." in into:
        raise ValueError("its labels are not known")
    sizes: dict[str, int] = {}
    for i, labels in enumerate(into.split(",")):
        for label, size in zip(labels, _array(inputs, i).shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))  # 1 is broadcast
    return [constant([sizes[label] for label in out], _array(inputs, 0).dtype)], math.prod(sizes.values())


def _convolve(node: Node, inputs: Inputs) -> Inferred:
    data, weights, get = _array(inputs, 0), _array(inputs, 1), node.attributes.get
    if get("auto_pad", b"NOTSET") != b"NOTSET":
        raise ValueError("its padding is not known")
    rank = data.ndim - 2
    ones, pads = [1] * rank, get("pads") or [0] * 2 * rank
    strides, dilations = get("strides") or ones, get("dilations") or ones
    spatial = [
        (data.shape[2 + i] + pads[i] + pads[rank + i] - dilations[i] * (weights.shape[2 + i] - 1) - 1) // strides[i] + 1
        for i in range(rank)
    ]
    result = constant([data.shape[0], weights.shape[0], *spatial], data.dtype)
    return [result], result.most * math.prod(weights.shape[1:])


def _quantize(node: Node, inputs: Inputs) -> Inferred:
    zero = inputs[2].array if len(inputs) > 2 and inputs[2] else None
    kind = _array(inputs, 1).dtype if node.operator == "DequantizeLinear" else np.uint8 if zero is None else zero.dtype
    return _single(_like(_needed(inputs, 0), kind))


_RULES: Final[dict[str, Callable[[Node, Inputs], Inferred]]] = {
    "Identity": lambda node, inputs: _single(_needed(inputs, 0)),
    "Transpose": _transpose,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    **dict.fromkeys(("Gather", "GatherElements", "GatherND"), _gather),
    "ConstantOfShape": _fill,
    **dict.fromkeys(("Expand", "Tile"), _expand),
    "Range": _range,
    "Pad": _pad,
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "EyeLike": lambda node, inputs: _single(_like(_needed(inputs, 0), TYPES.get(node.attributes.get("dtype", 11)))),
    **dict.fromkeys(("MatMul", "Gemm"), _matmul),
    "Einsum": _einsum,
    "Conv": _convolve,
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
}
