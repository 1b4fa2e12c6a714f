"""What is timed: a verb on a batch of real inputs, with the result that is expected of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vae_export.certification import golden
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import Model
from vae_export.errors import InputError, VerificationError
from vae_export.numerics import noise
from vae_export.runtimes import VAE, open_backend

#: Every verb, with the graphs that it runs.
VERBS: Mapping[str, tuple[str, ...]] = {
    "encode": ("encoder",),
    "decode": ("decoder",),
    "sample": ("decoder",),
    "reconstruct": ("encoder", "decoder"),
    "elbo": ("encoder", "decoder"),
}
# Relative to max|expected|. In float32 of the worst error; in reduced precision, which keeps 8 or 11 bits or is
# quantized and is far off in single values, of the RMS error: pictures of different things differ by more than a tenth.
_TOLERANCE, _REDUCED_TOLERANCE = 1e-4, 1e-1
_DRAWN = {"sample": frozenset({"sample"}), "elbo": frozenset({"reconstruction"})}
# Reference rows that are computed where the size is not that of the golden examples; larger batches repeat them.
_ROWS = 8

Array = npt.NDArray[np.float32]
Values = npt.NDArray[Any]
#: The arrays that a call returns, by name: `mean`; `sample`; or the ELBO's `reconstruction` and `kl`.
Results = Mapping[str, Values]


def has_elbo(model: Model) -> bool:
    """Whether the model has an ELBO: a likelihood and a posterior variance."""
    return model.likelihood.kind != "none" and model.posterior.kind != "deterministic"


def check_verbs(model: Model, verbs: Sequence[str] | None) -> tuple[str, ...]:
    """The verbs without repetitions; for None, all that the model has.

    Raises:
        InputError: there is none, one is unknown, or it is `elbo` of a model that has none.
    """
    if verbs is None:
        return tuple(verb for verb in VERBS if verb != "elbo" or has_elbo(model))
    if not verbs or (unknown := [verb for verb in verbs if verb not in VERBS]):
        shown = repr(unknown[0]) if verbs else "none"
        raise InputError(f"bench: the verb is {shown}; expected one or more of {', '.join(VERBS)}")
    if "elbo" in verbs and not has_elbo(model):
        raise InputError(
            "bench: elbo needs a likelihood and a posterior variance, and this model lacks one. Leave elbo out"
        )
    return tuple(dict.fromkeys(verbs))


@dataclass(frozen=True)
class Cell:
    """One verb at one batch.

    Attributes:
        verb: one of VERBS.
        batch: examples in a call.
        value: float32: x (batch, *data) of `encode`, `reconstruct` and `elbo`; z (batch, *latent) of `decode`; of
            `sample` an array of z's shape, whose values are not used.
        latent: the shape of one latent.
        sizes: of the data's named dimensions.
        seed: of the addressed noise in `sample` and `elbo`.
        start: the index of the first example in that noise.
        expected: the leading rows of each result by its name, float64 or float32.
        scale: by the same names, the value that errors are divided by.
        drawn: the names of results that depend on the noise: with other noise they are only checked to be finite.
        multiply_adds: of the whole batch; None where the bundle does not have them.
    """

    verb: str
    batch: int
    value: Array
    latent: tuple[int, ...]
    sizes: Mapping[str, int]
    seed: int
    start: int
    expected: Mapping[str, Values]
    scale: Mapping[str, float] = field(default_factory=dict)
    drawn: frozenset[str] = frozenset()
    multiply_adds: int | None = None

    def check(self, results: Results, runner: str, *, precision: str = "fp32", addressed: bool = True) -> None:
        """Compare the results of a runner's call with what is expected.

        Reduced precision has a larger tolerance. Draws from noise that is not `addressed` only have to be finite.

        Raises:
            VerificationError: a shape or a value differs.
        """
        exact = precision == "fp32"
        for name, expected in self.expected.items():
            measured, what = np.asarray(results[name]), f"bench: {runner}, {self.verb}, batch {self.batch}: {name}"
            shape = (self.batch, *expected.shape[1:])
            if measured.shape != shape:
                raise VerificationError(f"{what} has shape {measured.shape}, expected {shape}. Its times are discarded")
            if not np.isfinite(measured).all():
                raise VerificationError(f"{what} has values that are not finite. Its times are discarded")
            if name in self.drawn and not addressed:
                continue
            errors = np.abs(measured[: len(expected)].astype(np.float64) - expected)
            error = float(errors.max() if exact else np.sqrt(np.square(errors).mean()))
            scale = self.scale.get(name, float(np.abs(expected).max()))
            tolerance = (_TOLERANCE if exact else _REDUCED_TOLERANCE) * scale
            if error > tolerance:
                raise VerificationError(
                    f"{what} has a{' worst' if exact else 'n RMS'} error of {error:.3g}, tolerance {tolerance:.3g} in "
                    f"{precision}. Its times are discarded"
                )


class Examples:
    """The inputs of a bundle's cells, and their references.

    At the golden examples' size, the references are those of float64. At other sizes they are computed by the bundle's
    own graphs in float32 on ONNX Runtime, which the certificate covers.
    """

    def __init__(self, bundle: Bundle, sizes: Mapping[str, int] | None = None) -> None:
        """Read the golden examples.

        Args:
            bundle: every file of it is verified.
            sizes: of the data's named dimensions; None takes those of the golden examples.

        Raises:
            InputError: the model does not take a size.
            BundleError: the bundle is damaged, or a graph is refused.
            BackendError: ONNX Runtime is not installed.
        """
        bundle.check()
        self.model = bundle.manifest.model
        self._bundle = bundle
        self._seed = bundle.manifest.golden.seed
        reference = golden.decode(bundle.read(golden.FILE), bundle.manifest.golden, self.model)
        golden_latent = reference.tensors["mean"].shape[1:]
        self.latent = golden_latent if sizes is None else self.model.latent_shape(sizes)
        self.sizes = self.model.sizes(self.latent)
        as_golden = self.latent == golden_latent
        self._first = reference.record.extremes if as_golden else 0  # they come first, and are left out
        self._rows = self._of_golden(reference) if as_golden else self._of_graphs()

    def cell(self, verb: str, batch: int) -> Cell:
        """The cell of a verb and a batch. Rows repeat where the batch has more of them."""
        of_data = VERBS[verb][0] == "encoder"
        rows = self._rows
        value = rows["x" if of_data else "z"]
        chosen = np.arange(batch) % len(value)
        # Noise is addressed by the index in the batch: a repeated row has other noise.
        once = chosen[: len(value)]
        expected: dict[str, Values] = {}
        scale: dict[str, float] = {}
        if verb == "encode":
            expected = {"mean": rows["mean"][chosen]}
        elif verb == "decode":
            expected = {"sample": rows["prior.sample"][chosen]}
        elif verb == "sample":
            expected = {"sample": rows["prior.sample"][once]}
        elif verb == "reconstruct":
            expected = {"sample": self._vae.decode(rows["mean"][once].astype(np.float32))[chosen]}
        else:
            expected = {"kl": rows["kl"][chosen], "reconstruction": rows["reconstruction"][once]}
            scale = dict.fromkeys(expected, float(rows["scale"].max()))
        graphs = self._bundle.manifest.graphs
        costs = [cost.at(self.sizes)[0] for name in VERBS[verb] if (cost := graphs[name].cost)]
        return Cell(
            verb, batch, np.ascontiguousarray(value[chosen]), self.latent, self.sizes, seed=self._seed,
            start=self._first if of_data else 0, expected=expected, scale=scale, drawn=_DRAWN.get(verb, frozenset()),
            multiply_adds=batch * sum(costs) if len(costs) == len(VERBS[verb]) else None,
        )  # fmt: skip

    @functools.cached_property
    def _vae(self) -> VAE:
        """The bundle's own graphs, not a build of the cache."""
        graphs, weights = self._bundle.graphs()
        return VAE(self.model, open_backend(graphs, self.model, device="cpu", weights=weights), micro_batch=_ROWS)

    def _prior(self, count: int) -> Array:
        size = math.prod(self.latent)
        return noise.normals(self._seed, noise.PRIOR, 0, count, size).reshape(-1, *self.latent)

    def _of_golden(self, reference: golden.Reference) -> dict[str, Values]:
        rows = {"z": self._prior(reference.record.prior), "prior.sample": reference.tensors["prior.sample"]}
        of_data = ("x", "mean", "kl", "reconstruction", "scale")
        return rows | {name: reference.tensors[name][self._first :] for name in of_data if name in reference.tensors}

    def _of_graphs(self) -> dict[str, Values]:
        """Decoded draws from the prior stand in for data."""
        z = self._prior(_ROWS)
        sample = self._vae.decode(z)
        x = np.clip(sample, *self.model.data.range)
        rows: dict[str, Values] = {"z": z, "prior.sample": sample, "x": x, "mean": self._vae.encode(x).mean}
        if has_elbo(self.model):
            terms = self._vae.elbo(x, self._seed)
            rows |= {"kl": terms.kl, "reconstruction": terms.reconstruction}
            rows["scale"] = np.abs(terms.kl) + np.abs(terms.reconstruction)
        return rows
