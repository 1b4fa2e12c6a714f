"""Builds for the CPU: what is tried, what is chosen, and that it computes the same at every batch."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from quick import PATIENT, QUICK, measured_as

import vae_export
from vae_export import graph, timing
from vae_export.building import contents
from vae_export.building.cpu import SearchSettings
from vae_export.building.cpu.candidates import Candidates
from vae_export.building.cpu.measuring import Measuring
from vae_export.building.evaluation import Evaluator
from vae_export.commands import tables
from vae_export.contract.build_record import BuildFolder, Options
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import GRAPHS
from vae_export.errors import BackendError, BundleError, InputError, VerificationError
from vae_export.graph import rewrites
from vae_export.progress import silent
from vae_export.runtimes import processor
from vae_export.runtimes.cpu import openvino

BATCHES = (1, 3, 8, 9, 64, 65)
#: One batch size and one runner: what is measured does not matter.
SMALL: dict[str, Any] = {"batches": (4,), "search": dataclasses.replace(PATIENT, runners=("onnxruntime",))}


@pytest.fixture(scope="module")
def bundle(member: Callable[[str], Any]) -> Path:
    path: Path = member("conv-bernoulli").bundle
    return path


@pytest.fixture(scope="module")
def built(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Builds of the same bundle by precision."""
    folder = tmp_path_factory.mktemp("builds")
    made = {
        precision: vae_export.build(bundle, "cpu", precision=precision, out=folder / precision, batches=(1, 8))
        for precision in ("fp32", "auto")
    }
    with pytest.MonkeyPatch.context() as patch:
        # Whether 8 bits are faster than float32 is a matter of the processor: here they are.
        patch.setattr(timing, "measure", measured_as({"int8": 0.5}))
        options: dict[str, Any] = {"precision": "int8", "batches": (1, 8), "search": PATIENT}
        made["int8"] = vae_export.build(bundle, "cpu", out=folder / "int8", **options)
    return made


def candidates(bundle: Path, precision: Any, **settings: Any) -> Candidates:
    chosen = SearchSettings(**settings)
    return Candidates(contents.read(Bundle(bundle)), Options(precision=precision), chosen, silent)


# What is chosen


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


def test_plans_cover_all_batches_in_one_precision(built: dict[str, Any]) -> None:
    for made in built.values():
        for found in made.record.graphs.values():
            assert found.variants[-1].max_batch is None
            assert found.file == found.variants[-1].file
            assert len({plan.precision for plan in found.variants}) == 1
        assert made.certificate.passed
    assert {plan.precision for plan in built["int8"].record.graphs["encoder"].variants} == {"int8"}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("int8", 0.05), ("auto", 0.05)])
def test_it_gives_what_the_bundle_gives(bundle: Path, built: dict[str, Any], precision: str, tolerance: float) -> None:
    with vae_export.load(bundle, device="cpu") as plain, vae_export.load(bundle, build=built[precision].path) as vae:
        for n in BATCHES:
            measured, expected = vae.sample(n, seed=3), plain.sample(n, seed=3)
            assert np.sqrt(np.mean((measured - expected) ** 2)) <= tolerance * np.abs(expected).max()
            x = np.clip(expected, 0, 1)
            scale = np.abs(plain.encode(x).mean).max()
            assert np.abs(vae.encode(x).mean - plain.encode(x).mean).max() <= 2 * tolerance * scale
            assert np.abs(vae.elbo(x).elbo - plain.elbo(x).elbo).max() <= max(tolerance, 1e-3) * 1e3
        shown = vae.describe()
        assert shown["precision"] == built[precision].record.in_words()
        assert (shown["precision"] == "float32") == built[precision].record.exact
        assert precision != "int8" or "int8" in shown["precision"]
        assert set(shown["backend"].split(", ")) <= {"onnxruntime", "openvino"}


def test_graphs_in_a_build_can_be_read(built: dict[str, Any]) -> None:
    """8-bit weights are what is stored."""
    folder = BuildFolder(built["int8"].path)
    ((_, content),) = folder.variants()["encoder"][-1:]
    read = graph.read(content)
    assert any(node.op_type == "QuantizeLinear" for node in read.graph)


def test_two_builds_choose_alike(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the same is measured, the same is chosen, and the same bytes are written."""
    monkeypatch.setattr(timing, "measure", measured_as({}))
    monkeypatch.setattr(timing, "once", lambda call: 1.0)
    first, second = (vae_export.build(bundle, "cpu", out=tmp_path / name, **SMALL).record for name in ("a", "b"))
    assert first.graphs == second.graphs
    assert first.measurements == second.measurements


def test_sizes_that_vary(member: Callable[[str], Any], tmp_path: Path) -> None:
    path = member("spatial-named").bundle
    made = vae_export.build(path, "cpu", out=tmp_path / "out", sizes=[{"height": 24, "width": 32}], batches=(1, 4))
    assert {row.batch for row in made.record.measurements} == {1, 4}
    with vae_export.load(path, device="cpu") as plain, vae_export.load(path, build=made.path) as vae:
        for size in ({"height": 16, "width": 24}, {"height": 40, "width": 8}):
            measured, expected = vae.sample(3, size=size), plain.sample(3, size=size)
            assert np.abs(measured - expected).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(InputError, match=r"does not take size \(size: the CPU is measured at one size\)"):
        vae_export.build(path, "cpu", out=tmp_path / "x", sizes=[{"height": 8, "width": 8}, {"height": 16, "width": 8}])


def test_batches_of_long_calls_are_not_measured(bundle: Path, tmp_path: Path) -> None:
    """They run like the largest that is."""
    search = dataclasses.replace(SMALL["search"], max_call_seconds=0.0)
    made = vae_export.build(bundle, "cpu", out=tmp_path / "out", batches=(1, 64), search=search).record
    assert {row.batch for row in made.measurements} == {1}
    assert all(len(found.variants) == 1 for found in made.graphs.values())


# What is tried


def test_without_openvino(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> frozenset[str]:
        raise BackendError("build needs the package openvino.\nRun: pip install 'vae-export[openvino]'")

    monkeypatch.setattr(openvino, "capabilities", missing)
    made = vae_export.build(bundle, "cpu", out=tmp_path / "out", batches=(4,))
    assert {row.runner for row in made.record.measurements} == {"onnxruntime"}
    assert any("pip install 'vae-export[openvino]'" in line for line in made.record.absent)
    assert "not possible here" in tables.as_text(tables.build(made.path, made.record))
    with pytest.raises(BackendError, match=r"nothing computes in bf16 on this processor, .*no bf16 convolutions on"):
        vae_export.build(bundle, "cpu", out=tmp_path / "bf16", precision="bf16")


def test_a_processor_without_bfloat16_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(openvino, "capabilities", lambda: frozenset({"FP32", "INT8"}))
    name = re.escape(processor.processor().model)
    with pytest.raises(BackendError, match=rf"in bf16 on this processor, {name}: .*{name} has no bfloat16") as caught:
        vae_export.build(bundle, "cpu", out=tmp_path / "bf16", precision="bf16")
    assert caught.value.exit_code == 4


def test_a_busy_machine_is_told_of_once(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "share", lambda processors: 0.1)
    told: list[str] = []
    made = vae_export.build(bundle, "cpu", out=tmp_path / "b", progress=lambda s, share=None: told.append(s), **SMALL)
    count = processor.processor().threads
    words = rf"the machine is busy: of {count} processors this process gets 10%.*\. Timings are less certain, and a "
    (busy,) = [line for line in told if "busy" in line]
    assert re.match(words, busy)
    assert [line for line in made.record.absent if "busy" in line] == [busy]


def test_passes_that_may_be_used(bundle: Path, tmp_path: Path) -> None:
    made = vae_export.build(bundle, "cpu", out=tmp_path / "none", passes="none", **SMALL)
    assert all(row.passes == () for row in made.record.measurements)
    assert made.record.options.passes == ()
    made = vae_export.build(bundle, "cpu", out=tmp_path / "all", **SMALL)
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


@pytest.mark.parametrize("vnni", [True, False])
def test_8_bits_are_for_processors_that_have_vnni(bundle: Path, vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx2"} | ({"vnni"} if vnni else set())))
    problem: list[str | None] = [None]
    monkeypatch.setattr(Evaluator, "problem", lambda self, graph, reduced, share=1.0: problem[0])
    made = candidates(bundle, "int8")
    for candidate in made.all():
        for planned in candidate.graphs.values():
            low = graph.read(planned.graph)
            steps = [v.const_value.numpy() for v in low.graph.initializers.values() if v.dtype == 3]
            weights = [np.abs(array.astype(int)).max() for array in steps if array.any()]
            assert weights
            assert max(weights) == (127 if vnni else 63)
            assert planned.plan.requires == (("vnni",) if vnni else ())
    problem[0] = "decoder: PSNR is 20 dB"
    made.restart(0.5)
    with pytest.raises(VerificationError, match=r"nothing of conv-bernoulli passes in int8: the encoder in int8"):
        made.all()
    words = f", with weights of 7 bits, as this processor, {processor.processor().model}, has no VNNI"
    why = "every node would have to stay in float32; decoder: PSNR is 20 dB"
    assert made.absent[-1] == f"the decoder in int8{'' if vnni else words}: {why}"


def test_plans_say_what_they_require(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "capabilities", lambda: frozenset({"BF16"}))
    monkeypatch.setattr(Evaluator, "problem", lambda self, graph, reduced, share=1.0: None)
    made = candidates(bundle, "auto", precisions=("fp32", "bf16"))
    required = {(p.plan.precision, p.plan.requires) for c in made.all() for p in c.graphs.values()}
    assert required == {("fp32", ()), ("bf16", ("bf16",))}


def test_what_cannot_hold_is_measured_once(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """bfloat16 has no nodes that a smaller share of the tolerance would keep in float32."""
    monkeypatch.setattr(openvino, "capabilities", lambda: frozenset({"FP32", "BF16"}))
    asked: list[str] = []

    def problem(self: Any, graph: str, reduced: Any, share: float = 1.0) -> str | None:
        if reduced.plan.precision == "fp32":
            return None
        asked.append(graph)
        return f"{graph}: mean is 3 nats, tolerance 1"

    monkeypatch.setattr(Evaluator, "problem", problem)
    words = r"nothing of .* passes in bf16: .*the encoder in bf16: encoder: mean is 3 nats, tolerance 1; "
    with pytest.raises(VerificationError, match=words):
        vae_export.build(bundle, "cpu", out=tmp_path / "bf16", precision="bf16")
    assert asked == ["encoder", "decoder"]
    asked.clear()
    with pytest.raises(VerificationError, match=r"every node would have to stay in float32; decoder: mean is 3 nats"):
        vae_export.build(bundle, "cpu", out=tmp_path / "int8", precision="int8")
    assert max(map(asked.count, asked)) <= 4  # one bisection for each graph


# What is taken out


def failed(measured: Any, graph: str) -> Any:
    """A certificate whose check of a graph fails."""
    check = msgspec.structs.replace(measured.check(f"{graph}.finite"), measured=1.0, tolerance=1e-9)
    return msgspec.structs.replace(measured, checks=(check, *measured.checks))


def test_what_does_not_hold_is_taken_out(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Int8 passes alone, and not in the certificate of the whole: float32 is taken, and the record says why."""
    honest = Evaluator.certificate

    def certificate(self: Any, graphs: Any) -> Any:
        measured = honest(self, graphs)
        reduced = [graph for graph in GRAPHS if any(each.plan.precision != "fp32" for each in graphs[graph])]
        return failed(measured, reduced[0]) if reduced else measured

    monkeypatch.setattr(Evaluator, "certificate", certificate)
    monkeypatch.setattr(Evaluator, "problem", lambda self, graph, reduced, share=1.0: None)
    monkeypatch.setattr(timing, "measure", measured_as({"int8": 0.5}))
    options = SMALL | {"search": dataclasses.replace(SMALL["search"], precisions=("fp32", "int8"))}
    made = vae_export.build(bundle, "cpu", out=tmp_path / "out", precision="auto", **options)
    kinds = {plan.precision for found in made.record.graphs.values() for plan in found.variants}
    assert kinds == {"fp32"}
    verdicts = {row.verdict for row in made.record.measurements if row.precision == "int8"}
    assert verdicts
    assert all(verdict.startswith("refused: ") for verdict in verdicts)
    monkeypatch.setattr(Evaluator, "certificate", lambda self, graphs: failed(honest(self, graphs), "decoder"))
    with pytest.raises(VerificationError, match="differs from its reference"):
        vae_export.build(bundle, "cpu", out=tmp_path / "none", **SMALL)
    assert not (tmp_path / "none").exists()


def test_results_that_depend_on_the_shape_are_compiled_for_all_shapes(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"batches": (1, 8), "search": dataclasses.replace(QUICK, runners=("openvino",))}
    made = vae_export.build(bundle, "cpu", out=tmp_path / "exact", **options).record
    for found in made.graphs.values():
        assert [shape for plan in found.variants for shape in plan.exact] == [{"batch": 1}, {"batch": 8}]
    assert "compiled for batch 1, batch 8" in tables.as_text(tables.build(tmp_path / "exact", made)).replace("\n", "")
    monkeypatch.setattr(Measuring, "shape_difference", lambda self, graph, planned, batch: 1.0)  # in truth they agree
    made = vae_export.build(bundle, "cpu", out=tmp_path / "all", **options).record
    assert not any(plan.exact for found in made.graphs.values() for plan in found.variants)
    words = (
        r"decoder in fp32: static-shape and dynamic-shape results at batch 1 differ by 1 of max\|output\|, tolerance "
    )
    assert any(re.fullmatch(rf"{words}\S+: it is compiled for all shapes only", line) for line in made.absent)


def test_static_and_dynamic_shapes_agree(bundle: Path) -> None:
    made = candidates(bundle, "fp32", runners=("openvino",))
    planned = made.all()[0].graphs["decoder"]
    assert Measuring(contents.read(Bundle(bundle)), [4], {}, QUICK).shape_difference("decoder", planned, 4) < 1e-5


def test_a_fused_graph_that_loses_to_its_parts_is_left_out(bundle: Path, tmp_path: Path) -> None:
    options = SMALL | {"search": dataclasses.replace(SMALL["search"], max_fused_ratio=0.0)}
    made = vae_export.build(bundle, "cpu", out=tmp_path / "out", **options)
    assert set(made.record.graphs) == {"encoder", "decoder"}
    lost = {
        row.verdict for row in made.record.measurements if row.graph == "generate" and "times as fast" in row.verdict
    }
    assert len(lost) == 1
    with vae_export.load(bundle, build=made.path) as vae:
        assert vae.generate(2).shape[0] == 2


def test_slow_models_have_no_fused_graphs(bundle: Path, tmp_path: Path) -> None:
    """They would hold the weights once more each. One that is slow by itself would take minutes to build."""
    options = SMALL | {"search": dataclasses.replace(SMALL["search"], max_fusable_seconds=0.0)}
    made = vae_export.build(bundle, "cpu", out=tmp_path / "out", **options)
    assert set(made.record.graphs) == {"encoder", "decoder"}
    words = r"fused graphs: one call takes 0\.\d\d s, .*next to nothing"
    assert any(re.fullmatch(words, line) for line in made.record.absent)
    with vae_export.load(bundle, build=made.path) as vae:
        assert vae.generate(2).shape[0] == 2


# The folder


def test_the_cache_is_used(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VAE_EXPORT_CACHE", str(tmp_path / "cache"))
    made = vae_export.build(bundle, "cpu", **SMALL)
    with vae_export.load(bundle, device="cpu") as vae:
        assert vae.describe()["build"] == str(made.path)


def test_a_changed_graph_is_refused(bundle: Path, built: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(built["fp32"].path, path)
    (plan, _) = BuildFolder(path).variants()["decoder"][0]
    raw = bytearray((path / plan.file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (path / plan.file).write_bytes(bytes(raw))
    with pytest.raises(BundleError, match=plan.file):
        vae_export.load(bundle, build=path)


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
