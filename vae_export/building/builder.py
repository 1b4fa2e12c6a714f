"""Bundle → build for a target: options, dispatch to the CPU or a GPU, and the folder.

Why a build was refused: an option that the target does not have (here), the graphs (`contents.read`), or nothing that
passes its certificate, for which see `cpu.search` and `devices`.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import msgspec

from vae_export import versions
from vae_export.building import contents, devices
from vae_export.building.contents import Artifacts, Contents
from vae_export.building.cpu import SearchSettings
from vae_export.certification import certificate, golden
from vae_export.certification.certificate import Certificate
from vae_export.contract import atomic, build_record, cache, folders, targets
from vae_export.contract.build_record import RECORD_FORMAT, Build, BuildFolder, Options
from vae_export.contract.bundle import Bundle
from vae_export.contract.choices import Asked, Precision
from vae_export.contract.targets import Target
from vae_export.errors import InputError, check_flags, require
from vae_export.progress import Progress, silent
from vae_export.runtimes import processor
from vae_export.runtimes.gpu import flavours

BATCHES = (1, 8, 64)
_TOOLS = ("vae-export", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy")


@dataclass(frozen=True)
class Built:
    """A build in its folder.

    Attributes:
        path: the folder.
        record: the content of its `build.json`.
        certificate: measured on this machine; None where it cannot run the target.
        unmeasured: why there is no certificate, in words; None where there is one.
    """

    path: Path
    record: Build
    certificate: Certificate | None
    unmeasured: str | None


def build(
    path: str | os.PathLike[str],
    target: str,
    *,
    out: str | os.PathLike[str] | None = None,
    precision: Asked = "fp32",
    budget: Precision = "int8",
    passes: str | None = None,
    batches: Sequence[int] = BATCHES,
    sizes: Sequence[Mapping[str, int]] = (),
    static: bool = False,
    tf32: bool = False,
    nhwc: bool = False,
    refittable: bool = False,
    seconds: float | None = None,
    search: SearchSettings | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Built:
    """Make a build from a bundle, and prove, where the target runs on this machine, that it computes the same.

    The bundle is not changed. The build appears whole, and only if every check of its certificate passes.

    Args:
        path: the bundle's folder.
        target: `cpu` or `cuda` (ONNX Runtime), `tensorrt`, `tensorrt-rtx`, or `tensorrt-rtx-smNN`.
        out: the build's folder; None writes to the user's cache, where `load` looks. `load` uses the build without
            being asked if it passed float32's certificate, and with `precision` otherwise. The cache keeps a build of
            each precision.
        precision: what convolutions and matrix products compute in: `fp32`, `fp16`, `bf16`; on the CPU also `int8`, or
            `auto`, the fastest of all that pass. Nodes whose values exceed a type's range, or whose errors exceed the
            tolerance, stay in float32; the build's record says which, and why.
        budget: of `auto`: the precision whose tolerances apply. The ELBO's error relative to Σ|ELBO terms| is at most
            1e-2 for `int8` and `bf16`, 1e-3 for `fp16`.
        passes: the graph passes that may be used, in the syntax of `graph.rewrites.select`; None is all that suit the
            target.
        batches: of engines: each gets an optimization profile; a batch between two of them runs in the larger one's.
            On the CPU: those at which candidates are timed; a batch between two of them runs like the larger one.
        sizes: for data with named dimensions, such as `{"height": 64, "width": 64}`. Of engines: each gets profiles of
            its own, for all sizes up to it. On the CPU: the one at which candidates are timed. By default that of the
            golden examples.
        static: of engines: take exactly these batches and sizes; smaller batches are padded.
        tf32: let float32 products on a GPU be rounded to 10 bits.
        nhwc: let ONNX Runtime keep channels last on CUDA.
        refittable: of engines: keep weights replaceable, for `refit`.
        seconds: on the CPU: how long each candidate is timed for each graph and batch; None is that of `search`.
        search: on the CPU: what is tried and when a difference counts; None is `SearchSettings()`.
        overwrite: replace a build that is at `out`. One in the cache for the same target and precision is always
            replaced.
        progress: called with the name of each step as it begins.

    Raises:
        InputError: an argument is wrong, the target has no such option, or something is at `out`.
        BundleError: the bundle is incomplete, damaged, inconsistent, or newer than this version.
        BackendError: what the target needs is not installed or not here, or it cannot build the model.
        VerificationError: the build differs from the golden examples by more than its precision's tolerances, or a
            reduced precision that loses more than half precision is no faster than float32.
    """
    wanted = targets.parse(target)
    if not isinstance(sizes, (list, tuple)):
        raise InputError(f"build: sizes is {sizes!r}; expected a sequence of sizes such as [{{'height': 64}}]")
    if out is not None and not isinstance(out, (str, os.PathLike)):
        raise InputError(f"build: out is {out!r}; expected the path of a folder, or None for the cache")
    check_flags("build", static=static, tf32=tf32, nhwc=nhwc, refittable=refittable, overwrite=overwrite)
    for name, value, known in (("precision", precision, get_args(Asked)), ("budget", budget, get_args(Precision))):
        if not isinstance(value, str) or value not in known:
            raise InputError(f"build: {name} is {value!r}; expected {', '.join(known)}")
    flags = {"tf32": tf32, "nhwc": nhwc, "static": static, "refittable": refittable}
    flags["size"] = len(sizes) > (wanted.name == "cpu")
    _check_options(wanted, [precision, *(name for name, on in flags.items() if on)])
    _require_packages(wanted)
    from vae_export.graph import rewrites

    chosen = rewrites.select(passes)
    if wanted.name != "cpu" and passes is None:  # which form is faster on a GPU was not measured
        chosen = tuple(name for name in chosen if name not in rewrites.FORMS)
    bundle = Bundle(path)
    model = bundle.manifest.model
    options = Options(
        precision=precision, budget=budget, passes=chosen, tf32=bool(tf32), nhwc=bool(nhwc),
        refittable=bool(refittable),
    )  # fmt: skip
    if model.data.named() and not sizes:
        reference = golden.decode(bundle.read(golden.FILE), bundle.manifest.golden, model)
        sizes = [model.sizes(reference.tensors["mean"].shape[1:])]
    profiles = targets.profiles(model, batches, sizes, static=static)
    if wanted.flavour:
        options = msgspec.structs.replace(options, profiles=profiles)
    if precision != "auto" and budget != "int8":
        raise InputError(f"build: budget {budget} is for precision auto; precision is {precision}. Drop one")
    if seconds is not None and not (isinstance(seconds, (int, float)) and 0 < seconds < math.inf):
        raise InputError(f"build: seconds is {seconds!r}; expected a number above 0")
    settings = search or SearchSettings()
    if seconds is not None:
        settings = dataclasses.replace(settings, seconds=seconds)

    def make(inputs: Contents) -> Artifacts:
        if wanted.name != "cpu":
            return devices.build(inputs, wanted, options, progress)
        from vae_export.building.cpu import search as cpu

        at = sizes[0] if sizes else {}
        return cpu.search(inputs, options, [profile.batch[2] for profile in profiles], at, settings, progress)

    return _make(bundle, wanted, options, Path(out) if out else None, overwrite, progress, make)


def refit(
    path: str | os.PathLike[str],
    old: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Built:
    """Put a bundle's weights into the engines of a refittable build of the same architecture.

    It takes a fraction of the time of a build, and the GPU that the engines are for. Precision, shapes and flags are
    those of the old build, which is not changed.

    Args:
        path: the bundle's folder.
        old: the build's folder.
        out: as for `build`.
        overwrite: as for `build`.
        progress: as for `build`.

    Raises:
        InputError: the build cannot take other weights, or is of another architecture.
        BundleError, BackendError, VerificationError: as for `build`.
    """
    folder = BuildFolder(old)
    target, options = targets.parse(folder.record.target), folder.record.options
    if not options.refittable or folder.record.engine is None:
        raise InputError(f"refit: {folder.path} was not built with --refittable: its weights are fixed. Build anew")
    make = functools.partial(devices.build, target=target, options=options, progress=progress, old=folder)
    return _make(Bundle(path), target, options, Path(out) if out else None, overwrite, progress, make)


def rebuild(bundle: Bundle, record: Build) -> Path:
    """Build an engine of the cache again, with the options of its record and what this machine has now.

    Raises:
        BackendError, VerificationError: as for `build`.
    """
    target = targets.parse(record.target)
    make = functools.partial(devices.build, target=target, options=record.options, progress=silent)
    return _make(bundle, target, record.options, None, True, silent, make).path


def _make(
    bundle: Bundle,
    target: Target,
    options: Options,
    out: Path | None,
    overwrite: bool,
    progress: Progress,
    make: Callable[[Contents], Artifacts],
) -> Built:
    """Check the place, read the bundle, make the artifacts, and write them whole or not at all."""
    _require_packages(target)
    manifest = bundle.manifest
    if out is None:
        cache.check_cache()
    path = out or cache.cached(manifest, cache.slot(target.name, options.wanted))
    atomic.check_name(path)
    if path.resolve().is_relative_to(bundle.path.resolve()):
        raise InputError(f"build: {path} lies inside the bundle, which is never changed. Choose a path outside of it")
    overwrite = overwrite or out is None
    folders.check_target(path, RECORD_FORMAT, overwrite=overwrite)
    artifacts = make(contents.read(bundle))
    progress("writing the build")
    path.parent.mkdir(parents=True, exist_ok=True)
    with folders.create(path, RECORD_FORMAT, overwrite=overwrite) as folder:
        for file, content in artifacts.files.items():
            (folder / file).write_bytes(content)
        if artifacts.certificate:
            (folder / build_record.CERTIFICATE).write_bytes(certificate.encode(artifacts.certificate))
        record = Build(
            format=build_record.FORMAT,
            version=build_record.VERSION,
            digest="",
            bundle=manifest.name,
            manifest=manifest.digest,
            sources={name: manifest.files[graph.file].sha256 for name, graph in manifest.graphs.items()},
            target=target.name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            options=options,
            graphs=artifacts.graphs,
            engine=artifacts.engine,
            tools=versions.tools(_TOOLS),
            measurements=artifacts.measurements,
            absent=artifacts.absent,
            processor=processor.processor() if target.name == "cpu" else None,
            calibrated=dict(artifacts.calibrated),
            files=folders.list_files(folder),
        )
        (folder / RECORD_FORMAT.file).write_bytes(RECORD_FORMAT.encode(record))
    return Built(path, BuildFolder(path).record, artifacts.certificate, artifacts.unmeasured)


def _require_packages(target: Target) -> None:
    for module in ("onnx", "onnx_ir"):
        require(module, flavours.EXTRAS[target.flavour] if target.flavour else "build", "build")


def _check_options(target: Target, given: Sequence[str]) -> None:
    """Refuse options that a target does not have."""
    reasons = {
        "int8": "it is measured on the CPU only",
        "auto": "it is measured on the CPU only",
        "tf32": "TF32 is a GPU's",
        "nhwc": "it is ONNX Runtime's on CUDA",
        "static": "it is an option of TensorRT engines",
        "refittable": "it is an option of TensorRT engines",
        "size": "the CPU is measured at one size" if target.name == "cpu" else "it takes all sizes",
    }
    unknown = {
        "cpu": ("tf32", "nhwc", "static", "refittable", "size"),
        "cuda": ("int8", "auto", "static", "refittable", "size"),
    }.get(target.name, ("int8", "auto", "nhwc"))
    if wrong := [name for name in given if name in unknown]:
        reason = "; ".join(f"{name}: {reasons[name]}" for name in wrong)
        raise InputError(f"build: target {target.name} does not take {', '.join(wrong)} ({reason})")
