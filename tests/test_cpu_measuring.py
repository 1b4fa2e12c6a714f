"""Timing in turns, and comparing results."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from quick import QUICK, times

from vae_export import timing
from vae_export.building import contents
from vae_export.building.cpu import SearchSettings
from vae_export.building.cpu.measuring import Measuring, max_difference, time_calls
from vae_export.contract.bundle import Bundle
from vae_export.runtimes import processor


def fake(monkeypatch: pytest.MonkeyPatch, first: dict[str, list[float]], median: dict[str, float]) -> list[list[str]]:
    """Calls by name that take so long at first, and then so long in turns; returns the names of each measurement."""
    measured: list[list[str]] = []

    def measure(calls: Any, seconds: float, fewest: int) -> dict[str, timing.Times]:
        measured.append(list(calls))
        return {name: times(median[name]) for name in calls}

    monkeypatch.setattr(timing, "once", lambda call: first[call()].pop(0))
    monkeypatch.setattr(timing, "measure", measure)
    return measured


def calls(*names: str) -> dict[str, Callable[[], str]]:
    return {name: lambda name=name: name for name in names}


def test_nothing_is_dropped_on_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slow call of three is chance; three of three are not."""
    first = {"a": [1.0, 1.0, 1.0], "b": [9.0, 9.0, 1.1], "c": [9.0, 9.0, 9.0]}
    measured = fake(monkeypatch, first, {"a": 1.0, "b": 2.0})
    found = time_calls(lambda threads: calls("a", "b", "c"), QUICK)
    assert (found["a"], found["b"]) == (times(1.0), times(2.0))
    assert found["c"] == "its first 3 calls took 9.0 times as long as the fastest candidate's"
    assert measured == [["a", "b"]]
    first.update(a=[1.0] * 3, b=[1.0] * 3, c=[9.0] * 3)
    fake(monkeypatch, first, dict.fromkeys("abc", 1.0))
    assert time_calls(lambda threads: calls("a", "b", "c"), SearchSettings(max_slowdown=10.0))["c"] == times(1.0)


def test_close_calls_are_measured_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = fake(monkeypatch, {name: [1.0] * 3 for name in "abc"}, {"a": 1.0, "b": 1.1, "c": 1.3})
    time_calls(lambda threads: calls("a", "b", "c"), QUICK)
    assert measured == [["a", "b", "c"], ["a", "b"]]


@pytest.mark.parametrize(("seconds", "expected"), [(1e-3, [None, 1]), (3e-3, [None])])
def test_short_calls_are_tried_with_one_thread(
    monkeypatch: pytest.MonkeyPatch, seconds: float, expected: list[int | None]
) -> None:
    names = {None: "several", 1: "one"}
    fake(monkeypatch, {name: [seconds] * 3 for name in names.values()}, dict.fromkeys(names.values(), seconds))
    started: list[int | None] = []

    def start(threads: int | None) -> dict[str, Callable[[], str]]:
        started.append(threads)
        return calls(names[threads])

    assert list(time_calls(start, QUICK)) == [names[threads] for threads in expected]
    assert started == expected


@pytest.mark.parametrize(
    ("dynamic", "static", "expected"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.5, -4.0], 0.125),
        ([1.0, -4.0], [math.nan, -4.0], math.nan),
        (np.array([10, 200], np.uint8), np.array([11, 199], np.uint8), 0.0),  # one level is rounding
        (np.array([10, 200], np.uint8), np.array([10, 203], np.uint8), 0.01),
    ],
)
def test_the_difference_between_results(dynamic: Any, static: Any, expected: float) -> None:
    zeros = np.zeros(2)
    found = max_difference([zeros, np.asarray(dynamic)], [zeros, np.asarray(static)])
    assert found == pytest.approx(expected, nan_ok=True)


def test_inputs_fill_the_size_that_is_measured(member: Callable[[str], Any]) -> None:
    inputs = contents.read(Bundle(member("spatial-named").bundle))
    sizes = {"height": 40, "width": 8}
    made = Measuring(inputs, [1], sizes, QUICK).inputs("reconstruct", 300)
    assert made["x"].shape == (300, 3, 40, 8)
    assert made["eps"].shape == (300, *inputs.model.latent_shape(sizes))
    assert np.isfinite(made["x"]).all()
    assert made["x"].std() > 0
    assert math.isclose(float(made["eps"].std()), 1.0, abs_tol=0.1)


def test_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "share", lambda processors: 0.1)
    assert str(timing.busy(2)).startswith("the machine is busy: of 2 processors this process gets 10%")
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
