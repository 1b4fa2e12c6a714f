"""Open a bundle: the choice of device and build, and the backend that runs it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from vae_export.contract import cache, onnx_guard, targets
from vae_export.contract.build_record import Build, BuildFolder, Engine, Options
from vae_export.contract.bundle import Bundle
from vae_export.contract.choices import Wanted
from vae_export.contract.model import GRAPHS, Model
from vae_export.contract.onnx_guard import Weights
from vae_export.errors import BackendError, BundleError, InputError, VaeExportError, check_flags
from vae_export.runtimes import compatibility, processor
from vae_export.runtimes.backend import Backend, PlannedGraph, Settings
from vae_export.runtimes.cpu.dispatch import CpuBackend
from vae_export.runtimes.gpu import driver
from vae_export.runtimes.memory import Budget, parse_bytes
from vae_export.runtimes.vae import VAE

#: The environment variable that sets the precision of `load` where no argument does.
DEFAULT_PRECISION = "VAE_EXPORT_PRECISION"
#: The folder of a build; False for no build at all; None to choose.
BuildLike = str | os.PathLike[str] | Literal[False] | None


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    build: BuildLike = None,
    precision: Wanted | None = None,
    micro_batch: int = 64,
    threads: int | None = None,
    lanes: int = 1,
    cuda_graphs: bool | None = None,
    max_memory: int | str | None = None,
    check_range: bool = True,
) -> VAE:
    """Open a bundle for use. PyTorch is never imported.

    Every file of the bundle, and of the build that is used, is verified first.

    Graphs run in float32 by default: a build of the user's cache is used automatically only if it holds float32's
    certificate, as the bundle's own graphs do. A lower precision is requested by `precision`, by naming a `build`, or
    by the environment variable `VAE_EXPORT_PRECISION`. If an argument requests what is not there, that is an error: a
    substitute would silently differ in speed or numbers. The variable is a preference for all bundles: one without
    such a build runs in float32, and `VAE.describe` says why.

    Noise and latents of the prior are the same bits on every machine and backend. What graphs compute from them is the
    same to the rounding of the precision: another batch, build or processor may take another kernel, which sums in
    another order.

    Args:
        path: the bundle's folder.
        device: `cpu`, `cuda`, or `auto`: the best available. On a GPU that is a build for TensorRT, for TensorRT for
            RTX or for CUDA from the user's cache, then ONNX Runtime on CUDA; on the CPU a build from the cache, then
            the bundle itself on ONNX Runtime. `VAE.describe` has the choice, and why others were passed over.
        build: the folder of a build of this bundle, which is then used and no other, in its precision. Its engines are
            native code: name only builds that you trust. False uses no build: the bundle's own graphs.
        precision: `fp32`; or `auto`, `fp16`, `bf16`, `int8` or (on a GPU) `tf32`: the build of the cache that was
            built with it (`vae-export build --precision`). None takes that of the environment variable, or `fp32`.
        micro_batch: the most examples that go through a graph at once; larger batches are cut into such slices. It
            bounds memory and does not change results beyond rounding.
        threads: threads inside one call on the CPU; None leaves it to the backend.
        lanes: on a GPU, how many calls run at once, each with a stream and buffers of its own. Calls from more
            threads wait.
        cuda_graphs: replay captured CUDA graphs. None does so with TensorRT where a shape can be captured; ONNX
            Runtime needs True, one lane, and a model whose every node runs on CUDA.
        max_memory: a budget for the intermediate results of all calls together, in bytes or as text such as `2GiB`;
            weights, arguments and results are not counted. It makes the slices smaller than micro_batch, and where not
            even one example fits, `encode`, `decode`, `reconstruct`, `sample`, `generate`, `interpolate` and `edit`
            cut it into tiles (see `Tile`), whose blending does change results. The need is estimated from counts in
            the manifest, times a factor for safety; it is not enforced. Calls from several threads wait for each other
            where the budget does not hold them at once.
        check_range: refuse data that exceed the range of the manifest by more than 45 % of its width (half a
            level of 256 for a discretized logistic likelihood). False is for data without bounds, such as
            standardized features; a Bernoulli likelihood has no density outside of [0, 1], and always refuses them.

    Raises:
        InputError: there is no folder at `path` or `build`, or an option is not one of those above; or the cache has no
            build in the requested precision, or `build` names one in another; or max_memory is less than a model of
            fixed sizes needs, or the bundle is too old to say what it needs.
        BundleError: the bundle or the build is incomplete, damaged, inconsistent, or newer than this version; or the
            build is of another bundle.
        BackendError: the device or a package that it needs is not available, or the build is for another machine, or
            it needs an instruction that this processor does not have.
    """
    arguments = {**locals(), "path": Path(path).absolute()}
    if isinstance(build, (str, os.PathLike)):
        arguments["build"] = Path(build).absolute()
    check_flags("load", check_range=check_range)
    limit = None if max_memory is None else parse_bytes(max_memory)
    bundle = Bundle(path)
    settings = Settings(threads=threads, lanes=lanes, cuda_graphs=cuda_graphs)
    manifest = bundle.manifest
    costs = {name: graph.cost for name, graph in manifest.graphs.items() if graph.cost}
    budget = None if limit is None else Budget(limit, manifest.model, costs)
    opened = open_bundle(bundle, device=device, build=build, precision=precision, settings=settings)
    return VAE(
        manifest.model,
        opened.backend,
        micro_batch=micro_batch,
        name=manifest.name,
        facts=opened.facts(),
        budget=budget,
        tiled={name: graph.tiled for name, graph in manifest.graphs.items() if graph.tiled},
        check_range=check_range,
        reopen=(_reopened, (arguments, manifest.digest)),
    )


def _reopened(arguments: dict[str, Any], digest: str) -> VAE:
    """Unpickle a VAE: `load` it with the same arguments, if the bundle is still the same.

    Raises:
        InputError, BundleError, BackendError: as for `load`; or another bundle is at that path by now.
    """
    vae = load(**arguments)
    now = Bundle(arguments["path"]).manifest.digest
    if now != digest:
        vae.close()
        raise BundleError(
            f"{arguments['path']}: this VAE was pickled when manifest {digest[:12]}… was there, and now there is "
            f"{now[:12]}…. Load the bundle by its path, and pickle it again"
        )
    return vae


class Opened:
    """A bundle's graphs on a backend.

    Attributes:
        backend: it has the graphs.
        folder: the build that is used, or None for the bundle's own graphs.
        passed_over: what would have been preferred, and why it is not used.
        notes: caveats of the build's results.
    """

    def __init__(
        self,
        backend: Backend,
        folder: BuildFolder | None,
        passed_over: Mapping[str, str],
        notes: tuple[str, ...] = (),
    ) -> None:
        self.backend = backend
        self.folder = folder
        self.passed_over = dict(passed_over)
        self.notes = notes

    def __repr__(self) -> str:
        return f"Opened({self.line()})"

    @property
    def held_to(self) -> dict[str, str]:
        """The precision whose tolerances encoder and decoder are held to, by its name in certificates."""
        return self.folder.record.held_to if self.folder else dict.fromkeys(GRAPHS, "float32")

    def facts(self) -> dict[str, object]:
        """For `VAE.describe`."""
        return {
            "precision": self.folder.record.in_words() if self.folder else "float32",
            "build": str(self.folder.path) if self.folder else None,
            "passed_over": self.passed_over,
            "notes": list(self.notes),
        }

    def line(self) -> str:
        """What runs, in one line for people."""
        return summary(self.facts() | dict(self.backend.describe()))


def summary(facts: Mapping[str, object]) -> str:
    """What runs, in one line for people, from the facts of `VAE.describe`."""
    runs = f"build {facts['build']}" if facts["build"] else "the bundle's own graphs"
    return f"{facts['precision']}, {runs}, {facts['backend']} {facts['version']}, {facts['provider']}"


def open_bundle(
    bundle: Bundle,
    *,
    device: str = "auto",
    build: BuildLike = None,
    precision: Wanted | None = None,
    settings: Settings | None = None,
) -> Opened:
    """Open a bundle's graphs, or those of a build of it, on the best backend. Arguments and errors: see `load`."""
    settings = settings or Settings()
    _check_settings(device, build, settings)
    requested = _checked("precision", precision)
    own = build is False or not cache.cached_slots(bundle.manifest)
    bundle.check(keep=bundle.graph_files() if own else ())
    if build is not None and build is not False:
        return _open_named(bundle, BuildFolder(build), requested, device, settings)
    if build is False and requested not in (None, "fp32"):
        raise InputError(
            f"load: build is False, which takes the bundle's own graphs in float32, and precision is {requested}. "
            "Drop one"
        )
    passed_over: dict[str, str] = {}
    devices = _devices(device, passed_over)
    if build is None and (wanted := requested or _default() or "fp32") != "fp32":
        try:
            return _open_reduced(bundle, wanted, devices, settings, passed_over)
        except (InputError, BackendError, BundleError) as error:
            if requested:
                raise
            passed_over[f"precision {wanted}"] = f"{DEFAULT_PRECISION} asks for it. {error}"
    return _open_exact(bundle, devices, settings, passed_over, with_builds=build is None)


def _checked(name: str, precision: object) -> Wanted | None:
    if precision is None or (isinstance(precision, str) and precision in get_args(Wanted)):
        return cast("Wanted | None", precision)
    raise InputError(f"load: {name} is {precision!r}; expected {', '.join(get_args(Wanted))}")


def _default() -> Wanted | None:
    """The user's preference for all bundles."""
    return _checked(f"the environment variable {DEFAULT_PRECISION}", os.environ.get(DEFAULT_PRECISION) or None)


def _devices(device: str, passed_over: dict[str, str]) -> list[str]:
    """The devices to try, the best first."""
    if device != "auto":
        return [device]
    if problem := driver.query().problem:
        passed_over["cuda"] = problem
        return ["cpu"]
    return ["cuda", "cpu"]


def _open_named(
    bundle: Bundle, folder: BuildFolder, requested: Wanted | None, device: str, settings: Settings
) -> Opened:
    """The build that the caller named, refused if it is not in the requested precision."""
    record = folder.record
    if requested and not (record.exact if requested == "fp32" else record.options.wanted == requested):
        raise InputError(
            f"load: {folder.path} is a build in {record.options.wanted} ({record.in_words()}), and "
            f"precision is {requested}. Drop one"
        )
    return _open_build(bundle, folder, device, settings, {})


def _check_settings(device: str, build: object, settings: Settings) -> None:
    if build is True:
        raise InputError("load: build is True; expected the folder of a build, False for none, or None to choose")
    if not isinstance(device, str) or device not in ("auto", "cpu", "cuda"):
        raise InputError(f"load: device is {device!r}; expected 'auto', 'cpu' or 'cuda'")
    threads, lanes = settings.threads, settings.lanes
    if threads is not None and not (isinstance(threads, int) and 1 <= threads < 1 << 16):
        raise InputError(f"load: threads is {threads!r}; expected a number from 1 on, or None")
    if not (isinstance(lanes, int) and 1 <= lanes <= 64):
        raise InputError(f"load: lanes is {lanes!r}; expected a number from 1 to 64")
    if settings.cuda_graphs is not None and not isinstance(settings.cuda_graphs, bool):
        raise InputError(f"load: cuda_graphs is {settings.cuda_graphs!r}; expected True, False or None")


def _open_exact(
    bundle: Bundle, devices: list[str], settings: Settings, passed_over: dict[str, str], *, with_builds: bool
) -> Opened:
    """Open what holds float32's certificate: on each device a build of the cache, then the bundle's own graphs."""
    for device in devices:
        for name in _slots(bundle, "fp32", device) if with_builds else ():
            try:
                folder = _cached_folder(bundle, name)
                if folder.record.exact:
                    return _open_cached(bundle, folder, device, settings, passed_over)
                passed_over[f"build {name}"] = compatibility.inexact(folder)
            except (BackendError, BundleError) as error:
                passed_over[f"build {name}"] = str(error)
        try:
            graphs, weights = bundle.graphs()
            model = bundle.manifest.model
            backend = open_backend(graphs, model, device=device, settings=settings, weights=weights)
            return Opened(backend, None, passed_over)
        except (BackendError, BundleError) as error:
            if device == devices[-1]:
                raise
            passed_over[device] = str(error)
    raise AssertionError("the last device opens or raises")


def _open_reduced(
    bundle: Bundle, wanted: Wanted, devices: list[str], settings: Settings, passed_over: dict[str, str]
) -> Opened:
    """Open the best build of the cache that was built in a precision; InputError if there is none."""
    last: VaeExportError | None = None
    for device in devices:
        for name in _slots(bundle, wanted, device):
            try:
                folder = _cached_folder(bundle, name)
                if folder.record.options.wanted == wanted:
                    return _open_cached(bundle, folder, device, settings, passed_over)
            except (BackendError, BundleError) as error:
                last, passed_over[f"build {name}"] = error, str(error)
    if last:
        raise last
    options = "--tf32" if wanted == "tf32" else f"--precision {wanted}"
    raise InputError(
        f"load: precision is {wanted}, and the cache has no build of {bundle.path} in it for {' or '.join(devices)}. "
        f"Run: vae-export build {bundle.path} --target {devices[-1]} {options}; or drop precision, for float32"
    )


def _slots(bundle: Bundle, wanted: Wanted, device: str) -> list[str]:
    """The slots of the cache for a device, the best first: a build's real precision is in its record."""
    rank = {"tensorrt": 0, "tensorrt-rtx": 1, None: 2}
    slots = []
    for name in cache.cached_slots(bundle.manifest):
        target = cache.slot_target(name)
        if target.device == device:
            other_name = name != cache.slot(target.name, wanted)
            slots.append((rank[target.flavour], target.capability is None, other_name, name))
    return [name for *_, name in sorted(slots)]


def _cached_folder(bundle: Bundle, name: str) -> BuildFolder:
    cache.check_cache()
    return BuildFolder(cache.cached(bundle.manifest, name))


def _open_cached(
    bundle: Bundle, folder: BuildFolder, device: str, settings: Settings, passed_over: dict[str, str]
) -> Opened:
    """A build of the cache; engines for another machine or another version of TensorRT are built again."""
    record = folder.record
    engine = record.engine
    problem = compatibility.mismatch(engine, driver.this_machine(engine.flavour)) if engine else None
    if engine and problem:
        here = driver.this_machine().capability
        if engine.flavour == "tensorrt-rtx" and here not in engine.capabilities:
            # Built again, it would be for the same GPUs again.
            raise compatibility.refusal(folder, problem, bundle.path, here)
        try:
            folder = BuildFolder(_rebuild()(bundle, record))
        except (VaeExportError, OSError) as error:
            problem = f"{problem}. Building it again failed: {error}"
            raise compatibility.refusal(folder, problem, bundle.path) from None
    return _open_build(bundle, folder, device, settings, passed_over)


def _rebuild() -> Callable[[Bundle, Build], Path]:
    """The function that builds again: an entry point of installed packages, so that running needs no compiler.

    Raises:
        BackendError: `vae_export` is imported from a folder and not installed.
    """
    from importlib import metadata  # slow to import, and rarely needed

    entry = next(iter(metadata.entry_points(group="vae_export.rebuild")), None)
    if entry is None:
        raise BackendError("vae_export is not installed as a package, and nothing else is known to build")
    return cast("Callable[[Bundle, Build], Path]", entry.load())


def _open_build(
    bundle: Bundle, folder: BuildFolder, device: str, settings: Settings, passed_over: Mapping[str, str]
) -> Opened:
    """Open a build, after all checks of its record: before that, nothing but SHA-256 reads its engines."""
    record, model = folder.record, bundle.manifest.model
    folder.check_source(bundle.manifest)
    target = targets.parse(record.target)
    if device not in ("auto", target.device):
        raise InputError(f"load: device is {device!r}, and {folder.path} is a build for {record.target}. Drop one")
    here = processor.processor()
    notes = compatibility.notes(record, here)
    if target.device == "cpu":
        if problem := compatibility.unfit(record, here):
            raise compatibility.refusal(folder, problem, bundle.path)
        plans: dict[str, list[PlannedGraph]] = {}
        for name, variants in folder.variants().items():
            plans[name] = [
                PlannedGraph(graph, plan, onnx_guard.check_operators(graph, name)) for plan, graph in variants
            ]
        return Opened(CpuBackend(plans, model, settings), folder, passed_over, notes)
    graphs, engine = folder.graphs(), record.engine
    if engine and (problem := compatibility.mismatch(engine, driver.this_machine(engine.flavour))):
        raise compatibility.refusal(folder, problem, bundle.path, driver.this_machine().capability)
    backend = open_backend(
        graphs, model, device=target.device, options=record.options, engine=engine, settings=settings
    )
    return Opened(backend, folder, passed_over, notes)


def open_backend(
    graphs: Mapping[str, bytes],
    model: Model,
    *,
    device: str,
    options: Options | None = None,
    engine: Engine | None = None,
    settings: Settings | None = None,
    weights: Mapping[str, Weights] | None = None,
) -> Backend:
    """Open graphs on a device.

    Args:
        graphs: verified bytes by name: ONNX, whose operators are checked here, or engines that match this machine.
        model: their inputs and outputs.
        device: `cpu` or `cuda`.
        options: how they were built.
        engine: the record of the engines; None for ONNX.
        settings: how to run them.
        weights: the verified weights that lie beside ONNX graphs, by the graph's name.

    Raises:
        BundleError, BackendError: as for `load`.
    """
    options, settings = options or Options(), settings or Settings()
    if engine:
        from vae_export.runtimes.gpu.trt import open_engines

        return open_engines(graphs, model, options, engine, settings)
    beside = weights or {}
    arrays = {name: onnx_guard.check_operators(graph, name, beside.get(name)) for name, graph in graphs.items()}
    if device == "cuda":
        from vae_export.runtimes.gpu.ort import open_cuda

        return open_cuda(graphs, model, options, settings, arrays)
    plans = {name: [PlannedGraph(graph, arrays=arrays[name])] for name, graph in graphs.items()}
    return CpuBackend(plans, model, settings)
