"""Constant folding: how many bytes and steps a backend computes out of constants alone while it opens a graph.

A backend that folds constants computes before anybody can bound or end it, so this is estimated without computing
(see `onnx_shapes`). Where sizes do not follow from the graph alone, the estimate is incomplete, and the graph is only
for backends that do not fold.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from vae_export.contract.onnx_graph import MAX_RANK, SMALL, UNKNOWN, Constant, Graph, Node, constant
from vae_export.contract.onnx_shapes import Inputs, infer

#: Limits of what is computed out of constants: bytes and steps, and how many more for each byte of the model. A product
#: of two matrices of 1,600 x 1,600 needs 2^32 steps.
_BYTES, _BYTES_EACH = 1 << 28, 4
_STEPS, _STEPS_EACH = 1 << 32, 64
#: Results of more bytes must have a known shape: an upper bound of their size is not enough.
_MAX_ESTIMATE: Final = 1 << 20
#: The largest size or factor of a Resize.
_MAX_RESIZE: Final = 1 << 20


_Scope = ChainMap[str, Constant | None]


@dataclass
class Folding:
    """An upper bound of what a backend computes out of constants alone.

    Attributes:
        size: bytes.
        steps: multiply-adds, or elements that are read or written.
        complete: whether that is all. Otherwise there are constants whose sizes do not follow from the graph alone.
        worst: the share of the limits that the most expensive operator takes, and its name.
        fatal: what would end the process of a backend that computes it, in words.
    """

    size: int = 0
    steps: int = 0
    complete: bool = True
    worst: tuple[float, str] = (0.0, "")
    fatal: str | None = None

    def problem(self, model: int) -> str | None:
        """Why this must not be computed for a model of so many bytes, in words, or None."""
        if self.fatal:
            return self.fatal
        size, steps = _BYTES + _BYTES_EACH * model, _STEPS + _STEPS_EACH * model
        if self.size <= size and self.steps <= steps:
            return None
        excess = f"{self.size:,} bytes (at most {size:,})"
        if self.size <= size:
            excess = f"{self.steps:,} steps (at most {steps:,})"
        return f"computes {excess} out of constants alone, most of it by {self.worst[1]}"

    def add(self, operator: str, size: int, steps: int) -> None:
        """Add a node."""
        self.size += size
        self.steps += steps
        self.worst = max(self.worst, (max(size / _BYTES, steps / _STEPS), operator))


def estimate(graph: Graph) -> Folding:
    """Bound what a backend computes while it opens a graph."""
    total = Folding()
    _walk(graph, ChainMap(), total)
    return total


def _walk(graph: Graph, outer: _Scope, total: Folding) -> None:
    """Propagate constants through a graph. None in the scope stands for values that depend on the inputs."""
    scope = outer.new_child({**dict.fromkeys(graph.inputs), **graph.constants})
    for node in graph.nodes:
        if any(name and name not in scope for name in node.inputs) or any(
            name and name in scope for name in node.outputs
        ):
            total.complete = False  # a backend that sorts the nodes, or resolves names otherwise, sees another graph
        branches = [value for value in node.attributes.values() if isinstance(value, Graph)]
        for branch in branches:
            _walk(branch, scope, total)
        results = _outputs(node, graph, scope, total, branches=bool(branches))
        scope.update(zip(node.outputs, results, strict=False))


def _outputs(node: Node, graph: Graph, scope: _Scope, total: Folding, *, branches: bool) -> Sequence[Constant | None]:
    many = len(node.outputs)
    inputs = [scope.get(name) if name else None for name in node.inputs]
    total.fatal = total.fatal or _fatal(node.operator, inputs)
    varies = any(value is None and name for name, value in zip(node.inputs, inputs, strict=True))
    try:
        if node.operator in ("Shape", "Size") and node.inputs:
            return [_shape(node, graph, inputs[0])]
        if varies:
            return [None] * many
        if node.operator == "Constant":
            return [_literal(node)]
        inferred = None if branches else infer(node, inputs)
    except OverflowError:
        total.add(node.operator, UNKNOWN, 0)
        return [Constant(UNKNOWN)] * many
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        inferred = None  # the backend refuses it, with its own reason
    results, steps = inferred or ([], 0)
    size = sum(value.most * value.width for value in results)
    bounded = any(value.most < UNKNOWN and value.array is None for value in results)
    if inferred is None or (size > _MAX_ESTIMATE and bounded):
        total.complete = False
        return [Constant(UNKNOWN)] * many
    total.add(node.operator, size, steps)
    return [*results, *[Constant(UNKNOWN)] * (many - len(results))]


def _fatal(operator: str, inputs: Inputs) -> str | None:
    """Why these constants would end the process of a backend, which does not check them, in words, or None."""
    arrays = [value.array if value and value.known else None for value in inputs]
    second, third, fourth = [*arrays, None, None, None, None][1:4]
    if operator == "Div" and second is not None and second.dtype.kind == "i" and (second == -1).any():
        return "divides integers by -1, which overflows for the smallest of them"
    if operator in ("Resize", "Upsample"):
        for sizes in (third, fourth) if operator == "Resize" else (second,):
            if sizes is not None and not ((sizes > 0) & (sizes <= _MAX_RESIZE)).all():
                return f"has a {operator} by {sizes.tolist()}; expected numbers above 0, up to {_MAX_RESIZE}"
    return None


def _shape(node: Node, graph: Graph, value: Constant | None) -> Constant | None:
    """The result of Shape or Size: of a constant or an input its sizes, None where they vary; else a bound of them."""
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
    start, end = node.attributes.get("start", 0), node.attributes.get("end", MAX_RANK)
    if sizes is None:
        if node.operator == "Size":
            return constant((), np.int64) if value is None else None
        return Constant(max(0, min(end - start, MAX_RANK)) if start >= 0 <= end else MAX_RANK, 8)
    chosen = sizes if node.operator == "Size" else sizes[start:end]
    if None in chosen:
        return None  # it varies, and no backend folds what depends on it
    numbers = np.array(chosen, np.int64)
    if node.operator == "Size":
        numbers = np.array(np.prod(numbers))
    return constant(numbers.shape, np.int64, numbers)


def _literal(node: Node) -> Constant:
    """The value of a node Constant."""
    for value in node.attributes.values():
        if isinstance(value, Constant):
            return value
        if isinstance(value, (int, float, list)):
            first = value[0] if isinstance(value, list) and value else value
            kind = np.float32 if isinstance(first, float) else np.int64
            numbers = np.array(value, kind)
            return constant(numbers.shape, kind, numbers) if numbers.size <= SMALL else constant(numbers.shape, kind)
    return Constant(UNKNOWN)
