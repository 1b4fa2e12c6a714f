"""The passes that make a graph cheaper and leave what it computes: which there are, in which order, and a choice.

Requires: a graph in float32 with its shapes, as the exporter writes it; so before graphs are fused, which drops inner
shapes, and before they are lowered.
Ensures: inputs and outputs keep their names, types and shapes; what is computed differs by rounding alone. A pass
that finds nothing changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_ir

from vae_export.errors import InputError
from vae_export.graph.rewrites import (
    attention,
    batch_norm,
    channel_norm,
    fold,
    group_norm,
    phases,
    pointwise,
    scaling,
    upsampling,
    winograd,
)


@dataclass(frozen=True)
class Pass:
    """A change of a graph.

    Attributes:
        name: what it is called on the command line and in records.
        summary: what it does, in a line.
        apply: does it, in place, and returns the number of places that it changed.
    """

    name: str
    summary: str
    apply: Callable[[onnx_ir.Model], int]


#: Every pass by its name, in the order in which they run.
PASSES: dict[str, Pass] = {
    found.name: found
    for found in (
        Pass("upsampling", "make upsampling and a convolution one transposed convolution", upsampling.apply),
        Pass("phases", "make a transposed convolution convolutions, one for each phase", phases.apply),
        Pass("winograd", "compute convolutions of many channels with 2.25 times fewer products", winograd.apply),
        Pass("fold", "compute what is constant, drop what does nothing or is not needed", fold.apply),
        Pass("group_norm", "write group normalization as one operator", group_norm.apply),
        Pass("channel_norm", "write group normalization by means of channels, without reshaping", channel_norm.apply),
        Pass("batch_norm", "put batch normalization into the weights before it", batch_norm.apply),
        Pass("scaling", "put multiplications and additions of constants into weights", scaling.apply),
        Pass("pointwise", "make a convolution and a pointwise one after it one", pointwise.apply),
        Pass("attention", "make the scalings of an attention one, inside a projection's weights", attention.apply),
    )
}


#: Those that give another form of the same arithmetic: which form is faster depends on what runs it.
FORMS = ("group_norm", "channel_norm", "upsampling", "phases", "winograd")


def select(text: str | None) -> tuple[str, ...]:
    """The passes that a text names, in the order in which they run.

    Args:
        text: names with commas between, read from left to right: `a` adds a pass, `-a` takes it away, `all` adds
            every one and `none` takes every one away. One that begins by taking away begins with all. None is `all`.

    Raises:
        InputError: there is no such pass.
    """
    if text is not None and not isinstance(text, str):
        raise InputError(f"build: passes is {text!r}; expected a text such as 'all,-winograd'")
    words = [word.strip() for word in ("all" if text is None else text).split(",")]
    chosen = set(PASSES) if words[0].startswith("-") else set()
    for word in words:
        if word == "all":
            chosen = set(PASSES)
        elif word == "none":
            chosen = set()
        elif word.startswith("-"):
            chosen -= _known([word[1:]])
        else:
            chosen |= _known([word])
    return tuple(name for name in PASSES if name in chosen)


def optimize(model: onnx_ir.Model, names: Iterable[str]) -> dict[str, int]:
    """Run passes over a graph, in place, in their own order.

    Args:
        model: a graph in float32.
        names: of passes, as `select` gives them.

    Returns:
        For each the number of places that it changed.

    Raises:
        InputError: there is no such pass.
    """
    chosen = _known(names)
    return {name: PASSES[name].apply(model) for name in PASSES if name in chosen}


def _known(names: Iterable[str]) -> set[str]:
    wanted = set(names)
    if unknown := sorted(wanted - set(PASSES)):
        raise InputError(
            f"graph passes: there is none called {', '.join(map(repr, unknown))}; expected all, none, or, with commas "
            f"between and a - before those to leave out, some of {', '.join(PASSES)}"
        )
    return wanted
