"""Trained weights in every precision: pictures of what each costs, and a table of it.

    python benchmarks/trained.py OUT [--only NAME,NAME] [--precisions fp32,fp16] [--seconds S]

writes to the folder OUT, for each model, a picture of real inputs, their reconstructions as the float32 bundle gives
them, and for each precision the reconstruction and its difference from float32's, twenty times as large; and
`trained.json` and `trained.md`. A precision that is refused is in the table with its reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from machine import machine

import vae_export
from vae_export.errors import VaeExportError
from vae_export.numerics import images

Array = npt.NDArray[Any]

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
_SHOWN = 12
_MEASURED = 64  # pictures
_AMPLIFIED = 20
_SAME = 300.0  # dB, of pictures without a difference
_SIDE = 128  # of the photographs' parts


def _models() -> ModuleType:
    """`tests/trained.py`, whose name is this file's."""
    path = Path(__file__).parents[1] / "tests" / "trained.py"
    spec = importlib.util.spec_from_file_location("trained_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compared(vae: vae_export.VAE, exact: vae_export.VAE, x: Array) -> dict[str, float | None]:
    """Deviations of a build from the bundle in float32 on real inputs.

    Decode: of the pictures decoded from float32's means. Encode: of the mean, in float32's posterior deviations, or in
    deviations of each latent over the inputs where there is no posterior.
    """
    posterior, mean = exact.encode(x), vae.encode(x).mean
    if posterior.logvar is None:
        unit, divergence = np.maximum(posterior.mean.std(axis=0, keepdims=True), 1e-12), None
    else:
        unit = posterior.std
        divergence = float(
            (0.5 * ((mean - posterior.mean) / unit) ** 2).reshape(len(x), -1).sum(axis=1).max()  # of means alone
        )
    moved = np.abs(mean - posterior.mean) / unit
    low, high = exact.model.data.range
    right = exact.decode(posterior.mean)
    off = np.abs(vae.decode(posterior.mean) - right) / (high - low)
    return {
        "psnr": float(-20 * np.log10(max(np.sqrt(np.mean(off**2)), 10 ** (-_SAME / 20)))),
        "off1": float((off > 1 / 255).mean()),
        "off2": float((off > 2 / 255).mean()),
        "worst_levels": float(off.max() * 255),
        "encode_rms_sigma": float(np.sqrt(np.mean(moved**2))),
        "encode_worst_sigma": float(moved.max()),
        "encode_kl_of_means_worst": divergence,
    }


def _built(bundle: Path, precision: str, out: Path, seconds: float) -> tuple[vae_export.VAE | None, dict[str, Any]]:
    """A build in a precision and what it runs, or None and the reason of the refusal."""
    try:
        built = vae_export.build(
            bundle, "cpu", precision=precision, out=out, batches=(8,), seconds=seconds, overwrite=True
        )
        vae = vae_export.load(bundle, build=built.path)
    except VaeExportError as error:
        return None, {"refused": str(error)}
    described = vae.describe()
    return vae, {"runs": {k: v for k, v in described.items() if k in ("precision", "backend", "graphs", "ways")}}


def picture(x: Array, exact: vae_export.VAE, vaes: Mapping[str, vae_export.VAE], path: Path) -> None:
    """Rows: inputs, float32; then for each precision the reconstruction and its amplified difference."""
    low, high = exact.model.data.range
    shown = x[:: max(1, len(x) // _SHOWN)][:_SHOWN]
    right = exact.reconstruct(shown)
    rows = [shown, right]
    for vae in vaes.values():
        again = vae.reconstruct(shown)
        rows += [again, np.clip(low + _AMPLIFIED * np.abs(again - right), low, high)]
    images.grid(np.concatenate(rows).astype(np.float32), (low, high), columns=len(shown)).save(path)


def table(record: Mapping[str, Any]) -> list[str]:
    """As Markdown."""
    lines = [
        "| model | requested | computes in | PSNR, dB | off by > 1/255 | > 2/255 | worst, levels | mean off, posterior "
        "deviations, worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, model in record["models"].items():
        for precision, figures in model.items():
            if "refused" in figures:
                lines.append(f"| {name} | {precision} | refused |  |  |  |  |  |")
                continue
            psnr = "same bits" if figures["psnr"] == _SAME else f"{figures['psnr']:.1f}"
            lines.append(
                f"| {name} | {precision} | {figures['runs']['precision']} | {psnr} | {figures['off1']:.2%} | "
                f"{figures['off2']:.2%} | {figures['worst_levels']:.2f} | {figures['encode_worst_sigma']:.2g} |"
            )
    return lines


def _model(models: ModuleType, name: str, out: Path, precisions: Sequence[str], seconds: float) -> dict[str, Any]:
    source = models.load(name, _SIDE)
    bundle = out / f"{name}.bundle"
    try:
        vae_export.export(source, bundle, overwrite=True)
    except VaeExportError as error:
        return {"export": {"refused": str(error)}}
    exact = vae_export.load(bundle, device="cpu")
    x = np.ascontiguousarray(source.held_out[:_MEASURED])
    figures: dict[str, Any] = {}
    vaes = {}
    for precision in precisions:
        vae, figures[precision] = _built(bundle, precision, out / f"{name}.{precision}.build", seconds)
        if vae is not None:
            vaes[precision] = vae
            figures[precision] |= compared(vae, exact, x)
    picture(x, exact, vaes, out / f"{name}.png")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--seconds", type=float, default=0.2)
    arguments = parser.parse_args()
    # `load` of the bundle alone must not use a build of the user's cache.
    os.environ["VAE_EXPORT_CACHE"] = tempfile.mkdtemp(prefix="vae_export-trained-")
    models = _models()
    if problem := models.missing():
        sys.exit(f"trained: {problem}")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    names = arguments.only.split(",") if arguments.only else models.NAMES
    record: dict[str, Any] = {**machine(), "models": {}}
    for name in names:
        record["models"][name] = _model(models, name, out, arguments.precisions.split(","), arguments.seconds)
        (out / "trained.json").write_text(json.dumps(record, indent=2) + "\n")
        (out / "trained.md").write_text("\n".join(table(record)) + "\n")
    print("\n".join(table(record)))


if __name__ == "__main__":
    main()
