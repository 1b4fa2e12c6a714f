"""A VAE among processes, threads and signals: fork, pickle, allowed cores, one budget for all, Ctrl-C."""

from __future__ import annotations

import contextlib
import multiprocessing
import operator
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo

import vae_export
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import Cost
from vae_export.errors import BackendError, BundleError, InputError
from vae_export.runtimes import VAE, forks, interrupts, open_bundle, threads
from vae_export.runtimes.backend import Settings, planned
from vae_export.runtimes.cpu import dispatch
from vae_export.runtimes.cpu.dispatch import CpuBackend
from vae_export.runtimes.memory import Budget
from vae_export.sources import cost


class Slow(list[str]):
    """Names of outputs that block the call which reads them, until they are released."""

    def __init__(self, *names: str) -> None:
        super().__init__(names)
        self.read, self.released = threading.Event(), threading.Event()

    def __getitem__(self, index: Any) -> Any:
        self.read.set()
        self.released.wait()
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        return (self[index] for index in range(len(self)))


@contextlib.contextmanager
def _call_under_way(backend: CpuBackend, inputs: dict[str, np.ndarray]) -> Iterator[None]:
    """A call of the decoder in another thread, for as long as the block takes."""
    outputs = Slow("sample")
    thread = threading.Thread(target=backend.run, args=("decoder", inputs, outputs, 64))
    thread.start()
    assert outputs.read.wait(20)
    try:
        yield
    finally:
        outputs.released.set()
        thread.join()


def _in_child(work: Callable[[], str]) -> str:
    """The result of work in a forked child; it has 20 seconds."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(20)
            os.write(write, work().encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        result = pipe.read()
    os.waitpid(pid, 0)
    return result


def _opened(bundle: Path, runner: str) -> CpuBackend:
    opened = Bundle(bundle)
    plans = {name: [planned(graph, runner=runner)] for name, graph in opened.graphs()[0].items()}
    return CpuBackend(plans, opened.manifest.model, Settings(threads=2))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_after_a_fork(member: Callable[[str], Any]) -> None:
    made = member("mlp-bernoulli")
    z = np.ones((3, 5), np.float32)

    def call(backend: CpuBackend) -> str:
        try:
            return str(backend.run("decoder", {"z": z}, ["sample"], 64)[0].tolist())
        except BackendError as error:
            return str(error)

    onnxruntime, openvino = (_opened(made.bundle, runner) for runner in ("onnxruntime", "openvino"))
    assert _in_child(lambda: call(onnxruntime)) == call(onnxruntime)
    assert "before os.fork, and openvino has no threads in a child" in _in_child(lambda: call(openvino))
    assert "Load the bundle again in the child" in _in_child(lambda: call(openvino))
    assert call(openvino).startswith("[[")  # the parent's goes on
    with _call_under_way(onnxruntime, {"z": z}):
        assert "onnxruntime was computing at that moment" in _in_child(lambda: call(onnxruntime))
        expected = call(onnxruntime)
        assert _in_child(lambda: call(_opened(made.bundle, "onnxruntime"))) == expected  # with memory of its own
    assert call(onnxruntime) == expected
    assert forks.count == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_after_a_fork_with_a_shared_arena(member: Callable[[str], Any]) -> None:
    """Calls of the child itself are no reason to refuse one; a call of the parent is, for sessions with its memory."""
    made = member("spatial-named")
    backend = _opened(made.bundle, "onnxruntime")
    inputs = {"z": np.ones((2, 4, 3, 5), np.float32)}

    def call(backend: CpuBackend) -> str:
        try:
            return str(backend.run("decoder", inputs, ["sample"], 64)[0].tolist())
        except BackendError as error:
            return str(error)

    def busy_child() -> str:
        call(backend)
        with _call_under_way(backend, inputs):
            return call(_opened(made.bundle, "onnxruntime"))

    expected = call(backend)
    assert _in_child(lambda: call(backend)) == expected
    assert _in_child(busy_child) == expected
    with _call_under_way(backend, inputs):
        assert "onnxruntime was computing at that moment" in _in_child(lambda: call(backend))
        assert _in_child(lambda: call(_opened(made.bundle, "onnxruntime"))) == expected
    backend.release_memory()
    assert call(backend) == expected


def test_pickled_by_path(member: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = member("mlp-bernoulli")
    monkeypatch.chdir(made.bundle.parent)
    with vae_export.load(made.bundle.name, device="cpu", micro_batch=2, threads=1) as vae:
        monkeypatch.chdir(tmp_path)
        expected, stored = vae.sample(3, 4), pickle.dumps(vae)
        with pickle.loads(stored) as again:
            assert again.describe() == vae.describe()
            np.testing.assert_array_equal(again.sample(3, 4), expected)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            np.testing.assert_array_equal(pool.apply(operator.methodcaller("sample", 3, 4), (vae,)), expected)
        by_hand = VAE(vae.model, open_bundle(Bundle(made.bundle)).backend)
        with pytest.raises(InputError, match="a VAE that load did not make has no path to be opened again by"):
            pickle.dumps(by_hand)
    function, (asked, digest) = vae.__reduce__()
    with pytest.raises(BundleError, match=r"was pickled when manifest 0{12}… was there, and now there is"):
        function(asked, "0" * len(digest))


def test_threads_are_those_allowed(
    member: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert threads.quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads.quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert threads.quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert threads.quota(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    assert threads.quota(tmp_path) == 0.5
    assert threads.cores(tmp_path) == 1  # half a processor needs one thread
    monkeypatch.setattr(dispatch, "cores", lambda: 1)
    with vae_export.load(member("mlp-bernoulli").bundle, device="cpu") as vae:
        assert vae.describe()["threads"] == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are not bound to processors here")
def test_threads_of_a_bound_process(member: Callable[[str], Any]) -> None:
    program = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import numpy as np, vae_export\n"
        "vae = vae_export.load(sys.argv[1], device='cpu'); vae.sample(2)\n"
        "print(vae.describe()['threads'])"
    )
    command = [sys.executable, "-c", program, str(member("mlp-bernoulli").bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("1", "")


def test_a_budget_is_shared(member: Callable[[str], Any]) -> None:
    """Of calls that each need more than half, one runs at a time; small ones run beside each other."""
    model = member("mlp-bernoulli").source.model
    flat = Cost(multiply_adds=(0.0, 0.0, 0.0), activations=(40.0, 0.0, 0.0))  # 60 bytes with the factor for safety
    budget = Budget(100, model, {"encoder": flat, "decoder": flat})
    order: list[str] = []

    def call() -> None:
        with budget.held("decoder", {}, 1):
            order.append("second")

    with budget.held("decoder", {}, 1):
        waiting = threading.Thread(target=call)
        waiting.start()
        time.sleep(0.05)
        order.append("first")
    waiting.join(5)
    assert order == ["first", "second"]
    wide = Budget(120, model, {"encoder": flat, "decoder": flat})
    with wide.held("decoder", {}, 1), wide.held("encoder", {}, 1):
        assert wide.free == 0
    with wide.held("decoder", {}, 1000):  # more than there is counts as all
        assert wide.free == 0
    assert wide.free == wide.limit


def test_a_view_of_weights_costs_nothing() -> None:
    """784-400-20: what is held at once is the input's and the layers' values, not the weights (1.3 MB)."""
    source = zoo.trainer_model("mlp", "bernoulli", shape=(1, 28, 28), latent=20, widths=(400,))
    counted = cost.count(source)
    for graph in ("encoder", "decoder"):
        held = counted[graph].at({})[1]
        assert 4 * 400 <= held <= 4 * 4 * 784


@pytest.mark.parametrize("name", ["conv-gaussian", "linear", "plain"])
def test_data_of_another_scale_is_refused(member: Callable[[str], Any], name: str) -> None:
    made = member(name)
    low, high = made.source.model.data.range
    x = (zoo.pictures(3, made.source.example_shape) * (high - low) + low).astype(np.float32)
    with vae_export.load(made.bundle, device="cpu") as vae:
        vae.encode(x)
        vae.encode(x + np.float32((high - low) * 0.05))  # resampling goes beyond the range, too
        for wrong in (x * 255, x - np.float32(2 * (high - low))):
            with pytest.raises(InputError, match=r"encode: x\[.*; expected values in the data's range .*check_range=F"):
                vae.encode(wrong)
        with pytest.raises(InputError, match="expected finite values"):
            vae.reconstruct(np.where(x == x.max(), np.float32(np.nan), x))
    with vae_export.load(made.bundle, device="cpu", check_range=False) as vae:
        vae.encode(x * 255)
        with pytest.raises(InputError, match="expected finite values"):
            vae.encode(np.full_like(x, np.inf))


_LONG = """
import signal, sys, time, numpy as np, onnx
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background may have it ignored
from onnx import TensorProto as T, helper as h, numpy_helper
from vae_export.contract.model import Data, Latent, Likelihood, Model, Posterior
from vae_export.runtimes.backend import Settings, planned
from vae_export.runtimes.cpu.dispatch import CpuBackend
side, count = 1024, 4000
names = ["x", *(f"v{i}" for i in range(1, count)), "mean"]
nodes = [h.make_node("MatMul", [names[i], "w"], [names[i + 1]]) for i in range(count)]
values = [h.make_tensor_value_info(name, T.FLOAT, ["batch", side]) for name in ("x", "mean")]
weights = numpy_helper.from_array(np.eye(side, dtype=np.float32), "w")
graph = h.make_graph(nodes, "long", values[:1], values[1:], [weights])
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9)
described = Model(architecture="long", parameters=1, data=Data(shape=(side,), range=(0.0, 1.0)),
                  latent=Latent(shape=(side,)), prior="standard_normal", posterior=Posterior(kind="deterministic"),
                  likelihood=Likelihood(kind="none"))
plans = {"encoder": [planned(model.SerializeToString(), runner=sys.argv[1])]}
backend = CpuBackend(plans, described, Settings(threads=1))
print("begun", flush=True)
try:
    backend.run("encoder", {"x": np.ones((1024, side), np.float32)}, ["mean"], 4096)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("runner", ["onnxruntime", "openvino"])
def test_ctrl_c_ends_a_call(runner: str) -> None:
    """4,000 products of 1024 × 1024, which take a minute or more; the signal comes within the first second of them."""
    command = [sys.executable, "-c", _LONG, runner]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        began = time.perf_counter()
        assert process.stdout.readline() == "interrupted\n", process.stderr.read()
        process.wait(20)
        assert time.perf_counter() - began < 10


def test_a_call_as_large_as_a_fast_one_needs_no_thread() -> None:
    calls = interrupts.LongCalls()
    assert calls.fast_bytes == -1
    assert calls.run(16, threading.get_ident, lambda: None) != threading.get_ident()
    assert calls.fast_bytes == 16
    calls.run(8, lambda: None, lambda: None)
    assert calls.fast_bytes == 16
    threads_of_calls: list[int] = []
    other = threading.Thread(target=lambda: threads_of_calls.append(calls.run(20, threading.get_ident, lambda: None)))
    other.start()
    other.join()
    assert threads_of_calls == [other.ident]  # signals are handled in the main thread alone
    slow = interrupts.LongCalls()
    slow.run(16, lambda: time.sleep(0.06), lambda: None)
    assert slow.fast_bytes == -1
    with pytest.raises(ZeroDivisionError):
        calls.run(32, lambda: 1 // 0, lambda: None)
    assert calls.fast_bytes == 20
