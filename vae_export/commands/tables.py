"""What the verbs print for people: one-line verdicts and tables that stay readable at 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vae_export.certification.certificate import Certificate
from vae_export.contract.build_record import Build, BuiltGraph, ExecutionPlan
from vae_export.contract.manifest import Manifest, Origin
from vae_export.contract.model import Cost, Likelihood, Model, shape_text
from vae_export.contract.targets import title


def facts(title: str, values: Mapping[str, object]) -> Table:
    """Two columns: names and values."""
    table = Table(title=escape(title), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(Text(name), Text(str(value)))
    return table


def columns(title: str, names: Sequence[str], numeric: Sequence[str] = (), **options: Any) -> Table:
    """An empty table with headings and without vertical lines. Numbers are on the right and never broken."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), **options)
    for name in names:
        number = name in numeric
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def verdict(measured: Certificate) -> str:
    """Whether a certificate passed, in one line."""
    judged = [check for check in measured.checks if check.tolerance is not None]
    failed = [check for check in judged if not check.passed]
    where = f"{measured.nearest.id} ({measured.nearest.share:.0%})"
    if failed:
        return f"certificate FAILED: {len(failed)} of {len(judged)} checks exceed their tolerance; worst: {where}"
    return f"certificate passed: {len(judged)} checks; nearest to its tolerance: {where}"


def certificate(measured: Certificate) -> Table:
    """The checks of a certificate, one a row, and in the caption what was compared with what."""
    ran = measured.measured
    kinds = ", ".join(f"{count:,} {name}" for name, count in measured.examples.items() if count)
    sizes = f"; at {'; '.join(measured.sizes)}" if measured.sizes else ""
    absent = "".join(f". Not measured: {reason}" for reason in measured.absent)
    table = columns(
        f"{measured.bundle}: certificate, {measured.precision}",
        ("graph", "quantity", "measured", "tolerance", "PyTorch", "unit", ""),
        ("measured", "tolerance", "PyTorch"),
        caption=escape(
            f"{measured.reference} against {ran.get('backend')} {ran.get('version')} {ran.get('provider')}; "
            f"{kinds}; over batches {', '.join(map(str, measured.batches))}{sizes}. Each check shows the example "
            "nearest to its tolerance. PyTorch: the error of PyTorch itself in float32. Batch splits bit-identical: "
            f"{'yes' if measured.splits_identical else 'no'}{absent}"
        ),
        caption_justify="left",
    )
    for check in measured.checks:
        verdict = "" if check.tolerance is None else "[green]ok[/]" if check.passed else "[bold red]FAILED[/]"
        tolerance, own = (f"{v:.3g}" if v is not None else "" for v in (check.tolerance, check.pytorch))
        quantity = check.quantity
        if check.rows is not None and check.quantile is not None:
            quantity += f" ({check.rows:,}: 99.9 % are within {check.quantile:.3g})"
        table.add_row(check.graph, Text(quantity), f"{check.measured:.3g}", tolerance, own, Text(check.unit), verdict)
    return table


def costs(model: Model, counted: Mapping[str, Cost], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The cost of one example of these sizes in each graph: multiply-adds, and bytes of intermediate results."""
    graphs = {}
    for name, cost in counted.items():
        multiply_adds, activations = cost.at(sizes)
        graphs[name] = {"multiply_adds": multiply_adds, "activation_bytes": activations}
    return {"sizes": dict(sizes), "weight_bytes": 4 * model.parameters, **graphs}


def source(name: str, model: Model, origin: Origin, counted: Mapping[str, Any]) -> Table:
    """A trained model that is not exported yet."""
    return facts(name, {"from": f"{origin.kind} {origin.name}", **_model(model, counted)})


def _model(model: Model, counted: Mapping[str, Any]) -> dict[str, object]:
    """The facts about a model, in words."""
    low, high = model.data.range
    nominal = " (nominal: it was not trained with it)" * model.likelihood.nominal
    values: dict[str, object] = {
        "architecture": f"{model.architecture}, {model.parameters:,} parameters",
        "data x": f"{shape_text(model.data.shape)} in [{low:g}, {high:g}]",
        "latent z": shape_text(model.latent.shape),
        "prior p(z)": model.prior,
        "posterior q(z|x)": _with_clamp(model.posterior.kind, model.posterior.logvar_clamp),
        "likelihood p(x|z)": _likelihood(model.likelihood) + nominal,
    }
    if named := model.data.named():
        values["sizes"] = "; ".join(str(dim) for dim in named.values())
    if model.latent.scaled:
        values["a diffusion model's latents"] = model.latent.formula
    if model.force_upcast:
        values["float16"] = "overflows, as its config.json says (force_upcast)"
    at = ", ".join(f"{name} {size}" for name, size in counted["sizes"].items())
    for graph in ("encoder", "decoder"):
        if graph in counted:
            one = counted[graph]
            values[f"one example in the {graph}"] = (
                f"{one['multiply_adds'] / 1e9:.3g} billion multiply-adds, {one['activation_bytes'] / 2**20:.3g} MiB of "
                f"intermediate results{f' at {at}' if at else ''}"
            )
    values["weights"] = f"{counted['weight_bytes'] / 2**20:.3g} MiB in float32"
    return values


def bundle(
    path: Path,
    manifest: Manifest,
    measured: Certificate,
    unlisted: list[str],
    cached: list[str],
    counted: Mapping[str, Any],
) -> list[Table]:
    """A bundle: an overview, its graphs and its files."""
    overview: dict[str, object] = {
        "bundle": path,
        "created": manifest.created,
        **_model(manifest.model, counted),
        "from": f"{manifest.origin.kind} {manifest.origin.name}, trained on {manifest.origin.data or 'unknown data'}",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
        "certificate": f"{measured.precision}, as the bundle says; nearest to its tolerance: {measured.nearest}. "
        "`vae-export verify` measures it here",
    }
    for name, graph in manifest.graphs.items():
        if graph.tiled:
            overview[f"tiles in the {name}"] = graph.tiled
    if cached:
        overview["builds in the cache"] = ", ".join(cached)
    if unlisted:
        overview["unlisted files"] = f"{', '.join(unlisted)} (never read)"
    graphs = columns("graphs", ("graph", "file", "opset", "inputs", "outputs"))
    for name, graph in manifest.graphs.items():
        tensors = (
            "\n".join(f"{t.name} {t.dtype} ({', '.join(map(str, t.shape))})" for t in side)
            for side in (graph.inputs, graph.outputs)
        )
        paths = "\n".join(filter(None, (graph.file, graph.weights)))
        graphs.add_row(*map(Text, (name, paths, str(graph.opset), *tensors)))
    files = columns("files", ("file", "bytes", "SHA-256"), ("bytes",))
    for name, file in manifest.files.items():
        files.add_row(Text(name), f"{file.size:,}", file.sha256[:16] + "…")
    return [facts(manifest.name, overview), graphs, files]


#: Kinds of calibration rows, in words.
_KINDS = {
    "calibration": "rows of calibration data",
    "held_out": "golden rows of data",
    "decoded": "decoded draws from the prior",
    "prior": "draws from the prior for the decoder",
}


def build(path: Path, record: Build) -> Table:
    """A build: its record."""
    options, engine = record.options, record.engine
    flags = [name for name in ("tf32", "nhwc", "refittable") if getattr(options, name)]
    values: dict[str, object] = {
        "build": path,
        "of bundle": f"{record.bundle}, manifest {record.manifest[:16]}…",
        "target": record.target,
        "created": record.created,
        "precision": ", ".join([options.precision, *flags]),
        "computes in": record.in_words(),
        "graphs": ", ".join(f"{name} ({record.files[g.file].size:,} bytes)" for name, g in record.graphs.items()),
        "made with": ", ".join(f"{name} {version}" for name, version in record.tools.items()),
    }
    for name, graph in record.graphs.items():
        if graph.variants or graph.passes or graph.kept:
            values[name] = "\n".join(_variants(graph))
    if record.processor:
        values["measured on"] = f"{record.processor}: {', '.join(record.processor.features)}"
    if record.calibrated:
        values["activations recorded on"] = ", ".join(
            f"{count:,} {_KINDS.get(kind, kind)}" for kind, count in record.calibrated.items()
        )
    if record.absent:
        values["not possible here"] = "\n".join(record.absent)
    if engine:
        values["engine"] = f"{title(engine.flavour)} {engine.version}, {engine.platform}"
        values["runs on"] = f"compute capability {', '.join(engine.capabilities)}"
        values["built on"] = f"{engine.gpu}, {engine.driver}" if engine.gpu else "a machine without a GPU"
        values["profiles"] = "\n".join(map(str, options.profiles))
    return facts(f"build for {record.target}", values)


def _variants(graph: BuiltGraph) -> list[str]:
    """How a graph runs, the passes applied to it and its nodes in float32, in lines."""
    lines = []
    for variant in graph.variants:
        limit = "all other batches" if variant.max_batch is None else f"batches up to {variant.max_batch}"
        threads = "" if variant.threads is None else f", {variant.threads} thread{'s' * (variant.threads > 1)}"
        exact = ", ".join(" ".join(f"{name} {size}" for name, size in shape.items()) for shape in variant.exact)
        compiled = f", compiled for {exact}" if exact else ""
        lines.append(f"{limit}: {variant.runner}, {variant.precision}{threads}{compiled}; {_changes(variant)}")
    if not graph.variants:
        lines.append(_changes(graph))
    return lines


def _changes(plan: ExecutionPlan | BuiltGraph) -> str:
    changed = ", ".join(f"{name} {count}" for name, count in plan.passes.items()) or "none"
    kept = "".join(f"\n  float32: {node} ({why})" for node, why in plan.kept.items())
    return f"passes: {changed}{kept}"


def measurements(record: Build) -> Table:
    """Every row of the record, in its order: each candidate for each graph and batch, with its verdict."""
    table = columns(
        "median time of a call; candidates took turns",
        ("graph", "batch", "candidate", "ms", "spread", "verdict"),
        ("batch", "ms", "spread"),
    )
    for row in record.measurements:
        threads = "" if row.threads is None else f", {row.threads} thread{'s' * (row.threads > 1)}"
        passes = f"; {', '.join(row.passes)}" if row.passes else ""
        table.add_row(
            Text(row.graph),
            str(row.batch),
            Text(f"{row.runner} {row.precision}{threads}{passes}"),
            "" if row.median_us is None else f"{row.median_us / 1e3:,.3f}",
            "" if row.spread is None else f"{row.spread:.0%}",
            Text(row.verdict),
        )
    return table


def diagnosis(state: Mapping[str, Any]) -> list[Table]:
    """What `diagnosis.examine` gives: this machine, and the extras."""
    runtime, driver = state["onnxruntime"], state["driver"]
    gpus = [f"{gpu['name']}, compute capability {gpu['capability']}" for gpu in driver["gpus"]]
    machine = {name: state[name] for name in ("vae-export", "python", "platform", "cores")} | {
        "onnxruntime": runtime.get("version", "not usable"),
        "providers": ", ".join(runtime.get("providers", [])) or "none",
        "NVIDIA driver": f"CUDA {driver['cuda']}" if driver["cuda"] else "none",
        "processor": state["processor"],
        "GPUs": "\n".join(gpus) or driver["problem"],
        **{title: here.get("version") or here["problem"] for title, here in state["tensorrt"].items()},
        "noise on the GPU": state["kernels"].get("problem") or "its kernels compile",
        "cache of builds": state["cache"].get("problem") or state["cache"]["path"],
    }
    extras = {}
    for name, extra in state["extras"].items():
        packages = ", ".join(f"{package} {version or 'MISSING'}" for package, version in extra["packages"].items())
        install = f"\n{extra['install']}" if extra["install"] else ""
        extras[f"[{name}]"] = f"{extra['purpose']}: {packages}{install}"
    return [facts("this machine", machine), facts("extras", extras)]


def as_text(*renderables: Any, width: int = 120) -> str:
    """Tables as plain text."""
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    return capture.get()


def _likelihood(likelihood: Likelihood) -> str:
    shown = _with_clamp(likelihood.kind, likelihood.logvar_clamp)
    if likelihood.log_scale_clamp:
        shown += ", log_scale clamped to [{:g}, {:g}]".format(*likelihood.log_scale_clamp)
    return shown if likelihood.variance is None else f"{shown}, variance {likelihood.variance:.4g}"


def _with_clamp(kind: str, clamp: tuple[float, float] | None) -> str:
    return kind if clamp is None else f"{kind}, logvar clamped to [{clamp[0]:g}, {clamp[1]:g}]"
