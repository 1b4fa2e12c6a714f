"""ONNX → engine: TensorRT and TensorRT for RTX, one code path."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vae_export.contract import cache
from vae_export.contract.atomic import atomic_file
from vae_export.contract.build_record import Engine, Options
from vae_export.contract.model import Model
from vae_export.contract.targets import Target
from vae_export.errors import BackendError, InputError
from vae_export.runtimes.gpu import driver
from vae_export.runtimes.gpu.flavours import Bindings

#: The lowest compute capability that an RTX engine for all GPUs is built for: Ampere.
_FROM = 8.0
# TensorRT's builders share one logger, from which the reason of a failure is read.
_one_at_a_time = threading.Lock()


def capabilities(bindings: Bindings, target: Target) -> tuple[str, ...]:
    """The compute capabilities that a target's engines are built for.

    TensorRT builds for this machine's GPU. TensorRT for RTX builds for the capability in the target's name, or else for
    all that it knows from 8.0 (Ampere) on: Turing must be named, since RTX has no float32 products for it.

    Raises:
        InputError: TensorRT for RTX does not know the capability.
        BackendError: TensorRT is to build, and this machine has no GPU.
    """
    if target.flavour == "tensorrt":
        system = driver.query()
        if system.problem:
            raise BackendError(
                f"build: {bindings.title} builds on the GPU that the engine is for; this machine has none "
                f"({system.problem}). Build there, or build --target tensorrt-rtx-smNN, which needs none"
            )
        return (system.gpus[0].capability,)
    known = _rtx_capabilities(bindings)
    if target.capability is None:
        return tuple(capability for capability in known if float(capability) >= _FROM)
    if target.capability not in known:
        names = ", ".join(f"sm{capability.replace('.', '')}" for capability in known)
        raise InputError(f"build: {bindings.title} builds for {names}; target is {target.name}")
    return (target.capability,)


def _rtx_capabilities(bindings: Bindings) -> dict[str, Any]:
    """The members of TensorRT's enumeration that are capabilities, by name: `8.9` for SM89."""
    members = bindings.trt.ComputeCapability.__members__.items()
    numbers = {name.removeprefix("SM"): value for name, value in members if name.startswith("SM")}
    return {f"{number[:-1]}.{number[-1]}": numbers[number] for number in sorted(numbers, key=int)}


def record(bindings: Bindings, target: Target) -> Engine:
    """The record of engines that are built now, for `build.json`."""
    system = driver.query()
    return Engine(
        flavour=bindings.flavour,
        version=bindings.version,
        capabilities=capabilities(bindings, target),
        platform=driver.this_platform(),
        gpu=system.gpus[0].name if system.gpus else None,
        driver=f"CUDA {system.cuda}" if system.gpus else None,
    )


def build(
    bindings: Bindings, graphs: Mapping[str, bytes], model: Model, target: Target, options: Options
) -> Iterator[bytes]:
    """Build engines of ONNX graphs one by one, in the order of the graphs, with the profiles and flags of `options`.

    TensorRT takes each value's type from the graphs.

    Raises:
        InputError, BackendError: as `capabilities`; or TensorRT cannot parse or build a graph.
    """
    wanted = capabilities(bindings, target)
    for name, graph in graphs.items():
        with _one_at_a_time:
            bindings.errors()  # drop the messages of earlier builds
            engine = _engine(bindings, name, graph, model, wanted, options)
        yield engine


def _engine(
    bindings: Bindings, name: str, graph: bytes, model: Model, wanted: Sequence[str], options: Options
) -> bytes:
    trt = bindings.trt
    builder = trt.Builder(bindings.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, bindings.logger)
    if not parser.parse(graph):
        raise BackendError(f"build: {bindings.title} cannot parse the {name}: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    for flag, on in ((trt.BuilderFlag.TF32, options.tf32), (trt.BuilderFlag.REFIT, options.refittable)):
        (config.set_flag if on else config.clear_flag)(flag)
    if bindings.flavour == "tensorrt-rtx":
        known = _rtx_capabilities(bindings)
        config.num_compute_capabilities = len(wanted)
        for index, capability in enumerate(wanted):
            config.set_compute_capability(known[capability], index)
    for profile in options.profiles:
        shapes = builder.create_optimization_profile()
        for tensor in model.signature(name)[0]:
            shapes.set_shape(tensor.name, *profile.shapes(tensor, model))
        config.add_optimization_profile(shapes)
    with _timing_cache(bindings, config):
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(_why_not(bindings, name, options, wanted))
    return bytes(engine)


def refit(bindings: Bindings, engines: Mapping[str, bytes], graphs: Mapping[str, bytes]) -> Iterator[bytes]:
    """Put the weights of ONNX graphs into refittable engines of the same structure, in the order of the graphs.

    The engines must be of these bindings' version and for this GPU, and their bytes verified.

    Raises:
        BackendError: TensorRT refuses an engine or its weights.
    """
    trt = bindings.trt
    runtime = trt.Runtime(bindings.logger)
    for name, graph in graphs.items():
        with _one_at_a_time:
            bindings.errors()
            engine = runtime.deserialize_cuda_engine(engines[name])
            if engine is None:
                raise BackendError(f"refit: {bindings.title} does not open the {name}: {bindings.errors()}")
            refitter = trt.Refitter(engine, bindings.logger)
            parser = trt.OnnxParserRefitter(refitter, bindings.logger)
            if not parser.refit_from_bytes(graph):
                raise BackendError(f"refit: {bindings.title} does not read the {name}: {_parser_errors(parser)}")
            if not refitter.refit_cuda_engine():
                raise BackendError(f"refit: {bindings.title} does not take the {name}'s weights: {bindings.errors()}")
            config = engine.create_serialization_config()
            config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
            written = engine.serialize_with_config(config)
            if written is None:
                raise BackendError(f"refit: {bindings.title} does not write the {name}: {bindings.errors()}")
        yield bytes(written)


def _parser_errors(parser: Any) -> str:
    """The errors of an ONNX parser, each with its node."""

    def text(error: Any) -> str:
        node = f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): " if error.node() >= 0 else ""
        return f"{node}{error.desc()}"

    return "; ".join(text(parser.get_error(index)) for index in range(parser.num_errors)) or "it gave no reason"


def _why_not(bindings: Bindings, name: str, options: Options, wanted: Sequence[str]) -> str:
    what = f"build: {bindings.title} does not build the {name} in {options.precision}"
    advice = ""
    if options.refittable and driver.query().problem:
        advice = " A refittable engine needs a GPU where it is built: build there, or without --refittable."
    elif options.precision == "fp32" and any(float(capability) < _FROM for capability in wanted):
        advice = " Turing has no float32 products in TensorRT for RTX: use --precision fp16."
    elif options.precision == "bf16":
        advice = (
            " Transposed convolutions in bf16 are one thing that it cannot build: use --precision fp16 or fp32, or a "
            "model that upsamples and then convolves."
        )
    return f"{what}.{advice} It says: {bindings.errors()}"


@contextlib.contextmanager
def _timing_cache(bindings: Bindings, config: Any) -> Iterator[None]:
    """Keep TensorRT's timing cache in the user's cache: later builds measure less. RTX measures nothing."""
    if bindings.flavour != "tensorrt":
        yield
        return
    path, known = None, b""
    with contextlib.suppress(BackendError, OSError):  # without the file TensorRT measures everything
        path = _timing_file(bindings)
        known = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(known)  # it must live until the engine is built
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):  # damaged, or of another device
        bindings.errors()
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    yield
    content = cache.serialize()
    if path and content is not None:
        with contextlib.suppress(OSError), atomic_file(path) as stage:
            stage.write_bytes(bytes(content))


def _timing_file(bindings: Bindings) -> Path:
    """The file of the timing cache for this GPU, driver and version. Errors as `cache.check_cache`."""
    system = driver.query()
    gpu = system.gpus[0].name if system.gpus else "none"
    key = hashlib.sha256(f"{bindings.version} {system.cuda} {gpu}".encode()).hexdigest()[:32]
    return cache.check_cache() / "timing" / f"{key}.bin"
