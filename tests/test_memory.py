"""The budget for memory, and the memory that calls really need."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zoo
from onnx import TensorProto, helper
from test_bundle import reseal
from test_tiling import Recorder, budgeted, cost, images, latents, with_dims

import vae_export
from vae_export.contract.bundle import Bundle
from vae_export.errors import InputError
from vae_export.numerics import noise
from vae_export.runtimes import VAE, open_bundle
from vae_export.runtimes.cpu import arena
from vae_export.runtimes.memory import SAFETY, Budget, parse_bytes

# Most models here see more than a tile; that this is told has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore::vae_export.TileWarning")


@pytest.fixture
def spatial(member: Callable[[str], Any]) -> Any:
    return member("spatial-named")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("512MiB", 512 << 20), ("2GiB", 2 << 30), ("1.5GB", 1_500_000_000), (" 3 kb ", 3000), ("7", 7), (9, 9)),
        *(("1tib", 1 << 40), ("12 B", 12)),
    ],
)
def test_bytes(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "2 gigs", "-1GiB", "GiB", "1e9", 0, -5, 1.5, True, None, "0.1B"])
def test_what_is_no_number_of_bytes(text: Any) -> None:
    with pytest.raises(
        InputError, match=r"load: max_memory is .*; expected bytes, 1 or more, as an integer or as text"
    ):
        parse_bytes(text)


def test_a_budget_makes_slices(spatial: Any) -> None:
    """150 bytes a pixel for the encoder, 300 for the decoder, with the safety factor."""
    assert SAFETY == 1.5
    limit = 320 * 300 * 3  # three examples of the decoder
    vae, recorder = budgeted(spatial, limit, cost(100), cost(200), micro_batch=5)
    plain, _ = budgeted(spatial, None, cost(), cost())
    x, size = images(7, 3, 16, 20), {"height": 16, "width": 20}

    def same(call: Callable[[VAE], Any], *expected: tuple[str, int]) -> None:
        recorder.runs.clear()
        np.testing.assert_allclose(call(vae), call(plain), rtol=1e-5, atol=1e-5)
        assert {(graph, rows) for graph, _, rows in recorder.runs} == set(expected)

    same(lambda vae: vae.encode(x).mean, ("encoder", 5))
    same(lambda vae: vae.decode(latents(7, 4, 4, 5)), ("decoder", 3))
    same(lambda vae: vae.likelihood(latents(7, 4, 4, 5))["sample_logvar"], ("decoder", 3))
    same(lambda vae: vae.reconstruct(x, 4), ("encoder", 5), ("decoder", 3))
    same(lambda vae: vae.sample(7, 2, size=size), ("decoder", 3))
    same(lambda vae: vae.sample(7, 2, size=size, draw=True), ("decoder", 3))
    same(lambda vae: vae.generate(7, 2, size=size) // 2, ("decoder", 3))
    same(lambda vae: vae.interpolate(x, x[::-1], 3), ("encoder", 5), ("decoder", 3))
    same(lambda vae: vae.elbo(x).elbo, ("encoder", 3), ("decoder", 3))
    assert max(shape[0] for _, shape, _ in recorder.runs) == 3
    same(lambda vae: vae.log_likelihood(x, 4), ("encoder", 3), ("decoder", 3))
    assert max(shape[0] for _, shape, _ in recorder.runs) == 3
    assert (vae.describe()["max_memory"], plain.describe()["max_memory"]) == (limit, None)


def test_a_budget_makes_tiles(spatial: Any) -> None:
    """Where not one example fits, the largest tile does, and each graph has its own."""
    limit = 48 * 48 * 150
    vae, recorder = budgeted(spatial, limit, cost(100), cost(200))
    plain, _ = budgeted(spatial, None, cost(), cost())
    x, size = images(2, 3, 80, 120), {"height": 80, "width": 120}
    z = noise.normals(5, noise.PRIOR, 3, 2, 4 * 20 * 30).reshape(2, 4, 20, 30)
    encoded = plain.encode(x, tile=48).mean
    decoded = plain.decode(z, tile=32)
    np.testing.assert_array_equal(vae.encode(x).mean, encoded)
    assert {(shape, rows) for _, shape, rows in recorder.runs if shape[2:] == (48, 48)} == {((1, 3, 48, 48), 1)}
    recorder.runs.clear()
    np.testing.assert_array_equal(vae.decode(z), decoded)
    assert max(shape[2:] for _, shape, _ in recorder.runs) == (8, 8)
    np.testing.assert_array_equal(vae.sample(2, 5, 3, size=size), decoded)
    np.testing.assert_array_equal(vae.reconstruct(x), plain.decode(encoded, tile=32))
    np.testing.assert_allclose(vae.interpolate(x[:1], x[1:], 2)[0], plain.decode(encoded, tile=32), atol=1e-5)
    assert vae.generate(1, size=size).shape == (1, 80, 120, 3)
    # A narrow image has narrow tiles, which may be longer.
    recorder.runs.clear()
    vae.decode(latents(1, 4, 3, 60))
    assert max(shape[3] for _, shape, _ in recorder.runs) == 24
    # What the caller asks for comes first, one example at a time where the budget holds none.
    recorder.runs.clear()
    vae.decode(z, tile=64)
    assert max((shape[2:], rows) for _, shape, rows in recorder.runs) == ((16, 16), 1)


def test_tiles_of_a_budget_are_ones_that_the_model_takes(spatial: Any) -> None:
    model = with_dims(spatial.source.model, min=16)
    vae, recorder = budgeted(spatial, 64 * 64 * 150, cost(100), cost(100), model=model)
    vae.encode(images(1, 3, 100, 100))
    # Tiles of 64 would fit, and leave one of 4 at the edge.
    assert {shape[2] for _, shape, _ in recorder.runs} == {48, 28}


def test_a_budget_that_cannot_be_kept(spatial: Any) -> None:
    x = images(1, 3, 80, 120)
    vae, _ = budgeted(spatial, 32 * 32 * 150 - 1, cost(100), cost(1))
    message = (
        "max_memory is 153,599 bytes, and the encoder needs 153,600 for the smallest tile, of height 32 and width 32"
    )
    with pytest.raises(InputError, match=message):
        vae.encode(x)
    vae, _ = budgeted(spatial, 32 * 32 * 150, cost(100), cost(1))
    vae.encode(x)
    message = (
        "max_memory is 153,600 bytes, and the encoder needs 1,440,000 for one example of height 80 and width 120, "
        "which cannot be cut into tiles here. Load with as much or more"
    )
    for call in (vae.elbo, vae.log_likelihood):
        with pytest.raises(InputError, match=message):
            call(x)
    vae, recorder = budgeted(spatial, 32 * 32 * 150, cost(1), cost(100))
    for call in (
        lambda: vae.likelihood(latents(1, 4, 20, 30)),
        lambda: vae.sample(1, size={"height": 80, "width": 120}, draw=True),
    ):
        with pytest.raises(InputError, match=r"the decoder needs 1,440,000 for one example"):
            call()
    recorder.on_gpu = True
    with pytest.raises(InputError, match=r"max_memory holds no example of this size in the decoder, .* larger max_mem"):
        vae.sample(1, size={"height": 80, "width": 120}, on_device=True)
    fixed, costs = zoo.spatial(named=False).model, {"encoder": cost(constant=10), "decoder": cost(constant=1000)}
    with pytest.raises(InputError, match=r"the decoder needs 1,500 for one example, which cannot be cut"):
        Budget(1499, fixed, costs)
    assert Budget(1500, fixed, costs).rows("decoder", {}) == 1


class Fused(Recorder):
    """A build's graphs: the fused ones are noted and never run."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.graphs = inner.graphs | {"reconstruct", "generate"}

    def run(self, graph: str, inputs: Any, outputs: Any, micro_batch: int, **options: Any) -> list[Any]:
        if graph in ("encoder", "decoder"):
            return super().run(graph, inputs, outputs, micro_batch, **options)
        n, _, height, width = next(iter(inputs.values())).shape
        self.runs.append((graph, (n, 3, height, width), micro_batch))
        if graph == "generate":
            return [np.zeros((n, 4 * height, 4 * width, 3), np.uint8)]
        return [np.zeros((n, 3, height, width), np.float32)]


def test_fused_graphs_give_way_to_tiles(spatial: Any) -> None:
    backend = Fused(open_bundle(Bundle(spatial.bundle), device="cpu").backend)
    model = spatial.source.model
    vae = VAE(model, backend, budget=Budget(48 * 48 * 150, model, {"encoder": cost(100), "decoder": cost(50)}))

    def graphs(call: Callable[[], Any]) -> set[str]:
        backend.runs.clear()
        call()
        return {graph for graph, _, _ in backend.runs}

    assert graphs(lambda: vae.reconstruct(images(2, 3, 24, 48))) == {"reconstruct"}
    assert backend.runs[0][2] == 2  # by the encoder, which needs more
    assert graphs(lambda: vae.reconstruct(images(1, 3, 80, 80))) == {"encoder", "decoder"}
    assert graphs(lambda: vae.reconstruct(images(1, 3, 24, 48), tile=32)) == {"encoder", "decoder"}
    assert graphs(lambda: vae.generate(1, size={"height": 24, "width": 48})) == {"generate"}
    assert backend.runs[0][2] == 4
    assert graphs(lambda: vae.generate(1, size={"height": 80, "width": 80})) == {"decoder"}


def test_load_takes_a_budget(spatial: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="load: max_memory is '2 gigs'"):
        vae_export.load(spatial.bundle, device="cpu", max_memory="2 gigs")
    path = tmp_path / "costs.bundle"
    shutil.copytree(spatial.bundle, path)
    graphs = Bundle(path).manifest.graphs
    # As bundles are that were made before costs were counted.
    reseal(path, graphs={name: msgspec.structs.replace(graph, cost=None) for name, graph in graphs.items()})
    with pytest.raises(
        InputError, match=r"load: max_memory needs .* of the decoder and the encoder. Export the model a"
    ):
        vae_export.load(path, device="cpu", max_memory="2GiB")
    reseal(path, graphs={name: msgspec.structs.replace(graph, cost=cost(100)) for name, graph in graphs.items()})
    x = images(1, 3, 40, 72)
    with vae_export.load(path, device="cpu", max_memory=f"{32 * 32 * 150 / 1000}kB") as vae:
        assert vae.describe()["max_memory"] == 32 * 32 * 150
        np.testing.assert_array_equal(vae.reconstruct(x), vae.reconstruct(x, tile=32))
    with vae_export.load(path, device="cpu") as vae:
        assert vae.describe()["max_memory"] is None


MEASURE = """
import re, sys
import numpy as np, vae_export
vae = vae_export.load(sys.argv[1], device="cpu", threads=1)
z = np.zeros((1, 4, 384, 512), np.float32)
vae.decode(z[:, :, :64, :64])
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
before = peak()
x = vae.decode(z, tile=int(sys.argv[2]) or None)
print(peak() - before - x.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process needed")
def test_memory_grows_with_the_tile(spatial: Any, tmp_path: Path) -> None:
    def needed(tile: int) -> int:
        command = [sys.executable, "-c", MEASURE, str(spatial.bundle), str(tile)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)

    whole, tiled = needed(0), needed(256)
    assert whole > 80 << 20  # eight channels of 1536 × 2048 float32 pixels, at least
    assert tiled < 24 << 20


RELEASE = """
import sys
import numpy as np
from vae_export.contract.bundle import Bundle
from vae_export.runtimes.backend import Settings, planned
from vae_export.runtimes.cpu.dispatch import CpuBackend
from vae_export.runtimes import VAE
bundle = Bundle(sys.argv[1])
plans = {name: [planned(graph, runner=sys.argv[2])] for name, graph in bundle.graphs()[0].items()}
vaes = [VAE(bundle.manifest.model, CpuBackend(plans, bundle.manifest.model, Settings(threads=1))) for _ in range(2)]
z = np.zeros((1, 4, 384, 512), np.float32)
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))
for vae in vaes:
    vae.decode(z[:, :, :16, :16])
    vae.release_memory()
print(resident())
first = vaes[0].decode(z)
print(resident())
vaes[0].release_memory()
print(resident())
vaes[1].decode(z)
vaes[1].close()
print(resident())
np.testing.assert_array_equal(vaes[0].decode(z), first)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process needs")
@pytest.mark.parametrize("runner", ["onnxruntime", "openvino"])
def test_memory_is_released(spatial: Any, tmp_path: Path, runner: str) -> None:
    """When asked for, and when a VAE is closed, whoever still has results; here they are of 36 MiB."""
    command = [sys.executable, "-c", RELEASE, str(spatial.bundle), runner]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    before, full, *after = (int(line) / 2**20 for line in done.stdout.split())
    assert full - before > 36 + 100
    assert len(after) == 2
    assert all(left - before - 36 < (full - before - 36) / 2 for left in after)


def test_the_graph_that_releases_memory_is_the_identity() -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    assert model.SerializeToString() == arena.IDENTITY
