"""Small graphs for the tests of passes, and what they compute in float64 and in ONNX Runtime."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from vae_export import graph
from vae_export.graph.rewrites import optimize

#: Of two ways through the same arithmetic in float64, as a share of the largest value.
EXACT = 1e-12
#: The same where weights were rounded to float32.
ROUNDED = 1e-5


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
