"""The posterior of a batch, on the host or on the GPU, and the evidence lower bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vae_export.contract.model import Latent
from vae_export.errors import InputError
from vae_export.numerics import elbo, noise
from vae_export.numerics.noise import Normals
from vae_export.runtimes.backend import Array, DeviceBackend

Float64 = npt.NDArray[np.float64]

_NO_VARIANCE = (
    "this model's encoder is deterministic: its posterior has no variance to draw from, no KL and no ELBO. Use mode()"
)
_NO_SCALING = "this model's manifest names no scaling of latents"


@dataclass(frozen=True)
class Posterior:
    """The approximate posterior q(z|x) of a batch.

    Attributes:
        mean: (B, *latent) float32.
        logvar: (B, *latent) float32, the logarithm of the variance; None for a deterministic encoder.
    """

    mean: Array
    logvar: Array | None
    _latent: Latent | None = None

    def __repr__(self) -> str:
        return f"Posterior({_outline(self)})"

    @property
    def std(self) -> Array:
        """The standard deviation exp(½ logvar): (B, *latent) float32.

        Raises:
            InputError: the encoder is deterministic.
        """
        with np.errstate(over="ignore"):  # infinite beyond float32
            std: Array = np.exp(np.float32(0.5) * self._gaussian())
        return std

    def mode(self) -> Array:
        """The most probable latent, which is the mean: (B, *latent) float32."""
        return self.mean

    def sample(self, seed: int = 0, start: int = 0) -> Array:
        """Draw z = mean + std · eps (Kingma & Welling 2014, section 2.4).

        Args:
            seed: of the noise, 0 ≤ seed < 2^64.
            start: the index of the first example: the part of a data set from `start` on gets the same noise as in
                the whole.

        Returns:
            (B, *latent) float32.

        Raises:
            InputError: the encoder is deterministic, or seed or start is out of range.
        """
        return self._at(self._noise(seed, start))

    def latent(self, seed: int | None = None, start: int = 0) -> Array:
        """Latents scaled for latent diffusion: (z − shift) · scaling, or (z − mean) · scaling / std of each channel.

        The manifest has the formula and its numbers. `VAE.decode` undoes it with `scaled=True`.

        Args:
            seed: of the draw of z, as for `sample`; None takes the mean.
            start: as for `sample`.

        Returns:
            (B, *latent) float32.

        Raises:
            InputError: the manifest names no scaling, or the errors of `sample`.
        """
        latent = self._latent
        if latent is None or not latent.scaled:
            raise InputError(f"latent: {_NO_SCALING}. Use sample() or mode()")
        z = self.mode() if seed is None else self.sample(seed, start)
        shift, std = _channels(latent)
        scaled: Array = (z - shift) * np.float32(latent.scaling) / std
        return scaled

    def kl(self) -> Float64:
        """KL(q(z|x) || p(z)) in nats: (B,) float64.

        Raises:
            InputError: the encoder is deterministic.
        """
        return elbo.kl(self.mean, self._gaussian())

    def _gaussian(self) -> Array:
        if self.logvar is None:
            raise InputError(_NO_VARIANCE)
        return self.logvar

    def _noise(self, seed: int, start: int, draw: int = 0) -> Array:
        self._gaussian()
        eps = noise.normals(seed, noise.POSTERIOR, start, len(self.mean), self.mean[0].size, draw)
        return eps.reshape(self.mean.shape)

    def _at(self, eps: Array) -> Array:
        z: Array = self.mean + self.std * eps
        return z

    def _repeat(self, times: int) -> Posterior:
        repeat = (times, *[1] * (self.mean.ndim - 1))
        return Posterior(np.tile(self.mean, repeat), np.tile(self._gaussian(), repeat))


@dataclass(frozen=True)
class DevicePosterior:
    """The approximate posterior q(z|x) of a batch, on the GPU.

    Attributes:
        mean: (B, *latent) float32, a `gpu.DeviceArray`: DLPack and the CUDA array interface.
        logvar: the same, the logarithm of the variance; None for a deterministic encoder.
    """

    mean: Any
    logvar: Any
    _backend: DeviceBackend
    _latent: Latent | None = None

    def __repr__(self) -> str:
        return f"DevicePosterior({_outline(self)}, on the GPU)"

    def mode(self) -> Any:
        """The most probable latent, which is the mean: (B, *latent) float32."""
        return self.mean

    def sample(self, seed: int = 0, start: int = 0) -> Any:
        """Draw z = mean + std · eps, as `Posterior.sample` does, with the same noise. Arguments and errors: see there.

        Returns:
            (B, *latent) float32, a `gpu.DeviceArray`.
        """
        if self.logvar is None:
            raise InputError(_NO_VARIANCE)
        eps = Normals(seed, noise.POSTERIOR, start, tuple(self.mean.shape))
        return self._backend.draw(self.mean, self.logvar, eps)

    def latent(self, seed: int | None = None, start: int = 0) -> Any:
        """Refused: latents are scaled on the host.

        Raises:
            InputError: always.
        """
        raise InputError("latent: is computed on the host. Take numpy() first: posterior.numpy().latent()")

    def numpy(self) -> Posterior:
        """The posterior on the host, which also has the standard deviation and the KL."""
        return Posterior(self.mean.numpy(), None if self.logvar is None else self.logvar.numpy(), self._latent)


class Elbo(NamedTuple):
    """The evidence lower bound of a batch, in nats: elbo = reconstruction − kl ≤ log p(x).

    Attributes:
        elbo: (B,) float64.
        reconstruction: log p(x|z) at one draw z ~ q(z|x), (B,) float64.
        kl: KL(q(z|x) || p(z)) in closed form, (B,) float64.
    """

    elbo: Float64
    reconstruction: Float64
    kl: Float64

    def __repr__(self) -> str:
        reconstruction, kl = self.reconstruction.mean(), self.kl.mean()
        means = f"mean {self.elbo.mean():.6g} = {reconstruction:.6g} − {kl:.6g} nats"
        return f"Elbo({self.elbo.shape[0]} examples, {means})"


def unscaled(latent: Latent, z: Array) -> Array:
    """Undo `Posterior.latent`; InputError if the manifest names no scaling."""
    if not latent.scaled:
        raise InputError(f"decode: {_NO_SCALING}. Drop scaled")
    shift, std = _channels(latent)
    with np.errstate(over="ignore"):  # the check of z refuses what is infinite
        result: Array = z * std / np.float32(latent.scaling) + shift
    return result


def scaling_facts(latent: Latent) -> dict[str, Any]:
    """For `VAE.describe`: how latent diffusion scales latents; empty if it does not."""
    if not latent.scaled:
        return {}
    if latent.mean is None or latent.std is None:
        return {"latent_scaling": {"scaling": latent.scaling, "shift": latent.shift}}
    mean, std = list(latent.mean), list(latent.std)
    return {"latent_scaling": {"scaling": latent.scaling, "mean": mean, "std": std}}


def _outline(posterior: Posterior | DevicePosterior) -> str:
    n, *latent = posterior.mean.shape
    return f"{n} × {tuple(latent)}, {'deterministic' if posterior.logvar is None else 'Gaussian'}"


def _channels(latent: Latent) -> tuple[Array, Array]:
    """The subtrahend and the divisor of latents, beside the scaling, to broadcast over a batch."""
    shift, std = (
        np.array(values, np.float32).reshape(-1, *[1] * (len(latent.shape) - 1))
        for values in (latent.shift if latent.mean is None else latent.mean, latent.std or 1.0)
    )
    return shift, std
