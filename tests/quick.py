"""Settings of builds for the CPU in tests, and times that do not depend on the machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from vae_export import timing
from vae_export.building.cpu import SearchSettings

#: What is fastest does not matter to most tests, and fused graphs are there whether they are fast or not.
QUICK = SearchSettings(seconds=0.01, max_fused_ratio=math.inf)
#: No candidate is left out because its first calls were slow.
PATIENT = SearchSettings(seconds=0.01, max_fused_ratio=math.inf, max_slowdown=math.inf)


def times(median: float, spread: float = 0.0) -> timing.Times:
    return timing.Times(median, median, median, median, median, spread, 9, 3)


def measured_as(milliseconds: Mapping[str, float]) -> Callable[..., dict[str, timing.Times]]:
    """In place of `timing.measure`: calls take so long by the precision in their names; others take 1 ms."""

    def measure(calls: Mapping[str, Any], *_: Any) -> dict[str, timing.Times]:
        found = {name: [each for kind, each in milliseconds.items() if f" in {kind}" in name] for name in calls}
        return {name: times(1e-3 * (each[0] if each else 1.0)) for name, each in found.items()}

    return measure
