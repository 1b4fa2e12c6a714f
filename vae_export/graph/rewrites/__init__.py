"""The graph passes that make a graph cheaper and keep what it computes, and how a choice of them is written.

Requires: a graph in float32 with the shapes of its inner values, as the exporter writes it; so passes run before graphs
are fused, which drops inner shapes, and before precision is reduced.
Ensures: inputs and outputs keep their names, types and shapes; results differ by rounding alone. A pass that finds
nothing changes nothing.

To add a pass:

1. Write `rewrites/NAME.py`, such as `upsampling.py`. The first line of its docstring is its summary, a sentence of 20
   to 110 characters that `vae-export build --passes list` shows. Its function `apply(model: onnx_ir.Model) -> int`
   changes the graph in place and returns the number of changes, 0 where there is nothing to change. `graph/edit.py` has
   helpers.
2. Add "NAME" below: to `ALWAYS` if no runner loses by it, else to `FORMS`. Passes run in that order: a pass stands
   before those that find more to do in its result, since none may find anything in a second run of all. A form is used
   where a build is told so (`--passes NAME`), and timed by builds for the CPU if a combination in `FORMS` of
   `building/cpu/candidates.py` has it.

`tests/test_passes.py` runs every registered pass on the zoo of models: results, signature, a second run that finds
nothing; the zoo may hold nothing for it to find. So tests of what it rewrites and what it leaves belong in a file of
their own, such as `tests/test_fold.py`; `tests/nets.py` has what they share.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_ir

from vae_export.errors import InputError

#: Passes that no runner loses by: they run in every build that does not leave them out.
ALWAYS = ("fold",)
#: Passes that write the same arithmetic in another form. Which form is faster depends on the runner: builds time them.
FORMS = ("upsampling", "phases", "winograd", "channel_norm")


@dataclass(frozen=True)
class Pass:
    """A rewrite of a graph.

    Attributes:
        name: its name on the command line and in records.
        summary: its effect, in a line.
        apply: changes a graph in place and returns the number of changes.
    """

    name: str
    summary: str
    apply: Callable[[onnx_ir.Model], int]


def _load(name: str) -> Pass:
    module = importlib.import_module(f"{__name__}.{name}")
    return Pass(name, (module.__doc__ or name).partition("\n")[0], module.apply)


#: Every pass by its name, in the order in which they run.
PASSES: dict[str, Pass] = {name: _load(name) for name in (*ALWAYS, *FORMS)}


def select(text: str | None) -> tuple[str, ...]:
    """The names of the passes that a text chooses, in the order in which they run.

    Args:
        text: names separated by commas, read from left to right: `a` adds a pass, `-a` removes it, `all` adds all of
            them and `none` removes all. A text that begins with `-` starts from all. None means `all`.

    Raises:
        InputError: there is no such pass.
    """
    if text is not None and not isinstance(text, str):
        raise InputError(f"build: passes is {text!r}; expected a text such as 'all,-winograd'")
    words = [word.strip() for word in ("all" if text is None else text).split(",")]
    chosen = set(PASSES) if words[0].startswith("-") else set()
    for word in words:
        name = word.removeprefix("-")
        if word == "all":
            chosen = set(PASSES)
        elif word == "none":
            chosen = set()
        elif name not in PASSES:
            raise InputError(
                f"graph passes: there is none called {name!r}; expected all, none, or, with commas between and a - "
                f"before those to leave out, some of {', '.join(PASSES)}"
            )
        elif word.startswith("-"):
            chosen.discard(name)
        else:
            chosen.add(name)
    return tuple(name for name in PASSES if name in chosen)


def optimize(model: onnx_ir.Model, names: Iterable[str]) -> dict[str, int]:
    """Run passes over a graph, in place, in the order of `PASSES`.

    Args:
        model: a graph in float32.
        names: of passes. Other names, of passes that a record of an earlier version has, have no effect.

    Returns:
        The number of changes by pass, of those that ran.
    """
    chosen = set(names)
    return {name: found.apply(model) for name, found in PASSES.items() if name in chosen}
