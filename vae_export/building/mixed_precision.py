"""Which nodes of a graph compute in reduced precision, and which stay in float32, by measurement.

Activations are recorded in float32 on real data, on their latents and on draws from the prior; models of named sizes
run at a large size, too, where sums over all positions are larger. Nodes whose values would leave float16's range stay
in float32. The others are in reduced precision; if a tolerance does not hold, those that lose most stay in float32, as
many as a bisection shows to be enough. Why a node stayed is in the build's record, under `kept`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vae_export.certification.golden import Reference, stretched
from vae_export.contract.choices import Precision
from vae_export.contract.model import Model
from vae_export.contract.onnx_guard import Arrays
from vae_export.errors import require
from vae_export.numerics import noise
from vae_export.runtimes import VAE, Settings, open_backend
from vae_export.runtimes.backend import Array, planned
from vae_export.runtimes.cpu.dispatch import CpuBackend
from vae_export.runtimes.ort_session import session_options

if TYPE_CHECKING:
    import onnx_ir

    from vae_export.graph.quantize import Bits

#: The inputs of one call, by name.
Batch = Mapping[str, Array]

#: float16's largest number, and how many times as large as recorded an activation may become.
_FLOAT16_MAX, _HEADROOM = 65504.0, 4.0
#: Values of an activation that are kept to choose its range by: of each batch, and of all together.
_KEPT, _KEPT_TOGETHER = 1 << 14, 1 << 19
#: Examples on which activations are recorded: at most the first number, and no more than have so many values together,
#: but at least the last number.
_MAX_ROWS, _MAX_VALUES, _MIN_ROWS = 256, 1 << 21, 32
#: The large size is at most so many times that of the examples in each direction, and has at most so many positions;
#: and so many examples are run at it.
_LARGE_FACTOR, _LARGE_POSITIONS, _LARGE_ROWS = 4, 1 << 20, 2
#: A value that is more than so many times as large at the large size grows with the number of positions. It is
#: extrapolated to a size of so many positions, or the largest that the model takes.
_GROWTH, _FARTHEST_POSITIONS = 2.0, 1 << 22
#: Ranges that are tried, as shares of what was recorded: clipping a few large values makes the levels finer.
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True)
class Activation:
    """What was recorded of one value of a graph.

    Attributes:
        largest: its largest magnitude.
        span: the range over which 256 levels lose the least.
        loss: the RMS error of rounding it to these levels, relative to its RMS.
        where: the size at which it is so large, in words; empty for the examples' size.
    """

    largest: float
    span: tuple[float, float]
    loss: float
    where: str = ""


def record_activations(graph: bytes, batches: Sequence[Batch]) -> dict[str, Activation]:
    """Run a serialized graph in float32 on batches of its inputs, and record every float32 value in it, by name.

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
    kept = min(_KEPT, _KEPT_TOGETHER // max(1, len(batches)))
    largest: dict[str, float] = {}
    seen: dict[str, list[Array]] = {}
    for batch in batches:
        for name, value in (*batch.items(), *zip(names, session.run(names, dict(batch)), strict=True)):
            if value.dtype != np.float32 or not value.size:
                continue
            flat = value.reshape(-1)
            ends = np.array([flat.min(), flat.max()], np.float32)
            largest[name] = max(largest.get(name, 0.0), float(np.abs(ends).max()))
            part = flat[:: max(1, flat.size // kept)]
            seen.setdefault(name, []).append(np.concatenate([ends, part]))
    return {name: _activation(np.concatenate(parts).astype(np.float64), largest[name]) for name, parts in seen.items()}


def largest(graph: bytes, batches: Sequence[Batch]) -> dict[str, float]:
    """The largest magnitudes of what `record_activations` records, computed inside the graph: for large sizes."""
    ort = require("onnxruntime", "cpu", "build")
    import onnx_ir

    from vae_export import graph as graphs
    from vae_export.graph.half import floats

    watched = graphs.read(graph)
    names: dict[str, str] = {}
    for value in floats(watched):
        node, size = value.producer(), value
        assert node is not None
        for operator, attributes in (("Abs", {}), ("ReduceMax", {"keepdims": 0})):
            added = onnx_ir.node(operator, [size], attributes, name=f"{value.name}.watched.{operator}")
            (size,) = added.outputs
            size.name, size.type = str(added.name), onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
            watched.graph.insert_after(node, added)
            node = added
        size.shape = onnx_ir.Shape(())
        names[str(size.name)] = str(value.name)
        watched.graph.outputs.append(size)
    settings = session_options(ort, Arrays())
    settings.enable_mem_pattern = False
    session = ort.InferenceSession(graphs.write(watched), settings, providers=["CPUExecutionProvider"])
    maxima: dict[str, float] = {}
    for batch in batches:
        seen = dict(zip(names.values(), session.run(list(names), dict(batch)), strict=True))
        seen |= {name: np.abs(value).max() for name, value in batch.items()}
        for name, value in seen.items():
            maxima[name] = max(maxima.get(name, 0.0), math.inf if np.isnan(value) else float(value))
    return maxima


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
    """`record_activations` for an encoder and a decoder: on the rows of `calibration_rows` and on their latents.

    Where there is a posterior variance, the decoder gets draws from the posterior, and as many from the prior; the
    decoder of a deterministic model gets latents of data.
    """
    x, _ = calibration_rows(model, reference, calibration)
    seen: dict[str, dict[str, Activation]] = {
        graph: record_activations(graphs[graph], [{name: row[None]} for row in rows])
        for graph, (name, rows) in _graph_inputs(graphs, model, x).items()
    }
    low, high = model.data.range
    span = (min(low, seen["encoder"]["x"].span[0]), max(high, seen["encoder"]["x"].span[1]))
    seen["encoder"]["x"] = dataclasses.replace(seen["encoder"]["x"], span=span)
    if (sizes := large_sizes(model, x.shape[1:])) is None:
        return seen
    usual, wide = (math.prod(each.values()) for each in (model.input_sizes("encoder", x.shape[1:]), sizes))
    # The positions of the largest size that values are extrapolated to.
    side = _FARTHEST_POSITIONS ** (1 / len(sizes))
    farthest = math.prod(side if dim.max is None else min(side, dim.max) for dim in model.data.named().values())
    data = stretched(x[:_LARGE_ROWS], model.data_shape(model.latent_shape(sizes)))
    for graph, (name, rows) in _graph_inputs(graphs, model, data).items():
        at_large = largest(graphs[graph], [{name: row[None]} for row in rows])
        for value, activation in seen[graph].items():
            size = extrapolated(activation.largest, at_large.get(value, 0.0), wide / usual, max(1.0, farthest / wide))
            if size > activation.largest:
                seen[graph][value] = dataclasses.replace(activation, largest=size, where=size_text(sizes))
    return seen


def calibration_rows(model: Model, reference: Reference, calibration: Array) -> tuple[Array, dict[str, int]]:
    """The rows on which activations are recorded: calibration data (n, *data), and where n is small, golden examples.

    Of the golden examples, held-out data come before decoded draws from the prior.

    Returns:
        (m, *data); and the number of rows of each kind, `calibration`, `held_out`, `decoded`, and of draws, `prior`.
    """
    record = reference.record
    golden = reference.tensors["x"][record.extremes :]
    data = golden.shape[1:] if not len(calibration) else calibration.shape[1:]
    most = min(_MAX_ROWS, max(_MIN_ROWS, _MAX_VALUES // math.prod(data)))
    x = calibration[:most]
    counts = {"calibration": len(x)}
    if len(x) < _MIN_ROWS:
        more = stretched(golden[: (_MIN_ROWS if len(x) else most) - len(x)], data)
        held_out = min(record.held_out, len(more))
        counts |= {"held_out": held_out, "decoded": len(more) - held_out}
        x = np.concatenate([x.reshape(-1, *data), more])
    counts["prior"] = len(x) if model.posterior.kind == "diagonal_gaussian" else 0
    return x, {kind: count for kind, count in counts.items() if count}


def size_text(sizes: Mapping[str, int]) -> str:
    """Sizes in words, such as `height 64, width 96`."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _graph_inputs(graphs: Mapping[str, bytes], model: Model, x: Array) -> dict[str, tuple[str, Array]]:
    """For each graph the name of its input, and rows for it: data, and latents."""
    with VAE(model, open_backend(graphs, model, device="cpu")) as vae:
        posterior = vae.encode(x)
        latents = posterior.mode() if posterior.logvar is None else posterior.sample()
    if posterior.logvar is not None:
        shape = latents.shape[1:]
        draws = noise.normals(0, noise.PRIOR, 0, len(x), math.prod(shape)).reshape(-1, *shape)
        latents = np.concatenate([latents, draws])
    return {"encoder": ("x", x), "decoder": ("z", latents)}


def large_sizes(model: Model, shape: tuple[int, ...]) -> dict[str, int] | None:
    """The large size, of each named dimension; `shape` is that of one example of the usual size.

    None where there are no named dimensions, or no much larger size that the model takes and that is affordable.
    """
    named = model.data.named()
    usual = model.input_sizes("encoder", shape)
    if not named:
        return None
    positions = math.prod(usual.values())
    times = min(_LARGE_FACTOR, (_LARGE_POSITIONS / positions) ** (1 / len(usual)))
    sizes = {}
    for name, dim in named.items():
        most = int(times * usual[name]) if dim.max is None else min(int(times * usual[name]), dim.max)
        sizes[name] = max(usual[name], most // dim.multiple_of * dim.multiple_of)
    return sizes if math.prod(sizes.values()) >= _GROWTH * positions else None


def extrapolated(usual: float, large: float, factor: float, farther: float) -> float:
    """The largest magnitude of a value at the largest size, by a power law where it grows with the number of positions.

    It is `usual` at the examples' size and `large` at the large one, which has `factor` times as many positions; the
    largest has `farther` times as many as the large one. The power is at most 1, that of a sum over all positions.
    """
    if not (usual > 0.0 and large > _GROWTH * usual):
        return max(usual, large)
    if not math.isfinite(large):
        return large
    power = min(1.0, math.log(large / usual) / math.log(factor))
    return float(large * farther**power)


@dataclass(frozen=True)
class LargeInputs:
    """Inputs of the size of `large_sizes`.

    Attributes:
        sizes: of the data's named dimensions.
        inputs: for each graph the name of its input, and rows for it.
    """

    sizes: Mapping[str, int]
    inputs: Mapping[str, tuple[str, Array]]

    def problem(self, graph: str, content: bytes, model: Model) -> str | None:
        """That a graph computes values that are not finite at this size, in words; None where all are finite."""
        name, rows = self.inputs[graph]
        outputs = tuple(tensor.name for tensor in model.signature(graph)[1])
        with contextlib.closing(CpuBackend({graph: [planned(content)]}, model, Settings())) as backend:
            for row in rows:
                for output, value in zip(outputs, backend.run(graph, {name: row[None]}, outputs, 1), strict=True):
                    if wrong := int((~np.isfinite(value)).sum()):
                        at = size_text(self.sizes)
                        return f"{graph}: {wrong} of {value.size} values of {output} are not finite at {at}"
        return None


def large_inputs(graphs: Mapping[str, bytes], model: Model, reference: Reference) -> LargeInputs | None:
    """A golden example and its latents, stretched to the size of `large_sizes`; None where there is no such size."""
    x = reference.tensors["x"][reference.record.extremes :][:1]
    if (sizes := large_sizes(model, x.shape[1:])) is None:
        return None
    return LargeInputs(sizes, _graph_inputs(graphs, model, stretched(x, model.data_shape(model.latent_shape(sizes)))))


@dataclass(frozen=True)
class ReducedPrecision:
    """A graph in reduced precision.

    Attributes:
        graph: serialized ONNX.
        kept: nodes that stayed in float32, each with the reason.
    """

    graph: bytes
    kept: dict[str, str]


def choose(
    name: str,
    graph: bytes,
    precision: Precision,
    seen: Mapping[str, Activation],
    problem: Callable[[bytes], str | None] | None,
    bits: Bits = 8,
) -> ReducedPrecision | str:
    """A graph with as many nodes in reduced precision as its tolerances allow.

    Args:
        name: what to call the graph in messages.
        graph: serialized ONNX in float32, with its weights.
        precision: `fp16`, `bf16` or `int8`.
        seen: what `record_activations` returned; for `bf16` it may be empty.
        problem: which tolerance a graph exceeds, or None; without it no node is kept for its errors.
        bits: of the weights of `int8`.

    Returns:
        Where every node would have to stay in float32: that, and the last problem.

    Raises:
        InputError: a weight is beyond the type's range.
    """
    from vae_export import graph as graphs
    from vae_export.graph import quantize
    from vae_export.graph.half import heavy, to_half

    exact = graphs.read(graph)
    overflowing: dict[str, str] = {}
    if precision == "int8":
        losses = {str(node.name): _loss(node, seen, bits) for node in quantize.quantizable(exact)}
    else:
        if precision == "fp16":
            overflowing = _overflowing(exact, seen)
        losses = {
            str(node.name): max((seen[str(v.name)].largest for v in node.outputs if str(v.name) in seen), default=0.0)
            for node in heavy(exact)
            if node.name not in overflowing
        }
    order = sorted(losses, key=losses.__getitem__, reverse=True)

    def reduced(count: int) -> ReducedPrecision:
        """With so many nodes kept for their errors."""
        model = graphs.read(graph)
        words = "values up to {:.3g}: one of the {} nodes with the largest"
        if precision == "int8":
            words = f"{bits} bits lose about {{:.2%}} of its result: one of the {{}} nodes that lose most"
        kept = overflowing | {node: words.format(losses[node], count) for node in order[:count]}
        if precision == "int8":
            spans = {value: activation.span for value, activation in seen.items()}
            quantize.apply(model, set(order[count:]), spans, bits)
        else:
            model = to_half(model, "fp16" if precision == "fp16" else "bf16", name, kept)
        return ReducedPrecision(graphs.write(model), kept)

    if problem is None:
        return reduced(0)
    # Bisection for the least count that passes, none first: `fails` does not pass, `passes` does or is all nodes.
    fails, passes, middle = -1, len(order), 0
    best: ReducedPrecision | str = "every node would have to stay in float32"
    while passes - fails > 1:
        candidate = reduced(middle)
        if reason := problem(candidate.graph):
            fails = middle
            if isinstance(best, str):
                best = f"every node would have to stay in float32; {reason}"
        else:
            passes, best = middle, candidate
        middle = (fails + passes) // 2
    return best


def _loss(node: onnx_ir.Node, seen: Mapping[str, Activation], bits: Bits) -> float:
    """An estimate of the relative error of a node in integers: of its activation's and its weights' rounding."""
    from vae_export.graph import edit, quantize

    weights = edit.constant(node.inputs[1])
    assert weights is not None
    exact, rounded = weights.astype(np.float64), quantize.rounded(node, bits)
    size = float(np.sqrt(np.mean(exact**2)))
    lost = float(np.sqrt(np.mean((rounded - exact) ** 2))) / size if size else 0.0
    activation = node.inputs[0]
    assert activation is not None
    return math.hypot(seen[str(activation.name)].loss, lost)


def _overflowing(model: onnx_ir.Model, seen: Mapping[str, Activation]) -> dict[str, str]:
    """Nodes with an input or output that float16 cannot hold, with headroom for values that were not recorded."""
    kept = {}
    for node in model.graph:
        values = [str(value.name) for value in (*node.inputs, *node.outputs) if value is not None]
        worst = max((seen[value] for value in values if value in seen), key=lambda each: each.largest, default=None)
        if worst and worst.largest * _HEADROOM > _FLOAT16_MAX:
            where = f" (it grows with the size: measured at {worst.where})" * bool(worst.where)
            kept[str(node.name)] = (
                f"values up to {worst.largest:.3g}{where}, times {_HEADROOM:g} for headroom, leave float16's range"
            )
    return kept


def rounding(graph: bytes) -> bytes:
    """A graph in half precision with every value rounded, as hardware computes it: see `graph.half_rounding`."""
    from vae_export import graph as graphs
    from vae_export.graph import half_rounding

    model = graphs.read(graph)
    half_rounding.apply(model)
    return graphs.write(model)
