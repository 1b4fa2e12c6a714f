"""Latency of a bundle, its builds, and what else could run the model: interleaved in one run, and checked after it."""

from vae_export.bench.cells import VERBS, Cell, Examples
from vae_export.bench.measure import run
from vae_export.bench.report import Absent, Report, Row, check_plot, plot, summary, table
from vae_export.bench.roof import machine
from vae_export.bench.runners import Bare, Ours, Recipe, Runner
from vae_export.bench.select import Selection, candidates

__all__ = [
    "VERBS",
    "Absent",
    "Bare",
    "Cell",
    "Examples",
    "Ours",
    "Recipe",
    "Report",
    "Row",
    "Runner",
    "Selection",
    "candidates",
    "check_plot",
    "machine",
    "plot",
    "run",
    "summary",
    "table",
]
