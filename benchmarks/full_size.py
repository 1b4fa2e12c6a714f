"""Export and verify an autoencoder of Stable Diffusion's size: seconds, and the most memory that it took."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

_EXPORT = """
import sys, vae_export
vae_export.export(sys.argv[1], sys.argv[2], progress=lambda step: print(step, file=sys.stderr, flush=True))
"""
_VERIFY = "import sys, vae_export; vae_export.verify(sys.argv[1]).require()"


def measure(code: str, *arguments: Path) -> dict[str, float]:
    """Run Python in a process of its own; its seconds, and its largest resident memory of all children so far."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - began, "peak_gib_so_far": peak / 2**30}


def main(out: Path, name: str = "sd15") -> None:
    """Make the model, export it at 64 × 64, verify the bundle, and write what that took."""
    import vae_export

    with tempfile.TemporaryDirectory() as folder:
        source, bundle = Path(folder) / name, Path(folder) / f"{name}.bundle"
        subprocess.run(
            [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); import zoo_diffusers, pathlib; "
             "zoo_diffusers.write(pathlib.Path(sys.argv[2]), sys.argv[3])",
             str(Path(__file__).parents[1] / "tests"), str(source), name],
            check=True,
        )  # fmt: skip
        made = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        result: dict[str, Any] = {**machine(), "model": name, "making_gib": made / 2**30}
        result["verify_after_export"] = {"export": measure(_EXPORT, source, bundle), "verify": measure(_VERIFY, bundle)}
        opened = vae_export.Bundle(bundle)
        result["parameters"] = opened.manifest.model.parameters
        result["certificate"] = vae_export.verify(bundle).to_dict()
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "certificate"}, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
