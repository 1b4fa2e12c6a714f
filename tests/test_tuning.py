"""Builds for the CPU: what is measured, what is chosen, and that it computes the same at every batch."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vae_export
from vae_export import graph, timing
from vae_export.building.cpu import search
from vae_export.certification import golden
from vae_export.certification.certificate import Certificate, Check
from vae_export.commands import tables
from vae_export.contract import build_record
from vae_export.contract.build_record import BuildFolder, Options
from vae_export.contract.bundle import Bundle
from vae_export.errors import BackendError, BundleError, InputError, VerificationError
from vae_export.graph import rewrites
from vae_export.runtimes import Settings, processor
from vae_export.runtimes.backend import planned
from vae_export.runtimes.cpu import dispatch, openvino

BATCHES = (1, 3, 8, 9, 64, 65)


@pytest.fixture(scope="module")
def bundle(member: Callable[[str], Any]) -> Path:
    path: Path = member("conv-bernoulli").bundle
    return path


@pytest.fixture(scope="module")
def built(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Builds of the same bundle by precision."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        # Whether 8 bits are faster than float32 is a matter of the processor: here they are built in any case.
        patch.setattr(search, "beyond_half", lambda checks, graph: None)
        return {
            precision: vae_export.build(bundle, "cpu", precision=precision, out=folder / precision)
            for precision in ("fp32", "auto", "int8")
        }


def test_every_candidate_has_a_verdict_and_one_is_chosen(built: dict[str, Any]) -> None:
    for made in built.values():
        places: dict[tuple[str, int], list[str]] = {}
        for row in made.record.measurements:
            places.setdefault((row.graph, row.batch), []).append(row.verdict)
            assert row.median_us is None or row.median_us > 0
        assert {graph for graph, _ in places} == {"encoder", "decoder", "generate", "reconstruct", "score"}
        for verdicts in places.values():
            assert verdicts.count("chosen") == 1
            known = ("its first 3 calls took", "times as fast as float32", " is in fp32", " is in int8", " is in bf16")
            for v in verdicts:
                assert v in ("chosen", "slower", "the only one") or any(words in v for words in known), v
    runners = {row.runner for row in built["fp32"].record.measurements}
    assert runners == {"onnxruntime", "openvino"}
    kinds = {row.precision for row in built["auto"].record.measurements}
    assert {"fp32", "int8"} <= kinds <= {"fp32", "bf16", "int8"}


def test_variants_cover_all_batches_in_one_precision(built: dict[str, Any]) -> None:
    for made in built.values():
        for found in made.record.graphs.values():
            assert found.variants[-1].max_batch is None
            assert found.file == found.variants[-1].file
            assert len({variant.precision for variant in found.variants}) == 1
        assert made.certificate.passed
    assert {v.precision for v in built["int8"].record.graphs["encoder"].variants} == {"int8"}


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-5), ("int8", 0.05), ("auto", 0.05)])
def test_it_gives_what_the_bundle_gives(bundle: Path, built: dict[str, Any], precision: str, allowed: float) -> None:
    with vae_export.load(bundle, device="cpu") as plain, vae_export.load(bundle, build=built[precision].path) as vae:
        for n in BATCHES:
            got, expected = vae.sample(n, seed=3), plain.sample(n, seed=3)
            assert np.sqrt(np.mean((got - expected) ** 2)) <= allowed * np.abs(expected).max()
            x = np.clip(expected, 0, 1)
            scale = np.abs(plain.encode(x).mean).max()
            assert np.abs(vae.encode(x).mean - plain.encode(x).mean).max() <= 2 * allowed * scale
            assert np.abs(vae.elbo(x).elbo - plain.elbo(x).elbo).max() <= max(allowed, 1e-3) * 1e3
        shown = vae.describe()
        assert shown["precision"] == built[precision].record.in_words()
        assert (shown["precision"] == "float32") == built[precision].record.exact
        assert precision != "int8" or "int8" in shown["precision"]
        assert set(shown["backend"].split(", ")) <= {"onnxruntime", "openvino"}


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


def test_a_shape_that_is_known_is_compiled_for(bundle: Path) -> None:
    """Once, by the first call that has it, whatever thread that is in; all other shapes run as before."""
    opened = Bundle(bundle)
    model, (graphs, _) = opened.manifest.model, opened.graphs()
    session = openvino.OpenVinoSession("decoder", graphs["decoder"], model, "fp32", None, [{"batch": 4}])
    plain = openvino.OpenVinoSession("decoder", graphs["decoder"], model, "fp32", None)
    z = np.random.default_rng(0).standard_normal((7, *model.latent.shape)).astype(np.float32)
    for rows in (z[:1], z, z[1:4]):
        session.run(("sample",), {"z": rows})
    assert not session._compiled_exactly
    found: list[Any] = [None] * 4

    def work(i: int) -> None:
        found[i] = session.run(("sample",), {"z": z[i : i + 4]})[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(session._compiled_exactly) == [(4, *model.latent.shape)]
    for i in range(4):
        (expected,) = plain.run(("sample",), {"z": z[i : i + 4]})
        assert np.abs(found[i] - expected).max() <= 1e-5 * np.abs(expected).max()
    out = np.empty_like(found[0])
    assert session.run(("sample",), {"z": z[:4]}, [out])[0] is out
    assert np.abs(out - found[0]).max() <= 1e-6 * np.abs(out).max()


def test_what_differs_when_it_is_compiled_for_its_shape_is_compiled_for_all(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(self: Any) -> list[str]:  # whichever runner is faster here, this one's shapes are what is asked about
        self.capabilities = frozenset()
        return ["openvino"]

    monkeypatch.setattr(search.Tuner, "_runners", alone)
    made = vae_export.build(bundle, "cpu", out=tmp_path / "exact", batches=(1, 8)).record
    for found in made.graphs.values():
        assert [shape for v in found.variants for shape in v.exact] == [{"batch": 1}, {"batch": 8}]
    assert "compiled for batch 1, batch 8" in tables.as_text(tables.build(tmp_path / "exact", made)).replace("\n", "")
    monkeypatch.setattr(search.Tuner, "_apart", lambda self, graph, row: 1.0)  # in truth they agree
    made = vae_export.build(bundle, "cpu", out=tmp_path / "all", batches=(1, 8)).record
    assert not any(v.exact for found in made.graphs.values() for v in found.variants)
    words = r"the decoder in fp32, compiled for batch 1, differs from itself by 1 of the largest, allowed \S+: it is "
    assert any(re.fullmatch(words + "compiled for all shapes only", line) for line in made.absent)


@pytest.mark.parametrize(
    ("for_all", "exactly", "share"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.5, -4.0], 0.125),
        ([1.0, -4.0], [math.nan, -4.0], math.nan),
        (np.array([10, 200], np.uint8), np.array([11, 199], np.uint8), 0.0),  # a level is rounding
        (np.array([10, 200], np.uint8), np.array([10, 203], np.uint8), 0.01),
    ],
)
def test_how_far_apart(bundle: Path, monkeypatch: pytest.MonkeyPatch, for_all: Any, exactly: Any, share: float) -> None:
    class Backend:
        def __init__(self, ways: Any, *_: Any) -> None:
            (self.way,) = ways["decoder"]

        def run(self, *_: Any) -> list[Any]:
            return [np.asarray(for_all), np.asarray(exactly if self.way.plan.exact else for_all)]

        def close(self) -> None:
            pass

    monkeypatch.setattr(search, "CpuBackend", Backend)
    monkeypatch.setattr(search.Tuner, "_inputs", lambda *_: {})
    tuner = object.__new__(search.Tuner)
    tuner.model, tuner.sizes = Bundle(bundle).manifest.model, {}
    assert tuner._apart("decoder", _timed("fp32", 1, 1.0)) == pytest.approx(share, nan_ok=True)


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
    monkeypatch.setitem(openvino._HINTS, "bf16", "f64")
    with pytest.raises((BackendError, BundleError), match=r"bf16 was asked for, and OpenVINO|does not open it"):
        openvino.OpenVinoSession("decoder", graphs["decoder"], model, "bf16", None)


def test_without_openvino(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> frozenset[str]:
        raise BackendError("build needs the package openvino.\nRun: pip install 'vae-export[openvino]'")

    monkeypatch.setattr(openvino, "capabilities", missing)
    made = vae_export.build(bundle, "cpu", out=tmp_path / "out")
    assert {row.runner for row in made.record.measurements} == {"onnxruntime"}
    assert "pip install 'vae-export[openvino]'" in made.record.absent[0]
    assert "not possible here" in tables.as_text(tables.build(made.path, made.record))
    with pytest.raises(BackendError, match=r"nothing computes in bf16 on this processor, .*no bf16 convolutions on"):
        vae_export.build(bundle, "cpu", out=tmp_path / "bf16", precision="bf16")


def test_a_processor_without_bfloat16_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(openvino, "capabilities", lambda: frozenset({"FP32", "INT8"}))
    name = re.escape(processor.processor().model)
    with pytest.raises(BackendError, match=rf"in bf16 on this processor, {name}: .*{name} has no bfloat16") as caught:
        vae_export.build(bundle, "cpu", out=tmp_path / "bf16", precision="bf16")
    assert caught.value.exit_code == 4


def test_what_cannot_hold_is_measured_once(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """bfloat16 has no nodes that a smaller share of the budget would keep in float32."""
    monkeypatch.setattr(openvino, "capabilities", lambda: frozenset({"FP32", "BF16"}))
    asked: list[str] = []

    def problem(self: Any, graph: str, way: Any, share: float) -> str:
        asked.append(graph)
        return f"{graph}: mean is 3 of the largest, allowed 1"

    monkeypatch.setattr(search.Tuner, "_problem", problem)
    words = r"nothing of .* holds in bf16: .*the encoder in bf16: encoder: mean is 3 of the largest, allowed 1; "
    with pytest.raises(VerificationError, match=words):
        vae_export.build(bundle, "cpu", out=tmp_path / "bf16", precision="bf16")
    assert asked == ["encoder", "decoder"]
    asked.clear()
    with pytest.raises(VerificationError, match=r"every node would have to stay in float32; decoder: mean is 3 of the"):
        vae_export.build(bundle, "cpu", out=tmp_path / "int8", precision="int8")
    assert max(map(asked.count, asked)) <= 4  # one bisection for each graph


@pytest.mark.parametrize(
    ("measured", "tolerance", "at_least", "share", "within"),
    [
        (0.5, 1.0, False, 0.5, True),
        (0.51, 1.0, False, 0.5, False),
        (0.0, 0.0, False, 0.5, True),
        (46.1, 40.0, True, 0.5, True),  # half the tolerance is 6 dB
        (45.9, 40.0, True, 0.5, False),
        (40.0, 40.0, True, 1.0, True),
        (9.0, None, False, 0.5, True),
        (math.nan, 1.0, False, 1.0, False),
        (math.nan, 1.0, True, 1.0, False),
    ],
)
def test_a_share_of_the_tolerance(
    measured: float, tolerance: float | None, at_least: bool, share: float, within: bool
) -> None:
    check = Check(
        id="a.b.c", graph="decoder", quantity="q", unit="u", measured=measured, tolerance=tolerance, at_least=at_least
    )
    assert search._within(check, share) == within


def test_the_certificate_is_headed_by_what_runs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = _tuner(Bundle(bundle), precision="auto", budget="int8")
    full = {graph: [planned(raw)] for graph, raw in tuner.base.items()}
    low = full | {"decoder": [*full["decoder"], planned(tuner.base["decoder"], precision="int8")]}
    assert tuner._quickly(full).precision == "float32"
    assert tuner._quickly(low).precision == "encoder float32, decoder int8"
    tuner = _tuner(Bundle(bundle), precision="auto", budget="fp16")
    assert tuner._quickly(low).precision == "encoder float32, decoder float16"


def test_what_encoder_and_decoder_are_held_to() -> None:
    """The least exact of all that they are in, and no looser than a budget."""
    full = [("encoder", "fp32"), ("decoder", "fp32")]
    for added, budget, expected in (
        ([], None, ("float32", "float32")),
        ([("decoder", "int8")], "int8", ("float32", "int8")),
        ([("decoder", "int8")], "fp16", ("float32", "float16")),
        ([("generate", "bf16")], None, ("float32", "bfloat16")),
        ([("score", "fp16")], None, ("float16", "float16")),
        ([("encoder", "tf32")], None, ("tf32", "float32")),
    ):
        assert tuple(build_record.held_to([*full, *added], budget).values()) == expected


def test_however_few_golden_rows_there_are(bundle: Path) -> None:
    """A large picture leaves room for a few of them: fewer than the batch at which lowered graphs are measured."""
    opened = Bundle(bundle)
    model = opened.manifest.model
    reference = golden.decode(opened.read(golden.FILE), opened.manifest.golden, model).first(1)
    assert reference.record.examples < 8
    tuner = _tuner(opened, reference)
    problem = tuner._problem("decoder", planned(tuner.base["decoder"]), 1.0)
    assert problem is None
    assert tuner._quickly({graph: [planned(tuner.base[graph])] for graph in tuner.base}).batches == (5,)


@pytest.mark.parametrize("vnni", [True, False])
def test_8_bits_are_for_processors_that_have_vnni(bundle: Path, vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx2"} | ({"vnni"} if vnni else set())))
    opened = Bundle(bundle)
    tuner = _tuner(opened, precision="int8")
    monkeypatch.setattr(tuner, "_problem", lambda graph, way, share: None)
    lowered = tuner._lowered("int8")
    assert lowered is not None
    for low in lowered.values():
        steps = [v.const_value.numpy() for v in graph.read(low.graph).graph.initializers.values() if v.dtype == 3]
        weights = [np.abs(array.astype(int)).max() for array in steps if array.any()]
        assert weights
        assert max(weights) == (127 if vnni else 63)
    assert tuner._requires(planned(b"", precision="int8")) == (("vnni",) if vnni else ())
    assert tuner._requires(planned(b"", precision="bf16")) == ("bf16",)
    assert tuner._requires(planned(b"")) == ()
    tuner._made.clear()
    monkeypatch.setattr(tuner, "_problem", lambda graph, way, share: "decoder: PSNR is 20 dB")
    assert tuner._lowered("int8") is None
    words = f", with weights of 7 bits, as this processor, {processor.processor().model}, has no VNNI"
    why = "every node would have to stay in float32; decoder: PSNR is 20 dB"
    assert tuner.absent[-1] == f"the decoder in int8{'' if vnni else words}: {why}"


def _tuner(opened: Bundle, reference: golden.Reference | None = None, **options: Any) -> search.Tuner:
    model = opened.manifest.model
    reference = reference or golden.decode(opened.read(golden.FILE), opened.manifest.golden, model)
    return search.Tuner(
        opened.graphs()[0],
        model,
        reference,
        np.zeros((0, *reference.tensors["x"].shape[1:]), np.float32),
        {name: graph.cost for name, graph in opened.manifest.graphs.items()},
        Options(**options),
        (1,),
        {},
        "x",
        0.01,
        lambda step: None,
    )


def test_nothing_is_dropped_on_one_call(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slow call of three is chance; three of three are not."""
    tuner = _tuner(Bundle(bundle))
    candidates = [_timed("fp32", 1, 1.0).candidate for _ in range(3)]
    calls = [[1.0, 1.0, 1.0], [9.0, 9.0, 1.1], [9.0, 9.0, 9.0]]

    class Slow(int):
        def run(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(tuner, "_open", lambda graph, candidate, threads: Slow(_index(candidates, candidate)))
    monkeypatch.setattr(timing, "once", lambda call: calls[call.__defaults__[0]].pop(0))
    monkeypatch.setattr(tuner, "_measure", lambda calls, seconds: {key: _timed("fp32", 1, 1.0).times for key in calls})
    rows = tuner._time_batch("decoder", candidates, 1, {})
    assert [row.times is not None for row in rows] == [True, True, False]
    assert rows[2].verdict == "its first 3 calls took 9.0 times the fastest's"


def _index(items: list[Any], item: Any) -> int:
    return next(number for number, each in enumerate(items) if each is item)


def test_a_busy_machine_is_told_of_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "share", lambda processors: 0.1)
    tuner = _tuner(Bundle(bundle))
    said: list[str] = []
    tuner.progress = said.append
    tuner._look_whether_busy()
    tuner._look_whether_busy()
    words = rf"the machine is busy: of {tuner.processor.threads} processors this process gets 10%.*\. What was measured"
    assert re.match(words, said[0])
    assert said == tuner.absent[-1:]
    assert len(said) == 1
    monkeypatch.setattr(timing, "share", lambda processors: 0.95)
    assert timing.busy(2) is None


def test_a_share_of_the_processors_is_what_the_system_gives() -> None:
    """With three others that want each processor, a good deal less than all."""
    count = processor.processor().threads
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3 * count)]
    try:
        assert 0.0 <= timing.share(count, 0.3) < 0.75
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_passes_that_may_be_used(bundle: Path, tmp_path: Path) -> None:
    made = vae_export.build(bundle, "cpu", out=tmp_path / "none", passes="none")
    assert all(row.passes == () for row in made.record.measurements)
    assert made.record.options.passes == ()
    made = vae_export.build(bundle, "cpu", out=tmp_path / "all")
    assert any("upsampling" in row.passes for row in made.record.measurements)
    assert made.record.options.passes == tuple(rewrites.PASSES)
    with pytest.raises(InputError, match="there is none called 'magic'"):
        vae_export.build(bundle, "cpu", out=tmp_path / "x", passes="magic")
    with pytest.raises(InputError, match="build: budget is 'loose'; expected fp32, fp16, bf16, int8"):
        vae_export.build(bundle, "cpu", out=tmp_path / "x", budget="loose")
    with pytest.raises(InputError, match=r"build: budget fp16 is for precision auto; precision is fp32. Drop one"):
        vae_export.build(bundle, "cpu", out=tmp_path / "x", budget="fp16")
    with pytest.raises(InputError, match="build: seconds is 0; expected a number above 0"):
        vae_export.build(bundle, "cpu", out=tmp_path / "x", seconds=0)


def test_what_does_not_hold_is_taken_out(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Int8 holds on the few rows, and not on all: float32 is taken, and the record says why."""
    honest = search.Tuner._certificate

    def certificate(self: Any, ways: Any, reference: Any, **options: Any) -> Any:
        measured = honest(self, ways, reference, **options)
        if reference is self.reference and any(w.plan.precision != "fp32" for each in ways.values() for w in each):
            import msgspec

            check = msgspec.structs.replace(measured.checks[1], measured=1.0, tolerance=1e-9, at_least=False)
            return msgspec.structs.replace(measured, checks=(check, *measured.checks[1:]))
        return measured

    monkeypatch.setattr(search.Tuner, "_certificate", certificate)
    made = vae_export.build(bundle, "cpu", out=tmp_path / "out", precision="auto")
    kinds = {v.precision for found in made.record.graphs.values() for v in found.variants}
    assert kinds == {"fp32"}
    verdicts = {row.verdict for row in made.record.measurements if row.precision == "int8"}
    # What was slow anyway was never chosen, and so never refused.
    assert verdicts <= {v for v in verdicts if v.startswith("refused: ") or "slower" in v or "first 3 calls" in v}
    monkeypatch.setattr(
        search.Tuner, "_certificate", lambda self, ways, ref, **o: _failed(honest(self, ways, ref, **o))
    )
    with pytest.raises(VerificationError, match="differs from its reference"):
        vae_export.build(bundle, "cpu", out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("graph", "which", "out"),
    [
        ("encoder", "encoder.mean.max", {("encoder", "low")}),
        ("decoder", "decoder.sample.max", {("decoder", "low")}),
        ("decoder", "prior.picture.max", {("generate", "low")}),
        ("end to end", "end_to_end.pixel.max", {("reconstruct", "low")}),
        ("end to end", "elbo.kl.max", {("encoder", "low")}),  # there is no score
    ],
)
def test_who_is_to_blame(graph: str, which: str, out: set[tuple[str, str]]) -> None:
    """What is out of budget is taken out, and what is not stays."""
    kinds = {"low": "int8", "high": "fp32"}
    graphs = ("encoder", "decoder", "generate", "reconstruct")
    made = {
        name: search.Candidate(
            "openvino", kind, (), dict.fromkeys(graphs, b""), {g: {} for g in graphs}, {}, dict.fromkeys(graphs, kind)
        )
        for name, kind in kinds.items()
    }
    tuner = object.__new__(search.Tuner)
    rows = {g: [search.Timed(c, None, 1, None, "slower") for c in made.values()] for g in graphs}
    tuner.timed = rows
    check = Check(id=which, graph=graph, quantity="what", unit="of S", measured=2.0, tolerance=1.0)
    measured = Certificate(
        bundle="b", created="c", reference="r", measured={}, precision="int8", examples={}, batches=(1,),
        splits_identical=True, checks=(check,),
    )  # fmt: skip
    refused: dict[tuple[str, int], str] = {}
    tuner._refuse(measured, {g: rows[g][:1] for g in graphs}, refused)
    names = {id(candidate): name for name, candidate in made.items()}
    assert {(place, names[number]) for place, number in refused} == out
    assert set(refused.values()) == {f"refused: {check}"}
    if graph in ("encoder", "decoder") and which != "prior.picture.max":
        assert search._why_not("reconstruct", made["low"], refused)
        assert tuner._choose({"encoder": "decoder", "decoder": "encoder"}[graph], refused)[0].candidate is made["low"]


def _failed(measured: Any) -> Any:
    import msgspec

    check = msgspec.structs.replace(measured.checks[1], measured=1.0, tolerance=1e-9, at_least=False)
    return msgspec.structs.replace(measured, checks=(check, *measured.checks[1:]))


def _timed(precision: str, batch: int, median: float, spread: float = 0.0) -> search.Timed:
    candidate = search.Candidate(
        "onnxruntime", precision, (), {"decoder": b""}, {"decoder": {}}, {}, {"decoder": precision}
    )
    times = timing.Times(median, median, median, median, median, spread, 9, 3)
    return search.Timed(candidate, None, batch, times, "slower")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("fp32", 1, 1.0), ("fp32", 1, 0.995)], [0]),  # the second is faster by less than the noise
        ([("fp32", 1, 1.0), ("fp32", 1, 0.9)], [1]),
        ([("fp32", 1, 1.0), ("int8", 1, 1.5), ("fp32", 8, 8.0), ("int8", 8, 2.0)], [1, 3]),  # one precision for all
        ([("fp32", 1, 1.0), ("int8", 1, 3.0), ("fp32", 8, 8.0), ("int8", 8, 4.0)], [0, 2]),
        ([("fp32", 1, 1.0), ("int8", 1, 0.97)], [0]),  # no faster than float32 beyond the noise
        ([("fp32", 1, 1.0), ("int8", 1, 0.9)], [1]),
        ([("fp32", 1, 1.0), ("int8", 1, 0.97), ("bf16", 1, 0.9)], [2]),
        ([("int8", 1, 1.0), ("int8", 1, 0.9)], [1]),  # as asked for: float32 was not measured
    ],
)
def test_the_choice(rows: list[tuple[str, int, float]], expected: list[int]) -> None:
    tuner = object.__new__(search.Tuner)
    made = [_timed(*row) for row in rows]
    tuner.timed = {"decoder": made}
    assert [made.index(row) for row in tuner._choose("decoder", {})] == expected


@pytest.mark.parametrize(
    ("low", "spread", "reason"),
    [
        (0.5, 0.0, None),
        (0.94, 0.0, None),
        (0.97, 0.0, "it is 1.03 times as fast as float32, and more than 1.05 is what counts: float32 stays"),
        (1.5, 0.0, "it is 0.67 times as fast as float32, and more than 1.05 is what counts: float32 stays"),
        (0.8, 0.6, "it is 1.25 times as fast as float32, and more than 1.30 is what counts: float32 stays"),
    ],
)
def test_a_lower_precision_is_faster_or_not_chosen(low: float, spread: float, reason: str | None) -> None:
    rows = [_timed("fp32", 1, 1.0, spread), _timed("int8", 1, low), _timed("fp32", 8, 1.0), _timed("int8", 8, low)]
    for batches in (rows[:2], rows if not spread else rows[:2]):
        assert search.no_gain("decoder", batches, "int8") == reason
        assert {row.candidate.precision for row in search.choose("decoder", batches)} == {"fp32" if reason else "int8"}
    assert search.no_gain("decoder", rows, "fp32") is None
    untimed = dataclasses.replace(rows[1], times=None)
    assert "0.50 times as fast" in str(search.no_gain("decoder", [rows[0], untimed], "int8"))


def test_a_loud_measurement_takes_the_first() -> None:
    tuner = object.__new__(search.Tuner)
    made = [_timed("fp32", 1, 1.0), _timed("fp32", 1, 0.96, spread=0.5), _timed("fp32", 1, 2.0)]
    tuner.timed = {"decoder": made}
    assert tuner._choose("decoder", {}) == [made[0]]
    assert tuner._choose("decoder", {("decoder", id(made[0].candidate)): "refused"}) == [made[1]]
    assert tuner._choose("decoder", {("encoder", id(made[0].candidate)): "refused"}) == [made[0]]


def test_a_fused_graph_that_loses_to_its_parts_is_left_out(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "WORTH", 0.0)
    made = vae_export.build(bundle, "cpu", out=tmp_path / "out")
    assert set(made.record.graphs) == {"encoder", "decoder"}
    lost = {
        row.verdict for row in made.record.measurements if row.graph == "generate" and "times as fast" in row.verdict
    }
    assert len(lost) == 1
    with vae_export.load(bundle, build=made.path) as vae:
        assert vae.generate(2).shape[0] == 2


def test_slow_models_have_no_fused_graphs(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would hold the weights once more each. One that is slow by itself would take minutes to build."""
    monkeypatch.setattr(search, "_LONG", 0.0)
    made = vae_export.build(bundle, "cpu", out=tmp_path / "out")
    assert set(made.record.graphs) == {"encoder", "decoder"}
    assert any(
        re.fullmatch(r"fused graphs: one call takes 0\.\d\d s, .*next to nothing", x) for x in made.record.absent
    )
    with vae_export.load(bundle, build=made.path) as vae:
        assert vae.generate(2).shape[0] == 2


def test_the_cache_is_used(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VAE_EXPORT_CACHE", str(tmp_path / "cache"))
    made = vae_export.build(bundle, "cpu")
    with vae_export.load(bundle, device="cpu") as vae:
        assert vae.describe()["build"] == str(made.path)


def test_a_changed_variant_is_refused(bundle: Path, built: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "copy"
    shutil.copytree(built["fp32"].path, path)
    (variant, _) = BuildFolder(path).variants()["decoder"][0]
    raw = bytearray((path / variant.file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (path / variant.file).write_bytes(bytes(raw))
    with pytest.raises(BundleError, match=variant.file):
        vae_export.load(bundle, build=path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_batch": 0}, "max_batch: a number from 1 to"),
        ({"threads": 0}, "threads: a number from 1 to 65535"),
        ({"kept": {"a\x1b": "b"}}, "printable text expected"),
        ({"exact": ({"height": 8},)}, "exact: a batch and sizes from 1 to"),
        ({"exact": ({"batch": 0},)}, "exact: a batch and sizes from 1 to"),
    ],
)
def test_variants_that_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_record.ExecutionPlan(file="decoder.onnx", runner="openvino", **changed)


@pytest.mark.parametrize("limits", [(1, 8), (8, 1, None), (None, None), (1, 1, None)])
def test_limits_rise_and_end(limits: tuple[int | None, ...]) -> None:
    variants = tuple(
        build_record.ExecutionPlan(max_batch=limit, file="d.onnx", runner="onnxruntime") for limit in limits
    )
    with pytest.raises(ValueError, match="rising limits and then none expected, got"):
        build_record.BuiltGraph(file="d.onnx", onnx_sha256="0" * 64, structure="0" * 64, variants=variants)


def test_sizes_that_vary(member: Callable[[str], Any], tmp_path: Path) -> None:
    path = member("spatial-named").bundle
    made = vae_export.build(path, "cpu", out=tmp_path / "out", sizes=[{"height": 24, "width": 32}], batches=(1, 4))
    assert {row.batch for row in made.record.measurements} == {1, 4}
    with vae_export.load(path, device="cpu") as plain, vae_export.load(path, build=made.path) as vae:
        for size in ({"height": 16, "width": 24}, {"height": 40, "width": 8}):
            got, expected = vae.sample(3, size=size), plain.sample(3, size=size)
            assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(InputError, match=r"does not take size \(size: the CPU is measured at one size\)"):
        vae_export.build(path, "cpu", out=tmp_path / "x", sizes=[{"height": 8, "width": 8}, {"height": 16, "width": 8}])


def test_inputs_fill_the_size_that_is_measured(member: Callable[[str], Any]) -> None:
    opened = Bundle(member("spatial-named").bundle)
    model = opened.manifest.model
    reference = golden.decode(opened.read(golden.FILE), opened.manifest.golden, model)
    sizes = {"height": 40, "width": 8}
    tuner = search.Tuner(
        opened.graphs()[0],
        model,
        reference,
        np.zeros((0, 3, 16, 24), np.float32),
        {},
        Options(),
        (1,),
        sizes,
        "x",
        0.01,
        print,
    )
    made = tuner._inputs("reconstruct", 300)
    assert made["x"].shape == (300, 3, 40, 8)
    assert made["eps"].shape == (300, *model.latent_shape(sizes))
    assert np.isfinite(made["x"]).all()
    assert made["x"].std() > 0
    assert math.isclose(float(made["eps"].std()), 1.0, abs_tol=0.1)


def test_the_command_line(bundle: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    unnamed = run("build", "--target", "cpu")
    assert (unnamed.returncode, "build: name a BUNDLE" in unnamed.stderr) == (2, True)
    shown = run("build", "--passes", "list")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in rewrites.PASSES)
    options = ("--target", "cpu", "--precision", "auto", "--seconds", "0.01", "--batch", "1,2", "--budget", "fp16")
    made = run("build", bundle, *options, "--passes", "-phases", "--out", tmp_path / "out")
    assert made.returncode == 0, made.stderr
    assert "candidates took turns" in made.stdout
    assert "passes: " in run("inspect", tmp_path / "out").stdout
    record = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert record["options"]["budget"] == "fp16"
    assert "phases" not in record["options"]["passes"]


def test_graphs_in_a_build_can_be_read(built: dict[str, Any]) -> None:
    """8-bit weights are what is stored."""
    folder = BuildFolder(built["int8"].path)
    ((_, content),) = folder.variants()["encoder"][-1:]
    read = graph.read(content)
    assert any(node.op_type == "QuantizeLinear" for node in read.graph)
