"""The VAE that an app holds: encode, sample, decode, reconstruct, ELBO, edit."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, overload

import numpy as np
import numpy.typing as npt

from vae_export import elbo, likelihoods, noise
from vae_export.errors import BundleError, InputError
from vae_export.manifest import DECODER_OUTPUTS, ENCODER_OUTPUTS, Model, shape_text
from vae_export.noise import Normals
from vae_export.pixels import is_picture, to_uint8

from .backend import Array, Backend, Value
from .inputs import ArrayCheck

if TYPE_CHECKING:
    from .gpu import DeviceArray

Float64 = npt.NDArray[np.float64]

_SAMPLE = ("sample",)
_IMAGE = ("image",)
_NO_VARIANCE = (
    "this model's encoder is deterministic: its posterior has no variance to draw from, no KL and no ELBO. Use mode()"
)


class OnGpu(Protocol):
    """An array that lies on a GPU: of PyTorch, CuPy, JAX or ours."""

    def __dlpack_device__(self) -> tuple[Any, int]:
        """Where it lies."""
        ...

    def __dlpack__(self, *, stream: Any = ...) -> Any:
        """Hand it over in the order of a stream."""
        ...


@dataclass(frozen=True)
class Posterior:
    """The approximate posterior q(z|x) of a batch.

    Attributes:
        mean: (B, *latent) float32.
        logvar: (B, *latent) float32, the logarithm of the variance; None for a deterministic encoder.
    """

    mean: Array
    logvar: Array | None

    @property
    def std(self) -> Array:
        """The standard deviation exp(½ logvar): (B, *latent) float32.

        Raises:
            InputError: the encoder is deterministic.
        """
        std: Array = np.exp(np.float32(0.5) * self._gaussian())
        return std

    def mode(self) -> Array:
        """The most probable latent, which is the mean: (B, *latent) float32."""
        return self.mean

    def sample(self, seed: int = 0, start: int = 0) -> Array:
        """Draw z = mean + std · eps (Kingma & Welling 2014, section 2.4).

        Args:
            seed: of the noise, 0 ≤ seed < 2^64.
            start: the index of the first example: a batch that is the part of a data set from `start` on
                gets the noise that the whole would have had.

        Returns:
            (B, *latent) float32.

        Raises:
            InputError: the encoder is deterministic, or seed or start is out of range.
        """
        return self._at(self._noise(seed, start))

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
    """The approximate posterior q(z|x) of a batch that lies on the GPU, as does everything here but `numpy`.

    Attributes:
        mean: (B, *latent) float32, a `gpu.DeviceArray`: DLPack and the CUDA array interface.
        logvar: the same, the logarithm of the variance; None for a deterministic encoder.
    """

    mean: Any
    logvar: Any
    _backend: Backend

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

    def numpy(self) -> Posterior:
        """The same on the host, where the standard deviation and the KL are computed, too."""
        return Posterior(self.mean.numpy(), None if self.logvar is None else self.logvar.numpy())


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


class VAE:
    """A trained variational autoencoder on a backend. Made by `load`; safe to use from many threads.

    Every method that draws takes `seed` and `start`: example i of seed s is the same whatever the batch,
    the micro-batch, the thread or the machine.
    """

    def __init__(
        self,
        model: Model,
        backend: Backend,
        *,
        micro_batch: int = 64,
        name: str = "",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Join a model's description and a backend that has its graphs.

        Args:
            model: the description.
            backend: has `encoder` and `decoder`, and may have fused graphs.
            micro_batch: as for `load`.
            name: of the bundle.
            facts: for `describe`: the precision, and the build.

        Raises:
            InputError: micro_batch is below 1.
        """
        micro_batch = _count("load", "micro_batch", micro_batch, 1)
        self.model = model
        self.name = name
        self._backend = backend
        self._micro_batch = micro_batch
        self._facts = {"precision": "float32"} if facts is None else dict(facts)
        self._data = ArrayCheck("x", model, on_gpu=backend.on_gpu)
        self._latent = ArrayCheck("z", model, on_gpu=backend.on_gpu)
        # What each graph gives for one example, where that holds for every call: without named dimensions.
        self._gives = {} if model.data.named() else {graph: self._expected(graph, {}) for graph in backend.graphs}
        self._encoder_outputs = ENCODER_OUTPUTS[model.posterior.kind]
        self._decoder_outputs = DECODER_OUTPUTS[model.likelihood.kind]

    @overload
    def encode(self, x: npt.NDArray[Any]) -> Posterior: ...

    @overload
    def encode(self, x: OnGpu) -> DevicePosterior: ...

    def encode(self, x: Any) -> Posterior | DevicePosterior:
        """The approximate posterior q(z|x).

        Args:
            x: (B, *data) float32 in the data's range, or uint8, which is scaled onto that range. On a GPU also an
                array of PyTorch, CuPy, JAX or ours that lies there, float32 and contiguous; its values are not
                checked, and the result stays there. Whoever uses it on streams of their own, not the default one,
                leaves it unchanged until the result is complete.

        Raises:
            InputError: x is not such an array.
        """
        x, on_device = self._data.anywhere("encode", x)
        return self._on_device(x) if on_device else self._posterior(x)

    @overload
    def decode(self, z: npt.NDArray[Any]) -> Array: ...

    @overload
    def decode(self, z: OnGpu) -> DeviceArray: ...

    def decode(self, z: Any) -> Any:
        """The mean of p(x|z).

        Args:
            z: (B, *latent) float32; on a GPU also an array that lies there, as for `encode`.

        Returns:
            (B, *data) float32 in the data's range, not clamped. On the GPU where z is.

        Raises:
            InputError: z is not such an array.
        """
        if type(z) is np.ndarray:  # the shortest way
            return self._run("decoder", {"z": self._latent("decode", z)}, _SAMPLE)[0]
        z, on_device = self._latent.anywhere("decode", z)
        return self._run("decoder", {"z": z}, _SAMPLE, on_device)[0]

    def likelihood(self, z: Any) -> dict[str, Array]:
        """All parameters of p(x|z), by the names of `manifest.DECODER_OUTPUTS`: (B, *data) float32 each.

        Arguments and errors are those of `decode`.
        """
        return self._parameters(self._latent("likelihood", z))

    def sample(
        self,
        n: int,
        seed: int = 0,
        start: int = 0,
        *,
        draw: bool = False,
        size: Mapping[str, int] | None = None,
        on_device: bool = False,
    ) -> Any:
        """Draw latents from the prior and decode them.

        On a GPU the latents are made there: nothing is copied to it.

        Args:
            n: how many, ≥ 1.
            seed: of the noise, 0 ≤ seed < 2^64.
            start: the index of the first one.
            draw: draw from p(x|z), too, instead of giving its mean. That is done on the host.
            size: for models whose data has named dimensions, such as {"height": 64, "width": 96}.
            on_device: leave the samples on the GPU, as a `gpu.DeviceArray`.

        Returns:
            (n, *data) float32.

        Raises:
            InputError: an argument is out of range, or draw was asked of a model without a likelihood.
        """
        z = self._prior("sample", n, seed, start, size, on_device)
        if not draw:
            return self._run("decoder", {"z": z}, _SAMPLE, on_device)[0]
        likelihood = likelihoods.of(self.model)
        if on_device:
            raise InputError("sample: draw is done on the host; ask for one of draw and on_device")
        parts = [
            likelihood.sample(self._parameters(z[first:last]), seed, z.first + first)
            for first, last in self._slices(len(z))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def generate(
        self,
        n: int,
        seed: int = 0,
        start: int = 0,
        *,
        size: Mapping[str, int] | None = None,
        on_device: bool = False,
    ) -> Any:
        """Pictures of draws from the prior: those of `sample`, as bytes.

        Args:
            n: as for `sample`.
            seed: as for `sample`.
            start: as for `sample`.
            size: as for `sample`.
            on_device: leave the pictures on the GPU, as a `gpu.DeviceArray`. Builds can.

        Returns:
            (n, H, W, C) uint8: clamped to the data's range, which becomes 0 to 255, and rounded to even.

        Raises:
            InputError: as for `sample`, or the data are no pictures.
        """
        if not is_picture(self.model.data.shape):
            shape = shape_text(self.model.data.shape)
            raise InputError(f"generate: this model's data {shape} are no pictures (B, 1 or 3, H, W). Use sample")
        z = self._prior("generate", n, seed, start, size, on_device)
        if "generate" in self._backend.graphs:
            return self._run("generate", {"z": z}, _IMAGE, on_device)[0]
        if on_device:
            raise InputError("generate: only a build makes bytes on the GPU. Run: vae-export build, or use sample")
        x = self._run("decoder", {"z": z}, _SAMPLE)[0]
        return np.ascontiguousarray(to_uint8(x, self.model.data.range).transpose(0, 2, 3, 1))

    def _prior(
        self, verb: str, n: int, seed: int, start: int, size: Mapping[str, int] | None, on_device: bool
    ) -> Normals:
        """The address of n latents of the prior."""
        n = _count(verb, "n", n, 1)
        start = _count(verb, "start", start, 0)
        if on_device and not self._backend.on_gpu:
            raise InputError(f"{verb}: on_device is for a GPU, and this VAE runs on the CPU. Drop it")
        latent = self._gives.get("encoder") if size is None else None
        return Normals(seed, noise.PRIOR, start, (n, *(latent or self.model.latent_shape(size))))

    @overload
    def reconstruct(self, x: npt.NDArray[Any], seed: int | None = ..., start: int = ...) -> Array: ...

    @overload
    def reconstruct(self, x: OnGpu, seed: int | None = ..., start: int = ...) -> DeviceArray: ...

    def reconstruct(self, x: Any, seed: int | None = None, start: int = 0) -> Any:
        """Encode and decode.

        Args:
            x: as for `encode`.
            seed: of the draw from the posterior; None goes through its mean.
            start: the index of the first example.

        Returns:
            The mean of p(x|z), (B, *data) float32. On the GPU where x is.

        Raises:
            InputError: x is not such an array, or seed or start is out of range.
        """
        x, on_device = self._data.anywhere("reconstruct", x)
        gaussian = len(self._encoder_outputs) > 1
        if "reconstruct" not in self._backend.graphs or (seed is not None and not gaussian):
            posterior = self._on_device(x) if on_device else self._posterior(x)
            z = posterior.mode() if seed is None else posterior.sample(seed, start)
            return self._run("decoder", {"z": z}, _SAMPLE, on_device)[0]
        inputs = {"x": x}
        if gaussian:
            shape = (x.shape[0], *self._example("encoder", tuple(x.shape[1:])))
            drawn = np.zeros(shape, np.float32) if seed is None else Normals(seed, noise.POSTERIOR, start, shape)
            inputs["eps"] = drawn
        return self._run("reconstruct", inputs, _SAMPLE, on_device)[0]

    def elbo(self, x: Any, seed: int = 0, start: int = 0) -> Elbo:
        """The evidence lower bound with one draw from the posterior, Gaussian constants kept.

        Args:
            x: as for `encode`.
            seed: of the draw, 0 ≤ seed < 2^64.
            start: the index of the first example.

        Raises:
            InputError: x is not such an array, or the model has no likelihood or no posterior variance.
        """
        start = _count("elbo", "start", start, 0)
        likelihood = likelihoods.of(self.model)
        x = self._data("elbo", x)
        reconstruction, kl = np.empty(len(x)), np.empty(len(x))
        for first, last in self._slices(len(x)):
            part = x[first:last]
            posterior = self._posterior(part)
            outputs = self._parameters(posterior.sample(seed, start + first))
            reconstruction[first:last] = elbo.per_example(likelihood.log_prob_terms(part, outputs))
            kl[first:last] = posterior.kl()
        return Elbo(reconstruction - kl, reconstruction, kl)

    def log_likelihood(self, x: Any, k: int = 64, seed: int = 0, start: int = 0) -> Float64:
        """The importance-weighted lower bound on log p(x) (Burda et al. 2016, eq. 8).

        It rises to log p(x) as k grows. Its first draw is that of `elbo`.

        Args:
            x: as for `encode`.
            k: draws from the posterior for each example, ≥ 1.
            seed: of the draws, 0 ≤ seed < 2^64.
            start: the index of the first example.

        Returns:
            (B,) float64, nats.

        Raises:
            InputError: as for `elbo`, or k is below 1.
        """
        k = _count("log_likelihood", "k", k, 1)
        start = _count("log_likelihood", "start", start, 0)
        likelihood = likelihoods.of(self.model)
        x = self._data("log_likelihood", x)
        bound = np.empty(len(x))
        for first, last in self._slices(len(x)):
            part = x[first:last]
            posterior = self._posterior(part)
            # Few examples leave room in the micro-batch: several draws share one run.
            group = max(1, self._micro_batch // len(part))
            log_weights = np.empty((k, len(part)))
            for draw in range(0, k, group):
                draws = range(draw, min(draw + group, k))
                eps = np.concatenate([posterior._noise(seed, start + first, d) for d in draws])
                tiled = posterior._repeat(len(draws))
                z = tiled._at(eps)
                xs = np.tile(part, (len(draws), *[1] * (part.ndim - 1)))
                log_prob = elbo.per_example(likelihood.log_prob_terms(xs, self._parameters(z)))
                weights = elbo.monte_carlo_elbo(log_prob, z, eps, tiled._gaussian())
                log_weights[draw : draw + len(draws)] = weights.reshape(len(draws), -1)
            bound[first:last] = elbo.importance_weighted_bound(log_weights)
        return bound

    def interpolate(self, a: Any, b: Any, steps: int = 8) -> Array:
        """Decode the straight line between the posterior means of a and b.

        Args:
            a: (B, *data), as for `encode`: where the line begins.
            b: (B, *data): where it ends.
            steps: points on the line, both ends included, ≥ 2.

        Returns:
            (B, steps, *data) float32.

        Raises:
            InputError: a or b is not such an array, their shapes differ, or steps is below 2.
        """
        steps = _count("interpolate", "steps", steps, 2)
        a, b = self._data("interpolate", a), self._data("interpolate", b)
        if a.shape != b.shape:
            raise InputError(f"interpolate: a and b must have one shape; got {a.shape} and {b.shape}")
        begin, end = self._posterior(a).mode(), self._posterior(b).mode()
        weight = np.linspace(0.0, 1.0, steps, dtype=np.float32).reshape(1, steps, *[1] * (begin.ndim - 1))
        line = begin[:, None] * (1 - weight) + end[:, None] * weight  # (B, steps, *latent)
        decoded = self._run("decoder", {"z": line.reshape(-1, *begin.shape[1:])}, _SAMPLE)[0]
        result: Array = decoded.reshape(len(begin), steps, *decoded.shape[1:])
        return result

    def edit(self, x: Any, direction: Any, strength: float) -> Array:
        """Decode the posterior's mean moved by strength · direction in latent space.

        Args:
            x: as for `encode`.
            direction: (*latent) or (B, *latent), finite: for instance the difference between the mean
                latents of examples with and without an attribute.
            strength: how far.

        Returns:
            (B, *data) float32.

        Raises:
            InputError: x or direction is not such an array, or strength is not finite.
        """
        mean = self._posterior(self._data("edit", x)).mode()
        direction = np.asarray(direction)
        if direction.dtype.kind not in "fiu":
            raise InputError(f"edit: direction has dtype {direction.dtype}; expected numbers")
        if direction.shape not in (mean.shape[1:], mean.shape) or not np.isfinite(direction).all():
            expected = shape_text(self.model.latent.shape, batch="")
            raise InputError(
                f"edit: direction has shape {direction.shape}; expected finite values of shape {expected}, "
                "or the same with a batch"
            )
        if not (isinstance(strength, (int, float, np.number)) and np.isfinite(strength)):
            raise InputError(f"edit: strength is {strength!r}; expected a finite number")
        with np.errstate(over="ignore"):  # too far is told by decode's own check
            z = (mean + float(strength) * direction.astype(np.float64)).astype(np.float32)
        result: Array = self._run("decoder", {"z": self._latent("edit", z)}, _SAMPLE)[0]
        return result

    def describe(self) -> dict[str, Any]:
        """What this is and what it runs on, as plain values."""
        model = self.model
        return {
            "bundle": self.name,
            "architecture": model.architecture,
            "parameters": model.parameters,
            "data": shape_text(model.data.shape),
            "data_range": list(model.data.range),
            "latent": shape_text(model.latent.shape),
            "prior": model.prior,
            "posterior": model.posterior.kind,
            "likelihood": model.likelihood.kind,
            "micro_batch": self._micro_batch,
            **self._facts,
            **self._backend.describe(),
        }

    def close(self) -> None:
        """Give back what the backend holds; the VAE cannot be used afterwards."""
        self._backend.close()

    def __enter__(self) -> VAE:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _posterior(self, x: Array) -> Posterior:
        outputs = self._run("encoder", {"x": x}, self._encoder_outputs)
        return Posterior(outputs[0], outputs[1] if len(outputs) > 1 else None)

    def _on_device(self, x: Any) -> DevicePosterior:
        outputs = self._run("encoder", {"x": x}, self._encoder_outputs, on_device=True)
        return DevicePosterior(outputs[0], outputs[1] if len(outputs) > 1 else None, self._backend)

    def _parameters(self, z: Array | Normals) -> dict[str, Array]:
        return dict(zip(self._decoder_outputs, self._run("decoder", {"z": z}, self._decoder_outputs), strict=True))

    def _run(
        self, graph: str, inputs: dict[str, Value], outputs: tuple[str, ...], on_device: bool = False
    ) -> list[Any]:
        results = self._backend.run(graph, inputs, outputs, self._micro_batch, on_device=on_device)
        shape = next(iter(inputs.values())).shape
        expected = (shape[0], *(self._gives.get(graph) or self._example(graph, tuple(shape[1:]))))
        for result in results:
            if result.shape != expected:
                raise BundleError(
                    f"{self.name}: the {graph} gave shape {result.shape}; the manifest promises {expected}. The bundle "
                    "contradicts itself: export the model again"
                )
        return results

    def _example(self, graph: str, example: tuple[int, ...]) -> tuple[int, ...]:
        """What a graph gives for one example of its first input."""
        gives = self._gives.get(graph)
        return self._expected(graph, self.model.input_sizes(graph, example)) if gives is None else gives

    def _expected(self, graph: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """What a graph gives for one example of these sizes."""
        return self.model.tensor_shape(self.model.ends(graph)[1][0], 1, sizes)[1:]

    def _slices(self, n: int) -> Iterator[tuple[int, int]]:
        return ((first, min(first + self._micro_batch, n)) for first in range(0, n, self._micro_batch))


def _count(verb: str, name: str, value: Any, least: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise InputError(f"{verb}: {name} is {value!r}; expected an integer") from None
    if count < least:
        raise InputError(f"{verb}: {name} is {count}; expected {least} or more")
    return count
