"""Choose from a table of timings, and refuse what breaks a tolerance: pure functions, without any runner.

Why a candidate was not chosen is its verdict in `build.json` (`vae-export inspect BUILD` shows it): see `verdicts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vae_export.building.cpu import SearchSettings
from vae_export.contract.build_record import ExecutionPlan
from vae_export.contract.choices import Precision
from vae_export.contract.model import GRAPHS, parts_of

if TYPE_CHECKING:
    from vae_export.certification.certificate import Check

#: Precisions from the most exact to the least.
EXACTNESS: Mapping[Precision, int] = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3}
#: Differences below the first share are noise, however quiet the machine was; above the second none are.
MIN_NOISE, MAX_NOISE = 0.01, 0.05


@dataclass(frozen=True)
class Timing:
    """One row of the table: what was measured of a candidate for one graph and batch size.

    Attributes:
        graph: its name.
        batch: examples in a call.
        candidate: the candidate's number.
        plan: how it ran.
        parts: the precision of encoder and decoder, as far as the graph contains them.
        forms: how many forms of the same arithmetic the candidate uses; see `graph.rewrites.FORMS`.
        median: seconds of a call, the median of the turns' medians; infinite where it was not timed.
        spread: the interquartile range of the turns' medians, relative to the median.
        reason: its verdict, unless it is chosen or there is more to say.
    """

    graph: str
    batch: int
    candidate: int
    plan: ExecutionPlan
    parts: Mapping[str, Precision]
    forms: int = 0
    median: float = math.inf
    spread: float = 0.0
    reason: str = "slower"


#: For each graph its rows: the most exact candidates first, and within a precision those with more forms.
Table = Mapping[str, Sequence[Timing]]
#: Why a candidate is out, by graph and number of the candidate.
Refusals = Mapping[tuple[str, int], str]


def by_batch(rows: Iterable[Timing]) -> dict[int, list[Timing]]:
    """Rows by batch size, in the order of the rows."""
    groups: dict[int, list[Timing]] = {}
    for row in rows:
        groups.setdefault(row.batch, []).append(row)
    return groups


def choose(rows: Sequence[Timing], settings: SearchSettings) -> list[Timing]:
    """Of one graph's rows, none refused, for each batch size the fastest; of equally fast ones within noise the first.

    All batch sizes are in one precision, the one that is fastest over all of them: the size of a batch must not decide
    how exact a result is. A reduced precision is chosen only where `no_gain` is None.
    """
    batches = by_batch(rows).values()

    def cost(precision: Precision) -> float:
        total = 0.0
        for here in batches:
            best, same = _fastest(here), _fastest(here, precision)
            total += math.log(same.median if same else settings.max_slowdown * (best.median if best else 1.0))
        return total

    precisions = dict.fromkeys(row.plan.precision for row in rows)
    precision = min((each for each in precisions if no_gain(rows, each, settings) is None), key=cost)
    chosen = []
    for here in batches:
        same = [row for row in here if row.plan.precision == precision]
        if fastest := _fastest(same):
            limit = fastest.median * (1 + min(MAX_NOISE, max(MIN_NOISE, fastest.spread / 2)))
            same = [row for row in same if row.median <= limit]
        chosen.append(same[0])  # where the fast ones are refused, any other will do
    return chosen


def no_gain(rows: Iterable[Timing], precision: Precision, settings: SearchSettings) -> str | None:
    """Why a reduced precision of one graph is not worth its errors: it is no faster than float32, beyond the noise.

    Returns:
        None where it is faster, is float32 itself, or was not timed beside float32.
    """
    gains, limits = [], []
    for here in by_batch(rows).values():
        full, reduced = _fastest(here, "fp32"), _fastest(here, precision)
        if full is None:
            continue
        # What was too slow to be timed counts as slower by max_slowdown.
        gains.append(math.log(full.median / reduced.median if reduced else 1 / settings.max_slowdown))
        limits.append(max(settings.min_gain, full.spread / 2, reduced.spread / 2) if reduced else settings.min_gain)
    if precision == "fp32" or not gains:
        return None
    gain, limit = math.exp(sum(gains) / len(gains)), 1 + sum(limits) / len(limits)
    if gain > limit:
        return None
    return f"it is {gain:.2f} times as fast as float32, and only more than {limit:.2f} counts: float32 stays"


def left(table: Table, graph: str, refused: Refusals) -> list[Timing]:
    """The rows of a graph whose candidates are not refused."""
    return [row for row in table[graph] if _refusal(row, refused) is None]


def choose_all(table: Table, refused: Refusals, settings: SearchSettings) -> dict[str, list[Timing]]:
    """`choose` for each graph. A fused graph is in the precisions that were chosen for its parts, or left out."""
    chosen = {graph: choose(left(table, graph, refused), settings) for graph in GRAPHS}
    precisions = {graph: rows[0].plan.precision for graph, rows in chosen.items()}
    for graph in (graph for graph in table if graph not in GRAPHS):
        rows = left(table, graph, refused)
        if rows := [row for row in rows if all(precisions[part] == kind for part, kind in row.parts.items())]:
            chosen[graph] = choose(rows, settings)
    return chosen


def blame(failed: Check, chosen: Table, table: Table) -> dict[tuple[str, int], str]:
    """The candidate to refuse, and for which graph, because a check of a certificate failed.

    It is the one that was chosen for the graph of the check. Where that may be encoder or decoder, it is the least
    precise, or, in one precision, the one with the most forms. A fused graph is refused for all candidates of its
    runner and precision at once: the build can do without it.
    """
    graph: str = failed.graph
    if failed.id == "prior.picture.max":
        graph = "generate"
    elif graph == "end to end":
        graph = "score" if failed.id.startswith("elbo.") else "reconstruct"
    rows = chosen.get(graph) or [row for part in GRAPHS for row in chosen[part]]
    worst = max(rows, key=lambda row: (EXACTNESS[row.plan.precision], row.forms))
    alike = {worst.candidate}
    if worst.graph not in GRAPHS:
        kind = (worst.plan.runner, worst.plan.precision)
        alike |= {row.candidate for row in table[worst.graph] if (row.plan.runner, row.plan.precision) == kind}
    return {(worst.graph, candidate): f"refused: {failed}" for candidate in alike}


def verdicts(
    table: Table, chosen: Table, refused: Refusals, dropped: Mapping[str, str], settings: SearchSettings
) -> Iterator[tuple[Timing, str]]:
    """Every row, and `chosen` or why it is not; `dropped` has the fused graphs that do not beat their parts."""
    precisions = {part: chosen[part][0].plan.precision for part in GRAPHS}
    for graph, rows in table.items():
        for row in rows:
            if any(row is one for one in chosen.get(graph, ())):
                yield row, dropped.get(graph, "chosen")
            else:
                yield row, _refusal(row, refused) or _other_precision(row, rows, precisions, settings) or row.reason


def _refusal(row: Timing, refused: Refusals) -> str | None:
    """Why a row's candidate is out: for its graph, or for a graph that this one contains."""
    keys = ((graph, row.candidate) for graph in (row.graph, *parts_of(row.graph)))
    return next((refused[key] for key in keys if key in refused), None)


def _other_precision(
    row: Timing, rows: Sequence[Timing], precisions: Mapping[str, Precision], settings: SearchSettings
) -> str | None:
    """That float32 stays although a reduced precision passes; of a fused graph, that its parts are in others."""
    for part, kind in row.parts.items():
        if kind != precisions[part]:
            if row.graph != part:
                return f"the {part} is in {precisions[part]}"
            if precisions[part] == "fp32":
                return no_gain(rows, kind, settings)
    return None


def _fastest(rows: Iterable[Timing], precision: Precision | None = None) -> Timing | None:
    timed = (row for row in rows if row.median < math.inf and precision in (None, row.plan.precision))
    return min(timed, key=lambda row: row.median, default=None)
