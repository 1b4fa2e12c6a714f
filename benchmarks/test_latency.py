"""Latency of encode, decode and sample: our runtime beside the alternatives of a user.

The cases are data: model × verb × batch × runtime. `pytest-benchmark` warms up and repeats; the result is
checked after timing. Runtimes of one case run one after the other: for a comparison in turns, which a noisy
machine needs, see `vae-export bench`.
"""

from __future__ import annotations

import pytest
from cases import BATCHES, LATENCY, RUNNERS, VERBS
from pytest_benchmark.fixture import BenchmarkFixture

from vae_export import bench


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("model", LATENCY)
def test_latency(
    benchmark: BenchmarkFixture,
    opened: dict[str, tuple[bench.Examples, dict[str, bench.Runner]]],
    model: str,
    verb: str,
    batch: int,
    name: str,
) -> None:
    examples, runners = opened[model]
    cell, runner = examples.cell(verb, batch), runners[name]
    benchmark.group = f"{model}: {verb}, batch {batch}"
    result = benchmark(runner.prepare(cell))
    cell.check(runner.results(verb, result), name, precision=runner.precision, addressed=runner.addressed)
