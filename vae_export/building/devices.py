"""Builds for a GPU: graphs in their precision, engines of TensorRT, and a certificate where the GPU is here.

Why such a build was refused: a graph does not pass in its precision (`building.evaluation`, on the CPU), TensorRT does
not build it (`building.tensorrt`), or the certificate fails on the GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import msgspec

from vae_export.building import contents, mixed_precision, tensorrt
from vae_export.building.contents import Artifacts, Contents
from vae_export.building.evaluation import Evaluator, one_line
from vae_export.building.mixed_precision import ReducedPrecision
from vae_export.certification import verifier
from vae_export.contract import targets
from vae_export.contract.build_record import BuildFolder, BuiltGraph, Engine, Options
from vae_export.contract.choices import Precision
from vae_export.contract.model import GRAPHS
from vae_export.contract.targets import Target
from vae_export.errors import BackendError, InputError, VerificationError, require
from vae_export.progress import Progress
from vae_export.runtimes import Settings, compatibility, open_backend
from vae_export.runtimes.gpu import driver, flavours
from vae_export.runtimes.gpu.flavours import Bindings

#: Golden examples on which half precision is evaluated on the CPU.
_ROWS = 24


def build(
    inputs: Contents, target: Target, options: Options, progress: Progress, old: BuildFolder | None = None
) -> Artifacts:
    """Make graphs or engines for a GPU, and their certificate where this machine can run them.

    With a refittable build, its engines get the bundle's weights.

    Raises:
        InputError, BackendError: as `tensorrt.build` and `tensorrt.refit`; or the old build is of another architecture.
        VerificationError: nothing passes in the precision, or the certificate fails.
    """
    from vae_export.graph import fingerprint

    bindings = flavours.load(target.flavour) if target.flavour else None
    model, reference = inputs.model, inputs.reference
    base, passes = inputs.simplified(options.passes or ())
    evaluator = Evaluator(inputs, base, _ROWS, None, progress)
    more = None if options.tolerance == "float32" else evaluator.tail()
    progress(f"graphs in {options.precision}")
    reduced: dict[str, ReducedPrecision] = {}
    absent: list[str] = []
    if options.precision in ("fp16", "bf16"):
        reduced, absent = _reduced(inputs.name, base, options.precision, evaluator)
    graphs = base | {part: each.graph for part, each in reduced.items()}
    # TensorRT has no float64, in which `score` adds up.
    graphs |= contents.fused(graphs["encoder"], graphs["decoder"], model, ("score",) if bindings else ())
    structures = {name: fingerprint.digest(content) for name, content in graphs.items()}
    files, engine = graphs, None
    if bindings:
        engine = tensorrt.record(bindings, target)
        if old:
            steps = _refitted(bindings, old, graphs, structures)
        else:
            steps = tensorrt.build(bindings, graphs, model, target, options)
        files = {}
        for name in graphs:
            progress(f"{'refitting' if old else 'building'} the {name}")
            files[name] = next(steps)
    measured = None
    unmeasured = _unmeasurable(target, engine, options, model.sizes(reference.tensors["mean"].shape[1:]))
    if not unmeasured:
        progress("measuring the certificate")
        backend = open_backend(files, model, device=target.device, options=options, engine=engine, settings=Settings())
        try:
            full = msgspec.structs.replace(options, precision="fp32").tolerance
            kinds = {part: options.tolerance if part in reduced else full for part in GRAPHS}
            measured = verifier.measure(model, backend, reference, inputs.name, kinds, more=more)
        finally:
            backend.close()
        measured.require()
    suffix = "engine" if engine else "onnx"
    return Artifacts(
        files={f"{name}.{suffix}": content for name, content in files.items()},
        graphs={
            name: BuiltGraph(
                file=f"{name}.{suffix}",
                onnx_sha256=hashlib.sha256(content).hexdigest(),
                structure=structures[name],
                passes={k: count for k, count in passes.get(name, {}).items() if count},
                kept=reduced[name].kept if name in reduced else {},
            )
            for name, content in graphs.items()
        },
        certificate=measured,
        unmeasured=unmeasured,
        engine=engine,
        absent=tuple(absent),
        calibrated=evaluator.calibrated,
    )


def _reduced(
    name: str, base: Mapping[str, bytes], precision: Precision, evaluator: Evaluator
) -> tuple[dict[str, ReducedPrecision], list[str]]:
    """Encoder and decoder in half precision, each as far as it passes on the CPU with every value rounded."""
    try:
        require("onnxruntime", "cpu", "build")
        reduced, absent = evaluator.reduce(precision)
    except BackendError as error:  # engines can be built without ONNX Runtime
        why = f"was not evaluated on the CPU, and no value is known to overflow: {one_line(error)}"
        unevaluated = {
            part: mixed_precision.choose(part, content, precision, {}, None) for part, content in base.items()
        }
        return {part: each for part, each in unevaluated.items() if not isinstance(each, str)}, [f"{precision} {why}"]
    if not reduced:
        raise VerificationError(
            f"build: nothing of {name} passes in {precision}: {'; '.join(absent)}. Build with --precision fp32"
        )
    return reduced, absent


def _refitted(
    bindings: Bindings, old: BuildFolder, graphs: Mapping[str, bytes], structures: Mapping[str, str]
) -> Iterator[bytes]:
    differ = [name for name, built in old.record.graphs.items() if structures.get(name) != built.structure]
    if differ:
        raise InputError(
            f"refit: {old.path} is of another architecture: its {' and '.join(differ)} differ in more than weights "
            "from this bundle's. Build anew"
        )
    assert old.record.engine is not None
    if problem := compatibility.mismatch(old.record.engine, driver.this_machine(old.record.engine.flavour)):
        raise BackendError(f"{old.path}: {problem}")
    return tensorrt.refit(bindings, old.graphs(), graphs)


def _unmeasurable(target: Target, engine: Engine | None, options: Options, sizes: Mapping[str, int]) -> str | None:
    """Why this machine cannot run the golden examples on the target, in words, or None."""
    if target.device == "cuda" and (problem := driver.query().problem):
        return problem
    if engine is None:
        return None
    if problem := compatibility.mismatch(engine, driver.this_machine(engine.flavour)):
        return problem
    if targets.choose(options.profiles, 1, sizes) is None:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        return f"the golden examples have {shown}, which is in none of the profiles"
    return None
