"""Constant folding: computed weights are constants, and everything else stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import EXACT, Net, applied, check, ops, rewritten
from onnx import TensorProto, helper, numpy_helper

from vae_export import graph
from vae_export.graph import fingerprint, quantize
from vae_export.graph.rewrites import fold

pytestmark = pytest.mark.quick


def weight_norm(net: Net, out: int, into: int) -> str:
    """The weights g · v / ‖v‖, as PyTorch's exporter writes them."""
    v, g = net.constant(out, into, 3, 3), net.constant(out, 1, 1, 1)
    norm = net.add("ReduceL2", v, net.array(np.array([1, 2, 3])), keepdims=1)
    return net.add("Mul", g, net.add("Div", v, norm))


@settings(deadline=None, max_examples=30)
@given(out=st.integers(1, 4), into=st.integers(1, 3), seed=st.integers(0, 99))
def test_weight_normalization(out: int, into: int, seed: int) -> None:
    """A convolution by weights that are computed can be quantized once they are constants."""
    net = Net(("batch", into, 6, 5), seed)
    net.add("Conv", "x", weight_norm(net, out, into))
    raw = net.raw()
    assert not quantize.quantizable(graph.read(raw))
    got, count = check(raw, "fold")
    assert (count, ops(got)) == (3, ["Conv"])
    assert len(quantize.quantizable(graph.read(got))) == 1
    assert [list(t.dims) for t in onnx.ModelProto.FromString(got).graph.initializer] == [[out, into, 3, 3]]


def test_other_weights_are_the_same_structure() -> None:
    """Also where an operand is 0 or 1 in one of them: an engine is refitted."""
    folded = []
    for seed, factor in ((0, 1.0), (1, 0.0)):
        net = Net(("batch", 2, 5, 5), seed)
        weight = net.add("Mul", weight_norm(net, 2, 2), net.array(np.float32([factor])))
        net.add("Add", net.add("Conv", "x", weight), net.array(np.float32([factor])))
        folded.append(applied(net.raw(), "fold")[0])
    assert folded[0] != folded[1]
    assert fingerprint.digest(folded[0]) == fingerprint.digest(folded[1])


AXES = np.array([0])
#: Inputs besides a constant of (2, 3), and attributes, of operators that need any.
OPERANDS = {
    "Cast": ([], {"to": TensorProto.FLOAT}),
    "Concat": ([np.float32([[1, 2, 3]])], {"axis": 0}),
    "Expand": ([np.array([4, 2, 3])], {}),
    "MatMul": ([np.float32([[1], [2], [3]])], {}),
    **{name: ([AXES], {}) for name in ("ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Unsqueeze")},
    "Reshape": ([np.array([3, -1])], {}),
    **{name: ([np.float32([0.5, 1.5, -2.0])], {}) for name in ("Add", "Div", "Mul", "Sub")},
    "Pow": ([np.float32([2.0])], {}),
    "Transpose": ([], {"perm": [1, 0]}),
}


@pytest.mark.parametrize(
    "op", [*OPERANDS, "Abs", "Exp", "Identity", "Neg", "Reciprocal", "Softplus", "Sqrt", "Squeeze"]
)
def test_every_operator_keeps_type_and_shape(op: str) -> None:
    net = Net(("batch", 4, 3, 3))
    shape = (1, 2, 3) if op == "Squeeze" else (2, 3)
    operands, attributes = OPERANDS.get(op, ([], {}))
    net.add(
        op,
        net.array(np.linspace(0.5, 1.5, 6, dtype=np.float32).reshape(shape)),
        *map(net.array, operands),
        **attributes,
    )
    net.add("Max", "x", net.add("ReduceMax", keepdims=0))
    got, count = check(net.raw(), "fold", exact=EXACT if op != "Softplus" else 1e-6)
    assert count == 1
    assert ops(got) == ["ReduceMax", "Max"]


@pytest.mark.parametrize(("side", "folded"), [(100, True), (200, False)])
def test_constants_do_not_grow_beyond_64_kib(side: int, folded: bool) -> None:
    net = Net(("batch", 1))
    net.add("Expand", net.constant(1), net.array(np.array([side, side])))
    net.add("Add", "x", net.add("ReduceMax", net.value, keepdims=0))
    got, count = applied(net.raw(), "fold")
    assert count == {"fold": int(folded)}
    assert ("Expand" in ops(got)) != folded


def test_large_weights_are_folded() -> None:
    net = Net(("batch", 200))
    net.add("MatMul", "x", net.add("Transpose", net.constant(300, 200), perm=[1, 0]))
    got, count = check(net.raw(), "fold")
    assert (count, ops(got)) == (1, ["MatMul"])


def test_what_stays() -> None:
    """Values that vary, outputs, constants that a caller may replace, random numbers, integers, and unknown shapes."""
    net = Net(("batch", 3))
    fixed = net.constant(3)
    output = net.add("Neg", fixed)
    replaced = net.constant(3)
    net.inputs.append(helper.make_tensor_value_info(replaced, TensorProto.FLOAT, [3]))
    net.add("Add", net.add("Neg", replaced), "x")
    net.add("Add", net.value, net.add("RandomNormalLike", fixed))
    net.add("Add", net.value, net.add("Cast", net.add("Cast", fixed, to=TensorProto.INT32), to=TensorProto.FLOAT))
    raw = net.raw(net.value, output)
    assert applied(raw, "fold") == (rewritten(raw), {"fold": 0})
    net = Net(("batch", 3))
    net.add("Add", "x", net.add("Neg", net.constant(3)))
    proto = onnx.ModelProto.FromString(net.raw())
    del proto.graph.value_info[:]
    assert fold.apply(graph.read(proto.SerializeToString())) == 0


def test_a_branch_sees_a_folded_constant() -> None:
    net = Net(("batch", 3))
    weight = net.add("Neg", net.constant(3))
    branches = [
        helper.make_graph(
            [helper.make_node(op, ["x", weight], [op])], op, [],
            [helper.make_tensor_value_info(op, TensorProto.FLOAT, None)],
        )
        for op in ("Mul", "Add")
    ]  # fmt: skip
    net.inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    net.add("If", "flag", then_branch=branches[0], else_branch=branches[1])
    got, count = applied(net.raw(), "fold")
    assert (count, ops(got)) == ({"fold": 1}, ["If"])
    onnx.checker.check_model(onnx.ModelProto.FromString(got), full_check=True)
    (constant,) = onnx.ModelProto.FromString(got).graph.initializer
    assert np.array_equal(numpy_helper.to_array(constant), -net.weights["c0"])
