"""What only a GPU can show: `make test-gpu`. Each test says what it lacks where it cannot run.

The shared tests of test_runtime.py run there, too, on CUDA and on whichever TensorRT there is.
"""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zoo
from conftest import lacking

import vae_export
from vae_export.building.builder import refit
from vae_export.contract import build_record
from vae_export.errors import BackendError, InputError
from vae_export.numerics import noise
from vae_export.numerics.noise import Normals
from vae_export.runtimes.gpu import driver, flavours

pytestmark = pytest.mark.gpu

TARGETS = ["cuda", "tensorrt", "tensorrt-rtx"]
#: Float32 on two processors, of the largest value.
CLOSE = 2e-5


def near(got: Any, expected: np.ndarray, share: float = CLOSE) -> None:
    got = np.asarray(got)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= share * max(1.0, float(np.abs(expected).max()))


@pytest.fixture
def gpu() -> Any:
    """The device, opened by our own layer."""
    if problem := driver.query().problem:
        pytest.skip(problem)
    from vae_export.runtimes.gpu.device import Gpu

    opened = Gpu("test", "gpu")
    yield opened
    opened.close()


def free_memory() -> int:
    """Bytes that the device has left, once everything that was given back is back."""
    from cuda.bindings import driver

    gc.collect()
    (code,) = driver.cuCtxSynchronize()
    assert int(code) == 0
    code, free, _ = driver.cuMemGetInfo()
    assert int(code) == 0
    return int(free)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_certificates(
    digits: dict[str, Path], placed: Callable[..., Any], target: str, precision: str, likelihood: str
) -> None:
    """Within budget, the ELBO included; and measured again by verify."""
    build = placed(digits[likelihood], f"{target} build", precision=precision)["build"]
    certificate = vae_export.verify(digits[likelihood], build=build)
    certificate.require()
    assert certificate.measured["device"] == "cuda"
    assert certificate.precision == {"fp32": "float32", "fp16": "float16"}[precision]
    assert certificate.check("elbo.bound.max").passed


@pytest.mark.parametrize("place", ["cuda", "tensorrt build", "tensorrt-rtx build"])
@pytest.mark.parametrize("captured", [None, False, True])
def test_cuda_graphs_change_nothing(
    digits: dict[str, Path], placed: Callable[..., Any], place: str, captured: bool | None
) -> None:
    """Every batch from 1 to 70: buckets, fillings, eviction, and two graphs in turns."""
    path = digits["gaussian"]
    with (
        vae_export.load(path, device="cpu") as exact,
        vae_export.load(path, cuda_graphs=captured, **placed(path, place)) as vae,
    ):
        z = noise.normals(1, noise.PRIOR, 0, 70, 8)
        x = exact.sample(70, seed=5)
        for n in (*range(1, 20), 33, 64, 70, 3, 1):
            near(vae.decode(z[:n]), exact.decode(z[:n]))
            near(vae.encode(x[:n]).mean, exact.encode(x[:n]).mean)
            near(vae.sample(n, seed=2, start=n), exact.sample(n, seed=2, start=n))


@pytest.mark.parametrize("place", ["cuda", "cuda build", "tensorrt build", "tensorrt-rtx build"])
def test_arrays_stay_on_the_gpu(digits: dict[str, Path], placed: Callable[..., Any], place: str) -> None:
    """A chain of calls whose results are taken from each other, with no wait of the host between them."""
    path = digits["gaussian"]
    with vae_export.load(path, device="cpu") as exact, vae_export.load(path, **placed(path, place)) as vae:
        for n in (1, 5, 64, 200):
            x = vae.sample(n, seed=1, start=3, on_device=True)
            again = vae.reconstruct(x, seed=2)
            posterior = vae.encode(again)
            z = posterior.sample(seed=3)
            last = vae.decode(z)
            near(x, exact.sample(n, seed=1, start=3))
            on_host = exact.reconstruct(x.numpy(), seed=2)
            near(again, on_host)
            near(posterior.numpy().mean, exact.encode(again.numpy()).mean)
            near(z, posterior.numpy().sample(seed=3), 1e-6)
            near(last, exact.decode(z.numpy()))
        with pytest.raises(InputError, match=r"decode: z has shape \(200, 1, 8, 8\); this bundle expects \(B, 8\)"):
            vae.decode(x)
        with pytest.raises(InputError, match="ask for one of draw and on_device"):
            vae.sample(1, draw=True, on_device=True)


@pytest.mark.parametrize("place", ["cuda", "tensorrt build", "tensorrt-rtx build"])
def test_pytorch_takes_and_gives_without_copies(
    digits: dict[str, Path], placed: Callable[..., Any], place: str
) -> None:
    import torch

    path = digits["gaussian"]
    options = placed(path, place)
    if not torch.cuda.is_available():
        pytest.skip("PyTorch is here without CUDA")
    with vae_export.load(path, device="cpu") as exact, vae_export.load(path, **options) as vae:
        z = torch.randn(16, 8, device="cuda")
        expected = exact.decode(z.cpu().numpy())
        found = torch.from_dlpack(vae.decode(z))
        assert found.is_cuda
        near(found.cpu().numpy(), expected)
        # What is done to the input right after the call comes after it has been read; on the default stream.
        found = vae.decode(z)
        z.zero_()
        near(torch.from_dlpack(found).cpu().numpy(), expected)
        # Work on a stream of one's own: the array is complete when it is used there.
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            z = torch.from_numpy(noise.normals(1, noise.PRIOR, 0, 16, 8)).to("cuda", non_blocking=True)
            total = torch.from_dlpack(vae.decode(z)).double().sum()
        stream.synchronize()
        near(total.item(), np.asarray(exact.decode(z.cpu().numpy()).astype(np.float64).sum()), 1e-4)
        array = vae.sample(4, on_device=True)
        interface = array.__cuda_array_interface__
        assert torch.from_dlpack(array).data_ptr() == interface["data"][0]
        near(torch.as_tensor(array, device="cuda").cpu().numpy(), exact.sample(4))
        for wrong, message in (
            (z.double(), "z has dtype float64 on the GPU; expected float32"),
            (z.t().contiguous().t(), r"z is not contiguous on the GPU; pass z\.contiguous\(\)"),
        ):
            with pytest.raises(InputError, match=message):
                vae.decode(wrong)
        near(vae.decode(z.cpu()), exact.decode(z.cpu().numpy()))


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("place", ["cuda", "tensorrt build", "tensorrt-rtx build"])
def test_sixteen_threads(digits: dict[str, Path], placed: Callable[..., Any], place: str, lanes: int) -> None:
    path = digits["gaussian"]
    with vae_export.load(path, device="cpu") as exact:
        expected = exact.sample(160, seed=9)
    with vae_export.load(path, lanes=lanes, **placed(path, place)) as vae:
        barrier = threading.Barrier(16)

        def work(index: int) -> None:
            barrier.wait()
            for turn in range(20):
                n = 1 + (index + turn) % 10
                near(vae.sample(n, seed=9, start=index * 10), expected[index * 10 : index * 10 + n])
                array = vae.sample(n, seed=9, start=index * 10, on_device=True)
                near(vae.decode(vae.encode(array).mode()), vae.reconstruct(array.numpy()))

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(work, range(16)))


def test_closing_while_calls_wait(digits: dict[str, Path], placed: Callable[..., Any]) -> None:
    """Calls that run end well; calls that wait are told."""
    path = digits["gaussian"]
    vae = vae_export.load(path, **placed(path, "cuda"))
    ended: list[str] = []

    def work(_: int) -> None:
        try:
            for _ in range(10_000):
                vae.sample(64)
        except BackendError as error:
            ended.append(str(error))

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(work, index) for index in range(4)]
        vae.sample(1)
        vae.close()
        for call in running:
            call.result(timeout=60)
    assert ended == ["this VAE was closed; load the bundle again"] * 4
    vae.close()


def test_noise_is_the_hosts(gpu: Any) -> None:
    """Ten million values: integers identical; of a million normals at most one is not bit-equal, and 1 ulp off."""
    stream = gpu.device.create_stream()
    for seed, first, count, size in (
        (0, 0, 10_000, 1000),
        (2**64 - 1, 2**64 - 10, 10, 7),
        (3, 2**63, 5, 1),
        (4, 12345, 100, 8),
        (5, 1, 3, 4097),
    ):
        wanted = Normals(seed, noise.PRIOR, first, (count, size), draw=seed % 3)
        buffer = gpu.allocate(4 * count * size, stream)
        gpu.words(int(buffer.handle), wanted, stream)
        stream.sync()
        words = np.empty((count, size), np.uint32)
        gpu.fetch(words, int(buffer.handle))
        assert np.array_equal(words, noise.words(seed, noise.PRIOR, first, count, size, seed % 3))
        gpu.normals(int(buffer.handle), wanted, stream)
        stream.sync()
        normals = np.empty((count, size), np.float32)
        gpu.fetch(normals, int(buffer.handle))
        buffer.close(stream)
        expected = wanted.numpy()
        differ = normals != expected
        assert differ.sum() <= max(1, 1e-6 * differ.size)
        steps = np.abs(normals.view(np.int32)[differ].astype(np.int64) - expected.view(np.int32)[differ])
        assert (steps <= 1).all()


def test_out_of_memory_is_said_and_survived(digits: dict[str, Path], placed: Callable[..., Any], gpu: Any) -> None:
    path = digits["gaussian"]
    with vae_export.load(path, micro_batch=1 << 22, **placed(path, "cuda")) as vae:
        expected = vae.sample(2)
        hoard = []
        stream = gpu.device.create_stream()
        size = 1 << 36
        while size >= 1 << 24:
            try:
                hoard.append(gpu.allocate(size, stream))
            except BackendError as error:
                assert "is out of memory for" in str(error)  # noqa: PT017 — it is raised again and again
                size //= 2
        with pytest.raises(BackendError, match=r"is out of memory for .* smaller micro_batch or fewer lanes"):
            vae.sample(1 << 22, on_device=True)
        for buffer in hoard:
            buffer.close(stream)
        stream.sync()
        near(vae.sample(2), expected)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["cuda", "tensorrt build", "tensorrt-rtx build"])
def test_a_thousand_loads_leave_no_memory_behind(
    tmp_path: Path, placed: Callable[..., Any], place: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("small") / "small.bundle"
    vae_export.export(zoo.trainer_model("mlp", "bernoulli", widths=(16,), latent=3), path)
    options = placed(path, place)

    def cycle() -> None:
        with vae_export.load(path, **options) as vae:
            vae.sample(3)
            vae.sample(3, on_device=True)

    for _ in range(50):  # contexts, kernels and pools of the process
        cycle()
    before = free_memory()
    for _ in range(1000):
        cycle()
    assert before - free_memory() <= 16 << 20


@pytest.mark.parametrize("target", TARGETS)
def test_auto_takes_the_best_build_and_says_which(
    digits: dict[str, Path], placed: Callable[..., Any], target: str
) -> None:
    path = digits["bernoulli"]
    placed(path, f"{target} build")
    built = vae_export.build(path, target)
    with vae_export.load(path) as vae:
        said = vae.describe()
        assert said["build"] == str(built.path)
        assert said["device"] == "cuda"
        assert said["gpu"] == driver.query().gpus[0].name
    shutil.rmtree(built.path)


def test_without_a_build_auto_takes_cuda(digits: dict[str, Path], placed: Callable[..., Any]) -> None:
    placed(digits["gaussian"], "cuda")
    with vae_export.load(digits["gaussian"]) as vae:
        assert (vae.describe()["provider"], vae.describe()["build"]) == ("CUDAExecutionProvider", None)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_refit(tmp_path: Path, placed: Callable[..., Any], target: str) -> None:
    """Other weights of the same architecture, in the engines of a build; another architecture is refused."""
    if problem := lacking(target):
        pytest.skip(problem)
    paths = [tmp_path / f"{name}.bundle" for name in ("old", "new", "other")]
    for path, scale, widths in zip(paths, (1.0, 0.5, 1.0), ((16,), (16,), (17,)), strict=True):
        source = zoo.trainer_model("mlp", "bernoulli", widths=widths)
        for parameter in source.module.parameters():
            parameter.data *= scale
        vae_export.export(source, path)
    build = placed(paths[0], f"{target} build", refittable=True)["build"]
    refitted = refit(paths[1], build, out=tmp_path / "refitted")
    assert refitted.certificate is not None
    refitted.certificate.require()
    with vae_export.load(paths[1], build=refitted.path) as vae, vae_export.load(paths[1], device="cpu") as exact:
        near(vae.sample(5), exact.sample(5))
    with pytest.raises(InputError, match=r"refit: .* is of another architecture"):
        refit(paths[2], build, out=tmp_path / "never")


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_a_shape_beyond_the_profiles(member: Callable[[str], Any], placed: Callable[..., Any], target: str) -> None:
    bundle = member("spatial-named").bundle
    options = placed(bundle, f"{target} build", batches=(1, 4), sizes=({"height": 16, "width": 16},))
    with vae_export.load(bundle, **options) as vae, vae_export.load(bundle, device="cpu") as exact:
        for n, size in ((1, 16), (3, 8), (9, 12)):
            sizes = {"height": size, "width": size}
            near(vae.sample(n, size=sizes), exact.sample(n, size=sizes))
        with pytest.raises(
            InputError, match=r"decoder: batch 1, height 32, width 32 is in none of the build's profiles"
        ):
            vae.sample(1, size={"height": 32, "width": 32})


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_static_engines_fill_up(digits: dict[str, Path], placed: Callable[..., Any], target: str) -> None:
    path = digits["gaussian"]
    options = placed(path, f"{target} build", batches=(4,), static=True)
    with vae_export.load(path, **options) as vae, vae_export.load(path, device="cpu") as exact:
        for n in (1, 4, 6):
            near(vae.sample(n), exact.sample(n))


def test_an_engine_for_another_gpu_is_refused(digits: dict[str, Path], tmp_path: Path) -> None:
    if problem := lacking("tensorrt-rtx"):
        pytest.skip(problem)
    here = driver.query().gpus[0].capability
    other = "sm86" if here != "8.6" else "sm89"
    built = vae_export.build(digits["gaussian"], f"tensorrt-rtx-{other}", out=tmp_path / "other")
    assert built.certificate is None
    assert f"this machine has {here}" in (built.unmeasured or "")
    with pytest.raises(BackendError, match=rf"built for compute capability .*; this machine has {here}"):
        vae_export.load(digits["gaussian"], build=built.path)


def test_what_was_built_for_another_version_is_built_again(
    digits: dict[str, Path], placed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A build of the cache, as an older TensorRT would have left it."""
    flavour = next((name for name in ("tensorrt", "tensorrt-rtx") if not lacking(name)), None)
    if flavour is None:
        pytest.skip(f"tensorrt: {lacking('tensorrt')}; tensorrt-rtx: {lacking('tensorrt-rtx')}")
    placed(digits["gaussian"], f"{flavour} build")
    monkeypatch.setenv("VAE_EXPORT_CACHE", str(tmp_path / "cache"))
    built = vae_export.build(digits["gaussian"], flavour, batches=(1, 2))
    record = built.record
    assert record.engine is not None
    older = msgspec.structs.replace(record, engine=msgspec.structs.replace(record.engine, version="1.0"))
    (built.path / build_record.RECORD_FORMAT.file).write_bytes(build_record.RECORD_FORMAT.encode(older))
    with pytest.raises(BackendError, match=r"built for .* 1\.0; this machine has"):
        vae_export.load(digits["gaussian"], build=built.path)
    with vae_export.load(digits["gaussian"]) as vae:
        assert vae.describe()["build"] == str(built.path)
        assert vae.describe()["version"] == flavours.load(flavour).version
    assert build_record.BuildFolder(built.path).record.options == record.options
