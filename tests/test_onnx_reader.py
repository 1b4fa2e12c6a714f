"""The reader of ONNX graphs against the onnx package, and on files that are not ONNX."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from onnx.defs import get_all_schemas

from vae_export.contract import onnx_attributes, onnx_guard
from vae_export.contract.onnx_graph import Graph
from vae_export.errors import BundleError


def model(*nodes: onnx.NodeProto, **fields: object) -> bytes:
    return helper.make_model(helper.make_graph(list(nodes), "g", [], []), **fields).SerializeToString()


def operators(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in graph.node]


@pytest.mark.parametrize("name", ["conv-bernoulli", "spatial-named", "mlp-gaussian"])
def test_same_operators_as_onnx(member: Callable[..., object], name: str) -> None:
    for path in member(name).bundle.glob("*/model.onnx"):
        raw = path.read_bytes()
        assert list(onnx_guard.operators(raw, "m", Graph())) == operators(onnx.load(path).graph)
        onnx_guard.check_operators(raw, "m")


def test_every_random_operator_of_the_standard_is_known() -> None:
    named = {s.name for s in get_all_schemas() if s.domain == "" and "seed" in s.attributes}
    assert named <= onnx_guard.RANDOM


@pytest.mark.parametrize("operator", sorted(onnx_guard.RANDOM))
def test_random_operators(operator: str) -> None:
    with pytest.raises(BundleError, match=rf"m: the graph draws random numbers \({operator}\).*Noise must be an input"):
        onnx_guard.check_operators(model(helper.make_node(operator, [], ["y"])), "m")


def test_hidden_in_branches_and_functions() -> None:
    inner = helper.make_graph([helper.make_node("RandomNormal", [], ["u"], shape=[1])], "inner", [], [])
    middle = helper.make_graph([helper.make_node("If", ["c"], [], then_branch=inner)], "middle", [], [])
    with pytest.raises(BundleError, match="draws random numbers"):
        onnx_guard.check_operators(model(helper.make_node("If", ["c"], [], else_branch=middle)), "m")
    function = helper.make_function("", "f", [], ["u"], [helper.make_node("RandomNormal", [], ["u"])], [])
    with pytest.raises(BundleError, match="draws random numbers"):
        onnx_guard.check_operators(model(helper.make_node("Relu", ["x"], ["y"]), functions=[function]), "m")


def test_loops_and_other_domains() -> None:
    with pytest.raises(BundleError, match="has a Loop, which may never end"):
        onnx_guard.check_operators(model(helper.make_node("Loop", [], [])), "m")
    with pytest.raises(BundleError, match=r"the operator com\.evil\.Open is not a standard ONNX operator"):
        onnx_guard.check_operators(model(helper.make_node("Open", [], [], domain="com.evil")), "m")
    onnx_guard.check_operators(model(helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx")), "m")


@pytest.mark.parametrize("operator", sorted(onnx_guard.LOOPS))
def test_what_repeats_without_a_bound(operator: str) -> None:
    with pytest.raises(BundleError, match=f"has a {operator}, which may never end"):
        onnx_guard.check_operators(model(helper.make_node(operator, [], [])), "m")


@pytest.mark.parametrize(
    ("operator", "attributes", "message"),
    [
        ("Conv", {"group": 0}, "group is 0; expected 1 to"),
        ("Conv", {"strides": [1, -1]}, r"strides is \[1, -1\]; expected 1 to"),
        ("DepthToSpace", {"blocksize": 1 << 40}, "blocksize is 1099511627776; expected"),
        ("Split", {"num_outputs": 3}, "num_outputs is 3; the node has 1 outputs"),
        ("Softmax", {"axis": -(1 << 63)}, "axis is -9223372036854775808; expected -64 to 64"),
        ("Softmax", {"axis": "one"}, "axis is of another type; expected an integer"),
        ("Transpose", {"perm": [0, 0]}, r"perm is \[0, 0\]; expected each of 0 to 1 once"),
    ],
)
def test_attributes_that_no_backend_should_see(operator: str, attributes: dict[str, object], message: str) -> None:
    with pytest.raises(BundleError, match=f"m: {operator}: {message}"):
        onnx_guard.check_operators(model(helper.make_node(operator, ["x"], ["y"], **attributes)), "m")


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs", "message"),
    [
        ("Split", ["x"], ["a", "", "b"], "of its 3 outputs, 1 have no name; expected a name for each"),
        ("LayerNormalization", ["x", "w", ""], ["y"], "of its 3 inputs, 1 have no name; expected a name for each"),
        *(
            (operator, ["x"], ["y"], "it can end the process for sizes that are only known at run time")
            for operator in sorted(onnx_attributes.UNSAFE)
        ),
    ],
)
def test_nodes_that_no_backend_should_see(operator: str, inputs: list[str], outputs: list[str], message: str) -> None:
    with pytest.raises(BundleError, match=rf"m: {operator}: {message}.*\. It is not run"):
        onnx_guard.check_operators(model(helper.make_node(operator, inputs, outputs)), "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": [2, 0]}, r"m: the weight 'w' has the sizes \[2, 0\]; expected none of them to be 0"),
        ({"dims": [1 << 40]}, r"m: the weight 'w' has \d+ bytes, which do not hold \[1099511627776\] values"),
    ],
)
def test_weights_of_sizes_that_no_backend_should_see(changes: dict[str, object], message: str) -> None:
    tensor = TensorProto(data_type=TensorProto.FLOAT, name="w", raw_data=bytes(8), **changes)
    graph = helper.make_graph([], "g", [], [], initializer=[tensor])
    with pytest.raises(BundleError, match=message):
        onnx_guard.check_operators(helper.make_model(graph).SerializeToString(), "m")


def test_names_that_steer_a_terminal() -> None:
    for text in ("\x1b[31m", "\u202e"):
        with pytest.raises(BundleError, match="has characters that cannot be printed") as caught:
            onnx_guard.check_operators(model(helper.make_node("Relu", ["x"], ["y"], name=text)), "m")
        assert str(caught.value).isprintable()


def test_weights_elsewhere(tmp_path: Path) -> None:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    graph = helper.make_graph([], "g", [], [], initializer=[tensor])
    for raw in (
        helper.make_model(graph).SerializeToString(),
        model(helper.make_node("Constant", [], ["y"], value=tensor)),
    ):
        with pytest.raises(BundleError, match="weights are in another file, which is not read"):
            onnx_guard.check_operators(raw, "m")


def field(number: int, content: bytes, *, more: int = 0) -> bytes:
    """A length-delimited field; `more` is added to its key, which readers may truncate to 32 bits."""
    return varint((number << 3 | 2) + more) + varint(len(content)) + content


def varint(value: int) -> bytes:
    found = b""
    while value >> 7:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


NODE = field(4, b"RandomNormal")
ATTRIBUTE = field(1, b"axis") + varint(20 << 3) + varint(2)
HIDDEN = {
    "a number of fixed width that other readers skip": field(7, field(5, varint(1 << 3 | 1) + bytes(8))),
    "an attribute twice": field(7, field(1, field(4, b"Relu") + 2 * field(5, ATTRIBUTE))),
    "an attribute with two numbers": field(
        7, field(1, field(4, b"Relu") + field(5, ATTRIBUTE + 2 * (varint(3 << 3) + varint(1))))
    ),
    "an attribute without a type": field(7, field(1, field(4, b"Relu") + field(5, field(1, b"axis")))),
    "two weights of a name": field(7, 2 * field(5, field(8, b"w"))),
    "a key above 32 bits": field(7, field(1, NODE, more=1 << 32)),
    "an external location above 32 bits": field(7, field(5, varint(14 << 3) + varint(1 + (1 << 32)))),
    "an external location without the mark": field(7, field(5, field(13, b"")) + field(1, field(4, b"Relu"))),
    "field 0": field(7, b"") + b"\x00\x00",
    "a long form of a number": field(7, b"\xf8\x82\x00\x01"),
    "ONNX Runtime's own format": b"\x18\x00\x00\x00ORTM" + bytes(40),
    "weights elsewhere in a sparse constant": field(
        7, field(1, field(4, b"Constant") + field(5, field(22, field(1, varint(14 << 3) + varint(1)))))
    ),
    "a default attribute of a function": field(7, b"") + field(25, field(11, field(6, field(1, NODE)))),
}


@pytest.mark.parametrize("raw", HIDDEN.values(), ids=HIDDEN.keys())
def test_nothing_hides_from_it(raw: bytes) -> None:
    with pytest.raises(BundleError, match=r"is not an ONNX file|draws random|another file|own format|sparse weights"):
        onnx_guard.check_operators(raw, "m")


def test_sparse_weights() -> None:
    sparse = onnx.SparseTensorProto(dims=[1])
    graph = helper.make_graph([], "g", [], [], sparse_initializer=[sparse])
    with pytest.raises(BundleError, match="sparse weights are not supported"):
        onnx_guard.check_operators(helper.make_model(graph).SerializeToString(), "m")


@pytest.mark.parametrize("raw", [b"", b"\xff" * 20, b"\x3a\x7f", b"hello world", b"\x3a\x02\x0a\x05", b"\x38\x01"])
def test_no_onnx_file(raw: bytes) -> None:
    with pytest.raises(BundleError, match="m: is not an ONNX file: "):
        onnx_guard.check_operators(raw, "m")


def test_deep_nesting_ends() -> None:
    graph = b""
    for _ in range(40):
        graph = field(1, field(5, field(6, graph)))  # node, attribute, graph
    with pytest.raises(BundleError, match="nested deeper than 32"):
        onnx_guard.check_operators(field(7, graph), "m")


def test_mutations_never_escape(member: Callable[..., object]) -> None:
    """Whatever the bytes: a verdict or a BundleError, no other exception and no hang."""
    raw = (member("mlp-gaussian").bundle / "vae_decoder" / "model.onnx").read_bytes()
    choose = random.Random(1)
    for _ in range(2000):
        changed = bytearray(raw)
        for _ in range(choose.randrange(1, 4)):
            changed[choose.randrange(min(len(raw), 4000))] = choose.randrange(256)
        try:
            onnx_guard.check_operators(bytes(changed[: choose.randrange(len(raw))]), "m")
        except BundleError:
            continue
