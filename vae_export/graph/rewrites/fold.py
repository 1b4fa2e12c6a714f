"""What can be computed now is, and what does nothing goes.

Requires: a graph whose shapes, as far as it tells them, are right.
Ensures: constants are folded, except into ones above 64 KiB that are larger than what they are made from; identities
and Cast, Expand, Reshape, Transpose, Slice and Pad that do nothing are gone, padding is the convolution's own, equal
computations are one, and what no output needs is dropped. Inputs and outputs keep names, types and shapes. Constants
are folded in their own type, as a runtime would compute them. Which weights are equal does not decide what is done:
a graph with other weights has the same structure.

The work is done by the passes of onnx-ir and onnxscript.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    LiftConstantsToInitializersPass,
    OutputFixPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)
from onnxscript.optimizer import FOLDED_FROM_KEY, fold_constants_ir
from onnxscript.rewriter import RULE_NAME_TAG, RewritePass
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase
from onnxscript.rewriter.rules import common as rules

from vae_export.graph.edit import constant

#: Constants are not made larger than this many bytes, except from larger ones.
_LIMIT = 64 * 1024
#: Constants of shapes have so few numbers. Larger ones are weights.
_SMALL = 16
_ROUNDS = 10


class _NoPadding(RewriteRuleClassBase):
    """A Pad by nothing."""

    def pattern(self, op: Any, x: Any, pads: Any) -> Any:
        return op.Pad(x, pads, _allow_other_inputs=True)

    def check(self, context: Any, x: Any, pads: onnx_ir.Value) -> MatchResult:
        array = constant(pads)
        result = MatchResult()
        return result if array is not None and not array.any() else result.fail("it pads")

    def rewrite(self, op: Any, x: Any, pads: Any) -> Any:
        return op.Identity(x)


_RULES = (
    *rules.mul_by_1_rule.commute(),
    *rules.add_0_rule.commute(),
    rules.div_by_1_rule,
    rules.sub_0_rule,
    rules.dropout_inference_rule,
    rules.dropout_zero_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    _NoPadding.rule(),  # type: ignore[no-untyped-call]
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.materialize_reshape_shape_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.fuse_pad_into_conv_rule,
)


def apply(model: onnx_ir.Model) -> int:
    """Do so; how many nodes went or take other inputs, and how many constants went."""
    draft = model.clone()
    ends = [(end.name, end.type, end.shape) for end in (*draft.graph.inputs, *draft.graph.outputs)]
    nodes = {node: tuple(node.inputs) for node in draft.graph.all_nodes()}
    constants = list(draft.graph.initializers.values())
    _simplify(draft)
    gone = nodes.keys() - set(draft.graph.all_nodes())
    for node in gone:  # those of a branch that is never taken still hold what they used
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    RemoveUnusedNodesPass()(draft)
    if _size(draft.graph) >= _size(model.graph):
        return 0  # equal but for names and for what was inferred of shapes
    for end, (name, kind, shape) in zip((*draft.graph.inputs, *draft.graph.outputs), ends, strict=True):
        end.name, end.type, end.shape = name, kind, shape
    for node in draft.graph.all_nodes():
        node.metadata_props.pop(RULE_NAME_TAG, None)
        for value in node.outputs:
            value.metadata_props.pop(FOLDED_FROM_KEY, None)
    for value in draft.graph.initializers.values():
        value.metadata_props.pop(FOLDED_FROM_KEY, None)
    model.graph = draft.graph
    changed = sum(node in gone or tuple(node.inputs) != inputs for node, inputs in nodes.items())
    return changed + sum(not value.is_initializer() for value in constants)


def _size(graph: onnx_ir.Graph) -> tuple[int, int, int, int]:
    """What a fold makes smaller: nodes that compute, all nodes, inputs that are not constants, and constants."""
    nodes = list(graph.all_nodes())
    computed = sum(value is not None and constant(value) is None for node in nodes for value in node.inputs)
    working = sum(node.op_type not in ("Identity", "Constant") for node in nodes)
    return working, len(nodes), computed, len(graph.initializers)


def _simplify(model: onnx_ir.Model) -> None:
    """All of it, until nothing changes."""
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    others = Sequential(
        RewritePass(_RULES),
        RemoveUnusedNodesPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateInitializersPass(size_limit=_SMALL),
        CommonSubexpressionEliminationPass(),
    )
    for _ in range(_ROUNDS):
        folded = fold_constants_ir(
            model,
            onnx_shape_inference=True,
            input_size_limit=2**62,
            output_size_limit=_LIMIT // 4,
            should_fold=_should_fold,
        )
        if not (others(model).modified or folded.modified):
            break
    OutputFixPass()(model)


def _should_fold(node: onnx_ir.Node) -> bool | None:
    """Whether to fold a node; None leaves it to onnxscript. Asked before anything is computed."""
    shape = node.outputs[0].shape
    made = None if shape is None or not shape.is_static() else math.prod(shape.numpy())
    grows = node.op_type in ("ConstantOfShape", "Expand", "Range", "Tile", "Pad", "Resize", "Upsample")
    if made is None:
        return False if grows else None
    dtype = node.outputs[0].dtype
    given = sum(array.size for value in node.inputs if (array := constant(value)) is not None)
    if made > given and made * (8 if dtype is None else dtype.itemsize) > _LIMIT:
        return False
    return True if node.op_type == "ConstantOfShape" else None
