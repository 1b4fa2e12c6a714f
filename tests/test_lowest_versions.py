"""The lowest versions that the extras allow, installed and used."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, command

pytestmark = pytest.mark.commands

USE = """
import sys
import numpy as np
import vae_export
built = vae_export.build(sys.argv[1], "cpu", out=sys.argv[2], precision="auto", seconds=0.02, batches=[1, 2])
assert built.certificate.passed
assert {row.runner for row in built.record.measurements} == {"onnxruntime", "openvino"}
with vae_export.load(sys.argv[1], build=built.path) as vae:
    x = vae.sample(5, seed=1)
    assert np.isfinite(vae.elbo(x).elbo).all()
"""


def environment(checkout: Path, tmp_path: Path, *extras: str) -> Path:
    """The command line in an environment with the lowest versions that the base and some extras allow.

    PyTorch alone has the version that is tested: a lower one would bring gigabytes.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    lowest = re.findall(r"^torch==.*", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    for requirement in wanted:
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
        assert match, f"{requirement}: a name and a lowest version expected"
        if match[1] != "torch":
            lowest.append(f"{match[1]}=={match[2]}")
    (tmp_path / "lowest.txt").write_text("\n".join(lowest) + "\n")
    command(sys.executable, "-m", "venv", "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    what = f"{checkout}[{','.join(extras)}]"
    command(python, "-m", "pip", "install", "-q", "-c", "lowest.txt", what, cwd=tmp_path)
    return python.with_name("vae-export")


def test_what_trains_and_exports(checkout: Path, tmp_path: Path) -> None:
    cli = environment(checkout, tmp_path, "cpu", "export", "train")
    command(cli, "train", "run", "--data", "digits", "--model", "mlp", "--latent", 4, "--epochs", 1, cwd=tmp_path)
    command(cli, "export", "run", "b.bundle", cwd=tmp_path)
    assert "passed" in command(cli, "inspect", "b.bundle", cwd=tmp_path)


def test_what_runs_and_builds(checkout: Path, tmp_path: Path, digits: dict[str, Path]) -> None:
    cli = environment(checkout, tmp_path, "cpu", "build", "openvino")
    assert "Usage: vae-export" in command(cli, "--help", cwd=tmp_path)
    assert "passed" in command(cli, "inspect", digits["gaussian"], cwd=tmp_path)
    assert "passed" in command(cli, "verify", digits["gaussian"], cwd=tmp_path)
    command(cli, "sample", digits["gaussian"], "--out", "s.png", cwd=tmp_path)
    command(cli.with_name("python"), "-c", USE, digits["gaussian"], "build", cwd=tmp_path)
