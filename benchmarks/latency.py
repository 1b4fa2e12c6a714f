"""Record the latency table of the README: its cases, runners in turns.

make record
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import BATCHES, CASES, LATENCY, RUNNERS, VERBS, make
from machine import machine

from vae_export import bench


def main(out: Path) -> None:
    """Time every case, print Markdown and write `out`."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in LATENCY:
            made = make(CASES[name], Path(folder))
            with bench.candidates(made.bundle, source=made.source, peers=bench.PEERS) as selection:
                by_name = {runner.name: runner for runner in selection.runners}
                chosen = replace(selection, runners=[by_name[runner] for runner in RUNNERS], absent=[])
                report = bench.run(chosen, VERBS, BATCHES, seconds=1.0)
            rows += [{"model": name, **row} for row in report.to_dict()["rows"]]
    out.write_text(json.dumps({**machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print("| model | verb | batch |", " | ".join(RUNNERS), "|")
    print("|---|---|---|" + "---|" * len(RUNNERS))
    for case in dict.fromkeys((row["model"], row["verb"], row["batch"]) for row in rows):
        cells = {r["runner"]: r for r in rows if (r["model"], r["verb"], r["batch"]) == case}
        print("|", *(f"{part} |" for part in case), *(f"{cells[name]['median_us']:.1f} |" for name in RUNNERS))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
