"""Run the recipes of docs/training.md on the command line, and record results and durations.

make record
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

#: Each recipe in words, and its options.
RECIPES = {
    "linear on digits: probabilistic PCA": "--model linear",
    "mlp on binarized digits": "--model mlp --binarize dynamic --patience 20 --epochs 200",
    "conv on digits": "",
    "conv on digits, two latents, for the manifold": "--latent 2 --epochs 100",
    "the plain autoencoder beside it": "--latent 2 --epochs 100 --objective autoencoder",
    "resnet on digits": "--model resnet",
    "conv on the photographs, in colour": "--data photos --model conv --likelihood discretized_logistic --flip",
    "resnet on the photographs, spatial latents": "--data photos --model resnet --range -1,1 --flip --epochs 30",
}


def main(out: Path, *only: str) -> None:
    """Run all, or those whose options are given, and write `out`."""
    rows: list[dict[str, Any]] = []
    before = {row["options"]: row for row in json.loads(out.read_text())["recipes"]} if only else {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (what, options) in enumerate(RECIPES.items()):
            if only and options not in only:
                rows.append(before[options])
                continue
            run = Path(folder, str(number))
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "vae_export", "train", str(run), *shlex.split(options)], check=True)
            seconds = time.perf_counter() - began
            result = json.loads((run / "config.json").read_text())["result"]
            rows.append({"recipe": what, "options": options, "seconds": seconds, "result": result})
        out.write_text(json.dumps({**machine(), "recipes": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
