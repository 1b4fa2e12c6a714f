"""Times in turns, who is timed, what is refused, and what is written down."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import numpy as np
import performance
import pytest
import tables
import torch
import zoo
from PIL import Image

import vae_export
from vae_export import bench, timing
from vae_export.bench import memory, peers
from vae_export.contract.bundle import Bundle
from vae_export.errors import BackendError, InputError, VerificationError
from vae_export.exporting import exporter

SECONDS = 0.02


def rates() -> bench.MachineRates:
    """Small products and copies."""
    return bench.MachineRates(1, side=256, copied=1 << 20)


def timed(selection: bench.Selection, *arguments: Any, **options: Any) -> bench.Report:
    """A short run."""
    return bench.run(selection, *arguments, seconds=SECONDS, rates=rates(), **options)


def alone(path: Path, *runners: Any) -> bench.Selection:
    """Only these runners."""
    return bench.Selection(path, 1, list(runners))


@pytest.fixture(scope="module")
def opened(member: Callable[..., Any]) -> Iterator[bench.Selection]:
    """All that can run a small model."""
    with everybody(member("mlp-gaussian").bundle, member("mlp-gaussian").source) as selection:
        yield selection


#: All but `torch.compile`, whose first call takes long.
QUICK_PEERS = set(bench.PEERS) - {"compile"}


def everybody(bundle: Path, source: Any) -> bench.Selection:
    """All quick runners of a model."""
    return bench.candidates(bundle, source=source, peers=QUICK_PEERS, threads=1)


@pytest.fixture
def report(opened: bench.Selection) -> bench.Report:
    """Of two verbs and two batches."""
    return timed(opened, ["decode", "elbo"], [1, 3])


def row(**fields: Any) -> bench.Row:
    """A row in which everything is plausible."""
    plain: dict[str, Any] = {"verb": "decode", "batch": 1, "runner": "vae_export", "precision": "fp32", "peer": False}
    plain |= {"prepare_s": 1e-3, "first_call_s": 1e-3, "multiply_adds": 10**6}
    plain["times"] = timing.Times(*[fields.pop("median", 1e-3)] * 5, spread=0.1, calls=10, turns=5)
    return bench.Row(**plain | fields)


def test_every_runner_runs_every_verb(member: Callable[..., Any], opened: bench.Selection) -> None:
    made = member("mlp-gaussian")
    names = ["vae_export", "ONNX Runtime", "PyTorch eager", "OpenVINO f32"]
    assert [runner.name for runner in opened.runners][:4] == names
    assert set(opened.opened) == {runner.name for runner in opened.runners}
    report = timed(opened, batches=[1, 300])
    assert not report.absent
    assert [(r.verb, r.batch, r.runner) for r in report.rows] == [
        (verb, batch, runner.name) for verb in bench.VERBS for batch in (1, 300) for runner in opened.runners
    ]
    for found in report.rows:
        times = found.times
        assert 0 < times.p10 <= times.p50 <= times.p90 <= times.p99
        assert times.p10 <= times.median <= times.p99
        assert 5 <= times.turns <= times.calls
        assert min(times.spread, found.prepare_s) >= 0
        assert found.first_call_s > 0
    costs = {name: graph.cost.at({})[0] for name, graph in Bundle(made.bundle).manifest.graphs.items()}
    counted = {(r.verb, r.batch): r.multiply_adds for r in report.rows}
    assert counted["encode", 300] == 300 * costs["encoder"]
    assert counted["decode", 1] == counted["sample", 1] == costs["decoder"]
    assert counted["elbo", 1] == counted["reconstruct", 1] == sum(costs.values())
    assert all(fact["open_s"] > 0 for fact in report.runners)


@pytest.mark.parametrize("name", ["mlp-bernoulli", "plain"])
def test_all_kinds_of_models(member: Callable[..., Any], name: str) -> None:
    made = member(name)
    with everybody(made.bundle, made.source) as selection:
        report = timed(selection, batches=[2])
    expected = [verb for verb in bench.VERBS if name != "plain" or verb != "elbo"]
    assert list(dict.fromkeys(found.verb for found in report.rows)) == expected
    assert not report.absent


def test_sizes(member: Callable[..., Any]) -> None:
    made = member("spatial-named")
    with bench.candidates(made.bundle, threads=1) as selection:
        sizes = {"height": 8, "width": 12}
        report = timed(selection, batches=[1, 9], sizes=sizes)
        assert report.sizes == sizes
        golden = timed(selection, ["encode"], [1])
        assert golden.sizes == {"height": 16, "width": 24}
        with pytest.raises(InputError, match=r"this model takes height \(a multiple of 4\), width"):
            timed(selection, sizes={"height": 7, "width": 12})
    share = 8 * 12 / (16 * 24)
    assert report.rows[0].multiply_adds == pytest.approx(share * (golden.rows[0].multiply_adds or 0), rel=1e-6)


def test_diffusers_is_timed_beside_its_wrapped_module(exported: Callable[[str], tuple[Path, Any]]) -> None:
    path, _ = exported("tiny")
    with everybody(path, path.parent / "source") as selection:
        report = timed(selection, batches=[2])
    assert not report.absent
    for name in ("PyTorch eager", "diffusers"):
        assert {r.verb for r in report.rows if r.runner == name} == {"encode", "decode", "sample", "reconstruct"}


@pytest.mark.parametrize("name", ["kl-sd15", "dc"])
def test_the_mean_in_what_diffusers_returns(name: str) -> None:
    import zoo_diffusers

    module = zoo_diffusers.model(name)
    x = torch.from_numpy(zoo.pictures(2, (3, 16, 16)))
    with torch.inference_mode():
        encoded = module.encode(x)
        mean = encoded.latent_dist.mean if name == "kl-sd15" else encoded.latent
        assert peers.first(encoded) is mean
        decoded = module.decode(mean)
        assert peers.first(decoded) is decoded.sample


def test_torch_compile(member: Callable[..., Any]) -> None:
    made = member("mlp-gaussian")
    runner = peers.Compiled(made.source, threads=1)
    report = timed(alone(made.bundle, runner), ["decode"], [2])
    runner.close()
    assert not report.absent
    assert report.rows[0].first_call_s > 10 * report.rows[0].times.median  # it compiled


def test_peers_that_are_not_here_are_listed(
    member: Callable[..., Any],
    exported: Callable[[str], tuple[Path, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, (tiny, _) = member("mlp-gaussian"), exported("tiny")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with bench.candidates(made.bundle, peers=bench.PEERS, threads=1) as selection:
        absent = {one.runner: one.reason for one in selection.absent}
    assert set(absent) == {"PyTorch eager", "torch.compile", "OpenVINO f32", "OpenVINO bf16"}
    needs = "it needs the source that the bundle was exported from. Pass it with --source"
    assert absent["PyTorch eager"] == absent["torch.compile"] == needs
    for name in ("OpenVINO f32", "OpenVINO bf16"):
        assert absent[name] == (
            "bench --peers: the Python package 'openvino' is not installed. Run: pip install 'vae-export[openvino]'"
        )
    with bench.candidates(tiny, peers=bench.PEERS, threads=1) as selection:
        assert needs in {one.reason for one in selection.absent if one.runner == "diffusers"}


def test_openvino_without_a_precision_or_with_weights_beside(
    member: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = member("mlp-gaussian").bundle
    with pytest.raises(
        BackendError, match=r"OpenVINO has no fp8 on this processor, only .*FP32.*\. Nothing to install would change it"
    ):
        peers.OpenVino(path, precision="fp8")
    monkeypatch.setattr(Bundle, "graphs", lambda self: ({}, {"decoder": b""}))
    with pytest.raises(
        BackendError, match=r"the weights of .* lie beside its graphs, and OpenVINO reads a graph from memory only"
    ):
        peers.OpenVino(path)


class Broken:
    """A runner that fails, or is wrong."""

    name, precision, addressed, peer, recipe = "broken", "fp32", False, True, None
    verbs = frozenset(bench.VERBS)

    def __init__(self, result: Any = None) -> None:
        self.result = result

    def prepare(self, cell: bench.Cell) -> Callable[[], Any]:
        def call() -> Any:
            if self.result is None:
                raise RuntimeError("no compiler found\nand much more")
            return self.result(next(iter(cell.expected.values())))

        return call

    def results(self, verb: str, result: Any) -> dict[str, Any]:
        return {"mean" if verb == "encode" else "sample": result}

    def close(self) -> None:
        pass


def test_a_peer_that_fails_is_listed_and_ours_fails_the_run(
    member: Callable[..., Any], opened: bench.Selection
) -> None:
    path, broken = member("mlp-gaussian").bundle, Broken()
    report = timed(alone(path, opened.runners[0], broken), ["decode"], [1, 2])
    assert {r.runner for r in report.rows} == {"vae_export"}
    assert [dataclasses.astuple(one) for one in report.absent] == [
        ("broken", "RuntimeError: no compiler found", "decode", batch) for batch in (1, 2)
    ]
    assert bench.summary(report)[-1] == "absent: broken, decode 1, decode 2: RuntimeError: no compiler found"
    broken.peer = False
    with pytest.raises(RuntimeError, match="no compiler found"):
        timed(alone(path, broken), ["decode"], [1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda x: x + 0.01,
            r"broken, decode, batch 2: sample has a worst error of 0\.01, tolerance .* in fp32",
        ),
        (lambda x: x[:1], r"sample has shape \(1, 1, 8, 8\), expected \(2, 1, 8, 8\)\. Its times are discarded"),
        (lambda x: x * np.nan, "sample has values that are not finite. Its times are discarded"),
    ],
)
def test_a_wrong_result_is_caught_after_timing(member: Callable[..., Any], wrong: Any, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        timed(alone(member("mlp-gaussian").bundle, Broken(wrong)), ["decode"], [2])


def test_reduced_precision_has_a_larger_tolerance(member: Callable[..., Any]) -> None:
    cell = bench.Examples(Bundle(member("mlp-gaussian").bundle)).cell("decode", 2)
    expected = cell.expected["sample"]
    largest = np.abs(expected).max()
    cell.check({"sample": expected + 0.05 * largest}, "low", precision="bf16")
    with pytest.raises(
        VerificationError, match=r"low, decode, batch 2: sample has an RMS error of .*, tolerance .* in bf16"
    ):
        cell.check({"sample": expected + 0.2 * largest}, "low", precision="bf16")


def test_noise_that_is_not_addressed_can_only_be_finite(member: Callable[..., Any]) -> None:
    examples = bench.Examples(Bundle(member("mlp-gaussian").bundle))
    cell = examples.cell("sample", 2)
    cell.check({"sample": np.zeros((2, 1, 8, 8))}, "other", addressed=False)
    with pytest.raises(VerificationError, match="worst error"):
        cell.check({"sample": np.zeros((2, 1, 8, 8))}, "ours")
    elbo = examples.cell("elbo", 2)
    kl = elbo.expected["kl"]
    elbo.check({"kl": kl, "reconstruction": np.zeros(2)}, "other", addressed=False)
    with pytest.raises(VerificationError, match="kl has a worst error"):
        elbo.check({"kl": kl + elbo.scale["kl"], "reconstruction": np.zeros(2)}, "other", addressed=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": [0]}, r"bench: batches are \[0\]; expected numbers from 1 on"),
        ({"batches": ["a"]}, r"bench: batches are \['a'\]; expected numbers from 1 on"),
        ({"verbs": ["draw"]}, "bench: the verb is 'draw'; expected one or more of encode, decode, sample, reconstruct"),
        ({"verbs": []}, "bench: the verb is none; expected one or more of encode"),
        ({"seconds": 0}, "bench: seconds is 0; expected a positive number"),
        ({"sizes": {"height": 8}}, "size: this model takes no sizes; got {'height': 8}"),
        ({"memory": True}, "memory is measured in another process, and broken needs an object that only this one has"),
    ],
)
def test_what_cannot_be_timed(member: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench.run(alone(member("mlp-gaussian").bundle, Broken()), **options)


def test_who_cannot_be_timed(member: Callable[..., Any], tmp_path: Path) -> None:
    made = member("mlp-gaussian")
    with pytest.raises(InputError, match="bench: the runners are none; expected one or more, each name once"):
        timed(alone(made.bundle))
    with pytest.raises(InputError, match="bench: the runners are broken, broken; expected"):
        timed(alone(made.bundle, Broken(), Broken()))
    with pytest.raises(InputError, match="bench: threads is 0; expected a number from 1 on"):
        bench.candidates(made.bundle, threads=0)
    with pytest.raises(
        InputError, match=r"--source is for timing PyTorch, which is a peer, and no peers are timed\. Add"
    ):
        bench.candidates(made.bundle, source=made.source)
    plain = member("plain").bundle
    with pytest.raises(InputError, match="bench: elbo needs a likelihood and a posterior variance, and this model"):
        timed(alone(plain, Broken()), ["elbo"])
    built = vae_export.build(made.bundle, "cpu", out=tmp_path / "a").path
    with pytest.raises(InputError, match=r"is given twice\. Name each build once"):
        bench.candidates(made.bundle, builds=[built, built])


def test_builds(member: Callable[..., Any], tmp_path: Path) -> None:
    path = member("mlp-gaussian").bundle
    made = [
        vae_export.build(path, "cpu", out=tmp_path / name, precision=name[:4]).path
        for name in ("fp32", "fp32-b", "fp16")
    ]
    with bench.candidates(path, builds=made, threads=1) as selection:
        report = timed(selection, ["reconstruct"], [2])
    names = [f"vae_export fp32 ({made[0]})", f"vae_export fp32 ({made[1]})", "vae_export fp16", "ONNX Runtime"]
    assert [found.runner for found in report.rows] == names
    assert [found.precision for found in report.rows] == ["fp32", "fp32", "fp16", "fp32"]


def test_turns() -> None:
    def slow() -> None:
        time.sleep(0.01)

    began = time.perf_counter()
    times = timing.measure({"slow": slow, "fast": lambda: None}, 0.02)
    assert time.perf_counter() - began < 1
    assert times["slow"].turns == times["fast"].turns == times["slow"].calls == 5
    assert times["fast"].calls > 50
    assert 0.01 <= times["slow"].p10 <= times["slow"].median
    assert timing.measure({"fast": lambda: None}, 1.0)["fast"].turns == 10
    found = timing.summarize([[1.0], [2.0], [3.0, 3.0], [4.0], [5.0]])
    assert (found.median, found.spread, found.calls, found.turns) == (3.0, 2 / 3, 6, 5)


def test_the_machines_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = bench.machine()
    assert set(measured) == {"date", "machine", "versions"}
    assert measured["versions"]["numpy"] == np.__version__
    own = rates()
    own.sample()
    first = own.rates()
    assert set(first) >= {"float32_gflops", "copy_gb_per_second"}
    assert 1 < first["float32_gflops"] < 10_000
    assert 0.5 < first["copy_gb_per_second"] < 2_000
    own.sample()
    assert own.rates()["float32_gflops"] >= first["float32_gflops"]  # the best of all samples
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    bare = rates()
    bare.sample()
    assert set(bare.rates()) == {"float32_gflops", "copy_gb_per_second"}


def test_the_report(report: bench.Report) -> None:
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["threads"] == 1
    again = bench.Report.of({**plain, "more": 1}).to_dict()
    assert again["rows"] == [pytest.approx(row, nan_ok=True) for row in plain["rows"]]
    assert {k: v for k, v in again.items() if k != "rows"} == {k: v for k, v in plain.items() if k != "rows"}
    assert plain["rows"][0]["runner"] == "vae_export"
    for own, found in zip(plain["rows"], report.rows, strict=True):
        assert own["median_us"] == pytest.approx(found.times.median * 1e6)
        assert own["per_second"] == pytest.approx(found.batch / found.times.median)
        assert own["gflops"] == pytest.approx(2 * found.multiply_adds / found.times.median / 1e9)
        assert 0 < own["share_of_roof"] < 2
    shown, brief = bench.table(report), bench.table(report, brief=True)
    assert shown.row_count == brief.row_count == len(report.rows)
    assert len(shown.columns) == 10
    assert [column.header for column in brief.columns][3:] == ["median µs (p10–p90)", "images/s", "vs. NumPy"]
    assert bench.summary(report)[0].startswith("NumPy's matrix product: ")
    known = {"float32_gflops": 100.0, "bfloat16_gflops": 400.0, "copy_gb_per_second": 10.0}
    named = dataclasses.replace(report, rates=known, rows=(row(), row(precision="bf16"), row(multiply_adds=None)))
    assert [named.relative_rate(found) for found in named.rows] == pytest.approx([0.02, 0.005, None])
    assert "100 GFLOP/s in float32; PyTorch's: 400 in bfloat16; copies: 10.0 GB/s" in bench.summary(named)[0]
    assert bench.table(named).row_count == 3


def test_the_verdict(report: bench.Report) -> None:
    rows = [row(batch=batch, runner=name, median=ms / 1e3) for batch, name, ms in (
        (1, "vae_export", 1.0), (1, "vae_export fp16", 2.0), (1, "a", 4.0), (1, "b", 5.0),
        (8, "vae_export", 4.0), (8, "a", 4.0), (9, "a", 1.0),
    )]  # fmt: skip
    assert bench.verdict(dataclasses.replace(report, rows=tuple(rows), bundle="m")) == (
        "m: vae_export is 2.00 times as fast as the fastest other runner (geometric mean of 2 cells; 1.00 to 4.00)"
    )
    alone = bench.verdict(dataclasses.replace(report, rows=tuple(rows[:2]), bundle="m"))
    assert alone == "m: no cell has both vae_export and another runner"


def test_the_plot(report: bench.Report, tmp_path: Path) -> None:
    bench.plot(report, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert min(picture.size) > 300
        assert np.asarray(picture.convert("L")).std() > 5
    with pytest.raises(InputError, match=r"bench: the plot's path is .*p\.svg; expected a name that ends in \.png"):
        bench.plot(report, tmp_path / "p.svg")
    with pytest.raises(InputError, match=r"bench: there is no row to draw\. Time a runner that this machine has"):
        bench.plot(dataclasses.replace(report, rows=()), tmp_path / "q.png")
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_memory(member: Callable[..., Any]) -> None:
    path = member("mlp-gaussian").bundle
    with bench.candidates(path, threads=1) as selection:
        runners = selection.runners[:1]
        report = timed(alone(path, *runners), ["encode", "decode"], [2], memory=True)
        assert 1 << 20 < report.runners[0]["memory_bytes"] < 1 << 30
        assert any(line.startswith("memory: vae_export ") for line in bench.summary(report))
        runners[0].recipe = dataclasses.replace(runners[0].recipe, bundle="gone")
        with pytest.raises(
            BackendError, match=r"the process that measures the memory of vae_export failed: .*gone does not exist"
        ):
            memory.peak(runners[0], ["encode"], 1, {})
        with pytest.raises(BackendError, match="memory is read from /proc, which this system does not have"):
            memory.check(runners, Path("/gone"))


def test_cases_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exports: list[Path] = []

    def export(source: Any, path: Path, rows: int) -> None:
        path.mkdir()
        exports.append(path)

    monkeypatch.setattr(exporter, "export_trained", export)
    (tmp_path / "tiny.part").mkdir()  # of a run that was stopped
    for _ in range(2):
        made = cases.make(cases.Case({"model": "mlp", "likelihood": "bernoulli", "widths": (8,)}), tmp_path)
        assert made.bundle == tmp_path / "mlp-bernoulli-_8_.bundle"
        made = cases.make(cases.Case(diffusers="tiny"), tmp_path)
        assert made.source == tmp_path / "tiny"
        assert (made.source / "config.json").is_file()
    assert len(exports) == len(set(exports)) == 2


def test_performance_is_recorded_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = cases.Case(
        {"model": "mlp", "likelihood": "bernoulli", "widths": (8,)},
        batches=(1, 2),
        builds={name: {"precision": name} for name in ("fp32", "fp8")},
    )
    scaling = {"batch": (dataclasses.replace(case, batches=(1, 64, 1024)),)}
    plan = cases.Plan({"small": case, "again": case}, ("small",), scaling, QUICK_PEERS)
    out = tmp_path / "out.json"
    arguments = [str(out), "--seconds", str(SECONDS), "--work", str(tmp_path / "work")]
    performance.main([*arguments, "small"], plan)
    first = json.loads(out.read_text())
    assert list(first["cases"]) == ["small"]
    performance.main([*arguments, "--resume"], plan)
    found = json.loads(out.read_text())
    assert found["cases"]["small"] == first["cases"]["small"]
    assert "small" in found["cases"]
    assert "again" in found["cases"]
    absent = [one for one in found["cases"]["small"]["absent"] if one["runner"] == "vae_export fp8"]
    assert "precision is 'fp8'" in absent[0]["reason"]
    for cell in found["cases"]["small"]["cells"]:
        assert set(cell["ours"]) == {"vae_export fp32"}
        ratio = cell["ours"]["vae_export fp32"]["median_us"] / cell["float32"]["median_us"]
        assert cell["float32"]["ours_to_it"] == {"vae_export fp32": pytest.approx(ratio)}
    assert set(found["means"]) == {"decode", "encode"}
    (counted,) = found["cases"]["small"]["multiplications"].values()
    assert counted["decode"] == {"direct": 8 * 5 + 64 * 8, "ours": 8 * 5 + 64 * 8, "ceiling": 1.0}
    rows = found["twice"]["small"]["rows"]
    assert {(row["graph"], row["batch"]) for row in rows} >= {("encoder", 1), ("decoder", 2)}
    assert not any(row.get("difference") for row in rows if row["same"])
    exponents = found["scaling"]["batch"]["exponents"]
    assert all(-0.5 < value < 1.5 for of_verb in exponents.values() for value in of_verb.values())
    for table, rows in ((tables.performance, 2 * 2 * 2), (tables.means, 2), (tables.growth, 2), (tables.twice, 1)):
        lines = table(found)
        assert len(lines) == 2 + rows
        assert all(line.count("|") == lines[0].count("|") for line in lines)
    tables.picture(found, "small", tmp_path / "small.png")
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        performance.main([*arguments, "unknown"], plan)
    assert "there is no case 'unknown'; expected small, again, twice, scaling" in capsys.readouterr().err


def test_exponents_and_means() -> None:
    rows = [
        {"verb": "decode", "runner": runner, "multiply_adds": work, "median_us": factor * work**power}
        for runner, factor, power in (("a", 2.0, 1.0), ("b", 0.1, 0.5))
        for work in (10, 100, 1000)
    ]
    rows.append({"verb": "encode", "runner": "a", "multiply_adds": 10, "median_us": 1.0})
    rows.append({"verb": "encode", "runner": "b", "multiply_adds": None, "median_us": 1.0})
    found = performance.exponents(rows)
    assert found == {"decode": {"a": pytest.approx(1.0), "b": pytest.approx(0.5)}, "encode": {}}
    cells = [
        {"verb": "decode", "float32": {"ours_to_it": {"a": ratio}}, "low_precision": {"ours_to_it": {"a": 2.0}}}
        for ratio in (0.5, 2.0)
    ]
    expected = {"float32": {"a": pytest.approx(1.0)}, "low_precision": {"a": pytest.approx(2.0)}}
    assert performance.means(cells) == {"decode": expected}
    assert math.isclose(performance.means(cells[:1])["decode"]["float32"]["a"], 0.5)


def test_the_cases_are_of_the_size_they_are_said_to_be() -> None:
    from vae_export.sources import cost

    decoder = cost.count(zoo.trainer_model(**cases.CASES["conv64"].options))["decoder"].at({})[0]
    assert 2 * decoder == pytest.approx(210e6, rel=0.05)
    assert set(cases.LATENCY) <= set(cases.CASES)
