"""Group normalizations: both forms that graphs have are found, and rewritten ones compute the same, or better."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import ROUNDED, Net, applied, check, close, doubled, evaluated, feeds, ops, ran

from vae_export import graph
from vae_export.graph import exact_norm, group_norm

pytestmark = pytest.mark.quick


def add_norm(net: Net, groups: int, channels: int, rank: int, affine: bool = True, back: str = "shape") -> None:
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


@settings(deadline=None, max_examples=60)
@given(
    groups=st.integers(1, 3), each=st.integers(1, 3), rank=st.integers(3, 4), affine=st.booleans(),
    back=st.sampled_from(["shape", "constant"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_group_normalization(groups: int, each: int, rank: int, affine: bool, back: str, seed: int) -> None:
    channels = groups * each
    sizes = ["height", "width"] if back == "shape" else [3, 5]
    net = Net(("batch", channels, *sizes[: rank - 2]), seed)
    net.value = net.add("Relu", "x")
    add_norm(net, groups, channels, rank, affine, back)
    raw = net.raw()
    got, count = check(raw, "channel_norm", height=4, width=3)
    assert count == 1
    assert not {"Reshape", "InstanceNormalization"} & set(ops(got))
    feed = feeds(raw, np.float32, height=4, width=3)
    close(ran(got, feed), ran(raw, feed), ROUNDED)


@pytest.mark.parametrize(("groups", "channels", "rank"), [(2, 4, 4), (1, 3, 3), (3, 3, 4)])
def test_the_exact_form_is_found_again(groups: int, channels: int, rank: int) -> None:
    """The exported form is the same function, and is rewritten like PyTorch's form."""
    net = Net(("batch", channels, "height", "width")[:rank])
    net.value = net.add("Relu", "x")
    add_norm(net, groups, channels, rank)
    raw = net.raw()
    model = graph.read(raw)
    assert exact_norm.apply(model) == 1
    assert exact_norm.apply(model) == 0
    exact = graph.write(model)
    assert "InstanceNormalization" not in ops(exact)
    feed = feeds(raw, np.float32, height=4, width=3)
    close(ran(exact, feed), ran(raw, feed), ROUNDED)
    proto = onnx.shape_inference.infer_shapes(onnx.ModelProto.FromString(exact))
    (norm,) = group_norm.find(graph.read(proto.SerializeToString()).graph)
    assert (norm.groups, norm.data.name, norm.last.op_type) == (groups, "v0", "Add")
    assert len(norm.nodes) == len(ops(exact)) - 1  # all but the Relu
    got, count = check(proto.SerializeToString(), "channel_norm", height=4, width=3)
    assert count == (groups < channels)
    assert "Reshape" not in ops(got)


def test_nearly_constant_pictures_keep_their_variance() -> None:
    """PyTorch's form loses it in ONNX Runtime's long sums; ours is off by what the input's own rounding explains."""
    net = Net((1, 8, 64, 64))
    add_norm(net, 2, 8, 4)
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
    add_norm(net, 2, 4, 4)
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
    assert check(raw, "channel_norm")[1] == 0
    assert exact_norm.apply(graph.read(raw)) == 0
