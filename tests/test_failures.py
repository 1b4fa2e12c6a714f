"""What fails inside a runner is told in our words: which graph, at which size, in which node, and what to do."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import size_dependent
import zoo
from onnx import numpy_helper
from onnx.helper import make_node
from test_bundle import reseal
from test_modules import spatial, user

import vae_export
from vae_export.contract.bundle import Bundle
from vae_export.errors import BackendError, BundleError, InputError
from vae_export.exporting import sizes
from vae_export.runtimes import VAE, Settings
from vae_export.runtimes.backend import planned
from vae_export.runtimes.cpu.dispatch import CpuBackend
from vae_export.runtimes.failures import failure, words
from vae_export.sources import module

Nodes = Sequence[onnx.NodeProto]
TOOK = "which the model is said to take"

#: By name what is put before the decoder: right for latents of 4 × 6 and, of some, of other sizes.
BAKED: dict[str, tuple[Nodes, dict[str, list[int]]]] = {
    "Split": (
        [
            make_node("Split", ["z", "sizes"], ["a", "b"], axis=3, name="halves"),
            make_node("Concat", ["b", "a"], ["inner"], axis=3),
        ],
        {"sizes": [4, 2]},
    ),
    "Reshape": (
        [
            make_node("Shape", ["z"], ["as it was"]),
            make_node("Reshape", ["z", "shape"], ["flat"], name="flattened"),
            make_node("Reshape", ["flat", "as it was"], ["inner"]),
        ],
        {"shape": [-1, 2, 24]},
    ),
    "Pool": (
        [
            make_node("AveragePool", ["z"], ["inner"], name="pooled", kernel_shape=[3, 5], pads=[1, 2, 1, 2]),
        ],
        {},
    ),
}


@pytest.fixture(scope="module")
def of_any_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spatial") / "spatial.bundle"
    vae_export.export(spatial(), path)
    return path


def with_nodes(bundle: Path, path: Path, nodes: Nodes, constants: dict[str, list[int]]) -> Path:
    """A copy of the bundle with nodes from `z` to `inner` before all others of its decoder."""
    shutil.copytree(bundle, path)
    file = path / "vae_decoder" / "model.onnx"
    graph = (model := onnx.load(file)).graph
    for node in graph.node:
        node.input[:] = ["inner" if name == "z" else name for name in node.input]
    others = [*nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(others)
    for name, values in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array(values), name))
    file.write_bytes(model.SerializeToString())
    reseal(path)
    return path


def on(runner: Any, bundle: Path) -> VAE:
    opened = Bundle(bundle)
    model, (graphs, _) = opened.manifest.model, opened.graphs()
    ways = {name: [planned(graph, runner=runner)] for name, graph in graphs.items()}
    return VAE(model, CpuBackend(ways, model, Settings()), name=opened.manifest.name)


@pytest.mark.parametrize("runner", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("given", [False, True])
def test_a_reshape_that_was_made_for_one_size(
    of_any_size: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], runner: str, given: bool
) -> None:
    with on(runner, with_nodes(of_any_size, tmp_path / "b", *BAKED["Reshape"])) as vae:
        out = np.empty((3, 1, 4, 4), np.float32) if given else None
        with pytest.raises(BundleError) as caught:
            vae.decode(np.zeros((3, 2, 2, 2), np.float32), out=out)
        again = np.zeros((3, 2, 4, 6), np.float32)
        assert vae.decode(again).shape == (3, 1, 8, 12)
    said = str(caught.value)
    assert said.startswith(f"the decoder fails at a batch of 3, height 4, width 4, {TOOK}. {runner} ")
    assert " says: Reshape node 'flattened': " in said
    assert said.endswith(". Take another batch or size, or export the model again without what was made for one size")
    assert "\n" not in said
    assert "src/" not in said
    assert capfd.readouterr() == ("", "")


def test_a_split_that_was_made_for_one_size(of_any_size: Path, tmp_path: Path) -> None:
    bundle = with_nodes(of_any_size, tmp_path / "b", *BAKED["Split"])
    with (
        vae_export.load(bundle) as vae,
        pytest.raises(BundleError, match=r"^the decoder fails at .* 1, height 8, width 16.* Split node 'halves'"),
    ):
        vae.decode(np.zeros((1, 2, 4, 8), np.float32))
    with pytest.raises(BundleError, match=r"the manifest promises that it gives .* and OpenVINO finds .*, 12\)"):
        on("openvino", bundle)


@pytest.mark.parametrize("runner", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("given", [False, True])
def test_results_of_another_shape(of_any_size: Path, tmp_path: Path, runner: str, given: bool) -> None:
    """Also those that are smaller than the memory that was given for them."""
    nodes = [make_node("AveragePool", ["z"], ["inner"], kernel_shape=[3, 3])]
    with on(runner, with_nodes(of_any_size, tmp_path / "b", nodes, {})) as vae:
        out = np.empty((2, 1, 8, 12), np.float32) if given else None
        with pytest.raises(BundleError, match=r"^spatial: the decoder gave shape \(2, 1, 4, 8\); the man"):
            vae.decode(np.zeros((2, 2, 4, 6), np.float32), out=out)


def test_the_certificate_of_a_size_that_fails(of_any_size: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    bundle = with_nodes(of_any_size, tmp_path / "b", *BAKED["Reshape"])
    done: subprocess.CompletedProcess[str] = run("verify", bundle)
    assert done.returncode == 3
    first, last = done.stderr.splitlines()  # what runs, and why it does not
    assert "the bundle's own graphs" in first
    assert last.startswith(
        "error: the decoder fails at a batch of 2, height 4, width 4, which the model is said to take"
    )
    assert (
        ". At height 8, width 12 it runs: it depends on the size that it was traced at. Write sizes as x.shape" in last
    )
    done = run("sample", bundle, "--out", "s.npy", "--size", "height=4,width=4", "--n", "2")
    assert done.returncode == 3
    assert done.stderr.splitlines()[1].startswith("error: the decoder fails at a batch of 2, height 4, width 4, which")
    assert not list(tmp_path.glob("s.npy"))


def test_an_export_whose_graph_fails_at_another_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the trace did not tell, the certificate's other sizes tell."""
    monkeypatch.setattr(sizes, "check_every_size", lambda *arguments: None)
    function, _ = size_dependent.KINDS["a split into parts of a constant"]
    height, width = (2 * size for size in size_dependent.TRACED)
    decoding = zoo.fill(size_dependent.Decoding(function))
    source = module.resolve(user(module=decoding, example=zoo.pictures(1, (1, height, width)), multiple_of=8))
    with pytest.raises(
        InputError, match=r"^export: the decoder fails at a batch of 2, height 8, width 8, .* Write sizes as"
    ):
        vae_export.export(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert "onnxruntime" not in capfd.readouterr().err


SAID = {
    "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while running Split node. Name:'s' "
    "Status Message: Invalid value in 'split'. Split size 4 exceeds the rest.": "Split node 's': Invalid value in "
    "'split'. Split size 4 exceeds the rest",
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape node. Name:'r' Status "
    "Message: /onnxruntime_src/core/reshape_helper.h:84 onnxruntime::ReshapeHelper::ReshapeHelper(const TensorShape&, "
    "bool) size != 0 && (input_shape_size % size) == 0 was false. It cannot be reshaped.\n": "Reshape node 'r': It "
    "cannot be reshaped",
    "Exception from src/infer_request.cpp:224:\nException from src/plugins/intel_cpu/src/node.cpp:794:\n[CPU] AvgPool "
    "node with name 'p' Check 'cmp::le(kernel, length)' failed at src/core/util.hpp:149:\nWhile p\nThe kernel "
    "is larger than the data.\n\n\n": "AvgPool node 'p': The kernel is larger than the data",
    "Exception from src/core.cpp:1:\nno graph\n": "no graph",
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : stopped": "stopped",
    "": "RuntimeError",
}


@pytest.mark.parametrize("said", SAID)
def test_words_of_runners(said: str) -> None:
    assert words(RuntimeError(said)) == SAID[said]


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (
            RuntimeError(
                "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Conv node. Name:'c' "
                "Status Message: /src/bfc_arena.cc:360 void* f(size_t) Failed to allocate memory for requested buffer "
                "of size 9216000000\n"
            ),
            ": openvino 1 asked for 9,216,000,000 bytes more",
        ),
        (
            RuntimeError("[CPU] Conv node with name 'c' failed\nFailed to allocate 128000000 bytes of memory"),
            ": openvino",
        ),
        (MemoryError("Unable to allocate 1 TiB"), ""),
        (RuntimeError("std::bad_alloc"), ""),
    ],
)
def test_no_memory(error: Exception, asked: str) -> None:
    found = failure("encoder", "openvino 1", 2, {"height": 8}, error)
    assert isinstance(found, BackendError)
    assert str(found).startswith(f"not enough memory for the encoder at a batch of 2, height 8{asked}")
    assert str(found).endswith("or load with a smaller micro_batch or with max_memory")


def test_what_names_no_node_is_the_runners() -> None:
    found = failure("encoder", "openvino 1", 2, {}, RuntimeError("broken"))
    assert isinstance(found, BackendError)
    assert "the encoder fails at a batch of 2, which the model is said to take. openvino 1 says: broken. Take" in str(
        found
    )
