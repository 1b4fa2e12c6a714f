"""Fused graphs: the same results, valid, and no larger than they need to be."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import zoo
from fusions import (
    CLOSE,
    FUSIONS,
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
from onnx import TensorProto, helper, numpy_helper

from vae_export.contract.model import DECODER_OUTPUTS, Data, Latent, Model
from vae_export.numerics import pixels


@pytest.mark.parametrize(("name", "fusion"), FUSIONS)
def test_fused_graphs_compute_the_same(member: Any, name: str, fusion: str) -> None:
    model, parts = graphs_of(member, name)
    fused = fused_bytes(fusion, parts, model)
    for size in shapes(model):
        for batch in (1, 5):
            feed = inputs(model, fusion, batch, size)
            if fusion == "generate":
                sample = run(parts["decoder"], feed)["sample"]
                image = run(fused, feed)["image"]
                expected = pixels.to_uint8(sample, model.data.range).transpose(0, 2, 3, 1)
                assert image.dtype == np.uint8
                assert len(np.unique(image)) > 10
                assert np.array_equal(image, expected)
                continue
            encoded = run(parts["encoder"], {"x": feed["x"]})
            z = encoded["mean"]
            if "eps" in feed:
                z = z + np.exp(np.float32(0.5) * encoded["logvar"]) * feed["eps"]
                assert np.abs(z - encoded["mean"]).max() > 1e-3
            close(run(fused, feed), {"sample": run(parts["decoder"], {"z": z})["sample"]}, CLOSE)


@pytest.mark.parametrize(("name", "fusion"), FUSIONS)
def test_fused_graphs_are_valid_and_no_larger_than_needed(member: Any, name: str, fusion: str) -> None:
    model, parts = graphs_of(member, name)
    proto = onnx.ModelProto.FromString(fused_bytes(fusion, parts, model))
    onnx.checker.check_model(proto, full_check=True)
    check_ends(proto, model, fusion)
    check_needed(proto)
    made = {output for node in proto.graph.node for output in node.output}
    if model.likelihood.kind == "gaussian":
        assert "sample_logvar" not in made  # a half of what the decoder's last product gives, which is not cut off
    if fusion == "generate":
        last = proto.graph.node[-1]
        assert (last.op_type, last.output[0], last.attribute[0].i) == ("Cast", "image", TensorProto.UINT8)
    else:
        assert ("eps" in {value.name for value in proto.graph.input}) == (name != "plain")


@pytest.mark.parametrize("fusion", ["reconstruct", "generate"])
def test_what_only_another_output_needs_is_dropped(member: Any, fusion: str) -> None:
    """A decoder whose second output has a weight and nodes of its own."""
    model, parts = graphs_of(member, "mlp-gaussian")
    decoder = onnx.ModelProto.FromString(parts["decoder"])
    assert [output.name for output in decoder.graph.output] == list(DECODER_OUTPUTS["gaussian"])
    other = decoder.graph.output[1].name
    for node in decoder.graph.node:
        node.output[:] = [f"{n}.before" if n == other else n for n in node.output]
    decoder.graph.initializer.append(numpy_helper.from_array(np.ones((8, 8), np.float32), "only_here"))
    decoder.graph.node.append(helper.make_node("MatMul", [f"{other}.before", "only_here"], [other]))
    onnx.checker.check_model(decoder, full_check=True)
    changed = parts | {"decoder": decoder.SerializeToString()}
    made = onnx.ModelProto.FromString(fused_bytes(fusion, changed, model))
    assert "only_here" not in " ".join(tensor.name for tensor in made.graph.initializer)
    check_needed(made)
    feed = inputs(model, fusion, 3, {})
    for name, value in run(fused_bytes(fusion, parts, model), feed).items():
        assert np.array_equal(run(made.SerializeToString(), feed)[name], value)


def vectors(data: tuple[int, ...], latent: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Model:
    """A description of a deterministic autoencoder, of data and latents of these shapes."""
    model = zoo.plain().model
    return msgspec.structs.replace(model, data=Data(shape=data, range=(low, high)), latent=Latent(shape=latent))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-3.0, 5.5)])
def test_pictures_are_clamped_and_rounded_to_even(low: float, high: float) -> None:
    """Every level, halves between two, both ends and what is beyond them."""
    steps = np.concatenate([np.arange(-4, 1029) / 1024, np.arange(511) / 510, [-1e30, 1e30]])
    z = (low + steps * (high - low)).astype(np.float32).reshape(1, 1, 1, -1)
    shape = (1, 1, z.size)
    identity = helper.make_node("Identity", ["z"], ["sample"])
    decoder = model_of([identity], [("z", ["batch", *shape])], [("sample", ["batch", *shape])], {})
    fused = fused_bytes("generate", {"decoder": decoder}, vectors(shape, shape, low, high))
    image = run(fused, {"z": z})["image"]
    assert image.shape == (1, 1, z.size, 1)
    assert set(image.ravel().tolist()) == set(range(256))
    assert np.array_equal(image.ravel(), pixels.to_uint8(z, (low, high)).ravel())


def widening(source: str, target: str, width: int) -> bytes:
    """Four numbers to `width` and back. The inner size is called `s`, and only the running graph knows what it is."""
    up, down = (np.full(shape, 0.25, np.float32) for shape in ((4, width), (width, 4)))
    steps = [
        ("MatMul", [source, "up"], "wide"),
        ("ReduceMax", [source], "largest"),
        ("Sub", ["largest", "largest"], "nothing"),
        ("Add", ["width", "nothing"], "measured"),
        ("Cast", ["measured"], "size"),
        ("Concat", ["rest", "size"], "shape"),
        ("Reshape", ["wide", "shape"], "first"),
        ("Sin", ["first"], "second"),
        ("Cos", ["second"], "third"),
        ("MatMul", ["third", "down"], "back"),
        ("Reshape", ["back", "four"], target),
    ]
    attributes: dict[str, Any] = {
        "largest": {"keepdims": 0}, "size": {"to": TensorProto.INT64}, "shape": {"axis": 0},
    }  # fmt: skip
    nodes = [helper.make_node(op, into, [out], f"make_{out}", **attributes.get(out, {})) for op, into, out in steps]
    weights = {"up": up, "down": down, "width": np.array([width], np.float32)}
    weights |= {"rest": np.array([-1], np.int64), "four": np.array([-1, 4], np.int64)}
    values = [
        *((name, TensorProto.FLOAT, ["batch", "s"]) for name in ("first", "second", "third")),
        *((name, TensorProto.FLOAT, []) for name in ("largest", "nothing")),
        *(("wide", TensorProto.FLOAT, ["batch", width]), ("back", TensorProto.FLOAT, ["batch", 4])),
        *(("measured", TensorProto.FLOAT, [1]), ("size", TensorProto.INT64, [1]), ("shape", TensorProto.INT64, [2])),
    ]
    return model_of(nodes, [(source, ["batch", 4])], [(target, ["batch", 4])], weights, values)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_name_for_two_sizes(precision: str) -> None:
    """Both graphs call an inner size `s`, 6 in the encoder and 24 in the decoder. ONNX Runtime takes values of one
    shape for values of one size, and puts one into the memory of the other.
    """
    parts = {"encoder": widening("x", "mean", 6), "decoder": widening("z", "sample", 24)}
    if precision == "fp16":
        parts = {name: lowered(raw, "fp16", name) for name, raw in parts.items()}
    x = zoo.pictures(5, (4,))
    fused = fused_bytes("reconstruct", parts, vectors((4,), (4,)))
    close(run(fused, {"x": x}), run(parts["decoder"], {"z": run(parts["encoder"], {"x": x})["mean"]}), 1e-6)


def test_nodes_may_have_no_names() -> None:
    """A name is optional, and ONNX Runtime takes none twice."""
    parts = {}
    for name, source, target in (("encoder", "x", "mean"), ("decoder", "z", "sample")):
        nodes = [helper.make_node("Neg", [source], ["inner"]), helper.make_node("Abs", ["inner"], [target])]
        parts[name] = model_of(nodes, [(source, ["batch", 4])], [(target, ["batch", 4])], {})
    x = zoo.pictures(2, (4,))
    assert np.array_equal(run(fused_bytes("reconstruct", parts, vectors((4,), (4,))), {"x": x})["sample"], x)
