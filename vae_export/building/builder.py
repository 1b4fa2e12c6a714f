"""Bundle → build for a target: precision, fused graphs, engines, and a certificate where the target runs here."""

from __future__ import annotations

import datetime
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import msgspec

from vae_export import versions
from vae_export.building import tensorrt
from vae_export.certification import certificate, golden, tail, verifier
from vae_export.certification.certificate import Certificate
from vae_export.contract import atomic, build_record, cache, folders, onnx_guard, targets
from vae_export.contract.build_record import Build, BuildFolder, BuiltGraph, Engine, ExecutionPlan, Measurement, Options
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import GRAPHS, Model
from vae_export.contract.onnx_guard import Arrays
from vae_export.contract.targets import Asked, Precision, Target
from vae_export.errors import (
    BackendError,
    BundleError,
    InputError,
    VaeExportError,
    VerificationError,
    check_flags,
    require,
)
from vae_export.numerics.pixels import is_picture
from vae_export.progress import Progress, silent
from vae_export.runtimes import Settings, compatibility, open_backend
from vae_export.runtimes import processor as here
from vae_export.runtimes.backend import Array, planned
from vae_export.runtimes.cpu.dispatch import CpuBackend
from vae_export.runtimes.gpu import driver, flavours

if TYPE_CHECKING:
    import onnx_ir

BATCHES = (1, 8, 64)
#: Rows on which half precision is evaluated on behalf of a device, and how many at once.
_ROWS, _BATCH = 24, 8
_TOOLS = (*("vae-export", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy"),)


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
    overwrite: bool = False,
    progress: Progress = silent,
) -> Built:
    """Make a build from a bundle, and prove, where the target runs on this machine, that it computes the same.

    The bundle is not changed. The build appears whole, and only if every check of its certificate holds.

    Args:
        path: the bundle's folder.
        target: `cpu` or `cuda` (ONNX Runtime), `tensorrt`, `tensorrt-rtx`, or `tensorrt-rtx-smNN`.
        out: the build's folder; None puts it into the user's cache, where `load` finds it: by itself if it holds
            float32's certificate, and with `precision` otherwise. Each precision has a place of its own there.
        precision: what convolutions and matrix products compute in: `fp32`, `fp16`, `bf16`; on the CPU also `int8`, or
            `auto`, the fastest of all that holds. Nodes that a type's range or the budget does not allow stay in
            float32; the build's record says which, and why.
        budget: of `auto`: the precision whose tolerances it is held to. The ELBO's relative error is at most 1e-2 for
            `int8` and `bf16`, 1e-3 for `fp16`.
        passes: which graph passes may be used, as `graph.passes.select` reads it; None is all of those that suit
            the target.
        batches: of engines: each gets a profile; a batch between two of them runs in the larger one's. On the CPU:
            those at which candidates are measured; a batch between two of them runs like the larger one.
        sizes: for data with named dimensions, such as `{"height": 64, "width": 64}`. Of engines: each gets profiles of
            its own, for all sizes up to it. On the CPU: the one at which candidates are measured. None given takes the
            size of the golden examples.
        static: of engines: take exactly these batches and sizes; smaller batches are filled up.
        tf32: let float32 products on a GPU be rounded to 10 bits.
        nhwc: let ONNX Runtime keep channels last on CUDA.
        refittable: of engines: keep weights replaceable, for `refit`.
        seconds: on the CPU: how long each candidate is measured for each graph and batch; None is `tuning.SECONDS`.
        overwrite: replace a build that is at `out`. One in the cache for the same target and precision is always
            replaced.
        progress: called with the name of each step as it begins.

    Raises:
        InputError: an argument is wrong, the target has no such option, or something is at `out`.
        BundleError: the bundle is incomplete, damaged, tampered with, or newer than this version.
        BackendError: what the target needs is not installed or not here, or it cannot build the model.
        VerificationError: the build differs from the golden examples by more than its precision's budget.
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
    _check_options(
        wanted,
        {"int8": precision == "int8", "auto": precision == "auto", "tf32": tf32, "nhwc": nhwc},
        {"static": static, "refittable": refittable},
        len(sizes),
    )
    for module in ("onnx", "onnx_ir"):
        require(module, _extra(wanted), "build")
    from vae_export.graph import rewrites as known_passes

    chosen = known_passes.select(passes)
    if wanted.name != "cpu" and passes is None:  # which form a GPU is faster with was not measured
        chosen = tuple(name for name in chosen if name not in known_passes.FORMS)
    bundle = Bundle(path)
    model = bundle.manifest.model
    options = Options(
        precision=precision, budget=budget, passes=chosen, tf32=bool(tf32), nhwc=bool(nhwc),
        refittable=bool(refittable),
    )  # fmt: skip
    if model.data.named() and not sizes:
        sizes = [_golden_sizes(model, golden.decode(bundle.read(golden.FILE), bundle.manifest.golden, model))]
    profiles = targets.profiles(model, batches, sizes, static=static)
    if wanted.flavour:
        options = msgspec.structs.replace(options, profiles=profiles)
    if precision != "auto" and budget != "int8":
        raise InputError(f"build: budget {budget} is for precision auto; precision is {precision}. Drop one")
    if seconds is not None and not (isinstance(seconds, (int, float)) and 0 < seconds < math.inf):
        raise InputError(f"build: seconds is {seconds!r}; expected a number above 0")
    batches = tuple(dict.fromkeys(profile.batch[2] for profile in profiles))
    measured_at = _MeasuredAt(batches, sizes[0] if sizes else {}, seconds)
    return _make(bundle, wanted, options, Path(out) if out else None, overwrite, progress, measured_at=measured_at)


@dataclass(frozen=True)
class _MeasuredAt:
    """Where candidates for the CPU are measured: batch sizes, the sizes of the data's named dimensions, how long."""

    batches: tuple[int, ...]
    sizes: Mapping[str, int]
    seconds: float | None


def _extra(target: Target) -> str:
    return flavours.EXTRAS[target.flavour] if target.flavour else "build"


def refit(
    path: str | os.PathLike[str],
    old: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
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
    target = targets.parse(record.target)
    return _make(Bundle(path), target, record.options, Path(out) if out else None, overwrite, progress, folder)


def rebuild(bundle: Bundle, record: Build) -> Path:
    """Make a build of the cache again, as it was asked for, with what this machine has now.

    Raises:
        BackendError, VerificationError: as for `build`.
    """
    return _make(bundle, targets.parse(record.target), record.options, None, True, silent).path


def _make(
    bundle: Bundle,
    target: Target,
    options: Options,
    out: Path | None,
    overwrite: bool,
    progress: Progress,
    old: BuildFolder | None = None,
    measured_at: _MeasuredAt | None = None,
) -> Built:
    manifest, model = bundle.manifest, bundle.manifest.model
    for module in ("onnx", "onnx_ir"):
        require(module, _extra(target), "build")
    if out is None:
        cache.check_cache()
    path = out or cache.cached(manifest, cache.slot(target.name, options.wanted))
    atomic.check_name(path)
    if path.resolve().is_relative_to(bundle.path.resolve()):
        raise InputError(f"build: {path} lies inside the bundle, which is never changed. Choose a path outside of it")
    replace = overwrite or out is None
    folders.check_target(path, build_record.RECORD_FORMAT, overwrite=replace)
    bindings = flavours.load(target.flavour) if target.flavour else None
    sources, weights = bundle.graphs()
    arrays = {name: onnx_guard.check_operators(source, name, weights.get(name)) for name, source in sources.items()}
    if untold := [name for name, found in arrays.items() if not found.foldable]:
        raise BundleError(
            f"build: the {untold[0]} does not tell how much it makes of constants alone, which what compiles it would "
            "compute first. The bundle itself runs; it cannot be built"
        )
    whole = _whole(sources, arrays)
    reference = golden.decode(bundle.read(golden.FILE), manifest.golden, model)
    calibration = golden.decode_calibration(bundle.read(golden.CALIBRATION_FILE), model)
    bundle.check()
    costs = {name: graph.cost for name, graph in manifest.graphs.items()}
    if target.name == "cpu":
        from vae_export.building.cpu import search

        assert measured_at is not None
        tuned = search.Tuner(
            whole,
            model,
            reference,
            calibration,
            costs,
            options,
            measured_at.batches,
            measured_at.sizes,
            manifest.name,
            measured_at.seconds or search.SECONDS,
            progress,
        ).run()
        contents = {variant.file: content for ways in tuned.variants.values() for variant, content in ways}
        variants = {name: tuple(variant for variant, _ in ways) for name, ways in tuned.variants.items()}
        built = {name: _built(ways[-1][0].file, ways[-1][1], variants[name]) for name, ways in tuned.variants.items()}
        return _write(
            *(bundle, path, target, options, contents, built, tuned.certificate, None, None, progress),
            overwrite=replace,
            measurements=tuned.measurements,
            absent=tuned.absent,
            processor=here.processor(),
            calibrated=tuned.calibrated,
        )
    more = None
    if options.tolerance != "float32":
        progress("running float32 on more rows")
        more = tail.make(whole, {}, model, costs, reference, calibration)
    progress(f"graphs in {options.precision}")
    graphs, changed, kept, absent, rows = _graphs(
        *(whole, model, reference, calibration, more, options, manifest.name, progress), doubles=target.flavour is None
    )
    structures = {name: _structure(graph) for name, graph in graphs.items()}
    engine: Engine | None = None
    made: dict[str, bytes] = graphs
    if bindings:
        engine = tensorrt.record(bindings, target)
        made = {}
        if old:
            _check_structure(old, structures)
            _check_machine(old.path, old.record)
            steps = tensorrt.refit(bindings, old.graphs(), graphs)
        else:
            steps = tensorrt.build(bindings, graphs, model, target, options)
        for name in graphs:
            progress(f"{'refitting' if old else 'building'} the {name}")
            made[name] = next(steps)
    measured, unmeasured = None, _unmeasurable(target, engine, options, _golden_sizes(model, reference))
    if not unmeasured:
        progress("measuring the certificate")
        backend = open_backend(made, model, device=target.device, options=options, engine=engine, settings=Settings())
        try:
            full = msgspec.structs.replace(options, precision="fp32").tolerance
            kinds = {part: options.tolerance if part in kept else full for part in GRAPHS}
            measured = verifier.measure(model, backend, reference, manifest.name, kinds, more=more)
        finally:
            backend.close()
        measured.require()
    suffix = "engine" if engine else "onnx"
    built = {
        name: msgspec.structs.replace(
            _built(f"{name}.{suffix}", graph), passes=changed.get(name, {}), kept=kept.get(name, {})
        )
        for name, graph in graphs.items()
    }
    contents = {f"{name}.{suffix}": content for name, content in made.items()}
    return _write(
        *(bundle, path, target, options, contents, built, measured, unmeasured, engine, progress),
        overwrite=replace,
        absent=absent,
        calibrated=rows,
    )


def _structure(graph: bytes) -> str:
    """See `graph.structure.digest`."""
    from vae_export.graph import fingerprint

    return fingerprint.digest(graph)


def _built(file: str, graph: bytes, variants: tuple[ExecutionPlan, ...] = ()) -> BuiltGraph:
    digest = hashlib.sha256(graph).hexdigest()
    return BuiltGraph(file=file, onnx_sha256=digest, structure=_structure(graph), variants=variants)


def _write(
    bundle: Bundle,
    path: Path,
    target: Target,
    options: Options,
    contents: Mapping[str, bytes],
    built: dict[str, BuiltGraph],
    measured: Certificate | None,
    unmeasured: str | None,
    engine: Engine | None,
    progress: Progress,
    *,
    overwrite: bool,
    measurements: tuple[Measurement, ...] = (),
    absent: tuple[str, ...] = (),
    processor: build_record.Processor | None = None,
    calibrated: Mapping[str, int] | None = None,
) -> Built:
    """Write a build, whole or not at all."""
    progress("writing the build")
    manifest = bundle.manifest
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.atomic_folder(
        path,
        overwrite=overwrite,
        check=lambda folder: folders.check_target(folder, build_record.RECORD_FORMAT, overwrite=True),
    ) as folder:
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        if measured:
            (folder / build_record.CERTIFICATE).write_bytes(certificate.encode(measured))
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
            graphs=built,
            engine=engine,
            tools=versions.tools(_TOOLS),
            measurements=measurements,
            absent=absent,
            processor=processor,
            calibrated=dict(calibrated or {}),
            files=folders.list_files(folder),
        )
        (folder / build_record.RECORD_FORMAT.file).write_bytes(build_record.RECORD_FORMAT.encode(record))
    return Built(path, BuildFolder(path).record, measured, unmeasured)


def _whole(sources: Mapping[str, bytes], arrays: Mapping[str, Arrays]) -> dict[str, bytes]:
    """The bundle's graphs with all their weights in them."""
    from vae_export import graph

    return {
        name: graph.write(graph.read(source, arrays[name])) if arrays[name] else source
        for name, source in sources.items()
    }


def _graphs(
    sources: Mapping[str, bytes],
    model: Model,
    reference: golden.Reference,
    calibration: Array,
    more: tail.Tail | str | None,
    options: Options,
    name: str,
    progress: Progress,
    *,
    doubles: bool,
) -> tuple[dict[str, bytes], dict[str, dict[str, int]], dict[str, dict[str, str]], tuple[str, ...], dict[str, int]]:
    """The bundle's graphs after the passes and in a precision, and the fused ones.

    Beside them what changed in each, what was kept in float32, what could not be looked at, and on which rows
    activations were recorded.

    `doubles` says whether the target computes in float64: TensorRT does not.
    """
    from vae_export import graph
    from vae_export.building import mixed_precision as precisions
    from vae_export.graph import edit, fuse, rewrites

    base, changed = {}, {}
    for part, source in sources.items():
        read = graph.read(source)
        changed[part] = {k: n for k, n in rewrites.optimize(read, options.passes or ()).items() if n}
        edit.name_nodes(read)
        base[part] = graph.write(read)
    made, kept = dict(base), {}
    absent: list[str] = []
    rows: dict[str, int] = {}
    if options.precision in ("fp16", "bf16"):
        seen: Mapping[str, Mapping[str, precisions.Activation]] = {}
        judge: _Rounded | None = None
        try:
            if options.precision == "fp16":  # bfloat16 has float32's range
                seen = precisions.record_both(base, model, reference, calibration)
                rows = precisions.calibrated(model, reference, calibration)[1]
            judge = _Rounded(base, model, reference, more, options, name)
        except BackendError as error:  # engines can be built without ONNX Runtime all the same
            absent.append(
                f"{options.precision} was not evaluated on the CPU, and no value is known to overflow: "
                f"{' '.join(str(error).split())}"
            )
        for part in base:
            progress(f"{options.precision}: the {part}, evaluated with every value rounded")
            problem = judge.of(part) if judge else None
            low = precisions.choose(part, base[part], options.precision, seen.get(part, {}), problem)
            if low:
                made[part], kept[part] = low.graph, low.kept
            else:
                assert judge is not None  # nothing else refuses
                absent.append(f"the {part} in {options.precision}: it stays in float32: {judge.reasons[part]}")
        if not kept:
            raise VerificationError(
                f"build: nothing of {name} holds in {options.precision}: {'; '.join(absent)}. Build with "
                "--precision fp32"
            )

    def read_both() -> tuple[onnx_ir.Model, onnx_ir.Model]:
        return graph.read(made["encoder"]), graph.read(made["decoder"])

    fused = {"reconstruct": fuse.reconstruct(*read_both(), model)}
    if doubles and model.has_elbo:
        fused["score"] = fuse.score(*read_both(), model)
    if is_picture(model.data.shape):
        fused["generate"] = fuse.generate(read_both()[1], model)
    return made | {part: graph.write(fusion) for part, fusion in fused.items()}, changed, kept, tuple(absent), rows


class _Rounded:
    """Half precision on behalf of a device that computes in it: judged on the CPU, by arithmetic that rounds."""

    def __init__(
        self,
        base: Mapping[str, bytes],
        model: Model,
        reference: golden.Reference,
        more: tail.Tail | str | None,
        options: Options,
        name: str,
    ) -> None:
        """Prepare inputs.

        Raises:
            BackendError: ONNX Runtime is not installed.
        """
        from vae_export.building import mixed_precision as precisions

        require("onnxruntime", "cpu", "build")
        self._base, self._model, self._options, self._name = base, model, options, name
        self._few, self._more = reference.first(_ROWS), more
        self._large = precisions.large(base, model, reference)
        #: Of each graph what was last out of its budget.
        self.reasons: dict[str, str] = {}

    def of(self, graph: str) -> Callable[[bytes], str | None]:
        """For `precision.choose`: what is out of budget with this graph alone in half precision."""

        def problem(made: bytes) -> str | None:
            found = self._problem(graph, made)
            if found is not None:
                self.reasons[graph] = found
            return found

        return problem

    def _problem(self, graph: str, made: bytes) -> str | None:
        from vae_export.building import mixed_precision as precisions

        rounded = precisions.rounding(made)
        ways = {name: [planned(rounded if name == graph else raw)] for name, raw in self._base.items()}
        backend = CpuBackend(ways, self._model, Settings())
        record = self._few.record
        batches = (min(_BATCH, max(record.examples, record.prior)),)
        try:
            kinds = {name: self._options.tolerance if name == graph else "float32" for name in self._base}
            checks = verifier.measure(self._model, backend, self._few, self._name, kinds, batches=batches).checks
            if isinstance(self._more, tail.Tail) and all(check.passed for check in checks):
                rows = self._few.groups(self._model)[0]
                checks = tuple(verifier.tail_checks(self._model, backend, self._more, kinds, rows))
        except VaeExportError as error:  # what one graph gives is nothing that another takes
            return " ".join(str(error).split())
        finally:
            backend.close()
        wrong = next((check for check in checks if not check.passed), None)
        if wrong:
            return str(wrong)
        return self._large.problem(graph, rounded, self._model) if self._large else None


def _check_options(
    target: Target, everywhere: Mapping[str, bool], engines_only: Mapping[str, bool], sizes: int
) -> None:
    """Refuse what a target has not."""
    no = {"cpu": ("tf32", "nhwc"), "cuda": ("int8", "auto")}.get(target.name, ("int8", "auto", "nhwc"))
    wrong = [name for name, on in everywhere.items() if on and name in no]
    if target.flavour is None:
        wrong += [name for name, on in engines_only.items() if on]
        if sizes > (target.name == "cpu"):
            wrong.append("size")
    if wrong:
        reasons = {
            "int8": "it is measured on the CPU only",
            "auto": "it is measured on the CPU only",
            "tf32": "TF32 is a GPU's",
            "nhwc": "it is ONNX Runtime's on CUDA",
            "size": "the CPU is measured at one size" if target.name == "cpu" else "it takes all sizes",
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
    if problem := compatibility.mismatch(record.engine, driver.this_machine(record.engine.flavour)):
        raise BackendError(f"{path}: {problem}")


def _unmeasurable(target: Target, engine: Engine | None, options: Options, sizes: Mapping[str, int]) -> str | None:
    """Why this machine cannot run the golden examples on the target, in words, or None."""
    if target.device == "cuda" and (problem := driver.query().problem):
        return problem
    if engine is None:
        return None
    if problem := compatibility.mismatch(engine, driver.this_machine(engine.flavour)):
        return problem
    if targets.choose(options.profiles, 1, sizes) is None:
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        return f"the golden examples have {asked}, which is in none of the profiles"
    return None


def _golden_sizes(model: Model, reference: golden.Reference) -> dict[str, int]:
    """The golden examples' sizes of the named dimensions."""
    return model.sizes(reference.tensors["mean"].shape[1:])
