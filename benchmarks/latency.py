"""Record the latency table of the README: all cases, runtimes in turns.

make record
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import zoo
from cases import BATCHES, MODELS, RUNTIMES
from machine import machine

import vae_export
from vae_export import bench


def main(out: Path) -> None:
    """Time all, print Markdown and write `out`."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, options in MODELS.items():
            source, path = zoo.trainer_model(**options), Path(folder, f"{name}.bundle")
            vae_export.export(source, path)
            runners = [bench.Eager(source.module), *bench.candidates(path)]
            rows += [{"model": name, **row} for row in bench.run(path, runners, BATCHES)]
    out.write_text(json.dumps({**machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print("| model | verb | batch |", " | ".join(RUNTIMES), "|")
    print("|---|---|---|" + "---|" * len(RUNTIMES))
    for case in dict.fromkeys((row["model"], row["verb"], row["batch"]) for row in rows):
        cells = {r["runtime"]: r for r in rows if (r["model"], r["verb"], r["batch"]) == case}
        print("|", *(f"{part} |" for part in case), *(f"{cells[name]['median_us']:.1f} |" for name in RUNTIMES))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
