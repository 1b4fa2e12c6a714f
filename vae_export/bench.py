"""Latency of a bundle: our runtime, a bare ONNX Runtime session and PyTorch, interleaved in one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from rich.table import Table

from vae_export import golden, noise, onnx_reader
from vae_export.bundle import Bundle
from vae_export.errors import InputError, VerificationError, require
from vae_export.runtimes import VAE, load
from vae_export.runtimes.ort import session_options

VERBS = ("encode", "decode", "sample")
_ROUNDS = 10
# At the start of its turn a runtime's threads may have to wait for another's that still spin, for tens of
# milliseconds: these calls are not counted.
_SETTLE_SECONDS = 0.05
_ROUND_SECONDS = 0.05

Array = npt.NDArray[np.float32]
Call = Callable[[], Any]


class Candidate(Protocol):
    """A way to run a bundle's model. `prepare` gives a call that returns what the verb computes."""

    name: str

    def prepare(self, verb: str, value: Array) -> Call:
        """The verb on inputs of `value`'s batch: x (B, *data) for encode, else z (B, *latent)."""
        ...

    def check(self, verb: str, result: Any, expected: Array) -> None:
        """Raise VerificationError unless a call's result is right."""
        ...


class Ours:
    """`vae_export.load`, all input checks on."""

    name = "vae_export"

    def __init__(self, path: Path) -> None:
        self.vae: VAE = load(path, device="cpu", micro_batch=1024)

    def prepare(self, verb: str, value: Array) -> Call:
        """The public methods."""
        if verb == "encode":
            return lambda: self.vae.encode(value)
        if verb == "decode":
            return lambda: self.vae.decode(value)
        sizes = self.vae.model.sizes(value.shape[1:])
        return lambda: self.vae.sample(len(value), size=sizes or None)

    def check(self, verb: str, result: Any, expected: Array) -> None:
        """Samples are known, too: their noise is addressed."""
        _equal(result.mean if verb == "encode" else result, expected)


class Bare:
    """`InferenceSession.run` on the bundle's own graphs: nothing is checked."""

    name = "ONNX Runtime, bare"

    def __init__(self, path: Path) -> None:
        ort = require("onnxruntime", "cpu", "bench")
        bundle = Bundle(path)
        self.sessions = {}
        graphs, weights = bundle.graphs()
        self.arrays = {
            name: onnx_reader.check_operators(model, name, weights.get(name)) for name, model in graphs.items()
        }
        for name, model in graphs.items():
            settings = session_options(ort, self.arrays[name])
            self.sessions[name] = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        self.random = np.random.default_rng(0)

    def prepare(self, verb: str, value: Array) -> Call:
        """The same outputs as the public methods, noise from NumPy's usual generator."""
        encoder, decoder = self.sessions["encoder"], self.sessions["decoder"]
        if verb == "encode":
            names = [output.name for output in encoder.get_outputs()]
            return lambda: encoder.run(names, {"x": value})
        if verb == "decode":
            return lambda: decoder.run(["sample"], {"z": value})
        draw, shape = self.random.standard_normal, value.shape
        return lambda: decoder.run(["sample"], {"z": draw(shape, np.float32)})

    def check(self, verb: str, result: Any, expected: Array) -> None:
        """Samples have other noise here: shape and finiteness are what can be checked."""
        _like(result[0], expected) if verb == "sample" else _equal(result[0], expected)


class Eager:
    """The PyTorch model as it is, in evaluation mode without gradients."""

    name = "PyTorch eager"

    def __init__(self, module: Any) -> None:
        self.module = module.eval()

    def prepare(self, verb: str, value: Array) -> Call:
        """Tensor in, tensor out; noise from torch.randn."""
        import torch

        tensor, module = torch.from_numpy(value), self.module

        def encode() -> Any:
            with torch.inference_mode():
                return module.encode(tensor)

        def decode() -> Any:
            with torch.inference_mode():
                return module.decode(tensor)

        def sample() -> Any:
            with torch.inference_mode():
                return module.decode(torch.randn(tensor.shape))

        return {"encode": encode, "decode": decode, "sample": sample}[verb]

    def check(self, verb: str, result: Any, expected: Array) -> None:
        """As for the bare session."""
        _like(result[0].numpy(), expected) if verb == "sample" else _equal(result[0].numpy(), expected)


def candidates(path: Path, source: Path | None = None) -> list[Candidate]:
    """All that can run this bundle here. PyTorch needs the checkpoint that the bundle came from.

    Raises:
        InputError, BundleError, BackendError: as for `load`, and for reading the checkpoint.
    """
    ours = Ours(path)  # first: it checks the bundle
    found: list[Candidate] = [Bare(path), ours]
    if source is not None:
        require("torch", "export", "bench --source")
        from vae_export.sources.checkpoint import load as load_source

        found.insert(0, Eager(load_source(source).module))
    return found


def inputs(path: Path, verb: str, batch: int) -> tuple[Array, Array]:
    """What a verb is timed on, and its float64 reference where noise is addressed: real inputs, never zeros.

    Returns:
        x (batch, *data) or z (batch, *latent), the golden rows repeated as needed; and the expected mean or
        decoded mean.
    """
    bundle = Bundle(path)
    record = bundle.manifest.golden
    tensors = golden.decode(bundle.read(golden.FILE), record, bundle.manifest.model).tensors
    rows = np.arange(batch)
    if verb == "encode":
        rows = rows % (len(tensors["x"]) - record.extremes) + record.extremes
        return tensors["x"][rows], tensors["mean"][rows]
    shape = tensors["mean"].shape[1:]
    z = noise.normals(record.seed, noise.PRIOR, 0, record.prior, math.prod(shape)).reshape(-1, *shape)
    rows = rows % record.prior
    if verb == "decode":
        return z[rows], tensors["prior.sample"][rows]
    with load(path, device="cpu") as vae:
        first = noise.normals(0, noise.PRIOR, 0, batch, math.prod(shape)).reshape(-1, *shape)
        return z[rows], vae.decode(first)


def run(path: Path, runners: Sequence[Candidate], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Time every candidate at every verb and batch.

    The candidates take turns, ten times 50 ms each, every call timed on its own. The result is checked after
    timing.

    Returns:
        A row for each (verb, batch, candidate): `median_us` of a call, the deciles `p10_us` and `p90_us`, and
        `per_second`, examples each second.

    Raises:
        InputError: a batch size is below 1.
        VerificationError: a candidate's result is wrong.
    """
    if not batches or min(batches) < 1:
        raise InputError(f"bench: batches are {list(batches)}; expected numbers from 1 on")
    rows: list[dict[str, Any]] = []
    for verb in VERBS:
        for batch in batches:
            value, expected = inputs(path, verb, batch)
            calls = {runner.name: runner.prepare(verb, value) for runner in runners}
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(_ROUNDS):
                for name, call in calls.items():
                    times[name] += turn(call)
            for runner in runners:
                runner.check(verb, calls[runner.name](), expected)
                deciles = np.quantile(times[runner.name], (0.1, 0.5, 0.9)).tolist()
                rows.append(
                    {
                        "verb": verb,
                        "batch": batch,
                        "runtime": runner.name,
                        "median_us": deciles[1] * 1e6,
                        "p10_us": deciles[0] * 1e6,
                        "p90_us": deciles[2] * 1e6,
                        "per_second": batch / deciles[1],
                    }
                )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """One line for each verb and batch, the runtimes side by side."""
    names = list(dict.fromkeys(row["runtime"] for row in rows))
    shown = Table(
        title="median time of a call in µs (10th to 90th percentile); runtimes took turns in one run",
        title_justify="left",
    )
    for heading in ("verb", "batch", *names, "images/s, ours"):
        shown.add_column(heading, justify="left" if heading == "verb" else "right")
    for verb, batch in dict.fromkeys((row["verb"], row["batch"]) for row in rows):
        cells = {row["runtime"]: row for row in rows if (row["verb"], row["batch"]) == (verb, batch)}
        shown.add_row(
            verb,
            str(batch),
            *(f"{c['median_us']:.1f} ({c['p10_us']:.1f}–{c['p90_us']:.1f})" for c in map(cells.get, names) if c),
            f"{cells[Ours.name]['per_second']:,.0f}",
        )
    return shown


def turn(call: Call) -> list[float]:
    """Seconds of each call of one turn: after a while that is not counted, 50 ms of calls."""
    settled = time.perf_counter() + _SETTLE_SECONDS
    while time.perf_counter() < settled:
        call()
    times: list[float] = []
    end = time.perf_counter() + _ROUND_SECONDS
    while (began := time.perf_counter()) < end or not times:
        call()
        times.append(time.perf_counter() - began)
    return times


def _like(got: Array, expected: Array) -> None:
    if got.shape != expected.shape:
        raise VerificationError(f"bench: a result has shape {got.shape}, expected {expected.shape}")
    if not np.isfinite(got).all():
        raise VerificationError("bench: a result has values that are not finite")


def _equal(got: Array, expected: Array) -> None:
    _like(got, expected)
    worst = float(np.abs(got - expected).max())
    allowed = 1e-4 * max(1.0, float(np.abs(expected).max()))
    if worst > allowed:
        raise VerificationError(f"bench: a result has a worst error of {worst:.3g}, allowed {allowed:.3g}")
