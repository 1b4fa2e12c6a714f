"""ONNX Runtime, on the CPU or on a CUDA device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vae_export.errors import BackendError, BundleError, require
from vae_export.manifest import Graph

from .backend import Array

_PROVIDERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": 0}),  # TF32 keeps 10 of float32's 23 mantissa bits
}
_EXTRAS = {"cpu": "cpu", "cuda": "gpu"}


class OrtBackend:
    """One session for each graph. Sessions are safe to run from many threads."""

    def __init__(
        self,
        graphs: Mapping[str, bytes],
        records: Mapping[str, Graph],
        *,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        """Open graphs.

        Args:
            graphs: serialized ONNX models by name. Their bytes were verified; no path is ever opened.
            records: what the manifest says of them.
            device: `cpu` or `cuda`.
            threads: threads inside one call; None leaves it to ONNX Runtime (one for each core).

        Raises:
            BackendError: ONNX Runtime or the device is not available.
            BundleError: ONNX Runtime does not accept a graph, or finds another than the manifest says.
        """
        ort = require("onnxruntime", _EXTRAS[device], "load")
        provider, options = _PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise BackendError(
                f"load: device {device!r} needs ONNX Runtime's {provider}; the installed onnxruntime "
                f"{ort.__version__} has {', '.join(ort.get_available_providers())}. Run: pip uninstall "
                f"onnxruntime; pip install 'vae-export[{_EXTRAS[device]}]'"
            )
        if device == "cuda":
            ort.preload_dlls()
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        # Bytes of its own format would be taken for what they are: unchecked by us.
        settings.add_session_config_entry("session.load_model_format", "ONNX")
        if threads is not None:
            settings.intra_op_num_threads = threads
        self._device = device
        self._provider = provider
        self._version = ort.__version__
        self._threads = threads
        self._sessions = {}
        for name, model in graphs.items():
            try:
                session = ort.InferenceSession(model, settings, providers=[(provider, options)])
            except Exception as error:
                kind = BundleError if device == "cpu" else BackendError  # a device has reasons of its own
                raise kind(f"{name}: ONNX Runtime {ort.__version__} does not open it on {device}: {error}") from None
            if session.get_providers()[0] != provider:
                raise BackendError(
                    f"load: {provider} was asked for, and ONNX Runtime opened {session.get_providers()[0]} "
                    "instead. `vae-export doctor` shows what is missing"
                )
            _check_signature(name, session, records[name])
            self._sessions[name] = session

    def run(self, graph: str, inputs: dict[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run a graph; see `Backend.run`."""
        try:
            result: list[Array] = self._sessions[graph].run(outputs, inputs)
        except KeyError:
            raise BackendError("this VAE was closed; load the bundle again") from None
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BackendError(f"ONNX Runtime {self._version} failed in the {graph}: {error}") from error
        return result

    def describe(self) -> dict[str, Any]:
        """What the graphs run on."""
        return {
            "backend": "onnxruntime",
            "version": self._version,
            "device": self._device,
            "provider": self._provider,
            "threads": self._threads or "one for each core",
        }

    def close(self) -> None:
        """Drop the sessions."""
        self._sessions = {}


def _check_signature(name: str, session: Any, record: Graph) -> None:
    found, said = (
        [(t.name, t.type, tuple(t.shape)) for t in (*session.get_inputs(), *session.get_outputs())],
        [(t.name, "tensor(float)", t.shape) for t in (*record.inputs, *record.outputs)],
    )
    if found != said:
        raise BundleError(
            f"{name}: the manifest promises {said}, and the graph has {found}. The bundle contradicts itself: "
            "export the model again"
        )
