"""The passes that make a graph cheaper: each against the graph before it, in float64 and with ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from vae_export import graph
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import GRAPHS
from vae_export.errors import InputError
from vae_export.graph import rewrites
from vae_export.graph.rewrites import PASSES, exact_norm, optimize, select

#: Of two ways through the same arithmetic in float64, as a share of the largest value.
EXACT = 1e-12
#: The same where weights were rounded to float32.
ROUNDED = 1e-5
quick = settings(deadline=None, max_examples=60)


class Net:
    """A graph made step by step, with weights from a seed."""

    def __init__(self, shape: tuple[int | str, ...], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        self.weights: dict[str, np.ndarray] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.value = "x"

    def constant(self, *shape: int) -> str:
        """Numbers that are neither small nor large, of both signs."""
        array = self.rng.uniform(0.5, 1.5, shape) * self.rng.choice([-1.0, 1.0], shape)
        return self.array(array.astype(np.float32))

    def array(self, array: np.ndarray) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = array
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node; without inputs it takes the last value. What it gives becomes the last value."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs or [self.value], [name], name=f"n{name}", **attributes))
        self.value = name
        return name

    def raw(self, *outputs: str, opset: int = 20) -> bytes:
        """The model, with the shapes of its inner values."""
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs or (self.value,)]
        initializers = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        made = helper.make_graph(self.nodes, "net", self.inputs, ends, initializers)
        proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
        onnx.checker.check_model(proto)
        return proto.SerializeToString()


def doubled(raw: bytes) -> bytes:
    """A graph that computes in float64 what another one computes in float32, with the same weights."""
    proto = onnx.ModelProto.FromString(raw)
    _double(proto.graph)
    return proto.SerializeToString()


def _double(inner: onnx.GraphProto) -> None:
    for tensor in inner.initializer:
        _double_tensor(tensor)
    for value in (*inner.input, *inner.output, *inner.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in inner.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _double_tensor(attribute.t)
            if attribute.HasField("g"):
                _double(attribute.g)
            if attribute.name in ("to", "dtype", "stash_type") and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE


def _double_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def feeds(raw: bytes, dtype: type[np.floating[Any]] = np.float64, **sizes: int) -> dict[str, np.ndarray]:
    """A smooth pattern for each input; sizes that vary are 2 if they are not given."""
    made = {}
    for number, value in enumerate(onnx.ModelProto.FromString(raw).graph.input):
        shape = [d.dim_value or sizes.get(d.dim_param, 2) for d in value.type.tensor_type.shape.dim]
        pattern = np.sin(np.arange(np.prod(shape)) * 0.7 + number)
        made[value.name] = pattern.reshape(shape).astype(dtype)
    return made


class ConvTranspose(OpRun):
    """PyTorch's: the reference's own takes groups of one output only."""

    op_domain = ""

    def _run(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, **attributes: Any) -> Any:
        rank = weight.ndim - 2
        function = (torch.nn.functional.conv_transpose1d, torch.nn.functional.conv_transpose2d)[rank - 1]
        values = {name: attributes.get(name) or [1] * rank for name in ("strides", "dilations")}
        whole = function(
            torch.from_numpy(x), torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias),
            stride=values["strides"], groups=attributes["group"], dilation=values["dilations"],
        ).numpy()  # fmt: skip
        pads = attributes.get("pads") or [0] * 2 * rank
        cut = (slice(begin, whole.shape[2 + i] - pads[rank + i]) for i, begin in enumerate(pads[:rank]))
        return (whole[(slice(None), slice(None), *cut)],)


def evaluated(raw: bytes, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, of the reference's own arithmetic
        return ReferenceEvaluator(onnx.ModelProto.FromString(raw), new_ops=[ConvTranspose]).run(None, feed)


def ran(raw: bytes, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"]).run(None, feed)


def close(got: list[np.ndarray], expected: list[np.ndarray], share: float) -> None:
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert np.abs(ours - theirs).max(initial=0.0) <= share * np.abs(theirs).max(initial=1e-30)


def applied(raw: bytes, *names: str) -> tuple[bytes, dict[str, int]]:
    model = graph.read(raw)
    counts = optimize(model, names)
    return graph.write(model), counts


def rewritten(raw: bytes) -> bytes:
    return graph.write(graph.read(raw))


def ops(raw: bytes) -> list[str]:
    return [node.op_type for node in onnx.ModelProto.FromString(raw).graph.node]


def check_structure(before: bytes, after: bytes, counts: dict[str, int], names: tuple[str, ...]) -> None:
    """Signature and types are as they were, a second run finds nothing, and who found nothing changed nothing."""
    old, new = onnx.ModelProto.FromString(before).graph, onnx.ModelProto.FromString(after).graph
    assert list(new.input) == list(old.input)
    assert list(new.output) == list(old.output)
    assert {t.data_type for t in new.initializer} <= {t.data_type for t in old.initializer} | {TensorProto.INT64}
    onnx.checker.check_model(onnx.ModelProto.FromString(after), full_check=True)
    again, second = applied(after, *names)
    assert again == after
    assert not any(second.values())
    if not any(counts.values()):
        assert after == rewritten(before)


def check(raw: bytes, *names: str, exact: float = EXACT, **sizes: int) -> tuple[bytes, int]:
    """Passes change nothing of what is computed: in float64 throughout, and with weights rounded to float32."""
    after, counts = applied(raw, *names)
    check_structure(raw, after, counts, names)
    wide = doubled(raw)
    feed = feeds(raw, **sizes)
    expected = evaluated(wide, feed)
    wide_after, wide_counts = applied(wide, *names)
    assert wide_counts == counts
    close(evaluated(doubled(wide_after), feed), expected, exact)
    close(evaluated(doubled(after), feed), expected, ROUNDED)
    return after, sum(counts.values())


# What is drawn: products, and steps by channel around them.


def spatial(draw: st.DrawFn, net: Net, op: str, group: int, rank: int) -> tuple[str, int, int, dict[str, Any]]:
    """Weights and attributes of a convolution: their name, and the channels of data and result."""
    into, out = (group * draw(st.integers(1, 2)) for _ in range(2))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "group": group,
        "strides": [draw(st.integers(1, 2)) for _ in range(rank)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(rank)],
    }
    padding = draw(st.sampled_from(["none", "pads", "VALID", *(["SAME_UPPER", "SAME_LOWER"] if op == "Conv" else [])]))
    if padding == "pads":
        most = 1 if op == "ConvTranspose" else 2
        attributes["pads"] = [draw(st.integers(0, most if k > 1 else 0)) for k in (*kernel, *kernel)]
    elif padding != "none":
        attributes["auto_pad"] = padding
        if padding.startswith("SAME"):
            attributes["dilations"] = [1] * rank  # the reference pads as if there were none
    shape = (out, into // group) if op == "Conv" else (into, out // group)
    return net.constant(*shape, *kernel), into, out, attributes


@st.composite
def product(draw: st.DrawFn, op: str) -> tuple[Net, list[int], list[int], int, Callable[[Net], None]]:
    """A net before its product, its shape by channel and the result's, their channels, and what adds the product."""
    seed = draw(st.integers(0, 1000))
    bias = draw(st.booleans())
    if op in ("Conv", "ConvTranspose"):
        rank = draw(st.integers(1, 2))
        net = Net((), seed)
        weight, into, out, attributes = spatial(draw, net, op, draw(st.integers(1, 3)), rank)
        sizes = [draw(st.integers(6, 9)) for _ in range(rank)]
        net.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", into, *sizes])]
        biases = [net.constant(out)] if bias else []
        ones = [1] * rank
        return net, [into, *ones], [out, *ones], rank + 2, lambda n: n.add(op, n.value, weight, *biases, **attributes)
    into, out = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if op == "Gemm":
        net = Net(("batch", into), seed)
        across, data_across = draw(st.booleans()), draw(st.booleans())
        if data_across:
            net = Net((into, "batch"), seed)
        weight = net.constant(*((out, into) if across else (into, out)))
        biases = [net.constant(*draw(st.sampled_from([(out,), (1, out), (1,), ()])))] if bias else []
        gemm = {
            "transA": int(data_across),
            "transB": int(across),
            "alpha": draw(st.sampled_from([1.0, -0.5])),
            "beta": 2.0 if bias else 1.0,
        }
        shape = [into, 1] if data_across else [into]
        return net, shape, [out], 2, lambda n: n.add(op, n.value, weight, *biases, **gemm)
    net = Net(("batch", 3, into) if draw(st.booleans()) else ("batch", into), seed)
    weight = net.constant(into, out)
    biases = [net.constant(out)] if bias else []

    def matmul(n: Net) -> None:
        n.add(op, n.value, weight)
        for name in biases:
            n.add("Add", *draw(st.permutations([n.value, name])))

    return net, [into], [out], len(net.inputs[0].type.tensor_type.shape.dim), matmul


STEPS = ("Mul", "Mul first", "Div", "Add", "Add first", "Sub", "Sub first", "Neg")


def add_step(net: Net, step: str, shape: list[int], rank: int, draw: st.DrawFn) -> None:
    op, _, first = step.partition(" ")
    if op == "Neg":
        net.add(op)
        return
    shapes = [(), (1,), tuple(shape), *([(1, *shape)] if len(shape) < rank else [])]
    operand = net.constant(*draw(st.sampled_from(shapes)))
    net.add(op, *((operand, net.value) if first else (net.value, operand)))


PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@pytest.mark.parametrize("op", PRODUCTS)
@quick
@given(data=st.data())
def test_steps_around_a_product(op: str, data: st.DataObject) -> None:
    """They go into its weights; what stays are additions before a product that pads."""
    net, into, out, rank, add_product = data.draw(product(op))
    before, after = (data.draw(st.lists(st.sampled_from(STEPS), max_size=4)) for _ in range(2))
    for step in before:
        add_step(net, step, into, rank, data.draw)
    add_product(net)
    for step in after:
        add_step(net, step, out, rank, data.draw)
    got, count = check(net.raw(), "scaling")
    left = [name for name in ops(got) if name != op]
    if op in ("Gemm", "MatMul"):
        assert left in ([], ["Add"])
    else:
        behind = ops(got)[ops(got).index(op) + 1 :]
        assert not behind
        if not any(step.startswith(("Add", "Sub")) for step in before):
            assert not left
    assert count or not after or op == "MatMul"  # of which an addition is the bias


def _channels(net: Net) -> int:
    """Where batch normalization has them, of the input; 2, which a batch is in the tests, where they vary."""
    return net.inputs[0].type.tensor_type.shape.dim[1].dim_value or 2


def bn(net: Net, channels: int, **attributes: Any) -> None:
    numbers = [net.constant(channels) for _ in range(3)]
    variance = net.array(net.rng.uniform(0.2, 2.0, channels).astype(np.float32))
    net.add("BatchNormalization", net.value, *numbers, variance, **attributes)


@pytest.mark.parametrize("op", PRODUCTS)
@quick
@given(data=st.data())
def test_batch_normalization(op: str, data: st.DataObject) -> None:
    net, _, out, rank, add_product = data.draw(product(op))
    before, after = (data.draw(st.booleans()) for _ in range(2))
    channels_first = op != "MatMul" or rank == 2
    if before:
        bn(net, _channels(net))
    add_product(net)
    if after:
        bn(net, out[0] if channels_first else 3, epsilon=0.01)
    got, count = check(net.raw(), "batch_norm")
    assert count == before + after
    assert "BatchNormalization" not in ops(got)
    if after and channels_first:
        assert ops(got)[-1] in (op, "Add")
        assert ops(got).count("Mul") == before
    check(net.raw(), "batch_norm", "scaling")


@quick
@given(data=st.data())
def test_a_pointwise_convolution_after_another(data: st.DataObject) -> None:
    net, _, out, rank, add_product = data.draw(product("Conv"))
    add_product(net)
    mid, last = out[0], data.draw(st.integers(1, 6))
    biases = [net.constant(last)] if data.draw(st.booleans()) else []
    net.add("Conv", net.value, net.constant(last, mid, *[1] * (rank - 2)), *biases)
    first, second = (numpy_helper.to_array(t) for t in _convolutions(net))
    group = {a.name: a.i for a in net.nodes[0].attribute}["group"]
    dense = last * first.shape[1] * group * first[0, 0].size
    _, count = check(net.raw(), "pointwise")
    assert count == (dense <= first.size + second.size)


def _convolutions(net: Net) -> Iterator[onnx.TensorProto]:
    for node in net.nodes:
        yield numpy_helper.from_array(net.weights[node.input[1]])


def test_pointwise_convolutions_one_after_another() -> None:
    net = Net(("batch", 2, "height", "width"))
    net.add("Conv", "x", net.constant(4, 2, 3, 3), net.constant(4), pads=[0, 1, 2, 1])
    for channels in ((3, 4), (2, 3)):
        net.add("Conv", net.value, net.constant(*channels, 1, 1), net.constant(channels[0]))
    got, count = check(net.raw(), "pointwise", height=7, width=5)
    assert count == 2
    assert ops(got) == ["Conv"]


def group_norm(net: Net, groups: int, channels: int, rank: int, affine: bool = True, back: str = "shape") -> None:
    """As PyTorch's exporter writes it."""
    data = net.value
    grouped = net.add("Reshape", data, net.array(np.array([0, groups, -1])))
    ones, zeros = (net.array(np.full(groups, value, np.float32)) for value in (1.0, 0.0))
    normed = net.add("InstanceNormalization", grouped, ones, zeros, epsilon=1e-3)
    sizes = net.add("Shape", data) if back == "shape" else net.array(np.array([-1, channels, 3, 5][:rank]))
    net.add("Reshape", normed, sizes)
    if affine:
        for op in ("Mul", "Add"):
            net.add(op, net.value, net.constant(channels, *[1] * (rank - 2)))


@quick
@given(
    groups=st.integers(1, 3), each=st.integers(1, 3), rank=st.integers(3, 4), affine=st.booleans(),
    back=st.sampled_from(["shape", "constant"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_group_normalization(groups: int, each: int, rank: int, affine: bool, back: str, seed: int) -> None:
    channels = groups * each
    sizes = ["height", "width"] if back == "shape" else [3, 5]
    net = Net(("batch", channels, *sizes[: rank - 2]), seed)
    net.value = net.add("Relu", "x")
    group_norm(net, groups, channels, rank, affine, back)
    raw = net.raw()
    got, count = check(raw, "group_norm", height=4, width=3)
    assert count == 1
    assert ops(got) == ["Relu", "GroupNormalization"]
    feed = feeds(raw, np.float32, height=4, width=3)
    close(ran(got, feed), ran(raw, feed), ROUNDED)
    got, count = check(raw, "channel_norm", height=4, width=3)
    assert count == 1
    assert not {"Reshape", "InstanceNormalization"} & set(ops(got))
    close(ran(got, feed), ran(raw, feed), ROUNDED)


@pytest.mark.parametrize(("groups", "channels", "rank"), [(2, 4, 4), (1, 3, 3), (3, 3, 4)])
def test_the_exact_form_is_found_again(groups: int, channels: int, rank: int) -> None:
    """The form that is exported is the same function, and the other forms are made of it as of PyTorch's."""
    net = Net(("batch", channels, "height", "width")[:rank])
    net.value = net.add("Relu", "x")
    group_norm(net, groups, channels, rank)
    raw = net.raw()
    model = graph.read(raw)
    assert exact_norm.apply(model) == 1
    assert exact_norm.apply(model) == 0
    exact = graph.write(model)
    assert "InstanceNormalization" not in ops(exact)
    feed = feeds(raw, np.float32, height=4, width=3)
    close(ran(exact, feed), ran(raw, feed), ROUNDED)
    proto = onnx.shape_inference.infer_shapes(onnx.ModelProto.FromString(exact))
    got, count = check(proto.SerializeToString(), "group_norm", height=4, width=3)
    assert (count, ops(got)) == (1, ["Relu", "GroupNormalization"])
    got, count = check(proto.SerializeToString(), "channel_norm", height=4, width=3)
    assert count == (groups < channels)
    assert "Reshape" not in ops(got)


def test_nearly_constant_pictures_keep_their_variance() -> None:
    """PyTorch's form loses it in ONNX Runtime's long sums; ours is off by what the input's own rounding explains."""
    net = Net((1, 8, 64, 64))
    group_norm(net, 2, 8, 4)
    model = graph.read(net.raw())
    exact_norm.apply(model)
    rng = np.random.default_rng(0)
    x = np.broadcast_to(rng.normal(1, 0.01, (1, 8, 1, 1)), (1, 8, 64, 64)).astype(np.float32)
    exact = doubled(net.raw())
    (expected,) = evaluated(exact, {"x": x.astype(np.float64)})
    moved = x * (1 + 2.0**-24 * rng.uniform(-1, 1, x.shape))
    spread = np.abs(evaluated(exact, {"x": moved})[0] - expected).max()
    (got,) = ran(graph.write(model), {"x": x})
    assert np.abs(got - expected).max() <= 8 * spread


def test_channels_far_from_zero_keep_their_variance() -> None:
    """A mean a thousand deviations away is taken away before squares are summed."""
    net = Net((2, 4, 16, 16))
    group_norm(net, 2, 4, 4)
    raw = net.raw()
    feed = {"x": (1000 + feeds(raw)["x"]).astype(np.float32)}
    expected = evaluated(doubled(raw), {"x": feed["x"].astype(np.float64)})
    close(ran(applied(raw, "channel_norm")[0], feed), [array.astype(np.float32) for array in expected], 1e-3)


@pytest.mark.parametrize(
    "other", ["another shape", "part of a shape", "across channels", "groups are used", "old operators"]
)
def test_what_is_no_group_normalization(other: str) -> None:
    net = Net(("batch", 4, 3, 5))
    net.add("Relu")
    data, groups = net.value, 3 if other == "across channels" else 2
    grouped = net.add("Reshape", data, net.array(np.array([0, groups, -1])))
    numbers = [net.array(np.full(groups, value, np.float32)) for value in (1.0, 0.0)]
    normed = net.add("InstanceNormalization", grouped, *numbers)
    sizes = [-1, 4, 5, 3] if other == "another shape" else [-1, 4, 3, 5]
    shape = net.array(np.array(sizes))
    if other == "part of a shape":
        shape = net.add("Concat", net.add("Shape", data, end=2), net.array(np.array([5, 3])), axis=0)
    net.add("Reshape", normed, shape)
    outputs = [net.value, grouped] if other == "groups are used" else [net.value]
    raw = net.raw(*outputs, opset=17 if other == "old operators" else 20)
    assert check(raw, "group_norm")[1] == check(raw, "channel_norm")[1] == 0


def attention(net: Net, projected: bool, where: tuple[bool, bool, bool], div: bool = False) -> None:
    """softmax(q kᵀ) v, heads of two; scaled at q, at k and after their product."""
    parts = []
    source = net.value
    for part in range(3):
        net.value = net.add("MatMul", source, net.constant(4, 4))
        net.add("Add", net.value, net.constant(4))
        if not projected:
            net.add("Tanh")
        net.add("Reshape", net.value, net.array(np.array([0, -1, 2, 2])))
        net.add("Transpose", perm=[0, 2, 3, 1] if part == 1 else [0, 2, 1, 3])
        if part < 2 and where[part]:
            net.add("Div" if div else "Mul", net.value, net.constant(1))
        parts.append(net.value)
    net.add("MatMul", *parts[:2])
    if where[2]:
        net.add("Div" if div else "Mul", net.value, net.constant())
    net.add("MatMul", net.add("Softmax", axis=-1), parts[2])


@pytest.mark.parametrize("div", [False, True])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("where", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_attention(projected: bool, where: tuple[bool, bool, bool], div: bool) -> None:
    net = Net(("batch", "places", 4))
    attention(net, projected, where, div)
    got, count = check(net.raw(), "attention", places=5)
    wanted = sum(where)
    assert count == (wanted if projected else max(wanted - 1, 0))
    assert ops(got).count("Mul") + ops(got).count("Div") == wanted - count


def test_queries_that_somebody_else_uses() -> None:
    """Then the keys take it."""
    net = Net(("batch", 5, 4))
    queries = net.add("MatMul", "x", net.constant(4, 3))
    keys = net.add("MatMul", "x", net.constant(4, 3))
    net.add("MatMul", queries, net.add("Transpose", perm=[0, 2, 1]))
    net.add("Mul", net.value, net.constant(1))
    scores = net.value
    raw = net.raw(scores, queries)
    got, count = check(raw, "attention")
    assert count == 1
    assert "Mul" not in ops(got)
    assert check(net.raw(scores, queries, keys), "attention")[1] == 0


# What must not be folded.


def conv(net: Net, **attributes: Any) -> str:
    return net.add("Conv", net.value, net.constant(2, 2, 3, 3), net.constant(2), **attributes)


def test_a_value_that_the_graph_gives_out_stays() -> None:
    net = Net(("batch", 2, 5, 5))
    mid = conv(net)
    net.add("Mul", mid, net.constant(1))
    assert check(net.raw(net.value, mid), "scaling")[1] == 0


@pytest.mark.parametrize("name", ["scaling", "batch_norm", "pointwise"])
def test_a_value_with_two_users_stays(name: str) -> None:
    net = Net(("batch", 2, 5, 5))
    mid = conv(net)
    if name == "batch_norm":
        bn(net, 2)
    elif name == "pointwise":
        net.add("Conv", mid, net.constant(2, 2, 1, 1))
    else:
        net.add("Mul", mid, net.constant(1))
    net.add("Add", net.value, mid)
    got, count = check(net.raw(), name)
    assert count == (name == "batch_norm")  # which is spelled out
    assert ops(got)[0] == "Conv"
    assert ops(got)[-1] == "Add"
    assert len(ops(got)) > 2


def test_a_value_that_an_inner_graph_uses_stays() -> None:
    net = Net(("batch", 2, 5, 5))
    mid = conv(net)
    branches = [
        helper.make_graph(
            [helper.make_node("Mul", [mid, name], [f"out_{name}"])], name, [],
            [helper.make_tensor_value_info(f"out_{name}", TensorProto.FLOAT, None)],
        )
        for name in (net.constant(1), net.constant(2, 1, 1))
    ]  # fmt: skip
    net.inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    net.add("If", "flag", then_branch=branches[0], else_branch=branches[1])
    raw = net.raw()
    for name in PASSES:
        after, counts = applied(raw, name)
        check_structure(raw, after, counts, (name,))
        feed = feeds(raw, np.float32) | {"flag": np.array(True)}
        close(ran(after, feed), ran(raw, feed), ROUNDED)
    assert applied(raw, "scaling")[1] == {"scaling": 0}


def test_weights_that_two_products_share_are_changed_for_one() -> None:
    net = Net(("batch", 2, 5, 5))
    weight, bias = net.constant(2, 2, 3, 3), net.constant(2)
    plain = net.add("Conv", "x", weight, bias)
    net.add("Conv", "x", weight, bias, pads=[1, 1, 1, 1])
    net.add("Mul", net.value, net.constant(2, 1, 1))
    got, count = check(net.raw(net.value, plain), "scaling")
    assert count == 1
    assert ops(got) == ["Conv", "Conv"]
    assert len(onnx.ModelProto.FromString(got).graph.initializer) == 4


@pytest.mark.parametrize("which", ["weight", "factor"])
def test_a_constant_that_is_an_input_as_well_stays(which: str) -> None:
    net = Net(("batch", 2, 5, 5))
    weight, factor = net.constant(2, 2, 3, 3), net.constant(1)
    net.add("Mul", net.add("Conv", "x", weight), factor)
    name = weight if which == "weight" else factor
    shape = net.weights[name].shape
    net.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    raw = net.raw()
    assert applied(raw, "scaling")[1] == {"scaling": 0}
    assert applied(raw, "scaling")[0] == rewritten(raw)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (2, 1, 1, 1, 1), (3, 1, 1, 1), (2, 5, 5)])
def test_a_constant_that_is_not_by_channel_stays(shape: tuple[int, ...]) -> None:
    net = Net((3 if shape[0] == 3 else 1, 2, 7, 7))
    conv(net)
    net.add("Mul", net.value, net.constant(*shape))
    assert check(net.raw(), "scaling")[1] == 0


def test_a_constant_that_makes_channels_stays() -> None:
    net = Net(("batch", 1, 5, 5))
    net.add("Mul", "x", net.constant(2, 1, 1))
    conv(net)
    assert check(net.raw(), "scaling")[1] == 0


@pytest.mark.parametrize(
    ("before", "left"),
    [(["Add"], ["Add"]), (["Mul", "Add"], ["Mul", "Add"]), (["Add", "Mul"], ["Add"]), (["Mul"], [])],
)
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_what_is_padded_in_is_not_shifted(op: str, before: list[str], left: list[str]) -> None:
    net = Net(("batch", 2, 5, 5))
    for step in before:
        net.add(step, net.value, net.constant(2, 1, 1))
    net.add(op, net.value, net.constant(2, 2, 3, 3), pads=[0, 0, 1, 0])
    assert ops(check(net.raw(), "scaling")[0]) == [*left, op]


@pytest.mark.parametrize("factor", [1e30, 1e-38, 0.0])
def test_what_float32_does_not_have_stays(factor: float) -> None:
    net = Net(("batch", 2, 5, 5))
    net.add("Conv", "x", net.array(np.full((2, 2, 1, 1), factor or 1.0, np.float32)))
    net.add("Div" if factor == 0.0 else "Mul", net.value, net.array(np.float32([factor])))
    raw = net.raw()
    assert applied(raw, "scaling") == (rewritten(raw), {"scaling": 0})


def test_batch_normalization_in_training_stays() -> None:
    net = Net(("batch", 2, 5, 5))
    conv(net)
    bn(net, 2, training_mode=1)
    net.nodes[-1].output.extend(["mean", "variance"])
    raw = net.raw()
    assert applied(raw, "batch_norm") == (rewritten(raw), {"batch_norm": 0})


def test_integers_stay() -> None:
    net = Net(())
    net.inputs = [helper.make_tensor_value_info("x", TensorProto.INT32, ["batch", 3])]
    net.add("Mul", net.add("MatMul", "x", net.array(np.ones((3, 2), np.int32))), net.array(np.int32([2])))
    net.add("Cast", to=TensorProto.FLOAT)
    raw = net.raw()
    assert applied(raw, *PASSES) == (rewritten(raw), dict.fromkeys(PASSES, 0))


def test_the_last_step_keeps_the_outputs_name() -> None:
    net = Net(("batch", 2, 5, 5))
    conv(net)
    net.add("Mul", net.value, net.constant(2, 1, 1))
    net.nodes.append(helper.make_node("Sub", [net.value, net.constant(1)], ["sample"]))
    got, count = check(net.raw("sample"), "scaling")
    assert count == 2
    assert [value.name for value in onnx.ModelProto.FromString(got).graph.output] == ["sample"]


# Folding.


def test_what_does_nothing_goes() -> None:
    net = Net(("batch", 2, 4, 4))
    net.add("Identity")
    net.add("Cast", to=TensorProto.FLOAT)
    net.add("Transpose", perm=[0, 1, 2, 3])
    net.add("Pad", net.value, net.array(np.zeros(8, np.int64)))
    net.add("Slice", net.value, *(net.array(np.array([n])) for n in (0, 2**63 - 1, 2, 1)))
    net.add("Reshape", net.value, net.add("Shape"))
    net.add("Mul", net.value, net.array(np.float32(1.0)))
    net.add("Relu")
    got, count = check(net.raw(), "fold")
    assert count
    assert ops(got) == ["Relu"]


def test_one_that_adds_an_axis_does_something() -> None:
    net = Net(("batch", 3))
    net.add("Mul", "x", net.array(np.ones((1, 1, 1), np.float32)))
    net.add("Relu")
    assert ops(check(net.raw(), "fold")[0])[-1] == "Relu"


def test_a_branch_that_is_always_taken_is_all_that_is_left() -> None:
    net = Net(("batch", 3))
    branches = [
        helper.make_graph(
            [helper.make_node("Mul", ["x", name], [f"out_{name}"])], name, [],
            [helper.make_tensor_value_info(f"out_{name}", TensorProto.FLOAT, None)],
        )
        for name in (net.constant(3), net.constant(3))
    ]  # fmt: skip
    net.add("If", net.array(np.array(True)), then_branch=branches[0], else_branch=branches[1])
    got, _ = check(net.raw(), "fold")
    assert ops(got) == ["Mul"]


def test_constants_are_computed_and_equal_values_are_one() -> None:
    net = Net(("batch", 3))
    half = net.add("Exp", net.constant(3))
    one = net.add("Mul", "x", net.add("Neg", half))
    twins = [net.add("Sigmoid", one) for _ in range(2)]
    net.add("Log", "x")
    net.add("Add", *twins)
    got, _ = check(net.raw(), "fold", exact=ROUNDED)
    assert sorted(ops(got)) == ["Add", "Mul", "Sigmoid"]


def test_padding_becomes_the_convolutions() -> None:
    net = Net(("batch", 2, 5, 6))
    net.add("Pad", "x", net.array(np.array([0, 0, 0, 1, 0, 0, 2, 1])))
    conv(net, strides=[2, 2], pads=[0, 1, 1, 0])
    got, _ = check(net.raw(), "fold")
    assert ops(got) == ["Conv"]


def test_shapes_of_which_only_the_batch_varies_are_constants() -> None:
    net = Net(("batch", 4, 3, 5))
    net.add("Relu")
    group_norm(net, 2, 4, 4)
    got, _ = check(net.raw(), "fold")
    assert "Shape" not in ops(got)
    assert check(got, "group_norm")[1] == 1


@pytest.mark.parametrize("op", ["Expand", "ConstantOfShape"])
@pytest.mark.parametrize(("side", "folded"), [(100, True), (200, False)])
def test_large_constants_are_not_made(op: str, side: int, folded: bool) -> None:
    net = Net(("batch", 1))
    size = net.array(np.array([side, side]))
    net.add(op, *([net.constant(1)] if op == "Expand" else []), size)
    net.add("Add", "x", net.add("ReduceSum", net.value, net.array(np.array([0, 1])), keepdims=1))
    model = graph.read(net.raw())
    optimize(model, ["fold"])
    assert (op not in [node.op_type for node in model.graph]) == folded
    assert len(graph.write(model)) < 2000


def test_outputs_that_are_equal_or_inputs_stay() -> None:
    net = Net(("batch", 3))
    same = [net.add("Tanh", "x") for _ in range(2)]
    through = net.add("Identity", "x")
    again = net.add("Identity", same[0])
    raw = net.raw(*same, through, again)
    check(raw, "fold")


# The zoos.


def parts(bundle: Path) -> Iterator[bytes]:
    opened = Bundle(bundle)
    for part in GRAPHS:
        yield opened.read(opened.manifest.graphs[part].file)


SIZES = {"height": 16, "width": 24} | {f"{n}/{d}": s // d for n, s in (("height", 16), ("width", 24)) for d in (2, 4)}


# One of each kind of block: the other members have the same ones, and an export of each takes a while.
@pytest.mark.parametrize("name", [*zoo.MEMBERS, "kl-sdxl", "kl-flux", "tiny"])
def test_the_zoos(member: Callable[[str], Any], exported: Callable[[str], Any], name: str) -> None:
    """Each pass alone and all together, with ONNX Runtime."""
    bundle = member(name).bundle if name in zoo.MEMBERS else exported(name)[0]
    for raw in parts(bundle):
        feed = feeds(raw, np.float32, **SIZES)
        expected = ran(raw, feed)
        for names in (*((name,) for name in PASSES), tuple(PASSES)):
            after, counts = applied(raw, *names)
            check_structure(raw, after, counts, names)
            if any(counts.values()):
                close(ran(after, feed), expected, ROUNDED)


#: What is known to be in an export: places by pass, of encoder and decoder.
FOUND = {
    "resnet": {"group_norm": (10, 10), "attention": (1, 1)},
    "kl-sd15": {"group_norm": (10, 14), "pointwise": (1, 0), "attention": (2, 2)},
    "tiny": {"scaling": (1, 3)},
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found(member: Callable[[str], Any], exported: Callable[[str], Any], name: str) -> None:
    bundle = member(name).bundle if name in zoo.MEMBERS else exported(name)[0]
    counts = [applied(raw, *PASSES)[1] for raw in parts(bundle)]
    for found, expected in FOUND[name].items():
        assert tuple(count[found] for count in counts) == expected


# The choice.

ALL = tuple(PASSES)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (None, ALL),
        ("all", ALL),
        ("none", ()),
        ("scaling, fold", ("fold", "scaling")),
        ("all,-fold", tuple(name for name in ALL if name != "fold")),
        ("-fold", tuple(name for name in ALL if name != "fold")),
        ("-fold,-scaling,fold", tuple(name for name in ALL if name != "scaling")),
        ("none,attention", ("attention",)),
    ],
)
def test_choices(text: str | None, chosen: tuple[str, ...]) -> None:
    assert select(text) == chosen


@pytest.mark.parametrize(("text", "name"), [("folds", "folds"), ("all,-folds", "folds"), ("", ""), ("fold,", "")])
def test_an_unknown_pass(text: str, name: str) -> None:
    expected = (
        f"graph passes: there is none called '{name}'; expected all, none, or, with commas between and a - before "
        f"those to leave out, some of {', '.join(ALL)}"
    )
    with pytest.raises(InputError) as error:
        select(text)
    assert str(error.value) == expected
    net = Net(("batch", 3))
    net.add("Relu")
    with pytest.raises(InputError, match="there is none called"):
        optimize(graph.read(net.raw()), [name])


def test_every_pass_says_what_it_does() -> None:
    for name, found in rewrites.PASSES.items():
        assert found.name == name
        assert found.summary
