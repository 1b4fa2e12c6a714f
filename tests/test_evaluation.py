"""Graphs in reduced precision against tolerances, on the CPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from vae_export.building import contents
from vae_export.building.contents import Contents
from vae_export.building.evaluation import Evaluator, one_line, within
from vae_export.certification.certificate import Check
from vae_export.contract import build_record
from vae_export.contract.bundle import Bundle
from vae_export.errors import BackendError
from vae_export.progress import silent
from vae_export.runtimes.backend import planned


@pytest.fixture(scope="module")
def inputs(member: Callable[[str], Any]) -> Contents:
    return contents.read(Bundle(member("conv-bernoulli").bundle))


@pytest.mark.parametrize(
    ("measured", "tolerance", "at_least", "share", "expected"),
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
    measured: float, tolerance: float | None, at_least: bool, share: float, expected: bool
) -> None:
    check = Check(
        id="a.b.c", graph="decoder", quantity="q", unit="u", measured=measured, tolerance=tolerance, at_least=at_least
    )
    assert within(check, share) == expected


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


def test_the_certificate_is_headed_by_what_runs(inputs: Contents) -> None:
    full = {graph: [planned(raw)] for graph, raw in inputs.graphs.items()}
    low = full | {"decoder": [*full["decoder"], planned(inputs.graphs["decoder"], precision="int8")]}
    for graphs, budget, expected in (
        (full, "int8", "float32"),
        (low, "int8", "encoder float32, decoder int8"),
        (low, "fp16", "encoder float32, decoder float16"),
        (low, None, "encoder float32, decoder int8"),
    ):
        assert Evaluator(inputs, inputs.graphs, 24, budget, silent).certificate(graphs).precision == expected


def test_however_few_golden_rows_there_are(inputs: Contents) -> None:
    """A large picture leaves room for fewer of them than the batch at which graphs are evaluated."""
    few = dataclasses.replace(inputs, reference=inputs.reference.first(1))
    assert few.reference.record.examples < 8
    assert Evaluator(few, few.graphs, 24, None, silent).problem("decoder", planned(few.graphs["decoder"])) is None


def test_a_problem_is_told_with_its_share_or_its_reason(inputs: Contents) -> None:
    evaluator = Evaluator(inputs, inputs.graphs, 24, None, silent)
    decoder = planned(inputs.graphs["decoder"])
    found = evaluator.problem("decoder", decoder, share=1e-9)  # the graph is in float32: it passes, and uses something
    assert found is not None
    assert found.startswith(("encoder: ", "decoder: ", "end to end: "))
    assert found.endswith("], of which this graph alone may use 1e-09")
    swapped = evaluator.problem("decoder", planned(inputs.graphs["encoder"]))
    assert swapped is not None
    assert "\n" not in swapped
    assert one_line(BackendError("needs a\nRun: b")) == "needs a Run: b"
