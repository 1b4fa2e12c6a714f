"""Models of other libraries on the command line: export, inspect, layouts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
import zoo_diffusers
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import vae_export
from vae_export import sources
from vae_export.commands.app import app
from vae_export.errors import InputError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs run in an empty folder, and in this process: loading PyTorch takes longer than they do."""
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def done(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_a_diffusers_folder(tmp_path: Path) -> None:
    """inspect, export on real pictures, inspect the bundle, and the layout of Optimum from the same folder."""
    zoo_diffusers.write(tmp_path / "vae", "tiny")
    at = ("--size", "height=8,width=16")
    source = json.loads(done(run("inspect", "vae", *at, "--json")))
    assert source["kind"] == "source"
    assert source["costs"]["sizes"] == {"height": 8, "width": 16}
    shown = done(run("inspect", "vae"))
    for told in ("AutoencoderTiny", "a multiple of 4", "billion multiply-adds", "deterministic", "MiB in float32"):
        assert told in shown
    (tmp_path / "photos").mkdir()
    for i in range(8):
        pixels = (np.indices((20, 30)).sum(0) * (i + 3) % 256).astype(np.uint8)
        Image.fromarray(np.stack([pixels] * 3, -1)).save(tmp_path / "photos" / f"{i}.png")
    done(run("export", "vae", "b", *at, "--held-out", "photos"))
    assert vae_export.Bundle(tmp_path / "b").manifest.golden.held_out == 8
    bundle = json.loads(done(run("inspect", "b", *at, "--json")))
    assert bundle["costs"] == source["costs"]
    assert "nearest to its tolerance" in done(run("inspect", "b"))
    assert "wrong" not in shown
    done(run("export", "vae", "o", *at, "--layout", "optimum"))
    assert (
        sorted(p.name for p in (tmp_path / "o").rglob("*") if p.is_file()) == ["config.json"] * 2 + ["model.onnx"] * 2
    )
    refused = run("export", "vae", "o", *at, "--layout", "optimum").exception
    assert isinstance(refused, InputError)
    assert "exists" in str(refused)


def test_a_factory(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "import torch\n"
        "class V(torch.nn.Module):\n"
        "    def __init__(self): super().__init__(); self.a = torch.nn.Linear(4, 4); self.b = torch.nn.Linear(2, 4)\n"
        "    def encode(self, x): return self.a(x).chunk(2, 1)\n"
        "    def decode(self, z): return self.b(z)\n"
        "def make(): torch.manual_seed(0); return V()\n"
    )
    options = ("--shape", "4", "--likelihood", "gaussian_fixed", "--variance", "0.1", "--range", "0,1")
    done(run("export", "theirs:make", "b", *options))
    manifest = vae_export.Bundle(tmp_path / "b").manifest
    assert manifest.model.likelihood.variance == 0.1
    assert json.loads(done(run("inspect", "theirs:make", *options, "--json")))["model"]["data"]["shape"] == [4]
    refused = run("export", "theirs:make", "c", *options[:-1], "zero").exception
    assert isinstance(refused, InputError)
    assert "range is 'zero'; expected two numbers" in str(refused)


def test_options_of_a_source() -> None:
    """Each kind takes its own, and missing ones are named."""
    module, x = zoo.Plain(), np.zeros((1, 12), np.float32)
    with pytest.raises(InputError, match=r"a module needs likelihood, data_range\. Pass them: export\("):
        sources.resolve(module, example=x)
    with pytest.raises(InputError, match=r"got a int; expected a checkpoint's or a diffusers"):
        sources.resolve(3)
    with pytest.raises(InputError, match=r"a vae_export\.Source takes no further options; got likelihood\. Omit it"):
        sources.resolve(vae_export.Source(module, x, "none", (-2, 2)), likelihood="none")
    with pytest.raises(InputError, match=r"a Trained takes no further options; got config, variance\. Omit them"):
        sources.resolve(zoo.plain(), config="c", variance=1.0)
    trained = sources.resolve(module, example=x, likelihood="none", data_range=(-2, 2), name="mine")
    assert trained.origin.name == "mine"


def test_repr() -> None:
    """One line each, whatever the attributes are."""
    source = vae_export.Source(zoo.Plain(), np.zeros((1, 12), np.float32), "none", (-2, 2))
    assert repr(source) == "Source(Plain, none, example of shape (1, 12) in (-2, 2))"
    source = vae_export.Source(zoo.Plain(), [0.0], "none", (-2, 2))  # type: ignore[arg-type] # refused when it is used
    assert repr(source) == "Source(Plain, none, example a list of 1 (a float) in (-2, 2))"
    assert repr(zoo.spatial(named=True)) == (
        "Trained('zoo', spatial, 1,542 parameters, data (B, 3, height, width), latent (B, 4, height/4, width/4), "
        "gaussian)"
    )


@pytest.mark.commands
def test_examples(tmp_path: Path) -> None:
    """They run as they stand; the picture is one."""
    from conftest import ROOT, command

    def example(name: str, *arguments: Any) -> str:
        return command(sys.executable, ROOT / "examples" / name, *arguments, cwd=tmp_path)

    (tmp_path / "out").mkdir()
    assert "passed: True" in example("sdxl_export.py")
    assert "latents (1, 4, 32, 32)" in example("sdxl_app.py")
    with Image.open(tmp_path / "out" / "again.png") as picture:
        assert picture.size == (256, 256)
    assert example("own_module.py").strip()
