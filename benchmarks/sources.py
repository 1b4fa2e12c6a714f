"""The figures of trained models from other libraries that have a bound, measured.

python benchmarks/sources.py out/bench/sources.json [zoo sizes tiles memory full]
"""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

import vae_export

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import zoo
import zoo_diffusers

_SIZES = ((32, 48), (40, 16), (72, 24))
_EXPORT = """
import sys, vae_export
vae_export.export(sys.argv[1], sys.argv[2], progress=lambda step, share=None: print(step, file=sys.stderr, flush=True))
"""
_VERIFY = "import sys, vae_export; vae_export.verify(sys.argv[1]).require()"
_DECODE = """
import sys
import numpy as np
import vae_export
def peak():
    # Of this process alone: getrusage includes the process that it was forked from.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
bundle, side, tile = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
vae = vae_export.load(bundle)
z = vae_export.numerics.noise.normals(0, 0, 0, 1, 4 * side * side // 64).reshape(1, 4, side // 8, side // 8)
before = peak()
x = vae.decode(z, tile=tile or None)
assert x.shape == (1, 3, side, side) and "torch" not in sys.modules
print(before, peak(), x.nbytes)
"""


def bundles(folder: Path) -> dict[str, Path]:
    """Every small autoencoder of diffusers, exported at 16 × 24."""
    exported = {}
    for name in zoo_diffusers.CONFIGS:
        source = zoo_diffusers.write(folder / name, name)
        exported[name] = folder / f"{name}.bundle"
        vae_export.export(source, exported[name], size={"height": 16, "width": 24})
    return exported


def certificates(folder: Path, exported: dict[str, Path]) -> dict[str, Any]:
    """For every member of the zoo, the check that is nearest to its tolerance."""
    for name, make in zoo.MEMBERS.items():
        exported = {**exported, name: folder / f"{name}.bundle"}
        vae_export.export(make(), exported[name])
    table = {}
    for name, path in exported.items():
        certificate = vae_export.verify(path)
        nearest = max((c for c in certificate.checks if c.tolerance), key=lambda c: c.measured / (c.tolerance or 1))
        table[name] = {"passed": certificate.passed, "examples": certificate.examples, "nearest": str(nearest)}
        print(name, table[name], flush=True)
    return table


def sizes(exported: dict[str, Path]) -> dict[str, float]:
    """AutoencoderKL at other sizes than the traced one: worst deviation from diffusers, relative to its range."""
    worst = {}
    for name in (name for name in exported if name.startswith("kl")):
        module, vae = zoo_diffusers.model(name), vae_export.load(exported[name])
        worst[name] = 0.0
        for height, width in _SIZES:
            for batch in (1, 3):
                x = zoo.pictures(batch, (3, height, width)) * 2 - 1
                with torch.no_grad():
                    posterior = module.encode(torch.from_numpy(x)).latent_dist
                    decoded = module.decode(posterior.mean).sample.numpy()
                ours, z = vae.encode(x), posterior.mean.numpy()
                pairs = ((ours.mean, z), (ours.logvar, posterior.logvar.numpy()), (vae.decode(z), decoded))
                for result, expected in pairs:
                    worst[name] = max(worst[name], float(np.abs(result - expected).max() / np.ptp(expected)))
    return worst


def tiles(exported: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Tiled runs of ours and of diffusers, with the same settings: worst deviation, relative to the output's range.

    Between the two, and of each from diffusers in float64.
    """
    worst: dict[str, dict[str, float]] = {}
    for name in (name for name in exported if name.startswith("kl")):
        module, vae = zoo_diffusers.model(name), vae_export.load(exported[name])
        exact = copy.deepcopy(module).double()
        stride = 2 ** (len(zoo_diffusers.CONFIGS[name]["block_out_channels"]) - 1)
        for size, overlap in ((32, 0.25), (32, 0.5), (64, 0.125)):
            for each in (module, exact):
                each.tile_sample_min_size, each.tile_latent_min_size = size, size // stride
                each.tile_overlap_factor = overlap
            x = torch.from_numpy(zoo.pictures(2, (3, 88, 72)) * 2 - 1)
            tile = vae_export.Tile(size, overlap)
            with torch.no_grad():
                mean, right = (each._tiled_encode(x.to(each.dtype)).chunk(2, 1)[0] for each in (module, exact))
                z = mean.contiguous()
                decoded, decoded_right = (each.tiled_decode(z.to(each.dtype)).sample for each in (module, exact))
            for verb, ours, theirs, reference in (
                ("encode", vae.encode(x.numpy(), tile=tile).mean, mean, right),
                ("decode", vae.decode(z.numpy(), tile=tile), decoded, decoded_right),
            ):
                figures = worst.setdefault(f"{name}, {verb}", {})
                pairs = {
                    "difference": (ours, theirs.numpy()),
                    "ours to float64": (ours, reference.numpy()),
                    "diffusers to float64": (theirs.numpy(), reference.numpy()),
                }
                for what, (result, expected) in pairs.items():
                    figures[what] = max(
                        figures.get(what, 0.0), float(np.abs(result - expected).max() / np.ptp(expected))
                    )
    return worst


def memory(folder: Path) -> dict[str, Any]:
    """Peak memory of a decode in a process of its own: 512² untiled, and 1024² and 2048² in tiles of 512."""
    bundle = folder / "small.bundle"
    vae_export.export(zoo_diffusers.write(folder / "small", "kl-small"), bundle)
    figures: dict[str, Any] = {}
    for side, tile in ((512, 0), (1024, 512), (2048, 512)):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _DECODE, str(bundle), str(side), str(tile)],
            check=True,
            capture_output=True,
            text=True,
        )
        before, peak, output = map(int, done.stdout.split())
        figures[f"{side} in tiles of {tile}" if tile else f"{side} untiled"] = {
            "loaded_mib": before / 2**20, "peak_mib": peak / 2**20, "output_mib": output / 2**20,
            "without_output_mib": (peak - output) / 2**20, "seconds": time.perf_counter() - began,
        }  # fmt: skip
    whole = figures["512 untiled"]
    figures["ratio_without_outputs"] = (
        figures["2048 in tiles of 512"]["without_output_mib"] / whole["without_output_mib"]
    )
    return figures


def full(folder: Path) -> dict[str, Any]:
    """An autoencoder of Stable Diffusion 1.5's size: seconds, and the largest resident memory of a process."""
    source, bundle = folder / "sd15", folder / "sd15.bundle"
    make = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import zoo_diffusers; "
    make += "zoo_diffusers.write(pathlib.Path(sys.argv[2]), 'sd15')"
    subprocess.run([sys.executable, "-c", make, str(Path(__file__).parents[1] / "tests"), str(source)], check=True)
    figures: dict[str, Any] = {}
    for step, code, arguments in (("export", _EXPORT, (source, bundle)), ("verify", _VERIFY, (bundle,))):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 2**30
        figures[step] = {"seconds": time.perf_counter() - began, "peak_gib": peak}
    figures["parameters"] = vae_export.Bundle(bundle).manifest.model.parameters
    figures["certificate"] = vae_export.verify(bundle).to_dict()
    return figures


def main(out: Path, chosen: list[str]) -> None:
    """Run some of the steps; results of other steps in the file stay."""
    result = json.loads(out.read_text()) if out.is_file() else {}
    result |= machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exported: dict[str, Path] = bundles(folder) if {"zoo", "sizes", "tiles"} & set(chosen) else {}
        # The full size first: the system reports the peak over all child processes so far.
        steps: dict[str, Callable[[], Any]] = {
            "full": lambda: full(folder),
            "zoo": lambda: certificates(folder, exported),
            "sizes": lambda: sizes(exported),
            "tiles": lambda: tiles(exported),
            "memory": lambda: memory(folder),
        }
        for step, measure in steps.items():
            if step in chosen:
                result[step] = measure()
                shown = {key: value for key, value in result[step].items() if key != "certificate"}
                print(step, json.dumps(shown, indent=2), flush=True)
                out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["full", "zoo", "sizes", "tiles", "memory"])
