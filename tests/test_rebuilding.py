"""A build of the cache whose engines are for another version of TensorRT: `load` builds it again. No GPU is needed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import vae_export
from vae_export.building import builder
from vae_export.contract import cache
from vae_export.contract.build_record import RECORD_FORMAT, Build, BuiltGraph, Engine, Options
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import GRAPHS
from vae_export.contract.records import File
from vae_export.contract.targets import Profile
from vae_export.errors import BackendError
from vae_export.runtimes import open_bundle
from vae_export.runtimes.compatibility import Machine
from vae_export.runtimes.gpu import driver, trt

PLATFORM = "linux x86_64"
OURS = Machine(PLATFORM, {"tensorrt": "11.2.0"}, "9.0", "a GPU")


def write(folder: Path, bundle: Bundle, version: str) -> Path:
    """A build in fp16 whose engines, of a version of TensorRT, are a few bytes."""
    folder.mkdir(parents=True)
    files = {f"{name}.engine": name.encode() for name in GRAPHS}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    record = Build(
        format="vae_export.build",
        version=1,
        digest="",
        bundle=bundle.manifest.name,
        manifest=bundle.manifest.digest,
        sources={},
        target="tensorrt",
        created="2026-01-01T00:00:00Z",
        options=Options(precision="fp16", profiles=(Profile(batch=(1, 1, 4)),)),
        graphs={n: BuiltGraph(file=f"{n}.engine", onnx_sha256="0" * 64, structure="0" * 64) for n in GRAPHS},
        engine=Engine(flavour="tensorrt", version=version, capabilities=("9.0",), platform=PLATFORM),
        tools={},
        files={
            name: File(size=len(content), sha256=hashlib.sha256(content).hexdigest()) for name, content in files.items()
        },
    )
    (folder / RECORD_FORMAT.file).write_bytes(RECORD_FORMAT.encode(record))
    return folder


@pytest.fixture
def bundle(member: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle with a stale build in the cache, on a machine that has a GPU and another version of TensorRT."""
    monkeypatch.setenv("VAE_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(driver, "this_machine", lambda *_: OURS)
    opened = Bundle(member("mlp-bernoulli").bundle)
    cache.check_cache()
    write(cache.cached(opened.manifest, "tensorrt-fp16"), opened, "11.0.0")
    return opened


def entry_point(monkeypatch: pytest.MonkeyPatch, *functions: Callable[[Bundle, Build], Path]) -> None:
    """Have the installed packages offer these functions for `vae_export.rebuild`."""

    class Entry:
        def __init__(self, function: Any) -> None:
            self.load = lambda: function

    def entry_points(*, group: str) -> list[Entry]:
        assert group == "vae_export.rebuild"
        return [Entry(function) for function in functions]

    monkeypatch.setattr(metadata, "entry_points", entry_points)


def test_a_stale_build_is_built_again(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[Bundle, str]] = []

    def rebuild(source: Bundle, record: Build) -> Path:
        assert record.engine is not None
        requests.append((source, record.engine.version))
        place = cache.cached(source.manifest, "tensorrt-fp16")
        shutil.rmtree(place)
        return write(place, source, "11.2.0")

    def open_engines(engines: Any, model: Any, options: Any, engine: Engine, settings: Any) -> Any:
        assert engines == {name: name.encode() for name in GRAPHS}
        assert (options.precision, engine.version) == ("fp16", "11.2.0")
        return backend

    backend = open_bundle(bundle, device="cpu", build=False).backend
    monkeypatch.setattr(trt, "open_engines", open_engines)
    entry_point(monkeypatch, rebuild)
    with vae_export.load(bundle.path, device="cuda", precision="fp16") as vae:
        assert requests == [(requests[0][0], "11.0.0")]
        assert requests[0][0].manifest == bundle.manifest
        assert vae.describe()["build"] == str(cache.cached(bundle.manifest, "tensorrt-fp16"))
        assert vae.describe()["precision"] == "float16"
        vae.sample(1)
    vae_export.load(bundle.path, device="cuda", precision="fp16")
    assert len(requests) == 1  # what was built again is not stale


def test_a_rebuild_that_fails(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def rebuild(source: Bundle, record: Build) -> Path:
        raise BackendError("no room")

    stale = cache.cached(bundle.manifest, "tensorrt-fp16")
    problem = f"{stale}: built for TensorRT 11.0.0; this machine has 11.2.0. Building it again failed: "
    remedy = f"Run: vae-export build {bundle.path} --target tensorrt --precision fp16"
    entry_point(monkeypatch, rebuild)
    with pytest.raises(BackendError) as caught:
        vae_export.load(bundle.path, device="cuda", precision="fp16")
    assert str(caught.value) == f"{problem}no room. {remedy}"
    entry_point(monkeypatch)
    with pytest.raises(BackendError, match="vae_export is not installed as a package, and nothing else is known to"):
        vae_export.load(bundle.path, device="cuda", precision="fp16")


def test_the_installed_entry_point() -> None:
    (entry,) = metadata.entry_points(group="vae_export.rebuild")
    assert entry.load() is builder.rebuild


def test_a_named_stale_build_is_refused(bundle: Bundle) -> None:
    """Only builds of the cache are built again: another folder belongs to whoever named it."""
    stale = cache.cached(bundle.manifest, "tensorrt-fp16")

    message = r"built for TensorRT 11\.0\.0; this machine has 11\.2\.0\. Run: vae-export build .* --target tensorrt "
    with pytest.raises(BackendError, match=message):
        vae_export.load(bundle.path, build=stale)
