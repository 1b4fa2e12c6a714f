"""Runners of the CPU: sessions of ONNX Runtime and OpenVINO."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_export.contract.bundle import Bundle
from vae_export.errors import BackendError, BundleError
from vae_export.runtimes import Settings
from vae_export.runtimes.backend import planned
from vae_export.runtimes.cpu import dispatch, openvino


@pytest.fixture(scope="module")
def bundle(member: Callable[[str], Any]) -> Path:
    path: Path = member("conv-bernoulli").bundle
    return path


def test_out_is_written_in_place_by_every_runner(bundle: Path) -> None:
    opened = Bundle(bundle)
    model, (graphs, _) = opened.manifest.model, opened.graphs()
    z = np.random.default_rng(0).standard_normal((5, *model.latent.shape)).astype(np.float32)
    results = []
    for runner in ("onnxruntime", "openvino"):
        backend = dispatch.CpuBackend({"decoder": [planned(graphs["decoder"], runner)]}, model, Settings())
        out = np.full((5, *model.data.shape), np.nan, np.float32)
        (given,) = backend.run("decoder", {"z": z}, ("sample",), 2, out=[out])
        assert given is out
        results.append(out)
        (fresh,) = backend.run("decoder", {"z": z}, ("sample",), 64)
        assert np.abs(fresh - out).max() < 1e-5
        backend.close()
        with pytest.raises(BackendError, match="this VAE was closed; load the bundle again"):
            backend.run("decoder", {"z": z}, ("sample",), 64)
    assert np.abs(results[0] - results[1]).max() < 1e-5


def test_openvino_from_many_threads(bundle: Path) -> None:
    opened = Bundle(bundle)
    model, (graphs, _) = opened.manifest.model, opened.graphs()
    backend = dispatch.CpuBackend({"decoder": [planned(graphs["decoder"], "openvino")]}, model, Settings())
    inputs = np.random.default_rng(0).standard_normal((8, 3, *model.latent.shape)).astype(np.float32)
    alone = [backend.run("decoder", {"z": z}, ("sample",), 64)[0] for z in inputs]
    together: list[Any] = [None] * 8

    def work(i: int) -> None:
        for _ in range(20):
            together[i] = backend.run("decoder", {"z": inputs[i]}, ("sample", "logits"), 64)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(alone, together, strict=True))


def test_a_request_writes_into_no_result_of_before(bundle: Path) -> None:
    """Asked for one output after two, OpenVINO leaves the other's memory, which the caller has, alone."""
    opened = Bundle(bundle)
    model, (graphs, _) = opened.manifest.model, opened.graphs()
    session = openvino.OpenVinoSession("encoder", graphs["encoder"], model, "fp32", None)
    first, second = np.random.default_rng(0).random((2, 3, *model.data.shape), np.float32)
    _, logvar = session.run(("mean", "logvar"), {"x": first})
    kept = logvar.copy()
    session.run(("mean",), {"x": second})
    np.testing.assert_array_equal(logvar, kept)
    assert np.abs(session.run(("mean", "logvar"), {"x": second})[1] - kept).max() > 0


def test_a_shape_that_is_known_is_compiled_for(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, by the first call that has it, whatever thread that is in; all other shapes run as before."""
    shapes: list[str] = []
    compiled = openvino.compiled

    def counted(core: Any, model: Any, options: Any) -> Any:
        shapes.append(str(model.input().get_partial_shape()))
        return compiled(core, model, options)

    opened = Bundle(bundle)
    model, (graphs, _) = opened.manifest.model, opened.graphs()
    session = openvino.OpenVinoSession("decoder", graphs["decoder"], model, "fp32", None, [{"batch": 4}])
    plain = openvino.OpenVinoSession("decoder", graphs["decoder"], model, "fp32", None)
    monkeypatch.setattr(openvino, "compiled", counted)
    z = np.random.default_rng(0).standard_normal((7, *model.latent.shape)).astype(np.float32)
    for rows in (z[:1], z, z[1:4]):
        session.run(("sample",), {"z": rows})
    assert shapes == []
    found: list[Any] = [None] * 4

    def work(i: int) -> None:
        found[i] = session.run(("sample",), {"z": z[i : i + 4]})[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shapes == [f"[{','.join(map(str, (4, *model.latent.shape)))}]"]
    for i in range(4):
        (expected,) = plain.run(("sample",), {"z": z[i : i + 4]})
        assert np.abs(found[i] - expected).max() <= 1e-5 * np.abs(expected).max()
    out = np.empty_like(found[0])
    assert session.run(("sample",), {"z": z[:4]}, [out])[0] is out
    assert np.abs(out - found[0]).max() <= 1e-6 * np.abs(out).max()


def test_signals_are_handled_after_sessions_were_closed(bundle: Path) -> None:
    """In the order in which they were opened, as an app may."""
    program = f"""
import gc, os, signal
import vae_export
from vae_export.contract.bundle import Bundle
from vae_export.runtimes import Settings
from vae_export.runtimes.cpu.dispatch import CpuBackend
from vae_export.runtimes.backend import planned

opened = Bundle({str(bundle)!r})
graph = opened.graphs()[0]["decoder"]
opens = lambda: CpuBackend({{"decoder": [planned(graph, "openvino")]}}, opened.manifest.model, Settings())
first, second = opens(), opens()
first.close(); gc.collect(); second.close(); gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_openvino_refuses_what_is_not_the_model(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle(bundle)
    model, (graphs, _) = opened.manifest.model, opened.graphs()
    with pytest.raises(BundleError, match=r"decoder: the manifest promises that it takes .* and OpenVINO finds .*'x'"):
        openvino.OpenVinoSession("decoder", graphs["encoder"], model, "fp32", None)
    with pytest.raises(BundleError, match=r"decoder: OpenVINO \S+ does not open it: "):
        openvino.OpenVinoSession("decoder", b"no graph", model, "fp32", None)
    compiled = openvino.compiled
    in_float32 = {"INFERENCE_PRECISION_HINT": "f32"}  # as on a processor without bfloat16
    monkeypatch.setattr(openvino, "compiled", lambda core, read, options: compiled(core, read, options | in_float32))
    with pytest.raises(BackendError, match=r"bf16 was asked for, and OpenVINO \S+ computes in f32 on this processor"):
        openvino.OpenVinoSession("decoder", graphs["decoder"], model, "bf16", None)
