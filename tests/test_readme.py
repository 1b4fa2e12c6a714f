"""The README's commands and code, in its order, in the checkout, as a newcomer would run them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import recipes
import tables
from conftest import ROOT
from PIL import Image

commands = pytest.mark.commands

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def shell(script: str, cwd: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("MAKEFLAGS", None)  # of the make that runs these tests
    environment.pop("MAKELEVEL", None)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo() -> str:
    """What `make demo` says."""
    return shell("make demo", ROOT)


def test_the_blocks_are_those_that_the_tests_below_run() -> None:
    first = [block.splitlines()[0].split()[0:2] for block in blocks("bash")]
    commands = [["vae-export", "train"], ["vae-export", "build"]]
    assert first == [["make", "demo"], ["make", "test"], ["python3", "-m"], *commands]
    assert len(blocks("python")) == 3


@commands
def test_make_demo(demo: str) -> None:
    out = ROOT / "out" / "demo"
    assert "certificate.txt (passed)" in demo
    assert {p.name for p in out.iterdir()} >= {
        *("checkpoint", "digits.bundle", "samples.png", "reconstructions.png", "certificate.txt"),
    }
    with Image.open(out / "samples.png") as picture:
        assert np.asarray(picture).std() > 60  # strokes on black, not grey fog
    assert "ELBO" in (out / "certificate.txt").read_text()


@commands
def test_a_demo_replaces_only_a_demo(demo: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    command = [sys.executable, "-m", "vae_export", "demo", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "is not empty and no demo made it. Choose another folder (--out)" in done.stderr
    assert (tmp_path / "mine.txt").exists()


@commands
def test_samples_look_like_digits(demo: str) -> None:
    """To the nearest training digits they are about as close, and as clear in kind, as unseen digits are."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import KNeighborsClassifier

    import vae_export
    from vae_export.trainers import datasets
    from vae_export.trainers.config import DataConfig

    digits = load_digits()
    x = (digits.images / 16).astype(np.float32).reshape(-1, 64)
    train = datasets.load(DataConfig(), 0).train
    trained = {row.tobytes() for row in train.read(np.arange(len(train)))}
    seen = np.array([row.tobytes() in trained for row in x])
    neighbours = KNeighborsClassifier(10).fit(x[seen], digits.target[seen])

    def distance(pictures: np.ndarray) -> float:
        return float(np.quantile(neighbours.kneighbors(pictures, 1)[0], 0.9))

    def clear(pictures: np.ndarray) -> float:
        return float((neighbours.predict_proba(pictures).max(axis=1) >= 0.8).mean())

    with vae_export.load(ROOT / "out" / "demo" / "digits.bundle") as vae:
        samples = vae.sample(500, seed=1).reshape(-1, 64)
    shuffled = np.random.default_rng(0).permuted(samples, axis=1)
    assert distance(samples) < 1.2 * distance(x[~seen]) < distance(shuffled)
    assert clear(samples) > 0.5 > clear(shuffled)
    assert np.bincount(neighbours.predict(samples), minlength=10).min() > 5  # all ten kinds are drawn


@commands
def test_the_code(demo: str) -> None:
    for block in blocks("python"):
        shell(f"{shlex.quote(sys.executable)} -W error -c {shlex.quote(block)}", ROOT)


@commands
def test_the_command_line(demo: str) -> None:
    shutil.rmtree(ROOT / "out" / "readme", ignore_errors=True)
    said = shell(blocks("bash")[3], ROOT)
    assert "index,log_likelihood" in said
    assert {p.name for p in (ROOT / "out" / "readme").iterdir()} == {
        *("run", "digits.bundle", "samples.png", "x.npy", "pairs.png", "cpu.build", "ada.build"),
    }
    said = shell(blocks("bash")[4], ROOT)
    assert "is written, and verified" in said
    assert "upsampling" in said


@commands
def test_the_pip_form(checkout: Path) -> None:
    assert "run bundles on the CPU: onnxruntime" in shell(blocks("bash")[2], checkout)


def test_its_figures_are_those_of_the_records() -> None:
    """Whole rows of its tables, made again from the recorded results that it links to."""
    results = ROOT / "benchmarks" / "results"
    figures = json.loads((results / "figures-cpu.json").read_text())["figures"]
    assert all(figure["met"] for figure in figures)
    cells: dict[str, list[str]] = {}
    for likelihood in ("bernoulli", "gaussian"):
        for figure in figures:
            what, _, own = figure["figure"].partition(" (PyTorch float32's own: ")
            if what.startswith(f"{likelihood}: ") and "ELBO" in what:
                shown = f"{figure['measured']:.1e}" + (f" ({float(own.rstrip(')')):.1e})" if own else "")
                cells.setdefault(what.partition(": ")[2], []).append(shown)
    assert len(cells) == 3
    for row in cells.values():
        assert f"| {' | '.join(row)} |\n" in README
    (seconds,) = (f["measured"] for f in figures if f["figure"].startswith("new process"))
    assert f"exits in {seconds:.2f} s" in README
    for line in (*tables.trainer(), *tables.throughput(), *tables.sources()):
        assert f"{line}\n" in README
    rows = json.loads((results / "latency-cpu.json").read_text())["rows"]
    cases = dict.fromkeys((row["model"], row["verb"], row["batch"]) for row in rows)
    for case in cases:
        times = [f"{r['median_us']:.1f}" for r in rows if (r["model"], r["verb"], r["batch"]) == case]
        assert f"| {' | '.join(map(str, (*case, *times)))} |\n" in README


def test_the_performance_document(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Its options are the commands', and its tables the records'."""
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "benchmarks" / "results" / "performance-cpu.json").read_text())
    lines = [*tables.passes(), *tables.overhead()]
    for table in (tables.performance, tables.means, tables.growth, tables.twice):
        lines += table(record)
    for line in lines:
        assert f"{line}\n" in text
    for line in tables.means(record):
        assert f"{line}\n" in README
    (large,) = (c for c in record["cases"]["sd15"]["cells"] if c["verb"] == "decode")
    times = 1 / large["float32"]["ours_to_it"]["vae_export fp32"]
    assert f"256 × 256 is {times:.2f} times as fast in float32 as the fastest peer" in README
    help = "".join(run(verb, "--help", COLUMNS="200").stdout for verb in ("build", "bench"))
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert len(said) > 8
    assert not {option for option in said if option not in help}


def test_the_training_document(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Its table is the record's; its options are the command's; its recipes are what was recorded."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for line in tables.recipes():
        assert f"{line}\n" in text
    help = run("train", "--help", COLUMNS="200").stdout
    others = {"--nproc-per-node", "--logdir"}
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - others
    assert len(said) > 25
    assert not {option for option in said if option not in help}
    recorded = json.loads((ROOT / "benchmarks" / "results" / "recipes-cpu.json").read_text())["recipes"]
    assert {recipe["recipe"]: recipe["options"] for recipe in recorded} == recipes.RECIPES
    figures = json.loads((ROOT / "benchmarks" / "results" / "trainer-cpu.json").read_text())["figures"]
    assert all(figure["met"] for figure in figures)
