"""Record the speed beside other ways to run a model, and how it grows.

    python benchmarks/performance.py OUT.json [CASE …] [--resume] [--seconds S] [--work DIR]

A case is a name of `cases.CASES`, or `twice`, or `scaling`; without one, all are measured. OUT.json is written after
every case, so that a run can be stopped, and continued with --resume. --work keeps sources, bundles and builds for the
next run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cases
import numpy as np
import onnx
from cases import Case, Plan
from machine import machine

import vae_export
from vae_export import bench
from vae_export.contract import atomic
from vae_export.contract.build_record import BuildFolder
from vae_export.contract.bundle import Bundle
from vae_export.errors import VaeExportError

VERBS = ("decode", "encode")
SCALING, TWICE = "scaling", "twice"
#: The peers whose growth is measured.
_SCALED = ("openvino-fp32", "openvino-bf16")

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None, plan: Plan = cases.PLAN) -> None:
    """Measure the cases that are named in the arguments, or all."""
    parser = argparse.ArgumentParser(description="Record speed beside peers.")
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(plan.cases)}, {TWICE}, {SCALING}")
    parser.add_argument("--resume", action="store_true", help="keep what OUT.json has")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each runner and cell")
    parser.add_argument("--work", type=Path, help="keep sources, bundles and builds there")
    options = parser.parse_intermixed_args(arguments)
    known = [*plan.cases, TWICE, SCALING]
    if unknown := [name for name in options.cases if name not in known]:
        parser.error(f"there is no case {unknown[0]!r}; expected {', '.join(known)}")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        record(options.out, plan, options.cases or known, work, options.seconds, resume=options.resume)


def record(out: Path, plan: Plan, names: Sequence[str], work: Path, seconds: float, *, resume: bool) -> None:
    """Measure cases and write the record after each.

    Args:
        out: the record.
        plan: what can be measured.
        names: of its cases, or `twice`, or `scaling`.
        work: keeps sources, bundles and builds.
        seconds: for each runner and cell.
        resume: keep what the record has and do not measure it again.
    """
    empty: dict[str, Any] = {"cases": {}, TWICE: {}, SCALING: {}}
    found: dict[str, Any] = json.loads(out.read_text()) if resume and out.is_file() else empty
    steps: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
        ("cases", name): partial(compared, plan.cases[name], work, seconds, plan.peers)
        for name in names
        if name not in (TWICE, SCALING)
    }
    if TWICE in names:
        for name in plan.twice:
            steps[TWICE, name] = partial(twice, plan.cases[name], work)
    if SCALING in names:
        for axis, along in plan.scaling.items():
            steps[SCALING, axis] = partial(scaled, along, work, seconds)
    for (part, name), step in steps.items():
        if name in found[part]:
            continue
        print(f"{part}: {name}", flush=True)
        found[part][name] = step()
        found |= machine()
        averaged = [case for name, case in found["cases"].items() if name in cases.MEANS] or found["cases"].values()
        found["means"] = means([cell for case in averaged for cell in case["cells"]])
        with atomic.atomic_file(out) as stage:
            stage.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def compared(case: Case, work: Path, seconds: float, peers: Collection[str]) -> dict[str, Any]:
    """The report of a case with its builds and peers at all its batches, and ours beside the fastest peers."""
    made = cases.make(case, work)
    built, missing = builds(case, made.bundle, work)
    with bench.candidates(made.bundle, builds=built, source=made.source, peers=peers) as selection:
        selection.absent += missing
        report = run(selection, case, seconds)
    plain = report.to_dict()
    model = Bundle(made.bundle).manifest.model
    counted = {build.stem.rpartition("-")[2]: multiplications(case, made.bundle, build) for build in built}
    return {**plain, "parameters": model.parameters, "cells": cells(plain["rows"]), "multiplications": counted}


def run(selection: bench.Selection, case: Case, seconds: float) -> bench.Report:
    """Time a case, and print each step."""
    sizes, progress = case.sizes or None, lambda step: print(f"  {step}", flush=True)
    return bench.run(selection, VERBS, case.batches, sizes=sizes, seconds=seconds, progress=progress)


def builds(case: Case, bundle: Path, work: Path) -> tuple[list[Path], list[bench.Absent]]:
    """The folders of a case's builds, made once, and the builds that are not possible here, with the reasons."""
    made, missing = [], []
    for name in case.builds:
        out = work / f"{bundle.stem}-{name}.build"
        try:
            if not out.exists():
                build(case, bundle, out, name)
            made.append(out)
        except VaeExportError as error:
            missing.append(bench.Absent(f"vae_export {name}", str(error)))
    return made, missing


def build(case: Case, bundle: Path, out: Path, name: str) -> Any:
    """One build, candidates measured at the case's sizes and batches."""
    sizes = [case.sizes] if case.sizes else []
    return vae_export.build(bundle, "cpu", out=out, batches=case.batches, sizes=sizes, **case.builds[name]).record


def twice(case: Case, work: Path) -> dict[str, Any]:
    """The float32 build made twice: for each graph and batch what was chosen, and how far the two are apart.

    `difference` is that of the second choice's median from the first's in the first's own measurements, `spread` the
    larger of their spreads there.
    """
    made = cases.make(case, work)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        records = [build(case, made.bundle, Path(folder, str(number)), "fp32") for number in range(2)]

    def key(row: Any) -> tuple[Any, ...]:
        return row.runner, row.precision, row.passes, row.threads

    rows = []
    timed = {(m.graph, m.batch, key(m)): m for m in records[0].measurements}
    chosen = [{(m.graph, m.batch): key(m) for m in r.measurements if m.verdict == "chosen"} for r in records]
    for place in chosen[0].keys() & chosen[1].keys():
        first, second = (timed[*place, which[place]] for which in chosen)
        row: dict[str, Any] = {"graph": place[0], "batch": place[1], "same": chosen[0][place] == chosen[1][place]}
        if first.median_us and second.median_us:
            row["difference"] = second.median_us / first.median_us - 1
            row["spread"] = max(first.spread, second.spread)
        rows.append(row)
    rows.sort(key=lambda row: (row["graph"], row["batch"]))
    return {"rows": rows, "only_in_one": sorted(set(records[0].graphs) ^ set(records[1].graphs))}


def multiplications(case: Case, bundle: Path, path: Path) -> dict[str, dict[str, float]]:
    """For each verb, the multiply-adds of one example in the bundle's graph and in the build's for single examples."""
    opened, folder = Bundle(bundle), BuildFolder(path)
    plain, model = opened.graphs()[0], opened.manifest.model
    plans = folder.variants()
    found = {}
    for verb, graph in (("encode", "encoder"), ("decode", "decoder")):
        inputs = {t.name: model.tensor_shape(t, 1, dict(case.sizes)) for t in model.signature(graph)[0]}
        direct, ours = (count(content, inputs) for content in (plain[graph], plans[graph][0][1]))
        found[verb] = {"direct": direct, "ours": ours, "ceiling": direct / ours}
    return found


def count(content: bytes, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The multiply-adds of a graph's convolutions, and of its products by weights, for inputs of these shapes."""
    proto = onnx.ModelProto.FromString(content)
    for value in proto.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dim.dim_value = size
    del proto.graph.value_info[:]  # of variable shapes
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    typed = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    graph = typed.graph
    known = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        known[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    total = 0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            inner = known.get(node.input[1])
            if not inner or 0 in inner:  # an attention's product, which is the same in every form
                continue
            flipped = any(a.name == "transB" and a.i for a in node.attribute)
            each = math.prod(inner[1:]) if node.op_type == "Conv" else inner[-1] if flipped else inner[-2]
            total += _size(known[node.output[0]]) * each
        elif node.op_type == "ConvTranspose":
            total += _size(known[node.input[0]]) * math.prod(known[node.input[1]][1:])
    return total


def _size(shape: Sequence[int]) -> int:
    """The number of elements of a known shape."""
    assert shape
    assert min(shape) > 0, shape
    return math.prod(shape)


def cells(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For each verb and batch the fastest peer in float32 and below it, and ours as a share of their time.

    The bare session on the bundle's graphs counts as a peer: a user has it without us.
    """
    rows, found = list(rows), []
    for verb, batch in dict.fromkeys((row["verb"], row["batch"]) for row in rows):
        here = [row for row in rows if (row["verb"], row["batch"]) == (verb, batch)]
        own = [row for row in here if row["runner"].startswith("vae_export")]
        others = [row for row in here if row not in own]
        cell: dict[str, Any] = {"verb": verb, "batch": batch}
        cell["ours"] = {r["runner"]: {"median_us": r["median_us"], "precision": r["precision"]} for r in own}
        for kind, low in (("float32", False), ("low_precision", True)):
            peers = [row for row in others if (row["precision"] != "fp32") is low]
            if peers:
                best = min(peers, key=lambda row: row["median_us"])
                ratios = {row["runner"]: row["median_us"] / best["median_us"] for row in own}
                cell[kind] = {"peer": best["runner"], "median_us": best["median_us"], "ours_to_it": ratios}
        found.append(cell)
    return found


def means(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Geometric means of the ratios over cases and batches: by verb, by the kind of peer, by our runner."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for verb in dict.fromkeys(cell["verb"] for cell in found):
        here = [cell for cell in found if cell["verb"] == verb]
        for kind in ("float32", "low_precision"):
            ratios: dict[str, list[float]] = {}
            for cell in here:
                for runner, ratio in cell.get(kind, {}).get("ours_to_it", {}).items():
                    ratios.setdefault(runner, []).append(ratio)
            means_of = {runner: statistics.geometric_mean(values) for runner, values in ratios.items()}
            result.setdefault(verb, {})[kind] = means_of
    return result


def scaled(along: Sequence[Case], work: Path, seconds: float) -> dict[str, Any]:
    """Times along one axis, and for each verb and runner the exponent of time against work."""
    rows: list[Row] = []
    for case in along:
        made = cases.make(case, work)
        parameters = Bundle(made.bundle).manifest.model.parameters
        with bench.candidates(made.bundle, peers=_SCALED) as selection:
            report = run(selection, case, seconds)
        extra = {"parameters": parameters, "pixels": math.prod(case.sizes.values()) if case.sizes else None}
        rows += [{**row, **extra} for row in report.to_dict()["rows"]]
    return {"rows": rows, "exponents": exponents(rows)}


def exponents(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """By verb and runner, the exponent e of time ~ work^e, work in multiply-adds: least squares on logarithms.

    1 is time in proportion to work; below it, the fixed cost of a call still counts. Constant work has no exponent.
    """
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["multiply_adds"]:
            place = points.setdefault(row["verb"], {}).setdefault(row["runner"], [])
            place.append((math.log(row["multiply_adds"]), math.log(row["median_us"])))
    return {
        verb: {
            runner: float(np.polyfit(*zip(*found, strict=True), 1)[0])
            for runner, found in of_verb.items()
            if len({work for work, _ in found}) > 1
        }
        for verb, of_verb in points.items()
    }


if __name__ == "__main__":
    main()
