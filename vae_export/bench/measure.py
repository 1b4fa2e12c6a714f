"""A whole comparison: cells are prepared, timed in turns, and checked afterwards."""

from __future__ import annotations

import operator
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vae_export import timing
from vae_export.bench import memory as memories
from vae_export.bench.cells import Cell, Examples, check_verbs
from vae_export.bench.rates import MachineRates, machine
from vae_export.bench.report import Absent, Report, Row, first_line
from vae_export.bench.runners import Call, Runner
from vae_export.bench.select import Selection
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import MAX_SIZE
from vae_export.errors import InputError


def run(
    selection: Selection,
    verbs: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8, 64),
    *,
    sizes: Mapping[str, int] | None = None,
    seconds: float = 2.0,
    memory: bool = False,
    rates: MachineRates | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """Time every runner at every verb and batch, in turns, and check its results afterwards.

    Args:
        selection: a bundle with its open runners, whose names are unique.
        verbs: of `VERBS`; None takes all that the model has.
        batches: each ≥ 1.
        sizes: of the data's named dimensions; None takes those of the golden examples.
        seconds: for each runner and cell; slow calls take longer, since each is made at least seven times.
        memory: also measure the peak memory of each runner at the largest batch, in a process of its own.
        rates: measures the machine's own rates between cells; None is one with the threads of the selection.
        progress: called with the name of each cell as it begins.

    Raises:
        InputError: the model does not have a batch, a verb or a size, seconds is not positive, names are not unique,
            or memory is to be measured of a runner that another process cannot open.
        VerificationError: a result is wrong.
    """
    bundle, runners = Bundle(selection.bundle), selection.runners
    verbs = check_verbs(bundle.manifest.model, verbs)
    batches = _batches(batches)
    if not 0 < seconds < float("inf"):
        raise InputError(f"bench: seconds is {seconds}; expected a positive number")
    names = [runner.name for runner in runners]
    if not names or len(set(names)) < len(names):
        raise InputError(f"bench: the runners are {', '.join(names) or 'none'}; expected one or more, each name once")
    if memory:
        memories.check(runners)
    examples = Examples(bundle, sizes)
    rates, rows, missing = rates or MachineRates(selection.threads), list[Row](), list(selection.absent)
    rates.sample()
    for verb in verbs:
        for batch in batches:
            progress(f"{verb}, batch {batch}")
            cell = examples.cell(verb, batch)
            rows += _cell(cell, [runner for runner in runners if verb in runner.verbs], seconds, missing)
            rates.sample()
    measured: dict[str, dict[str, float]] = {"open_s": selection.opened, "memory_bytes": {}}
    if memory:
        for runner in runners:
            progress(f"memory of {runner.name}")
            supported = [verb for verb in verbs if verb in runner.verbs]
            measured["memory_bytes"][runner.name] = memories.peak(runner, supported, max(batches), examples.sizes)
    facts: list[dict[str, Any]] = [
        {"runner": runner.name, "precision": runner.precision, "peer": runner.peer}
        | {name: of[runner.name] for name, of in measured.items() if runner.name in of}
        for runner in runners
    ]
    return Report(
        bundle=bundle.manifest.name, sizes=dict(examples.sizes), threads=selection.threads, machine=machine(),
        rates=rates.rates(), runners=tuple(facts), rows=tuple(rows), absent=tuple(missing),
    )  # fmt: skip


def _batches(batches: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(map(operator.index, batches))
    except TypeError:
        sizes = ()
    if not sizes or min(sizes) < 1 or max(sizes) > MAX_SIZE:
        raise InputError(f"bench: batches are {list(batches)}; expected numbers from 1 on, at most {MAX_SIZE}")
    return tuple(dict.fromkeys(sizes))


def _cell(cell: Cell, runners: Sequence[Runner], seconds: float, missing: list[Absent]) -> list[Row]:
    """Rows of one cell. A peer that fails becomes absent; a failure of ours or of the bare session is raised."""
    calls: dict[str, Call] = {}
    prepared: dict[str, tuple[float, float]] = {}
    for runner in runners:
        try:
            with warnings.catch_warnings():
                if runner.peer:
                    warnings.simplefilter("ignore")
                began = time.perf_counter()
                call = runner.prepare(cell)
                prepared[runner.name] = time.perf_counter() - began, timing.once(call)
        except Exception as error:  # compilers and other libraries raise anything
            if not runner.peer:
                raise
            missing.append(Absent(runner.name, first_line(error), cell.verb, cell.batch))
        else:
            calls[runner.name] = call
    times = timing.measure(calls, seconds)
    rows = []
    for runner in runners:
        if runner.name not in calls:
            continue
        result = runner.results(cell.verb, calls[runner.name]())
        cell.check(result, runner.name, precision=runner.precision, addressed=runner.addressed)
        row = (cell.verb, cell.batch, runner.name, runner.precision, runner.peer, times[runner.name])
        rows.append(Row(*row, *prepared[runner.name], cell.multiply_adds))
    return rows
