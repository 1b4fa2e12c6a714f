"""Results in an array of the caller's, and graphs that were warmed up."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from conftest import PLACES

import vae_export
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import Cost, Model
from vae_export.errors import InputError
from vae_export.numerics import noise
from vae_export.runtimes import VAE, open_backend, open_bundle
from vae_export.runtimes.gpu.lanes import GpuBackend
from vae_export.runtimes.memory import Budget

Call = Callable[..., np.ndarray]
SIZE = {"height": 16, "width": 24}


def examples(model: Model, count: int, size: tuple[int, ...] = (3, 16, 24)) -> np.ndarray:
    low, high = model.data.range
    return (zoo.pictures(count, size) * (high - low) + low).astype(np.float32)


def latents(count: int, *shape: int) -> np.ndarray:
    return noise.normals(4, noise.PRIOR, 0, count, int(np.prod(shape))).reshape(count, *shape)


def verbs(vae: VAE, n: int) -> dict[str, Call]:
    """Every method that takes `out`, on n examples of the spatial members."""
    size = SIZE if vae.model.data.named() else None
    x, z = examples(vae.model, n), latents(n, 4, 4, 6)
    return {
        "decode": lambda **o: vae.decode(z, **o),
        "sample": lambda **o: vae.sample(n, seed=1, size=size, **o),
        "sample, drawn": lambda **o: vae.sample(n, seed=1, size=size, draw=True, **o),
        "generate": lambda **o: vae.generate(n, seed=1, size=size, **o),
        "reconstruct": lambda **o: vae.reconstruct(x, **o),
        "reconstruct, drawn": lambda **o: vae.reconstruct(x, seed=3, **o),
    }


def check(name: str, call: Call) -> None:
    """The same as without, in the array that was given and nowhere else."""
    expected = call()
    whole = np.full((len(expected) + 2, *expected.shape[1:]), 77, expected.dtype)
    out = whole[1:-1]
    assert call(out=out) is out, name
    assert np.array_equal(out, expected), name
    assert (whole[[0, -1]] == 77).all(), name


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("micro_batch", "n"), [(2, 5), (64, 70)])
@pytest.mark.parametrize("name", ["spatial", "spatial-named"])
def test_results_are_written_to_out(
    member: Any, placed: Callable[..., Any], place: str, micro_batch: int, n: int, name: str
) -> None:
    """Slices of which the last is smaller, small ones that are copied and large ones that are not."""
    bundle = member(name).bundle
    with vae_export.load(bundle, micro_batch=micro_batch, **placed(bundle, place)) as vae:
        for verb, call in verbs(vae, n).items():
            check(verb, call)


def test_vectors_and_encoders_without_variance(member: Any) -> None:
    with vae_export.load(member("plain").bundle) as vae:
        x = examples(vae.model, 70, (12,))
        for call in (lambda **o: vae.reconstruct(x, **o), lambda **o: vae.decode(latents(70, 3), **o)):
            check("plain", call)


@pytest.mark.filterwarnings("ignore::vae_export.TileWarning")
def test_tiles_and_padding(member: Any) -> None:
    bundle = member("spatial-named").bundle
    with vae_export.load(bundle, device="cpu", micro_batch=2) as vae:
        x, z = examples(vae.model, 3, (3, 48, 80)), latents(3, 4, 12, 20)
        check("decode, tiles", lambda **o: vae.decode(z, tile=32, **o))
        check("reconstruct, tiles", lambda **o: vae.reconstruct(x, tile=32, **o))
        for shape in ((3, 15, 23), (3, 16, 24)):  # what grows, and what need not
            odd = examples(vae.model, 3, shape)
            check("reconstruct, padded", lambda odd=odd, **o: vae.reconstruct(odd, pad=True, **o))
        check("a tensor, padded", lambda **o: vae.reconstruct(torch.from_numpy(x), pad=True, **o))
    flat = Cost(multiply_adds=(0.0, 0.0, 0.0), activations=(0.0, 10.0, 0.0))
    budget = Budget(15 * 40 * 64, vae.model, {"encoder": flat, "decoder": flat})
    tiled = VAE(vae.model, open_bundle(Bundle(bundle), device="cpu").backend, budget=budget)
    check("decode, max_memory", lambda **o: tiled.decode(z, **o))
    check("sample, max_memory", lambda **o: tiled.sample(2, size={"height": 48, "width": 80}, **o))


def test_latents_as_diffusion_has_them(exported: Callable[..., Any]) -> None:
    with vae_export.load(exported("kl-sd15")[0]) as vae:
        check("decode, scaled", lambda **o: vae.decode(latents(2, 4, 4, 6), scaled=True, **o))


def test_no_other_array_is_allocated(member: Any) -> None:
    """ONNX Runtime writes large results to the caller's memory itself."""

    def peak(call: Call, **options: Any) -> tuple[np.ndarray, int]:
        tracemalloc.start()
        try:
            return call(**options), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    with vae_export.load(member("spatial").bundle, device="cpu", micro_batch=64) as vae:
        decode = verbs(vae, 100)["decode"]
        expected, allocated = peak(decode)
        assert allocated > expected.nbytes
        out = np.empty_like(expected)
        result, allocated = peak(decode, out=out)
        assert result is out
        assert allocated < expected.nbytes / 10
        assert np.array_equal(out, expected)


def test_a_file_that_is_mapped(member: Any, tmp_path: Path) -> None:
    with vae_export.load(member("spatial").bundle, device="cpu", micro_batch=2) as vae:
        expected = vae.sample(5)
        out = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, expected.shape)
        assert vae.sample(5, out=out) is out
        out.flush()
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected)


GOOD = np.empty((2, 1, 8, 8), np.float32)
READ_ONLY = GOOD.copy()
READ_ONLY.flags.writeable = False
UNALIGNED = np.zeros(GOOD.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(GOOD.shape)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (
            [1.0],
            r"out is a list; expected a NumPy array\. Pass numpy\.empty\(\(2, 1, 8, 8\), numpy\.float32\) or the like",
        ),
        (torch.empty(2, 1, 8, 8), r"out is a Tensor; expected a NumPy array"),
        (np.ma.masked_array(GOOD), r"out is a MaskedArray; expected a NumPy array"),
        (GOOD[:1], r"out has shape \(1, 1, 8, 8\), and the result has \(2, 1, 8, 8\)\. Pass numpy\.empty"),
        (GOOD.reshape(2, 64), r"out has shape \(2, 64\), and the result has \(2, 1, 8, 8\)"),
        (GOOD.astype(np.float64), r"out has dtype <f8, and the result is float32\. Pass numpy\.empty"),
        (GOOD.astype(">f4"), r"out has dtype >f4, and the result is float32"),
        (READ_ONLY, r"out is read-only, and the result is written there\. Pass numpy\.empty"),
        (
            GOOD.transpose(0, 1, 3, 2),
            r"out is not C-contiguous and aligned, which .*\. Pass numpy\.empty",
        ),
        (np.empty((4, 1, 8, 8), np.float32)[::2], r"out is not C-contiguous and aligned"),
        (UNALIGNED, r"out is not C-contiguous and aligned"),
    ],
)
def test_arrays_that_cannot_be_written_to(digits: dict[str, Path], out: Any, message: str) -> None:
    with vae_export.load(digits["bernoulli"], device="cpu") as vae:
        x, z = np.full(GOOD.shape, 0.5, np.float32), latents(2, 8)
        calls = {
            "decode": lambda: vae.decode(z, out=out),
            "sample": lambda: vae.sample(2, out=out),
            "reconstruct": lambda: vae.reconstruct(x, out=out),
        }
        for verb, call in calls.items():
            with pytest.raises(InputError, match=f"{verb}: {message}"):
                call()


def test_pictures_are_bytes(digits: dict[str, Path]) -> None:
    with vae_export.load(digits["bernoulli"], device="cpu") as vae:
        check("generate", lambda **o: vae.generate(2, **o))
        with pytest.raises(
            InputError, match=r"generate: out has dtype <f4, and the result is uint8\. Pass numpy\.empty"
        ):
            vae.generate(2, out=np.empty((2, 8, 8, 1), np.float32))
        with pytest.raises(
            InputError, match=r"generate: out has shape \(2, 1, 8, 8\), and the result has \(2, 8, 8, 1"
        ):
            vae.generate(2, out=np.empty((2, 1, 8, 8), np.uint8))


def test_the_input_is_not_written_over(digits: dict[str, Path], member: Any) -> None:
    x = np.full((3, 1, 8, 8), 0.5, np.float32)
    with vae_export.load(digits["bernoulli"], device="cpu") as vae:
        with pytest.raises(InputError, match=r"reconstruct: out shares memory with the input, .* Pass another array"):
            vae.reconstruct(x, out=x)
        with pytest.raises(InputError, match=r"reconstruct: out shares memory"):
            vae.reconstruct(x[:2], out=x[1:])
        with pytest.raises(InputError, match=r"reconstruct: out shares memory"):
            vae.reconstruct(torch.from_numpy(x), out=x)
        check("a neighbour", lambda out=None: vae.reconstruct(x[:1], out=out))
        expected = vae.reconstruct(x[:1])
        assert np.array_equal(vae.reconstruct(x[:1], out=x[1:2]), expected)
    memory = np.zeros(2 * 12, np.float32)
    vae = vae_export.load(member("plain").bundle, device="cpu")
    with vae, pytest.raises(InputError, match=r"decode: out shares memory with the input"):
        vae.decode(memory[10:16].reshape(2, 3), out=memory.reshape(2, 12))


class OnGpu:
    """What an array on a GPU shows of itself."""

    shape, dtype, ndim = (2, 8), np.dtype(np.float32), 2

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def test_results_on_a_gpu_have_no_array_of_the_host(digits: dict[str, Path]) -> None:
    bundle = Bundle(digits["bernoulli"])
    graphs = bundle.graphs()[0]
    model = bundle.manifest.model
    backend = open_backend(graphs, model, device="cpu")
    backend.on_gpu = True  # type: ignore[misc]
    vae = VAE(model, backend)
    for call in (lambda: vae.sample(2, on_device=True, out=GOOD), lambda: vae.generate(2, on_device=True, out=GOOD)):
        with pytest.raises(
            InputError, match=r"out is an array of the host, and on_device leaves .* the GPU\. Drop one"
        ):
            call()
    for verb, array in (("decode", OnGpu(2, 8)), ("reconstruct", OnGpu(2, 1, 8, 8))):
        message = rf"{verb}: . lies on a GPU, where the result stays, and out is an array of the host\. Drop out, or"
        with pytest.raises(InputError, match=message):
            getattr(vae, verb)(array, out=GOOD)
    with pytest.raises(InputError, match=r"decode: out is a OnGpu; expected a NumPy array"):
        vae.decode(latents(2, 8), out=OnGpu(2, 1, 8, 8))


# Warming up


class Warmed:
    """A backend that notes what is warmed, and runs it."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.graphs, self.on_gpu = inner, inner.graphs, inner.on_gpu
        self.warmed: list[tuple[str, tuple[int, ...]]] = []

    def warm(self, graph: str, inputs: Any, outputs: Any, micro_batch: int) -> None:
        self.warmed.append((graph, tuple(next(iter(inputs.values())).shape)))
        for value in inputs.values():
            values = value.numpy() if isinstance(value, noise.Normals) else value
            assert len(np.unique(values)) > values.size / 2
        self.inner.warm(graph, inputs, outputs, micro_batch)


def warmed(bundle: Path, **options: Any) -> tuple[VAE, Warmed]:
    opened = open_bundle(Bundle(bundle), build=options.pop("build", None), device="cpu")
    backend = Warmed(opened.backend)
    return VAE(Bundle(bundle).manifest.model, backend, **options), backend


def test_every_graph_is_run_at_every_batch(member: Any, placed: Callable[..., Any]) -> None:
    bundle = member("spatial").bundle
    vae, backend = warmed(bundle, **placed(bundle, "cpu build"))
    assert backend.graphs == {"encoder", "decoder", "reconstruct", "generate", "score"}
    assert vae.warmup([4, 1, 4]) is None
    x, z = (3, 16, 24), (4, 4, 6)
    shapes = {"encoder": x, "decoder": z, "reconstruct": x, "generate": z, "score": x}
    assert sorted(backend.warmed) == sorted((graph, (n, *shape)) for graph, shape in shapes.items() for n in (1, 4))
    vae, backend = warmed(bundle)
    vae.warmup()
    assert sorted(backend.warmed) == [("decoder", (1, *z)), ("encoder", (1, *x))]


@pytest.mark.filterwarnings("ignore::vae_export.TileWarning")
def test_named_sizes_and_tiles_are_warmed(member: Any, placed: Callable[..., Any]) -> None:
    """Where max_memory holds no example, one tile of it, and no fused graph: the methods use none."""
    bundle = member("spatial-named").bundle
    flat = Cost(multiply_adds=(0.0, 0.0, 0.0), activations=(0.0, 10.0, 0.0))
    model = member("spatial-named").source.model
    budget = Budget(15 * 40 * 64, model, {"encoder": flat, "decoder": flat})
    vae, backend = warmed(bundle, budget=budget, **placed(bundle, "cpu build"))
    vae.warmup((2,), size=SIZE)
    assert {graph for graph, _ in backend.warmed} == backend.graphs
    assert ("encoder", (2, 3, 16, 24)) in backend.warmed
    backend.warmed.clear()
    vae.warmup((2,), size={"height": 64, "width": 96})
    assert sorted(graph for graph, _ in backend.warmed) == ["decoder", "encoder"]
    tiles = dict(backend.warmed)
    assert np.prod(tiles["encoder"][2:]) <= 40 * 64
    assert np.prod(tiles["decoder"][2:]) * 16 <= 40 * 64
    with pytest.raises(InputError, match=r"size: this model takes height .*; got \{\}"):
        vae.warmup()


@pytest.mark.parametrize("batches", [(), (0,), (1, -1), ("1",), 3, None, (1.5,)])
def test_batches_that_are_none(digits: dict[str, Path], batches: Any) -> None:
    message = r"warmup: batches is .*; expected numbers from 1 on, such as \(1, 8\)"
    with vae_export.load(digits["bernoulli"], device="cpu") as vae, pytest.raises(InputError, match=message):
        vae.warmup(batches)


@pytest.mark.parametrize("place", PLACES)
def test_warming_up_changes_nothing(digits: dict[str, Path], placed: Callable[..., Any], place: str) -> None:
    bundle = digits["bernoulli"]
    with vae_export.load(bundle, **placed(bundle, place)) as vae:
        expected = vae.sample(5)
        vae.warmup((1, 5, 100))
        assert np.array_equal(vae.sample(5), expected)


class FakeLane:
    """A lane that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, *_: Any, **__: Any) -> list[Any]:
        self.runs += 1
        return []

    def close(self) -> None:
        """Nothing is held."""


def test_all_lanes_are_warmed(monkeypatch: pytest.MonkeyPatch, digits: dict[str, Path]) -> None:
    """Each once, although a lone caller is always given the same one."""
    from vae_export.runtimes import Settings
    from vae_export.runtimes.gpu import lanes

    made: list[FakeLane] = []

    def make(*_: Any) -> FakeLane:
        made.append(FakeLane())
        return made[-1]

    class FakeGpu:
        name = "none"

        def close(self) -> None:
            """Nothing is held."""

    monkeypatch.setattr(lanes, "Lane", make)
    gpu: Any = FakeGpu()
    model = Bundle(digits["bernoulli"]).manifest.model
    executor: Any = None
    backend = GpuBackend(gpu, model, ("encoder", "decoder"), executor, Settings(lanes=3), None, {})
    backend.run("decoder", {}, ("sample",), 64)
    assert sorted(lane.runs for lane in made) == [0, 0, 1]
    VAE(model, backend).warmup()
    assert sorted(lane.runs for lane in made) == [2, 2, 3]
    backend.close()
