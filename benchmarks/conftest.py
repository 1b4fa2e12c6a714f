"""Models to time, and the machine in every result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import zoo
from cases import MODELS
from machine import machine

import vae_export
from vae_export import bench


@pytest.fixture(scope="session")
def runners(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, bench.Candidate]]]:
    """For each model its bundle, and by name all that can run it."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for name, options in MODELS.items():
        source, path = zoo.trainer_model(**options), folder / f"{name}.bundle"
        vae_export.export(source, path)
        candidates = [bench.Eager(source.module), *bench.candidates(path)]
        found[name] = (path, {candidate.name: candidate for candidate in candidates})
    return found


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The same as in our own records, and not the machine's name."""
    machine_info.pop("node", None)
    machine_info.update(machine())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep the statistics, not every single time."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
