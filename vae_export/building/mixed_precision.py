"""Which nodes of a graph compute lower, found by measurement.

Activations are recorded on real data, on their latents and on draws from the prior. What would leave the range of a
type is kept in float32 from the beginning; for models of named sizes it is looked at in a large size, too, where sums
over all positions are larger. The rest is lowered, and if the certificate's budget does not hold, so many of the nodes
that lose most are kept as bisection finds to be enough.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vae_export.certification.golden import Reference, stretched
from vae_export.contract.model import Model
from vae_export.contract.onnx_guard import Arrays
from vae_export.contract.targets import Precision
from vae_export.errors import require
from vae_export.numerics import noise
from vae_export.runtimes import VAE, Settings, open_backend
from vae_export.runtimes.backend import planned
from vae_export.runtimes.cpu.dispatch import CpuBackend
from vae_export.runtimes.ort_session import session_options

if TYPE_CHECKING:
    from vae_export.graph.quantize import Bits

Array = npt.NDArray[np.float32]
Feed = Mapping[str, Array]

#: float16's largest number, and how much larger than what was recorded an activation may become.
_FLOAT16 = 65504.0
_HEADROOM = 4.0
#: Numbers of an activation that are kept to choose its range by: of each feed, and of all together.
_KEPT, _KEPT_TOGETHER = 1 << 14, 1 << 19
#: Examples on which activations are recorded, and as many draws from the prior: all that there are of the first number
#: that have no more numbers together than the second, but some in any case.
_MOST_ROWS, _NUMBERS, _ROWS = 256, 1 << 21, 32
#: The large size: so many times that of the examples in each direction, but no more positions than so many, and how
#: many examples are looked at there.
_TIMES, _POSITIONS, _LARGE_ROWS = 4, 1 << 20, 2
#: A value that is so many times as large in the large size grows with the number of positions. How large it becomes is
#: then asked for a size of so many positions, or the largest that the model takes.
_GROWS, _FARTHEST = 2.0, 1 << 22
#: Ranges that are tried, as shares of what was seen. Cutting off a few large numbers makes the steps finer.
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True)
class Activation:
    """What was seen of a value.

    Attributes:
        largest: its largest magnitude.
        span: from where to where 256 levels lose the least.
        loss: what they lose there: the RMS of the error as a share of the value's RMS.
        where: the size at which it is so large, if that is not the examples', in words.
    """

    largest: float
    span: tuple[float, float]
    loss: float
    where: str = ""


@dataclass(frozen=True)
class ReducedPrecision:
    """A graph in a lower precision.

    Attributes:
        graph: its bytes.
        kept: nodes that stayed in float32, each with the reason.
    """

    graph: bytes
    kept: dict[str, str]


def record(graph: bytes, feeds: Sequence[Feed]) -> dict[str, Activation]:
    """Run a graph in float32 and look at its inputs and every float32 value of its nodes.

    Args:
        graph: serialized ONNX, with its weights.
        feeds: its inputs, one after the other.

    Raises:
        BackendError: ONNX Runtime is not installed.
    """
    ort = require("onnxruntime", "cpu", "build")
    from vae_export import graph as graphs
    from vae_export.graph.half import floats

    tapped = graphs.read(graph)
    for value in floats(tapped):
        if not value.is_graph_output():
            tapped.graph.outputs.append(value)
    names = [str(value.name) for value in tapped.graph.outputs]
    settings = session_options(ort, Arrays())
    session = ort.InferenceSession(graphs.write(tapped), settings, providers=["CPUExecutionProvider"])
    kept = min(_KEPT, _KEPT_TOGETHER // max(1, len(feeds)))
    largest: dict[str, float] = {}
    seen: dict[str, list[Array]] = {}
    for feed in feeds:
        for name, value in (*feed.items(), *zip(names, session.run(names, dict(feed)), strict=True)):
            if value.dtype != np.float32 or not value.size:
                continue
            flat = value.reshape(-1)
            ends = np.array([flat.min(), flat.max()], np.float32)
            largest[name] = max(largest.get(name, 0.0), float(np.abs(ends).max()))
            part = flat[:: max(1, flat.size // kept)]
            seen.setdefault(name, []).append(np.concatenate([ends, part]))
    return {name: _activation(np.concatenate(parts).astype(np.float64), largest[name]) for name, parts in seen.items()}


def largest(graph: bytes, feeds: Sequence[Feed]) -> dict[str, float]:
    """The largest magnitude of what `record` looks at, without keeping any of it: for large sizes.

    Args:
        graph: serialized ONNX, with its weights.
        feeds: its inputs, one after the other.

    Raises:
        BackendError: ONNX Runtime is not installed.
    """
    ort = require("onnxruntime", "cpu", "build")
    import onnx_ir

    from vae_export import graph as graphs
    from vae_export.graph.half import floats

    watched = graphs.read(graph)
    main = watched.graph
    names: dict[str, str] = {}
    for value in floats(watched):
        node, size = value.producer(), value
        assert node is not None
        for operator, attributes in (("Abs", {}), ("ReduceMax", {"keepdims": 0})):
            made = onnx_ir.node(operator, [size], attributes, name=f"{value.name}.watched.{operator}")
            (size,) = made.outputs
            size.name, size.type = str(made.name), onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
            main.insert_after(node, made)
            node = made
        size.shape = onnx_ir.Shape(())
        names[str(size.name)] = str(value.name)
        main.outputs.append(size)
    settings = session_options(ort, Arrays())
    settings.enable_mem_pattern = False
    session = ort.InferenceSession(graphs.write(watched), settings, providers=["CPUExecutionProvider"])
    found: dict[str, float] = {}
    for feed in feeds:
        seen = dict(zip(names.values(), session.run(list(names), dict(feed)), strict=True))
        seen |= {name: np.abs(value).max() for name, value in feed.items()}
        for name, value in seen.items():
            found[name] = max(found.get(name, 0.0), math.inf if np.isnan(value) else float(value))
    return found


def _activation(values: npt.NDArray[np.float64], largest: float) -> Activation:
    from vae_export.graph.quantize import levels

    if not np.isfinite(values).all():
        return Activation(math.inf, (0.0, 0.0), math.inf)
    low, high, best = float(values.min()), float(values.max()), (math.inf, (0.0, 0.0))
    for share in _SHARES:
        span = (share * low, share * high)
        scale, zero = levels(*span)
        steps = np.clip(np.rint(values / scale) + zero, 0, 255) - zero
        best = min(best, (float(np.sqrt(np.mean((steps * scale - values) ** 2))), span))
    size = float(np.sqrt(np.mean(values**2)))
    return Activation(largest, best[1], best[0] / size if size else 0.0)


def record_both(
    graphs: Mapping[str, bytes], model: Model, reference: Reference, calibration: Array
) -> dict[str, dict[str, Activation]]:
    """`record` for an encoder and a decoder: on the rows of `calibrated` and on their latents.

    Where there is a posterior variance, latents are drawn from the posterior, and as many from the prior, which is what
    the decoder is given, too. The decoder of a deterministic model is given latents of data.

    Args:
        graphs: `encoder` and `decoder`, serialized, with their weights.
        model: what they compute.
        reference: whose examples are taken where there is little calibration data.
        calibration: (n, *data); n may be 0.
    """
    x, _ = calibrated(model, reference, calibration)
    seen: dict[str, dict[str, Activation]] = {
        graph: record(graphs[graph], [{name: row[None]} for row in rows])
        for graph, (name, rows) in _given(graphs, model, x).items()
    }
    low, high = model.data.range
    span = (min(low, seen["encoder"]["x"].span[0]), max(high, seen["encoder"]["x"].span[1]))
    seen["encoder"]["x"] = dataclasses.replace(seen["encoder"]["x"], span=span)
    if (sizes := large_sizes(model, x.shape[1:])) is None:
        return seen
    usual, wide = _positions(model.input_sizes("encoder", x.shape[1:])), _positions(sizes)
    farther = max(1.0, _farthest(model) / wide)
    where = size_text(sizes)
    data = stretched(x[:_LARGE_ROWS], model.data_shape(model.latent_shape(sizes)))
    for graph, (name, rows) in _given(graphs, model, data).items():
        there = largest(graphs[graph], [{name: row[None]} for row in rows])
        for value, activation in seen[graph].items():
            size = _grown(activation.largest, there.get(value, 0.0), wide / usual, farther)
            if size > activation.largest:
                seen[graph][value] = dataclasses.replace(activation, largest=size, where=where)
    return seen


def calibrated(model: Model, reference: Reference, calibration: Array) -> tuple[Array, dict[str, int]]:
    """The rows on which activations are recorded: calibration data, and where that is little, golden examples.

    Of these, held-out data come before decoded draws from the prior.

    Args:
        model: whose decoder is given draws from the prior, too, where it has a posterior variance.
        reference: the golden examples.
        calibration: (n, *data); n may be 0.

    Returns:
        (m, *data), and how many of them are what: `calibration`, `held_out`, `decoded`; and `prior`, the draws.
    """
    record = reference.record
    golden = reference.tensors["x"][record.extremes :]
    data = golden.shape[1:] if not len(calibration) else calibration.shape[1:]
    most = min(_MOST_ROWS, max(_ROWS, _NUMBERS // math.prod(data)))
    x = calibration[:most]
    counts = {"calibration": len(x)}
    if len(x) < _ROWS:
        more = stretched(golden[: (_ROWS if len(x) else most) - len(x)], data)
        held_out = min(record.held_out, len(more))
        counts |= {"held_out": held_out, "decoded": len(more) - held_out}
        x = np.concatenate([x.reshape(-1, *data), more])
    counts["prior"] = len(x) if model.posterior.kind == "diagonal_gaussian" else 0
    return x, {kind: count for kind, count in counts.items() if count}


def size_text(sizes: Mapping[str, int]) -> str:
    """Sizes in words."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _given(graphs: Mapping[str, bytes], model: Model, x: Array) -> dict[str, tuple[str, Array]]:
    """For each graph the name of its input, and rows of it: data, and latents."""
    with VAE(model, open_backend(graphs, model, device="cpu")) as vae:
        posterior = vae.encode(x)
        latents = posterior.mode() if posterior.logvar is None else posterior.sample()
    if posterior.logvar is not None:
        shape = latents.shape[1:]
        draws = noise.normals(0, noise.PRIOR, 0, len(x), math.prod(shape)).reshape(-1, *shape)
        latents = np.concatenate([latents, draws])
    return {"encoder": ("x", x), "decoder": ("z", latents)}


def large_sizes(model: Model, shape: tuple[int, ...]) -> dict[str, int] | None:
    """The sizes of the data's named dimensions at which a lowered graph is looked at once more.

    Args:
        model: whose data may have named dimensions.
        shape: of one example of the usual size.

    Returns:
        None where there are no named dimensions, or no much larger size that the model takes and one can afford.
    """
    named = model.data.named()
    usual = model.input_sizes("encoder", shape)
    if not named:
        return None
    times = min(_TIMES, (_POSITIONS / _positions(usual)) ** (1 / len(usual)))
    sizes = {}
    for name, dim in named.items():
        most = int(times * usual[name]) if dim.max is None else min(int(times * usual[name]), dim.max)
        sizes[name] = max(usual[name], most // dim.multiple_of * dim.multiple_of)
    return sizes if _positions(sizes) >= _GROWS * _positions(usual) else None


def _positions(sizes: Mapping[str, int]) -> int:
    return math.prod(sizes.values())


def _farthest(model: Model) -> float:
    """The positions of the largest size that a graph in half precision is made for."""
    named = model.data.named().values()
    side = _FARTHEST ** (1 / len(named))
    return math.prod(side if dim.max is None else min(side, dim.max) for dim in named)


def _grown(usual: float, there: float, times: float, farther: float) -> float:
    """How large a value becomes: as it is where it does not grow with the size, and as its power law has it where it
    does. A sum over positions grows as many times as there are more of them.
    """
    if not (usual > 0.0 and there > _GROWS * usual):
        return max(usual, there)
    if not math.isfinite(there):
        return there
    power = min(1.0, math.log(there / usual) / math.log(times))
    return float(there * farther**power)


def choose(
    name: str,
    graph: bytes,
    precision: Precision,
    seen: Mapping[str, Activation],
    problem: Callable[[bytes], str | None] | None,
    bits: Bits = 8,
) -> ReducedPrecision | None:
    """A graph with as many nodes in a lower precision as its budget allows.

    Args:
        name: what to call the graph in messages.
        graph: serialized ONNX in float32, with its weights.
        precision: `fp16`, `bf16` or `int8`.
        seen: what `record` gave.
        problem: measures a lowered graph, and says what is out of budget, or None; None takes the first graph as it is.
        bits: of the weights of `int8`.

    Returns:
        None where every node would have to be kept.

    Raises:
        InputError: a weight is beyond the type's range.
    """
    from vae_export import graph as graphs
    from vae_export.graph import quantize
    from vae_export.graph.half import heavy, to_half

    plain = graphs.read(graph)
    forced: dict[str, str] = {}
    if precision == "int8":
        losses = {str(node.name): _loss(node, seen, bits) for node in quantize.quantizable(plain)}
    else:
        if precision == "fp16":
            forced = _overflowing(plain, seen)
        losses = {
            str(node.name): max((seen[str(v.name)].largest for v in node.outputs if str(v.name) in seen), default=0.0)
            for node in heavy(plain)
            if node.name not in forced
        }
    order = sorted(losses, key=losses.__getitem__, reverse=True)

    def make(count: int) -> ReducedPrecision:
        model = graphs.read(graph)
        kept = forced | {node: _reason(precision, losses[node], count, bits) for node in order[:count]}
        if precision == "int8":
            spans = {value: activation.span for value, activation in seen.items()}
            quantize.apply(model, set(order[count:]), spans, bits)
        else:
            model = to_half(model, "fp16" if precision == "fp16" else "bf16", name, kept)
        return ReducedPrecision(graphs.write(model), kept)

    if problem is None:
        return make(0)
    fails, holds, found = -1, len(order), None
    middle = 0
    while holds - fails > 1:
        made = make(middle)
        if problem(made.graph) is None:
            holds, found = middle, made
        else:
            fails = middle
        middle = (fails + holds) // 2
    return found


def _loss(node: Any, seen: Mapping[str, Activation], bits: Bits) -> float:
    """What integers lose of a node's result, about: of its activation and of its weights, as a share of each."""
    from vae_export.graph import edit, quantize

    weights = edit.constant(node.inputs[1])
    assert weights is not None
    exact, rounded = weights.astype(np.float64), quantize.rounded(node, bits)
    size = float(np.sqrt(np.mean(exact**2)))
    lost = float(np.sqrt(np.mean((rounded - exact) ** 2))) / size if size else 0.0
    return math.hypot(seen[str(node.inputs[0].name)].loss, lost)


def _overflowing(model: Any, seen: Mapping[str, Activation]) -> dict[str, str]:
    """The nodes that take or give something that float16 cannot hold, with room for what was not seen."""
    kept = {}
    for node in model.graph:
        values = [str(value.name) for value in (*node.inputs, *node.outputs) if value is not None]
        found = max((seen[value] for value in values if value in seen), key=lambda each: each.largest, default=None)
        if found and found.largest * _HEADROOM > _FLOAT16:
            where = f" (it grows with the size: measured at {found.where})" * bool(found.where)
            kept[str(node.name)] = (
                f"values up to {found.largest:.3g}{where} with {_HEADROOM:g} times to spare leave float16's range"
            )
    return kept


def _reason(precision: Precision, loss: float, count: int, bits: Bits) -> str:
    if precision == "int8":
        return f"{bits} bits lose {loss:.2%} of it: one of the {count} that lose most"
    return f"values up to {loss:.3g}: one of the {count} largest"


@dataclass(frozen=True)
class Large:
    """Inputs of a size at which a lowered graph is looked at once more.

    Attributes:
        sizes: of the data's named dimensions.
        inputs: for each graph the name of its input, and rows of it.
    """

    sizes: Mapping[str, int]
    inputs: Mapping[str, tuple[str, Array]]

    def problem(self, graph: str, made: bytes, model: Model) -> str | None:
        """What is not finite in a graph at this size, in words, or None.

        Args:
            graph: its name.
            made: its bytes: those of `rounding`, where it is in half precision.
            model: what it computes.
        """
        name, rows = self.inputs[graph]
        backend = CpuBackend({graph: [planned(made)]}, model, Settings())
        outputs = tuple(tensor.name for tensor in model.signature(graph)[1])
        try:
            for row in rows:
                for output, value in zip(outputs, backend.run(graph, {name: row[None]}, outputs, 1), strict=True):
                    if wrong := int((~np.isfinite(value)).sum()):
                        at = size_text(self.sizes)
                        return f"{graph}: {wrong} of {value.size} values of {output} are not finite at {at}"
        finally:
            backend.close()
        return None


def large(graphs: Mapping[str, bytes], model: Model, reference: Reference) -> Large | None:
    """Inputs of a large size, of the golden examples; None where there is no such size.

    Args:
        graphs: `encoder` and `decoder` in float32, serialized, with their weights.
        model: what they compute.
        reference: the golden examples.
    """
    x = reference.tensors["x"][reference.record.extremes :][:1]
    if (sizes := large_sizes(model, x.shape[1:])) is None:
        return None
    return Large(sizes, _given(graphs, model, stretched(x, model.data_shape(model.latent_shape(sizes)))))


def rounding(graph: bytes) -> bytes:
    """A graph in half precision as hardware computes it that rounds every value: see `graph.rounding`."""
    from vae_export import graph as graphs
    from vae_export.graph import half_rounding as roundings

    model = graphs.read(graph)
    roundings.apply(model)
    return graphs.write(model)
