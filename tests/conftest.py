"""Shared fixtures: models are trained and exported once a session."""

from __future__ import annotations

import os

# The models of the tests are too small for threads; and on a machine whose cores others use as well, PyTorch's
# threads wait for each other for longer than they compute. Set before anything imports PyTorch; children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import atexit
import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from quick import QUICK

import vae_export
from vae_export import sources
from vae_export.building import builder, tensorrt
from vae_export.contract import targets
from vae_export.errors import BackendError
from vae_export.exporting.exporter import export_trained
from vae_export.runtimes.gpu import driver, flavours
from vae_export.sources.protocol import Trained
from vae_export.trainers.config import ModelConfig, TrainConfig
from vae_export.trainers.fit import fit

ROOT = Path(__file__).parents[1]


# Builds in tests are quick, unless a test names other settings.
@functools.wraps(builder.build)
def _build(*arguments: Any, **options: Any) -> vae_export.Built:
    return builder.build(*arguments, **{"search": QUICK, **options})


vae_export.build = _build

# The tests have a cache of builds of their own. Children inherit it.
os.environ["VAE_EXPORT_CACHE"] = tempfile.mkdtemp(prefix="vae_export-tests-")
atexit.register(shutil.rmtree, os.environ["VAE_EXPORT_CACHE"], ignore_errors=True)


def command(*parts: object, cwd: Path) -> str:
    """Run a program that must succeed; what it prints."""
    done = subprocess.run([str(p) for p in parts], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the repository has, to build from: the tests leave the real one as it is."""
    target = tmp_path_factory.mktemp("checkout") / "repository"
    made = (".git", ".venv", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*made))
    return target


@dataclass(frozen=True)
class Member:
    """A model of the zoo and its bundle."""

    source: Trained
    bundle: Path
    certificate: vae_export.Certificate


@pytest.fixture(scope="session")
def member(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Member]:
    """The zoo's model of a name, exported on fewer rows than usual."""
    made: dict[str, Member] = {}

    def get(name: str) -> Member:
        if name not in made:
            path = tmp_path_factory.mktemp(name) / f"{name}.bundle"
            source = zoo.MEMBERS[name]()
            made[name] = Member(source, path, export_trained(source, path, rows=80))
        return made[name]

    return get


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, vae_export.Certificate]]:
    """A small autoencoder of diffusers as a folder, exported on few rows: the bundle and its certificate."""
    import zoo_diffusers

    made: dict[str, tuple[Path, vae_export.Certificate]] = {}

    def get(name: str) -> tuple[Path, vae_export.Certificate]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source = zoo_diffusers.write(folder / "source", name)
            source = sources.resolve(source, size={"height": 16, "width": 24})
            certificate = export_trained(source, folder / f"{name}.bundle", rows=12)
            made[name] = folder / f"{name}.bundle", certificate
        return made[name]

    return get


_gpu = pytest.mark.gpu
#: What a bundle is run on by the tests that all backends share: itself or a build of it. A new backend is a name here.
PLACES = [
    "cpu",
    "cpu build",
    *(pytest.param(place, marks=_gpu) for place in ("cuda", "cuda build", "tensorrt build", "tensorrt-rtx build")),
]


def lacking(target: str) -> str | None:
    """What this machine lacks for a target, in words, or None."""
    if target == "cpu":
        return None
    if problem := driver.query().problem:
        return problem
    try:
        if target == "cuda":
            import onnxruntime

            found = onnxruntime.get_available_providers()
            return None if "CUDAExecutionProvider" in found else f"onnxruntime has {', '.join(found)} only"
        bindings = flavours.load(target)
    except BackendError as error:
        return str(error)
    known, here = tensorrt.capabilities(bindings, targets.parse(target)), driver.query().gpus[0].capability
    return None if here in known else f"{bindings.title} is for {', '.join(known)}; this machine has {here}"


@pytest.fixture(scope="session")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, object]]:
    """What `load` needs to run a bundle in a place; a test that cannot run there is skipped, with the reason."""
    made: dict[tuple[Path, str, str], Path] = {}

    def get(bundle: Path, place: str, **options: object) -> dict[str, object]:
        target, _, build = place.partition(" ")
        if problem := lacking(target):
            pytest.skip(f"{place}: {problem}")
        if not build:
            return {"device": target}
        if target == "cpu":  # each batch is measured for every form
            options.setdefault("batches", (1, 8))
        key = (bundle, target, repr(sorted(options.items())))
        if key not in made:
            out = tmp_path_factory.mktemp("builds") / target
            made[key] = vae_export.build(bundle, target, out=out, **options).path
        return {"build": made[key]}

    return get


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Conv models trained for a few epochs on digits, by likelihood."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for likelihood in ("bernoulli", "gaussian"):
        model = ModelConfig(model="conv", data_shape=(1, 8, 8), likelihood=likelihood, latent=8, widths=(16, 32))
        fit(folder / likelihood, model, TrainConfig(epochs=8, device="cpu"))
    return {likelihood: folder / likelihood for likelihood in ("bernoulli", "gaussian")}


@pytest.fixture(scope="session")
def digits(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundles of `checkpoints`."""
    folder = tmp_path_factory.mktemp("bundles")
    for likelihood, checkpoint in checkpoints.items():
        vae_export.export(checkpoint, folder / f"{likelihood}.bundle")
    return {likelihood: folder / f"{likelihood}.bundle" for likelihood in checkpoints}


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """All digits: (1797, 1, 8, 8) float32 in [0, 1]."""
    from sklearn.datasets import load_digits

    return (load_digits().images / 16).astype(np.float32)[:, None]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed `vae-export` in an empty folder, outside of the checkout."""

    def call(*args: object, cwd: Path = tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vae_export", *map(str, args)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment, check=False
        )

    return call
