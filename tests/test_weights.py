"""Weights in a file beside their graph: the same results to the bit, and nothing is read but what was verified."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
import zoo
from onnx import TensorProto, helper
from test_bundle import reseal
from test_onnx_reader import field

import vae_export
from vae_export import bench
from vae_export import graph as graphs
from vae_export.contract import onnx_guard
from vae_export.contract.bundle import Bundle
from vae_export.contract.onnx_guard import Weights
from vae_export.errors import BundleError, InputError
from vae_export.exporting import tracing
from vae_export.exporting.layouts import optimum
from vae_export.graph import weights

LIMIT = 2_000
DATA = "model.onnx_data"


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory, member: Callable[..., object]) -> SimpleNamespace:
    """The same model with its weights in its graphs, and beside them."""
    path = tmp_path_factory.mktemp("apart") / "spatial-named.bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "apart", partial(weights.apart, limit=LIMIT))
        vae_export.export(zoo.MEMBERS["spatial-named"](), path)
    return SimpleNamespace(bundle=path, inline=member("spatial-named").bundle)


@pytest.fixture
def copy(apart: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(apart.bundle, tmp_path / "copy.bundle"))


def test_the_same_bits_as_from_one_file(apart: SimpleNamespace) -> None:
    manifest = Bundle(apart.bundle).manifest
    for part, graph in manifest.graphs.items():
        assert graph.weights == f"vae_{part}/{DATA}"
        assert graph.weights in manifest.files
        proto = onnx.load(apart.bundle / graph.file, load_external_data=False)
        sizes = {t.data_location: [] for t in proto.graph.initializer}
        for tensor in onnx.load(apart.bundle / graph.file).graph.initializer:
            location = next(t for t in proto.graph.initializer if t.name == tensor.name).data_location
            sizes[location].append(len(tensor.raw_data))
        assert min(sizes[TensorProto.EXTERNAL]) >= 1024 > max(sizes[TensorProto.DEFAULT])
    x = zoo.pictures(3, (3, 8, 12))
    with vae_export.load(apart.bundle, device="cpu") as ours, vae_export.load(apart.inline, device="cpu") as theirs:
        np.testing.assert_array_equal(ours.encode(x).mean, theirs.encode(x).mean)
        np.testing.assert_array_equal(
            ours.sample(5, size={"height": 8, "width": 4}), theirs.sample(5, size={"height": 8, "width": 4})
        )
    assert vae_export.verify(apart.bundle).passed
    assert not Bundle(apart.inline).manifest.graphs["encoder"].weights


def test_builds_and_layouts_have_the_same_weights(
    apart: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = vae_export.build(apart.bundle, "cpu", out=tmp_path / "build")
    x = zoo.pictures(3, (3, 8, 12))
    with (
        vae_export.load(apart.bundle, build=built.path) as ours,
        vae_export.load(apart.inline, device="cpu") as theirs,
    ):
        np.testing.assert_array_equal(ours.encode(x).mean, theirs.encode(x).mean)
    optimum.optimum(apart.bundle, tmp_path / "inline")
    monkeypatch.setattr(weights, "apart", partial(weights.apart, limit=LIMIT))
    optimum.optimum(apart.bundle, tmp_path / "onnx")
    optimum.optimum(apart.bundle, tmp_path / "onnx", overwrite=True)
    for part in ("vae_encoder", "vae_decoder"):
        assert (tmp_path / "onnx" / part / DATA).is_file()
        assert not (tmp_path / "inline" / part / DATA).exists()
    monkeypatch.setattr(graphs, "write", partial(graphs.write, limit=LIMIT))
    with pytest.raises(
        InputError, match=r"the graph .* has [\d,]+ bytes of weights; one file can have up to 2,000\. Build in fp16"
    ):
        vae_export.build(apart.bundle, "cpu", out=tmp_path / "other")


def test_a_bare_session_takes_them(apart: SimpleNamespace) -> None:
    bare = bench.Bare(apart.bundle)
    cell = bench.Examples(Bundle(apart.bundle)).cell("decode", 2)
    cell.check(bare.results("decode", bare.prepare(cell)()), bare.name)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_changed_file_is_refused(copy: Path, part: str) -> None:
    path = copy / f"vae_{part}" / DATA
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(BundleError, match="its SHA-256 is not the one in the manifest"):
        vae_export.load(copy)
    path.write_bytes(changed[:-1])
    with pytest.raises(BundleError, match="truncated or was changed"):
        vae_export.load(copy)
    path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        vae_export.load(copy)


def test_a_hostile_author_shortens_it(copy: Path) -> None:
    path = copy / "vae_decoder" / DATA
    path.write_bytes(path.read_bytes()[:-1])
    reseal(copy)
    with pytest.raises(BundleError, match=rf"decoder: the weight '.*' ends at byte \d+ of {DATA}, which has \d+"):
        vae_export.load(copy)


@pytest.mark.parametrize("name", ["vae_encoder/nothing", "vae_decoder/model.onnx_data", "vae_encoder/model.onnx"])
def test_the_manifest_names_a_listed_file_of_the_folder(apart: SimpleNamespace, name: str) -> None:
    manifest = Bundle(apart.bundle).manifest
    encoder = msgspec.structs.replace(manifest.graphs["encoder"], weights=name)
    with pytest.raises(ValueError, match="is no other listed file in the graph's folder"):
        msgspec.structs.replace(manifest, graphs=manifest.graphs | {"encoder": encoder}).__post_init__()


def graph(*, kind: int = TensorProto.FLOAT, dims: tuple[int, ...] = (4,), label: str = "w", **said: object) -> bytes:
    """A graph with one weight that lies where `said` says."""
    return helper.make_model(
        helper.make_graph([], "g", [], [], initializer=[tensor(kind, dims, label, said)])
    ).SerializeToString()


def tensor(kind: int, dims: tuple[int, ...], label: str, said: dict[str, object]) -> onnx.TensorProto:
    made = TensorProto(data_type=kind, dims=dims, name=label, data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": DATA, "offset": 0, "length": 16} | said).items():
        if value is not None:
            made.external_data.add(key=key, value=str(value))
    return made


FILE = Weights(DATA, np.arange(8, dtype="<f4").tobytes())


def test_an_array_over_the_verified_bytes() -> None:
    found = onnx_guard.check_operators(graph(offset=8), "m", FILE)["w"]
    assert found.tolist() == [2, 3, 4, 5]
    assert np.shares_memory(found, np.frombuffer(FILE.data, np.uint8))
    assert onnx_guard.check_operators(graph(dims=(2, 2)), "m", FILE)["w"].shape == (2, 2)
    # Dimensions packed into one field.
    packed = field(1, bytes([2, 2])) + tensor(TensorProto.FLOAT, (), "w", {}).SerializeToString()
    assert onnx_guard.check_operators(field(7, field(5, packed)), "m", FILE)["w"].shape == (2, 2)


HOSTILE = {
    "an absolute path": (graph(location="/etc/passwd"), r"is in another file, '/etc/passwd', which is not read"),
    "the folder above": (graph(location=f"../{DATA}"), "is in another file"),
    "a longer way": (graph(location=f"./{DATA}"), "is in another file"),
    "another listed file": (graph(location="config.json"), f"expected '{DATA}'"),
    "beyond the end": (graph(offset=20), rf"ends at byte 36 of {DATA}, which has 32"),
    "a huge offset": (graph(offset=4 * 10**18), "ends at byte"),
    "more digits than a number has": (graph(offset=10**30), "expected non-negative integers"),
    "a negative offset": (graph(offset=-4), r"has offset '-4' and length '16'; expected non-negative integers"),
    "a negative length": (graph(length=-16), "expected non-negative integers"),
    "other digits": (graph(offset="٤"), "expected non-negative integers"),
    "a huge length": (graph(length=1 << 62), r"bytes from byte 0 on, which do not hold \[4\] values of float32"),
    "huge dimensions": (graph(dims=(1 << 62, 1 << 62)), "which do not hold"),
    "a crooked offset": (graph(offset=2), "has 16 bytes from byte 2 on, which do not hold"),
    "no location": (graph(location=None), "must state its file, offset and length, once each and nothing else"),
    "no length": (graph(length=None), "must state its file, offset and length"),
    "another key": (graph(checksum="0"), "must state its file, offset and length"),
    "strings": (graph(kind=TensorProto.STRING), "has the element type 8; external weights may have 1, 2, "),
    "no name": (graph(label=""), "has no name, or the name of another weight"),
}


@pytest.mark.parametrize(("raw", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_where_weights_may_not_lie(raw: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=rf"m: the weight 'w?' .*{message}.*Export the model again"):
        onnx_guard.check_operators(raw, "m", FILE)


def test_weights_of_which_another_reader_would_see_others() -> None:
    weight = tensor(TensorProto.FLOAT, (4,), "w", {})
    twice = helper.make_graph([], "g", [], [], initializer=[weight, weight])
    with pytest.raises(BundleError, match="has no name, or the name of another weight"):
        onnx_guard.check_operators(helper.make_model(twice).SerializeToString(), "m", FILE)
    weight.external_data.add(key="location", value=DATA)
    again = helper.make_graph([], "g", [], [], initializer=[weight])
    with pytest.raises(BundleError, match="must state its file, offset and length"):
        onnx_guard.check_operators(helper.make_model(again).SerializeToString(), "m", FILE)
    both = tensor(TensorProto.FLOAT, (4,), "w", {})
    both.raw_data = bytes(16)
    values = helper.make_graph([], "g", [], [], initializer=[both])
    with pytest.raises(BundleError, match="has the field 9 as well"):
        onnx_guard.check_operators(helper.make_model(values).SerializeToString(), "m", FILE)


def test_only_weights_of_the_main_graph_lie_beside_it() -> None:
    weight = tensor(TensorProto.FLOAT, (4,), "w", {})
    inner = helper.make_graph([], "inner", [], [], initializer=[weight])
    for node in (
        helper.make_node("Constant", [], ["y"], value=weight),
        helper.make_node("If", ["c"], ["y"], then_branch=inner),
    ):
        raw = helper.make_model(helper.make_graph([node], "g", [], [])).SerializeToString()
        with pytest.raises(BundleError, match="weights are in another file, which is not read"):
            onnx_guard.check_operators(raw, "m", FILE)
