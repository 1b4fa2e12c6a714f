"""What is read out of PyTorch's messages about a trace that failed."""

from __future__ import annotations

import pytest

from vae_export.exporting import tracing

NAMED = {0: "batch", 2: "height/2", 3: "width"}
HINT = "- Received user-specified dim hint Dim.DYNAMIC(min=None, max=None), but tracing inferred a static shape of "


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (
            "Found the following conflicts between user-specified ranges and inferred ranges from model tracing:\n"
            f"{HINT}8 for dimension inputs['x'].shape[2].\n{HINT}4 for dimension inputs['x'].shape[1].",
            {"height/2": "was taken for the number 8"},
        ),
        (
            "Constraints violated (batch)! For more information, run with TORCH_LOGS\n  - You marked batch as dynamic "
            "but your code specialized it to be a constant (3). Either remove the mark",
            {"batch": "was taken for the number 3"},
        ),
        (
            "Constraints violated (height_2, width)!\n\nSuggested fixes:\n  _height_2 = Dim('_height_2')\n"
            "  height_2 = 8*_height_2\n  width = 12\n",
            {"height/2": "must be 8 * height_2", "width": "was taken for the number 12"},
        ),
        ("only 4D query, key, and value are supported", {}),
    ],
)
def test_baked_dimensions(said: str, found: dict[str, str]) -> None:
    assert tracing.baked_dimensions(said, NAMED) == found


def test_first_lines_go_on_behind_a_colon() -> None:
    assert tracing._first_lines("Found conflicts:\n- of x\ndef forward") == "Found conflicts: - of x"
    assert tracing._first_lines("One\ntwo") == "One"
