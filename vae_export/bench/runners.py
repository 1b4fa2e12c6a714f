"""Runners of a bundle without PyTorch: our runtime, and its graphs on a bare session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vae_export.bench.cells import VERBS, Array, Cell, Results, Values
from vae_export.contract import onnx_guard, targets
from vae_export.contract.build_record import BuildFolder
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import DECODER_OUTPUTS, ENCODER_OUTPUTS, Model
from vae_export.errors import require
from vae_export.numerics import elbo, likelihoods
from vae_export.runtimes import BuildLike, load
from vae_export.runtimes.ort_session import session_options

Call = Callable[[], Any]
#: From a graph's input to some of its outputs, in order.
Function = Callable[[Array], Sequence[Array]]


@dataclass(frozen=True)
class Recipe:
    """How to open a runner, in values that another process can read.

    Attributes:
        kind: a name of `select.KINDS`.
        bundle: its folder.
        threads: of one call.
        build: for `ours`, the folder of a build; None leaves the choice to `load` in float32.
        own: for `ours`, use the bundle's own graphs and no build.
        source: for the kinds that run PyTorch, an argument of `sources.resolve`; text or a path for another process.
    """

    kind: str
    bundle: str
    threads: int | None = None
    build: str | None = None
    source: Any = None
    own: bool = False


class Runner(Protocol):
    """A way to run a bundle's model.

    Attributes:
        name: unique among the runners of a run.
        precision: that it computes in, which the check of its results depends on.
        addressed: whether `sample` and `elbo` draw our addressed noise, so that their results are known.
        peer: whether it is other software, whose failure is reported and does not end the run.
        verbs: those that it supports.
        recipe: how to open it again; None where it needs an object that only this process has.
    """

    name: str
    precision: str
    addressed: bool
    peer: bool
    verbs: frozenset[str]
    recipe: Recipe | None

    def prepare(self, cell: Cell) -> Call:
        """A call that runs the cell's verb on its value, after work for its shape such as compiling."""
        ...

    def results(self, verb: str, result: Any) -> Results:
        """The result of a call as arrays, by the names of `Cell.expected`."""
        ...

    def close(self) -> None:
        """Release what Python does not release by itself."""
        return


class Ours(Runner):
    """`vae_export.load`, all input checks on."""

    addressed, peer = True, False
    verbs = frozenset(VERBS)

    def __init__(
        self, bundle: str | Path, *, build: str | Path | None = None, threads: int | None = None, own: bool = False
    ) -> None:
        """Load on the CPU in float32, or with a build on its device in its precision. Errors: as for `load`."""
        folder = None if build is None else str(build)
        self.recipe: Recipe | None = Recipe("ours", str(bundle), threads, folder, own=own)
        self.name, self.precision = "vae_export", "fp32"
        micro_batch = 1024
        if build is None:
            chosen: BuildLike = False if own else None
            self.vae = load(
                bundle, device="cpu", build=chosen, precision="fp32", micro_batch=micro_batch, threads=threads
            )
            return
        record = BuildFolder(build).record
        self.precision = "fp32" if record.exact else record.options.precision
        on = "" if record.target == "cpu" else f" {record.target}"
        self.name = f"vae_export{on} {record.options.precision}"
        device = targets.parse(record.target).device
        self.vae = load(bundle, device=device, build=build, micro_batch=micro_batch, threads=threads)

    def prepare(self, cell: Cell) -> Call:
        vae, value, seed, start = self.vae, cell.value, cell.seed, cell.start
        calls: dict[str, Call] = {
            "encode": lambda: vae.encode(value),
            "decode": lambda: vae.decode(value),
            "sample": lambda: vae.sample(cell.batch, seed, start, size=cell.sizes or None),
            "reconstruct": lambda: vae.reconstruct(value),
            "elbo": lambda: vae.elbo(value, seed, start),
        }
        return calls[cell.verb]

    def results(self, verb: str, result: Any) -> Results:
        if verb == "encode":
            return {"mean": result.mean}
        return {"kl": result.kl, "reconstruction": result.reconstruction} if verb == "elbo" else {"sample": result}

    def close(self) -> None:
        self.vae.close()


class Graphs(Runner):
    """The verbs over two functions, as anybody would write them in NumPy around sessions, without checks.

    Noise comes from NumPy's default generator. The terms of the ELBO are computed as ours.
    """

    addressed, precision = False, "fp32"
    name: str
    verbs = frozenset(VERBS)
    peer = True
    recipe: Recipe | None = None

    def __init__(self, model: Model) -> None:
        self.model = model
        self._random = np.random.default_rng(0)

    def function(self, graph: str, shape: tuple[int, ...], outputs: Sequence[str]) -> Function:
        """A graph, `encoder` or `decoder`, on inputs (B, …) of exactly this shape."""
        raise NotImplementedError

    def prepare(self, cell: Cell) -> Call:
        value, latent = cell.value, (cell.batch, *cell.latent)
        into = ENCODER_OUTPUTS[self.model.posterior.kind]
        back = DECODER_OUTPUTS[self.model.likelihood.kind] if cell.verb == "elbo" else ("sample",)
        names = VERBS[cell.verb]
        encode = self.function("encoder", value.shape, into) if "encoder" in names else _none
        decode = self.function("decoder", latent, back) if "decoder" in names else _none
        draw = self._random.standard_normal
        if cell.verb == "elbo":
            likelihood = likelihoods.of(self.model)

            def terms() -> dict[str, Values]:
                mean, logvar = encode(value)
                outputs = decode(mean + np.exp(0.5 * logvar) * draw(latent, np.float32))
                parts = likelihood.log_prob_terms(value, dict(zip(back, outputs, strict=True)))
                return {"kl": elbo.kl(mean, logvar), "reconstruction": elbo.per_example(parts)}

            return terms
        calls: dict[str, Call] = {
            "encode": lambda: encode(value),
            "decode": lambda: decode(value),
            "sample": lambda: decode(draw(latent, np.float32)),
            "reconstruct": lambda: decode(encode(value)[0]),
        }
        return calls[cell.verb]

    def results(self, verb: str, result: Any) -> Results:
        return result if verb == "elbo" else {"mean" if verb == "encode" else "sample": result[0]}


class Bare(Graphs):
    """A bare `InferenceSession.run` on the bundle's own graphs."""

    name = "ONNX Runtime"
    peer = False

    def __init__(self, bundle: str | Path, *, threads: int | None = None) -> None:
        """Open sessions.

        Raises:
            InputError, BundleError: as for `load`.
            BackendError: ONNX Runtime is not installed.
        """
        ort = require("onnxruntime", "cpu", "bench")
        opened = Bundle(bundle)
        super().__init__(opened.manifest.model)
        self.recipe = Recipe("onnxruntime", str(bundle), threads)
        graphs, weights = opened.graphs()
        self._arrays = {
            name: onnx_guard.check_operators(model, name, weights.get(name)) for name, model in graphs.items()
        }
        self._sessions = {}
        for name, model in graphs.items():
            settings = session_options(ort, self._arrays[name])
            settings.intra_op_num_threads = threads or 0
            self._sessions[name] = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])

    def function(self, graph: str, shape: tuple[int, ...], outputs: Sequence[str]) -> Function:
        """The session takes every shape."""
        session, (entry,) = self._sessions[graph], self.model.signature(graph)[0]
        names, name = list(outputs), entry.name
        return lambda value: session.run(names, {name: value})


def _none(value: Array) -> Sequence[Array]:
    raise AssertionError("the verb does not go through this graph")
