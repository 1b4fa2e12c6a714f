"""Latency of a bundle, its builds, and what else could run the model: interleaved in one run, and checked after it."""

from .cells import VERBS, Cell, Examples
from .measure import run
from .report import Absent, Report, Row, check_plot, plot, summary, table
from .roof import machine
from .runners import Bare, Ours, Recipe, Runner
from .select import Selection, candidates

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
