"""Graphs in half precision: which nodes are, types, and results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import pytest
import zoo
from fusions import (
    CLOSE,
    FUSIONS,
    Arrays,
    check_ends,
    check_needed,
    close,
    fused_bytes,
    graphs_of,
    inputs,
    lowered,
    model_of,
    run,
    shapes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from vae_export import graph
from vae_export.certification.tolerances import TOLERANCES
from vae_export.contract.model import GRAPHS
from vae_export.errors import InputError

#: The same of a graph in lower precision: some twenty roundings to 10 and to 7 bits.
LOW = {"fp16": 1e-2, "bf16": 1e-1}
#: Where the arithmetic is.
HEAVY = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
#: What sums many values or has a wide range, as far as the zoo and the chains below have it.
SENSITIVE = {
    *("InstanceNormalization", "GroupNormalization", "LayerNormalization", "Softmax", "Exp", "Log", "Softplus"),
    *("Pow", "Sqrt", "Div", "Reciprocal", "Erf", "ReduceMean", "ReduceSum"),
}
KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def types_of(proto: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value, as ONNX infers it from inputs, weights and operators alone."""
    bare = onnx.ModelProto.FromString(proto.SerializeToString())
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True).graph
    found = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        found[value.name] = value.type.tensor_type.elem_type
    return found


def check_types(proto: onnx.ModelProto, low: int) -> int:
    """Products take the lower type, what loses by it float32, and what is said of a value is true. How many products
    there are.
    """
    types = types_of(proto)
    for value in proto.graph.value_info:
        assert types[value.name] == value.type.tensor_type.elem_type, value.name
    heavy = 0
    for node in proto.graph.node:
        floating = {types[name] for name in node.input if name} & {TensorProto.FLOAT, low}
        if node.op_type in HEAVY:
            assert floating == {low}, node.name
            heavy += 1
        elif node.op_type in SENSITIVE:
            assert low not in floating, node.name
    return heavy


def emulate(raw: bytes) -> bytes:
    """A graph in bfloat16 as one in float32 that rounds every value which would be bfloat16: ONNX Runtime has no
    bfloat16 on the CPU.
    """
    model = graph.read(raw)
    low, full = onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT
    for name, value in model.graph.initializers.items():
        if value.dtype == low:
            assert value.const_value is not None
            value.const_value = onnx_ir.tensor(value.const_value.numpy().astype(np.float32), name=name)
            value.type = onnx_ir.TensorType(full)
    for node in list(model.graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() == low:
            node.attributes["to"] = onnx_ir.AttrInt64("to", full)
        for value in node.outputs:
            if value.dtype != low:
                continue
            value.dtype = full
            uses = list(value.uses())
            rounded = onnx_ir.node("Cast", [value], {"to": low}, name=f"{value.name}.round")
            back = onnx_ir.node("Cast", rounded.outputs, {"to": full}, name=f"{value.name}.back")
            for cast, dtype in ((rounded, low), (back, full)):
                cast.outputs[0].name, cast.outputs[0].type = f"{cast.name}.value", onnx_ir.TensorType(dtype)
            model.graph.insert_after(node, [rounded, back])
            for use in uses:
                use.node.replace_input_with(use.idx, back.outputs[0])
    return graph.write(model)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", zoo.MEMBERS)
def test_lower_precision(member: Any, name: str, precision: str) -> None:
    """Types, ends, and results of the encoder, the decoder and what is fused of them."""
    model, parts = graphs_of(member, name)
    parts |= {fusion: fused_bytes(fusion, parts, model) for member, fusion in FUSIONS if member == name}
    low = {part: lowered(parts[part], precision, part) for part in GRAPHS}
    low |= {fusion: fused_bytes(fusion, low, model) for fusion in parts if fusion not in GRAPHS}
    tolerance = TOLERANCES[{"fp16": "float16", "bf16": "bfloat16"}[precision]]
    products = 0
    for part, raw in low.items():
        proto = onnx.ModelProto.FromString(raw)
        onnx.checker.check_model(proto, full_check=True)
        check_ends(proto, model, part)
        check_needed(proto)
        products += check_types(proto, KINDS[precision])
        if precision == "bf16":
            assert {entry.domain: entry.version for entry in proto.opset_import}[""] >= 22
        feed = inputs(model, part, 3, shapes(model)[0])
        exact, got = run(parts[part], feed), run(raw if precision == "fp16" else emulate(raw), feed)
        if part == "generate":
            levels = np.abs(got["image"].astype(int) - exact["image"])
            assert got["image"].dtype == np.uint8
            assert levels.max() <= 1 + 255 * tolerance.pixel
            continue
        close(got, exact, LOW[precision])
        assert any((got[output] != value).any() for output, value in exact.items())  # it is lower
    assert products >= 4


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_weights_are_stored_once(member: Any, precision: str) -> None:
    for part in GRAPHS:
        raw = graphs_of(member, "mlp-bernoulli")[1][part]

        def weights(content: bytes) -> int:
            tensors = onnx.ModelProto.FromString(content).graph.initializer
            return sum(numpy_helper.to_array(t).nbytes for t in tensors if t.data_type != TensorProto.INT64)

        low = lowered(raw, precision)
        # What is left in float32 are a few numbers behind the last product, such as a clamp's ends.
        assert weights(raw) / 2 <= weights(low) <= weights(raw) / 2 + 16
        assert len(low) < 0.8 * len(raw)


def test_a_weight_that_two_products_share_is_stored_once() -> None:
    nodes = [helper.make_node("MatMul", [a, "w"], [b], f"make_{b}") for a, b in (("x", "h"), ("h", "y"))]
    raw = model_of(nodes, [("x", ["batch", 64])], [("y", ["batch", 64])], {"w": np.eye(64, dtype=np.float32)})
    low = onnx.ModelProto.FromString(lowered(raw, "fp16"))
    assert [(tensor.data_type, list(tensor.dims)) for tensor in low.graph.initializer] == [
        (TensorProto.FLOAT16, [64, 64])
    ]
    x = zoo.pictures(2, (64,))
    close(run(low.SerializeToString(), {"x": x}), {"y": x}, LOW["fp16"])


def product(weight: float, bias: float = 0.0) -> bytes:
    """X · weight + bias, of one number each, by a MatMul and an Add behind it."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "product"),
        helper.make_node("Add", ["h", "b"], ["y"], "sum"),
    ]
    weights = {"w": np.array([[weight]], np.float32), "b": np.array([bias], np.float32)}
    return model_of(nodes, [("x", ["batch", 1])], [("y", ["batch", 1])], weights)


@pytest.mark.parametrize("weight", [1e5, -1e5, 65520.0, 3e38])
def test_a_weight_beyond_float16(weight: float) -> None:
    message = (
        rf"build: the encoder: the weight w has values up to {abs(weight):.3g}; float16 ends at 65504\. Build with"
    )
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        lowered(product(weight), "fp16", "the encoder")
    assert run(emulate(lowered(product(weight), "bf16")), {"x": np.ones((1, 1), np.float32)})["y"] == np.float32(
        ml_dtypes.bfloat16(weight)
    )


@pytest.mark.parametrize("weight", [65504.0, -65519.0])
def test_a_weight_that_float16_has(weight: float) -> None:
    y = run(lowered(product(weight), "fp16"), {"x": np.full((1, 1), 0.5, np.float32)})["y"]
    assert y == math.copysign(32752.0, weight)


def test_what_comes_after_the_last_product_may_be_large() -> None:
    assert run(lowered(product(2.0, bias=1e6), "fp16"), {"x": np.ones((1, 1), np.float32)})["y"] == 1000002.0


def test_a_weight_beyond_bfloat16_is_not_called_one_beyond_float16() -> None:
    """The largest float32, with which attention is masked, rounds to infinity in bfloat16."""
    with pytest.raises(InputError, match=r"the weight w has values up to 3\.4e\+38; bfloat16 ends at 3\.39e\+38"):
        lowered(product(float(np.finfo(np.float32).max)), "bf16")


def between(*steps: tuple[str, list[str], str, dict[str, Any]], **weights: np.ndarray) -> bytes:
    """Two products, `h` · w before the last and `last` · w after the first, and steps between them."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "first")]
    nodes += [helper.make_node(op, into, [out], f"make_{out}", **attributes) for op, into, out, attributes in steps]
    nodes.append(helper.make_node("MatMul", ["last", "w"], ["y"], "second"))
    weights["w"] = np.eye(4, dtype=np.float32)
    return model_of(nodes, [("x", ["batch", 4])], [("y", ["batch", 4])], weights)


ZERO = np.zeros(1, np.int64)
BRANCHES = {
    f"{branch}_branch": helper.make_graph(
        [helper.make_node(op, ["h"], [f"in_{branch}"], f"{branch}_node")],
        branch,
        [],
        [helper.make_tensor_value_info(f"in_{branch}", TensorProto.FLOAT, ["batch", 4])],
    )
    for branch, op in (("then", "Abs"), ("else", "Neg"))
}
#: Steps whose results have a type that is not their inputs', with what multiplies x in the end.
STEPS: dict[str, tuple[bytes, float]] = {
    "a Cast from a shape": (
        between(
            ("Shape", ["h"], "shape", {"start": 1}),
            ("Cast", ["shape"], "size", {"to": TensorProto.FLOAT}),
            ("Mul", ["h", "size"], "last", {}),
        ),
        4.0,
    ),
    "a Cast that changes nothing": (between(("Cast", ["h"], "last", {"to": TensorProto.FLOAT})), 1.0),
    "a Cast to double and back": (
        between(
            ("Cast", ["h"], "wide", {"to": TensorProto.DOUBLE}), ("Cast", ["wide"], "last", {"to": TensorProto.FLOAT})
        ),
        1.0,
    ),
    "a constant of the shape of a value": (
        between(
            ("Shape", ["h"], "shape", {}),
            ("ConstantOfShape", ["shape"], "twos", {"value": numpy_helper.from_array(np.array([2], np.float32))}),
            ("Mul", ["h", "twos"], "last", {}),
        ),
        2.0,
    ),
    "a Constant": (
        between(
            ("Constant", [], "three", {"value": numpy_helper.from_array(np.array(3, np.float32))}),
            ("Mul", ["h", "three"], "last", {}),
        ),
        3.0,
    ),
    "a mask": (
        between(
            ("Greater", ["h", "zero"], "mask", {}),
            ("Where", ["mask", "h", "zero"], "last", {}),
            zero=np.zeros(1, np.float32),
        ),
        1.0,
    ),
    "an If, whose branches take a value from outside": (
        between(
            ("ReduceMax", ["h"], "largest", {"keepdims": 0}),
            ("Greater", ["largest", "zero"], "positive", {}),
            ("If", ["positive"], "last", BRANCHES),
            zero=np.zeros((), np.float32),
        ),
        1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(("raw", "factor"), STEPS.values(), ids=STEPS.keys())
def test_steps_with_a_type_of_their_own(raw: bytes, factor: float, precision: str) -> None:
    """Between two products: an attribute, or an inner graph, has its own say on types."""
    x = zoo.pictures(3, (4,))
    close(run(raw, {"x": x}), {"y": factor * x}, CLOSE)
    low = lowered(raw, precision)
    proto = onnx.ModelProto.FromString(low)
    onnx.checker.check_model(proto, full_check=True)
    assert check_types(proto, KINDS[precision]) == 2
    if precision == "fp16":
        close(run(low, {"x": x}), {"y": factor * x}, LOW["fp16"])


def test_a_graph_that_does_not_say_the_types_of_its_values() -> None:
    """What a graph says of its inner values is optional in ONNX."""
    nodes = [helper.make_node(op, [a, "w"], [b], f"make_{b}") for op, a, b in STEPWISE]
    ends = [("x", ["batch", 4])], [("y", ["batch", 4])]
    raw, bare = (model_of(nodes, *ends, {"w": np.eye(4, dtype=np.float32)}, values) for values in (None, ()))
    x = zoo.pictures(4, (4,))
    close(run(lowered(bare, "fp16"), {"x": x}), run(lowered(raw, "fp16"), {"x": x}), CLOSE)


STEPWISE = [("MatMul", "x", "a"), ("Add", "a", "b"), ("MatMul", "b", "c"), ("Add", "c", "y")]


class Chain:
    """A graph that grows at its end: an image (batch, C, H, W), which may become a vector and an image again."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: Arrays = {}
        self.shape: tuple[int, ...] = (2, 4, 4)
        self.last = "x"
        self.ends: list[tuple[str, tuple[int, ...]]] = []  # what the steps end with

    def add(self, op: str, *others: str, **attributes: Any) -> str:
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.last, *others], [out], f"make_{out}", **attributes))
        self.last = out
        return out

    def weight(self, *shape: int, scale: float = 1.0) -> str:
        name = f"w{len(self.weights)}"
        values = np.sin(12.9898 * np.arange(math.prod(shape)) + len(self.weights))
        self.weights[name] = (scale * values).astype(np.float32).reshape(shape)
        return name

    def constant(self, *values: float, dtype: type = np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.array(values, dtype)
        return name

    def constant_scalar(self, value: float) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.array(value, np.float32)
        return name

    def grow(self, step: str) -> None:
        """Add a step; one that the shape does not allow adds nothing."""
        if len(self.shape) == 3 and step in _IMAGE:
            _IMAGE[step](self, *self.shape)
        elif len(self.shape) == 1 and step in _VECTOR:
            _VECTOR[step](self, *self.shape)
        elif step in _BOTH:
            _BOTH[step](self)
        if self.last != "x":
            self.ends.append((self.last, self.shape))

    def finish(self, tap: int) -> bytes:
        """The bytes, with outputs `y`, the last value, and `tap`, one on the way."""
        ends = {"tap": self.ends[tap % len(self.ends)], "y": self.ends[-1]}
        self.nodes += [helper.make_node("Identity", [v], [name], f"make_{name}") for name, (v, _) in ends.items()]
        out = [(name, ["batch", *shape]) for name, (_, shape) in ends.items()]
        return model_of(self.nodes, [("x", ["batch", 2, 4, 4])], out, self.weights)


def _conv(chain: Chain, c: int, h: int, w: int) -> None:
    chain.add("Conv", chain.weight(3, c, 3, 3, scale=(4 / (9 * c)) ** 0.5), chain.weight(3), pads=[1, 1, 1, 1])
    chain.shape = (3, h, w)


def _transposed(chain: Chain, c: int, h: int, w: int) -> None:
    if h < 8:
        chain.add("ConvTranspose", chain.weight(c, 2, 2, 2, scale=(2 / c) ** 0.5), strides=[2, 2])
        chain.shape = (2, 2 * h, 2 * w)


def _resize(chain: Chain, c: int, h: int, w: int) -> None:
    if h < 8:
        chain.add("Resize", "", chain.constant(1, 1, 2, 2), mode="nearest")
        chain.shape = (c, 2 * h, 2 * w)


def _resize_to(chain: Chain, c: int, h: int, w: int) -> None:
    """To sizes that are taken from the value itself."""
    value = chain.last
    chain.add("Shape")
    chain.last, sizes = value, chain.last
    chain.add("Resize", "", "", sizes, mode="linear")


def _flatten(chain: Chain, c: int, h: int, w: int) -> None:
    chain.add("Reshape", chain.constant(0, -1, dtype=np.int64))
    chain.shape = (c * h * w,)


def _to_image(chain: Chain, size: int) -> None:
    if size % 16 == 0:
        chain.add("Reshape", chain.constant(-1, size // 16, 4, 4, dtype=np.int64))
        chain.shape = (size // 16, 4, 4)


def _product(op: str) -> Callable[[Chain, int], None]:
    def add(chain: Chain, size: int) -> None:
        bias = [chain.weight(16)] if op == "Gemm" else []
        chain.add(op, chain.weight(size, 16, scale=(2 / size) ** 0.5), *bias)
        chain.shape = (16,)

    return add


def _silu(chain: Chain) -> None:
    value = chain.last
    chain.add("Sigmoid")
    chain.add("Mul", value)


def _standardize(chain: Chain) -> None:
    """(v - mean) / sqrt(mean of squares + 1), step by step."""
    value = chain.last
    mean = chain.add("ReduceMean", chain.constant(-1, dtype=np.int64))
    chain.last = value
    centred = chain.add("Sub", mean)
    chain.add("Pow", chain.constant(2.0))
    chain.add("ReduceMean", chain.constant(-1, dtype=np.int64))
    chain.add("Add", chain.constant(1.0))
    root = chain.add("Sqrt")
    chain.last = centred
    chain.add("Div", root)


_IMAGE: dict[str, Callable[[Chain, int, int, int], object]] = {
    "conv": _conv,
    "product": _conv,
    "transposed": _transposed,
    "resize": _resize,
    "resize to": _resize_to,
    "reshape": _flatten,
    "norm": lambda chain, c, h, w: chain.add("InstanceNormalization", chain.weight(c), chain.weight(c)),
    "bias": lambda chain, c, h, w: chain.add("Add", chain.weight(c, 1, 1)),
    "pool": lambda chain, c, h, w: chain.add("MaxPool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
}
_VECTOR: dict[str, Callable[[Chain, int], object]] = {
    "conv": _product("MatMul"),
    "product": _product("Gemm"),
    "reshape": _to_image,
    "norm": lambda chain, size: chain.add("LayerNormalization", chain.weight(size), chain.weight(size)),
    "bias": lambda chain, size: chain.add("Add", chain.weight(size)),
}
_BOTH: dict[str, Callable[[Chain], object]] = {
    "relu": lambda chain: chain.add("Relu"),
    "silu": _silu,
    "softmax": lambda chain: chain.add("Softmax"),
    "softplus": lambda chain: chain.add("Softplus"),
    "twice": lambda chain: chain.add("Add", chain.last),
    "scaled": lambda chain: chain.add("Mul", chain.constant(0.5)),
    "clip": lambda chain: chain.add("Clip", chain.constant_scalar(-2.0), chain.constant_scalar(2.0)),
    "standardize": _standardize,
}


EVERY = sorted({*_IMAGE, *_VECTOR, *_BOTH})


def check_chain(steps: list[str], tap: int, precision: Any) -> None:
    """A graph of these steps in lower precision is valid and computes what it did."""
    chain = Chain()
    for step in steps:
        chain.grow(step)
    if not chain.nodes:
        return
    raw = chain.finish(tap)
    low = lowered(raw, precision)
    proto = onnx.ModelProto.FromString(low)
    onnx.checker.check_model(proto, full_check=True)
    check_needed(proto)
    assert [(v.name, v.type.tensor_type.elem_type) for v in (*proto.graph.input, *proto.graph.output)] == [
        (name, TensorProto.FLOAT) for name in ("x", "tap", "y")
    ]
    heavy = sum(node.op_type in HEAVY for node in onnx.ModelProto.FromString(raw).graph.node)
    assert check_types(proto, KINDS[precision]) == heavy
    x = (zoo.pictures(2, (2, 4, 4)) * 2 - 1).astype(np.float32)
    exact, got = run(raw, {"x": x}), run(low if precision == "fp16" else emulate(low), {"x": x})
    # Twelve steps, of which each may double a value and with it the errors so far.
    close(got, exact, {"fp16": 0.05, "bf16": 0.5}[precision])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("step", EVERY)
def test_every_step_between_two_products(step: str, precision: str) -> None:
    check_chain(["product", step, "product"], 1, precision)  # of images
    check_chain(["reshape", "product", step, "product"], 2, precision)  # of vectors


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(EVERY), min_size=1, max_size=12),
    st.integers(0, 50),
    st.sampled_from(["fp16", "bf16"]),
)
def test_any_chain_in_lower_precision(steps: list[str], tap: int, precision: str) -> None:
    check_chain(steps, tap, precision)
