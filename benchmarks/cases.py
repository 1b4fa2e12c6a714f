"""What is timed, as data: models, their sizes, and batches; and how a case's source and bundle are made once."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import zoo

from vae_export import bench, sources
from vae_export.exporting import exporter

# Golden examples of a case: calls are timed, not exports.
_ROWS = 12


#: Builds that are timed beside the bundle's own graphs: options of `vae_export.build` for the CPU.
BUILDS: dict[str, dict[str, Any]] = {"fp32": {"precision": "fp32"}, "auto": {"precision": "auto"}}


@dataclass(frozen=True)
class Case:
    """A model and what it is timed at. Weights need no training: they matter for lower precisions alone.

    Attributes:
        options: of `zoo.trainer_model`; empty for a diffusers autoencoder.
        diffusers: its name in `zoo_diffusers`, or empty.
        sizes: of the data's named dimensions, such as {"height": 128, "width": 128}; empty where there are none.
        batches: that fit into memory and take minutes at most.
        builds: that are timed: options of `vae_export.build` by name.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    diffusers: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    batches: tuple[int, ...] = (1, 8, 64)
    builds: Mapping[str, dict[str, Any]] = field(default_factory=lambda: BUILDS)


def _trainer(model: str, likelihood: str, shape: tuple[int, int, int], latent: int, **options: Any) -> Case:
    return Case({"model": model, "likelihood": likelihood, "shape": shape, "latent": latent, **options})


def _diffusers(name: str, side: int, *batches: int) -> Case:
    return Case(diffusers=name, sizes={"height": side, "width": side}, batches=batches)


_IMAGE = (3, 64, 64)
CASES: dict[str, Case] = {
    "mlp": _trainer("mlp", "bernoulli", (1, 28, 28), 20, widths=(512,)),
    "conv": _trainer("conv", "bernoulli", (1, 28, 28), 20, widths=(32, 64)),
    "conv64": _trainer("conv", "gaussian_fixed", _IMAGE, 64, widths=(32, 80, 192)),
    "resnet64": _trainer("resnet", "gaussian_fixed", _IMAGE, 4, widths=(32, 64, 128), attention=True),
    "tiny": _diffusers("tiny-full", 128, 1, 8),
    "kl-small": _diffusers("kl-small", 128, 1, 8),
    "sd15": replace(_diffusers("sd15", 256, 1), builds={"fp32": BUILDS["fp32"]}),
}
#: The cases over which means are taken, if they were measured: convolutional ones of sizes in use.
MEANS = frozenset({"conv64", "resnet64", "kl-small", "tiny"})
#: The cases of the latency table.
LATENCY = ("mlp", "conv")
VERBS = ("encode", "decode", "sample")
BATCHES = (1, 8, 64)
RUNNERS = ("PyTorch eager", bench.Bare.name, "vae_export")


@dataclass(frozen=True)
class Plan:
    """What `performance.py` measures.

    Attributes:
        cases: by name.
        twice: names of cases whose float32 build is made twice, to see whether the same candidates are chosen.
        scaling: cases by the axis along which they differ.
        peers: kinds of `bench.PEERS`.
    """

    cases: Mapping[str, Case]
    twice: Sequence[str]
    scaling: Mapping[str, Sequence[Case]]
    peers: Collection[str]


PLAN = Plan(
    CASES,
    twice=("mlp", "conv64"),
    scaling={
        "batch": (replace(CASES["conv"], batches=tuple(2**n for n in range(10))),),
        "pixels": tuple(_diffusers("kl-small", side, 1) for side in (32, 64, 128, 256, 512)),
        "parameters": tuple(_diffusers(name, 64, 1) for name in ("kl-10", "kl-20", "kl-40", "kl-80", "sd15")),
    },
    peers=tuple(bench.PEERS),
)


@dataclass(frozen=True)
class Made:
    """A case on disk.

    Attributes:
        source: an argument of `sources.resolve`.
        bundle: its folder.
    """

    source: Any
    bundle: Path


def make(case: Case, folder: Path) -> Made:
    """The case's source and bundle in a folder, which the first call writes."""
    folder.mkdir(parents=True, exist_ok=True)
    name = case.diffusers or "-".join(re.sub(r"\W+", "_", str(part)) for part in case.options.values())
    bundle = folder / f"{name}.bundle"
    source: Any = _written(folder / name, name) if case.diffusers else zoo.trainer_model(**case.options)
    if not bundle.exists():
        exporter.export_trained(sources.resolve(source), bundle, rows=_ROWS)
    return Made(source, bundle)


def _written(path: Path, name: str) -> Path:
    """A diffusers autoencoder as a folder, written whole or not at all."""
    import zoo_diffusers

    if not path.exists():
        part = path.with_suffix(".part")  # there may be one of a run that was cut short
        shutil.rmtree(part, ignore_errors=True)
        zoo_diffusers.write(part, name, module=zoo_diffusers.fresh(name)).rename(path)
    return path
