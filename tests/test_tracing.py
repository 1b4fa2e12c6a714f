"""Dimensions and summaries in PyTorch's messages about a trace that failed."""

from __future__ import annotations

import pytest

from vae_export.exporting import sizes

pytestmark = pytest.mark.quick

NAMED = {0: "batch", 2: "height/2", 3: "width"}
HINT = "- Received user-specified dim hint Dim.DYNAMIC(min=None, max=None), but tracing inferred a static shape of "


@pytest.mark.parametrize(
    ("messages", "baked"),
    [
        (
            "Found the following conflicts between user-specified ranges and inferred ranges from model tracing:\n"
            f"{HINT}8 for dimension inputs['x'].shape[2].\n{HINT}4 for dimension inputs['x'].shape[1].",
            {"height/2": "became the constant 8"},
        ),
        (
            "Constraints violated (batch)! For more information, run with TORCH_LOGS\n  - You marked batch as dynamic "
            "but your code specialized it to be a constant (3). Either remove the mark",
            {"batch": "became the constant 3"},
        ),
        (
            "Constraints violated (height_2, width)!\n\nSuggested fixes:\n  _height_2 = Dim('_height_2')\n"
            "  height_2 = 8*_height_2\n  width = 12\n",
            {"height/2": "must be 8 * height_2", "width": "became the constant 12"},
        ),
        ("only 4D query, key, and value are supported", {}),
    ],
)
def test_baked_dimensions(messages: str, baked: dict[str, str]) -> None:
    assert sizes.baked_dimensions(messages, NAMED) == baked


def test_first_lines_continue_after_a_colon() -> None:
    assert sizes.first_lines("Found conflicts:\n- of x\ndef forward") == "Found conflicts: - of x"
    assert sizes.first_lines("One\ntwo") == "One"
