"""Whether a build may run on this machine, and the caveats of its results here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vae_export.contract.build_record import Build, BuildFolder, BuiltGraph, Engine, ExecutionPlan, Processor
from vae_export.contract.targets import title
from vae_export.errors import BackendError


@dataclass(frozen=True)
class Machine:
    """A machine, as far as engines depend on it.

    Attributes:
        platform: as `Engine.platform`.
        flavours: the version of each flavour of TensorRT that can be loaded here, or the reason why not.
        capability: of the GPU that is used, such as `9.0`; None without one.
        gpu: its name, or why there is none.
    """

    platform: str
    flavours: Mapping[str, str | BackendError]
    capability: str | None
    gpu: str


def mismatch(engine: Engine, machine: Machine) -> str | None:
    """The reason why an engine cannot run on a machine, or None.

    To be called before a byte of the engine is deserialized.
    """
    version = machine.flavours.get(engine.flavour)
    if not isinstance(version, str):
        return f"built for {title(engine.flavour)} {engine.version}; this machine has none: {version}"
    if version != engine.version:
        return f"built for {title(engine.flavour)} {engine.version}; this machine has {version}"
    if machine.platform != engine.platform:
        return f"built for {engine.platform}; this machine is {machine.platform}"
    if machine.capability not in engine.capabilities:
        built = ", ".join(engine.capabilities)
        has = f"{machine.capability} ({machine.gpu})" if machine.capability else f"no GPU ({machine.gpu})"
        return f"built for compute capability {built}; this machine has {has}"
    return None


def unfit(record: Build, here: Processor) -> str | None:
    """The reason why a build for the CPU would compute wrong results on a processor, or None.

    To be called before a runner opens a graph: without an instruction that it needs, it may be wrong without an error.
    """
    for name, graph in record.graphs.items():
        for plan in graph.variants:
            if missing := sorted(_required(plan, record) - set(here.features)):
                words = " and ".join(f"{feature} ({_FEATURES.get(feature, 'not known here')})" for feature in missing)
                return f"the {name} computes in {plan.precision} and needs {words}, which {here.model} does not have"
    return None


def refusal(folder: BuildFolder, problem: str, bundle: Path, capability: str | None = None) -> BackendError:
    """The error for a build that cannot be used, with the command that builds it for this GPU's capability."""
    target, options = folder.record.target, folder.record.options
    if target.startswith("tensorrt-rtx") and capability:
        target = f"tensorrt-rtx-sm{capability.replace('.', '')}"
    precision = f" --precision {options.precision}" if options.precision != "fp32" else ""
    return BackendError(
        f"{folder.path}: {problem}. Run: vae-export build {bundle} --target {target}{precision}"
        f"{' --tf32' if options.tf32 else ''}{', or load without it' if target == 'cpu' else ''}"
    )


def inexact(folder: BuildFolder) -> str:
    """The reason why a build is not used for float32."""
    record = folder.record
    if set(record.precisions.values()) != {"fp32"}:
        return f"it computes in {record.in_words()}: precision={record.options.wanted!r} takes it"
    return f"{_UNMEASURED}; build={str(folder.path)!r} takes it"


def notes(record: Build, here: Processor) -> tuple[str, ...]:
    """The caveats of a build's results on this processor."""
    caveats = [note] if (note := elsewhere(record, here)) else []
    if not record.measured:
        caveats.append(_UNMEASURED)
    several = sorted(name for name, graph in record.graphs.items() if _kernels(graph) > 1)
    if several or len(record.options.profiles) > 1:
        caveats.append(
            f"{', '.join(several or record.graphs)}: other batches run other kernels. Noise and latents of the prior "
            "are the same bits at every batch, and what is computed of them is the same to rounding"
        )
    return tuple(caveats)


def elsewhere(record: Build, here: Processor) -> str | None:
    """The consequences of a measurement on another processor, for a build for the CPU; None for the same one."""
    there = record.processor
    if there is None or there == here:
        return None
    if (there.model, there.architecture, there.features) == (here.model, here.architecture, here.features):
        return f"measured with {_cores(there)}, and here are {_cores(here)}: another choice may be faster"
    return (
        f"measured on {there}, and this is {here}: its graphs are right here, too, but its certificate is from there "
        "(vae-export verify --build measures it here), and another choice may be faster (vae-export build makes it)"
    )


def _cores(has: Processor) -> str:
    return f"{has.cores} core{'s' * (has.cores > 1)}, {has.threads} thread{'s' * (has.threads > 1)}"


def _kernels(graph: BuiltGraph) -> int:
    """In how many ways a graph runs, depending on the batch."""
    return sum(1 + len(plan.exact) for plan in graph.variants)


def _required(plan: ExecutionPlan, record: Build) -> set[str]:
    """The features that a plan needs; records without a processor do not list them, and have 8-bit weights."""
    required = set(plan.requires)
    if record.processor is None and plan.precision == "int8":
        required.add("vnni")
    return required | ({"bf16"} if plan.precision == "bf16" else set())


_FEATURES = {"vnni": "sums of 8-bit products that do not overflow", "bf16": "products of bfloat16"}
_UNMEASURED = "it was made where it could not run, and never measured: vae-export verify --build measures it here"
