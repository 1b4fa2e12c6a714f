"""The report of a comparison: a verdict, a table, JSON, and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vae_export.contract import atomic
from vae_export.errors import InputError, require
from vae_export.timing import Times

_TIMES = ("median", "p10", "p50", "p90", "p99")
#: Columns of a terminal from which on the whole table fits.
FULL_WIDTH = 120


@dataclass(frozen=True)
class Absent:
    """A requested runner without times.

    Attributes:
        runner: its name.
        reason: in words, with what to do where something can be done.
        verb: of the one cell that is missing; None where all are.
        batch: likewise.
    """

    runner: str
    reason: str
    verb: str | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Row:
    """One runner in one cell.

    Attributes:
        verb: one of `VERBS`.
        batch: examples in a call.
        runner: its name.
        precision: that it computes in.
        peer: whether it is other software.
        times: of one call.
        prepare_s: seconds of preparing the shape before any call, such as OpenVINO's compilation.
        first_call_s: seconds of the first call, with `torch.compile`'s compilation.
        multiply_adds: of one call, from the manifest; None where it does not have them.
    """

    verb: str
    batch: int
    runner: str
    precision: str
    peer: bool
    times: Times
    prepare_s: float
    first_call_s: float
    multiply_adds: int | None

    @property
    def per_second(self) -> float:
        """Examples per second."""
        return self.batch / self.times.median

    @property
    def gflops(self) -> float | None:
        """10^9 operations per second; a multiply-add counts as 2."""
        return None if self.multiply_adds is None else 2 * self.multiply_adds / self.times.median / 1e9


@dataclass(frozen=True)
class Report:
    """The results of one run.

    Attributes:
        bundle: its name.
        sizes: of the data's named dimensions.
        threads: of every call.
        machine: see `rates.machine`.
        rates: the machine's own rates, see `MachineRates.rates`; `roof` in JSON.
        runners: for each its name, precision and, where they were measured, `open_s` and `memory_bytes`.
        rows: in the order of verbs, batches and runners.
        absent: runners without times, and why.
    """

    bundle: str
    sizes: dict[str, int]
    threads: int
    machine: dict[str, Any]
    rates: dict[str, float]
    runners: tuple[dict[str, Any], ...]
    rows: tuple[Row, ...]
    absent: tuple[Absent, ...]

    def relative_rate(self, row: Row) -> float | None:
        """A row's rate relative to NumPy's float32 matrix product, or for bf16 to PyTorch's bfloat16 one if measured.

        It is above 1 where a graph needs fewer operations than are counted, or a library beats NumPy's.
        """
        rate = self.rates["float32_gflops"]
        if row.precision == "bf16":
            rate = self.rates.get("bfloat16_gflops", rate)
        return None if row.gflops is None else row.gflops / rate

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the attributes, with `date` and `versions` beside `machine`.

        A row has its times in µs as `median_us`, `p10_us` and so on, and `per_second`, `gflops` and `share_of_roof`,
        which is its relative rate.
        """
        rows = []
        for row in self.rows:
            plain = asdict(row)
            times = plain.pop("times")
            plain |= {f"{name}_us": times.pop(name) * 1e6 for name in _TIMES} | times
            derived = {"per_second": row.per_second, "gflops": row.gflops, "share_of_roof": self.relative_rate(row)}
            rows.append({**plain, **derived})
        absent = [asdict(one) for one in self.absent]
        facts = {"bundle": self.bundle, "sizes": self.sizes, "threads": self.threads, **self.machine}
        return {**facts, "roof": self.rates, "runners": list(self.runners), "rows": rows, "absent": absent}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Report:
        """The report of which `to_dict` returned these values; other keys are ignored."""
        rows = []
        for row in plain["rows"]:
            seconds = {name: row[f"{name}_us"] / 1e6 for name in _TIMES}
            times = Times(**seconds, **{name: row[name] for name in ("spread", "calls", "turns")})
            rows.append(Row(times=times, **{f.name: row[f.name] for f in fields(Row) if f.name != "times"}))
        return cls(
            bundle=plain["bundle"], sizes=plain["sizes"], threads=plain["threads"], rates=plain["roof"],
            machine={name: plain[name] for name in ("date", "machine", "versions")},
            runners=tuple(plain["runners"]), rows=tuple(rows), absent=tuple(Absent(**one) for one in plain["absent"]),
        )  # fmt: skip


def first_line(error: Exception) -> str:
    """An error's first line, with its type where the error is not ours."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if text.startswith("bench") else f"{type(error).__name__}: {text}"


def verdict(report: Report) -> str:
    """Our fastest runner beside the fastest other one over all cells, in one line."""
    ratios: list[float] = []
    for cell in dict.fromkeys((row.verb, row.batch) for row in report.rows):
        here = [row for row in report.rows if (row.verb, row.batch) == cell]
        ours, others = ([row.times.median for row in here if _own(row.runner) is own] for own in (True, False))
        if ours and others:
            ratios.append(min(others) / min(ours))
    if not ratios:
        return f"{report.bundle}: no cell has both vae_export and another runner"
    return (
        f"{report.bundle}: vae_export is {statistics.geometric_mean(ratios):.2f} times as fast as the fastest other "
        f"runner (geometric mean of {len(ratios)} cells; {min(ratios):.2f} to {max(ratios):.2f})"
    )


def table(report: Report, *, brief: bool = False) -> Table:
    """A line for each verb, batch and runner; `brief` leaves out what does not fit 80 columns and `--json` has."""
    shown = Table(
        title=escape(f"{report.bundle}: time of a call, {report.threads} threads; runners took turns in one run"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="vs. NumPy: operations per second relative to NumPy's matrix product"
        + ("" if brief else "; ready s: preparing the shape and the first call"),
        caption_justify="left",
    )
    headings = ("verb", "batch", "runner", "median µs (p10–p90)", "images/s", "vs. NumPy")
    for heading in (*headings, *(() if brief else ("GFLOP/s", "p99 µs", "spread", "ready s"))):
        text = heading in ("verb", "runner")
        shown.add_column(heading, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    before: tuple[str, int] | None = None
    for row in report.rows:
        cell, relative = (row.verb, row.batch), report.relative_rate(row)
        if before and cell != before:
            shown.add_section()
        shown.add_row(
            *((row.verb, str(row.batch)) if cell != before else ("", "")),
            Text(row.runner),
            f"{_us(row.times.median)} ({_us(row.times.p10)}–{_us(row.times.p90)})",
            f"{row.per_second:,.0f}",
            "" if relative is None else f"{relative:.0%}",
            *(() if brief else _details(row)),
        )
        before = cell
    return shown


def summary(report: Report) -> list[str]:
    """The lines below the table: the machine's rates, memory, and absent runners with the reasons."""
    rates = report.rates
    products = f"NumPy's matrix product: {rates['float32_gflops']:.0f} GFLOP/s in float32"
    if "bfloat16_gflops" in rates:
        products += f"; PyTorch's: {rates['bfloat16_gflops']:.0f} in bfloat16"
    lines = [f"{products}; copies: {rates['copy_gb_per_second']:.1f} GB/s"]
    for fact in report.runners:
        if "memory_bytes" in fact:
            lines.append(f"memory: {fact['runner']} {fact['memory_bytes'] / 2**20:,.0f} MiB")
    cells: dict[tuple[str, str], list[str]] = {}
    for one in report.absent:
        cells.setdefault((one.runner, one.reason), []).append(f"{one.verb} {one.batch}" if one.verb else "")
    for (runner, why), where in cells.items():
        lines.append(f"absent: {', '.join(filter(None, (runner, *where)))}: {why}")
    return lines


def _details(row: Row) -> tuple[str, ...]:
    """The columns that only the whole table has."""
    rate = "" if row.gflops is None else f"{row.gflops:,.1f}"
    return rate, _us(row.times.p99), f"{row.times.spread:.1%}", f"{row.prepare_s + row.first_call_s:.2f}"


def _own(runner: str) -> bool:
    return runner.startswith("vae_export")


def _us(seconds: float) -> str:
    """Microseconds in at least three digits."""
    return f"{seconds * 1e6:,.0f}" if seconds >= 1e-4 else f"{seconds * 1e6:.1f}"


def plot(report: Report, path: Path) -> None:
    """Draw latency against batch, both logarithmic: a panel for each verb, a line for each runner and NumPy's rate.

    Raises:
        InputError: the path does not end in .png, or the report has no rows.
        BackendError: matplotlib is not installed.
    """
    check_plot(path)
    if not report.rows:
        raise InputError("bench: there is no row to draw. Time a runner that this machine has")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    verbs = list(dict.fromkeys(row.verb for row in report.rows))
    names = list(dict.fromkeys(row.runner for row in report.rows))
    figure = Figure(figsize=(4.2 * len(verbs) + 2.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(verbs), squeeze=False)[0]
    for panel, verb in zip(panels, verbs, strict=True):
        rows = [row for row in report.rows if row.verb == verb]
        for number, name in enumerate(names):
            own = sorted((row.batch, row.times.median * 1e3) for row in rows if row.runner == name)
            if own:
                style = "o-" if _own(name) else "s--"
                panel.plot(*zip(*own, strict=True), style, color=f"C{number}", label=name, markersize=4)
        _draw_rate(panel, rows, report.rates["float32_gflops"])
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
    """Check before anything is timed that a plot can be written here. Errors: as for `plot`."""
    if path.suffix.lower() != ".png":
        raise InputError(f"bench: the plot's path is {path}; expected a name that ends in .png")
    require("matplotlib", "train", "bench --plot")


def _draw_rate(panel: Any, rows: Sequence[Row], gflops: float) -> None:
    """The time that the multiply-adds would take at the rate of NumPy's matrix product."""
    known = sorted({(row.batch, 2 * row.multiply_adds / gflops / 1e6) for row in rows if row.multiply_adds})
    if known:
        panel.plot(*zip(*known, strict=True), ":", color="black", label="at NumPy's float32 rate")
