"""Measure the memory of calls: of many sizes, of many threads under a budget, after release, and beside PyTorch.

    make memory

Every figure comes from a process of its own: MiB of resident memory above that before its first measured call. Prints
each and writes JSON, with the machine and the versions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

_STAGES = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_WIDTHS = [16, 32, 64, 128, 256, 256]
#: AutoencoderDC as published, stride 32 and heads of 32, of which the deepest stages have eight; narrow.
DEEP: dict[str, Any] = {
    "latent_channels": 8, "attention_head_dim": 32, "encoder_block_types": _STAGES, "decoder_block_types": _STAGES,
    "encoder_block_out_channels": _WIDTHS, "decoder_block_out_channels": _WIDTHS,
    "encoder_layers_per_block": [1] * 6, "decoder_layers_per_block": [1] * 6,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]], "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
}  # fmt: skip
SIDES = (512, 1024, 1536, 2048)
THREADS = (1, 2, 4, 8)
BUDGET = "64MiB"
MANY = 30  # sizes


def main(out: Path) -> None:
    """Measure every figure and write `out`."""
    from machine import machine

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = {model: _made(model, folder) for model in ("dc-eight", "kl-flux")}
        result: dict[str, Any] = {**machine(), "deep compression": [], "threads": [], "sizes": {}}
        for verb in ("encode", "decode"):
            for side in SIDES:
                row = {"verb": verb, "side": side, "counted_mib": _counted(made["dc-eight"], verb, side)}
                for runner, path in zip(("pytorch", "vae_export"), made["dc-eight"], strict=True):
                    row |= {f"{runner}_mib": _child("deep", runner, path, verb, side)["peak_mib"]}
                result["deep compression"].append(_shown(row))
        bundle = made["kl-flux"][1]
        for count in THREADS:
            result["threads"].append(_shown({"threads": count} | _child("threads", bundle, count)))
        result["sizes"] = _shown(_child("sizes", bundle))
    out.write_text(json.dumps(result, indent=2) + "\n")


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row and return it."""
    print(json.dumps(row), flush=True)
    return row


def _made(name: str, folder: Path) -> tuple[Path, Path]:
    """The model as a folder of diffusers, and its bundle."""
    import zoo_diffusers

    from vae_export import sources
    from vae_export.exporting.exporter import export_trained

    with mock.patch.dict(zoo_diffusers.ALL, {"dc-eight": zoo_diffusers.CONFIGS["dc"] | DEEP}):
        source = zoo_diffusers.write(folder / name, name, module=zoo_diffusers.fresh(name))
    export_trained(sources.resolve(source), folder / f"{name}.bundle", rows=3)
    return source, folder / f"{name}.bundle"


def _counted(made: tuple[Path, Path], verb: str, side: int) -> float:
    """The estimate that `inspect` shows, in MiB."""
    import vae_export

    cost = vae_export.Bundle(made[1]).manifest.graphs[f"{verb}r"].cost
    assert cost is not None
    return float(cost.at({"height": side, "width": side})[1] / 2**20)


def _child(*arguments: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _status(name: str) -> float:
    """`VmRSS` or `VmHWM` of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def _reset_peak() -> float:
    """Reset the peak of resident memory; return the present one in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def deep(runner: str, path: str, verb: str, side: str) -> dict[str, Any]:
    """The peak of one call, after one at 64 pixels that loads what is loaded lazily."""
    shapes = [(1, 3, n, n) if verb == "encode" else (1, 8, n // 32, n // 32) for n in (64, int(side))]
    values = [np.random.default_rng(0).standard_normal(shape, np.float32).clip(-1, 1) for shape in shapes]
    call: Any
    if runner == "pytorch":
        import diffusers
        import torch

        torch.set_grad_enabled(False)
        vae = diffusers.AutoencoderDC.from_pretrained(path).eval()

        def call(x: Any) -> Any:
            return getattr(vae, verb)(torch.from_numpy(x))
    else:
        import vae_export

        call = getattr(vae_export.load(path, device="cpu", build=False), verb)
    call(values[0])
    before = _reset_peak()
    result = call(values[1])
    assert result is not None
    return {"peak_mib": _status("VmHWM") - before}


def threads(bundle: str, count: str) -> dict[str, Any]:
    """The peak of `count` calls at once, each of four examples of 256 × 256 pixels, within one budget."""
    import vae_export

    vae = vae_export.load(bundle, device="cpu", build=False, max_memory=BUDGET)
    z = np.random.default_rng(0).standard_normal((4, vae.model.latent.shape[0], 64, 64), np.float32)
    vae.decode(z[:1, :, :8, :8])
    before = _reset_peak()
    results: list[Any] = []
    working = [threading.Thread(target=lambda: results.append(vae.decode(z))) for _ in range(int(count))]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    outputs = sum(result.nbytes for result in results) / 2**20
    assert len(results) == int(count)
    return {"without_outputs_mib": _status("VmHWM") - before - outputs, "outputs_mib": outputs}


def sizes(bundle: str) -> dict[str, Any]:
    """The peaks of the largest of thirty sizes, 768² pixels, alone and of all sizes, and the rest after release."""
    import vae_export

    vae = vae_export.load(bundle, device="cpu", build=False)
    draw = np.random.default_rng(0)

    def call(height: int, width: int) -> float:
        began = time.perf_counter()
        vae.decode(np.zeros((1, vae.model.latent.shape[0], height, width), np.float32))
        return time.perf_counter() - began

    call(8, 8)
    before = _reset_peak()
    call(192, 192)
    figures = {"largest_mib": _status("VmHWM") - before}
    vae.release_memory()
    before_all = _reset_peak()
    for height, width in draw.integers(16, 193, (MANY - 1, 2)):
        call(int(height), int(width))
    call(192, 192)
    usual = call(192, 192)
    figures |= {"sizes_mib": _status("VmHWM") - before_all, "kept_mib": _status("VmRSS") - before}
    began = time.perf_counter()
    vae.release_memory()
    return figures | {
        "given_back_mib": _status("VmRSS") - before,
        "giving_back_seconds": time.perf_counter() - began,
        "usual_call_seconds": usual,
        "next_call_seconds": call(192, 192),
    }


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        print(json.dumps({"deep": deep, "threads": threads, "sizes": sizes}[sys.argv[2]](*sys.argv[3:])))
    else:
        main(Path(sys.argv[1]))
