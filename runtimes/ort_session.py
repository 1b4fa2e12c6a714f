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
    """ONNX Runtime, with the execution provider of a device.

    Raises:
        BackendError: it is not installed, or has no such provider.
    """
    ort = require("onnxruntime", EXTRAS[device], "load")
    if PROVIDERS[device] not in ort.get_available_providers():
        raise BackendError(
            f"load: device {device!r} needs ONNX Runtime's {PROVIDERS[device]}; the installed onnxruntime "
            f"{ort.__version__} has {', '.join(ort.get_available_providers())}. Run: pip uninstall "
            f"onnxruntime; pip install 'vae-export[{EXTRAS[device]}]'"
        )
    return ort


def session_options(ort: ModuleType, arrays: Arrays, threads: int | None = None) -> Any:
    """Options for a session on ONNX bytes, with `threads` inside one call; None leaves them to ONNX Runtime.

    The memory of `arrays`, the weights beside the graph, must outlive the session. Unless they are `foldable`, constant
    subgraphs are computed in each call and not, at an unknown cost, while the session is opened.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # a failed call raises; its log lines help no user
    if threads is not None:
        settings.intra_op_num_threads = threads
    # ONNX Runtime would also accept its own format, whose operators are not checked here.
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
    """A session on a device and on no other; its memory comes from `memory`, or from an arena of its own.

    Raises:
        BundleError, BackendError: ONNX Runtime refuses the graph, or its inputs and outputs are not the model's.
    """
    settings = session_options(ort, arrays, threads)
    if memory:
        memory.use(settings)
    # ONNX Runtime keeps a memory plan for each shape that it meets: useful for few shapes.
    settings.enable_mem_pattern = not model.data.named()
    provider = PROVIDERS[device]
    try:
        session = ort.InferenceSession(graph, settings, providers=[(provider, dict(options))], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's have no common base
        kind = BundleError if device == "cpu" else BackendError  # on a GPU the reason need not be the graph
        raise kind(f"{name}: ONNX Runtime {ort.__version__} does not open it on {device}: {words(error)}") from None
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"load: {provider} was asked for, and ONNX Runtime opened {session.get_providers()[0]} "
            "instead. `vae-export doctor` shows what is missing"
        )
    inputs, outputs = model.signature(name)
    actual = [(t.name, t.type, tuple(t.shape)) for t in (*session.get_inputs(), *session.get_outputs())]
    promised = [(t.name, _TYPES[t.dtype], t.shape) for t in (*inputs, *outputs)]
    if actual != promised:
        raise BundleError(
            f"{name}: the manifest promises {promised}, and the graph has {actual}. The bundle contradicts itself: "
            "export the model again"
        )
    return session
