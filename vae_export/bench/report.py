"""What a comparison gives: rows, a table, JSON, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vae_export.contract import atomic
from vae_export.errors import InputError, require

_TIMES = ("median", "p10", "p50", "p90", "p99")


@dataclass(frozen=True)
class Absent:
    """A runner that was asked for and has no times.

    Attributes:
        runner: its name.
        reason: in words, with what to do where something can be done.
        verb: the one cell that it lacks; None where it lacks all.
        batch: likewise.
    """

    runner: str
    reason: str
    verb: str | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Row:
    """One runner in one cell. Times are in seconds, of one call.

    Attributes:
        verb: what was called.
        batch: examples in a call.
        runner: its name.
        precision: what it computes in.
        peer: it is one of others'.
        median: see `timing.Times`, as are the following to `turns`.
        p10: percentile of all calls.
        p50: likewise.
        p90: likewise.
        p99: likewise.
        spread: between turns, as a share.
        calls: timed.
        turns: of calls.
        prepare_s: what the shape took before any call, such as OpenVINO's compiling.
        first_call_s: the first call, `torch.compile`'s compiling included.
        multiply_adds: of one call, from the manifest; None where that does not say it.
    """

    verb: str
    batch: int
    runner: str
    precision: str
    peer: bool
    median: float
    p10: float
    p50: float
    p90: float
    p99: float
    spread: float
    calls: int
    turns: int
    prepare_s: float
    first_call_s: float
    multiply_adds: int | None

    @property
    def per_second(self) -> float:
        """Examples each second."""
        return self.batch / self.median

    @property
    def gflops(self) -> float | None:
        """Operations each second, 2 for a multiply-add, in 10^9."""
        return None if self.multiply_adds is None else 2 * self.multiply_adds / self.median / 1e9


@dataclass(frozen=True)
class Report:
    """Everything of one run.

    Attributes:
        bundle: its name.
        sizes: of the data's named dimensions.
        threads: of every call.
        machine: see `roof.machine`.
        roof: the machine's own rates; see `roof.Roof.rates`.
        runners: for each its name, precision and, where they were measured, `open_s` and `memory_bytes`.
        rows: in the order of verbs, batches and runners.
        absent: what has no times, and why.
    """

    bundle: str
    sizes: dict[str, int]
    threads: int
    machine: dict[str, Any]
    roof: dict[str, float]
    runners: tuple[dict[str, Any], ...]
    rows: tuple[Row, ...]
    absent: tuple[Absent, ...]

    def share_of_roof(self, row: Row) -> float | None:
        """A row's rate as a share of the machine's own: of bfloat16 for bf16, where it was measured, else of float32.

        Transforms that need fewer operations than are counted can bring it above 1.
        """
        rate = self.roof["float32_gflops"]
        if row.precision == "bf16":
            rate = self.roof.get("bfloat16_gflops", rate)
        return None if row.gflops is None else row.gflops / rate

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the attributes, with `date` and `versions` beside `machine`.

        A row has its times in µs as `median_us`, `p10_us` and so on, and `per_second`, `gflops` and `share_of_roof`.
        """
        rows = []
        for row in self.rows:
            plain = asdict(row)
            times = {f"{name}_us": plain.pop(name) * 1e6 for name in _TIMES}
            derived = {"per_second": row.per_second, "gflops": row.gflops, "share_of_roof": self.share_of_roof(row)}
            rows.append({**plain, **times, **derived})
        return {
            "bundle": self.bundle,
            "sizes": self.sizes,
            "threads": self.threads,
            **self.machine,
            "roof": self.roof,
            "runners": list(self.runners),
            "rows": rows,
            "absent": [asdict(one) for one in self.absent],
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Report:
        """From what `to_dict` gave, with more beside it or without."""
        names = [field.name for field in fields(Row)]
        rows = [{**row, **{name: row[f"{name}_us"] / 1e6 for name in _TIMES}} for row in plain["rows"]]
        return cls(
            bundle=plain["bundle"],
            sizes=plain["sizes"],
            threads=plain["threads"],
            machine={name: plain[name] for name in ("date", "machine", "versions")},
            roof=plain["roof"],
            runners=tuple(plain["runners"]),
            rows=tuple(Row(**{name: row[name] for name in names}) for row in rows),
            absent=tuple(Absent(**one) for one in plain["absent"]),
        )


def reason(error: Exception) -> str:
    """An error's first line, with its kind where it is not one of ours to read."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if text.startswith("bench") else f"{type(error).__name__}: {text}"


def table(report: Report) -> Table:
    """A line for each verb, batch and runner. `ready s` is what preparing the shape and the first call took."""
    shown = Table(
        title=escape(f"{report.bundle}: time of a call, {report.threads} threads; runners took turns in one run"),
        title_justify="left",
    )
    left = ("verb", "runner")
    headings = ("verb", "batch", "runner", "median µs (p10–p90)", "p99 µs", "spread", "images/s", "GFLOP/s", "of roof")
    for heading in (*headings, "ready s"):
        shown.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    before: tuple[str, int] | None = None
    for row in report.rows:
        cell, share = (row.verb, row.batch), report.share_of_roof(row)
        if before and cell != before:
            shown.add_section()
        shown.add_row(
            *((row.verb, str(row.batch)) if cell != before else ("", "")),
            Text(row.runner),
            f"{row.median * 1e6:,.1f} ({row.p10 * 1e6:,.1f}–{row.p90 * 1e6:,.1f})",
            f"{row.p99 * 1e6:,.1f}",
            f"{row.spread:.1%}",
            f"{row.per_second:,.0f}",
            "" if row.gflops is None else f"{row.gflops:,.1f}",
            "" if share is None else f"{share:.0%}",
            f"{row.prepare_s + row.first_call_s:.2f}",
        )
        before = cell
    return shown


def summary(report: Report) -> list[str]:
    """What stands below the table: the roof, memory, and what is absent and why."""
    roof = report.roof
    products = f"{roof['float32_gflops']:.0f} GFLOP/s in float32"
    if "bfloat16_gflops" in roof:
        products += f", {roof['bfloat16_gflops']:.0f} in bfloat16"
    lines = [f"roof: {products}; copies {roof['copy_gb_per_second']:.1f} GB/s"]
    for fact in report.runners:
        if "memory_bytes" in fact:
            lines.append(f"memory: {fact['runner']} {fact['memory_bytes'] / 2**20:,.0f} MiB")
    cells: dict[tuple[str, str], list[str]] = {}
    for one in report.absent:
        cells.setdefault((one.runner, one.reason), []).append(f"{one.verb} {one.batch}" if one.verb else "")
    for (runner, why), where in cells.items():
        lines.append(f"absent: {', '.join(filter(None, (runner, *where)))}: {why}")
    return lines


def plot(report: Report, path: Path) -> None:
    """Latency against batch, both logarithmic: a panel for each verb, a line for each runner, and the roof's line.

    Raises:
        InputError: the path is no .png, or there is no row to draw.
        BackendError: matplotlib is not installed.
    """
    check_plot(path)
    if not report.rows:
        raise InputError("bench: there is no row to draw. Name a runner that is here")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    verbs = list(dict.fromkeys(row.verb for row in report.rows))
    names = list(dict.fromkeys(row.runner for row in report.rows))
    figure = Figure(figsize=(4.2 * len(verbs) + 2.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(verbs), squeeze=False)[0]
    for panel, verb in zip(panels, verbs, strict=True):
        rows = [row for row in report.rows if row.verb == verb]
        for number, name in enumerate(names):
            own = sorted((row.batch, row.median * 1e3) for row in rows if row.runner == name)
            if own:
                style = "o-" if name.startswith("vae_export") else "s--"
                panel.plot(*zip(*own, strict=True), style, color=f"C{number}", label=name, markersize=4)
        _draw_roof(panel, rows, report.roof["float32_gflops"])
        batches = sorted({row.batch for row in rows})
        panel.set(xscale="log", yscale="log", title=verb, xlabel="batch", ylabel="ms a call")
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    labels = {text: line for panel in panels for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels, loc="outside right center", frameon=False)
    figure.suptitle(f"{report.bundle}, {report.threads} threads")
    FigureCanvasAgg(figure)
    with atomic.atomic_file(path) as stage:
        figure.savefig(stage, format="png", dpi=120)


def check_plot(path: Path) -> None:
    """Refuse, before anything is timed, a place or an environment in which no plot can be made. Errors: as `plot`."""
    if path.suffix.lower() != ".png":
        raise InputError(f"bench: the plot's path is {path}; expected a name that ends in .png")
    require("matplotlib", "train", "bench --plot")


def _draw_roof(panel: Any, rows: Sequence[Row], gflops: float) -> None:
    """What the multiply-adds would take at the machine's own rate."""
    known = sorted({(row.batch, 2 * row.multiply_adds / gflops / 1e6) for row in rows if row.multiply_adds})
    if known:
        panel.plot(*zip(*known, strict=True), ":", color="black", label="roof, float32")
