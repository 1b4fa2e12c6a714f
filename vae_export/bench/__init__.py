"""Latency of a bundle, its builds and other ways to run its model: timed in turns in one run, checked afterwards."""

from vae_export.bench.cells import VERBS, Cell, Examples
from vae_export.bench.measure import run
from vae_export.bench.rates import MachineRates, machine
from vae_export.bench.report import FULL_WIDTH, Absent, Report, Row, check_plot, plot, summary, table, verdict
from vae_export.bench.runners import Bare, Ours, Runner
from vae_export.bench.select import PEERS, Selection, candidates

__all__ = [
    "FULL_WIDTH", "PEERS", "VERBS", "Absent", "Bare", "Cell", "Examples", "MachineRates", "Ours", "Report", "Row",
    "Runner", "Selection", "candidates", "check_plot", "machine", "plot", "run", "summary", "table", "verdict",
]  # fmt: skip
