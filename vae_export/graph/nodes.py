"""Appends nodes and constants to a graph: for the fused graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir

from vae_export.graph.edit import add_constant

_COMPARISONS = {"Less", "Greater", "Equal"}


def node(
    graph: onnx_ir.Graph,
    operator: str,
    inputs: list[onnx_ir.Value],
    output: str,
    attributes: Mapping[str, Any] | None = None,
    dtype: onnx_ir.DataType = onnx_ir.DataType.FLOAT,
) -> onnx_ir.Value:
    """Append a node; return its only output, named `output`, of this type."""
    appended = onnx_ir.node(operator, inputs, attributes or {}, name=f"{output}.node")
    value = appended.outputs[0]
    value.name, value.type = output, onnx_ir.TensorType(dtype)
    graph.append(appended)
    return value


class Formula:
    """Appends the nodes of a formula to a graph; values are named by a prefix and a number."""

    def __init__(self, graph: onnx_ir.Graph, prefix: str) -> None:
        """`prefix` and a dot must begin no name in the graph."""
        self._graph = graph
        self._prefix = prefix
        self._count = 0

    def __call__(self, operator: str, *inputs: onnx_ir.Value | float, name: str | None = None) -> onnx_ir.Value:
        """Append a node of a standard operator without attributes; return its only output.

        Args:
            operator: its name.
            inputs: values; numbers become constants of the last value's type.
            name: the output's name; None numbers it.
        """
        dtype = next(value.dtype for value in reversed(inputs) if isinstance(value, onnx_ir.Value))
        assert dtype is not None
        values = [
            value
            if isinstance(value, onnx_ir.Value)
            else add_constant(self._graph, self._new(), dtype.numpy().type(value))
            for value in inputs
        ]
        result = onnx_ir.DataType.BOOL if operator in _COMPARISONS else dtype
        return node(self._graph, operator, values, name or self._new(), dtype=result)

    def double(self, value: onnx_ir.Value) -> onnx_ir.Value:
        """The value, cast to float64 if it has another type."""
        wanted = onnx_ir.DataType.DOUBLE
        if value.dtype == wanted:
            return value
        return node(self._graph, "Cast", [value], self._new(), {"to": wanted}, wanted)

    def per_example(self, terms: onnx_ir.Value, rank: int, name: str) -> onnx_ir.Value:
        """The sum of terms, of so many dimensions, over all of them but the batch: (batch,) float64."""
        axes = add_constant(self._graph, self._new(), np.arange(1, rank, dtype=np.int64))
        terms = self.double(terms)
        return node(self._graph, "ReduceSum", [terms, axes], name, {"keepdims": 0}, onnx_ir.DataType.DOUBLE)

    def _new(self) -> str:
        self._count += 1
        return f"{self._prefix}.{self._count}"
