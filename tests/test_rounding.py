"""Simulated half precision on ONNX Runtime's CPU gives the bits of NumPy's float16 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_passes import Net, ran

from vae_export import graph
from vae_export.graph import half_rounding
from vae_export.graph.half import to_half

pytestmark = pytest.mark.quick

KINDS = {"fp16": (TensorProto.FLOAT16, np.dtype(np.float16)), "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16)}


def in_half(kind: str, nodes: list[onnx.NodeProto], result: str, **inputs: tuple[int | str, ...]) -> bytes:
    """A graph that casts float32 to half precision, computes in it, and returns float32."""
    low, _ = KINDS[kind]
    float32 = TensorProto.FLOAT
    casts = [helper.make_node("Cast", [name], [f"{name}.low"], to=low) for name in inputs]
    ends = [helper.make_tensor_value_info(name, float32, shape) for name, shape in inputs.items()]
    last = helper.make_node("Cast", [result], ["out"], to=float32)
    out = helper.make_tensor_value_info("out", float32, None)
    made = helper.make_graph([*casts, *nodes, last], "half", ends, [out])
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True).SerializeToString()


def evaluated(raw: bytes, **feed: np.ndarray) -> np.ndarray:
    """The results of the graph in simulated half precision."""
    model = graph.read(raw)
    assert half_rounding.apply(model) > 0
    raw = graph.write(model)
    onnx.checker.check_model(onnx.ModelProto.FromString(raw), full_check=True)
    (found,) = ran(raw, feed)
    return found


def wide(seed: int, count: int, low: float, high: float) -> np.ndarray:
    """Numbers of both signs and many magnitudes, from subnormal ones to those beyond float16; zeros and halves, too."""
    rng = np.random.default_rng(seed)
    values = np.sign(rng.standard_normal(count)) * np.exp(rng.uniform(low, high, count))
    values[: count // 4] = rng.integers(-2048, 2048, count // 4) / 2.0
    values[:3] = 0.0, -0.0, 65519.99
    return rng.permutation(values).astype(np.float32)


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Bitwise, except for the sign of zero."""
    np.testing.assert_array_equal(got, expected.astype(np.float32), strict=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("operator", "exact"),
    [
        ("Add", np.add),
        ("Sub", np.subtract),
        ("Mul", np.multiply),
        ("Div", np.divide),
        ("Max", np.maximum),
        ("Sqrt", np.sqrt),
        ("Neg", np.negative),
        ("Relu", lambda x: np.where(np.isnan(x) | (x > 0), x, np.zeros_like(x))),
        ("Reciprocal", lambda x: np.ones_like(x) / x),
    ],
)
def test_each_operator_rounds_as_numpy_does(kind: str, operator: str, exact: Callable[..., Any]) -> None:
    _, dtype = KINDS[kind]
    taken = ["x.low", "y.low"][: exact.nin if isinstance(exact, np.ufunc) else 1]
    x, y = wide(0, 40_000, -18.0, 11.5), wide(1, 40_000, -18.0, 11.5)
    feed = {"x": x, "y": y} if len(taken) == 2 else {"x": x}
    raw = in_half(kind, [helper.make_node(operator, taken, ["r"])], "r", **dict.fromkeys(feed, ("n",)))
    with np.errstate(all="ignore"):
        expected = exact(*(value.astype(dtype) for value in feed.values()))
    same(evaluated(raw, **feed), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_of_a_chain_rounds(kind: str) -> None:
    """A runtime that fuses nodes, or leaves out pairs of casts, gives other bits."""
    _, dtype = KINDS[kind]
    nodes = [
        helper.make_node("Mul", ["x.low", "y.low"], ["a"]),
        helper.make_node("Add", ["a", "x.low"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Concat", ["c", "y.low"], ["d"], axis=0),
        helper.make_node("Mul", ["d", "d"], ["e"]),
        helper.make_node("Sub", ["e", "d"], ["f"]),
    ]
    x, y = wide(2, 20_000, -9.0, 6.0), wide(3, 20_000, -9.0, 6.0)
    with np.errstate(all="ignore"):
        a, b = x.astype(dtype), y.astype(dtype)
        d = np.concatenate([np.maximum(a * b + a, np.zeros_like(a)), b])
        expected = d * d - d
    got = evaluated(in_half(kind, nodes, "f", x=("n",), y=("n",)), x=x, y=y)
    same(got, expected)
    with np.errstate(all="ignore"):
        once = (np.concatenate([np.maximum(x * y + x, 0), y]) ** 2).astype(dtype)
    assert (got != once.astype(np.float32)).mean() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_in_float32_and_their_results_are_rounded(kind: str) -> None:
    """Integers whose sums are exact in float32: only the result is rounded."""
    _, dtype = KINDS[kind]
    rng = np.random.default_rng(4)
    x = rng.integers(-60, 61, (2, 8, 6, 6)).astype(np.float32)
    kernel = rng.integers(-30, 31, (4, 8, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Constant", [], ["w.32"], value=numpy_helper.from_array(kernel)),
        helper.make_node("Cast", ["w.32"], ["w"], to=KINDS[kind][0]),
        helper.make_node("Conv", ["x.low", "w"], ["r"]),
    ]
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (3, 3), axis=(2, 3))
    exact = np.einsum("nchwij,ocij->nohw", windows, kernel.astype(np.float64))
    assert 2048 < np.abs(exact).max() < 65504
    same(evaluated(in_half(kind, nodes, "r", x=(2, 8, 6, 6)), x=x), exact.astype(np.float32).astype(dtype))
    for operator, function in (("ReduceSum", np.sum), ("ReduceMean", np.mean)):
        raw = in_half(kind, [helper.make_node(operator, ["x.low"], ["r"], keepdims=0)], "r", x=(2, 8, 6, 6))
        with np.errstate(over="ignore"):
            expected = function(x.astype(np.float64) + 60.0).astype(np.float32).astype(dtype)
        same(evaluated(raw, x=x + np.float32(60.0)), np.asarray(expected))


def test_a_large_sum_overflows() -> None:
    """The sum of linear attention over all positions: in range at 32 × 32, infinite at 256 × 256."""
    node = helper.make_node("MatMul", ["x.low", "y.low"], ["r"])
    raw = in_half("fp16", [node], "r", x=(1, "n"), y=("n", 1))
    for side, expected in ((32, 16384.0), (256, np.inf)):
        x = np.full((1, side * side), 4.0, np.float32)
        feed = {"x": x, "y": x.T.copy()}
        assert evaluated(raw, **feed) == [[expected]]
        assert np.isfinite(ran(raw, {"x": x[:, :1024], "y": feed["y"][:1024]})[0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_lowered_graph(kind: Any) -> None:
    """Weights and results between two products are rounded; nodes that stay in float32 are not."""
    _, dtype = KINDS[kind]
    net = Net(("batch", 8))
    first, second = net.constant(8, 8), net.constant(8, 3)
    net.add("MatMul", "x", first)
    net.add("Relu")
    net.add("Exp")  # stays in float32
    net.add("MatMul", net.value, second)
    net.add("Mul", net.value, net.array(np.float32(1 / 3)))  # behind the last product
    model = to_half(graph.read(net.raw()), kind, "net")
    assert half_rounding.apply(model) >= 3
    raw = graph.write(model)
    assert {t.data_type for t in onnx.ModelProto.FromString(raw).graph.initializer} == {TensorProto.FLOAT}
    x = np.random.default_rng(5).standard_normal((50, 8)).astype(np.float32)

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(dtype).astype(np.float32)

    a = np.maximum(rounded(rounded(x) @ rounded(net.weights[first])), 0)
    expected = rounded(rounded(np.exp(a)) @ rounded(net.weights[second])) * np.float32(1 / 3)
    (got,) = ran(raw, {"x": x})
    # Sums of products in another order may be on the other side of a half.
    assert np.abs(got - expected).max() <= 2 * float(ml_dtypes.finfo(dtype).eps) * np.abs(expected).max()
    assert (got == expected).mean() > 0.8


def test_a_graph_without_halves_stays() -> None:
    net = Net(("batch", 4))
    net.add("Tanh")
    raw = net.raw()
    model = graph.read(raw)
    assert half_rounding.apply(model) == 0
    assert graph.write(model) == graph.write(graph.read(raw))
