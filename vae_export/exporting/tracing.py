"""From a PyTorch module to an ONNX graph that computes the same at every batch and every named size.

PyTorch traces at one size. What it then takes for granted of the others, because a branch, a loop or a constant of the
module depends on the size, it notes beside the graph; what is noted is held against every size that the model promises.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir
import sympy  # type: ignore[import-untyped]
import torch
from torch import nn

from vae_export.contract.manifest import Graph
from vae_export.contract.model import Model
from vae_export.errors import InputError
from vae_export.graph import write
from vae_export.graph.rewrites import exact_norm
from vae_export.graph.weights import apart
from vae_export.sources.adapter import advice

#: The newest version of the ONNX operators that PyTorch's exporter writes by default; every backend that
#: is built for has kernels for it.
OPSET = 20
#: Weights beside a graph, as Optimum calls them.
WEIGHTS = "model.onnx_data"
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")
_NEARLY_ZERO, _NEARLY_ONE = 2e-8, 2e-5  # how near the optimizer's rules go, twice
_TRACE_BATCH = 3  # not 1, which tracing would take for a constant
#: Multiples of a named dimension's unit, above its smallest, at which an assumption is tried.
_STEPS = (*range(9), 11, 12, 15, 16, 23, 31, 32, 63, 64, 127, 128)
_BATCHES = (1, 2, _TRACE_BATCH, 7, 64)
#: What PyTorch's messages call a dimension that has become a number, in the words of its several versions.
_STATIC = re.compile(r"inferred a static shape of (?P<size>\d+) for dimension \S*?\.shape\[(?P<axis>\d+)\]")
_SPECIALIZED = re.compile(r"marked (?P<name>\w+)\b.*? as dynamic but .*?constant \(?(?P<size>\d+)", re.DOTALL)
_FIXES = re.compile(r"^\s*(?P<name>\w+) = (?P<fix>[^\n]+?)\s*$", re.MULTILINE)
_ON_VALUES = re.compile(r"data-dependent|GuardOnDataDependent|DataDependent", re.IGNORECASE)
_OPERATOR = re.compile(r"call_function\[target=(?:torch\.ops\.)?([\w.]+)\]")


@dataclass(frozen=True)
class _Assumption:
    """What a trace takes for granted of the sizes of its input.

    Attributes:
        condition: as a formula over the dimensions' names.
        sizes: of the input, for which it does not hold although they are allowed.
    """

    condition: str
    sizes: Mapping[str, int]


def trace(kind: str, module: nn.Module, shape: tuple[int, ...], model: Model) -> tuple[bytes, bytes | None, Graph]:
    """One graph as ONNX, with dynamic batch and named dimensions.

    Args:
        kind: `encoder` or `decoder`.
        module: computes it, in evaluation mode, in float32 on the CPU.
        shape: of one example of its input, at which it is traced.
        model: says what goes in and comes out.

    Returns:
        The graph's bytes; the bytes of weights to lie beside it, if there are any; and its record.

    Raises:
        InputError: PyTorch cannot trace it, or only for some of the batches and sizes that the model promises.
    """
    inputs, outputs = model.signature(kind)
    into = inputs[0].shape
    named = {axis: dim for axis, dim in enumerate(into) if isinstance(dim, str)}
    axes = {axis: re.sub(r"\W", "_", name) for axis, name in named.items()}
    example = torch.zeros(_TRACE_BATCH, *shape)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=[tensor.name for tensor in inputs],
                output_names=[tensor.name for tensor in outputs],
                dynamic_shapes=(axes,),
                opset_version=OPSET,
                verbose=False,
                optimize=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise _refusal(kind, error, named, example.shape, model) from error
    assert program is not None
    _check_every_size(kind, program.exported_program, named, example.shape, model)
    _keep_small_constants(program.model)
    program.optimize()
    graph = program.model
    ends = zip((*graph.graph.inputs, *graph.graph.outputs), (*inputs, *outputs), strict=True)
    for value, tensor in ends:
        value.name = tensor.name  # the optimizer renames what is given twice
        value.shape = onnx_ir.Shape(tensor.shape)
    _rename_inner(graph)
    exact_norm.apply(graph)
    _forget_origin(graph)
    data = apart(graph, WEIGHTS)
    record = Graph(
        file=f"vae_{kind}/model.onnx",
        opset=graph.opset_imports[""],
        inputs=inputs,
        outputs=outputs,
        weights=None if data is None else f"vae_{kind}/{WEIGHTS}",
    )
    return write(graph), data, record


def _refusal(kind: str, error: BaseException, named: Mapping[int, str], traced: torch.Size, model: Model) -> InputError:
    """Why PyTorch could not trace: which dimension became a number, which values decide, or what it says itself."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
        if isinstance(cause, InputError):
            return cause
    said = "\n".join(str(one) for one in chain)
    if baked := baked_dimensions(said, named):
        what = " and ".join(f"{name} {text}" for name, text in baked.items())
        return InputError(
            f"export: the {kind} can be traced only as a graph for one size, not for all: {what}. It was traced at "
            f"{_at(named, traced)}. {_remedy(kind, baked)}"
        )
    last = chain[-1]
    ours = f"{type(last).__name__}: {_first_lines(str(last))}"
    if _ON_VALUES.search(said) or any(_ON_VALUES.search(type(one).__name__) for one in chain):
        return InputError(
            f"export: PyTorch could not trace the {kind} as one graph that is the same for every input. Control flow "
            f"that depends on values is the usual reason. PyTorch says: {ours}\n"
            f"Replace branches on values by torch.where, or leave them out. {advice(model.likelihood.kind)}"
        )
    operator = _OPERATOR.search(said)
    where = f", at {operator.group(1)}" if operator else ""
    return InputError(
        f"export: PyTorch could not write the {kind} as one ONNX graph for every batch and size{where}. PyTorch says: "
        f"{ours}\nWrite that part with other operators: sizes of kernels, parts and splits must not depend on the "
        f"size of the input; slices and F.interpolate may. {advice(model.likelihood.kind)}"
    )


def baked_dimensions(said: str, named: Mapping[int, str]) -> dict[str, str]:
    """The dimensions that a trace took for numbers or restricted, from PyTorch's messages: by name, what became of it.

    Args:
        said: the messages.
        named: the dimensions that were to stay open, by axis.
    """
    found: dict[str, str] = {}
    for match in _STATIC.finditer(said):
        if int(match["axis"]) in named:
            found.setdefault(named[int(match["axis"])], f"was taken for the number {match['size']}")
    plain = {re.sub(r"\W", "_", name): name for name in named.values()}
    for match in _SPECIALIZED.finditer(said):
        if match["name"] in plain:
            found.setdefault(plain[match["name"]], f"was taken for the number {match['size']}")
    for match in _FIXES.finditer(said.partition("Suggested fixes:")[2]):
        if match["name"] in plain:
            fix = match["fix"]
            text = f"was taken for the number {fix}" if fix.isdigit() else f"must be {fix.replace('*_', ' * ')}"
            found.setdefault(plain[match["name"]], text)
    return found


def _remedy(kind: str, names: Mapping[str, Any]) -> str:
    """What to write instead."""
    method = {"encoder": "encode", "decoder": "decode"}.get(kind, kind)
    if set(names) == {"batch"}:
        return (
            f"Something in {method} makes a Python number of the batch: write z.shape[0] instead of len(z) or a "
            "number, and -1 for it in reshape and view, and keep sizes out of int() and out of loops"
        )
    return (
        f"Something in {method} depends on the size by a branch, a loop, int() or a constant that was made for one "
        "size. Write sizes as x.shape[-1] // 2 instead of int(w / 2), z.shape[0] instead of len(z), -1 or shapes "
        "instead of numbers in reshape, torch.where instead of a branch, operators over the whole axis instead of a "
        "loop, and F.interpolate(scale_factor=...), or to x.shape[-2:], for what is stored at one size. If the model "
        "is for one size only, leave multiple_of away"
    )


def _first_lines(text: str) -> str:
    """What a message says before it shows code: its first line, and those below as far as it goes on."""
    lines = [line.strip() for line in text.strip().splitlines()]
    taken = list(itertools.takewhile(bool, lines[:4]))
    end = next((i for i, line in enumerate(taken) if not line.endswith(":")), len(taken) - 1)
    return " ".join(taken[: end + 1])


def _at(named: Mapping[int, str], sizes: torch.Size) -> str:
    return ", ".join(f"{name} {sizes[axis]}" for axis, name in named.items())


def _check_every_size(kind: str, program: Any, named: Mapping[int, str], traced: torch.Size, model: Model) -> None:
    """Refuse a graph that holds for some of the promised batches and sizes only.

    Raises:
        InputError: it does; with the assumption, a size at which it does not hold, and what to write instead.
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
            baked[dim] = f"was taken for the number {expression}"
        else:
            baked[dim] = "was found to be restricted to multiples"
    if baked:
        what = " and ".join(f"{dim} {text}" for dim, text in baked.items())
        raise InputError(
            f"export: the {kind} was traced as a graph for one size, not for all: {what}. It was traced at "
            f"{_at(named, traced)}. {_remedy(kind, baked)}"
        )
    if not symbols:
        return
    environment = value.fake_mode.shape_env
    conditions = [guard.expr for guard in environment.guards]
    conditions += [one.expr for many in environment.deferred_runtime_asserts.values() for one in many]
    for symbol, limits in program.range_constraints.items():
        if limits.upper.is_number and limits.upper.is_finite:
            conditions.append(symbol <= limits.upper)
    broken = _broken(list(dict.fromkeys(conditions)), symbols, list(_places(kind, model)))
    if broken is not None:
        raise InputError(
            f"export: the {kind} depends on the size by more than its shape. Traced at {_at(named, traced)} it takes "
            f"for granted that {broken.condition}, and that is not so at "
            f"{', '.join(f'{dim} {size}' for dim, size in broken.sizes.items())}, where the graph would be wrong or "
            f"fail. {_remedy(kind, broken.sizes)}"
        )


def _places(kind: str, model: Model) -> Iterator[dict[str, int]]:
    """Batches and sizes of a graph's input that the model promises, by the dimensions' names, smallest first."""
    named = model.data.named()
    grids = {
        name: [size for step in _STEPS if dim.allows(size := dim.multiple_of * (-(-dim.min // dim.multiple_of) + step))]
        for name, dim in named.items()
    }
    many = len(_STEPS)
    turned = [(i, j) for i in range(many) for j in {0, i, many - 1 - i, (7 * i + 3) % many}]
    shape = model.signature(kind)[0][0].shape
    for number, (first, second) in enumerate(turned):
        sizes = {
            name: grids[name][index % len(grids[name])]
            for name, index in zip(grids, itertools.cycle((first, second)), strict=False)
        }
        batch = _BATCHES[number % len(_BATCHES)]
        real = model.tensor_shape(model.signature(kind)[0][0], batch, sizes)
        yield {dim: size for dim, size in zip(shape, real, strict=True) if isinstance(dim, str)}


def _broken(
    conditions: list[Any], symbols: Mapping[sympy.Symbol, str], places: list[dict[str, int]]
) -> _Assumption | None:
    """The first condition that does not hold for some place.

    Two kinds are passed over, which PyTorch notes for every convolution whether or not a result depends on them, and
    which the certificate is measured on: limits of the batch, alone or times sizes, by which it chooses an
    implementation, and that a size or a product of sizes is not 1.
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
            continue  # the same of what is never below 1
        tried: set[tuple[int, ...]] = set()
        for place in places:
            sizes = {symbol: place[symbols[symbol]] for symbol in free}
            key = tuple(sizes[symbol] for symbol in sorted(free, key=str))
            if key in tried or 1 in key:
                continue
            tried.add(key)
            if condition.xreplace({symbol: sympy.Integer(size) for symbol, size in sizes.items()}) == sympy.false:
                words = condition.xreplace({symbol: sympy.Symbol(_atom(symbols[symbol])) for symbol in free})
                return _Assumption(_words(words), {symbols[symbol]: size for symbol, size in sizes.items()})
    return None


def _atom(dim: str) -> str:
    """A dimension's name as part of a formula."""
    return dim if dim.isidentifier() else f"({dim})"


def _words(condition: Any) -> str:
    """A condition as Python writes it."""
    relations = {"Equality": "==", "Unequality": "!="}
    sign = relations.get(type(condition).__name__)
    return f"{condition.lhs} {sign} {condition.rhs}" if sign else str(condition)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what PyTorch's exporter says about itself: its own deprecations, and missing torchvision."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(level)


def _keep_small_constants(model: onnx_ir.Model) -> None:
    """Hide from the optimizer scalars that it would take for 0 or 1: an epsilon of 1e-15, a factor of 1.000005.

    Its rules for adding 0 and multiplying by 1 match scalars to 1e-8 and 1e-5 (onnxscript 0.7, `rewriter`), and nothing
    but scalars. With one axis they broadcast alike.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type not in _ARITHMETIC:
            continue
        for index, value in enumerate(node.inputs):
            other = node.inputs[1 - index]
            tensor = None if value is None else onnx_ir.convenience.get_const_tensor(value)
            if tensor is None or other is None or other.shape is None or not len(other.shape) or tensor.numpy().ndim:
                continue
            array = tensor.numpy()
            number = float(array) if array.dtype.kind == "f" else 0.0
            if 0 < abs(number) < _NEARLY_ZERO or 0 < abs(number - 1) < _NEARLY_ONE:
                constant = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(array.reshape(1))})
                assert node.graph is not None  # it is one of the graph's nodes
                node.graph.insert_before(node, constant)
                node.replace_input_with(index, constant.outputs[0])


def _rename_inner(model: onnx_ir.Model) -> None:
    """Keep the names of inputs and outputs for them: PyTorch may call an inner value `mean`, too."""
    ends = [*model.graph.inputs, *model.graph.outputs]
    names = {value.name for value in ends}
    inner = [value for node in model.graph.all_nodes() for value in node.outputs]
    for index, value in enumerate([*inner, *model.graph.initializers.values()]):
        if value.name in names and not any(value is end for end in ends):
            value.name = f"{value.name}_inner_{index}"


def _forget_origin(model: onnx_ir.Model) -> None:
    """Drop the stack traces and paths of the exporting machine that PyTorch writes beside every node."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
