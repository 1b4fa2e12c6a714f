"""Bundle → build for a target: precision, fused graphs, engines, and a certificate where the target runs here."""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import msgspec

from vae_export import builds, certificate, engines, files, golden, onnx_reader, sealed, verifier, versions
from vae_export.builds import Build, BuildFolder, BuiltGraph, Engine, Options, Precision, Target
from vae_export.bundle import Bundle
from vae_export.certificate import Certificate
from vae_export.errors import BackendError, InputError, require
from vae_export.manifest import Model
from vae_export.onnx_reader import Arrays
from vae_export.pixels import is_picture
from vae_export.runtimes import Settings, flavours, machine, open_backend

BATCHES = (1, 8, 64)
_TOOLS = ("vae-export", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy")
_Progress = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """A build that was made.

    Attributes:
        path: its folder.
        record: its `build.json`.
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
    precision: Precision = "fp32",
    batches: Sequence[int] = BATCHES,
    sizes: Sequence[Mapping[str, int]] = (),
    static: bool = False,
    tf32: bool = False,
    nhwc: bool = False,
    refittable: bool = False,
    overwrite: bool = False,
    progress: _Progress = lambda step: None,
) -> Built:
    """Make a build from a bundle, and prove, where the target runs on this machine, that it computes the same.

    The bundle is not changed. The build appears whole, and only if every check of its certificate holds.

    Args:
        path: the bundle's folder.
        target: `cpu` or `cuda` (ONNX Runtime), `tensorrt`, `tensorrt-rtx`, or `tensorrt-rtx-smNN`.
        out: the build's folder; None puts it into the user's cache, where `load` finds it.
        precision: what convolutions and matrix products compute in: `fp32`, `fp16` or `bf16`.
        batches: of engines: each gets a profile; a batch between two of them runs in the larger one's.
        sizes: of engines for data with named dimensions, such as `{"height": 64, "width": 64}`: each gets profiles of
            its own, for all sizes up to it. None given takes the size of the golden examples.
        static: of engines: take exactly these batches and sizes; smaller batches are filled up.
        tf32: let float32 products on a GPU be rounded to 10 bits.
        nhwc: let ONNX Runtime keep channels last on CUDA.
        refittable: of engines: keep weights replaceable, for `refit`.
        overwrite: replace a build that is at `out`. One in the cache is always replaced.
        progress: called with the name of each step as it begins.

    Raises:
        InputError: an argument is wrong, the target has no such option, or something is at `out`.
        BundleError: the bundle is incomplete, damaged, tampered with, or newer than this version.
        BackendError: what the target needs is not installed or not here, or it cannot build the model.
        VerificationError: the build differs from the golden examples by more than its precision's budget.
    """
    wanted = builds.target(target)
    if precision not in get_args(Precision):
        raise InputError(f"build: precision is {precision!r}; expected {', '.join(get_args(Precision))}")
    _check_options(
        wanted,
        {"bf16": precision == "bf16", "tf32": tf32, "nhwc": nhwc},
        {"static": static, "size": bool(sizes), "refittable": refittable},
    )
    bundle = Bundle(path)
    options = Options(precision=precision, tf32=tf32, nhwc=nhwc, refittable=refittable)
    if wanted.flavour:
        model = bundle.manifest.model
        if model.data.named() and not sizes:
            sizes = [_golden_sizes(model, golden.decode(bundle.read(golden.FILE), bundle.manifest.golden, model))]
        profiles = builds.profiles(model, batches, sizes, static=static)
        options = msgspec.structs.replace(options, profiles=profiles)
    return _make(bundle, wanted, options, Path(out) if out else None, overwrite, progress)


def refit(
    path: str | os.PathLike[str],
    old: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: _Progress = lambda step: None,
) -> Built:
    """Put a bundle's weights into the engines of a refittable build of the same architecture.

    It takes a fraction of the time of a build. Precision, shapes and flags stay as they are in the old build, which
    is not changed. It needs the GPU that the engines are for.

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
    record = folder.record
    if not record.options.refittable or record.engine is None:
        raise InputError(f"refit: {folder.path} was not built with --refittable: its weights are fixed. Build anew")
    target = builds.target(record.target)
    return _make(Bundle(path), target, record.options, Path(out) if out else None, overwrite, progress, folder)


def rebuild(bundle: Bundle, record: Build) -> Path:
    """Make a build of the cache again, as it was asked for, with what this machine has now.

    Raises:
        BackendError, VerificationError: as for `build`.
    """
    return _make(bundle, builds.target(record.target), record.options, None, True, lambda step: None).path


def _make(
    bundle: Bundle,
    target: Target,
    options: Options,
    out: Path | None,
    overwrite: bool,
    progress: _Progress,
    old: BuildFolder | None = None,
) -> Built:
    manifest, model = bundle.manifest, bundle.manifest.model
    for module in ("onnx", "onnx_ir"):
        require(module, flavours.EXTRAS[target.flavour] if target.flavour else "build", "build")
    from vae_export.graph import structure

    if out is None:
        builds.check_cache()
    path = out or builds.cached(manifest, target.name)
    if path.resolve().is_relative_to(bundle.path.resolve()):
        raise InputError(f"build: {path} lies inside the bundle, which is never changed. Choose a path outside of it")
    sealed.check_target(path, builds.SEAL, overwrite=overwrite or out is None)
    bindings = flavours.load(target.flavour) if target.flavour else None
    progress(f"graphs in {options.precision}")
    sources, weights = bundle.graphs()
    arrays = {name: onnx_reader.check_operators(source, name, weights.get(name)) for name, source in sources.items()}
    reference = golden.decode(bundle.read(golden.FILE), manifest.golden, model)
    bundle.check()
    graphs = _graphs(sources, arrays, bundle, options.precision)
    structures = {name: structure.digest(graph) for name, graph in graphs.items()}
    engine: Engine | None = None
    made: dict[str, bytes] = graphs
    if bindings:
        engine = engines.record(bindings, target)
        made = {}
        if old:
            _check_structure(old, structures)
            _check_machine(old.path, old.record)
            steps = engines.refit(bindings, old.graphs(), graphs)
        else:
            steps = engines.build(bindings, graphs, model, target, options)
        for name in graphs:
            progress(f"{'refitting' if old else 'building'} the {name}")
            made[name] = next(steps)
    measured, unmeasured = None, _unmeasurable(target, engine, options, _golden_sizes(model, reference))
    if not unmeasured:
        progress("measuring the certificate")
        backend = open_backend(made, model, device=target.device, options=options, engine=engine, settings=Settings())
        try:
            measured = verifier.measure(model, backend, reference, manifest.name, options.tolerance)
        finally:
            backend.close()
        measured.require()
    progress("writing the build")
    suffix = "engine" if engine else "onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_folder(path, overwrite=True) as folder:
        for name, content in made.items():
            (folder / f"{name}.{suffix}").write_bytes(content)
        if measured:
            (folder / builds.CERTIFICATE).write_bytes(certificate.encode(measured))
        record = Build(
            format=builds.FORMAT,
            version=builds.VERSION,
            digest="",
            bundle=manifest.name,
            manifest=manifest.digest,
            sources={name: manifest.files[graph.file].sha256 for name, graph in manifest.graphs.items()},
            target=target.name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            options=options,
            graphs={
                name: BuiltGraph(
                    file=f"{name}.{suffix}", onnx_sha256=hashlib.sha256(graph).hexdigest(), structure=structures[name]
                )
                for name, graph in graphs.items()
            },
            engine=engine,
            tools=versions.tools(_TOOLS),
            files=sealed.list_files(folder),
        )
        (folder / builds.SEAL.file).write_bytes(builds.SEAL.encode(record))
    return Built(path, BuildFolder(path).record, measured, unmeasured)


def _graphs(
    sources: Mapping[str, bytes], arrays: Mapping[str, Arrays], bundle: Bundle, precision: Precision
) -> dict[str, bytes]:
    """The bundle's graphs in a precision, with all their weights in them, and the fused ones."""
    from vae_export import graph
    from vae_export.graph import compose
    from vae_export.graph.precision import lower

    model = bundle.manifest.model
    made = dict(sources)
    for name, source in sources.items():
        if precision != "fp32":
            made[name] = graph.write(lower(graph.read(source, arrays[name]), precision, name))
        elif arrays[name]:
            made[name] = graph.write(graph.read(source, arrays[name]))
    fused = {"reconstruct": compose.reconstruct(graph.read(made["encoder"]), graph.read(made["decoder"]), model)}
    if is_picture(model.data.shape):
        fused["generate"] = compose.generate(graph.read(made["decoder"]), model)
    return made | {name: graph.write(fusion) for name, fusion in fused.items()}


def _check_options(target: Target, everywhere: Mapping[str, bool], engines_only: Mapping[str, bool]) -> None:
    """Refuse what a target has not."""
    no = {"cpu": ("bf16", "tf32", "nhwc"), "cuda": ()}.get(target.name, ("nhwc",))
    wrong = [name for name, on in everywhere.items() if on and name in no]
    if target.flavour is None:
        wrong += [name for name, on in engines_only.items() if on]
    if wrong:
        reasons = {
            "bf16": "ONNX Runtime has no bf16 convolutions on the CPU",
            "tf32": "TF32 is a GPU's",
            "nhwc": "it is ONNX Runtime's on CUDA",
        }
        reason = "; ".join(f"{name}: {reasons.get(name, 'it is an option of TensorRT engines')}" for name in wrong)
        raise InputError(f"build: target {target.name} does not take {', '.join(wrong)} ({reason})")


def _check_structure(old: BuildFolder, structures: Mapping[str, str]) -> None:
    other = [name for name, built in old.record.graphs.items() if structures.get(name) != built.structure]
    if other:
        raise InputError(
            f"refit: {old.path} is of another architecture: its {' and '.join(other)} differ in more than weights from "
            "this bundle's. Build anew"
        )


def _check_machine(path: Path, record: Build) -> None:
    assert record.engine is not None
    if problem := builds.mismatch(record.engine, machine.this_machine(record.engine.flavour)):
        raise BackendError(f"{path}: {problem}")


def _unmeasurable(target: Target, engine: Engine | None, options: Options, sizes: Mapping[str, int]) -> str | None:
    """Why this machine cannot run the golden examples on the target, in words, or None."""
    if target.device == "cuda" and (problem := machine.driver().problem):
        return problem
    if engine is None:
        return None
    if problem := builds.mismatch(engine, machine.this_machine(engine.flavour)):
        return problem
    if builds.choose(options.profiles, 1, sizes) is None:
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        return f"the golden examples have {asked}, which is in none of the profiles"
    return None


def _golden_sizes(model: Model, reference: golden.Reference) -> dict[str, int]:
    """The golden examples' sizes of the named dimensions."""
    return model.sizes(reference.tensors["mean"].shape[1:])
