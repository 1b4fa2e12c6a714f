"""The tables of README.md, docs/training.md and docs/performance.md, from the recorded results; tests compare them.

    python benchmarks/tables.py

prints them all, and draws docs/images/speed.png.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vae_export import bench

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
    """Time of a call, ours beside the fastest peers: how many times as fast ours is; from a performance record.

    In float32 ours is the build in float32; below it, the build `auto`, beside the fastest peer in float32 and the
    fastest of those below.
    """
    lines = [
        "| model | verb | batch | fp32, ms | fastest float32 peer, ms | times | ceiling | relative to NumPy "
        "| auto, ms | times | fastest bf16 peer, ms | times |",
        f"|{'---|' * 12}",
    ]
    for name, case in record["cases"].items():
        rows = {(row["verb"], row["batch"], row["runner"]): row for row in case["rows"]}
        for cell in case["cells"]:
            ceiling = case["multiplications"]["fp32"][cell["verb"]]["ceiling"]
            shown = [name, cell["verb"], str(cell["batch"])]
            exact, auto = cell["ours"].get(_EXACT), cell["ours"].get(_AUTO)
            if exact:
                share = rows[cell["verb"], cell["batch"], _EXACT]["share_of_roof"]
                shown += [_ms(exact["median_us"]), *_beside(cell["float32"], _EXACT)]
                shown += [f"{ceiling:.2f}", f"{share:.0%}"]
            if auto:
                shown += [_ms(auto["median_us"]), _beside(cell["float32"], _AUTO)[1]]
                shown += _beside(cell["low_precision"], _AUTO) if "low_precision" in cell else []
            lines.append(f"| {' | '.join([*shown, *[''] * (12 - len(shown))])} |")
    return lines


def means(record: dict[str, Any]) -> list[str]:
    """Geometric means of the table above over all cells of a verb."""
    lines = ["| verb | build | times the fastest float32 peer | times the fastest bf16 peer |", "|---|---|---|---|"]
    for verb, kinds in record["means"].items():
        for build in kinds["float32"]:
            low = f"{1 / kinds['low_precision'][build]:.2f}" if build == _AUTO else ""
            lines.append(f"| {verb} | {build.split()[-1]} | {1 / kinds['float32'][build]:.2f} | {low} |")
    return lines


def growth(record: dict[str, Any]) -> list[str]:
    """The exponents of time against work."""
    found = record["scaling"]
    runners = list(next(iter(found.values()))["exponents"]["decode"])
    lines = [f"| along | verb | {' | '.join(runners)} |", f"|---|---|{'---|' * len(runners)}"]
    for axis, scaled in found.items():
        for verb, exponents in scaled["exponents"].items():
            shown = (f"{exponents[runner]:.2f}" if runner in exponents else "" for runner in runners)
            lines.append(f"| {axis} | {verb} | {' | '.join(shown)} |")
    return lines


def twice(record: dict[str, Any]) -> list[str]:
    """Whether two builds choose alike."""
    lines = ["| model | choices | the same in both | where not, second to first, at most |", "|---|---|---|---|"]
    for name, found in record["twice"].items():
        same = sum(row["same"] for row in found["rows"])
        apart = [row["difference"] for row in found["rows"] if not row["same"] and "difference" in row]
        lines.append(f"| {name} | {len(found['rows'])} | {same} | {f'{max(apart):+.1%}' if apart else ''} |")
    return lines


def passes() -> list[str]:
    """What passes buy: time as a share of the bundle's own graph's on the same runner."""
    rows = _read("passes-cpu.json")["rows"]
    choices = list(dict.fromkeys(row["passes"] for row in rows if row["passes"] != "none"))
    lines = [f"| graph | batch | runner | as it is, ms | {' | '.join(choices)} |", f"|{'---|' * (4 + len(choices))}"]
    for place in dict.fromkeys((row["case"], row["graph"], row["batch"], row["runner"]) for row in rows):
        here = {
            r["passes"]: r for r in rows if (r["case"], r["graph"], r["batch"], r["runner"]) == place
        }  # fmt: skip
        shown = [f"{here[c]['share_of_none']:.2f}" if c in here else "" for c in choices]
        case, graph, batch, runner = place
        alone = _ms(here["none"]["median_us"])
        lines.append(f"| {case} {graph} | {batch} | {runner} | {alone} | {' | '.join(shown)} |")
    return lines


def overhead() -> list[str]:
    """What a call costs beside the bare session's."""
    lines = ["| verb | bare session, µs | vae_export, µs | difference, µs | bound |", "|---|---|---|---|---|"]
    for row in _read("overhead-cpu.json")["rows"]:
        bound = "" if row["bound_us"] is None else f"{row['bound_us']:g}"
        figures = (f"{row[name]:.1f}" for name in ("bare_us", "ours_us", "overhead_us"))
        lines.append(f"| {row['verb']} | {' | '.join(figures)} | {bound} |")
    return lines


def picture(record: dict[str, Any], case: str, path: Path) -> None:
    """Draw a case of a performance record: latency against batch."""
    bench.plot(bench.Report.of(record["cases"][case]), path)


_EXACT, _AUTO = "vae_export fp32", "vae_export auto"


def _ms(microseconds: float) -> str:
    """Milliseconds in three digits or more."""
    return f"{microseconds / 1e3:,.0f}" if microseconds >= 1e5 else f"{microseconds / 1e3:.3g}"


def _beside(peer: dict[str, Any], ours: str) -> list[str]:
    """A peer with its time, and how many times as fast we are."""
    return [f"{peer['peer']} {_ms(peer['median_us'])}", f"{1 / peer['ours_to_it'][ours]:.2f}"]


def _read(name: str) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return plain


if __name__ == "__main__":
    for table in (trainer, throughput, recipes, sources, passes, overhead):
        print("\n".join(table()), end="\n\n")
    speed = _read("performance-cpu.json")
    for of in (performance, means, growth, twice):
        print("\n".join(of(speed)), end="\n\n")
    picture(speed, "conv64", Path(__file__).parents[1] / "docs" / "images" / "speed.png")
