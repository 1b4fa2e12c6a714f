"""The documents: commands and code as a newcomer would run them, links, figures, and the messages that they quote."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import recipes
import tables
from conftest import ROOT
from PIL import Image

pytestmark = pytest.mark.quick

commands = pytest.mark.commands

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
DOCUMENTS = {ROOT / name: (ROOT / name).read_text(encoding="utf-8") for name in (
    "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/README.md",
)} | {ROOT / "docs" / name: text for name, text in DOCS.items()}  # fmt: skip
RESULTS = ROOT / "benchmarks" / "results"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


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
    assert first == [["make", "demo"], ["python3", "-m"], *commands]
    assert len(blocks("python")) == 3


@pytest.mark.parametrize(("name", "most"), [("README.md", 200), ("ARCHITECTURE.md", 250)])
def test_how_long_it_may_be(name: str, most: int) -> None:
    assert len(DOCUMENTS[ROOT / name].splitlines()) <= most


def anchors(text: str) -> set[str]:
    """Of a document's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(document: Path, text: str) -> list[str]:
    """The links of a document to files or headings that are not there."""
    wrong = []
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", text):
        there = (document.parent / target).resolve() if target else document
        if not there.exists() or (anchor and anchor not in anchors(there.read_text(encoding="utf-8"))):
            wrong.append(f"{target}#{anchor}" if anchor else target)
    return wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    assert broken(document, DOCUMENTS[document]) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](docs/nowhere.md) [b](docs/training.md#recipes) [c](docs/training.md#no-such) ![d](docs/images/x.png)"
    assert broken(ROOT / "README.md", text) == ["docs/nowhere.md", "docs/training.md#no-such", "docs/images/x.png"]


def absent(text: str) -> set[str]:
    """The paths in a document, with or without the top folder and `.py`, that no file or folder has."""
    tops = ("vae_export", "runtimes", "trainers", "tests", "benchmarks", "docs")
    paths = [f"/{path.relative_to(ROOT).as_posix()}/" for top in tops for path in (ROOT / top).rglob("*")]
    paths += [f"/{top}/" for top in tops]
    named = {path.strip("/").removesuffix(".py") for path in re.findall(r"`([\w.-]+/[\w./-]*)`", text)}
    return {path for path in named if not any(there.endswith((f"/{path}/", f"/{path}.py/")) for there in paths)}


def test_the_paths_of_the_architecture_exist() -> None:
    assert absent(DOCUMENTS[ROOT / "ARCHITECTURE.md"]) == set()


def test_an_absent_path_is_found() -> None:
    text = "`contract/model` `runtimes/gpu/` `trainers/fit.py` `runtimes/nothing.py` `contract/mode`"
    assert absent(text) == {"runtimes/nothing", "contract/mode"}


def texts(folder: Path) -> Iterator[str]:
    """The texts in the code; what is filled in is `…`."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_the_questions_are_the_messages_of_the_code() -> None:
    messages = re.findall(r"^### `(.*)`$", DOCS["faq.md"], re.MULTILINE)
    assert len(messages) > 30
    code = "\0".join(text for folder in ("vae_export", "runtimes", "trainers") for text in texts(ROOT / folder))
    assert not [message for message in messages if message not in code]


def test_the_reference_has_every_public_name() -> None:
    import vae_export

    named = re.findall(r"^::: vae_export\.(\w+)$", DOCS["api.md"], re.MULTILINE)
    assert sorted([*named, "__version__"]) == sorted(vae_export.__all__)


def test_the_reference_has_inherited_methods() -> None:
    """The site shows those of a base that has no entry of its own only where it is told to."""
    import vae_export

    classes = {name: value for name in vae_export.__all__ if isinstance(value := getattr(vae_export, name), type)}
    inherited = {
        name
        for name, value in classes.items()
        for base in value.__mro__[1:]
        if base.__module__.startswith("vae_export.") and base not in classes.values()
        if {method for method in vars(base) if not method.startswith("_")} - set(vars(value))
    }
    told = re.findall(
        r"^::: vae_export\.(\w+)\n    options:\n      inherited_members: true$", DOCS["api.md"], re.MULTILINE
    )
    assert set(told) == inherited == {"Bundle", "VAE"}


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
    said = shell(blocks("bash")[2], ROOT)
    assert "index,log_likelihood" in said
    assert {p.name for p in (ROOT / "out" / "readme").iterdir()} == {
        *("run", "digits.bundle", "samples.png", "x.npy", "pairs.png", "cpu.build", "ada.build"),
    }
    said = shell(blocks("bash")[3], ROOT)
    assert "is written, and verified" in said
    assert "upsampling" in said


@commands
def test_getting_started(demo: str, tmp_path: Path) -> None:
    """All but the install, which is the README's, and the training, which is the demo's."""
    text = DOCS["getting-started.md"]
    first, train, *steps = blocks("bash", text)
    assert first == blocks("bash")[1]
    assert train == "vae-export train runs/digits\n"
    shutil.copytree(ROOT / "out" / "demo" / "checkpoint", tmp_path / "runs" / "digits")
    (code,) = blocks("python", text)
    said = shell(steps[0], tmp_path)
    for file in re.findall(r"`([\w/]+\.\w+)`", text[text.index("| file | what |") : text.index("## 4.")]):
        assert (tmp_path / "digits.bundle" / file).exists(), file
    shell(f"{shlex.quote(sys.executable)} -W error -c {shlex.quote(code)}", tmp_path)
    said += shell("".join(steps[1:3]), tmp_path)
    assert "passed" in said
    assert (tmp_path / "pairs.png").exists()
    shell(steps[3].replace("--target cpu", "--target cpu --seconds 0.05", 1), tmp_path)


@commands
@pytest.mark.parametrize("other", ["diffusers", "pythae", "plain torch.onnx"])
def test_coming_from(other: str, tmp_path: Path) -> None:
    """Their code and ours give the same."""
    if other != "plain torch.onnx":
        pytest.importorskip(other, reason=f"{other} is not installed")
    (section,) = re.findall(rf"^## From {re.escape(other)}\n(.*?)(?=^## |\Z)", DOCS["coming-from.md"], re.M | re.S)
    theirs, ours = blocks("python", section.replace('"height": 64, "width": 64', '"height": 32, "width": 32'))
    (tmp_path / "compare.py").write_text("\n".join([PREPARE[other], theirs, KEEP, ours, COMPARE]), encoding="utf-8")
    assert "compared" in shell(f"{shlex.quote(sys.executable)} compare.py", tmp_path)


#: What the sections take for granted: a folder with a model.
PREPARE = {
    "diffusers": f"""
import sys
from pathlib import Path
sys.path.append({str(ROOT / "examples")!r})
import sdxl_export
sdxl_export.stand_in(Path("sdxl/vae"))
""",
    "pythae": """
from pythae.models import VAE, VAEConfig
VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=4)).save("my_model/final_model")
""",
    "plain torch.onnx": "",
}
KEEP = """
before = {name: globals()[name] for name in ("mean", "again", "latents", "pictures", "decoded") if name in globals()}
"""
COMPARE = """
for name, value in before.items():
    theirs = value.detach().numpy() if hasattr(value, "detach") else value
    assert type(globals()[name]).__module__ == "numpy", name
    assert abs(theirs - globals()[name]).max() < 1e-4, name
    print(name, "compared")
"""


@commands
def test_the_pip_form(checkout: Path) -> None:
    assert "run bundles on the CPU: onnxruntime" in shell(blocks("bash")[1], checkout)


def test_the_figures_are_those_of_the_records() -> None:
    """Whole rows of the tables of docs/results.md, made again from the records; and what README.md quotes of them."""
    text = DOCS["results.md"]
    figures = json.loads((RESULTS / "figures-cpu.json").read_text())["figures"]
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
        assert f"| {' | '.join(row)} |\n" in text
    assert f"| {max(cells['ELBO, worst, of S'], key=lambda cell: float(cell.split()[0]))} |" in README
    (seconds,) = (f["measured"] for f in figures if f["figure"].startswith("new process"))
    assert f"exits in {seconds:.2f} s" in " ".join(text.split())
    assert f"| {seconds:.2f} s |" in README
    for line in (*tables.trainer(), *tables.throughput(), *tables.sources()):
        assert f"{line}\n" in text
    trainer = json.loads((RESULTS / "trainer-cpu.json").read_text())["figures"]
    (lost,) = (f["measured"] for f in trainer if "killed with SIGKILL" in f["figure"])
    assert f"of 200, lost or different | {lost:g} |" in README
    rows = json.loads((RESULTS / "latency-cpu.json").read_text())["rows"]
    cases = dict.fromkeys((row["model"], row["verb"], row["batch"]) for row in rows)
    for case in cases:
        times = [f"{r['median_us']:.1f}" for r in rows if (r["model"], r["verb"], r["batch"]) == case]
        assert f"| {' | '.join(map(str, (*case, *times)))} |\n" in text


def test_the_faults_are_those_of_the_record() -> None:
    planted = json.loads((RESULTS / "margins-cpu.json").read_text())["faults"]
    shares = [fault["share"] for faults in planted.values() for fault in faults.values() if fault]
    refused = sum(share > 1 for share in shares)
    assert f"| {refused} of {len(shares)} |" in README
    text = " ".join(DOCS["results.md"].split())
    total = sum(map(len, planted.values()))
    assert f"{total} in all, {total - len(shares)} change nothing that any example shows; the other {refused} " in text
    assert f"The smallest is {min(shares):.2f} times the tolerance" in text


def test_every_record_is_listed_with_its_version() -> None:
    """In docs/results.md; README.md's links have the version, too."""
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        version = record["versions"]["vae-export"]
        row = rf"^\| \[{re.escape(path.name)}\]\(\S+\) \| `make \w+` \| {version} \| {record['date']} \|"
        assert re.search(row, DOCS["results.md"], re.MULTILINE), path.name
        quoted = re.findall(rf"\[([\d.]+)\]\(benchmarks/results/{re.escape(path.name)}\)", README)
        assert set(quoted) <= {version}


def test_the_performance_document(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Its options are the commands', and its tables the records'."""
    text = DOCS["performance.md"]
    record = json.loads((RESULTS / "performance-cpu.json").read_text())
    lines = [*tables.passes(), *tables.overhead()]
    for table in (tables.performance, tables.means, tables.growth, tables.twice):
        lines += table(record)
    for line in lines:
        assert f"{line}\n" in text
    results = " ".join(DOCS["results.md"].split())
    for line in tables.means(record):
        assert " ".join(line.split()) in results
    for verb, kinds in record["means"].items():
        shown = "; ".join(f"{1 / kinds['float32'][f'vae_export {build}']:.2f}" for build in ("fp32", "auto"))
        assert re.search(rf"^\| {verb}, .*\| {shown} \| \[", README, re.MULTILINE)
    (large,) = (c for c in record["cases"]["sd15"]["cells"] if c["verb"] == "decode")
    times = 1 / large["float32"]["ours_to_it"]["vae_export fp32"]
    assert f"256 × 256 is {times:.2f} times as fast in float32 as the fastest peer" in results
    help = "".join(run(verb, "--help", COLUMNS="200").stdout for verb in ("build", "bench"))
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert len(said) > 8
    assert not {option for option in said if option not in help}


def test_the_training_document(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Its table is the record's; its options are the command's; its recipes are what was recorded."""
    text = DOCS["training.md"]
    for line in tables.recipes():
        assert f"{line}\n" in text
    help = run("train", "--help", COLUMNS="200").stdout
    others = {"--nproc-per-node", "--logdir"}
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - others
    assert len(said) > 25
    assert not {option for option in said if option not in help}
    recorded = json.loads((RESULTS / "recipes-cpu.json").read_text())["recipes"]
    assert {recipe["recipe"]: recipe["options"] for recipe in recorded} == recipes.RECIPES
    figures = json.loads((RESULTS / "trainer-cpu.json").read_text())["figures"]
    assert all(figure["met"] for figure in figures)
