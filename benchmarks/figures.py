"""Measure every figure that the project promises, beside its bound.

    make figures

Prints a table and writes JSON, with the machine and the versions. Exits with 1 if a bound is not met.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import vae_export
from vae_export import bench
from vae_export.certification import golden
from vae_export.contract.bundle import Bundle
from vae_export.errors import BundleError
from vae_export.numerics import elbo, likelihoods, noise
from vae_export.sources import checkpoint as source
from vae_export.trainers.config import ModelConfig, TrainConfig
from vae_export.trainers.fit import fit
from vae_export.trainers.objective import elbo as torch_elbo
from vae_export.trainers.objective import log_prob_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import zoo
from cases import CASES
from machine import machine

LIKELIHOODS = ("bernoulli", "gaussian")
Figure = tuple[str, float, float]  # name, measured value, upper bound


def main(out: Path) -> int:
    """Measure every figure, print the table and write `out`."""
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bundles = {likelihood: trained(work, likelihood) for likelihood in LIKELIHOODS}
        for likelihood, path in bundles.items():
            figures += certificate(likelihood, path)
            figures += [two_elbos(likelihood, path, work / likelihood)]
        figures += [closed_form_kl(), *addresses(bundles["bernoulli"])]
        figures += starting(work, bundles["gaussian"])
        figures += [overhead(work), flips(bundles["gaussian"])]
    table = Table("figure", "measured", "bound", "")
    for what, measured, bound in figures:
        table.add_row(what, f"{measured:.4g}", f"{bound:.4g}", "ok" if measured <= bound else "[red]MISSED[/]")
    Console(width=140).print(table)
    rows = [{"figure": w, "measured": m, "bound": b, "met": m <= b} for w, m, b in figures]
    out.write_text(json.dumps({**machine(), "figures": rows}, indent=2) + "\n", encoding="utf-8")
    return int(any(measured > bound for _, measured, bound in figures))


def trained(work: Path, likelihood: str) -> Path:
    """The bundle of a model trained on digits, beside its checkpoint."""
    config = ModelConfig(model="conv", data_shape=(1, 8, 8), likelihood=likelihood, latent=8)
    fit(work / likelihood, config, TrainConfig(epochs=60, device="cpu"))
    vae_export.export(work / likelihood, work / f"{likelihood}.bundle")
    return work / f"{likelihood}.bundle"


def certificate(likelihood: str, path: Path) -> list[Figure]:
    """The certificate's worst and RMS errors of the ELBO, and PyTorch's own beside them."""
    measured = vae_export.verify(path)
    figures: list[Figure] = [(f"{likelihood}: certificate, failed checks", float(not measured.passed), 0)]
    for check in measured.checks:
        if check.id == "elbo.bound.max":
            own = f"PyTorch float32's own: {check.pytorch:.2g}"
            what = f"{likelihood}: {check.quantity}, relative to Σ|ELBO terms| ({own})"
            figures.append((what, check.measured, check.tolerance or 0.0))
    return figures


def two_elbos(likelihood: str, path: Path, checkpoint: Path) -> Figure:
    """NumPy's and PyTorch's ELBO of one float64 model on the golden examples with the same noise."""
    bundle = Bundle(path)
    record, model = bundle.manifest.golden, bundle.manifest.model
    x = golden.decode(bundle.read(golden.FILE), record, model).tensors["x"].astype(np.float64)
    eps = noise.normals(1, noise.VERIFIER, 0, len(x), 8).astype(np.float64)
    module = source.load(checkpoint).module.double()
    log_prob = log_prob_of(model.likelihood, model.data)
    with torch.no_grad():
        exact = torch_elbo(module, log_prob, torch.from_numpy(x), torch.from_numpy(eps))
        mean, logvar = (t.numpy() for t in module.encode(torch.from_numpy(x)))
        outputs = module.decode(torch.from_numpy(mean + np.exp(0.5 * logvar) * eps))
    named = dict(zip(("sample", "logits" if likelihood == "bernoulli" else "sample_logvar"), outputs, strict=True))
    terms = likelihoods.of(model).log_prob_terms(x, {name: value.numpy() for name, value in named.items()})
    scale = elbo.per_example(np.abs(terms)) + elbo.kl(mean, logvar)
    ours = elbo.per_example(terms) - elbo.kl(mean, logvar)
    worst = (np.abs(ours - (exact.reconstruction - exact.kl).numpy()) / scale).max()
    return f"{likelihood}: NumPy ELBO against PyTorch, float64, relative to Σ|ELBO terms|", float(worst), 1e-12


def closed_form_kl() -> Figure:
    """Against E_q[log q(z|x) − log p(z)] over 200,000 draws."""
    draws, mean, logvar = 200_000, np.array([[0.7, -1.2, 0.0, 2.0]]), np.array([[-1.0, 0.5, -3.0, 0.2]])
    eps = noise.normals(0, noise.POSTERIOR, 0, draws, 4).astype(np.float64)
    z = mean + np.exp(logvar / 2) * eps
    sampled = -elbo.monte_carlo_elbo(np.zeros(draws), z, eps, np.broadcast_to(logvar, z.shape))
    errors = abs(sampled.mean() - elbo.kl(mean, logvar)[0]) / (sampled.std() / np.sqrt(draws))
    return "closed-form KL against 200,000 draws, standard errors", float(errors), 4.0


def addresses(path: Path) -> list[Figure]:
    """Sample i of seed s from batches of 1, 7, 64, 1000 and from 8 threads."""
    whole_noise = noise.normals(42, noise.PRIOR, 0, 1000, 8)
    differing, worst = 0, 0.0
    with vae_export.load(path, micro_batch=1000) as vae, ThreadPoolExecutor(8) as pool:
        whole = vae.sample(1000, seed=42)
        for batch in (1, 7, 64, 20):
            starts = range(0, 1000, batch)
            over = pool.map if batch == 20 else map  # the last in 8 threads
            counts = {start: min(batch, 1000 - start) for start in starts}
            parts = list(over(lambda s, n=counts: noise.normals(42, noise.PRIOR, s, n[s], 8), starts))
            differing += int((np.concatenate(parts) != whole_noise).sum())
            pictures = np.concatenate(list(over(lambda s, n=counts: vae.sample(n[s], seed=42, start=s), starts)))
            worst = max(worst, float(np.abs(pictures - whole).max()))
    return [
        ("noise from batches 1, 7, 64, 1000 and 8 threads, values that differ", differing, 0),
        ("their images, worst difference (range [0, 1])", worst, 2.0**-23),
    ]


def starting(work: Path, path: Path) -> list[Figure]:
    """Processes: the help, the import, and load to first sample. Medians of 20, in turns."""
    sample = f"import vae_export, sys; vae_export.load({str(path)!r}).sample(1); assert 'torch' not in sys.modules"
    commands = {
        "help": [str(Path(sys.executable).with_name("vae-export")), "--help"],
        "numpy": [sys.executable, "-c", "import numpy"],
        "vae_export": [sys.executable, "-c", "import vae_export"],
        "sample": [sys.executable, "-c", sample],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(21):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=work)
            if turn:  # the first fills the disk's cache
                times[name].append(time.perf_counter() - began)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    return [
        ("vae-export --help, s", median["help"], 0.4),
        ("import vae_export ÷ import numpy, whole processes", median["vae_export"] / median["numpy"], 1.3),
        ("new process: load, first sample, exit, without torch, s", median["sample"], 0.6),
    ]


def overhead(work: Path) -> Figure:
    """`vae.decode(z)` against the bare session, batch 1, mlp 784-512-20."""
    path = work / "mlp.bundle"
    vae_export.export(zoo.trainer_model(**CASES["mlp"].options), path)
    with bench.candidates(path) as selection:
        report = bench.run(selection, ["decode"], [1], seconds=4.0)
    ours, bare = (row.times.median * 1e6 for row in report.rows)
    what = f"vae.decode(z) − bare session ({bare:.1f} µs), mlp, batch 1, µs"
    return what, ours - bare, 10.0


def flips(path: Path) -> Figure:
    """One bit flipped at 2,000 random places of the bundle: how many are not refused with exit code 3."""
    copy = Path(shutil.copytree(path, path.with_name("flipped.bundle")))
    files = sorted(p for p in copy.rglob("*") if p.is_file())
    choose, accepted = random.Random(1), 0
    places = [file for file in files for _ in range(20)]
    places += choose.choices(files, [p.stat().st_size for p in files], k=2000 - len(places))
    for file in places:
        original = file.read_bytes()
        changed = bytearray(original)
        changed[choose.randrange(len(original))] ^= 1 << choose.randrange(8)
        file.write_bytes(changed)
        try:
            vae_export.load(copy)
            accepted += 1
        except BundleError as error:
            accepted += error.exit_code != 3
        file.write_bytes(original)
    return "bit flips at 2,000 places that are not refused", accepted, 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
