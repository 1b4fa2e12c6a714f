"""The certificate's power: how far right exports stay below its tolerances, and planted faults above them.

    python benchmarks/margins.py OUT.json [right] [faults] [--rows N] [--only NAME,NAME]

A share is measured ÷ tolerance, the largest over a certificate's checks: at most 0.5 for right exports, on every
runner, and at least 3 for faults. Earlier results of other steps and models in the file stay.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import faults
import numpy as np
import odd
import torch
import trained
import zoo
import zoo_diffusers
from machine import machine

from vae_export import sources
from vae_export.certification import reference as references
from vae_export.certification import verifier
from vae_export.certification.certificate import Check
from vae_export.certification.golden import Reference
from vae_export.errors import VaeExportError
from vae_export.exporting import tracing
from vae_export.numerics.noise import Normals
from vae_export.runtimes import Backend, Settings, open_backend
from vae_export.runtimes.backend import planned, slices
from vae_export.runtimes.cpu.dispatch import CpuBackend
from vae_export.sources import cost
from vae_export.sources.protocol import Decoder, Encoder, Trained

RIGHT, WRONG = 0.5, 3.0
_ROWS = 24  # of data and of draws: margins of many models, not of many examples
_SIZE = {"height": 16, "width": 24}
_LARGEST = 1e9  # a share where the tolerance is 0, or that is not finite


class Eager:
    """The PyTorch model in float32 as a backend."""

    on_gpu = False

    def __init__(self, source: Trained) -> None:
        self._modules: dict[str, Encoder | Decoder] = {
            "encoder": Encoder(source.module, source.model).eval(),
            "decoder": Decoder(source.module, source.model).eval(),
        }
        self.graphs = frozenset(self._modules)

    def run(
        self,
        graph: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
        micro_batch: int,
        *,
        on_device: bool = False,
        out: Sequence[Any] | None = None,
    ) -> list[Any]:
        """See `Backend.run`."""
        module, (value,) = self._modules[graph], inputs.values()
        array = value.numpy() if isinstance(value, Normals) else value
        parts = []
        with torch.no_grad():
            for rows in slices(len(array), micro_batch):
                named = dict(zip(module.outputs, module(torch.tensor(array[rows])), strict=True))
                parts.append([named[name].numpy() for name in outputs])
        results = [np.ascontiguousarray(np.concatenate(values)) for values in zip(*parts, strict=True)]
        if out is None:
            return results
        for target, result in zip(out, results, strict=True):
            target[...] = result
        return list(out)

    def warm(self, graph: str, inputs: Mapping[str, Any], outputs: Sequence[str], micro_batch: int) -> None:
        """See `Backend.warm`."""
        self.run(graph, inputs, outputs, micro_batch)

    def draw(self, mean: Any, logvar: Any, eps: Normals) -> Any:
        """Never called, as `on_gpu` is False."""
        raise AssertionError("arrays on the GPU are refused before")

    def describe(self) -> Mapping[str, Any]:
        """See `Backend.describe`."""
        return {"backend": "PyTorch", "version": torch.__version__, "device": "cpu"}

    def close(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True)
class Case:
    """A model with its graphs as exported, and the reference that they are measured against."""

    source: Trained
    graphs: Mapping[str, bytes]
    reference: Reference


@dataclass(frozen=True)
class Margin:
    """The largest share of a certificate, and the check that has it."""

    share: float
    check: str

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"share": self.share, "check": self.check}


def prepare(source: Trained, rows: int = _ROWS) -> Case:
    """Trace a model's graphs, as export does, and compute its reference on at most `rows` rows."""
    graphs = {}
    latent = source.model.latent_shape(source.sizes())
    for kind, wrapper, shape in (("encoder", Encoder, source.example_shape), ("decoder", Decoder, latent)):
        module = wrapper(source.module, source.model).eval()
        graphs[kind], beside, _ = tracing.trace(kind, module, shape, source.model)
        assert beside is None, "models of this size hold their weights themselves"
    reference = references.compute(source, cost.count(source), most=rows)
    return Case(source, graphs, reference)


def share(check: Check) -> float:
    """Measured ÷ tolerance, as a finite number for JSON."""
    return min(check.share, _LARGEST)


def measure(case: Case, backend: Backend) -> Margin:
    """The largest share of a backend's certificate."""
    try:
        certificate = verifier.measure(case.source.model, backend, case.reference, "margins")
    finally:
        backend.close()
    worst = max(certificate.checks, key=share)
    return Margin(share(worst), str(worst))


def onnx_runtime(case: Case, graphs: Mapping[str, bytes] | None = None) -> Backend:
    """The graphs, or others in their place, as the bundle runs them."""
    return open_backend(graphs or case.graphs, case.source.model, device="cpu")


def openvino(case: Case) -> Backend:
    """The bundle's own graphs in OpenVINO."""
    ways = {name: [planned(raw, runner="openvino")] for name, raw in case.graphs.items()}
    return CpuBackend(ways, case.source.model, Settings())


RUNNERS: dict[str, Callable[[Case], Backend]] = {
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "PyTorch float32": lambda case: Eager(case.source),
}


def planted(case: Case, kind: str) -> Iterator[tuple[str, Margin | None]]:
    """A fault in each graph that has a place for it: the graph's name, and the margin.

    None where the fault changes no bit of the results for the reference's rows, for instance a missing clamp that no
    example reaches.
    """
    for name, graphs in faults.plant(case.graphs, kind).items():
        try:
            right, wrong = onnx_runtime(case), onnx_runtime(case, graphs)
            same = _same(case, name, right, wrong)
            right.close()
            yield name, None if same else measure(case, wrong)
        except VaeExportError as error:
            yield name, Margin(_LARGEST, f"does not run: {str(error).partition(chr(10))[0]}")


def _same(case: Case, name: str, *backends: Backend) -> bool:
    """Whether backends give the same bits for the golden rows of data, or for their latents."""
    inputs, outputs = case.source.model.signature(name)
    given = case.reference.tensors["x" if name == "encoder" else "mean"]
    feeds = {inputs[0].name: np.ascontiguousarray(given, np.float32)}
    first, second = (b.run(name, feeds, [tensor.name for tensor in outputs], 64) for b in backends)
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@contextmanager
def _diffusers(name: str) -> Iterator[Trained]:
    with tempfile.TemporaryDirectory() as folder:
        yield sources.resolve(zoo_diffusers.write(Path(folder) / name, name), size=_SIZE)


def _source(name: str) -> Trained:
    """The model of a name: of the zoo, diffusers', odd, with every kind of place, or trained."""
    if name in zoo.MEMBERS:
        return zoo.MEMBERS[name]()
    if name in odd.EVERYTHING:
        return odd.everything(name)
    if name in trained.NAMES:
        return trained.load(name)
    with _diffusers(name) as source:
        return source


def right_models() -> list[str]:
    """Models whose exports must pass."""
    weights = [] if trained.missing() else list(trained.NAMES)
    return [*zoo.MEMBERS, *odd.EVERYTHING, *zoo_diffusers.CONFIGS, *odd.CONFIGS, *weights]


def wrong_models() -> list[str]:
    """Models in which faults are planted."""
    weights = [] if trained.missing() else ["VAE_mnist", "btcvae_celeba"]
    return [*odd.EVERYTHING, "conv-gaussian", "resnet", "kl-sd15", "tiny", "dc", "asymmetric", *weights]


def table(record: Mapping[str, Any]) -> list[str]:
    """As Markdown: the largest share of right exports by group of models, and the smallest of faults by kind."""
    lines = ["| right exports | models | " + " | ".join(RUNNERS) + " |", "|---|---|" + "---|" * len(RUNNERS)]
    groups: dict[str, list[str]] = {}
    for name in record.get("right", {}):
        groups.setdefault(_group(name), []).append(name)
    for group, names in groups.items():
        largest = [_largest(record["right"], names, runner) for runner in RUNNERS]
        lines.append(f"| {group} | {len(names)} | " + " | ".join(largest) + " |")
    lines += ["", "| fault | planted | models | smallest share | where |", "|---|---|---|---|---|"]
    for kind, places in record.get("faults", {}).items():
        seen = {where: margin for where, margin in places.items() if margin}
        if seen:
            least = min(seen, key=lambda where: seen[where]["share"])
            models = len({where.partition(",")[0] for where in seen})
            lines.append(f"| {kind} | {len(seen)} | {models} | {seen[least]['share']:.3g} | {least} |")
    return lines


def _group(name: str) -> str:
    if name.startswith("odd-"):
        return f"odd configurations, {name.split('-')[1]}"
    kinds = {"zoo and trainer": zoo.MEMBERS, "every kind of layer": odd.EVERYTHING, "trained": trained.NAMES}
    return next((kind for kind, names in kinds.items() if name in names), "diffusers, published kinds")


def _largest(margins: Mapping[str, Any], names: Sequence[str], runner: str) -> str:
    shares = {name: margins[name][runner]["share"] for name in names if runner in margins[name]}
    worst = max(shares, key=shares.__getitem__)
    return f"{shares[worst]:.3g} ({worst})"


def _right(case: Case) -> dict[str, Any]:
    return {runner: measure(case, opened(case)).plain() for runner, opened in RUNNERS.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", nargs="*", default=["right", "faults"])
    parser.add_argument("--rows", type=int, default=_ROWS)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    out: Path = arguments.out
    only = arguments.only.split(",") if arguments.only else None
    record: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    record |= {**machine(), "rows": arguments.rows}
    for step, names in (("right", right_models()), ("faults", wrong_models())):
        for name in names if step in arguments.steps else ():
            if only is None or name in only:
                _record(record, step, name, prepare(_source(name), arguments.rows))
                out.write_text(json.dumps(record, indent=2) + "\n")
    print("\n".join(table(record)))
    _judge(record)


def _record(record: dict[str, Any], step: str, name: str, case: Case) -> None:
    if step == "right":
        margins = record.setdefault("right", {})[name] = _right(case)
        print(name, {runner: round(margin["share"], 3) for runner, margin in margins.items()}, flush=True)
        return
    for kind in faults.FAULTS:
        for part, margin in planted(case, kind):
            places = record.setdefault("faults", {}).setdefault(kind, {})
            places[f"{name}, {part}"] = margin.plain() if margin else None
            shown = "changes nothing" if margin is None else f"{margin.share:.3g}"
            print(f"{name}, {part}: {kind}: {shown}", flush=True)


def _judge(record: Mapping[str, Any]) -> None:
    """Print the margins on the wrong side of their bounds."""
    for name, runners in record.get("right", {}).items():
        for runner, margin in runners.items():
            if not margin["share"] <= RIGHT or math.isnan(margin["share"]):
                print(f"right, above {RIGHT}: {name}, {runner}: {margin['share']:.3g}: {margin['check']}")
    for kind, places in record.get("faults", {}).items():
        for where, margin in places.items():
            if margin and not margin["share"] >= WRONG:
                print(f"fault, below {WRONG}: {kind}: {where}: {margin['share']:.3g}: {margin['check']}")


if __name__ == "__main__":
    main()
