"""Builds: made whole, found in the cache, and refused in words before an engine is opened."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zoo
from quick import PATIENT, QUICK, measured_as
from test_bundle import reseal
from test_cli import Run, failed, succeeded

import vae_export
from vae_export import timing
from vae_export.building import mixed_precision
from vae_export.contract import build_record, cache
from vae_export.contract.build_record import RECORD_FORMAT, Build, BuildFolder, Engine, Options
from vae_export.contract.bundle import Bundle
from vae_export.errors import BackendError, BundleError, InputError
from vae_export.graph.rewrites import select
from vae_export.runtimes import compatibility, processor
from vae_export.runtimes.compatibility import Machine
from vae_export.runtimes.cpu.dispatch import CpuBackend
from vae_export.runtimes.gpu import driver, flavours

#: What is built from where the kind of model does not matter.
NAME = "mlp-gaussian"
RTX = "tensorrt-rtx-sm86"
NO_GPU = driver.query().problem
no_gpu = pytest.mark.skipif(NO_GPU is None, reason="this machine has a GPU: what happens without one cannot be tested")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for each test."""
    monkeypatch.setenv("VAE_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bundle(member: Callable[[str], Any]) -> Path:
    path: Path = member(NAME).bundle
    return path


@pytest.fixture(scope="module")
def made(member: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., vae_export.Built]:
    """A build of `NAME` for a target, made once: not to be changed."""
    found: dict[tuple[Any, ...], vae_export.Built] = {}

    def get(target: str, **options: Any) -> vae_export.Built:
        if target.startswith("tensorrt-rtx"):
            try:
                flavours.load("tensorrt-rtx")
            except BackendError as error:
                pytest.skip(f"no engines can be built here: {error}")
            options = {"batches": [1, 4], **options}
        key = (target, *map(str, options.items()))
        if key not in found:
            out = tmp_path_factory.mktemp("builds") / target
            found[key] = vae_export.build(member(NAME).bundle, target, out=out, **options)
        return found[key]

    return get


@pytest.fixture
def copy(made: Callable[..., vae_export.Built], tmp_path: Path) -> Callable[[str], Path]:
    """A build that may be broken."""

    def get(target: str) -> Path:
        return Path(shutil.copytree(made(target).path, tmp_path / f"copy-{target}"))

    return get


def rewrite(path: Path, **changes: Any) -> None:
    """Change a build's record, and seal it as it is now: what a hostile author would do."""
    record = msgspec.structs.replace(BuildFolder(path).record, **changes)
    (path / RECORD_FORMAT.file).write_bytes(RECORD_FORMAT.encode(record))


# Builds for ONNX Runtime


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", "float32"), ("fp16", "float16")])
def test_a_build_for_the_cpu(bundle: Path, made: Any, precision: str, tolerance: str) -> None:
    built = made("cpu", precision=precision)
    assert built.unmeasured is None
    assert built.certificate.passed
    assert built.certificate.precision == tolerance
    names = {"encoder", "decoder", "reconstruct", "generate", "score"}
    record = built.record
    ways = {variant.file for graph in record.graphs.values() for variant in graph.variants}
    assert {p.name for p in built.path.iterdir()} == {*ways, "build.json", "verification.json"}
    assert set(record.graphs) == names
    asked = Options(precision=precision, passes=select(None))
    assert (record.target, record.engine, record.options) == ("cpu", None, asked)
    assert record.manifest == Bundle(bundle).manifest.digest
    assert all(record.files[g.file].sha256 == g.onnx_sha256 for g in record.graphs.values())
    again = vae_export.verify(bundle, build=built.path)
    assert again.passed
    assert again.precision == tolerance
    assert [(c.id, c.measured) for c in again.checks] == [(c.id, c.measured) for c in built.certificate.checks]
    assert "levels of 255" in {check.unit for check in again.checks}


def test_a_precision_that_was_read_from_somewhere(bundle: Path, tmp_path: Path) -> None:
    """Equal to the default, but another object."""
    built = vae_export.build(bundle, "cpu", out=tmp_path / "out", precision="".join(["fp", "32"]))
    assert built.record.options == Options(passes=select(None))


def test_load_uses_the_build_that_it_is_given(bundle: Path, made: Any) -> None:
    path = made("cpu", precision="fp16").path
    with vae_export.load(bundle, build=path) as vae, vae_export.load(bundle, device="cpu") as plain:
        facts = vae.describe()
        assert (facts["build"], facts["precision"], facts["passed_over"]) == (str(path), "float16", {})
        assert (plain.describe()["build"], plain.describe()["precision"]) == (None, "float32")
        low, full = vae.sample(5, seed=1), plain.sample(5, seed=1)
        assert 0 < np.abs(low - full).max() <= 1e-2 * np.abs(full).max()
        assert np.abs(vae.generate(5, seed=1).astype(int) - plain.generate(5, seed=1)).max() <= 2


@no_gpu
def test_load_finds_the_build_in_the_cache(bundle: Path, own_cache: Path) -> None:
    folder = own_cache / "builds" / Bundle(bundle).manifest.digest
    built = vae_export.build(bundle, "cpu")
    assert built.path == folder / "cpu"
    for device in ("auto", "cpu"):
        with vae_export.load(bundle, device=device) as vae:
            facts = vae.describe()
        assert (facts["build"], facts["precision"]) == (str(built.path), "float32")
        assert facts["passed_over"] == ({"cuda": NO_GPU} if device == "auto" else {})
    # One in the cache is replaced by the next of its precision, and by no other.
    assert vae_export.build(bundle, "cpu").path == built.path
    low = vae_export.build(bundle, "cpu", precision="fp16")
    assert low.path == folder / "cpu-fp16"
    assert cache.cached_slots(Bundle(bundle).manifest) == ["cpu", "cpu-fp16"]
    with vae_export.load(bundle) as vae:
        assert vae.describe()["build"] == str(built.path)


# What runs is what was asked for

#: Those of `VAE.describe` that say what runs.
RUNS = ("precision", "build", "passed_over")


@no_gpu
def test_a_lower_precision_is_used_where_it_is_asked_for(
    bundle: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a build in a lower precision a plain load gives the bits that it gave before."""
    with vae_export.load(bundle) as vae:
        before = vae.sample(7, seed=1)
    low = vae_export.build(bundle, "cpu", precision="fp16").path
    why = "it computes in float16: precision='fp16' takes it"
    for choice in ({}, {"build": False}, {"precision": "fp32"}):
        with vae_export.load(bundle, device="cpu", **choice) as vae:
            passed_over = {} if "build" in choice else {"build cpu-fp16": why}
            assert [vae.describe()[name] for name in RUNS] == ["float32", None, passed_over]
            assert np.array_equal(vae.sample(7, seed=1), before)
    with vae_export.load(bundle, device="cpu", precision="fp16") as vae:
        assert [vae.describe()[name] for name in RUNS] == ["float16", str(low), {}]
        assert not np.array_equal(vae.sample(7, seed=1), before)
    exact = vae_export.build(bundle, "cpu").path
    with vae_export.load(bundle, device="cpu") as vae:
        assert [vae.describe()[name] for name in RUNS] == ["float32", str(exact), {}]
        with_build = vae.sample(7, seed=1)
    vae_export.build(bundle, "cpu", precision="fp16")
    with vae_export.load(bundle) as vae, vae_export.load(bundle, build=False) as own:
        assert np.array_equal(vae.sample(7, seed=1), with_build)
        assert own.describe()["build"] is None
        assert np.array_equal(own.sample(7, seed=1), before)
    # The bundle's own graphs are what verify measures, and a build where one is named.
    assert vae_export.verify(bundle).precision == "float32"
    assert vae_export.verify(bundle, build=low).precision == "float16"
    # A user's default is a preference, and an argument goes before it.
    monkeypatch.setenv("VAE_EXPORT_PRECISION", "fp16")
    with vae_export.load(bundle) as vae, vae_export.load(bundle, precision="fp32") as plain:
        assert (vae.describe()["build"], plain.describe()["build"]) == (str(low), str(exact))
    with vae_export.load(bundle, build=exact) as vae:
        assert vae.describe()["build"] == str(exact)
    assert vae_export.verify(bundle).precision == "float32"
    shutil.rmtree(low)
    with vae_export.load(bundle) as vae:
        assert vae.describe()["build"] == str(exact)
        said = vae.describe()["passed_over"]["precision fp16"]
    assert said.startswith("VAE_EXPORT_PRECISION asks for it. load: precision is fp16, and the cache has no build of ")


@no_gpu
def test_after_a_build_in_lower_precision_a_plain_load_is_as_before(bundle: Path, own_cache: Path) -> None:
    """To the bit, and the lower precision is there for whoever asks for it."""
    exact = vae_export.build(bundle, "cpu").path
    with vae_export.load(bundle) as vae:
        x = np.clip(vae.sample(3), 0, 1)
        before = vae.sample(7, seed=1), vae.encode(x).mean
    built = vae_export.build(bundle, "cpu", precision="fp16", batches=[8])
    assert built.path == exact.with_name("cpu-fp16")
    assert (built.record.in_words(), built.record.exact) == ("float16", False)
    assert set(built.record.held_to.values()) == {"float16"}
    with vae_export.load(bundle) as vae:
        assert [vae.describe()[name] for name in RUNS] == ["float32", str(exact), {"cuda": NO_GPU}]
        after = vae.sample(7, seed=1), vae.encode(x).mean
    assert all(map(np.array_equal, before, after))
    with vae_export.load(bundle, precision="fp16") as vae:
        assert [vae.describe()[name] for name in RUNS] == ["float16", str(built.path), {"cuda": NO_GPU}]
        assert not np.array_equal(vae.sample(7, seed=1), before[0])


def test_after_a_build_in_auto_a_plain_load_is_as_before(
    digits: dict[str, Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, even where the least exact that passes was chosen: here it is the fastest."""
    trained = digits["gaussian"]
    with vae_export.load(trained) as vae:
        x = np.clip(vae.sample(3), 0, 1)
        before = vae.sample(7, seed=1), vae.encode(x).mean
    with monkeypatch.context() as patch:
        patch.setattr(timing, "measure", measured_as({"fp32": 1.0, "bf16": 0.8, "int8": 0.5}))
        built = vae_export.build(trained, "cpu", precision="auto", batches=[8], search=PATIENT)
    assert built.path.name == "cpu-auto"
    assert not built.record.exact
    with vae_export.load(trained) as vae:
        assert [vae.describe()[name] for name in RUNS[:2]] == ["float32", None]
        after = vae.sample(7, seed=1), vae.encode(x).mean
    assert all(map(np.array_equal, before, after))
    with vae_export.load(trained, precision="auto") as vae:
        assert [vae.describe()[name] for name in RUNS[:2]] == [built.record.in_words(), str(built.path)]
        asked = vae.sample(7, seed=1), vae.encode(x).mean
    assert not all(map(np.array_equal, before, asked))


def test_an_auto_build_that_stayed_in_float32_holds_its_certificate(bundle: Path, own_cache: Path) -> None:
    """It is headed by what runs, and a plain load may take it."""
    search = dataclasses.replace(QUICK, precisions=("fp32",))
    built = vae_export.build(bundle, "cpu", precision="auto", batches=[8], search=search)
    assert built.certificate is not None
    assert built.certificate.precision == "float32"
    assert built.record.exact
    assert vae_export.verify(bundle, build=built.path).precision == "float32"
    with vae_export.load(bundle, device="cpu") as vae:
        assert vae.describe()["build"] == str(built.path)


@pytest.mark.parametrize("place", ["cpu", "cpu-int8", "cpu-auto"])
def test_what_a_build_computes_in_is_read_from_its_record(bundle: Path, made: Any, own_cache: Path, place: str) -> None:
    """Builds of earlier versions lie in the slot of their target, whatever their precision."""
    cache.check_cache()
    path = cache.cached(Bundle(bundle).manifest, place)
    shutil.copytree(made("cpu", precision="fp16").path, path)
    with vae_export.load(bundle, device="cpu") as plain, vae_export.load(bundle, precision="fp16") as vae:
        assert plain.describe()["build"] is None
        assert vae.describe()["build"] == str(path)


def test_an_unmeasured_build_is_not_used_by_itself(bundle: Path, made: Any, own_cache: Path) -> None:
    """As engines are that were made where they could not run."""
    cache.check_cache()
    path = cache.cached(Bundle(bundle).manifest, "cpu")
    shutil.copytree(made("cpu").path, path)
    record = BuildFolder(path).record
    rewrite(path, files={name: file for name, file in record.files.items() if name != build_record.CERTIFICATE})
    with vae_export.load(bundle, device="cpu") as vae:
        assert vae.describe()["build"] is None
        assert vae.describe()["passed_over"]["build cpu"].startswith(
            "it was made where it could not run, and never measured: vae-export verify --build measures it here; build="
        )
    with vae_export.load(bundle, build=path) as vae:
        assert vae.describe()["notes"][0].startswith("it was made where it could not run")


def test_what_cannot_be_asked_for(bundle: Path, made: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made("cpu", precision="fp16").path
    nothing = (
        rf"load: precision is int8, and the cache has no build of {bundle} in it for cpu\. Run: vae-export build "
        rf"{bundle} --target cpu --precision int8; or drop precision, for float32"
    )
    for choice, message in (
        ({"precision": "half"}, "load: precision is 'half'; expected auto, fp32, tf32, fp16, bf16, int8"),
        ({"precision": "int8", "device": "cpu"}, nothing),
        ({"build": True}, "load: build is True; expected the folder of a build, False for none, or None to choose"),
        (
            {"build": False, "precision": "auto"},
            r"takes the bundle's own graphs in float32, and precision is auto\. Drop",
        ),
        ({"build": path, "precision": "fp32"}, r"is a build in fp16 \(float16\), and precision is fp32\. Drop one"),
        ({"build": path, "precision": "auto"}, r"is a build in fp16 \(float16\), and precision is auto\. Drop one"),
    ):
        with pytest.raises(InputError, match=message):
            vae_export.load(bundle, **choice)
    with vae_export.load(bundle, build=path, precision="fp16") as vae:
        assert vae.describe()["build"] == str(path)
    monkeypatch.setenv("VAE_EXPORT_PRECISION", "half")
    with pytest.raises(
        InputError, match="load: the environment variable VAE_EXPORT_PRECISION is 'half'; expected auto"
    ):
        vae_export.load(bundle)


def test_a_broken_build_that_is_asked_for_is_an_error(bundle: Path, made: Any, own_cache: Path) -> None:
    cache.check_cache()
    path = cache.cached(Bundle(bundle).manifest, "cpu-fp16")
    shutil.copytree(made("cpu", precision="fp16").path, path)
    (path / "decoder.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="It is truncated or was changed"):
        vae_export.load(bundle, device="cpu", precision="fp16")


# Builds know their processor

HASWELL = build_record.Processor(
    model="Haswell", architecture="x86_64", features=("avx", "avx2", "f16c", "fma"), cores=4
)
ZEN = build_record.Processor(
    model="Zen", architecture="x86_64", features=("avx2", "avx512_bf16", "avx512_vnni", "bf16", "fma", "vnni"), cores=2
)


def lowered(path: Path, precision: str, **changes: Any) -> Build:
    """The record of a build whose decoder is said to be in a precision."""
    record = BuildFolder(path).record
    graph = record.graphs["decoder"]
    variants = tuple(msgspec.structs.replace(v, precision=precision, **changes) for v in graph.variants)
    graphs = record.graphs | {"decoder": msgspec.structs.replace(graph, variants=variants)}
    return msgspec.structs.replace(record, graphs=graphs, processor=ZEN)


def test_a_build_has_its_processor(bundle: Path, made: Any, copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = made("cpu").record
    assert record.processor == processor.processor()
    assert compatibility.elsewhere(record, processor.processor()) is None
    path = copy("cpu")
    rewrite(path, processor=ZEN)
    monkeypatch.setattr(processor, "processor", lambda: HASWELL)
    with vae_export.load(bundle, build=path) as vae:  # float32 is right on every processor
        (note, *_) = vae.describe()["notes"]
        assert vae.describe()["precision"] == "float32"
    assert note == (
        "measured on Zen (x86_64, 2 cores), and this is Haswell (x86_64, 4 cores): its graphs are right here, too, but "
        "its certificate is from there (vae-export verify --build measures it here), and another choice may be faster "
        "(vae-export build makes it)"
    )
    more = msgspec.structs.replace(ZEN, cores=8, threads=16)
    found = compatibility.elsewhere(BuildFolder(path).record, more)
    assert found == "measured with 2 cores, 1 thread, and here are 8 cores, 16 threads: another choice may be faster"


def test_what_needs_an_instruction_that_is_missing_is_refused(
    bundle: Path, copy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy("cpu")
    monkeypatch.setattr(processor, "processor", lambda: HASWELL)
    eight = lowered(path, "int8", requires=("vnni",))
    assert compatibility.unfit(eight, ZEN) is None
    assert compatibility.unfit(lowered(path, "int8"), HASWELL) is None  # 7 bits, which overflow nowhere
    old = msgspec.structs.replace(lowered(path, "int8"), processor=None)  # versions that knew 8 bits alone
    sums = (
        "the decoder computes in int8 and needs vnni (sums of 8-bit products that do not overflow), which Haswell does"
    )
    for record in (eight, old):
        assert compatibility.unfit(record, HASWELL) == f"{sums} not have"
    half = "the decoder computes in bf16 and needs bf16 (products of bfloat16), which Haswell does not have"
    assert compatibility.unfit(lowered(path, "bf16"), HASWELL) == half
    unknown = compatibility.unfit(lowered(path, "fp32", requires=("amx2", "vnni")), HASWELL)
    assert unknown is not None
    assert "needs amx2 (not known here) and vnni (" in unknown
    for record, words in ((eight, sums), (lowered(path, "bf16"), half)):
        options = msgspec.structs.replace(record.options, precision="auto")
        rewrite(path, graphs=record.graphs, processor=ZEN, options=options)

        def opened(*_: Any) -> None:
            raise AssertionError("no runner may open a graph that is refused")

        with monkeypatch.context() as patch:
            patch.setattr(CpuBackend, "__init__", opened)
            with pytest.raises(BackendError) as caught:
                vae_export.load(bundle, build=path)
        assert words in str(caught.value)
        remedy = f"Run: vae-export build {bundle} --target cpu --precision auto, or load without it"
        assert str(caught.value).endswith(remedy)
        assert caught.value.exit_code == 4


@pytest.mark.skipif(
    not shutil.which("qemu-x86_64") or os.uname().machine != "x86_64", reason="there is no emulator qemu-x86_64 here"
)
def test_an_emulated_processor_refuses_eight_bits(bundle: Path, copy: Any, tmp_path: Path) -> None:
    """A Haswell has no VNNI, whatever it is emulated on: no array is written."""
    path = copy("cpu")
    rewrite(path, graphs=lowered(path, "int8", requires=("vnni",)).graphs)
    python = ["qemu-x86_64", "-cpu", "Haswell", os.path.realpath(sys.executable), "-m", "vae_export"]
    command = [*python, "sample", str(bundle), "--build", str(path), "--out", "a.npy"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    failed(done, 4, "the decoder computes in int8 and needs vnni (sums of 8-bit products that do not overflow), which ")
    assert not (tmp_path / "a.npy").exists()


def test_records_of_earlier_versions_are_read(copy: Any) -> None:
    """They name neither a processor nor what they need."""
    path = copy("cpu")
    rewrite(path, processor=None)
    text = (path / RECORD_FORMAT.file).read_text()
    assert '"processor"' not in text
    assert "requires" not in text
    assert BuildFolder(path).record.exact


def test_other_kernels_for_other_batches_are_told(bundle: Path, copy: Any) -> None:
    """Latents are the same bits, and what is decoded of them is to rounding."""
    path = copy("cpu")
    record = BuildFolder(path).record
    graph = record.graphs["decoder"]
    last = msgspec.structs.replace(graph.variants[-1], max_batch=None, exact=())
    one = {**record.graphs, "decoder": msgspec.structs.replace(graph, variants=(last,))}
    for ways in ((last,), (msgspec.structs.replace(last, max_batch=2, threads=1), last)):
        rewrite(path, graphs=one | {"decoder": msgspec.structs.replace(graph, variants=ways)})
        with vae_export.load(bundle, build=path) as vae:
            said = [note for note in vae.describe()["notes"] if "kernels" in note]
            assert any("decoder" in note for note in said) == (len(ways) > 1)
            assert len(ways) == 1 or "are the same bits at every batch" in said[0]
            whole, part = vae.sample(16), vae.sample(2, start=5)
            np.testing.assert_allclose(whole[5:7], part, atol=4e-6 * np.abs(whole).max())


def test_steps_are_told(bundle: Path, tmp_path: Path) -> None:
    told: list[str] = []
    vae_export.build(bundle, "cpu", out=tmp_path / "b", progress=lambda step, share=None: told.append(step))
    steps = [step for step in told if not step.startswith("the machine is busy")]
    graphs = ("encoder", "decoder", "generate", "reconstruct", "score")
    assert steps[:6] == [*(f"measuring the {name}" for name in graphs), "measuring the certificate"]
    assert sorted(steps[6:-1]) == [f"measuring the {name} against its parts" for name in graphs[2:]]
    assert steps[-1] == "writing the build"


def test_every_kind_of_model(member: Any, tmp_path: Path) -> None:
    """Vectors, whose autoencoder has neither variance nor pictures, and named sizes."""
    for name, kind, graphs in (("plain", "fp16", 3), ("spatial-named", "fp32", 5)):
        built = vae_export.build(member(name).bundle, "cpu", out=tmp_path / name, precision=kind)
        assert built.certificate is not None
        assert built.certificate.passed
        assert len(built.record.graphs) == graphs


def test_a_build_that_differs_too_much_is_not_written(member: Any, tmp_path: Path) -> None:
    """The golden examples are those of a model that is not the bundle's."""
    import onnx

    path = Path(shutil.copytree(member(NAME).bundle, tmp_path / "b"))
    model = onnx.load(path / "vae_decoder" / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.5, tensor.name))
    (path / "vae_decoder" / "model.onnx").write_bytes(model.SerializeToString())
    reseal(path)
    with pytest.raises(vae_export.VerificationError, match="differs from its reference"):
        vae_export.build(path, "cpu", out=tmp_path / "out")
    nothing = (
        r"nothing of .* passes in fp16: .*the decoder .*every node would have to stay in.* Build with --precision "
    )
    with pytest.raises(vae_export.VerificationError, match=nothing):
        vae_export.build(path, "cpu", out=tmp_path / "out", precision="fp16")
    assert not (tmp_path / "out").exists()


# Builds for TensorRT for RTX


@no_gpu
def test_an_engine_for_a_gpu_that_is_not_here(bundle: Path, made: Any) -> None:
    built = made(RTX)
    assert built.certificate is None
    assert built.unmeasured == NO_GPU
    assert {p.name for p in built.path.iterdir()} == {*(f"{n}.engine" for n in built.record.graphs), "build.json"}
    engine = built.record.engine
    assert (engine.capabilities, engine.gpu, engine.driver) == (("8.6",), None, None)
    assert engine.version == flavours.load("tensorrt-rtx").version
    assert [str(p) for p in built.record.options.profiles] == ["batch 1 to 1", "batch 2 to 4"]
    with pytest.raises(
        BackendError, match=r"built for compute capability 8\.6; this machine has no GPU \(.*\)\. Run: "
    ):
        vae_export.load(bundle, build=built.path)


@no_gpu
def test_an_engine_in_the_cache_is_no_reason_not_to_run(bundle: Path, made: Any, own_cache: Path) -> None:
    place = cache.cached(Bundle(bundle).manifest, RTX)
    cache.check_cache()
    shutil.copytree(made(RTX).path, place)
    assert cache.cached_slots(Bundle(bundle).manifest) == [RTX]
    with vae_export.load(bundle) as vae:
        assert vae.describe()["build"] is None
        assert vae.describe()["passed_over"] == {"cuda": NO_GPU}
    with pytest.raises(
        BackendError, match=r"needs ONNX Runtime's CUDAExecutionProvider|no NVIDIA driver|no usable GPU"
    ):
        vae_export.load(bundle, device="cuda")


def test_named_sizes_have_profiles_of_their_own(member: Any, tmp_path: Path, made: Any) -> None:
    made(RTX)
    sizes = [{"height": 8, "width": 8}, {"height": 16, "width": 32}]
    built = vae_export.build(member("spatial-named").bundle, RTX, out=tmp_path / "b", batches=[2], sizes=sizes)
    assert [p.sizes for p in built.record.options.profiles] == [
        {"height": (4, 8, 8), "width": (4, 8, 8)},
        {"height": (4, 16, 16), "width": (4, 32, 32)},
    ]
    # None asked for takes the golden examples'.
    built = vae_export.build(member("spatial-named").bundle, RTX, out=tmp_path / "c", batches=[2], static=True)
    assert [p.sizes for p in built.record.options.profiles] == [{"height": (16, 16, 16), "width": (24, 24, 24)}]
    assert built.record.options.profiles[0].batch == (2, 2, 2)


@pytest.mark.parametrize("batches", [np.array([1, 4]), [np.int64(2)], range(1, 3)])
def test_batches_may_be_of_numpy(bundle: Path, tmp_path: Path, made: Any, batches: Any) -> None:
    made(RTX)
    built = vae_export.build(bundle, RTX, out=tmp_path / "b", batches=batches)
    assert [p.batch[2] for p in built.record.options.profiles] == [int(batch) for batch in batches]


@no_gpu
def test_a_refittable_engine_needs_a_gpu(bundle: Path, tmp_path: Path, made: Any) -> None:
    made(RTX)
    message = (
        r"TensorRT for RTX \S+ does not build the encoder in fp32\. A refittable engine needs a GPU where it is built"
    )
    with pytest.raises(BackendError, match=message):
        vae_export.build(bundle, RTX, out=tmp_path / "b", batches=[1], refittable=True)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("tpu", {}, "build: target is 'tpu'; expected cpu, cuda, tensorrt, tensorrt-rtx, or tensorrt-rtx-smNN for a"),
        ("cpu", {"precision": "int4"}, "build: precision is 'int4'; expected auto, fp32, fp16, bf16, int8"),
        ("cpu", {"budget": "auto"}, "build: budget is 'auto'; expected fp32, fp16, bf16, int8"),
        ("cuda", {"precision": "int8"}, r"target cuda does not take int8 \(int8: it is measured on the CPU only\)"),
        (RTX, {"precision": "auto"}, rf"target {RTX} does not take auto \(auto: it is measured on the CPU only\)"),
        ("cpu", {"seconds": 0.0}, r"build: seconds is 0\.0; expected a number above 0"),
        ("cpu", {"seconds": float("nan")}, "build: seconds is nan; expected a number above 0"),
        ("cpu", {"passes": "folds"}, "graph passes: there is none called 'folds'; expected all, none"),
        ("cpu", {"tf32": True}, r"target cpu does not take tf32 \(tf32: TF32 is a GPU's\)"),
        ("cpu", {"nhwc": True}, r"target cpu does not take nhwc \(nhwc: it is ONNX Runtime's on CUDA\)"),
        ("cpu", {"static": True}, r"does not take static \(static: it is an option of TensorRT engines\)"),
        ("cpu", {"sizes": [{"height": 8}]}, r"size: this model takes no sizes; got \{'height': 8\}"),
        ("cpu", {"sizes": [{"h": 8}] * 2}, r"does not take size \(size: the CPU is measured at one size\)"),
        ("cpu", {"batches": [0]}, r"build: batches are \[0\]; expected numbers from 1 on"),
        ("cuda", {"sizes": [{"h": 8}]}, r"target cuda does not take size \(size: it takes all sizes\)"),
        ("cuda", {"refittable": True}, r"target cuda does not take refittable \(refittable: it is an option of Tens"),
        ("cuda", {"static": True, "sizes": [{"h": 8}]}, "target cuda does not take static, size "),
        (RTX, {"nhwc": True}, rf"target {RTX} does not take nhwc \(nhwc: it is ONNX Runtime's on CUDA\)"),
        ("tensorrt", {"nhwc": True}, "target tensorrt does not take nhwc"),
        (RTX, {"batches": []}, r"build: batches are \[\]; expected numbers from 1 on"),
        (RTX, {"batches": [0]}, r"build: batches are \[0\]; expected numbers from 1 on"),
        (RTX, {"batches": [4, -1]}, r"build: batches are \[-1, 4\]; expected numbers from 1 on"),
        (RTX, {"sizes": [{"height": 8}]}, r"size: this model takes no sizes; got \{'height': 8\}"),
        (
            "tensorrt-rtx-sm10",
            {},
            r"build: TensorRT for RTX \S+ builds for sm75, .*sm120.*; target is tensorrt-rtx-sm10",
        ),
    ],
)
def test_bad_arguments(bundle: Path, target: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vae_export.build(bundle, target, **options)


@pytest.mark.parametrize("batches", [[1.5], ["4"]])
def test_batches_that_are_no_integers(bundle: Path, batches: Any, made: Any) -> None:
    made(RTX)
    with pytest.raises(InputError, match=r"build: batches are .*; expected numbers from 1 on"):
        vae_export.build(bundle, RTX, batches=batches)


# Where a build goes


def test_a_bundle_is_never_changed(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"b lies inside the bundle, which is never changed\. Choose a path outside"):
        vae_export.build(bundle, "cpu", out=bundle / "deep" / "b")
    assert not (bundle / "deep").exists()


def test_what_is_there_stays(bundle: Path, copy: Any, tmp_path: Path) -> None:
    path = copy("cpu")
    with pytest.raises(InputError, match=r"exists already\. Choose another path, or overwrite it on purpose"):
        vae_export.build(bundle, "cpu", out=path)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds files that are not the build's: notes\.txt\. Move them away"):
        vae_export.build(bundle, "cpu", out=path, overwrite=True)
    (path / "notes.txt").unlink()
    before = BuildFolder(path).record.options.precision
    built = vae_export.build(bundle, "cpu", out=path, precision="fp16", overwrite=True)
    assert (before, built.record.options.precision) == ("fp32", "fp16")
    strangers = tmp_path / "precious"
    strangers.mkdir()
    (strangers / "thesis.txt").write_text("…")
    with pytest.raises(InputError, match="precious exists and is not a whole build"):
        vae_export.build(bundle, "cpu", out=strangers, overwrite=True)
    with pytest.raises(InputError, match="exists and is not a whole build"):
        vae_export.build(bundle, "cpu", out=Path(shutil.copytree(bundle, tmp_path / "bundle")), overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="exists and is not a folder"):
        vae_export.build(bundle, "cpu", out=tmp_path / "file", overwrite=True)
    assert (strangers / "thesis.txt").read_text() == "…"


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.cache() == tmp_path / "cache"
    for value in (None, ""):
        monkeypatch.delenv("VAE_EXPORT_CACHE") if value is None else monkeypatch.setenv("VAE_EXPORT_CACHE", value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        if sys.platform == "linux":
            assert cache.cache() == tmp_path / "xdg" / "vae_export"
        assert cache.check_cache() == cache.cache()
        assert cache.cache().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o702])
def test_a_cache_that_is_open_to_others(bundle: Path, own_cache: Path, mode: int) -> None:
    vae_export.build(bundle, "cpu")
    own_cache.chmod(mode)
    message = (
        r"cache: the cache belongs to another user or is open to others, who could put native code there\. Run: chmod"
    )
    with pytest.raises(BackendError, match=message):
        vae_export.build(bundle, "cpu")
    with vae_export.load(bundle, device="cpu") as vae:
        assert vae.describe()["build"] is None
        assert "is open to others" in vae.describe()["passed_over"]["build cpu"]


KILLED = """
import sys
from vae_export import build
build(sys.argv[1], "tensorrt-rtx-sm86", batches=[4], progress=lambda step: print(step, flush=True))
"""


@pytest.mark.parametrize("step", ["building the decoder", "writing the build"])
def test_a_killed_build_leaves_none(member: Any, made: Any, step: str) -> None:
    made(RTX)
    path = member("resnet").bundle
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.strip() == step for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    manifest = Bundle(path).manifest
    if cache.cached(manifest, RTX).exists():  # the last rename came first
        assert step == "writing the build"
        BuildFolder(cache.cached(manifest, RTX)).graphs()
    else:
        assert cache.cached_slots(manifest) == []


# Damage


def damaged(path: Path, bundle: Path, message: str) -> None:
    """Neither loaded nor shown, with the words of a broken build."""
    with pytest.raises(BundleError, match=message) as caught:
        vae_export.load(bundle, build=path)
    assert caught.value.exit_code == 3


BROKEN = (
    r"its SHA-256 is not the one in the build's record|build\.json is not a build's record|was changed after the build|"
    r"build\.json: |build\.json has version"
)


@pytest.mark.parametrize("target", ["cpu", RTX])
def test_one_bit_flipped_anywhere_is_refused(bundle: Path, copy: Any, target: str) -> None:
    path = copy(target)
    choose = random.Random(0)
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for _ in range(200 if file.suffix == ".json" else 40):
            changed = bytearray(original)
            changed[choose.randrange(len(original))] ^= 1 << choose.randrange(8)
            file.write_bytes(changed)
            damaged(path, bundle, BROKEN)
        file.write_bytes(original)
    BuildFolder(path).graphs()


@pytest.mark.parametrize("name", ["decoder.engine", "build.json"])
def test_truncated_missing_and_linked(bundle: Path, copy: Any, tmp_path: Path, name: str) -> None:
    path = copy(RTX)
    file = path / name
    original = file.read_bytes()
    for size in (0, 1, len(original) // 2, len(original) - 1):
        file.write_bytes(original[:size])
        damaged(
            path, bundle, "is not a build's record|was changed" if "json" in name else "It is truncated or was changed"
        )
    file.write_bytes(original + b"\n")
    damaged(path, bundle, "was changed")
    file.unlink()
    damaged(path, bundle, r"cannot be read: No such file or directory\. Build it again \(vae-export build\)")
    (tmp_path / "outside").write_bytes(original)
    file.symlink_to(tmp_path / "outside")
    damaged(path, bundle, rf"{name} is a symbolic link\. Copy the build with its files instead")
    file.unlink()
    os.link(tmp_path / "outside", file)
    damaged(path, bundle, "is a hard link, so that it can be changed from outside the build")


def test_an_unlisted_file_is_never_read(bundle: Path, copy: Any) -> None:
    path = copy("cpu")
    (path / "extra.engine").write_bytes(b"\0" * 100)
    assert BuildFolder(path).unlisted() == ["extra.engine"]
    with vae_export.load(bundle, build=path) as vae:
        assert vae.describe()["build"] == str(path)


def test_no_build_at_all(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"nothing does not exist; expected the folder of a build \(vae-export build mak"
    ):
        vae_export.load(bundle, build=tmp_path / "nothing")
    damaged(bundle, bundle, r"build\.json: cannot be read: No such file or directory\. Build it again")


OPEN = """
import sys
import vae_export
try:
    vae_export.load(sys.argv[1], build=sys.argv[2])
except vae_export.VaeExportError as error:
    print(type(error).__name__, error)
print(sorted(name for name in sys.modules if name.endswith(("runtimes.trt", "tensorrt_rtx_bindings", "torch"))))
"""


@no_gpu
def test_nothing_of_a_broken_engine_is_deserialized(bundle: Path, copy: Any) -> None:
    """The module that opens engines, and TensorRT itself, are not even imported."""
    path = copy(RTX)
    content = bytearray((path / "generate.engine").read_bytes())
    content[100] ^= 1
    (path / "generate.engine").write_bytes(content)
    command = [sys.executable, "-c", OPEN, str(bundle), str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("BundleError ")
    assert "generate.engine: its SHA-256 is not the one in the build's record: it was damaged or changed" in said
    assert said.endswith("\n[]\n")


def test_a_build_of_another_bundle(member: Any, made: Any, tmp_path: Path) -> None:
    built = made("cpu")
    path = tmp_path / f"{NAME}.bundle"
    with pytest.raises(BundleError) as caught:
        vae_export.load(member("mlp-bernoulli").bundle, build=built.path)
    ours, theirs = Bundle(member("mlp-bernoulli").bundle).manifest.digest, built.record.manifest
    assert str(caught.value) == (
        f"{built.path}: built from bundle {NAME} with manifest {theirs[:12]}…; this bundle, mlp-bernoulli, has "
        f"manifest {ours[:12]}…: its decoder and encoder changed since. Run: vae-export build BUNDLE --target cpu"
    )
    # The same model with other weights at the same place; and the same weights, exported again.
    source = zoo.MEMBERS[NAME]()
    for parameter in source.module.decoder.parameters():
        parameter.data *= 0.75
    vae_export.export(source, path)
    with pytest.raises(
        BundleError, match=rf"built from bundle {NAME} .*this bundle, {NAME}, .*: its decoder changed since"
    ):
        vae_export.load(path, build=built.path)
    shutil.rmtree(path)
    shutil.copytree(member(NAME).bundle, path)
    reseal(path, created="2026-01-01T00:00:00+00:00")
    with pytest.raises(
        BundleError, match=rf"this bundle, {NAME}, .*: it was exported again since\. Run: vae-export build"
    ):
        vae_export.load(path, build=built.path)


@no_gpu
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_broken_build_in_the_cache_is_passed_over(bundle: Path, device: str) -> None:
    path = vae_export.build(bundle, "cpu").path
    (path / "decoder.onnx").write_bytes((path / "decoder.onnx").read_bytes()[:-1])
    with vae_export.load(bundle, device=device) as vae:
        facts = vae.describe()
        assert len(vae.sample(2)) == 2
    assert (facts["build"], facts["precision"]) == (None, "float32")
    assert "decoder.onnx: has" in facts["passed_over"]["build cpu"]
    assert "It is truncated or was changed. Build it again (vae-export build)" in facts["passed_over"]["build cpu"]
    damaged(path, bundle, "It is truncated or was changed")
    (path / RECORD_FORMAT.file).write_bytes(b"{")
    with vae_export.load(bundle, device=device) as vae:
        assert "is not a build's record" in vae.describe()["passed_over"]["build cpu"]


def test_a_device_that_is_not_the_builds(bundle: Path, made: Any) -> None:
    with pytest.raises(InputError, match=r"device is 'cuda', and .* is a build for cpu\. Drop one"):
        vae_export.load(bundle, device="cuda", build=made("cpu").path)
    with pytest.raises(InputError, match=rf"device is 'cpu', and .* is a build for {RTX}\. Drop one"):
        vae_export.load(bundle, device="cpu", build=made(RTX).path)


def test_a_hostile_graph_in_a_build_is_refused(bundle: Path, copy: Any) -> None:
    import onnx

    from vae_export.contract import folders

    path = copy("cpu")
    model = onnx.load(path / "generate.onnx")
    model.graph.node.append(onnx.helper.make_node("RandomNormal", [], ["noise"], shape=[1]))
    (path / "generate.onnx").write_bytes(model.SerializeToString())
    listed = {name: file for name, file in folders.list_files(path).items() if name != RECORD_FORMAT.file}
    (path / RECORD_FORMAT.file).write_bytes(
        RECORD_FORMAT.encode(msgspec.structs.replace(BuildFolder(path).record, files=listed))
    )
    damaged(path, bundle, "generate: the graph draws random numbers")


# Refit


def test_what_cannot_be_refitted(bundle: Path, made: Any) -> None:
    for target in ("cpu", RTX):
        with pytest.raises(InputError, match=r"was not built with --refittable: its weights are fixed\. Build anew"):
            vae_export.refit(bundle, made(target).path)


@no_gpu
def test_refit_of_another_architecture_and_elsewhere(member: Any, bundle: Path, copy: Any, tmp_path: Path) -> None:
    path = copy(RTX)
    options = msgspec.structs.replace(BuildFolder(path).record.options, refittable=True)
    rewrite(path, options=options)
    message = (
        r"is of another architecture: its encoder and decoder and reconstruct and generate differ in more than weights"
    )
    with pytest.raises(InputError, match=message):
        vae_export.refit(member("linear").bundle, path, out=tmp_path / "out")
    with pytest.raises(BackendError, match=r"built for compute capability 8\.6; this machine has no GPU"):
        vae_export.refit(bundle, path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Whether an engine runs here

PLATFORM = driver.this_platform()


def this(engine: Engine, **changes: Any) -> Machine:
    """A machine that an engine runs on, but for some changes."""
    fields: dict[str, Any] = {
        "platform": engine.platform, "flavours": {engine.flavour: engine.version}, "capability": "8.6", "gpu": "A10",
    }  # fmt: skip
    return Machine(**fields | changes)


MISSING = BackendError("TensorRT for RTX is not installed. Run: pip install 'vae-export[rtx]'")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"gpu": "RTX 3090"}, None),
        ({"capability": "8.9", "gpu": "L4"}, "built for compute capability 8.6; this machine has 8.9 (L4)"),
        (
            {"capability": None, "gpu": "no NVIDIA driver: x"},
            "built for compute capability 8.6; this machine has no GPU (no NVIDIA driver: x)",
        ),
        (
            {"flavours": {"tensorrt-rtx": "1.0.0.1"}},
            "built for TensorRT for RTX {version}; this machine has 1.0.0.1",
        ),
        (
            {"flavours": {"tensorrt-rtx": MISSING}},
            "built for TensorRT for RTX {version}; this machine has none: TensorRT for RTX is not installed. Run: pip "
            "install 'vae-export[rtx]'",
        ),
        ({"platform": "windows amd64"}, f"built for {PLATFORM}; this machine is windows amd64"),
        # What can be changed least is named last.
        ({"platform": "windows amd64", "capability": "8.9"}, f"built for {PLATFORM}; this machine is windows amd64"),
    ],
)
def test_whether_an_engine_runs_here(made: Any, changes: dict[str, Any], words: str | None) -> None:
    engine = made(RTX).record.engine
    assert engine.platform == PLATFORM
    found = compatibility.mismatch(engine, this(engine, **changes))
    assert found == (words and words.format(version=engine.version))


def test_a_flavour_that_was_not_asked_for(made: Any) -> None:
    engine = made(RTX).record.engine
    found = compatibility.mismatch(engine, this(engine, flavours={"tensorrt": engine.version}))
    assert found == f"built for TensorRT for RTX {engine.version}; this machine has none: None"


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_an_engine_for_all_gpus(bundle: Path, made: Any, tmp_path: Path, precision: Any) -> None:
    made(RTX)
    built = vae_export.build(bundle, "tensorrt-rtx", out=tmp_path / "b", batches=[1], precision=precision)
    engine = built.record.engine
    assert engine is not None
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(engine.capabilities)
    assert "7.5" not in engine.capabilities  # Turing, for which TensorRT for RTX has no float32 products
    for capability in engine.capabilities:
        assert compatibility.mismatch(engine, this(engine, capability=capability)) is None
    assert "this machine has 9.9" in str(compatibility.mismatch(engine, this(engine, capability="9.9")))


def test_what_turing_cannot_do_comes_with_advice(bundle: Path, made: Any, tmp_path: Path) -> None:
    made(RTX)
    with pytest.raises(
        BackendError, match=r"does not build the encoder in fp32\. .*--precision fp16.* It says: .*Turing"
    ):
        vae_export.build(bundle, "tensorrt-rtx-sm75", out=tmp_path / "b", batches=[1])


@no_gpu
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "1.0.0.1"}, r"built for TensorRT for RTX 1\.0\.0\.1; this machine has \d"),
        ({"platform": "windows amd64"}, "built for windows amd64; this machine is "),
        ({"capabilities": ("8.9", "12.0")}, r"built for compute capability 8\.9, 12\.0; this machine has no GPU"),
    ],
)
def test_an_engine_for_another_machine_is_not_opened(
    bundle: Path, copy: Any, change: dict[str, Any], words: str
) -> None:
    path = copy(RTX)
    engine = BuildFolder(path).record.engine
    assert engine is not None
    rewrite(path, engine=msgspec.structs.replace(engine, **change))
    message = rf"copy-{RTX}: {words}.* Run: vae-export build {bundle} --target {RTX}"
    with pytest.raises(BackendError, match=message) as caught:
        vae_export.load(bundle, build=path)
    assert caught.value.exit_code == 4


def test_an_engine_of_a_flavour_that_is_not_installed(bundle: Path, copy: Any) -> None:
    if not isinstance(driver.this_machine("tensorrt").flavours["tensorrt"], BackendError):
        pytest.skip("TensorRT is installed here: its absence cannot be tested")
    path = copy(RTX)
    engine = BuildFolder(path).record.engine
    assert engine is not None
    rewrite(path, target="tensorrt", engine=msgspec.structs.replace(engine, flavour="tensorrt", version="11.1.0"))
    message = r"built for TensorRT 11\.1\.0; this machine has none: TensorRT is not installed\. Run: pip install"
    with pytest.raises(BackendError, match=message):
        vae_export.load(bundle, build=path)


# The command line


def test_build_on_the_command_line(run: Run, bundle: Path, tmp_path: Path, own_cache: Path) -> None:
    said = succeeded(run("build", bundle, "--target", "cpu", "--precision", "fp16", "--seconds", "0.01"))
    place = cache.cached(Bundle(bundle).manifest, "cpu-fp16")
    assert f"{place} is written, and verified" in said
    assert "It computes in float16: load takes it with precision='fp16' (--precision fp16)" in said
    assert "build for cpu" in said
    assert "end to end" in said
    assert "FAILED" not in said
    assert "builds in the cache" in succeeded(run("inspect", bundle))
    assert json.loads(succeeded(run("inspect", bundle, "--json")))["builds"] == ["cpu-fp16"]
    shown = succeeded(run("inspect", place))
    assert all(part in shown for part in ("build for cpu", "fp16", f"{NAME}, manifest"))
    plain = json.loads(succeeded(run("inspect", place, "--json")))
    assert (plain["kind"], plain["target"], plain["unlisted"]) == ("build", "cpu", [])
    assert "measured on" in shown
    low = run("verify", bundle, "--target", "cpu", "--precision", "fp16", "--json")
    assert json.loads(succeeded(low))["precision"] == "float16"
    assert low.stderr.startswith(f"float16, build {place}, ")
    own = run("verify", bundle, "--json")
    assert json.loads(succeeded(own))["precision"] == "float32"
    assert own.stderr.startswith("float32, the bundle's own graphs, onnxruntime ")
    both = run("verify", bundle, "--build", place, "--precision", "fp16")
    failed(both, 2, "verify: name one of --build and --target (or --precision)")
    none = run("verify", bundle, "--target", "cuda")
    failed(
        none, 2, f"the cache has no build for cuda in fp32. Run: vae-export build {bundle} --target cuda --precision"
    )
    none = run("verify", bundle, "--target", "cpu")
    failed(none, 2, "verify: the cache has no build for cpu in fp32; it has one in fp16 (--precision). Run: vae-export")
    succeeded(run("sample", bundle, "--build", place, "--out", "a.npy", "--n", 3, "--seed", 1))
    with vae_export.load(bundle, build=place) as vae:
        assert np.array_equal(np.load(tmp_path / "a.npy"), vae.sample(3, seed=1))
    (place / "encoder.onnx").write_bytes(b"")
    failed(run("verify", bundle, "--precision", "fp16"), 3, "It is truncated or was changed. Build it again")
    failed(run("inspect", place), 3, "It is truncated or was changed")


@no_gpu
def test_what_runs_is_said_first(run: Run, bundle: Path, made: Any, own_cache: Path, tmp_path: Path) -> None:
    """On stderr: what is piped stays as it was."""
    cache.check_cache()
    place = cache.cached(Bundle(bundle).manifest, "cpu-fp16")
    shutil.copytree(made("cpu", precision="fp16").path, place)
    own, low = "float32, the bundle's own graphs, onnxruntime ", f"float16, build {place}, "
    with vae_export.load(bundle, build=False) as vae, vae_export.load(bundle, build=place) as half:
        plain, rounded = vae.sample(3, seed=1), half.sample(3, seed=1)
    sample = ("sample", bundle, "--out", "x.npy", "--n", 3, "--seed", 1)
    for options, environment, line, expected in (
        ((), {}, own, plain),
        (("--precision", "fp16"), {}, low, rounded),
        ((), {"VAE_EXPORT_PRECISION": "fp16"}, low, rounded),
        (("--no-build",), {"VAE_EXPORT_PRECISION": "fp16"}, own, plain),
        (("--precision", "fp32"), {"VAE_EXPORT_PRECISION": "fp16"}, own, plain),
    ):
        done = run(*sample, *options, **environment)
        assert succeeded(done) == "x.npy: 3 samples, seed 1, from 0\n"
        assert done.stderr.startswith(line)
        assert np.array_equal(np.load(tmp_path / "x.npy"), expected)
    done = run("reconstruct", bundle, "x.npy", "--out", "r.npy", "--precision", "fp16", "--any-range")
    assert (succeeded(done), done.stderr.startswith(low)) == ("r.npy: 3 reconstructions\n", True)
    done = run("score", bundle, "x.npy", "--any-range", "--precision", "fp16")
    assert succeeded(done).startswith("index,elbo,reconstruction,kl\n")
    assert done.stderr.startswith(low)
    failed(run(*sample, "--build", place, "--no-build"), 2, "sample: name one of --build and --no-build")
    failed(run(*sample, "--precision", "int8"), 2, "load: precision is int8, and the cache has no build of")
    failed(
        run(*sample, "--precision", "fp32", "--build", place), 2, "is a build in fp16 (float16), and precision is fp32"
    )


@no_gpu
def test_bench_after_a_build_in_a_lower_precision(run: Run, bundle: Path, made: Any, own_cache: Path) -> None:
    """What is timed without being named is in float32, whatever is in the cache or the user's default."""
    cache.check_cache()
    place = cache.cached(Bundle(bundle).manifest, "cpu-fp16")
    shutil.copytree(made("cpu", precision="fp16").path, place)
    few = ("--batches", 1, "--verbs", "decode", "--seconds", 0.02, "--json")
    for options, name, line in (
        ((), "vae_export", "vae_export: float32, the bundle's own graphs, "),
        (("--no-build",), "vae_export", "vae_export: float32, the bundle's own graphs, "),
        (("--precision", "fp16"), "vae_export fp16", f"vae_export fp16: float16, build {place}, "),
    ):
        done = run("bench", bundle, *few, *options, VAE_EXPORT_PRECISION="fp16")
        assert json.loads(succeeded(done))["rows"][0]["runner"] == name
        assert done.stderr.startswith(line)
    failed(run("bench", bundle, "--no-build", "--precision", "fp16"), 2, "bench: --no-build takes none, and a build is")


@no_gpu
def test_engines_on_the_command_line(run: Run, bundle: Path, made: Any, tmp_path: Path) -> None:
    made(RTX)
    done = run("build", bundle, "--target", RTX, "--batch", "1,2", "--static", "--out", "out", "--json")
    plain = json.loads(succeeded(done))
    assert (plain["path"], plain["certificate"], plain["unmeasured"]) == ("out", None, NO_GPU)
    assert [p["batch"] for p in plain["build"]["options"]["profiles"]] == [[1, 1, 1], [2, 2, 2]]
    shown = succeeded(run("inspect", "out"))
    for part in (f"build for {RTX}", "compute capability 8.6", "a machine without a GPU", "batch 2 to 2"):
        assert part in shown
    words = "built for compute capability 8.6; this machine has no GPU"
    failed(run("sample", bundle, "--build", "out", "--out", "a.npy"), 4, words)
    engine = tmp_path / "out" / "encoder.engine"
    engine.write_bytes(engine.read_bytes()[:-1])
    failed(
        run("sample", bundle, "--build", "out", "--out", "a.npy"), 3, "It is truncated or was changed. Build it again"
    )
    assert not (tmp_path / "a.npy").exists()


def test_bad_commands(run: Run, bundle: Path, made: Any) -> None:
    failed(run("build", bundle), 2, "build: name a --target: cpu, cuda, tensorrt, tensorrt-rtx or tensorrt-rtx-smNN")
    if isinstance(driver.this_machine("tensorrt").flavours["tensorrt"], BackendError):
        done = run("build", bundle, "--target", "tensorrt")
        failed(done, 4, "TensorRT is not installed. Run: pip install 'vae-export[tensorrt]'")
    for options in (["--target", "cpu", "--static"], ["--precision", "fp16"], ["--batch", "1"]):
        done = run("build", bundle, "--refit", made("cpu").path, *options)
        failed(done, 2, "build: --refit takes target, precision, shapes and flags from the build that it refits. Drop")
    failed(run("build", bundle, "--refit", made("cpu").path), 2, "was not built with --refittable")
    failed(run("build", bundle, "--target", RTX, "--size", "height"), 2, "build: size is 'height'; expected names and")
    failed(run("build", bundle, "--target", RTX, "--batch", "1,x"), 2, "build: batch")


def test_an_engine_in_fp16_without_onnxruntime(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built all the same, and says that nobody looked for what overflows."""

    def missing(*_: object) -> None:
        raise BackendError("build needs onnxruntime.\nRun: pip install 'vae-export[cpu]'")

    monkeypatch.setattr(mixed_precision, "record_both", missing)
    made = vae_export.build(bundle, RTX, out=tmp_path / "out", precision="fp16", batches=[1])
    (said,) = made.record.absent
    assert (
        "fp16 was not evaluated on the CPU, and no value is known to overflow: build needs onnxruntime. Run: pip"
        in said
    )
