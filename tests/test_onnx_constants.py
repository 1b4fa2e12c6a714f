"""Constant folding: estimated as a backend would compute it, and refused before one does."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_bundle import reseal

import vae_export
from vae_export.contract import onnx_constants, onnx_guard, onnx_shapes
from vae_export.contract.onnx_constants import Folding
from vae_export.contract.onnx_graph import Graph
from vae_export.errors import BundleError
from vae_export.runtimes.ort_session import session_options

Array = npt.NDArray[np.generic]


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def floats(*shape: int) -> Array:
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def node(operator: str, *inputs: str, out: str = "c", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [out], **attributes)


def model(
    *nodes: onnx.NodeProto, functions: tuple[onnx.FunctionProto, ...] = (), size: object = 3, **constants: Array
) -> bytes:
    """A graph that takes x of (batch, size) and gives y."""
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in (("x", ["b", size]), ("y", None))
    )
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([*nodes, helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=8).SerializeToString()


def estimate(raw: bytes) -> Folding:
    graph = Graph()
    assert list(onnx_guard.operators(raw, "m", graph))
    return onnx_constants.estimate(graph)


#: Each makes some 4 GB, or takes some 10^12 steps, of constants alone.
HUGE = {
    "ConstantOfShape": model(node("ConstantOfShape", "s"), s=ints(1 << 30)),
    "Expand": model(node("Expand", "w", "s"), w=floats(1), s=ints(1 << 15, 1 << 15)),
    "Tile": model(node("Tile", "w", "s"), w=floats(1000), s=ints(1_000_000)),
    "Range": model(node("Range", "a", "b", "d"), a=np.int64(0), b=np.int64(1 << 29), d=np.int64(1)),
    "Pad": model(node("Pad", "w", "s"), w=floats(1, 1), s=ints(0, 1 << 15, 1 << 15, 0)),
    "Resize": model(
        node("Resize", "w", "", "s"), w=floats(1, 1, 8, 8), s=np.array([1, 1, 1 << 12, 1 << 12], np.float32)
    ),
    "MatMul": model(node("ConstantOfShape", "s"), node("MatMul", "c", "c", out="d"), s=ints(4000, 4000)),
    "Gemm": model(
        node("ConstantOfShape", "s"), node("Gemm", "c", "c", out="d", transA=1), s=ints(4000, 4000)
    ),
    "Einsum": model(
        node("ConstantOfShape", "s"), node("Einsum", "c", "c", out="d", equation="ij,jk->ik"), s=ints(4000, 4000)
    ),
    "Conv": model(
        node("ConstantOfShape", "s"), node("Conv", "c", "w", out="d", pads=[1] * 4),
        s=ints(1, 64, 512, 512), w=floats(512, 64, 3, 3),
    ),
    "Add": model(node("Add", "w", "v"), w=floats(20_000, 1), v=floats(20_000)),
    "ConstantOfShape of an input's sizes": model(
        node("Shape", "x", out="s", start=1), node("Mul", "s", "k", out="t"), node("ConstantOfShape", "t"),
        k=ints(1 << 28),
    ),
    "Concat": model(
        node("ConstantOfShape", "s"), node("Concat", *["c"] * 50, out="d", axis=0), s=ints(2_000_000)
    ),
    "Gather": model(node("Gather", "w", "i"), w=floats(1, 100_000), i=np.zeros(1000, np.int64)),
    "ConstantOfShape of a Constant": model(
        helper.make_node("Constant", [], ["s"], value_ints=[1 << 40]), node("ConstantOfShape", "s")
    ),
}  # fmt: skip


@pytest.mark.parametrize("operator", HUGE)
def test_too_much_is_refused_in_words(operator: str) -> None:
    expected = r"m: the graph computes [\d,]+ (bytes|steps) \(at most [\d,]+\) out of constants alone, most of it by "
    with pytest.raises(BundleError, match=rf"{expected}{operator.split()[0]}\. It is not run\. Export the model again"):
        onnx_guard.check_operators(HUGE[operator], "m")


#: Nodes of small constants: what each makes is as large as ONNX Runtime finds it.
SMALL = [
    (node("Cast", "w", to=TensorProto.DOUBLE), {}),
    (node("Add", "w", "v"), {"v": floats(5, 1, 3, 1)}),
    (node("Div", "i", "k"), {"i": ints(7, -7, 9), "k": ints(2)}),
    (node("Where", "b", "w", "v"), {"b": np.ones((3, 1), np.bool_), "v": floats(1)}),
    (node("Less", "w", "v"), {"v": floats(3, 1)}),
    (node("Softmax", "w"), {}),
    (node("ReduceL2", "w", "a", keepdims=0), {"a": ints(-1)}),
    (node("ReduceSum", "w"), {}),
    (node("ArgMax", "w", axis=1), {}),
    (node("Transpose", "w"), {}),
    (node("Transpose", "w", perm=[1, 0, 2]), {}),
    (node("Reshape", "w", "s"), {"s": ints(0, -1)}),
    (node("Flatten", "w", axis=2), {}),
    (node("Squeeze", "v"), {"v": floats(1, 3, 1)}),
    (node("Squeeze", "v", "a"), {"v": floats(1, 3, 1), "a": ints(-1)}),
    (node("Unsqueeze", "w", "a"), {"a": ints(0, -1)}),
    (node("Slice", "w", "i", "k", "a", "d"), {"i": ints(-1), "k": ints(-(1 << 63)), "a": ints(2), "d": ints(-2)}),
    (node("Concat", "w", "w", axis=-1), {}),
    (node("Gather", "w", "i", axis=1), {"i": ints(0, -1, 1)}),
    (node("GatherElements", "w", "i"), {"i": np.zeros((1, 2, 2), np.int64)}),
    (node("GatherND", "w", "i"), {"i": np.zeros((5, 2), np.int64)}),
    (node("ConstantOfShape", "s", value=numpy_helper.from_array(ints(7))), {"s": ints(2, 3)}),
    (node("Expand", "w", "s"), {"s": ints(2, 1, 3, 1)}),
    (node("Tile", "w", "s"), {"s": ints(1, 2, 3)}),
    (node("Range", "i", "k", "d"), {"i": np.float32(1), "k": np.float32(-1), "d": np.float32(-0.3)}),
    (node("Pad", "w", "s"), {"s": ints(0, 1, 2, 0, -1, 3)}),
    (node("Pad", "w", "s", "", "a"), {"s": ints(1, 2), "a": ints(-2)}),
    (node("Resize", "w", "", "s"), {"s": np.array([1, 1.5, 2], np.float32)}),
    (node("Resize", "w", "", "", "s"), {"s": ints(2, 5, 7)}),
    (node("EyeLike", "v", dtype=TensorProto.DOUBLE), {"v": floats(3, 2)}),
    (node("MatMul", "w", "v"), {"v": floats(4, 5)}),
    (node("MatMul", "v", "v"), {"v": floats(4)}),
    (node("Gemm", "v", "v", transA=1), {"v": floats(4, 5)}),
    (node("Einsum", "w", "v", equation="bij, kj -> ik"), {"v": floats(5, 4)}),
    (node("Conv", "v", "k", pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2], group=2),
     {"v": floats(1, 4, 7, 8), "k": floats(6, 2, 3, 3)}),
    (node("DequantizeLinear", "i", "v"), {"i": np.zeros((3, 4), np.int8), "v": np.float32(2)}),
    (node("QuantizeLinear", "w", "v"), {"v": np.float32(2)}),
]  # fmt: skip


@pytest.mark.parametrize(("made", "constants"), SMALL, ids=[made.op_type for made, _ in SMALL])
def test_as_large_as_a_backend_finds_it(made: onnx.NodeProto, constants: dict[str, Array]) -> None:
    given = {"w": floats(2, 3, 4)} | constants
    raw = model(made, **{name: array for name, array in given.items() if name in made.input})
    whole = onnx.ModelProto.FromString(raw)
    whole.graph.output.append(helper.make_empty_tensor_value_info("c"))
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(["c"], {"x": floats(1, 3)})
    found = estimate(raw)
    assert found.complete
    assert found.size == result.nbytes
    # Numbers that can be sizes are those of ONNX Runtime, where they are known.
    if result.dtype == np.int64:
        scope = Graph()
        list(onnx_guard.operators(raw, "m", scope))
        (value,), _ = onnx_shapes.infer(scope.nodes[0], [scope.constants[name] for name in made.input])
        assert not value.known or np.array_equal(value.array, result)


def test_split() -> None:
    split = helper.make_node("Split", ["w", "s"], ["a", "b"], axis=1)
    raw = model(split, node("MatMul", "a", "b"), w=floats(3, 4), s=ints(1, 3))
    assert not estimate(raw).complete  # (3, 1) and (3, 3) do not fit: whatever a backend makes of that
    raw = model(split, node("Add", "a", "b"), w=floats(3, 4), s=ints(1, 3))
    assert estimate(raw).size == 3 * 4 * 4 + 3 * 3 * 4


def test_a_size_of_1_goes_with_any() -> None:
    raw = model(node("Einsum", "v", "v", "w", "w", equation="a,b,a,b->ab"), v=floats(300), w=floats(1))
    assert estimate(raw).size == 300 * 300 * 4


def test_what_an_export_may_leave_to_the_backend() -> None:
    """Transposed weights, a norm of weights, and a product of low rank that is added to them."""
    raw = model(
        node("Transpose", "w", out="t"), node("ReduceL2", "t", "a", out="n"), node("Div", "t", "n", out="u"),
        node("MatMul", "v", "k", out="d"), node("Add", "u", "d"),
        w=floats(512, 768), a=ints(0), v=floats(768, 16), k=floats(16, 512),
    )  # fmt: skip
    found = estimate(raw)
    assert found.complete
    assert found.steps >= 512 * 16 * 768
    assert onnx_guard.check_operators(raw, "m").foldable


UNTOLD = {
    "an operator that is not estimated": model(node("NonZero", "w"), w=floats(3)),
    "sizes of what is computed": model(
        node("Relu", "x", out="r"), node("Shape", "r", out="s", start=1), node("ConstantOfShape", "s")
    ),
    "sizes that nobody knows": model(
        node("Exp", "w", out="e"), node("Cast", "e", out="s", to=7), node("ConstantOfShape", "s"), w=floats(1)
    ),
    "numbers through bfloat16": model(
        node("Cast", "w", out="h", to=16), node("Cast", "h", out="s", to=7), node("ConstantOfShape", "s"),
        w=np.array([4096], np.float32),
    ),
    "labels of Einsum that are not written": model(node("Einsum", "w", "w", equation="a,b"), w=floats(3)),
    "dots of Einsum": model(node("Einsum", "w", "w", equation="...a,...b->...ab"), w=floats(3, 4)),
    "a size that keeps the aspect ratio": model(
        node("Resize", "w", "", "", "s", keep_aspect_ratio_policy="not_smaller"), w=floats(1, 1, 1, 10),
        s=ints(1, 1, 60, 10),
    ),
    "nodes out of order": model(node("Relu", "e"), node("Exp", "w", out="e"), w=floats(3)),
    "a name twice": model(node("Exp", "w", out="w"), w=floats(3)),
    "a function": model(functions=(helper.make_function("", "f", [], ["u"], [node("Exp", "v", out="u")], []),)),
    "a branch that is chosen now": model(
        helper.make_node("If", ["b"], ["c"], then_branch=helper.make_graph([node("Exp", "w")], "t", [], [])),
        b=np.array(True), w=floats(3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("raw", UNTOLD.values(), ids=UNTOLD.keys())
def test_unknown_sizes_are_not_folded(raw: bytes) -> None:
    arrays = onnx_guard.check_operators(raw, "m")
    assert not arrays.foldable
    settings = session_options(onnxruntime, arrays)
    assert settings.get_session_config_entry("optimization.disable_specified_optimizers") == "ConstantFolding"


def test_a_backend_that_does_not_fold_opens_at_once() -> None:
    """A product of 16,000 x 16,000 numbers whose sizes are not known makes the estimate incomplete."""
    raw = model(
        node("Relu", "x", out="r"), node("Shape", "r", out="n", start=1), node("Mul", "n", "k", out="s"),
        node("ConstantOfShape", "s"), node("MatMul", "c", "c", out="d"),
        size=2, k=ints(8000),
    )  # fmt: skip
    settings = session_options(onnxruntime, onnx_guard.check_operators(raw, "m"))
    began = time.monotonic()
    onnxruntime.InferenceSession(raw, settings, providers=["CPUExecutionProvider"])
    assert time.monotonic() - began < 5


def test_sizes_that_vary_are_no_constants() -> None:
    raw = model(node("Shape", "x", out="s"), node("ConstantOfShape", "s"))
    assert estimate(raw) == Folding()
    raw = model(node("Shape", "x", out="s", end=1), node("Expand", "w", "s"), w=floats(1))
    assert estimate(raw) == Folding()


@pytest.mark.parametrize("name", ["linear", "spatial-named"])
def test_sizes_of_real_graphs_are_known(member: Callable[..., object], name: str) -> None:
    for path in member(name).bundle.glob("*/model.onnx"):
        found = estimate(path.read_bytes())
        assert found.complete
        assert found.size < 1 << 16


def test_a_division_that_ends_the_process() -> None:
    """On x86, that of the smallest integer by -1 does; ONNX Runtime does not check it."""
    raw = model(node("Div", "i", "k"), i=ints(-(1 << 63)), k=ints(-1))
    with pytest.raises(BundleError, match=r"m: the graph divides integers by -1, .*\. It is not run"):
        onnx_guard.check_operators(raw, "m")
    onnx_guard.check_operators(model(node("Div", "w", "v"), w=floats(3), v=np.float32(-1)), "m")


@pytest.mark.parametrize(
    ("inputs", "constants", "shown"),
    [
        (["x", "", "s"], {"s": np.array([1, -2], np.float32)}, r"\[1\.0, -2\.0\]"),
        (["x", "", "", "s"], {"s": ints(1, 0)}, r"\[1, 0\]"),
        (["x", "", "s"], {"s": np.array([1, np.nan], np.float32)}, r"\[1\.0, nan\]"),
    ],
)
def test_sizes_that_no_backend_should_see(inputs: list[str], constants: dict[str, Array], shown: str) -> None:
    raw = model(node("Resize", *inputs), **constants)
    with pytest.raises(BundleError, match=rf"m: the graph has a Resize by {shown}; expected numbers above 0, up to"):
        onnx_guard.check_operators(raw, "m")


def test_inside_a_branch() -> None:
    inner = helper.make_graph([node("Tile", "w", "s")], "inner", [], [])
    raw = model(helper.make_node("If", ["x"], ["i"], then_branch=inner), w=floats(1000), s=ints(1_000_000))
    with pytest.raises(BundleError, match="most of it by Tile"):
        onnx_guard.check_operators(raw, "m")


def test_unknown_sizes_are_not_built(digits: dict[str, Path], tmp_path: Path) -> None:
    """Compilers compute constants first. The bundle itself runs."""
    copy = Path(shutil.copytree(digits["gaussian"], tmp_path / "copy.bundle"))
    path = copy / "vae_decoder" / "model.onnx"
    strange = onnx.load(path)
    strange.graph.initializer.append(numpy_helper.from_array(floats(3), "w"))
    strange.graph.node.append(node("NonZero", "w"))
    path.write_bytes(strange.SerializeToString())
    reseal(copy)
    with vae_export.load(copy, device="cpu") as vae:
        assert np.isfinite(vae.sample(1)).all()
    with pytest.raises(BundleError, match="build: the decoder does not tell how large the values are that it computes"):
        vae_export.build(copy, "cpu", out=tmp_path / "b")


def test_a_hostile_bundle_is_refused_at_once(digits: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(digits["gaussian"], tmp_path / "copy.bundle"))
    path = copy / "vae_decoder" / "model.onnx"
    hostile = onnx.load(path)
    hostile.graph.initializer.append(numpy_helper.from_array(ints(1 << 14, 1 << 14), "s"))
    hostile.graph.node.extend([node("ConstantOfShape", "s"), node("MatMul", "c", "c", out="d")])
    path.write_bytes(hostile.SerializeToString())
    reseal(copy)
    began = time.monotonic()
    with pytest.raises(BundleError, match=r"decoder: the graph computes .* out of constants alone") as caught:
        vae_export.load(copy, device="cpu")
    assert caught.value.exit_code == 3
    assert time.monotonic() - began < 5  # in which ONNX Runtime would not have begun to multiply
