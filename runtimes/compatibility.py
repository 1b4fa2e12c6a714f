"""Whether a build may run on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vae_export.contract.build_record import Build, Engine, ExecutionPlan, Processor
from vae_export.contract.targets import _TITLES
from vae_export.errors import BackendError


@dataclass(frozen=True)
class Machine:
    """What a build is compared with.

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
    """What keeps an engine from running on a machine, in words, or None.

    It is asked before a byte of the engine is deserialized.
    """
    version = machine.flavours.get(engine.flavour)
    if not isinstance(version, str):
        return f"built for {_TITLES[engine.flavour]} {engine.version}; this machine has none: {version}"
    if version != engine.version:
        return f"built for {_TITLES[engine.flavour]} {engine.version}; this machine has {version}"
    if machine.platform != engine.platform:
        return f"built for {engine.platform}; this machine is {machine.platform}"
    if machine.capability not in engine.capabilities:
        built = ", ".join(engine.capabilities)
        has = f"{machine.capability} ({machine.gpu})" if machine.capability else f"no GPU ({machine.gpu})"
        return f"built for compute capability {built}; this machine has {has}"
    return None


def unfit(record: Build, here: Processor) -> str | None:
    """What keeps a build for the CPU from being right on a processor, in words, or None.

    It is asked before a runner opens a graph: what runs without the instruction may be wrong without any error.
    """
    for name, graph in record.graphs.items():
        for variant in graph.variants:
            if missing := sorted(_required(variant, record) - set(here.features)):
                words = " and ".join(f"{feature} ({_FEATURES.get(feature, 'not known here')})" for feature in missing)
                return f"the {name} computes in {variant.precision} and needs {words}, which {here.model} does not have"
    return None


def elsewhere(record: Build, here: Processor) -> str | None:
    """For a build for the CPU that was measured on another processor: what that means here, in words."""
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


def _required(variant: ExecutionPlan, record: Build) -> set[str]:
    """What a variant needs; builds that do not know their processor do not say it, and have 8-bit weights."""
    required = set(variant.requires)
    if record.processor is None and variant.precision == "int8":
        required.add("vnni")
    return required | ({"bf16"} if variant.precision == "bf16" else set())


_FEATURES = {"vnni": "sums of 8-bit products that do not overflow", "bf16": "products of bfloat16"}
