"""Latency of encode, decode and sample: our runtime beside what else a user could pick.

The cases are data: model × verb × batch × runtime. `pytest-benchmark` warms up and repeats; the result is
checked after timing. Runtimes of one case run one after the other: for a comparison in turns, which a noisy
machine needs, see `vae-export bench`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import BATCHES, MODELS, RUNTIMES
from pytest_benchmark.fixture import BenchmarkFixture

from vae_export import bench


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("verb", bench.VERBS)
@pytest.mark.parametrize("model", MODELS)
def test_latency(
    benchmark: BenchmarkFixture,
    runners: dict[str, tuple[Path, dict[str, bench.Candidate]]],
    model: str,
    verb: str,
    batch: int,
    runtime: str,
) -> None:
    path, candidates = runners[model]
    value, expected = bench.inputs(path, verb, batch)
    benchmark.group = f"{model}: {verb}, batch {batch}"
    result = benchmark(candidates[runtime].prepare(verb, value))
    candidates[runtime].check(verb, result, expected)
