"""Sessions of ONNX Runtime on verified bytes, for the CPU and for CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from vae_export.contract.model import Model
from vae_export.contract.onnx_guard import Arrays
from vae_export.errors import BackendError, BundleError, require
from vae_export.runtimes.cpu import arena
from vae_export.runtimes.failures import words

EXTRAS = {"cpu": "cpu", "cuda": "gpu"}


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


_TYPES = {"float32": "tensor(float)", "uint8": "tensor(uint8)", "float64": "tensor(double)"}


def runtime(device: str) -> ModuleType:
    """ONNX Runtime, if it has the provider of a device."""
    ort = require("onnxruntime", EXTRAS[device], "load")
    if PROVIDERS[device] not in ort.get_available_providers():
        raise BackendError(
            f"load: device {device!r} needs ONNX Runtime's {PROVIDERS[device]}; the installed onnxruntime "
            f"{ort.__version__} has {', '.join(ort.get_available_providers())}. Run: pip uninstall "
            f"onnxruntime; pip install 'vae-export[{EXTRAS[device]}]'"
        )
    return ort


def session_options(ort: ModuleType, arrays: Arrays, threads: int | None = None) -> Any:
    """Settings for a session on ONNX bytes whose weights, as far as they lie beside the graph, are these arrays.

    Their memory must outlive the session. `threads` are those inside one call; None leaves it to ONNX Runtime. What
    a graph makes of constants alone is computed with each call, not while it is opened, where it was not told how
    much that is.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # a failed call raises: what it logs beside that is for no user
    if threads is not None:
        settings.intra_op_num_threads = threads
    # Bytes of its own format would be taken for what they are: unchecked by us.
    settings.add_session_config_entry("session.load_model_format", "ONNX")
    if not arrays.foldable:
        settings.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    if arrays:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
        settings.add_external_initializers(list(arrays), values)
    return settings


def open_session(
    ort: ModuleType,
    name: str,
    graph: bytes,
    model: Model,
    device: str,
    options: Mapping[str, Any],
    arrays: Arrays,
    threads: int | None = None,
    memory: arena.Arena | None = None,
) -> Any:
    """A session on a device and on no other, with memory from an arena, or from one of its own."""
    settings = session_options(ort, arrays, threads)
    if memory:
        memory.use(settings)
    # A plan for each shape that was seen, each with memory of its own, is for shapes that stay.
    settings.enable_mem_pattern = not model.data.named()
    provider = PROVIDERS[device]
    try:
        session = ort.InferenceSession(graph, settings, providers=[(provider, dict(options))], enable_fallback=0)
    except Exception as error:
        kind = BundleError if device == "cpu" else BackendError  # a device has reasons of its own
        raise kind(f"{name}: ONNX Runtime {ort.__version__} does not open it on {device}: {words(error)}") from None
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"load: {provider} was asked for, and ONNX Runtime opened {session.get_providers()[0]} "
            "instead. `vae-export doctor` shows what is missing"
        )
    inputs, outputs = model.signature(name)
    found, said = (
        [(t.name, t.type, tuple(t.shape)) for t in (*session.get_inputs(), *session.get_outputs())],
        [(t.name, _TYPES[t.dtype], t.shape) for t in (*inputs, *outputs)],
    )
    if found != said:
        raise BundleError(
            f"{name}: the manifest promises {said}, and the graph has {found}. The bundle contradicts itself: "
            "export the model again"
        )
    return session
