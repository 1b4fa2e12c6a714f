"""The command line: one function a verb, which parses, calls and prints."""

from __future__ import annotations

import contextlib
import enum
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast

import typer
import typer.core

from vae_export.commands import terminal
from vae_export.commands.train import numbers, train
from vae_export.errors import EXPORT_NEEDS, BackendError, BundleError, InputError, VaeExportError, printable, require

if TYPE_CHECKING:
    from vae_export.contract.targets import Wanted
    from vae_export.runtimes import VAE


#: Typer's own or click's, as its version has it.
_USAGE_ERROR = cast("type[Any]", typer.BadParameter.__base__)


class _Verbs(typer.core.TyperGroup):
    """A usage error quotes what was typed, which may be a stranger's file's name."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _printable_usage():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _printable_usage():
            return super().invoke(ctx)


@contextlib.contextmanager
def _printable_usage() -> Iterator[None]:
    try:
        yield
    except _USAGE_ERROR as error:
        error.message = printable(error.message)
        raise


app = typer.Typer(
    name="vae-export",
    cls=_Verbs,
    help="Take a trained variational autoencoder from PyTorch to a verified bundle, and run it without PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Device(enum.StrEnum):
    """Where a bundle runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(enum.StrEnum):
    """What convolutions and matrix products compute in."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"


class RunPrecision(enum.StrEnum):
    """What to run in: that of a build of the cache, as it was asked for."""

    auto = "auto"
    fp32 = "fp32"
    tf32 = "tf32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"


class Budget(enum.StrEnum):
    """Whose tolerances `--precision auto` is held to."""

    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"


BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")]
Input = Annotated[str, typer.Argument(metavar="INPUT", help="A picture, a folder, array.npy or arrays.npz:key.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to run.")]
BuildOption = Annotated[
    Path | None, typer.Option("--build", help="Run this build of the bundle. Name only what you trust: it is code.")
]
NoBuildOption = Annotated[
    bool, typer.Option("--no-build", help="Run the bundle's own graphs, whatever is in the cache.")
]
PrecisionOption = Annotated[
    RunPrecision | None,
    typer.Option(help="Run the cache's build in this precision; if not said, in VAE_EXPORT_PRECISION or fp32."),
]
BuiltPrecisionOption = Annotated[
    RunPrecision | None,
    typer.Option(help="Take the cache's build in this precision, for the CPU without --target."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Start = Annotated[int, typer.Option(help="Index of the first example.")]
AnyRange = Annotated[bool, typer.Option("--any-range", help="Take values beyond the data's range: no check.")]
Resize = Annotated[bool, typer.Option("--resize", help="Scale pictures of another size.")]


_terminated = False


def main() -> None:
    """Run the command line. An expected failure prints one message and exits with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for a table's lines
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BaseException as error:
        # Typer and rich end with 1 where nobody reads any more.
        if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(_BROKEN_PIPE)
        if _terminated:  # whatever came of it: an import that was cut short raises its own error
            sys.exit(128 + signal.SIGTERM)
        if isinstance(error, VaeExportError):
            _exit(str(error), error.exit_code)
        if isinstance(error, MemoryError):
            _exit(f"not enough memory: {error or 'ask for fewer or smaller examples'}", InputError.exit_code)
        if isinstance(error, OSError):
            _exit(f"{error.filename or 'file system'}: {error.strerror or error}", InputError.exit_code)
        if not isinstance(error, Exception):
            raise
        terminal.say(traceback.format_exc(), err=True)
        _exit(f"{_FAULT} {type(error).__name__}: {error}. {_REPORT}", _SOFTWARE)


#: As shells report a process that SIGPIPE ended; and EX_SOFTWARE of sysexits.h.
_BROKEN_PIPE, _SOFTWARE = 141, 70
_FAULT = "this is a fault of vae_export itself:"
_REPORT = "Please report it, with the lines above and what `vae-export doctor` prints"


def _exit(message: str, code: int) -> NoReturn:
    terminal.say(f"error: {message}", err=True)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    global _terminated
    _terminated = True
    sys.exit(128 + signal.SIGTERM)


def _place(out: Path, bundle: Path) -> Path:
    """Where a result goes: not into the bundle, which is never changed after its export."""
    if out.resolve().is_relative_to(bundle.resolve()):
        raise InputError(f"{out} lies inside the bundle, which is never changed. Choose a path outside of it")
    return out


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("out/demo")) -> None:
    """Train on handwritten digits, export, verify, run without PyTorch, and write pictures."""
    from vae_export.commands import demo as module

    module.demo(out, terminal.console())


app.command()(train)


class Layout(enum.StrEnum):
    """How an export is laid out."""

    bundle = "bundle"
    optimum = "optimum"


SourceName = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A checkpoint's folder, a diffusers autoencoder (folder or .safetensors), or package.module:factory, "
        "which is then run.",
    ),
]
ConfigOption = Annotated[Path | None, typer.Option(help="Of weights in one file: the diffusers config.json.")]
SizeOption = Annotated[
    str | None, typer.Option(help="Of diffusers: trace and verify at this size, such as height=128,width=128.")
]
ShapeOption = Annotated[str | None, typer.Option(help="Of a factory's bare module: one example, such as 3,64,64.")]
LikelihoodOption = Annotated[str | None, typer.Option(help="Of a factory's bare module: bernoulli, gaussian, …")]
RangeOption = Annotated[str | None, typer.Option("--range", help="Of a factory's bare module: such as 0,1 or=-1,1.")]
VarianceOption = Annotated[float | None, typer.Option(help="Of a factory's bare module: that of gaussian_fixed.")]
MultipleOption = Annotated[
    int | None, typer.Option(help="Of a factory's bare module: height and width may be any multiples of this.")
]


@app.command()
def export(
    source: SourceName,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    config: ConfigOption = None,
    size: SizeOption = None,
    held_out: Annotated[
        str | None, typer.Option(help="Of diffusers: an INPUT of real pictures to verify on, brought to the size.")
    ] = None,
    shape: ShapeOption = None,
    likelihood: LikelihoodOption = None,
    data_range: RangeOption = None,
    variance: VarianceOption = None,
    multiple_of: MultipleOption = None,
    layout: Annotated[Layout, typer.Option(help="Write a bundle, or what Optimum's pipelines read.")] = Layout.bundle,
    force: Force = False,
) -> None:
    """Export a trained model to ONNX, and prove that the export computes the same."""
    for module, extra in EXPORT_NEEDS:
        require(module, extra, "export")
    from vae_export.commands import tables
    from vae_export.exporting.exporter import export as run
    from vae_export.exporting.layouts import optimum
    from vae_export.progress import bar

    described = _described(config, size, held_out, shape, likelihood, data_range, variance, multiple_of)
    with bar(terminal.console(err=True)) as progress, contextlib.ExitStack() as stack:
        place = bundle
        if layout == Layout.optimum:
            optimum.check_target(bundle, overwrite=force)
            place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / bundle.name
        certificate = run(source, place, overwrite=force, progress=progress, **described)
        if layout == Layout.optimum:
            optimum.optimum(place, bundle, overwrite=force)
    terminal.console().print(tables.certificate(certificate))
    terminal.say(f"{bundle} is written and verified")


def _described(
    config: Path | None,
    size: str | None,
    held_out: str | None,
    shape: str | None,
    likelihood: str | None,
    data_range: str | None,
    variance: float | None,
    multiple_of: int | None,
) -> dict[str, Any]:
    """What the options say of a source; what is not said is left out."""
    sizes = _sizes("export", size) if size else None
    said: dict[str, Any] = {
        "config": config,
        "size": sizes,
        "held_out": _held_out(held_out, sizes) if held_out else None,
        "shape": numbers("export: shape", shape) if shape else None,
        "likelihood": likelihood,
        "data_range": _range(data_range) if data_range else None,
        "variance": variance,
        "multiple_of": multiple_of,
    }
    return {name: value for name, value in said.items() if value is not None}


def _held_out(given: str, sizes: dict[str, int] | None) -> Any:
    """Pictures for a certificate, in [−1, 1], resized to what is verified at."""
    from vae_export.contract.model import EXAMPLE_SIZE, Data
    from vae_export.numerics import images

    size = dict.fromkeys(("height", "width"), EXAMPLE_SIZE) | (sizes or {})
    data = Data(shape=(3, size["height"], size["width"]), range=(-1.0, 1.0))
    x = images.read(given, data, resize=True)
    if x.dtype.name == "uint8":
        from vae_export.numerics.pixels import from_uint8

        x = from_uint8(x, data.range)
    return x


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"export: range is {text!r}; expected two numbers such as 0,1") from None
    return low, high


@app.command()
def verify(
    bundle: BundlePath,
    device: DeviceOption = Device.auto,
    build: BuildOption = None,
    target: Annotated[str | None, typer.Option(help="Measure the cache's build for this target.")] = None,
    precision: BuiltPrecisionOption = None,
    json: Json = False,
    out: Annotated[Path | None, typer.Option(help="Write the certificate as JSON.")] = None,
) -> None:
    """Measure the certificate of a bundle's own graphs, or of a build, again, on this machine, without PyTorch."""
    from vae_export.certification import certificate
    from vae_export.certification.verifier import verify as run
    from vae_export.commands import tables
    from vae_export.contract import atomic
    from vae_export.progress import bar

    place = _place(out, bundle) if out else None
    cached = _cached("verify", bundle, target, precision)
    if build and cached:
        raise InputError("verify: name one of --build and --target (or --precision)")
    with bar(terminal.console(err=True)) as progress:
        measured = run(bundle, device=device.value, build=cached or build, progress=progress, opened=_say)
    if place:
        with atomic.atomic_file(place) as stage:
            stage.write_bytes(certificate.encode(measured))
    if json:
        _print_json(measured.to_dict())
    else:
        terminal.console().print(tables.certificate(measured))
    measured.require()


@app.command()
def build(
    bundle: Annotated[Path | None, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")] = None,
    target: Annotated[
        str, typer.Option(help="cpu, cuda, tensorrt, tensorrt-rtx, or tensorrt-rtx-smNN such as tensorrt-rtx-sm89.")
    ] = "",
    precision: Annotated[
        Precision, typer.Option(help="What convolutions and products compute in; auto is the fastest that holds.")
    ] = Precision.fp32,
    budget: Annotated[Budget, typer.Option(help="Of auto: hold it to the tolerances of this precision.")] = Budget.int8,
    passes: Annotated[
        str | None,
        typer.Option(help="Graph passes that may be used: all, none, a,b or -a without one; list shows them."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The build's folder, to ship; without it, the user's cache.")] = None,
    batch: Annotated[
        str, typer.Option(help="Batch sizes that engines are made for, or candidates on the CPU are measured at.")
    ] = "1,8,64",
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="Largest sizes that engines are made for, such as height=64,width=96, repeated for several; on the "
            "CPU the size to measure at."
        ),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Engines for exactly these batches and sizes.")] = False,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let a GPU round float32 products to 10 bits.")] = False,
    nhwc: Annotated[bool, typer.Option("--nhwc", help="Keep channels last in ONNX Runtime on CUDA.")] = False,
    refittable: Annotated[bool, typer.Option("--refittable", help="Engines whose weights can be replaced.")] = False,
    refit: Annotated[
        Path | None,
        typer.Option(help="A refittable build of the same architecture: put this bundle's weights in."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="On the CPU: how long each candidate is measured for each graph and batch.")
    ] = None,
    json: Json = False,
    force: Force = False,
) -> None:
    """Make a bundle fast on a target, and prove, where the target runs here, that it computes the same."""
    import msgspec

    from vae_export.commands import tables

    console = terminal.console()
    if passes == "list":
        for module in ("onnx", "onnx_ir"):
            require(module, "build", "build")
        from vae_export.graph import rewrites as known

        console.print(tables.facts("graph passes", {name: found.summary for name, found in known.PASSES.items()}))
        return
    if bundle is None:
        raise InputError("build: name a BUNDLE, the folder that `vae-export export` wrote")
    from vae_export.building import builder
    from vae_export.progress import bar

    with bar(terminal.console(err=True)) as progress:
        if refit:
            asked = (target, size, static, tf32, nhwc, refittable, passes, seconds)
            if any(asked) or (precision, budget, batch) != (Precision.fp32, Budget.int8, "1,8,64"):
                raise InputError(
                    "build: --refit takes target, precision, shapes and flags from the build that it refits. Drop the "
                    "other options but --out and --force"
                )
            built = builder.refit(bundle, refit, out=out, overwrite=force, progress=progress)
        elif not target:
            raise InputError("build: name a --target: cpu, cuda, tensorrt, tensorrt-rtx or tensorrt-rtx-smNN")
        else:
            built = builder.build(
                bundle,
                target,
                out=out,
                precision=precision.value,
                budget=budget.value,
                passes=passes,
                batches=numbers("build: batch", batch),
                sizes=[_sizes("build", text) for text in size or ()],
                static=static,
                tf32=tf32,
                nhwc=nhwc,
                refittable=refittable,
                seconds=seconds,
                overwrite=force,
                progress=progress,
            )
    if json:
        measured = built.certificate.to_dict() if built.certificate else None
        plain = {"path": str(built.path), "unmeasured": built.unmeasured, "certificate": measured}
        _print_json({**plain, "build": msgspec.to_builtins(built.record)})
        return
    if built.record.measurements:
        console.print(tables.measurements(built.record))
    console.print(tables.build(built.path, built.record))
    if built.certificate:
        console.print(tables.certificate(built.certificate))
    proven = f"not executed here, so without a certificate: {built.unmeasured}"
    terminal.say(f"{built.path} is written, {'and verified' if built.certificate else proven}")
    if not (out or refit or built.record.exact):
        wanted = built.record.options.wanted
        terminal.say(
            f"It computes in {built.record.in_words()}: load takes it with precision={wanted!r} (--precision {wanted})"
        )


@app.command()
def inspect(
    source: Annotated[
        str, typer.Argument(metavar="BUNDLE|SOURCE|BUILD", help="A folder, a .safetensors file, or a factory.")
    ],
    config: ConfigOption = None,
    size: Annotated[
        str | None, typer.Option(help="Count multiply-adds and memory at this size, such as height=512,width=512.")
    ] = None,
    shape: ShapeOption = None,
    likelihood: LikelihoodOption = None,
    data_range: RangeOption = None,
    variance: VarianceOption = None,
    multiple_of: MultipleOption = None,
    json: Json = False,
) -> None:
    """Show what a bundle, a source or a build is. Every file of a bundle or build is verified."""
    import msgspec

    from vae_export.certification import certificate
    from vae_export.commands import tables
    from vae_export.contract import build_record
    from vae_export.contract.bundle import MANIFEST, Bundle
    from vae_export.contract.model import EXAMPLE_SIZE
    from vae_export.trainers import config as configs

    path, sizes = Path(source), _sizes("inspect", size) if size else None
    if (path / build_record.RECORD_FORMAT.file).is_file():
        folder = build_record.BuildFolder(path)
        folder.check()
        if json:
            _print_json({"kind": "build", **msgspec.to_builtins(folder.record), "unlisted": folder.unlisted()})
        else:
            if folder.record.measurements:
                terminal.console().print(tables.measurements(folder.record))
            terminal.console().print(tables.build(path, folder.record))
        return
    if configs.is_checkpoint(path) and not (path / MANIFEST).exists():
        plain = msgspec.to_builtins(configs.read(path))
        if json:
            _print_json({"kind": "checkpoint", **plain})
        else:
            for part in ("model", "data", "train", "split", "result"):
                terminal.console().print(tables.facts(f"{path}: {part}", plain[part] or {}))
        return
    if not (path / MANIFEST).exists() and (path.exists() or ":" in source):
        described = _described(config, None, None, shape, likelihood, data_range, variance, multiple_of)
        _inspect_source(source, described, sizes, json=json)
        return
    opened = Bundle(path)
    measured = certificate.decode(opened.read("verification.json"))
    opened.check()
    graphs = opened.manifest.graphs
    counted = {name: graph.cost for name, graph in graphs.items() if graph.cost}
    model = opened.manifest.model
    at = sizes or {
        name: dim.multiple_of * -(-EXAMPLE_SIZE // dim.multiple_of) for name, dim in model.data.named().items()
    }
    model.latent_shape(at)  # refuses a size that the model does not take
    costs = tables.costs(model, counted, at)
    unlisted = opened.unlisted()
    from vae_export.contract import cache

    cached = cache.cached_slots(opened.manifest)
    if json:
        plain = {**msgspec.to_builtins(opened.manifest), "certificate": measured.to_dict(), "builds": cached}
        plain["costs"] = costs
        _print_json({"kind": "bundle", **plain, "unlisted": unlisted})
    else:
        for table in tables.bundle(path, opened.manifest, measured, unlisted, cached, costs):
            terminal.console().print(table)


def _inspect_source(source: str, described: dict[str, Any], sizes: dict[str, int] | None, *, json: bool) -> None:
    """What a source is that no bundle was made of yet."""
    for module in ("torch", "msgspec"):
        require(module, "export", "inspect")
    import msgspec

    from vae_export import sources
    from vae_export.commands import tables
    from vae_export.sources import cost

    trained = sources.resolve(source, **described)
    counted = cost.count(trained)
    at = sizes or trained.sizes()
    trained.model.latent_shape(at)
    costs = tables.costs(trained.model, counted, at)
    if json:
        plain = {"model": msgspec.to_builtins(trained.model), "origin": msgspec.to_builtins(trained.origin)}
        _print_json({"kind": "source", **plain, "costs": costs})
    else:
        terminal.console().print(tables.source(source, trained.model, trained.origin, costs))


@app.command()
def sample(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option(help="grid.png or array.npy.")],
    n: Annotated[int, typer.Option(help="How many.")] = 64,
    seed: Seed = 0,
    start: Start = 0,
    draw: Annotated[bool, typer.Option("--draw", help="Draw from p(x|z), too, not its mean.")] = False,
    size: Annotated[str | None, typer.Option(help="For models with named sizes, such as height=64,width=96.")] = None,
    device: DeviceOption = Device.auto,
    build: BuildOption = None,
    no_build: NoBuildOption = False,
    precision: PrecisionOption = None,
) -> None:
    """Decode draws from the prior."""
    from vae_export.numerics import images

    sizes = _sizes("sample", size) if size else None
    with _load("sample", bundle, device, build, no_build, precision) as vae:
        images.check_target(_place(out, bundle), vae.model.data)
        images.write(out, vae.sample(n, seed, start, draw=draw, size=sizes), vae.model.data)
    terminal.say(f"{out}: {n} samples, seed {seed}, from {start}")


@app.command()
def reconstruct(
    bundle: BundlePath,
    input: Input,
    out: Annotated[Path, typer.Option(help="grid.png (original above reconstruction) or array.npy.")],
    seed: Annotated[int | None, typer.Option(help="Draw from the posterior, not its mean.")] = None,
    start: Start = 0,
    resize: Resize = False,
    any_range: AnyRange = False,
    device: DeviceOption = Device.auto,
    build: BuildOption = None,
    no_build: NoBuildOption = False,
    precision: PrecisionOption = None,
) -> None:
    """Encode and decode examples."""
    from vae_export.numerics import images

    with _load("reconstruct", bundle, device, build, no_build, precision, any_range) as vae:
        data = vae.model.data
        images.check_target(_place(out, bundle), data)
        x = images.read(input, data, resize=resize)
        reconstruction = vae.reconstruct(x, seed, start)
        images.write(out, x, data, below=reconstruction)
    terminal.say(f"{out}: {len(x)} reconstructions")


@app.command()
def score(
    bundle: BundlePath,
    input: Input,
    k: Annotated[int | None, typer.Option(help="Draws of the importance-weighted bound, in place of the ELBO.")] = None,
    seed: Seed = 0,
    start: Start = 0,
    json: Json = False,
    out: Annotated[Path | None, typer.Option(help="Write there, not to the terminal.")] = None,
    resize: Resize = False,
    any_range: AnyRange = False,
    device: DeviceOption = Device.auto,
    build: BuildOption = None,
    no_build: NoBuildOption = False,
    precision: PrecisionOption = None,
) -> None:
    """Each example's ELBO in nats, or a tighter bound on its evidence, as CSV or JSON."""
    from vae_export.commands import scoring
    from vae_export.contract import atomic
    from vae_export.numerics import images

    place = _place(out, bundle) if out else None
    with _load("score", bundle, device, build, no_build, precision, any_range) as vae:
        x = images.read(input, vae.model.data, resize=resize)
        columns = scoring.score(vae, x, k=k, seed=seed, start=start)
    text = scoring.to_json(columns) if json else scoring.to_csv(columns)
    if place:
        with atomic.atomic_file(place) as stage:
            stage.write_text(text, encoding="utf-8")
    else:
        typer.echo(text, nl=False)  # numbers, and maybe many


@app.command()
def bench(
    bundle: BundlePath,
    target: Annotated[str | None, typer.Option(help="Time the cache's build for this target.")] = None,
    build: Annotated[
        list[Path] | None,
        typer.Option("--build", help="Time this build of the bundle; may be repeated. Name only what you trust."),
    ] = None,
    no_build: Annotated[
        bool, typer.Option("--no-build", help="Time the bundle's own graphs, not a build in float32 of the cache.")
    ] = False,
    precision: BuiltPrecisionOption = None,
    source: Annotated[
        str | None, typer.Option(help="What it was exported from, as for export, to time PyTorch. It is then run.")
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Time PyTorch, torch.compile, diffusers and OpenVINO, too.")
    ] = False,
    verbs: Annotated[
        str | None, typer.Option(help="Such as encode,decode,sample,reconstruct,elbo; all that the model has.")
    ] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,64",
    size: Annotated[str | None, typer.Option(help="For models with named sizes, such as height=64,width=96.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of every call; one for each core.")] = None,
    seconds: Annotated[float, typer.Option(help="For each runner and cell.")] = 2.0,
    memory: Annotated[bool, typer.Option("--memory", help="Each runner's peak memory, in processes apart.")] = False,
    json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Draw latency against batch: FILE.png.")] = None,
) -> None:
    """Time verbs and batches: our runtime, a bare ONNX Runtime session, and other ways to run the model, in turns."""
    from vae_export import bench as module
    from vae_export.bench.runners import Ours
    from vae_export.runtimes import summary

    wanted = numbers("bench: batches", batches)
    place = _place(plot, bundle) if plot else None
    if place:
        module.check_plot(place)
    console = terminal.console()
    cached = _cached("bench", bundle, target, precision)
    builds = [*(build or ()), *([cached] if cached else ())]
    if no_build and builds:
        raise InputError("bench: --no-build takes none, and a build is asked for. Drop one")
    with (
        module.candidates(
            bundle, builds=builds, source=source, with_peers=peers, threads=threads, own=no_build
        ) as selection,
        terminal.console(err=True).status("bench") as status,
    ):
        for runner in selection.runners:
            if isinstance(runner, Ours):
                _say(f"{runner.name}: {summary(runner.vae.describe())}")
        report = module.run(
            bundle,
            selection.runners,
            verbs.split(",") if verbs else None,
            wanted,
            sizes=_sizes("bench", size) if size else None,
            seconds=seconds,
            threads=selection.threads,
            absent=selection.absent,
            opened=selection.opened,
            memory=memory,
            progress=lambda step: status.update(step),
        )
    if place:
        module.plot(report, place)
    if json:
        _print_json(report.to_dict())
        return
    console.print(module.table(report))
    for line in module.summary(report):
        terminal.say(line)


@app.command()
def doctor(json: Json = False) -> None:
    """What is installed, what can be loaded, what is missing and how to get it."""
    from vae_export.commands import doctor as module
    from vae_export.commands import tables

    found = module.examine()
    if json:
        _print_json(found)
    else:
        runtime = found["onnxruntime"]
        basics = {name: found[name] for name in ("vae-export", "python", "platform", "cores")}
        basics["onnxruntime"] = runtime.get("version", "not usable")
        basics["providers"] = ", ".join(runtime.get("providers", [])) or "none"
        basics["NVIDIA driver"] = f"CUDA {found['driver']['cuda']}" if found["driver"]["cuda"] else "none"
        gpus = (f"{gpu['name']}, compute capability {gpu['capability']}" for gpu in found["driver"]["gpus"])
        basics["processor"] = found["processor"]
        basics["GPUs"] = "\n".join(gpus) or found["driver"]["problem"]
        basics |= {title: state.get("version") or state["problem"] for title, state in found["tensorrt"].items()}
        basics["noise on the GPU"] = found["kernels"].get("problem") or "its kernels compile"
        basics["cache of builds"] = found["cache"].get("problem") or found["cache"]["path"]
        console = terminal.console()
        console.print(tables.facts("this machine", basics))
        extras = {}
        for name, extra in found["extras"].items():
            packages = ", ".join(f"{p} {v or 'MISSING'}" for p, v in extra["packages"].items())
            install = f"\n{extra['install']}" if extra["install"] else ""
            extras[f"[{name}]"] = f"{extra['purpose']}: {packages}{install}"
        console.print(tables.facts("extras", extras))
    for problem in found["problems"]:
        terminal.say(f"problem: {problem}", err=True)
    if "problem" in found["onnxruntime"]:
        raise typer.Exit(BackendError.exit_code)


def _say(line: str) -> None:
    """What runs, before anything else is printed: not on stdout, which may be CSV or JSON."""
    terminal.say(line, err=True)


def _load(
    verb: str,
    bundle: Path,
    device: Device,
    build: Path | None,
    no_build: bool,
    precision: RunPrecision | None,
    any_range: bool = False,
) -> VAE:
    """Open a bundle as the options say, and say what runs."""
    from vae_export.runtimes import load, summary

    if build and no_build:
        raise InputError(f"{verb}: name one of --build and --no-build")
    chosen: Path | Literal[False] | None = False if no_build else build
    wanted = precision.value if precision else None
    vae = load(
        bundle, device=device.value, build=chosen, precision=cast("Wanted | None", wanted), check_range=not any_range
    )
    facts = vae.describe()
    _say("; ".join([summary(facts), *facts["notes"]]))
    return vae


def _cached(verb: str, bundle: Path, target: str | None, precision: RunPrecision | None) -> Path | None:
    """The cache's build for a target in a precision; None where neither is said."""
    from vae_export.contract import build_record
    from vae_export.contract.bundle import Bundle

    if target is None and precision is None:
        return None
    from vae_export.contract import cache, targets

    manifest, name = Bundle(bundle).manifest, targets.parse(target or "cpu").name
    wanted: Wanted = precision.value if precision else "fp32"
    found: dict[str, Path] = {}
    for slot in cache.cached_slots(manifest):
        if cache.slot_target(slot).name == name:
            path = cache.cached(manifest, slot)
            with contextlib.suppress(BundleError):  # who asks for this one hears it when it is opened
                found.setdefault(build_record.BuildFolder(path).record.options.wanted, path)
    canonical = cache.cached(manifest, cache.slot(name, wanted))
    if canonical.is_dir() and canonical not in found.values():
        return canonical
    if wanted in found:
        return found[wanted]
    others = f"; it has one in {', '.join(found)} (--precision)" if found else ""
    asked = "--tf32" if wanted == "tf32" else f"--precision {wanted}"
    raise InputError(
        f"{verb}: the cache has no build for {name} in {wanted}{others}. "
        f"Run: vae-export build {bundle} --target {name} {asked}"
    )


def _sizes(verb: str, text: str) -> dict[str, int]:
    try:
        return {name: int(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise InputError(f"{verb}: size is {text!r}; expected names and numbers such as height=64,width=96") from None


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))  # in ASCII
