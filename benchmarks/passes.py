"""Records what each graph pass saves: decoders and encoders with passes and without, on both runners, in turns.

    python benchmarks/passes.py OUT.json [--work DIR] [--seconds S]

Each row is the time of a graph after some passes as a share of that of the bundle's own on the same runner: below 1 the
passes made it faster.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
from cases import Case
from machine import machine

from vae_export import graph, timing
from vae_export.contract import atomic
from vae_export.contract.build_record import ExecutionPlan
from vae_export.contract.bundle import Bundle
from vae_export.graph import rewrites
from vae_export.numerics import noise
from vae_export.runtimes import Settings
from vae_export.runtimes.backend import PlannedGraph
from vae_export.runtimes.cpu.dispatch import CpuBackend

CASES = {"conv64": (1, 8), "resnet64": (1, 8), "tiny": (1,), "kl-small": (1,), "sd15": (1,)}
#: The choices of passes that are compared with the graph as it is.
CHOICES = {
    "fold": ("fold",),
    "channel_norm": ("channel_norm",),
    "upsampling": ("upsampling",),
    "upsampling, phases": ("upsampling", "phases"),
    "upsampling, channel_norm": ("upsampling", "channel_norm"),
    "winograd": ("winograd",),
    "all but phases": tuple(name for name in rewrites.PASSES if name != "phases"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Record what graph passes buy.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, help="keep sources and bundles there")
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds of measuring for each choice")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        rows = [
            row
            for name, batches in CASES.items()
            for batch in batches
            for graph_name in ("decoder", "encoder")
            for row in measured(name, cases.CASES[name], graph_name, batch, work, options.seconds)
        ]
    with atomic.atomic_file(options.out) as stage:
        stage.write_text(json.dumps({**machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")


def measured(name: str, case: Case, graph_name: str, batch: int, work: Path, seconds: float) -> list[dict[str, Any]]:
    """The rows of one graph at one batch."""
    bundle = Bundle(cases.make(case, work).bundle)
    model, source = bundle.manifest.model, bundle.graphs()[0][graph_name]
    (tensor,) = model.signature(graph_name)[0]
    shape = model.tensor_shape(tensor, batch, dict(case.sizes))
    value = noise.normals(0, noise.PRIOR, 0, batch, math.prod(shape[1:])).reshape(shape)
    outputs = [output.name for output in model.signature(graph_name)[1]]
    variants: dict[str, tuple[bytes, int]] = {"none": (source, 0)}
    for choice, names in CHOICES.items():
        read = graph.read(source)
        if changed := sum(rewrites.optimize(read, names).values()):
            variants[choice] = (graph.write(read), changed)
    calls, opened = {}, []
    for runner in ("onnxruntime", "openvino"):
        for choice, (content, _) in variants.items():
            plan = PlannedGraph(content, ExecutionPlan(file="", runner=runner, exact=({"batch": batch, **case.sizes},)))
            backend = CpuBackend({graph_name: [plan]}, model, Settings())
            opened.append(backend)

            def call(backend: CpuBackend = backend) -> Any:
                return backend.run(graph_name, {tensor.name: value}, outputs, batch)

            call()
            calls[f"{runner}: {choice}"] = call
    times = timing.measure(calls, seconds)
    for backend in opened:
        backend.close()
    rows = []
    for key, took in times.items():
        runner, _, choice = key.partition(": ")
        rows.append(
            {
                "case": name,
                "graph": graph_name,
                "batch": batch,
                "runner": runner,
                "passes": choice,
                "changed": variants[choice][1],
                "median_us": took.median * 1e6,
                "spread": took.spread,
                "share_of_none": took.median / times[f"{runner}: none"].median,
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
