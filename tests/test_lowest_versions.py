"""The lowest versions that the extras allow, installed and used."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, command

pytestmark = pytest.mark.commands

#: Extras that install within seconds. Those with PyTorch in them would bring gigabytes.
EXTRAS = ("cpu", "build", "openvino")

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


def lowest(extras: tuple[str, ...]) -> list[str]:
    """`name==version` for every requirement of the base and of some extras, at the lowest version that it allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    found = []
    for requirement in wanted:
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
        assert match, f"{requirement}: a name and a lowest version expected"
        found.append(f"{match[1]}=={match[2]}")
    return found


def test_the_lowest_versions_work(checkout: Path, tmp_path: Path, digits: dict[str, Path]) -> None:
    (tmp_path / "lowest.txt").write_text("\n".join(lowest(EXTRAS)) + "\n")
    command("python3", "-m", "venv", "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    what = f"{checkout}[{','.join(EXTRAS)}]"
    command(python, "-m", "pip", "install", "-q", "-c", "lowest.txt", what, cwd=tmp_path)
    cli = python.with_name("vae-export")
    assert "Usage: vae-export" in command(cli, "--help", cwd=tmp_path)
    assert "passed" in command(cli, "inspect", digits["gaussian"], cwd=tmp_path)
    assert "passed" in command(cli, "verify", digits["gaussian"], cwd=tmp_path)
    command(cli, "sample", digits["gaussian"], "--out", "s.png", cwd=tmp_path)
    command(python, "-c", USE, digits["gaussian"], "build", cwd=tmp_path)
