"""What is imported when: starting is fast because little is, and running never needs PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = "import sys\nfor name in {names}: sys.modules[name] = None\n"


def python(program: str, *arguments: object, cwd: Path) -> str:
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(program: str, *arguments: object, cwd: Path) -> set[str]:
    shown = python(program + "\nimport sys; print('|', *sys.modules)", *arguments, cwd=cwd)
    return {name.partition(".")[0] for name in shown.rpartition("|")[2].split()}


def test_import_costs_at_most_numpy(tmp_path: Path) -> None:
    ours, numpys = (imported(f"import {name}", cwd=tmp_path) for name in ("vae_export", "numpy"))
    assert ours - numpys - set(sys.stdlib_module_names) == {"vae_export"}


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv[1:] = ['--help']\nfrom vae_export.commands.app import main\n"
        "try: main()\nexcept SystemExit: 0"
    )
    found = imported(program, cwd=tmp_path)
    heavy = {"torch", "onnx", "onnxruntime", "numpy", "PIL", "msgspec", "scipy", "sklearn", "safetensors", "filelock"}
    assert not found & heavy


USE = """
import numpy as np, vae_export
vae = vae_export.load(sys.argv[1])
x = np.full((3, 1, 8, 8), 0.5, np.float32)
assert np.isfinite(vae.decode(vae.encode(x).sample(seed=1))).all()
assert np.isfinite(vae.elbo(x).elbo).all() and np.isfinite(vae.log_likelihood(x, k=3)).all()
assert vae.sample(2).shape == vae.reconstruct(x[:2]).shape
assert vae_export.verify(sys.argv[1]).passed
from vae_export import bench
from vae_export.building import builder, tensorrt
from vae_export.certification import verifier
from vae_export.commands import app, doctor, scoring, tables
from vae_export.numerics import images
from vae_export.trainers import config
"""


def test_everything_but_training_and_export_runs_without_torch(digits: dict[str, Path], tmp_path: Path) -> None:
    python(
        BLOCK.format(names=["torch", "onnx", "onnxscript", "sklearn", "scipy"]) + USE, digits["bernoulli"], cwd=tmp_path
    )


def test_the_block_works(digits: dict[str, Path], tmp_path: Path) -> None:
    """The test above can fail: what does need PyTorch does not run under the block."""
    with pytest.raises(AssertionError, match="torch"):
        python(BLOCK.format(names=["torch"]) + "import vae_export.trainers.fit", cwd=tmp_path)


def test_a_runtime_never_imports_torch_by_itself(digits: dict[str, Path], tmp_path: Path) -> None:
    found = imported("import sys\n" + USE, digits["gaussian"], cwd=tmp_path)
    assert "onnxruntime" in found
    assert not found & {"torch", "onnx", "onnxscript", "lightning_fabric", "sklearn", "scipy"}


@pytest.mark.parametrize(
    ("block", "program", "message"),
    [
        (["torch"], "vae_export.export('a', 'b')", "export: the Python package 'torch' is not installed. Run: pip "
         "install 'vae-export[export]'"),
        (["onnx_ir"], "vae_export.export('a', 'b')", "export: the Python package 'onnx_ir' is not installed. Run: pip "
         "install 'vae-export[export]'"),
        (["onnxruntime"], "vae_export.load(sys.argv[1])", "load: the Python package 'onnxruntime' is not installed. "
         "Run: pip install 'vae-export[cpu]'"),
        (["sklearn"], "from vae_export.trainers import config, datasets as d; d.load(config.DataConfig(), 0)",
         "data set 'digits': the Python package 'sklearn' is not installed. Run: pip install 'vae-export[train]'"),
    ],
)  # fmt: skip
def test_a_missing_extra_is_named(
    digits: dict[str, Path], tmp_path: Path, block: list[str], program: str, message: str
) -> None:
    check = f"""
import vae_export
try: {program}
except vae_export.BackendError as error: print(error)
"""
    # A finder that knows nothing of the package: what an environment without it answers.
    hide = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {block}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Hide())
"""
    assert message in python(hide + check, digits["gaussian"], cwd=tmp_path)


def test_a_broken_package_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    program = (
        "from vae_export.errors import require\n"
        "try: require('broken', 'x', 'test')\nexcept ModuleNotFoundError as error: print(error.name)"
    )
    assert python(program, cwd=tmp_path) == "nothing_of_this_name\n"
