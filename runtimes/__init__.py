"""Run a bundle without PyTorch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vae_export import builds, onnx_reader
from vae_export.builds import BuildFolder, Engine, Options
from vae_export.bundle import Bundle
from vae_export.errors import BackendError, BundleError, InputError, VaeExportError
from vae_export.manifest import Model
from vae_export.onnx_reader import Weights

from . import machine
from .backend import Backend, Settings, Way
from .cpu import CpuBackend
from .memory import Budget, parse_bytes
from .posterior import DevicePosterior, Elbo, Posterior
from .tiling import Tile
from .vae import VAE

__all__ = [
    "VAE",
    "Backend",
    "DevicePosterior",
    "Elbo",
    "Opened",
    "Posterior",
    "Settings",
    "Tile",
    "load",
    "open_backend",
    "open_bundle",
]


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    build: str | os.PathLike[str] | None = None,
    micro_batch: int = 64,
    threads: int | None = None,
    lanes: int = 1,
    cuda_graphs: bool | None = None,
    max_memory: int | str | None = None,
    check_range: bool = True,
) -> VAE:
    """Open a bundle for use. PyTorch is never imported.

    Every file of the bundle, and of the build that is used, is verified first.

    Args:
        path: the bundle's folder.
        device: `cpu`, `cuda`, or `auto`: the best that is there. On a GPU that is a build for TensorRT, for TensorRT
            for RTX or for CUDA from the user's cache, then ONNX Runtime on CUDA; on the CPU a build from the cache,
            then the bundle itself on ONNX Runtime. `VAE.describe` tells which, and what was passed over and why.
        build: the folder of a build of this bundle, which is then used and no other. An engine in it is native code:
            name only what you trust.
        micro_batch: the most examples that go through a graph at once; larger batches are cut into such
            slices. It bounds memory and does not change results.
        threads: threads inside one call on the CPU; None leaves it to the backend.
        lanes: on a GPU, how many calls run at once, each with a stream and buffers of its own. Calls from more
            threads wait.
        cuda_graphs: replay captured CUDA graphs. None does so with TensorRT where a shape can be captured; ONNX
            Runtime needs True, one lane, and a model whose every node runs on CUDA.
        max_memory: a budget for the intermediate results of all calls together, as bytes or as text such as `2GiB`;
            weights, and what a call takes and gives, are not counted. It makes the slices smaller than micro_batch,
            and where not even one example fits, `encode`, `decode`, `reconstruct`, `sample`, `generate`,
            `interpolate` and `edit` cut it into tiles (see `Tile`), whose blending does change results. What is
            needed is known from counts in the manifest, times a factor for safety: it is an estimate, not a limit
            that is enforced. Calls from several threads wait for each other where the budget does not hold them at
            once.
        check_range: refuse data that exceed the range of the manifest by more than a tenth of its width (half a
            level of 256 for a discretized logistic likelihood). False is for data without bounds, such as
            standardized features; a Bernoulli likelihood has no density outside of [0, 1], and refuses all the same.

    Raises:
        InputError: there is no folder at `path` or `build`, or an option is not one of those above; or max_memory is
            less than a model of fixed sizes needs, or the bundle is too old to say what it needs.
        BundleError: the bundle or the build is incomplete, damaged, tampered with, or newer than this version; or
            the build is of another bundle.
        BackendError: the device or a package that it needs is not available, or the build is for another machine.
    """
    asked = {**locals(), "path": Path(path).absolute()}
    if build:
        asked["build"] = Path(build).absolute()
    limit = None if max_memory is None else parse_bytes(max_memory)
    bundle = Bundle(path)
    settings = Settings(micro_batch=micro_batch, threads=threads, lanes=lanes, cuda_graphs=cuda_graphs)
    manifest = bundle.manifest
    costs = {name: graph.cost for name, graph in manifest.graphs.items() if graph.cost}
    budget = None if limit is None else Budget(limit, manifest.model, costs)
    opened = open_bundle(bundle, device=device, build=build, settings=settings)
    return VAE(
        manifest.model,
        opened.backend,
        micro_batch=micro_batch,
        name=manifest.name,
        facts=opened.facts(),
        budget=budget,
        check_range=check_range,
        reopen=(_reopened, (asked, manifest.digest)),
    )


def _reopened(asked: dict[str, Any], digest: str) -> VAE:
    """What a pickled VAE becomes: `load` with the same arguments, if the bundle is still the same.

    Raises:
        InputError, BundleError, BackendError: as for `load`; or another bundle is at that path by now.
    """
    vae = load(**asked)
    found = Bundle(asked["path"]).manifest.digest
    if found != digest:
        vae.close()
        raise BundleError(
            f"{asked['path']}: this VAE was pickled when manifest {digest[:12]}… was there, and now there is "
            f"{found[:12]}…. Load the bundle by its path, and pickle it again"
        )
    return vae


class Opened:
    """A bundle's graphs on a backend.

    Attributes:
        backend: it has the graphs.
        options: how they were built; the defaults where no build is used.
        build: the build's folder, or None for the bundle's own graphs.
        passed_over: what would have come first, and why it did not.
    """

    def __init__(self, backend: Backend, options: Options, build: Path | None, passed_over: Mapping[str, str]) -> None:
        self.backend = backend
        self.options = options
        self.build = build
        self.passed_over = dict(passed_over)

    def facts(self) -> dict[str, object]:
        """For `VAE.describe`."""
        return {
            "precision": builds.TOLERANCE_NAMES.get(self.options.precision, "mixed"),
            "build": str(self.build) if self.build else None,
            "passed_over": self.passed_over,
        }


def open_bundle(
    bundle: Bundle,
    *,
    device: str = "auto",
    build: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
) -> Opened:
    """Open a bundle's graphs, or those of a build of it, on the best backend. Arguments and errors: see `load`."""
    settings = settings or Settings()
    _check_settings(device, settings)
    bundle.check()
    if build is not None:
        return _open_build(bundle, BuildFolder(build), device, settings, {})
    passed_over: dict[str, str] = {}
    for place in _places(bundle, device, passed_over):
        try:
            if place in ("cuda", "cpu"):
                graphs, weights = bundle.graphs()
                model = bundle.manifest.model
                backend = open_backend(graphs, model, device=place, settings=settings, weights=weights)
                return Opened(backend, Options(), None, passed_over)
            return _open_cached(bundle, place.removeprefix("build "), device, settings, passed_over)
        except (BackendError, BundleError) as error:
            if place == ("cuda" if device == "cuda" else "cpu"):
                raise
            passed_over[place] = str(error)
    raise AssertionError("the last place opens or raises")


def _check_settings(device: str, settings: Settings) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"load: device is {device!r}; expected 'auto', 'cpu' or 'cuda'")
    threads, lanes = settings.threads, settings.lanes
    if threads is not None and not (isinstance(threads, int) and 1 <= threads < 1 << 16):
        raise InputError(f"load: threads is {threads!r}; expected a number from 1 on, or None")
    if not (isinstance(lanes, int) and 1 <= lanes <= 64):
        raise InputError(f"load: lanes is {lanes!r}; expected a number from 1 to 64")
    if settings.cuda_graphs not in (None, True, False):
        raise InputError(f"load: cuda_graphs is {settings.cuda_graphs!r}; expected True, False or None")


def _places(bundle: Bundle, device: str, passed_over: dict[str, str]) -> list[str]:
    """What to try, the best first: `build TARGET` of the cache, `cuda`, `cpu`."""
    there = [builds.target(name) for name in builds.cached_targets(bundle.manifest)]
    rank = {"tensorrt": 0, "tensorrt-rtx": 1, None: 2}
    on_gpu = sorted((t for t in there if t.device == "cuda"), key=lambda t: (rank[t.flavour], t.capability is None))
    places = []
    if device == "cuda" or (device == "auto" and not machine.driver().problem):
        places += [*(f"build {target.name}" for target in on_gpu), "cuda"]
    elif device == "auto":
        passed_over["cuda"] = machine.driver().problem or ""
    if device != "cuda":
        places += [*(f"build {target.name}" for target in there if target.device == "cpu"), "cpu"]
    return places


def _open_cached(bundle: Bundle, name: str, device: str, settings: Settings, passed_over: dict[str, str]) -> Opened:
    """A build of the cache; if it was made for what this machine had before, it is made again."""
    builds.check_cache()
    folder = BuildFolder(builds.cached(bundle.manifest, name))
    record = folder.record
    engine = record.engine
    problem = builds.mismatch(engine, machine.this_machine(engine.flavour)) if engine else None
    if engine and problem:
        from vae_export.builder import rebuild

        here = machine.this_machine().capability
        if engine.flavour == "tensorrt-rtx" and here not in engine.capabilities:
            # Made again, it would be for the same GPUs again.
            raise BackendError(
                f"{folder.path}: {problem}. Run: vae-export build {bundle.path} --target {_target_here(name)}"
            )
        try:
            folder = BuildFolder(rebuild(bundle, record))
        except (VaeExportError, OSError) as error:
            raise BackendError(
                f"{folder.path}: {problem}. Building it again failed: {error}. "
                f"Run: vae-export build {bundle.path} --target {name}"
            ) from None
    return _open_build(bundle, folder, device, settings, passed_over)


def _open_build(
    bundle: Bundle, folder: BuildFolder, device: str, settings: Settings, passed_over: Mapping[str, str]
) -> Opened:
    """Everything that can be said against a build is said before its engines are read by anything but SHA-256."""
    record = folder.record
    folder.check_source(bundle.manifest)
    wanted = builds.target(record.target)
    if device not in ("auto", wanted.device):
        raise InputError(f"load: device is {device!r}, and {folder.path} is a build for {record.target}. Drop one")
    if wanted.device == "cpu":
        ways: dict[str, list[Way]] = {}
        for name, variants in folder.variants().items():
            ways[name] = []
            for variant, graph in variants:
                onnx_reader.check_operators(graph, name)
                taken = variant.runner, variant.precision, variant.threads, variant.up_to, variant.exact
                ways[name].append(Way(graph, *taken))
        return Opened(CpuBackend(ways, bundle.manifest.model, settings), record.options, folder.path, passed_over)
    graphs = folder.graphs()
    engine = record.engine
    if engine and (problem := builds.mismatch(engine, machine.this_machine(engine.flavour))):
        raise BackendError(
            f"{folder.path}: {problem}. Run: vae-export build {bundle.path} --target {_target_here(record.target)}"
        )
    backend = open_backend(
        graphs, bundle.manifest.model, device=wanted.device, options=record.options, engine=engine, settings=settings
    )
    return Opened(backend, record.options, folder.path, passed_over)


def _target_here(target: str) -> str:
    """The target to build for this machine in place of one for another."""
    gpus = machine.driver().gpus
    if target.startswith("tensorrt-rtx") and gpus:
        return f"tensorrt-rtx-sm{gpus[0].capability.replace('.', '')}"
    return target


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
        graphs: verified bytes by name: ONNX, whose operators are checked here, or engines, which were compared with
            this machine before.
        model: what they take and give.
        device: `cpu` or `cuda`.
        options: how they were built.
        engine: what made the engines; None for ONNX.
        settings: how to run them.
        weights: the verified weights that lie beside ONNX graphs, by the graph's name.

    Raises:
        BundleError, BackendError: as for `load`.
    """
    options, settings = options or Options(), settings or Settings()
    if engine:
        from .trt import open_engines

        return open_engines(graphs, model, options, engine, settings)
    beside = weights or {}
    arrays = {name: onnx_reader.check_operators(graph, name, beside.get(name)) for name, graph in graphs.items()}
    if device == "cuda":
        from .ort import open_cuda

        return open_cuda(graphs, model, options, settings, arrays)
    return CpuBackend({name: [Way(graph, arrays=arrays[name])] for name, graph in graphs.items()}, model, settings)
