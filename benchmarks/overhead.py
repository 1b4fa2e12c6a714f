"""Measure the overhead of a call beside the bare session's on the same graph, at batch 1 and with one thread.

    make overhead

All input checks are on. The runners and verbs take short turns, so that other load on the machine affects all alike:
the figure is the median over turns of the difference of both medians. Prints a table and writes JSON, with
the machine and the versions. Exits with 1 if a bound is not met.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cases
from machine import machine
from rich.console import Console
from rich.table import Table

from vae_export import bench
from vae_export.contract.bundle import Bundle

#: µs by verb. Unlike the bare session, `sample` makes addressed noise.
BOUNDS: dict[str, float | None] = {"decode": 6.0, "encode": None, "sample": None}
TURNS = 1000
CALLS = 40  # a turn takes about a millisecond: shorter than most disturbances
SETTLE = 5


def main(out: Path) -> int:
    """Measure every verb, print the table and write `out`."""
    with tempfile.TemporaryDirectory() as folder:
        path = cases.make(cases.CASES["mlp"], Path(folder)).bundle
        ours, bare = bench.Ours(path, threads=1), bench.Bare(path, threads=1)
        rows = measured(path, ours, bare)
    table = Table("mlp, batch 1, one thread", "bare session, µs", "vae_export, µs", "difference, µs", "bound", "")
    for row in rows:
        shown = ["", ""] if row["bound_us"] is None else [f"{row['bound_us']:g}", "ok" if row["met"] else "MISSED"]
        table.add_row(row["verb"], *(f"{row[name]:.2f}" for name in ("bare_us", "ours_us", "overhead_us")), *shown)
    Console(width=120).print(table)
    out.write_text(json.dumps({**machine(), "turns": TURNS, "calls": CALLS, "rows": rows}, indent=2) + "\n")
    return int(not all(row["met"] for row in rows))


def measured(path: Path, ours: bench.Ours, bare: bench.Bare) -> list[dict[str, Any]]:
    """A row for each verb: medians of both and of their paired differences."""
    examples = bench.Examples(Bundle(path))
    cells = {verb: examples.cell(verb, 1) for verb in BOUNDS}
    calls = {verb: {runner: runner.prepare(cell) for runner in (ours, bare)} for verb, cell in cells.items()}
    times: dict[str, list[tuple[float, float]]] = {verb: [] for verb in BOUNDS}
    for number in range(TURNS):
        order = (ours, bare) if number % 2 else (bare, ours)
        for verb, call in calls.items():
            taken = {runner: turn(call[runner]) for runner in order}
            times[verb].append((taken[ours], taken[bare]))
    rows = []
    for verb, bound in BOUNDS.items():
        for runner, call in calls[verb].items():
            results = runner.results(verb, call())
            cells[verb].check(results, runner.name, precision=runner.precision, addressed=runner.addressed)
        overhead = statistics.median(mine - theirs for mine, theirs in times[verb])
        mine, theirs = map(statistics.median, zip(*times[verb], strict=True))
        row = {"verb": verb, "ours_us": mine, "bare_us": theirs, "overhead_us": overhead, "bound_us": bound}
        rows.append({**row, "met": bound is None or overhead <= bound})
    return rows


def turn(call: bench.Call) -> float:
    """The median of a turn's calls in µs, after a few calls that settle."""
    for _ in range(SETTLE):
        call()
    seconds: list[float] = []
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1e6


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
