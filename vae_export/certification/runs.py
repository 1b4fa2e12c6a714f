"""Run a backend on golden examples, and measure how far its results are from the reference's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from vae_export.certification import deviations
from vae_export.certification.deviations import Deviations
from vae_export.certification.golden import Rows
from vae_export.contract.model import Model
from vae_export.numerics import elbo, likelihoods, noise
from vae_export.numerics.elbo import Array
from vae_export.numerics.pixels import to_uint8
from vae_export.runtimes import VAE, Backend

#: Rows whose results are in memory at once, in bytes of the data.
HELD = 32 << 20


@dataclass(frozen=True)
class Run:
    """The rows of one size at one batch size."""

    model: Model
    backend: Backend
    rows: Rows
    seed: int
    batch: int
    kinds: Mapping[str, str]
    latent_std: Array | None

    @property
    def vae(self) -> VAE:
        """The runtime over the backend."""
        return VAE(self.model, self.backend, micro_batch=self.batch)

    @property
    def reduced_precision(self) -> bool:
        """Whether a graph is below float32."""
        return any(kind != "float32" for kind in self.kinds.values())

    def slices(self, count: int) -> Iterator[slice]:
        """Split rows into whole batches that together fit in memory."""
        held = max(1, HELD // (self.rows.tensors["x"][0].nbytes * self.batch)) * self.batch
        for first in range(0, count, held):
            yield slice(first, min(first + held, count))

    def data(self, part: slice) -> tuple[Deviations, list[Array]]:
        """Deviations on rows of data, and the encoder's outputs."""
        tensors, vae = self.rows.tensors, self.vae
        x = tensors["x"][part]
        posterior = vae.encode(x)
        outputs = deviations.posterior_of(posterior)
        exact = {name: value[part] for name, value in tensors.items() if "." not in name}
        measured = deviations.encoded({name: exact[name] for name in outputs}, outputs, self.latent_std)
        gaussian = posterior.logvar is not None
        fused = self.backend.graphs
        parameters: Mapping[str, Array] | None = None
        if "reconstruct" not in fused or (self.model.has_elbo and "score" not in fused):
            z = posterior.sample(self.seed, part.start) if gaussian else posterior.mode()
            parameters = vae.likelihood(np.where(np.isfinite(z), z, np.float32(0)))  # the encoder's checks report it
        if "reconstruct" in fused:
            sample = vae.reconstruct(x, seed=self.seed if gaussian else None, start=part.start)
        else:
            assert parameters is not None
            sample = parameters["sample"]
        measured |= deviations.decoded("end_to_end", exact, {"sample": sample}, self.model)
        if self.model.has_elbo:
            if "score" in fused:
                bound = vae.elbo(x, seed=self.seed, start=part.start)
                reconstruction, kl = bound.reconstruction, bound.kl
            else:
                assert parameters is not None
                likelihood = likelihoods.of(self.model)
                reconstruction = elbo.per_example(likelihood.log_prob_terms(x, parameters))
                kl = posterior.kl()
            measured |= deviations.terms(exact, reconstruction, kl)
        if self.reduced_precision:
            z = self._latents(exact, part)
            measured |= deviations.decoded("decoder", exact, {"sample": vae.decode(z)}, self.model)
        return measured, list(outputs.values())

    def _latents(self, exact: Mapping[str, Array], part: slice) -> Array:
        """The latents that the reference decoded: its draws from the posterior, rounded to float32."""
        mean = exact["mean"]
        if "logvar" not in exact:
            return mean.astype(np.float32)
        eps = noise.normals(self.seed, noise.POSTERIOR, part.start, len(mean), mean[0].size).reshape(mean.shape)
        z: Array = (mean + np.exp(0.5 * exact["logvar"]) * eps).astype(np.float32)
        return z

    def prior(self, part: slice) -> tuple[Deviations, list[Array]]:
        """Deviations on draws from the prior, and the decoder's outputs."""
        tensors, shape = self.rows.tensors, self.rows.tensors["mean"].shape[1:]
        count = part.stop - part.start
        z = noise.normals(self.seed, noise.PRIOR, part.start, count, math.prod(shape)).reshape(-1, *shape)
        outputs = self.vae.likelihood(z)
        exact = {name: tensors[f"prior.{name}"][part] for name in outputs}
        measured = deviations.decoded("prior", exact, outputs, self.model)
        if "generate" in self.backend.graphs:
            pictures: Array = self.vae.generate(count, self.seed, part.start, size=self.model.sizes(shape) or None)
            levels = to_uint8(exact["sample"], self.model.data.range).transpose(0, 2, 3, 1)
            measured[deviations.PICTURE] = deviations.largest(pictures, levels)
        return measured, list(outputs.values())


def latent_std(rows: Rows) -> Array | None:
    """For a deterministic encoder the standard deviation of each latent, or latent channel, over the data."""
    mean = rows.tensors["mean"][rows.extremes :]
    if "logvar" in rows.tensors or not len(mean):
        return None
    std: Array = np.maximum(mean.std(axis=(0, *range(2, mean.ndim)), keepdims=True), 1e-12)
    return std
