"""Whether a trace holds at every batch and named size: PyTorch's messages and guards, compared with the model's sizes.

A branch, a loop or a constant of the module that depends on the size makes PyTorch specialize the graph. It records
that beside the graph, or refuses to trace.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from vae_export.contract.model import Model
from vae_export.errors import InputError
from vae_export.sources.adapter import advice

#: Batch of a trace: not 1, which PyTorch specializes on.
TRACE_BATCH = 3
#: Multiples of a named dimension's unit, above its smallest, at which assumptions are checked; and batches.
_STEPS = (*range(9), 11, 12, 15, 16, 23, 31, 32, 63, 64, 127, 128)
_BATCHES = (1, 2, TRACE_BATCH, 7, 64)
#: PyTorch's messages about dimensions that became constants, of its several versions.
_STATIC = re.compile(r"inferred a static shape of (?P<size>\d+) for dimension \S*?\.shape\[(?P<axis>\d+)\]")
_SPECIALIZED = re.compile(r"marked (?P<name>\w+)\b.*? as dynamic but .*?constant \(?(?P<size>\d+)", re.DOTALL)
_FIXES = re.compile(r"^\s*(?P<name>\w+) = (?P<fix>[^\n]+?)\s*$", re.MULTILINE)
_DATA_DEPENDENT = re.compile(r"data-dependent|GuardOnDataDependent|DataDependent", re.IGNORECASE)
_OPERATOR = re.compile(r"call_function\[target=(?:torch\.ops\.)?([\w.]+)\]")


def trace_error(
    kind: str, error: BaseException, named: Mapping[int, str], traced: torch.Size, model: Model
) -> InputError:
    """The reason of a failed trace: a dimension that became a constant, a branch on values, or PyTorch's own message.

    Arguments: as for `check_every_size`, and the error of `torch.onnx.export`.
    """
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
        if isinstance(cause, InputError):
            return cause
    messages = "\n".join(str(one) for one in chain)
    if baked := baked_dimensions(messages, named):
        return _fixed_size(kind, baked, named, traced)
    last = chain[-1]
    summary = f"{type(last).__name__}: {first_lines(str(last))}"
    if _DATA_DEPENDENT.search(messages) or any(_DATA_DEPENDENT.search(type(one).__name__) for one in chain):
        return InputError(
            f"export: PyTorch could not trace the {kind} as one graph that is the same for every input. Control flow "
            f"that depends on values is the usual reason. PyTorch says: {summary}\n"
            f"Replace branches on values by torch.where, or omit them. {advice(model.likelihood.kind)}"
        )
    operator = _OPERATOR.search(messages)
    where = f", at {operator.group(1)}" if operator else ""
    return InputError(
        f"export: PyTorch could not write the {kind} as one ONNX graph for every batch and size{where}. PyTorch says: "
        f"{summary}\nWrite that part with other operators: sizes of kernels, parts and splits must not depend on the "
        f"size of the input; slices and F.interpolate may. {advice(model.likelihood.kind)}"
    )


def baked_dimensions(messages: str, named: Mapping[int, str]) -> dict[str, str]:
    """By name, the dimensions that a trace turned into constants or restricted, according to PyTorch's messages.

    Args:
        messages: of the error and its causes.
        named: the dimensions that should stay dynamic, by axis.
    """
    baked: dict[str, str] = {}
    for match in _STATIC.finditer(messages):
        if int(match["axis"]) in named:
            baked.setdefault(named[int(match["axis"])], f"became the constant {match['size']}")
    plain = {re.sub(r"\W", "_", name): name for name in named.values()}
    for match in _SPECIALIZED.finditer(messages):
        if match["name"] in plain:
            baked.setdefault(plain[match["name"]], f"became the constant {match['size']}")
    for match in _FIXES.finditer(messages.partition("Suggested fixes:")[2]):
        if match["name"] in plain:
            fix = match["fix"]
            text = f"became the constant {fix}" if fix.isdigit() else f"must be {fix.replace('*_', ' * ')}"
            baked.setdefault(plain[match["name"]], text)
    return baked


def _fixed_size(kind: str, baked: Mapping[str, str], named: Mapping[int, str], traced: torch.Size) -> InputError:
    what = " and ".join(f"{dim} {text}" for dim, text in baked.items())
    return InputError(
        f"export: the {kind} can be traced only as a graph for one size, not for all: {what}. It was traced at "
        f"{_at(named, traced)}. {_remedy(kind, baked)}"
    )


def _remedy(kind: str, names: Mapping[str, Any]) -> str:
    method = {"encoder": "encode", "decoder": "decode"}.get(kind, kind)
    if set(names) == {"batch"}:
        return (
            f"Something in {method} turns the batch into a Python number: write z.shape[0] instead of len(z) or a "
            "number, and -1 for it in reshape and view, and keep sizes out of int() and out of loops"
        )
    return (
        f"Something in {method} depends on the size by a branch, a loop, int() or a constant that is for one size "
        "only. Write sizes as x.shape[-1] // 2 instead of int(w / 2), z.shape[0] instead of len(z), -1 or shapes "
        "instead of numbers in reshape, torch.where instead of a branch, operators over the whole axis instead of a "
        "loop, and F.interpolate(scale_factor=...), or to x.shape[-2:], for what is stored at one size. If the model "
        "is for one size only, omit multiple_of"
    )


def first_lines(text: str) -> str:
    """A message without the code that it shows: its first line, and the next ones after a colon."""
    lines = [line.strip() for line in text.strip().splitlines()]
    first = list(itertools.takewhile(bool, lines[:4]))
    end = next((i for i, line in enumerate(first) if not line.endswith(":")), len(first) - 1)
    return " ".join(first[: end + 1])


def _at(named: Mapping[int, str], sizes: torch.Size) -> str:
    return ", ".join(f"{name} {sizes[axis]}" for axis, name in named.items())


def check_every_size(kind: str, program: Any, named: Mapping[int, str], traced: torch.Size, model: Model) -> None:
    """Refuse a graph that holds only for some of the batches and sizes that the model takes.

    Args:
        kind: `encoder` or `decoder`.
        program: the `torch.export.ExportedProgram`.
        named: the dimensions that should stay dynamic, by axis.
        traced: the shape of the input.
        model: which sizes it takes.

    Raises:
        InputError: with the assumption, a size at which it is false, and what to write instead.
    """
    (name,) = program.graph_signature.user_inputs
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    symbols: dict[sympy.Symbol, str] = {}
    baked: dict[str, str] = {}
    for axis, dim in named.items():
        size = value.shape[axis]
        expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
        if isinstance(expression, sympy.Symbol) and expression not in symbols:
            symbols[expression] = dim
        elif isinstance(expression, sympy.Symbol):
            baked[dim] = f"must be as large as {symbols[expression]}"
        elif expression.is_number:
            baked[dim] = f"became the constant {expression}"
        else:
            baked[dim] = "is restricted to multiples"
    if baked:
        raise _fixed_size(kind, baked, named, traced)
    if not symbols:
        return
    environment = value.fake_mode.shape_env
    conditions = [guard.expr for guard in environment.guards]
    conditions += [one.expr for many in environment.deferred_runtime_asserts.values() for one in many]
    for symbol, limits in program.range_constraints.items():
        if limits.upper.is_number and limits.upper.is_finite:
            conditions.append(symbol <= limits.upper)
    broken = first_broken(list(dict.fromkeys(conditions)), symbols, list(_allowed_sizes(kind, model)))
    if broken is not None:
        condition, sizes = broken
        raise InputError(
            f"export: what the {kind} computes depends on the size. Traced at {_at(named, traced)}, the graph assumes "
            f"that {condition}, which is false at "
            f"{', '.join(f'{dim} {size}' for dim, size in sizes.items())}: there it would be wrong or fail. "
            f"{_remedy(kind, sizes)}"
        )


def _allowed_sizes(kind: str, model: Model) -> Iterator[dict[str, int]]:
    """Batches and sizes of a graph's input that the model takes, by the dimensions' names, smallest first."""
    named = model.data.named()
    grids = {
        name: [size for step in _STEPS if dim.allows(size := dim.multiple_of * (-(-dim.min // dim.multiple_of) + step))]
        for name, dim in named.items()
    }
    count = len(_STEPS)
    pairs = [(i, j) for i in range(count) for j in {0, i, count - 1 - i, (7 * i + 3) % count}]
    shape = model.signature(kind)[0][0].shape
    for number, (first, second) in enumerate(pairs):
        sizes = {
            name: grids[name][index % len(grids[name])]
            for name, index in zip(grids, itertools.cycle((first, second)), strict=False)
        }
        batch = _BATCHES[number % len(_BATCHES)]
        real = model.tensor_shape(model.signature(kind)[0][0], batch, sizes)
        yield {dim: size for dim, size in zip(shape, real, strict=True) if isinstance(dim, str)}


def first_broken(
    conditions: Sequence[Any], symbols: Mapping[sympy.Symbol, str], allowed: Sequence[Mapping[str, int]]
) -> tuple[str, dict[str, int]] | None:
    """The first condition that is false at an allowed size, as a formula over the dimensions' names, and that size.

    Two kinds are ignored, which PyTorch records for every convolution whether or not a result depends on them, and
    which the certificate covers: limits of the batch, alone or times sizes, by which it chooses an implementation, and
    that a size or a product of sizes is not 1.

    Args:
        conditions: relations of sympy.
        symbols: the dimensions' names by symbol.
        allowed: batches and sizes by the dimensions' names.
    """
    for condition in conditions:
        free = condition.free_symbols
        if not free or not free <= set(symbols):
            continue  # a size that depends on values
        if "batch" in {symbols[symbol] for symbol in free} and not isinstance(condition, sympy.Equality):
            continue
        if isinstance(condition, sympy.Unequality) and sympy.Integer(1) in condition.args:
            continue
        if isinstance(condition, (sympy.StrictLessThan, sympy.StrictGreaterThan)) and condition.lts == 1:
            continue  # the same for sizes, which are never below 1
        tried: set[tuple[int, ...]] = set()
        for dims in allowed:
            sizes = {symbol: dims[symbols[symbol]] for symbol in free}
            key = tuple(sizes[symbol] for symbol in sorted(free, key=str))
            if key in tried or 1 in key:
                continue
            tried.add(key)
            if condition.xreplace({symbol: sympy.Integer(size) for symbol, size in sizes.items()}) == sympy.false:
                atoms = {s: dim if (dim := symbols[s]).isidentifier() else f"({dim})" for s in free}
                named = condition.xreplace({symbol: sympy.Symbol(atom) for symbol, atom in atoms.items()})
                return _formula(named), {symbols[symbol]: size for symbol, size in sizes.items()}
    return None


def _formula(condition: Any) -> str:
    """A condition in Python's notation."""
    relations = {"Equality": "==", "Unequality": "!="}
    sign = relations.get(type(condition).__name__)
    return f"{condition.lhs} {sign} {condition.rhs}" if sign else str(condition)
