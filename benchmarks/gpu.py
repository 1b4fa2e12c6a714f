"""Measure what is promised of GPUs: certificates, latency, noise, and TensorRT for RTX beyond the GPUs that it lists.

    make gpu            # writes benchmarks/results/gpu.json

With `--device cpu` the same program runs on the CPU, to see that it works; such a result is not recorded. Every
latency is wall time until the device is idle, from an array on the device to an array on the device, all ways of
running a case in turns; results are checked after timing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vae_export.contract import targets
from vae_export.runtimes.gpu import driver, flavours

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import zoo
from cases import CASES, LATENCY
from machine import machine as this_machine

import vae_export
from vae_export import bench
from vae_export.building import tensorrt
from vae_export.contract import build_record
from vae_export.contract.bundle import Bundle
from vae_export.errors import VaeExportError
from vae_export.numerics import noise
from vae_export.numerics.noise import Normals

VERBS = ("encode", "decode", "sample")
BATCHES = (1, 8, 64, 512)
_ROUNDS = 10
_ROUND_SECONDS = 0.05
_WARM_SECONDS = 0.3
_NOISE = (10_000, 1000)
#: Errors that a result may have after timing, of the largest value: of two kernels in one precision.
_ALLOWED = {"fp32": 1e-3, "fp16": 3e-2}
Call = Callable[[], Any]
Runner = tuple[str, str, Callable[[str, torch.Tensor], Call]]


def main() -> int:
    """Measure all, print tables and write the record."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--compile", choices=("max-autotune", "default", "none"), default="max-autotune")
    asked = arguments.parse_args()
    if asked.device == "cuda" and (problem := driver.query().problem):
        print(f"no figures: {problem}", file=sys.stderr)
        return 4
    record: dict[str, Any] = {**this_machine(), "gpu": card(), "packages": packages()}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bundles = {name: work / f"{name}.bundle" for name in LATENCY}
        sources = {name: zoo.trainer_model(**CASES[name].options) for name in LATENCY}
        for name, path in bundles.items():
            vae_export.export(sources[name], path)
        made, record["certificates"] = certificates(work, bundles, asked.device)
        record["latency"] = [
            {"model": name, **row}
            for name, path in bundles.items()
            for row in latency(path, sources[name].module, made[name], asked.device, asked.compile)
        ]
        if asked.device == "cuda":
            record["noise"] = noises()
            record["rtx_beyond_its_list"] = beyond(bundles["mlp"])
    record["figures"] = figures(record)
    show(record)
    asked.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(any(figure["met"] is False for figure in record["figures"]))


def card() -> dict[str, Any]:
    """The GPU and its driver."""
    found = driver.query()
    gpus = [{"name": gpu.name, "capability": gpu.capability, "memory": gpu.memory} for gpu in found.gpus]
    return {"driver": found.cuda, "gpus": gpus, "torch_cuda": torch.version.cuda}


def packages() -> dict[str, str]:
    """Versions of what may run here."""
    names = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-bindings", "cuda-core", "cuda-bindings")
    found = {}
    for name in (*names, "triton", "nvidia-cuda-nvrtc"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def wanted(device: str) -> Iterator[tuple[str, str]]:
    """What to build for, and in which precision."""
    names = ("cpu",) if device == "cpu" else ("cuda", "tensorrt", "tensorrt-rtx")
    return ((name, precision) for name in names for precision in ("fp32", "fp16"))


def certificates(
    work: Path, bundles: dict[str, Path], device: str
) -> tuple[dict[str, dict[tuple[str, str], Path]], list[dict[str, Any]]]:
    """Build every bundle for every target, and measure."""
    made: dict[str, dict[tuple[str, str], Path]] = {name: {} for name in bundles}
    rows = []
    for name, path in bundles.items():
        for target, precision in wanted(device):
            row: dict[str, Any] = {"model": name, "target": target, "precision": precision}
            began = time.perf_counter()
            try:
                out = work / f"{name}-{target}-{precision}"
                built = vae_export.build(path, target, precision=precision, batches=BATCHES, out=out)
            except VaeExportError as error:
                rows.append(row | {"problem": str(error)})
                continue
            row["seconds"] = time.perf_counter() - began
            if built.certificate is None:
                rows.append(row | {"problem": built.unmeasured})
                continue
            made[name][target, precision] = built.path
            worst = {c.id: c.measured for c in built.certificate.checks if c.graph == "end to end"}
            row |= {"passed": built.certificate.passed, "elbo_worst": worst["elbo.bound.max"]}
            rows.append(row | {"certificate": built.certificate.to_dict()})
    return made, rows


def latency(
    path: Path, module: Any, made: dict[tuple[str, str], Path], device: str, compiled: str
) -> list[dict[str, Any]]:
    """Every way of running a model, at every verb and batch, in turns."""
    runners: list[Runner] = []
    for precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        if device == "cpu" and precision == "fp16":
            continue
        runners.append(("PyTorch eager", precision, pytorch(module, dtype, device, None)))
        if compiled != "none":
            runners.append((f"torch.compile {compiled}", precision, pytorch(module, dtype, device, compiled)))
    if device == "cuda" and ("cuda", "fp32") in made:
        runners.append(("ONNX Runtime CUDA, bare", "fp32", bare(path)))
    opened, bundle = [], Bundle(path)
    examples, seed = bench.Examples(bundle), bundle.manifest.golden.seed
    for (target, precision), build in made.items():
        vae = vae_export.load(path, build=build, micro_batch=max(BATCHES))
        opened.append(vae)
        runners.append((f"vae_export {target}", precision, ours(vae, device, seed)))
    rows = []
    for verb in VERBS:
        for batch in BATCHES:
            cell = examples.cell(verb, batch)
            tensor = torch.from_numpy(cell.value).to(device)
            calls = {}
            for name, precision, prepare in runners:
                call = prepare(verb, tensor)
                until(_WARM_SECONDS, call, device)
                calls[name, precision] = call
            times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in calls}
            for _ in range(_ROUNDS):
                for key, call in calls.items():
                    times[key].append((each(call, device), queued(call, device)))
            for key, call in calls.items():
                check(cell, call(), key[1], addressed=key[0].startswith("vae_export"))
                alone, together = zip(*times[key], strict=True)
                rows.append(
                    {
                        "verb": verb,
                        "batch": batch,
                        "runtime": key[0],
                        "precision": key[1],
                        "call_us": statistics.median(alone) * 1e6,
                        "queued_us": statistics.median(together) * 1e6,
                    }
                )
    for vae in opened:
        vae.close()
    return rows


def pytorch(module: Any, dtype: torch.dtype, device: str, compiled: str | None) -> Callable[[str, torch.Tensor], Call]:
    """The PyTorch model, eager or compiled, channels last where it has convolutions."""
    import copy

    moved = copy.deepcopy(module).to(device, dtype).eval().to(memory_format=torch.channels_last)
    encode, decode = moved.encode, moved.decode
    if compiled:
        mode = None if compiled == "default" else compiled
        encode, decode = torch.compile(encode, mode=mode), torch.compile(decode, mode=mode)

    def prepare(verb: str, value: torch.Tensor) -> Call:
        value = value.to(dtype)

        def call() -> Any:
            with torch.inference_mode():
                if verb == "sample":
                    return decode(torch.randn_like(value))[0]
                return (encode if verb == "encode" else decode)(value)[0]

        return call

    return prepare


def bare(path: Path) -> Callable[[str, torch.Tensor], Call]:
    """ONNX Runtime's own sessions with inputs and outputs bound to the GPU."""
    import onnxruntime as ort

    bundle = Bundle(path)
    provider = [("CUDAExecutionProvider", {"use_tf32": 0})]
    graphs = bundle.manifest.graphs
    sessions = {
        name: ort.InferenceSession(bundle.read(graph.file), providers=provider) for name, graph in graphs.items()
    }

    def prepare(verb: str, value: torch.Tensor) -> Call:
        session = sessions["encoder" if verb == "encode" else "decoder"]
        model = bundle.manifest.model
        tensor = model.signature("encoder" if verb == "encode" else "decoder")[1][0]
        sizes = model.input_sizes("encoder" if verb == "encode" else "decoder", tuple(value.shape[1:]))
        result = torch.empty(model.tensor_shape(tensor, len(value), sizes), device="cuda")

        def call() -> Any:
            source = torch.randn_like(value) if verb == "sample" else value
            torch.cuda.current_stream().synchronize()
            binding = session.io_binding()
            name = session.get_inputs()[0].name
            binding.bind_input(name, "cuda", 0, np.float32, tuple(source.shape), source.data_ptr())
            binding.bind_output(tensor.name, "cuda", 0, np.float32, tuple(result.shape), result.data_ptr())
            session.run_with_iobinding(binding)
            return result

        return call

    return prepare


def ours(vae: Any, device: str, seed: int) -> Callable[[str, torch.Tensor], Call]:
    """`vae_export.load`, arrays of the device in and out."""

    def prepare(verb: str, value: torch.Tensor) -> Call:
        given = value if device == "cuda" else value.numpy()
        if verb == "encode":
            return lambda: vae.encode(given).mean
        if verb == "decode":
            return lambda: vae.decode(given)
        return lambda: vae.sample(len(value), seed, on_device=device == "cuda")

    return prepare


def idle(device: str) -> None:
    """Wait for everything that was begun on the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def until(seconds: float, call: Call, device: str) -> None:
    """Call until the time is over, twice at least: warm-up, compilation and captures included."""
    end = time.perf_counter() + seconds
    for turn in range(1_000_000):
        call()
        idle(device)
        if turn and time.perf_counter() > end:
            return


def each(call: Call, device: str) -> float:
    """Median seconds of a call, the device idle before and after it."""
    times = []
    end = time.perf_counter() + _ROUND_SECONDS
    idle(device)
    while (began := time.perf_counter()) < end or not times:
        call()
        idle(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def queued(call: Call, device: str) -> float:
    """Seconds of a call among many that are queued before the device is waited for."""
    idle(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < _ROUND_SECONDS:
        for _ in range(10):
            call()
        count += 10
    idle(device)
    return (time.perf_counter() - began) / count


def check(cell: bench.Cell, result: Any, precision: str, *, addressed: bool) -> None:
    """Refuse a wrong result. Samples of others have other noise: theirs must have the shape and be finite."""
    found = result.float().cpu().numpy() if isinstance(result, torch.Tensor) else np.asarray(result, np.float32)
    (expected,) = cell.expected.values()
    assert found.shape == (cell.batch, *expected.shape[1:]), (found.shape, cell.batch, expected.shape)
    assert np.isfinite(found).all()
    if cell.verb != "sample" or addressed:
        worst = float(np.abs(found[: len(expected)] - expected).max()) / max(1.0, float(np.abs(expected).max()))
        assert worst <= _ALLOWED[precision], (cell.verb, precision, worst)


def noises() -> dict[str, Any]:
    """Ten million numbers made on the GPU, against the host's."""
    from vae_export.runtimes.gpu.device import Gpu

    gpu = Gpu("benchmark", "gpu")
    stream = gpu.device.create_stream()
    wanted = Normals(7, noise.PRIOR, 3, _NOISE)
    words, normals = np.empty(_NOISE, np.uint32), np.empty(_NOISE, np.float32)
    buffer = gpu.allocate(words.nbytes, stream)
    times = []
    for fill, into in ((gpu.words, words), (gpu.normals, normals)):
        for _ in range(11):
            stream.sync()
            began = time.perf_counter()
            fill(int(buffer.handle), wanted, stream)
            stream.sync()
            times.append(time.perf_counter() - began)
        gpu.fetch(into, int(buffer.handle))
    exact = noise.words(7, noise.PRIOR, 3, *_NOISE)
    expected = wanted.numpy()
    differ = normals != expected
    steps = np.abs(normals.view(np.int32)[differ].astype(np.int64) - expected.view(np.int32)[differ])
    return {
        "values": int(words.size),
        "words_that_differ": int((words != exact).sum()),
        "normals_that_differ": int(differ.sum()),
        "largest_difference_ulp": int(steps.max()) if len(steps) else 0,
        "normals_ms": statistics.median(times[12:]) * 1e3,
    }


def beyond(path: Path) -> list[dict[str, str]]:
    """Whether TensorRT for RTX opens an engine on a GPU that it does not list: its default engine, and one for 8.0."""
    try:
        bindings = flavours.load("tensorrt-rtx")
    except VaeExportError as error:
        return [{"engine": "none", "answer": str(error)}]
    bundle = Bundle(path)
    graph, model = bundle.read(bundle.manifest.graphs["decoder"].file), bundle.manifest.model
    options = build_record.Options(profiles=targets.profiles(model, (1, 8), ()))
    answers = []
    for name in ("tensorrt-rtx", "tensorrt-rtx-sm80"):
        (engine,) = tensorrt.build(bindings, {"decoder": graph}, model, targets.parse(name), options)
        bindings.errors()
        opened = bindings.trt.Runtime(bindings.logger).deserialize_cuda_engine(engine)
        answer = f"refused: {bindings.errors()}"
        if opened is not None:
            context = opened.create_execution_context()
            answer = (
                "opened, and gives a context" if context is not None else f"opened, no context: {bindings.errors()}"
            )
        answers.append({"engine": name, "version": bindings.version, "answer": answer})
    return answers


def in_case(record: dict[str, Any], case: tuple[str, str, int]) -> dict[tuple[str, str], dict[str, Any]]:
    """The latencies of a model, verb and batch, by runtime and precision."""
    rows = (row for row in record["latency"] if (row["model"], row["verb"], row["batch"]) == case)
    return {(row["runtime"], row["precision"]): row for row in rows}


def figures(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What is promised, beside its bound."""
    found = []
    failed = sum(not row.get("passed", True) for row in record["certificates"])
    found.append({"figure": "certificates that fail", "measured": failed, "bound": 0, "met": not failed})
    cells = in_case(record, ("mlp", "decode", 1))
    eager = cells["PyTorch eager", "fp32"]["queued_us"]
    for (name, precision), row in cells.items():
        if name.startswith("vae_export") and precision == "fp32":
            ratio = eager / row["queued_us"]
            bound = 3.0 if "tensorrt" in name else None
            met = None if bound is None else ratio >= bound
            what = f"mlp, batch 1, decode on the device: PyTorch eager ÷ {name}"
            found.append({"figure": what, "measured": ratio, "bound": bound, "met": met})
    if "noise" in record:
        made = record["noise"]
        share = made["normals_that_differ"] / made["values"]
        found += [
            {"figure": "words of noise that differ", "measured": made["words_that_differ"], "bound": 0,
             "met": made["words_that_differ"] == 0},
            {"figure": "share of normals that differ", "measured": share, "bound": 1e-6, "met": share <= 1e-6},
            {"figure": "and by how many ulp", "measured": made["largest_difference_ulp"], "bound": 1,
             "met": made["largest_difference_ulp"] <= 1},
        ]  # fmt: skip
    return found


def show(record: dict[str, Any]) -> None:
    """Short tables."""
    console = Console(width=160)
    table = Table("figure", "measured", "bound", "", title="figures", title_justify="left")
    for row in record["figures"]:
        verdict = {True: "ok", False: "[red]MISSED[/]", None: ""}[row["met"]]
        table.add_row(
            row["figure"], f"{row['measured']:.4g}", "" if row["bound"] is None else str(row["bound"]), verdict
        )
    console.print(table)
    runtimes = list(dict.fromkeys((r["runtime"], r["precision"]) for r in record["latency"]))
    table = Table("model", "verb", "batch", *(f"{n}, {p}" for n, p in runtimes), title_justify="left",
                  title="µs of a call alone / of one among many that are queued, medians")  # fmt: skip
    for case in dict.fromkeys((r["model"], r["verb"], r["batch"]) for r in record["latency"]):
        cells = in_case(record, case)
        shown = (f"{c['call_us']:.1f} / {c['queued_us']:.1f}" if c else "" for c in map(cells.get, runtimes))
        table.add_row(*map(str, case), *shown)
    console.print(table)
    for row in record["certificates"]:
        if "problem" in row:
            console.print(f"{row['model']} {row['target']} {row['precision']}: {row['problem']}")
    for row in record.get("rtx_beyond_its_list", ()):
        console.print(f"{row['engine']}: {row['answer']}")


if __name__ == "__main__":
    sys.exit(main())
