"""Choosing and refusing over tables of timings: no graph runs here."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest

from vae_export.building.cpu import SearchSettings, choosing
from vae_export.building.cpu.choosing import Timing
from vae_export.certification.certificate import Check
from vae_export.contract.build_record import ExecutionPlan
from vae_export.contract.model import parts_of

pytestmark = pytest.mark.quick

SETTINGS = SearchSettings()
UNTIMED = math.inf


def row(
    precision: Any,
    batch: int = 1,
    median: float = 1.0,
    *,
    graph: str = "decoder",
    candidate: int = 0,
    forms: int = 0,
    spread: float = 0.0,
    runner: Any = "onnxruntime",
    **parts: Any,
) -> Timing:
    """A row of a graph whose parts are in the graph's precision, unless others are named."""
    plan = ExecutionPlan(file="", runner=runner, precision=precision)
    parts = dict.fromkeys(parts_of(graph), precision) | parts
    return Timing(graph, batch, candidate, plan, parts, forms, median, spread)


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
        ([("fp32", 1, UNTIMED), ("fp32", 1, 1.0)], [1]),
        ([("fp32", 1, UNTIMED), ("fp32", 1, UNTIMED)], [0]),  # the fast ones are refused: any other will do
        ([("fp32", 1, 1.0), ("int8", 1, UNTIMED)], [0]),
        ([("fp32", 1, UNTIMED), ("int8", 1, 1.0), ("fp32", 8, 8.0), ("int8", 8, 9.0)], [0, 2]),
    ],
)
def test_the_fastest_is_chosen_in_one_precision(rows: list[tuple[Any, ...]], expected: list[int]) -> None:
    table = [row(*each) for each in rows]
    assert [table.index(one) for one in choosing.choose(table, SETTINGS)] == expected


@pytest.mark.parametrize(
    ("median", "spread", "reason"),
    [
        (0.5, 0.0, None),
        (0.94, 0.0, None),
        (0.97, 0.0, "it is 1.03 times as fast as float32, and only more than 1.05 counts: float32 stays"),
        (1.5, 0.0, "it is 0.67 times as fast as float32, and only more than 1.05 counts: float32 stays"),
        (0.8, 0.6, "it is 1.25 times as fast as float32, and only more than 1.30 counts: float32 stays"),
    ],
)
def test_a_reduced_precision_is_faster_or_not_chosen(median: float, spread: float, reason: str | None) -> None:
    rows = [row("fp32", 1, spread=spread), row("int8", 1, median), row("fp32", 8), row("int8", 8, median)]
    for batches in (rows[:2], rows if not spread else rows[:2]):
        assert choosing.no_gain(batches, "int8", SETTINGS) == reason
        assert {one.plan.precision for one in choosing.choose(batches, SETTINGS)} == {"fp32" if reason else "int8"}
    assert choosing.no_gain(rows, "fp32", SETTINGS) is None
    assert choosing.no_gain(rows[1:2], "int8", SETTINGS) is None  # without float32 there is nothing to compare with
    untimed = dataclasses.replace(rows[1], median=UNTIMED)
    assert "0.50 times as fast" in str(choosing.no_gain([rows[0], untimed], "int8", SETTINGS))


def test_what_counts_as_a_gain_is_a_setting() -> None:
    rows = [row("fp32", median=1.0), row("int8", median=0.97)]
    assert choosing.no_gain(rows, "int8", SearchSettings(min_gain=0.02)) is None
    assert "only more than 2.00 counts" in str(choosing.no_gain(rows, "int8", SearchSettings(min_gain=1.0)))
    untimed = dataclasses.replace(rows[1], median=UNTIMED)
    assert "it is 0.10 times as fast" in str(
        choosing.no_gain([rows[0], untimed], "int8", SearchSettings(max_slowdown=10.0))
    )


def test_a_noisy_measurement_takes_the_first() -> None:
    rows = [row("fp32", candidate=0), row("fp32", median=0.96, spread=0.5, candidate=1), row("fp32", median=2.0)]
    assert choosing.choose(rows, SETTINGS) == [rows[0]]
    # However noisy: what is slower by more than a twentieth is slower.
    assert choosing.choose([row("fp32"), row("fp32", median=0.9, spread=9.0)], SETTINGS)[0].median == 0.9
    table = {"decoder": rows}
    for refused, expected in (
        ({}, rows),
        ({("decoder", 0): "refused"}, rows[1:2]),
        ({("encoder", 0): "refused"}, rows),  # for another graph
    ):
        assert choosing.left(table, "decoder", refused) == expected


def two_precisions(*graphs: str) -> dict[str, list[Timing]]:
    """Two candidates for each graph: 0 in int8, the fastest, and 1 in float32."""
    return {g: [row("int8", median=0.5, graph=g, candidate=0), row("fp32", graph=g, candidate=1)] for g in graphs}


@pytest.mark.parametrize(
    ("graph", "which", "out"),
    [
        ("encoder", "encoder.mean.max", {("encoder", 0)}),
        ("decoder", "decoder.sample.max", {("decoder", 0)}),
        ("decoder", "prior.picture.max", {("generate", 0)}),
        ("end to end", "end_to_end.pixel.max", {("reconstruct", 0)}),
        ("end to end", "elbo.kl.max", {("encoder", 0)}),  # there is no score
    ],
)
def test_who_is_to_blame(graph: Any, which: str, out: set[tuple[str, int]]) -> None:
    """What is out of its tolerance is taken out, and what is not stays."""
    table = two_precisions("encoder", "decoder", "generate", "reconstruct")
    check = Check(id=which, graph=graph, quantity="what", unit="u", measured=2.0, tolerance=1.0)
    chosen = choosing.choose_all(table, {}, SETTINGS)
    assert {rows[0].candidate for rows in chosen.values()} == {0}
    refused = choosing.blame(check, chosen, table)
    assert set(refused) == out
    assert set(refused.values()) == {f"refused: {check}"}
    again = choosing.choose_all(table, refused, SETTINGS)
    for name, rows in again.items():
        # A graph that contains the refused one, or whose parts are in another precision, is out with it.
        assert rows[0].candidate == int(any((part, 0) in refused for part in (name, *parts_of(name))))


def test_the_least_precise_and_most_changed_is_refused_first() -> None:
    check = Check(id="elbo.kl.max", graph="end to end", quantity="q", unit="u", measured=2.0, tolerance=1.0)
    table = {
        "encoder": [row("fp32", graph="encoder", candidate=0, forms=3)],
        "decoder": [row("fp32", candidate=1, forms=1), row("bf16", median=0.5, candidate=2)],
    }
    assert set(choosing.blame(check, choosing.choose_all(table, {}, SETTINGS), table)) == {("decoder", 2)}
    assert set(choosing.blame(check, {**table, "decoder": table["decoder"][:1]}, table)) == {("encoder", 0)}


def test_a_fused_graph_is_refused_for_all_forms_at_once() -> None:
    kinds = [("openvino", "fp32"), ("openvino", "fp32"), ("onnxruntime", "fp32"), ("openvino", "int8")]
    rows = [row(kind, graph="score", candidate=n, runner=runner) for n, (runner, kind) in enumerate(kinds)]
    table = two_precisions("encoder", "decoder") | {"score": rows}
    check = Check(id="elbo.bound.max", graph="end to end", quantity="q", unit="u", measured=2.0, tolerance=1.0)
    refused = choosing.blame(check, {**table, "score": rows[:1]}, table)
    assert set(refused) == {("score", 0), ("score", 1)}


def test_a_fused_graph_is_in_the_precisions_of_its_parts_or_left_out() -> None:
    table = {
        "encoder": [row("fp32", graph="encoder")],
        "decoder": [row("int8")],
        "reconstruct": [
            row("int8", median=0.1, graph="reconstruct", candidate=1),
            row("int8", graph="reconstruct", candidate=2, encoder="fp32"),
        ],
        "score": [row("fp32", graph="score")],
    }
    chosen = choosing.choose_all(table, {}, SETTINGS)
    assert [one.candidate for one in chosen["reconstruct"]] == [2]
    assert "score" not in chosen
    told = dict(map(reversed, choosing.verdicts(table, chosen, {}, {}, SETTINGS)))  # type: ignore[arg-type]
    assert told["the encoder is in fp32"] is table["reconstruct"][0]
    assert told["the decoder is in int8"] is table["score"][0]


def test_every_row_has_a_verdict() -> None:
    table = two_precisions("encoder", "decoder", "generate")
    table["encoder"] += [row("fp32", graph="encoder", candidate=2, median=UNTIMED)]
    table["encoder"][2] = dataclasses.replace(table["encoder"][2], reason="its first 3 calls took 9.0 times as long")
    table["decoder"][0] = dataclasses.replace(table["decoder"][0], median=0.97)
    refused = {("encoder", 0): "refused: why"}
    chosen = choosing.choose_all(table, refused, SETTINGS)
    found = [verdict for _, verdict in choosing.verdicts(table, chosen, refused, {"generate": "lost"}, SETTINGS)]
    slower = "it is 1.03 times as fast as float32, and only more than 1.05 counts: float32 stays"
    assert found == [
        "refused: why", "chosen", "its first 3 calls took 9.0 times as long",
        slower, "chosen",
        "the decoder is in fp32", "lost",
    ]  # fmt: skip


@pytest.mark.parametrize(("module", "works"), [("choosing", True), ("measuring", False)])
def test_choosing_needs_neither_numpy_nor_a_runner(module: str, works: bool) -> None:
    program = (
        "import sys\nfor name in ('numpy', 'onnx', 'onnxruntime', 'openvino'): sys.modules[name] = None\n"
        f"from vae_export.building.cpu import {module}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == works, done.stderr
