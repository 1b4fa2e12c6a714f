"""Reduced precision: what 8 bits lose, what activations are recorded, and which nodes stay in float32."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net, evaluated, feeds, ran
from onnx import numpy_helper

import vae_export
from vae_export import graph
from vae_export.building import mixed_precision
from vae_export.building.evaluation import Evaluator
from vae_export.building.mixed_precision import Activation, ReducedPrecision
from vae_export.certification.golden import FILE, decode
from vae_export.commands import tables
from vae_export.contract.bundle import Bundle
from vae_export.errors import VerificationError
from vae_export.graph import edit, quantize
from vae_export.graph.half import to_half
from vae_export.numerics.noise import normals
from vae_export.runtimes import processor

# Quantized nodes


def products() -> Net:
    """Every operator that can be quantized, one after the other; the convolutions twice on one activation."""
    net = Net(("batch", 3, 6, 6))
    weights = net.constant(5, 3, 3, 3)
    # Channels of very different sizes, and one that is nothing.
    net.weights[weights] *= np.array([1e-3, 1.0, 50.0, 0.0, 1e-42], np.float32).reshape(-1, 1, 1, 1)
    net.add("Conv", "x", weights, net.constant(5), pads=[1, 1, 1, 1])
    first = net.value
    net.add("Conv", "x", net.constant(5, 3, 3, 3), pads=[1, 1, 1, 1])
    net.add("Add", first, net.value)
    net.add("ConvTranspose", net.value, net.constant(5, 2, 2, 2), net.constant(2), strides=[2, 2])
    net.add("ReduceMean", net.value, net.array(np.array([2], np.int64)), keepdims=0)
    net.add("MatMul", net.value, net.constant(12, 4))
    net.add("Flatten")
    net.add("Gemm", net.value, net.constant(8, 6), net.constant(6))
    net.add("Gemm", net.value, net.constant(7, 6), net.constant(7), transB=1)
    return net


def seen_in(raw: bytes, rows: int = 3) -> dict[str, Activation]:
    return mixed_precision.record_activations(raw, [feeds(raw, np.float32, batch=rows)])


def quantized(raw: bytes, *names: str, bits: quantize.Bits = 8) -> onnx.ModelProto:
    """With these nodes in 8 bits, their weights in so many; all of them without names."""
    model = graph.read(raw)
    wanted = set(names) or {str(node.name) for node in quantize.quantizable(model)}
    quantize.apply(model, wanted, {value: activation.span for value, activation in seen_in(raw).items()}, bits)
    proto = onnx.ModelProto.FromString(graph.write(model))
    onnx.checker.check_model(proto, full_check=True)
    return proto


AXES = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1}


def test_every_product_is_quantized_by_output_channel() -> None:
    raw = products().raw()
    before, after = onnx.ModelProto.FromString(raw), quantized(raw)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    exact = {tensor.name: numpy_helper.to_array(tensor) for tensor in before.graph.initializer}
    makers = {node.output[0]: node for node in after.graph.node}
    heavy = [node for node in before.graph.node if node.op_type in AXES]
    assert len(heavy) == 6
    for old in heavy:
        node = next(node for node in after.graph.node if node.name == old.name)
        taken = makers[node.input[1]]
        assert taken.op_type == "DequantizeLinear"
        steps, scales, zeros = (arrays[name] for name in taken.input)
        axis = AXES[node.op_type]
        if any(a.name == "transB" and a.i for a in node.attribute):
            axis = 0
        assert taken.attribute[0].i == axis
        assert (steps.dtype, scales.dtype, zeros.any()) == (np.int8, np.float32, False)
        assert steps.min() >= -127  # −128 would have no counterpart
        weights = exact[old.input[1]]
        step = scales.astype(np.float64).reshape([-1 if dim == axis else 1 for dim in range(weights.ndim)])
        assert (np.abs(steps * step - weights) <= step * (0.5 + 1e-5)).all()
        activation = makers[node.input[0]]
        assert (activation.op_type, makers[activation.input[0]].op_type) == ("DequantizeLinear", "QuantizeLinear")
        assert list(node.input)[2:] == list(old.input)[2:]  # biases are as they were
    # The two convolutions of the picture share its 256 levels.
    assert sum(node.op_type == "QuantizeLinear" for node in after.graph.node) == len(heavy) - 1


@pytest.mark.parametrize("bits", [7, 8])
def test_what_is_computed_is_near(bits: quantize.Bits) -> None:
    """With weights of 7 bits on every processor."""
    if bits == 8 and "vnni" not in processor.features():
        pytest.skip("without VNNI sums of 8-bit products overflow: no graph of them is made there")
    raw = products().raw()
    feed = feeds(raw, np.float32, batch=3)
    expected = ran(raw, feed)[0]
    proto = quantized(raw, bits=bits)
    for got in (ran(proto.SerializeToString(), feed)[0], evaluated(proto.SerializeToString(), feed)[0]):
        assert 0 < np.abs(got - expected).max() <= 0.1 * np.abs(expected).max()


def test_nodes_that_are_not_named_stay() -> None:
    raw = products().raw()
    heavy = [node for node in onnx.ModelProto.FromString(raw).graph.node if node.op_type in AXES]
    proto = quantized(raw, heavy[2].name)
    there = {node.name: node for node in proto.graph.node}
    for node in heavy[:2] + heavy[3:]:
        assert there[node.name] == node
    assert there[heavy[2].name] != heavy[2]
    assert sum(node.op_type == "QuantizeLinear" for node in proto.graph.node) == 1


def saturating(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A product as x86 computes it without VNNI: pairs are added in 16 bits, which saturate (vpmaddubsw), then in 32.

    (m, k) uint8, (k, n) int8 → (m, n) int32, where k is even.
    """
    pairs = activations.astype(np.int32)[:, :, None] * weights.astype(np.int32)[None]
    sums = pairs[:, 0::2] + pairs[:, 1::2]
    return np.asarray(np.clip(sums, -32768, 32767).sum(axis=1))


@given(data=st.data(), columns=st.integers(1, 4), pairs=st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_weights_of_7_bits_never_saturate(data: Any, columns: int, pairs: int) -> None:
    """Whatever the activations are, the largest ones included."""
    size = 2 * pairs
    numbers = st.floats(-1e3, 1e3, width=32)
    net = Net(("batch", size))
    rows = data.draw(st.lists(numbers, min_size=size * columns, max_size=size * columns))
    net.add("MatMul", "x", net.array(np.array(rows, np.float32).reshape(size, columns)))
    activations = np.array(data.draw(st.lists(st.integers(0, 255), min_size=size, max_size=size)), np.uint8)[None]
    model = graph.read(net.raw())
    quantize.apply(model, {"nv0"}, {"x": (0.0, 1.0)}, 7)
    steps = model.graph.initializers["nv0.int8.weight"].const_value.numpy()
    assert np.abs(steps.astype(int)).max() <= 63
    for given_ in (activations, np.full_like(activations, 255)):
        np.testing.assert_array_equal(saturating(given_, steps), given_.astype(np.int32) @ steps.astype(np.int32))


def test_weights_of_8_bits_saturate() -> None:
    """The case that 7 bits are for: it is silent, and wrong by half of the result."""
    net = Net(("batch", 4))
    net.add("MatMul", "x", net.array(np.ones((4, 2), np.float32)))
    found = {}
    activations = np.full((1, 4), 255, np.uint8)
    for bits in (7, 8):
        model = graph.read(net.raw())
        quantize.apply(model, {"nv0"}, {"x": (0.0, 1.0)}, bits)
        steps = model.graph.initializers["nv0.int8.weight"].const_value.numpy()
        exact = activations.astype(np.int32) @ steps.astype(np.int32)
        found[bits] = float((saturating(activations, steps) / exact).max())
    assert found == {7: 1.0, 8: pytest.approx(32767 / (2 * 255 * 127))}


def test_what_cannot_be_quantized() -> None:
    net = Net(("batch", 4, 6, 6))
    net.add("ConvTranspose", "x", net.constant(4, 2, 3, 3), group=2)
    net.add("Conv", net.value, net.add("Abs", net.constant(4, 4, 1, 1)))  # weights that are computed
    net.add("MatMul", net.value, net.constant(4, 8, 8))  # a matrix for each channel
    net.add("Flatten")
    net.add("Gemm", net.value, net.constant(256, 3), alpha=0.5)
    net.add("Gemm", net.value, net.constant(2, 3), transA=1)
    assert quantize.quantizable(graph.read(net.raw())) == []


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 1.0), (0.0, 6.0), (2.0, 3.0), (-5.0, -1.0), (-0.001, 100.0), (0.0, 0.0), (0.0, 1e-45)]
)
def test_zero_is_a_level(low: float, high: float) -> None:
    scale, zero = quantize.levels(low, high)
    assert scale > 0
    assert (np.float32(0) / scale + zero) == zero  # exactly: padded zeros stay zeros
    ends = (np.array([0, 255]) - float(zero)) * float(scale)
    assert ends[0] <= min(low, 0.0) + float(scale) / 2 * 1.001
    assert ends[1] >= max(high, 0.0) - float(scale) / 2 * 1.001


def test_rounded_weights_are_those_of_the_graph() -> None:
    raw = products().raw()
    model = graph.read(raw)
    after = quantized(raw)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    makers = {node.output[0]: node for node in after.graph.node}
    for node in quantize.quantizable(model):
        made = next(n for n in after.graph.node if n.name == node.name)
        steps, scales, _ = (arrays[name] for name in makers[made.input[1]].input)
        axis = makers[made.input[1]].attribute[0].i
        shape = [-1 if dim == axis else 1 for dim in range(steps.ndim)]
        assert np.array_equal(quantize.rounded(node), steps * scales.astype(np.float64).reshape(shape))


# What was seen


def test_ranges_are_those_of_numpy() -> None:
    """Two feeds of other sizes; values of integers are not looked at."""
    net = Net(("batch", 6))
    weights = net.constant(6, 4)
    net.add("MatMul", "x", weights)
    product = net.value
    net.add("Add", net.value, net.array(np.float32(3)))
    net.add("Shape", net.value)
    net.add("Cast", net.value, to=onnx.TensorProto.FLOAT)
    net.add("Relu", "v1")
    raw = net.raw("v4", "v3")
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((n, 6)).astype(np.float32) for n in (3, 5)]
    seen = mixed_precision.record_activations(raw, [{"x": x} for x in rows])
    assert set(seen) == {"x", product, "v1", "v3", "v4"}
    values = np.concatenate(rows)
    for name, found in (("x", values), (product, values @ net.weights[weights])):
        assert seen[name].largest == pytest.approx(np.abs(found).max(), rel=1e-6)
        low, high = seen[name].span
        assert found.min() * 1.000001 <= low <= 0 <= high <= found.max() * 1.000001
        assert 0 < seen[name].loss < 0.02
    # Cutting nothing off is best for what has no tails.
    even = mixed_precision.record_activations(raw, [{"x": np.linspace(-1, 1, 6000, dtype=np.float32).reshape(-1, 6)}])[
        "x"
    ]
    assert even.span == (-1.0, 1.0)
    assert even.loss == pytest.approx((2 / 255) / 12**0.5 / 3**-0.5, rel=0.05)


def test_a_few_large_numbers_are_cut_off() -> None:
    net = Net(("batch", 1000))
    net.add("Relu")
    x = np.abs(np.sin(np.arange(200_000))).astype(np.float32).reshape(-1, 1000)
    feeds = [{"x": rows} for rows in np.split(x, 20)]
    assert mixed_precision.record_activations(net.raw(), feeds)["x"].span[1] == pytest.approx(1.0, rel=1e-4)
    x[0, 0] = 2.0
    seen = mixed_precision.record_activations(net.raw(), feeds)["x"]
    assert seen.largest == 2.0
    assert 1.0 <= seen.span[1] < 2.0


def test_what_is_not_finite_was_seen() -> None:
    net = Net(("batch", 2))
    net.add("Exp")
    seen = mixed_precision.record_activations(net.raw(), [{"x": np.array([[1.0, 1000.0]], np.float32)}])
    assert seen["v0"] == Activation(np.inf, (0.0, 0.0), np.inf)


@pytest.mark.parametrize("name", ["conv-gaussian", "plain"])
def test_both_are_recorded(member: Callable[[str], Any], name: str) -> None:
    """With calibration data, and without any: the golden examples' stand in for it."""
    bundle = Bundle(member(name).bundle)
    manifest = bundle.manifest
    reference = decode(bundle.read(FILE), manifest.golden, manifest.model)
    graphs, _ = bundle.graphs()
    x = reference.tensors["x"][reference.record.extremes :]
    without = mixed_precision.record_both(graphs, manifest.model, reference, x[:0])
    assert without["encoder"]["x"].largest == pytest.approx(np.abs(x).max())
    # The range of x is the data's, whatever was seen of it.
    assert without["encoder"]["x"].span == manifest.model.data.range
    if manifest.model.posterior.kind == "diagonal_gaussian":  # the decoder is given draws from the prior, too
        assert without["decoder"]["z"].largest > 2.0
    else:
        with vae_export.load(member(name).bundle, device="cpu") as vae:
            latents = vae.encode(x).mean
        assert without["decoder"]["z"].largest == pytest.approx(np.abs(latents).max(), rel=1e-6)
    half = mixed_precision.record_both(graphs, manifest.model, reference, 0.5 * x[:40])
    assert half["encoder"]["x"].largest == pytest.approx(0.5 * np.abs(x[:40]).max())
    assert half["decoder"].keys() == without["decoder"].keys()


# What stays in float32


def chain(count: int = 7) -> bytes:
    """Products one after the other, whose weights get harder to tell apart."""
    net = Net(("batch", 4))
    for number in range(count):
        weights = net.constant(4, 4)
        net.weights[weights][0, :] *= np.float32(10.0**number)
        net.weights[weights] /= np.float32(10.0**number)
        net.add("MatMul", net.value, weights)
        net.add("Tanh")
    return net.raw()


def loss_order(raw: bytes, seen: dict[str, Activation]) -> list[str]:
    """Nodes by what 8 bits lose of them, written down on its own."""
    losses = {}
    for node in quantize.quantizable(graph.read(raw)):
        weights = edit.constant(node.inputs[1])
        assert weights is not None
        lost = np.linalg.norm(quantize.rounded(node) - weights) / np.linalg.norm(weights)
        losses[str(node.name)] = float(np.hypot(seen[str(node.inputs[0].name)].loss, lost))
    return sorted(losses, key=losses.__getitem__, reverse=True)


@pytest.mark.parametrize("enough", range(7))
def test_bisection_keeps_those_that_lose_most(enough: int) -> None:
    raw = chain()
    seen = seen_in(raw)
    order = loss_order(raw, seen)
    asked: list[int] = []

    def problem(made: bytes) -> str | None:
        kept = 7 - sum(node.op_type == "QuantizeLinear" for node in onnx.ModelProto.FromString(made).graph.node)
        asked.append(kept)
        return None if kept >= enough else "too rough"

    low = mixed_precision.choose("net", raw, "int8", seen, problem)
    assert isinstance(low, ReducedPrecision)
    assert set(low.kept) == set(order[:enough])
    for why in low.kept.values():
        assert why.startswith("8 bits lose about ")
        assert why.endswith(f"% of its result: one of the {enough} nodes that lose most")
    assert asked[0] == 0  # none kept is tried first
    assert len(asked) == len(set(asked)) <= 4


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8"])
def test_where_nothing_holds(kind: Any) -> None:
    raw = chain(3)
    words = "every node would have to stay in float32; wrong"
    assert mixed_precision.choose("net", raw, kind, seen_in(raw), lambda made: "wrong") == words


def test_nothing_to_lower() -> None:
    net = Net(("batch", 4))
    net.add("Tanh")
    raw = net.raw()
    words = "every node would have to stay in float32"
    assert mixed_precision.choose("net", raw, "int8", seen_in(raw), lambda made: None) == words


def test_without_a_measure_everything_in_range_is_lowered() -> None:
    raw = chain(3)
    low = mixed_precision.choose("net", raw, "fp16", seen_in(raw), None)
    assert isinstance(low, ReducedPrecision)
    assert low.kept == {}
    seen = {name: Activation(2e4, (0.0, 0.0), 0.0) if name == "v0" else a for name, a in seen_in(raw).items()}
    low = mixed_precision.choose("net", raw, "fp16", seen, None)
    assert isinstance(low, ReducedPrecision)
    why = "values up to 2e+04, times 4 for headroom, leave float16's range"
    assert low.kept == {"nv0": why, "nv1": why}
    low = mixed_precision.choose("net", raw, "bf16", seen, None)  # which has float32's range
    assert isinstance(low, ReducedPrecision)
    assert low.kept == {}


def test_the_largest_stay_when_rounding_is_too_rough() -> None:
    raw = chain(3)
    made: list[bytes] = []

    def problem(lowered: bytes) -> str | None:
        made.append(lowered)
        return None if len(made) > 1 else "too rough"

    low = mixed_precision.choose("net", raw, "fp16", seen_in(raw), problem)
    assert isinstance(low, ReducedPrecision)
    (why,) = low.kept.values()
    assert why.startswith("values up to ")
    assert why.endswith(": one of the 1 nodes with the largest")


# A model with values that float16 has not


SHAPES = {"x": (1, 8, 8), "z": (2, 4, 4)}


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("overflow") / "overflow.bundle"
    assert vae_export.export(zoo.overflow(), path).passed
    return path


def test_lowering_every_node_overflows(overflowing: Path) -> None:
    """By the standard's arithmetic; ONNX Runtime on the CPU leaves out roundings between two nodes."""
    graphs, _ = Bundle(overflowing).graphs()
    inputs = {"encoder": {"x": zoo.pictures(64, SHAPES["x"])}, "decoder": {"z": normals(0, 0, 0, 64, 32)}}
    for name, raw in graphs.items():
        lowered = graph.write(to_half(graph.read(raw), "fp16", name))
        feed = {key: value.reshape(64, *SHAPES[key]) for key, value in inputs[name].items()}
        assert all(np.isfinite(value).all() for value in evaluated(raw, feed))
        assert not all(np.isfinite(value).all() for value in evaluated(lowered, feed))


def test_a_build_keeps_what_would_overflow(overflowing: Path, tmp_path: Path) -> None:
    built = vae_export.build(overflowing, "cpu", out=tmp_path / "b", precision="fp16", batches=[1, 4])
    assert built.certificate is not None
    assert built.certificate.passed
    assert built.certificate.precision == "float16"
    shown = tables.as_text(tables.build(built.path, built.record), width=200)
    given = {"encoder": zoo.pictures(64, SHAPES["x"]), "decoder": normals(0, 0, 0, 64, 32).reshape(64, *SHAPES["z"])}
    for name in ("encoder", "decoder"):
        for variant in built.record.graphs[name].variants:
            assert variant.precision == "fp16"
            assert any("leave float16's range" in why for why in variant.kept.values())
            for node, why in variant.kept.items():
                assert f"float32: {node} ({why})" in shown
            made = onnx.ModelProto.FromString((built.path / variant.file).read_bytes())
            kinds = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
            weights = {node.name: kinds[node.input[1]] for node in made.graph.node if node.op_type == "Conv"}
            assert len(weights) == 4
            low = {node for node, kind in weights.items() if kind == onnx.TensorProto.FLOAT16}
            assert low == weights.keys() - variant.kept.keys()
            assert low
            feed = {made.graph.input[0].name: given[name]}
            assert all(np.isfinite(value).all() for value in evaluated(made.SerializeToString(), feed))
    with vae_export.load(overflowing, build=built.path) as vae, vae_export.load(overflowing, device="cpu") as plain:
        low, full = vae.sample(5, seed=0), plain.sample(5, seed=0)
        assert np.isfinite(low).all()
        assert np.abs(low - full).max() <= 1e-2 * np.abs(full).max()


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_a_build_for_a_gpu_is_judged_on_the_cpu(
    overflowing: Path, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By arithmetic that rounds, whether there is a GPU or not: what overflows there is found here."""
    steps: list[str] = []
    built = vae_export.build(overflowing, "cuda", out=tmp_path / "b", precision=kind, progress=steps.append)
    assert [step for step in steps if "rounded" in step] == [
        f"{kind}: the {graph}, evaluated with every value rounded" for graph in ("encoder", "decoder")
    ]
    for name in ("encoder", "decoder"):
        kept = built.record.graphs[name].kept
        assert any("leave float16's range" in why for why in kept.values()) == (kind == "fp16")
    # Without the activations, nothing but the evaluation knows: ONNX Runtime's own arithmetic finds nothing wrong.
    monkeypatch.setattr(mixed_precision, "record_both", lambda *_: {"encoder": {}, "decoder": {}})
    if kind == "bf16":
        vae_export.build(overflowing, "cuda", out=tmp_path / "c", precision=kind)
        return
    with pytest.raises(VerificationError, match=r"nothing of overflow passes in fp16: the encoder in fp16: every node"):
        vae_export.build(overflowing, "cuda", out=tmp_path / "c", precision=kind)


def test_where_nothing_holds_for_a_gpu(overflowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evaluator, "problem", lambda self, graph, reduced, share=1.0: f"{graph}: PSNR is 9 dB")
    words = (
        r"nothing of overflow.* passes in fp16: the encoder in fp16: every node .* in float32; encoder: PSNR is 9 dB; "
        r"the decoder in fp16: .*decoder: PSNR is 9 dB\. Build with --precision fp32"
    )
    with pytest.raises(VerificationError, match=words):
        vae_export.build(overflowing, "cuda", out=tmp_path / "b", precision="fp16")


# Large sizes


def attention(positions: str = "n") -> bytes:
    """A sum over all positions, as linear attention has it, brought back behind: (1, 4, n) in and out."""
    net = Net((1, 4, positions))
    net.add("Transpose", "x", perm=[0, 2, 1])
    net.add("MatMul", "x", net.value)
    net.add("MatMul", net.value, "x")
    return net.raw()


def test_largest_is_what_record_finds() -> None:
    raw = products().raw()
    feed = feeds(raw, np.float32, batch=3)
    exact = {name: activation.largest for name, activation in mixed_precision.record_activations(raw, [feed]).items()}
    assert mixed_precision.largest(raw, [feed]) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("usual", "there", "times", "farther", "expected"),
    [
        (1.0, 1.5, 16.0, 64.0, 1.5),  # not more than pictures differ
        (100.0, 1600.0, 16.0, 4.0, 6400.0),  # a sum over positions
        (100.0, 400.0, 16.0, 16.0, 1600.0),  # its square root
        (0.0, 5.0, 16.0, 4.0, 5.0),
        (3.0, np.inf, 16.0, 4.0, np.inf),
        (3.0, 1.0, 16.0, 4.0, 3.0),
    ],
)
def test_how_a_value_grows(usual: float, there: float, times: float, farther: float, expected: float) -> None:
    assert mixed_precision.extrapolated(usual, there, times, farther) == pytest.approx(expected)


def test_a_large_size(member: Callable[[str], Any]) -> None:
    """Within the model's limits, four times as large in each direction, and values there count."""
    bundle = Bundle(member("spatial-named").bundle)
    model = bundle.manifest.model
    reference = decode(bundle.read(FILE), bundle.manifest.golden, model)
    graphs, _ = bundle.graphs()
    assert mixed_precision.large_sizes(model, (3, 16, 24)) == {"height": 64, "width": 96}
    assert mixed_precision.large_sizes(model, (3, 1024, 1024)) is None  # a larger one would take long
    found = mixed_precision.large_inputs(graphs, model, reference)
    assert found is not None
    assert {graph: rows.shape[1:] for graph, (_, rows) in found.inputs.items()} == {
        "encoder": (3, 64, 96),
        "decoder": (4, 16, 24),
    }
    for name, raw in graphs.items():
        assert found.problem(name, raw, model) is None
        broken = graph.read(raw)
        last = [v for v in broken.graph.initializers.values() if v.dtype == 1 and len(v.shape) == 4][-1]
        last.const_value = onnx_ir.tensor(np.full(last.shape.numpy(), 3e38, np.float32), name=last.name)
        words = rf"{name}: \d+ of \d+ values of \w+ are not finite at height 64, width 96"
        assert re.fullmatch(words, str(found.problem(name, graph.write(broken), model)))


def test_sums_over_positions_stay_in_float32() -> None:
    """In range where they were recorded, and not at the size at which they were looked at."""
    raw = attention()
    seen = mixed_precision.record_activations(raw, [{"x": np.ones((1, 4, 1024), np.float32)}])
    assert seen["v1"].largest == 1024.0
    low = mixed_precision.choose("net", raw, "fp16", seen, None)
    assert isinstance(low, ReducedPrecision)
    assert low.kept == {}
    grown = seen | {"v1": dataclasses.replace(seen["v1"], largest=65536.0, where="height 256, width 256")}
    low = mixed_precision.choose("net", raw, "fp16", grown, None)
    assert isinstance(low, ReducedPrecision)
    assert set(low.kept) == {"nv1", "nv2"}
    words = "values up to 6.55e+04 (it grows with the size: measured at height 256, width 256), times 4 for headroom, "
    assert all(why.startswith(words) for why in low.kept.values())
    everything = mixed_precision.rounding(graph.write(to_half(graph.read(raw), "fp16", "net")))
    x = np.ones((1, 4, 65536), np.float32)
    assert not np.isfinite(ran(everything, {"x": x})[0]).all()
    assert np.isfinite(ran(everything, {"x": x[..., :1024]})[0]).all()
    assert np.isfinite(ran(mixed_precision.rounding(low.graph), {"x": x})[0]).all()


def test_bfloat16_holds_them(overflowing: Path) -> None:
    bundle = Bundle(overflowing)
    graphs, _ = bundle.graphs()
    for name, raw in graphs.items():
        model = bundle.manifest.model
        reference = decode(bundle.read(FILE), bundle.manifest.golden, model)
        seen = mixed_precision.record_both(graphs, model, reference, reference.tensors["x"][:0])[name]
        largest = max(activation.largest for activation in seen.values())
        assert 65504 < largest < 1e7
        low = mixed_precision.choose(name, raw, "bf16", seen, None)
        assert isinstance(low, ReducedPrecision)
        assert low.kept == {}
