"""Other forms of the same arithmetic, against the graph before them: upsampling, phases, and both."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from vae_export import graph
from vae_export.graph.rewrites import phases, upsampling, winograd

UINTS = st.integers(0, 3)


def _run(content: bytes, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


def _model(nodes: list[Any], channels: int, rank: int, weights: dict[str, np.ndarray]) -> bytes:
    dims = ["n", channels, *"hw"[:rank]]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * (2 + rank))],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    raw: bytes = model.SerializeToString()
    return raw


def _values(*shape: int) -> np.ndarray:
    """Small whole numbers: sums of their products are exact in float32, in every order."""
    steps = np.arange(math.prod(shape), dtype=np.int64)
    return ((steps * 7919 + 13) % 11 - 5).reshape(shape).astype(np.float32)


def _upsampled(scales: tuple[int, ...], kernel: tuple[int, ...], pads: list[int], groups: int, **changed: Any) -> bytes:
    """Upsampling, and a convolution of 4 channels to 6."""
    rank = len(scales)
    resize = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    resize |= changed.get("resize", {})
    conv = {"pads": pads, "group": groups} | changed.get("conv", {})
    weights = {"w": _values(6, 4 // groups, *kernel), "s": np.array([1, 1, *changed.get("given", scales)], np.float32)}
    names = ["u", "w"]
    if changed.get("bias", True):
        weights["b"] = _values(6)
        names.append("b")
    nodes = [
        helper.make_node("Resize", ["x", "", "s"], ["u"], **resize),
        helper.make_node("Conv", names, ["y"], **conv),
    ]
    return _model(nodes, 4, rank, weights)


def _transposed(
    strides: tuple[int, ...], kernel: tuple[int, ...], pads: list[int], added: list[int], groups: int, **conv: Any
) -> bytes:
    weights = {"w": _values(4, 6 // groups, *kernel), "b": _values(6)}
    attributes = {"strides": strides, "pads": pads, "output_padding": added, "group": groups} | conv
    return _model([helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], **attributes)], 4, len(strides), weights)


@st.composite
def _shapes(draw: Any) -> tuple[int, tuple[int, ...], tuple[int, ...], list[int], int, tuple[int, ...]]:
    rank = draw(st.integers(1, 2))
    factors = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    kernel = tuple(draw(st.integers(1, 5)) for _ in range(rank))
    pads = [draw(UINTS) for _ in range(2 * rank)]
    sizes = tuple(draw(st.integers(1, 6)) for _ in range(rank))
    return rank, factors, kernel, pads, draw(st.sampled_from([1, 2])), sizes


@settings(deadline=None, max_examples=80)
@given(_shapes(), st.booleans(), st.sampled_from(["asymmetric", "half_pixel"]))
def test_upsampling_is_exact(shape: Any, bias: bool, places: str) -> None:
    _, scales, kernel, pads, groups, sizes = shape
    rank = len(sizes)
    large = [s * n + pads[i] + pads[i + rank] for i, (s, n) in enumerate(zip(scales, sizes, strict=True))]
    assume(all(n >= k for n, k in zip(large, kernel, strict=True)))
    rounding = {"asymmetric": "floor", "half_pixel": "round_prefer_floor"}[places]
    resize = {"coordinate_transformation_mode": places, "nearest_mode": rounding}
    before = _upsampled(scales, kernel, pads, groups, bias=bias, resize=resize)
    x = _values(2, 4, *sizes)
    expected = _run(before, x)
    read = graph.read(before)
    found = upsampling.apply(read)
    reaches = all(pad < k for pad, k in zip(pads, (*kernel, *kernel), strict=True))
    assert found == (max(scales) > 1 and reaches)
    np.testing.assert_array_equal(_run(graph.write(read), x), expected)
    for number, second in ((1, x[:1]), (2, np.concatenate([x, x], axis=2))):
        assert number  # another batch, another size
        np.testing.assert_array_equal(_run(graph.write(read), second), _run(before, second))
    phases.apply(read)
    np.testing.assert_array_equal(_run(graph.write(read), x), expected)
    again = graph.write(read)
    assert upsampling.apply(read) == 0
    assert graph.write(read) == again


@settings(deadline=None, max_examples=80)
@given(_shapes(), st.booleans())
def test_phases_are_exact(shape: Any, added: bool) -> None:
    _, strides, kernel, pads, groups, sizes = shape
    rank = len(sizes)
    more = [int(added and stride > 1) for stride in strides]
    out = [
        (n - 1) * s + k - pads[i] - pads[i + rank] + more[i]
        for i, (n, s, k) in enumerate(zip(sizes, strides, kernel, strict=True))
    ]
    assume(min(out) >= 1)
    before = _transposed(strides, kernel, pads, more, groups)
    x = _values(2, 4, *sizes)
    read = graph.read(before)
    found = phases.apply(read)
    if max(strides) == 1 or any(k < s for k, s in zip(kernel, strides, strict=True)):
        assert found == 0
    np.testing.assert_array_equal(_run(graph.write(read), x), _run(before, x))
    if found:
        assert "ConvTranspose" not in {node.op_type for node in read.graph}
    assert phases.apply(read) == 0


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_winograd_is_exact(batch: int, height: int, width: int, bias: bool) -> None:
    """Weights are multiples of 4, so that their transforms are whole numbers, too; few channels keep sums exact."""
    weights = {"w": 4 * _values(3, 2, 3, 3)} | ({"b": _values(3)} if bias else {})
    before = _model([helper.make_node("Conv", ["x", *weights], ["y"], pads=[1] * 4)], 2, 2, weights)
    x = _values(batch, 2, height, width)
    read = graph.read(before)
    assert winograd.apply(read, channels=2) == 1
    after = graph.write(read)
    onnx.checker.check_model(onnx.ModelProto.FromString(after), full_check=True)
    assert winograd.apply(read, channels=2) == 0
    assert graph.write(read) == after
    np.testing.assert_array_equal(_run(after, x), _run(before, x))


@pytest.mark.parametrize(
    ("changed", "channels"),
    [
        ({"strides": [2, 2]}, 4),
        ({"dilations": [2, 2], "pads": [2] * 4}, 4),
        ({"pads": [0, 1, 1, 1]}, 4),
        ({"group": 2}, 4),
        ({}, winograd.CHANNELS - 1),
    ],
)
def test_what_winograd_leaves(changed: dict[str, Any], channels: int) -> None:
    weights = {"w": _values(channels, channels // changed.get("group", 1), 3, 3)}
    attributes = {"pads": [1] * 4, **changed}
    before = _model([helper.make_node("Conv", ["x", "w"], ["y"], **attributes)], channels, 2, weights)
    read = graph.read(before)
    assert winograd.apply(read, channels=2 if changed else winograd.CHANNELS) == 0
    assert graph.write(read) == graph.write(graph.read(before))


def test_winograd_leaves_old_operators() -> None:
    before = _model([helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)], 2, 2, {"w": _values(2, 2, 3, 3)})
    for version, count in ((14, 0), (15, 1)):
        proto = onnx.ModelProto.FromString(before)
        proto.opset_import[0].version = version
        assert winograd.apply(graph.read(proto.SerializeToString()), channels=2) == count


def test_winograd_multiplies_less() -> None:
    """As many channels as it is for: 4 in place of 9 for each pixel, and about as exact as the convolution."""
    channels = winograd.CHANNELS
    rng = np.random.default_rng(0)
    w = rng.standard_normal((channels, channels, 3, 3), np.float32) / math.sqrt(9 * channels)
    before = _model([helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)], channels, 2, {"w": w})
    read = graph.read(before)
    assert winograd.apply(read) == 1
    kernels = [n.inputs[1].shape.numpy() for n in read.graph if n.op_type == "Conv"]
    assert kernels.count((channels, channels, 1, 1)) == kernels.count((channels, 1, 4, 4)) == 16
    x = rng.standard_normal((1, channels, 12, 9), np.float32)
    expected = _run(before, x)
    assert np.abs(_run(graph.write(read), x) - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"resize": {"mode": "linear"}}, "not repeated"),
        ({"resize": {"nearest_mode": "ceil"}}, "shifted"),
        ({"resize": {"coordinate_transformation_mode": "align_corners"}}, "stretched"),
        ({"given": (1.5, 2.0)}, "no whole factor"),
        ({"conv": {"strides": [2, 2]}}, "strided"),
        ({"conv": {"dilations": [2, 2]}}, "dilated"),
        ({"conv": {"auto_pad": "SAME_UPPER", "pads": None}}, "padding that follows the size"),
        ({"conv": {"pads": [3, 3, 3, 3]}}, "zeros beyond the kernel"),
    ],
)
def test_what_upsampling_leaves(changed: dict[str, Any], why: str) -> None:
    conv = {name: value for name, value in changed.get("conv", {}).items() if value is not None}
    if "auto_pad" in conv:
        weights = {"w": _values(6, 4, 3, 3), "s": np.array([1, 1, 2, 2], np.float32)}
        nodes = [
            helper.make_node("Resize", ["x", "", "s"], ["u"], mode="nearest", nearest_mode="floor",
                             coordinate_transformation_mode="asymmetric"),
            helper.make_node("Conv", ["u", "w"], ["y"], **conv),
        ]  # fmt: skip
        before = _model(nodes, 4, 2, weights)
    else:
        before = _upsampled((2, 2), (3, 3), [1, 1, 1, 1], 1, **{**changed, "conv": conv})
    read = graph.read(before)
    assert upsampling.apply(read) == 0, why
    assert graph.write(read) == graph.write(graph.read(before))


def test_an_image_that_others_use_stays() -> None:
    weights = {"w": _values(4, 4, 3, 3), "s": np.array([1, 1, 2, 2], np.float32)}
    resize = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    nodes = [
        helper.make_node("Resize", ["x", "", "s"], ["u"], **resize),
        helper.make_node("Conv", ["u", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["u", "w"], ["d"], pads=[1, 1, 1, 1]),
        helper.make_node("Sum", ["c", "d", "u"], ["y"]),
    ]
    before = _model(nodes, 4, 2, weights)
    read = graph.read(before)
    assert upsampling.apply(read) == 2
    kinds = [node.op_type for node in read.graph]
    assert (kinds.count("Resize"), kinds.count("ConvTranspose")) == (1, 2)
    x = _values(2, 4, 3, 5)
    np.testing.assert_array_equal(_run(graph.write(read), x), _run(before, x))


def test_multiplications_are_fewer() -> None:
    """9 for each output become 4, with the kernels' sums made in float64."""
    read = graph.read(_upsampled((2, 2), (3, 3), [1, 1, 1, 1], 1))
    upsampling.apply(read)
    (node,) = (node for node in read.graph if node.op_type == "ConvTranspose")
    kernel = node.inputs[1].shape
    assert isinstance(kernel, onnx_ir.Shape)
    assert kernel.numpy() == (4, 6, 4, 4)
    phases.apply(read)
    kernels = [n.inputs[1].shape.numpy() for n in read.graph if n.op_type == "Conv"]
    assert kernels == [(6, 4, 2, 2)] * 4
    weights = np.linspace(-1, 1, 9).reshape(1, 1, 3, 3)
    merged = upsampling.merge(weights, (2, 2))
    assert merged.dtype == np.float64
    np.testing.assert_allclose(merged.sum(), 4 * weights.sum(), atol=1e-12)
