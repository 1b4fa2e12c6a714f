"""Which nodes of a graph compute lower, found by measurement.

Activations are recorded on real data, on their latents and on draws from the prior. What would leave the range of a
type is kept in float32 from the beginning. The rest is lowered, and if the certificate's budget does not hold, so many
of the nodes that lose most are kept as bisection finds to be enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vae_export import noise
from vae_export.builds import Precision
from vae_export.errors import require
from vae_export.golden import Reference
from vae_export.manifest import Model
from vae_export.runtimes import VAE, open_backend

Array = npt.NDArray[np.float32]
Feed = Mapping[str, Array]

#: float16's largest number, and how much larger than what was recorded an activation may become.
_FLOAT16 = 65504.0
_HEADROOM = 4.0
#: Numbers of an activation that are kept of each feed, to choose its range by.
_KEPT = 1 << 14
#: Examples on which activations are recorded, and as many draws from the prior.
_ROWS = 32
#: Ranges that are tried, as shares of what was seen. Cutting off a few large numbers makes the steps finer.
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True)
class Activation:
    """What was seen of a value.

    Attributes:
        largest: its largest magnitude.
        span: from where to where 256 levels lose the least.
        loss: what they lose there: the RMS of the error as a share of the value's RMS.
    """

    largest: float
    span: tuple[float, float]
    loss: float


@dataclass(frozen=True)
class Lowered:
    """A graph in a lower precision.

    Attributes:
        graph: its bytes.
        kept: nodes that stayed in float32, each with the reason.
    """

    graph: bytes
    kept: dict[str, str]


def record(graph: bytes, feeds: Iterable[Feed]) -> dict[str, Activation]:
    """Run a graph in float32 and look at its inputs and every float32 value of its nodes.

    Args:
        graph: serialized ONNX, with its weights.
        feeds: its inputs, one after the other.

    Raises:
        BackendError: ONNX Runtime is not installed.
    """
    ort = require("onnxruntime", "cpu", "build")
    from vae_export import graph as graphs
    from vae_export.graph.precision import floats

    tapped = graphs.read(graph)
    for value in floats(tapped):
        if not value.is_graph_output():
            tapped.graph.outputs.append(value)
    names = [str(value.name) for value in tapped.graph.outputs]
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    session = ort.InferenceSession(graphs.write(tapped), settings, providers=["CPUExecutionProvider"])
    largest: dict[str, float] = {}
    seen: dict[str, list[npt.NDArray[np.float64]]] = {}
    for feed in feeds:
        for name, value in (*feed.items(), *zip(names, session.run(names, dict(feed)), strict=True)):
            if value.dtype != np.float32 or not value.size:
                continue
            flat = value.reshape(-1)
            ends = np.array([flat.min(), flat.max()], np.float64)
            largest[name] = max(largest.get(name, 0.0), float(np.abs(ends).max()))
            part = flat[:: max(1, flat.size // _KEPT)].astype(np.float64)
            seen.setdefault(name, []).append(np.concatenate([ends, part]))
    return {name: _activation(np.concatenate(parts), largest[name]) for name, parts in seen.items()}


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
    """`record` for an encoder and a decoder: on calibration data, on their latents and on as many draws of the prior.

    Args:
        graphs: `encoder` and `decoder`, serialized, with their weights.
        model: what they compute.
        reference: whose examples are taken where there is no calibration data.
        calibration: (n, *data); n may be 0.
    """
    x = calibration[:_ROWS] if len(calibration) else reference.tensors["x"][reference.record.extremes :][:_ROWS]
    with VAE(model, open_backend(graphs, model, device="cpu")) as vae:
        posterior = vae.encode(x)
        latents = posterior.mode() if posterior.logvar is None else posterior.sample()
    shape = latents.shape[1:]
    z = noise.normals(0, noise.PRIOR, 0, len(x), math.prod(shape)).reshape(-1, *shape)
    return {
        "encoder": record(graphs["encoder"], ({"x": row[None]} for row in x)),
        "decoder": record(graphs["decoder"], ({"z": row[None]} for row in (*latents, *z))),
    }


def choose(
    name: str,
    graph: bytes,
    precision: Precision,
    seen: Mapping[str, Activation],
    problem: Callable[[bytes], str | None] | None,
) -> Lowered | None:
    """A graph with as many nodes in a lower precision as its budget allows.

    Args:
        name: what to call the graph in messages.
        graph: serialized ONNX in float32, with its weights.
        precision: `fp16`, `bf16` or `int8`.
        seen: what `record` gave.
        problem: measures a lowered graph, and says what is out of budget, or None; None takes the first graph as it is.

    Returns:
        None where every node would have to be kept.

    Raises:
        InputError: a weight is beyond the type's range.
    """
    from vae_export import graph as graphs
    from vae_export.graph import quantize
    from vae_export.graph.precision import heavy, lower

    plain = graphs.read(graph)
    forced: dict[str, str] = {}
    if precision == "int8":
        losses = {str(node.name): _loss(node, seen) for node in quantize.quantizable(plain)}
    else:
        if precision == "fp16":
            forced = _overflowing(plain, seen)
        losses = {
            str(node.name): max((seen[str(v.name)].largest for v in node.outputs if str(v.name) in seen), default=0.0)
            for node in heavy(plain)
            if node.name not in forced
        }
    order = sorted(losses, key=losses.__getitem__, reverse=True)

    def make(count: int) -> Lowered:
        model = graphs.read(graph)
        kept = forced | {node: _reason(precision, losses[node], count) for node in order[:count]}
        if precision == "int8":
            spans = {value: activation.span for value, activation in seen.items()}
            quantize.apply(model, set(order[count:]), spans)
        else:
            model = lower(model, "fp16" if precision == "fp16" else "bf16", name, kept)
        return Lowered(graphs.write(model), kept)

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


def _loss(node: Any, seen: Mapping[str, Activation]) -> float:
    """What 8 bits lose of a node's result, about: of its activation and of its weights, as a share of each."""
    from vae_export.graph import edit, quantize

    weights = edit.constant(node.inputs[1])
    assert weights is not None
    exact, rounded = weights.astype(np.float64), quantize.rounded(node)
    size = float(np.sqrt(np.mean(exact**2)))
    lost = float(np.sqrt(np.mean((rounded - exact) ** 2))) / size if size else 0.0
    return math.hypot(seen[str(node.inputs[0].name)].loss, lost)


def _overflowing(model: Any, seen: Mapping[str, Activation]) -> dict[str, str]:
    """The nodes that take or give something that float16 cannot hold, with room for what was not seen."""
    kept = {}
    for node in model.graph:
        values = [str(value.name) for value in (*node.inputs, *node.outputs) if value is not None]
        largest = max((seen[value].largest for value in values if value in seen), default=0.0)
        if largest * _HEADROOM > _FLOAT16:
            kept[str(node.name)] = f"values up to {largest:.3g} with {_HEADROOM:g} times to spare leave float16's range"
    return kept


def _reason(precision: Precision, loss: float, count: int) -> str:
    if precision == "int8":
        return f"8 bits lose {loss:.2%} of it: one of the {count} that lose most"
    return f"values up to {loss:.3g}: one of the {count} largest"
