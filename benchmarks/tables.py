"""The tables of README.md and docs/training.md, made from the recorded results; tests compare them.

    python benchmarks/tables.py

prints them all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def trainer() -> list[str]:
    """The trainer's figures, but for the two kinds that only guard others."""
    lines = ["| figure | measured | bound |", "|---|---|---|"]
    for figure in _read("trainer-cpu.json")["figures"]:
        if not figure["figure"].startswith(("…", "linear, training set: ELBO above")):
            bound = "" if figure["bound"] is None else f"{figure['bound']:.3g}"
            lines.append(f"| {figure['figure']} | {figure['measured']:.3g} | {bound} |")
    return lines


def throughput() -> list[str]:
    """Training speed, ours beside the others'."""
    rows = _read("training-cpu.json")["rows"]
    others = list(rows[0]["ours_to"])
    lines = [f"| case | vae_export | {' | '.join(others)} |", "|---|---|" + "---|" * len(others)]
    for row in rows:
        cells = [f"{row['images_per_second']['ours']['training']['median']:,.0f}"]
        for name in others:
            speed, ratio = row["images_per_second"][name]["training"], row["ours_to"][name]["training"]
            cells.append(f"{speed['median']:,.0f} ({ratio['median']:.2f})")
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return lines


def recipes() -> list[str]:
    """What the recipes give and how long they take."""
    lines = ["| what | options of `vae-export train OUT` | on the test data | takes |", "|---|---|---|---|"]
    for recipe in _read("recipes-cpu.json")["recipes"]:
        result = recipe["result"]
        figures = f"squared error {result['squared_error']:.2f}"
        if result["elbo"] is not None:
            figures = f"ELBO {result['elbo']:.2f}, KL {result['kl']:.2f}, log p(x) ≥ {result['log_likelihood']:.2f}"
        if result["bits_per_dimension"] is not None:
            figures += f", {result['bits_per_dimension']:.3f} bits per dimension"
        options = f"`{recipe['options']}`" if recipe["options"] else "none"
        figures += f"; {result['active_units']} active latents"
        lines.append(f"| {recipe['recipe']} | {options} | {figures} | {recipe['seconds']:.0f} s |")
    return lines


def sources() -> list[str]:
    """What is promised of models from elsewhere, each with its bound."""
    found = _read("sources-cpu.json")
    zoo, full, memory = found["zoo"], found["full"], found["memory"]
    worst = max(found["tiles"].values(), key=lambda case: case["difference"])
    their, our = worst["diffusers to float64"], worst["ours to float64"]
    passed = sum(member["passed"] for member in zoo.values())
    return [
        "| figure | measured | bound |",
        "|---|---|---|",
        f"| members of the zoo whose certificate in float32 passes | {passed} of {len(zoo)} | all |",
        f"| AutoencoderKL, 4 kinds, 3 other sizes, batches 1 and 3, against diffusers, of the output's range | "
        f"{max(found['sizes'].values()):.1e} | 5e-05 |",
        f"| tiled against diffusers' tiled, same tile and overlap, of the output's range | "
        f"{max(case['difference'] for case in found['tiles'].values()):.1e} | 1e-05 |",
        f"| … there, diffusers in float32 against itself in float64, and ours | {their:.1e}; {our:.1e} |  |",
        f"| peak memory, 2048² in tiles of 512 ÷ 512² untiled, outputs apart "
        f"({memory['2048 in tiles of 512']['without_output_mib']:.0f} and "
        f"{memory['512 untiled']['without_output_mib']:.0f} MiB) | {memory['ratio_without_outputs']:.2f} | 1.5 |",
        f"| {full['parameters']:,} parameters: export, and verify, at 64² | {full['export']['seconds']:.0f} s, "
        f"{full['verify']['seconds']:.0f} s | 300 s |",
        f"| the most memory of the two | {full['verify']['peak_gib']:.1f} GiB | 6 GiB |",
    ]


def performance(record: dict[str, Any]) -> list[str]:
    """Time of a call, ours beside the fastest peers, from a record of `performance.py`.

    Ratios are ours to the peer: below 1 we are faster. In float32 it is our fastest in float32, below it our fastest
    of all. The last lines are geometric means over all cases and batches.
    """
    lines = [
        "| case | verb | batch | vae_export, ms | fastest float32 peer, ms | ratio | fastest below, ms | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in record["cases"].items():
        for cell in case["cells"]:
            ours = cell["ours"]
            shown = (f"{_short(runner)} {found['median_us'] / 1e3:.3g}" for runner, found in ours.items())
            cells = [name, cell["verb"], str(cell["batch"]), ", ".join(shown)]
            exact = [runner for runner, found in ours.items() if found["precision"] == "fp32"]
            for kind, allowed in (("float32", exact), ("low_precision", list(ours))):
                peer = cell.get(kind)
                if peer and allowed:
                    ratio = min(peer["ours_to_it"][runner] for runner in allowed)
                    cells += [f"{peer['peer']} {peer['median_us'] / 1e3:.3g}", f"{ratio:.2f}"]
                else:
                    cells += ["", ""]
            lines.append(f"| {' | '.join(cells)} |")
    for verb, kinds in record["means"].items():
        first, second = (
            ", ".join(f"{_short(runner)} {ratio:.2f}" for runner, ratio in kinds[kind].items())
            for kind in ("float32", "low_precision")
        )
        lines.append(f"| geometric mean | {verb} |  |  |  | {first} |  | {second} |")
    return lines


def _short(runner: str) -> str:
    """The build's precision, or what stands for the bundle's own graphs."""
    return runner.removeprefix("vae_export").strip() or "bundle"


def _read(name: str) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return plain


if __name__ == "__main__":
    for table in (trainer, throughput, recipes, sources):
        print("\n".join(table()), end="\n\n")
