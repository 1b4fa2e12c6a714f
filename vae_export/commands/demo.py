"""`vae-export demo`: train on handwritten digits, export, verify, run without PyTorch, and write pictures."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

from vae_export.commands import terminal
from vae_export.commands.options import option
from vae_export.errors import EXPORT_NEEDS, BackendError, InputError, require

_MARK = ".vae-export-demo"


def demo(
    out: Annotated[Path, option("The folder to write to; the results of an earlier demo in it are replaced.")] = Path(
        "out/demo"
    ),
) -> None:
    """Train on handwritten digits, export, verify, run without PyTorch, and write pictures."""
    for module, extra in (*EXPORT_NEEDS, ("lightning_fabric", "train"), ("sklearn", "train")):
        require(module, extra, "demo")
    from vae_export.certification.verifier import verify
    from vae_export.commands import tables
    from vae_export.exporting.exporter import export
    from vae_export.progress import bar
    from vae_export.trainers.config import ModelConfig, TrainConfig
    from vae_export.trainers.fit import fit

    if out.exists() and not out.is_dir():
        raise InputError(f"demo: {out} is not a folder. Choose another path (--out)")
    if out.exists() and any(out.iterdir()) and not (out / _MARK).is_file():
        raise InputError(f"demo: {out} is not empty and no demo made it. Choose another folder (--out)")
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()
    console = terminal.console()
    checkpoint, path = out / "checkpoint", out / "digits.bundle"
    began = time.perf_counter()

    console.rule("train: a convolutional VAE on scikit-learn's handwritten digits")
    model = ModelConfig(model="conv", data_shape=(1, 8, 8), likelihood="gaussian", latent=8)
    result = fit(checkpoint, model, TrainConfig(epochs=100, device="cpu"), overwrite=True)
    trained = time.perf_counter()

    console.rule("export: PyTorch → ONNX, measured against PyTorch in float64")
    with bar(terminal.console(err=True)) as progress:
        export(checkpoint, path, overwrite=True, progress=progress)

    console.rule("verify: measured again, without PyTorch")
    certificate = verify(path, opened=lambda line: terminal.say(f"  {line}"))
    table = tables.certificate(certificate)
    terminal.say(tables.verdict(certificate))
    console.print(table)
    (out / "certificate.txt").write_text(tables.as_text(table), encoding="utf-8")
    certificate.require()

    console.rule("run: in a new process in which PyTorch cannot be imported")
    ran = _run_without_torch(path, out)
    console.print(
        tables.facts(
            "demo",
            {
                "checkpoint": checkpoint,
                "bundle": path,
                "samples": out / "samples.png",
                "reconstructions": f"{out / 'reconstructions.png'} (original above reconstruction)",
                "certificate": f"{out / 'certificate.txt'} ({'passed' if certificate.passed else 'FAILED'})",
                "held-out ELBO": (
                    f"{result.elbo:.2f} nats (reconstruction {result.reconstruction:.2f}, KL {result.kl:.2f})"
                ),
                "the same from the bundle": f"{ran['elbo']:.2f} nats on its {ran['examples']} golden examples",
                "load and first sample": f"{ran['first_sample'] * 1e3:.0f} ms",
                "samples per second": f"{ran['samples_per_second']:,.0f}",
                "trained in": f"{trained - began:.0f} s",
                "altogether": f"{time.perf_counter() - began:.0f} s",
            },
        )
    )


def _run_without_torch(path: Path, out: Path) -> dict[str, float]:
    import json
    import subprocess

    program = (
        "import sys; sys.modules['torch'] = None; from vae_export.commands import demo; demo.pictures(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, str(path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"demo: the run without PyTorch failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def pictures(path: str, out: str) -> None:
    """Use a bundle as an application would: write its pictures, and print measured figures as JSON."""
    import json

    from vae_export.certification import golden
    from vae_export.contract.bundle import Bundle
    from vae_export.numerics import images

    began = time.perf_counter()
    from vae_export.runtimes import load

    vae = load(path)
    vae.sample(1)
    first_sample = time.perf_counter() - began
    data = vae.model.data
    images.grid(vae.sample(96, seed=0), data.range, columns=16).save(Path(out, "samples.png"))
    bundle = Bundle(path)
    record = bundle.manifest.golden
    x = golden.decode(bundle.read(golden.FILE), record, vae.model).tensors["x"][record.extremes :]
    images.pairs(x[:48], vae.reconstruct(x[:48]), data.range, columns=16).save(Path(out, "reconstructions.png"))
    began = time.perf_counter()
    vae.sample(10_000, seed=1)
    rate = 10_000 / (time.perf_counter() - began)
    figures = {
        "elbo": float(vae.elbo(x).elbo.mean()),
        "examples": len(x),
        "first_sample": first_sample,
        "samples_per_second": rate,
    }
    print(json.dumps(figures))
