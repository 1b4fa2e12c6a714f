"""The distribution: a wheel in an empty environment, plain and editable installs, in and out of the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, command

pytestmark = pytest.mark.commands


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=checkout)
    (found,) = out.glob("vae_export-*.whl")
    return found


def new_environment(path: Path) -> Path:
    command(sys.executable, "-m", "venv", path, cwd=path.parent)
    return path / "bin" / "python"


USE = """
import sys, importlib.util
import numpy as np
import vae_export
assert importlib.util.find_spec("torch") is None
vae = vae_export.load(sys.argv[1])
x = vae.sample(5, seed=1)
assert x.shape == (5, 1, 8, 8) and np.isfinite(x).all()
posterior = vae.encode(x)
assert vae.decode(posterior.sample(seed=2)).shape == x.shape
assert np.isfinite(vae.elbo(x).elbo).all()
assert vae_export.verify(sys.argv[1]).passed
try: vae_export.export("a", "b")
except vae_export.BackendError as error: print(error)
"""


def test_a_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path, digits: dict[str, Path]) -> None:
    """With the `cpu` extra alone a bundle runs, and PyTorch is not there."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"vae_export", wheel.name.partition("-py3")[0] + ".dist-info"}
    homes = {"vae_export": "vae_export", "runtimes": "vae_export/runtimes", "trainers": "vae_export/trainers"}
    expected = {
        f"{home}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, home in homes.items()
        for ending in ("*.py", "*.cu", "py.typed")
        for file in (ROOT / folder).rglob(ending)
    }
    assert {name for name in names if name.startswith("vae_export/")} == expected
    python = new_environment(tmp_path / "env")
    command(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{wheel}[cpu]", cwd=tmp_path)
    said = command(python, "-c", USE, digits["gaussian"], cwd=tmp_path)
    assert "Run: pip install 'vae-export[export]'" in said
    cli = python.with_name("vae-export")
    assert "passed" in command(cli, "inspect", digits["gaussian"], cwd=tmp_path)
    command(cli, "sample", digits["gaussian"], "--out", "s.png", cwd=tmp_path)
    done = subprocess.run([cli, "train", "o"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "train: the Python package 'torch' is not installed. Run: pip install 'vae-export[train]'" in done.stderr


NAMES = """
import sys, importlib.util, vae_export, vae_export.runtimes, vae_export.trainers.config, vae_export.sources
print(vae_export.runtimes.__file__)
isolated = importlib.util.find_spec("runtimes") is None and importlib.util.find_spec("trainers") is None
print("isolated" if isolated else "visible")
"""


@pytest.mark.parametrize("mode", [[], ["--editable"]], ids=["plain", "editable"])
def test_installs(checkout: Path, tmp_path: Path, mode: list[str]) -> None:
    """The two folders at the top are importable as parts of vae_export only, wherever one stands."""
    python = new_environment(tmp_path / "env")
    site = command(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    # What the package needs comes from the environment of the tests: only its own install is tested here.
    needs = tmp_path / "needs"
    needs.mkdir()
    for entry in Path(pytest.__file__).parents[1].iterdir():
        if entry.suffix != ".pth" and not entry.name.startswith(("vae_export", "pip", "setuptools")):
            (needs / entry.name).symlink_to(entry)
    Path(site, "needs.pth").write_text(f"{needs}\n")
    install = (python, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed")
    command(*install, *mode, checkout, cwd=tmp_path)
    where = str(checkout) if mode else site
    outside = command(python, "-I", "-c", NAMES, cwd=tmp_path).split()
    assert outside[0].startswith(where)
    assert outside[1] == "isolated"
    inside = command(python, "-I", "-c", NAMES, cwd=checkout).split()
    assert inside == outside
    # Standing in the checkout without -I, the checkout itself is imported, and is whole.
    assert command(python, "-c", NAMES, cwd=checkout).split()[0].startswith(str(checkout))
    assert "Usage: vae-export" in command(python.with_name("vae-export"), "--help", cwd=checkout)


def test_version_1_bundles_stay_readable() -> None:
    """A manifest as version 1 wrote it: every later version must read it."""
    from vae_export.contract.manifest import RECORD_FORMAT

    raw = (ROOT / "tests" / "data" / "manifest-v1.json").read_bytes()
    assert RECORD_FORMAT.decode(raw).version == 1
