"""The fastest way to run a bundle on this machine's CPU, and the settings of the search for it."""

from __future__ import annotations

from dataclasses import dataclass

from vae_export.contract.choices import Precision
from vae_export.contract.targets import Runner


@dataclass(frozen=True)
class SearchSettings:
    """What is tried, for how long it is timed, and when a difference counts.

    Attributes:
        seconds: of timing for each candidate, graph and batch size.
        runners: that may be tried, where they are installed.
        precisions: that `auto` tries, from the most exact on.
        rows: golden examples on which graphs in reduced precision are evaluated; all, where float32 is quick on these.
        share: what a graph in reduced precision, alone, may use of its tolerance where float32 is there to fall back
            on: encoder and decoder share the tolerance of the whole. A precision that was asked for may use all of it.
        max_slowdown: a candidate whose first calls all take this many times as long as the fastest's is not timed.
        min_gain: a reduced precision must save this share of float32's time, and more than the measurement's noise.
        max_call_seconds: no batch size is timed whose call would take longer.
        max_fusable_seconds: where one call of encoder and decoder together takes longer, no graphs are fused: each
            would hold the weights once more, to save a millisecond.
        max_fused_ratio: a fused graph is dropped if it takes more than this many times as long as its parts.
    """

    seconds: float = 0.5
    runners: tuple[Runner, ...] = ("onnxruntime", "openvino")
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "int8")
    rows: int = 24
    share: float = 0.5
    max_slowdown: float = 2.0
    min_gain: float = 0.05
    max_call_seconds: float = 8.0
    max_fusable_seconds: float = 0.25
    max_fused_ratio: float = 1.02
