"""Shared fixtures: models are trained and exported once a session."""

from __future__ import annotations

import os

# The models of the tests are too small for threads; and on a machine whose cores others use as well, PyTorch's
# threads wait for each other for longer than they compute. Set before anything imports PyTorch; children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zoo
from vae_export.trainers.config import ModelConfig, TrainConfig
from vae_export.trainers.fit import fit

import vae_export
from vae_export.sources.protocol import Source

ROOT = Path(__file__).parents[1]


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

    source: Source
    bundle: Path
    certificate: vae_export.Certificate


@pytest.fixture(scope="session")
def member(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Member]:
    """The zoo's model of a name, exported."""
    made: dict[str, Member] = {}

    def get(name: str) -> Member:
        if name not in made:
            path = tmp_path_factory.mktemp(name) / f"{name}.bundle"
            source = zoo.MEMBERS[name]()
            made[name] = Member(source, path, vae_export.export(source, path))
        return made[name]

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
