"""Models to time, and the machine in every result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from cases import CASES, LATENCY, make
from machine import machine

from vae_export import bench
from vae_export.contract.bundle import Bundle


@pytest.fixture(scope="session")
def opened(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, tuple[bench.Examples, dict[str, bench.Runner]]]]:
    """For each model its examples and its runners by name."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    with ExitStack() as stack:
        for name in LATENCY:
            made = make(CASES[name], folder)
            selection = stack.enter_context(bench.candidates(made.bundle, source=made.source, peers=bench.PEERS))
            runners = {runner.name: runner for runner in selection.runners}
            found[name] = (bench.Examples(Bundle(made.bundle)), runners)
        yield found


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The facts of our own records, without the machine's name."""
    machine_info.pop("node", None)
    machine_info.update(machine())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep the statistics, not every single time."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
