"""The VAE that an app holds: encode, sample, decode, reconstruct, ELBO, edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
import numpy.typing as npt

from vae_export.contract.model import SCORE_OUTPUTS, shape_text
from vae_export.errors import InputError, check_flags
from vae_export.numerics import elbo, likelihoods, noise
from vae_export.numerics.noise import Normals
from vae_export.numerics.pixels import is_picture, to_uint8
from vae_export.runtimes.backend import Array, DeviceBackend, Value, slices
from vae_export.runtimes.inputs import OnGpu, check_count, check_direction, check_host_only, check_out
from vae_export.runtimes.lifecycle import Lifecycle
from vae_export.runtimes.posterior import DevicePosterior, Elbo, Float64, Posterior, unscaled
from vae_export.runtimes.tiling import Tile, TileLike, tile_of

if TYPE_CHECKING:
    from vae_export.runtimes.gpu.device import DeviceArray

_SAMPLE = ("sample",)
_IMAGE = ("image",)


class VAE(Lifecycle):
    """A trained variational autoencoder on a backend. Built by `load`; safe to use from many threads.

    Every method that draws takes `seed` and `start`: the noise of example i of seed s, and so a latent of the prior, is
    the same bits whatever the batch, the micro-batch, the thread or the machine. What graphs compute from it is the
    same to rounding: another batch may take another kernel, which sums in another order (in float32, differences of
    about 1e-6 of the largest value); `describe` says where a build has other kernels for other batches.
    """

    @overload
    def encode(self, x: npt.NDArray[Any], *, tile: TileLike | None = ..., pad: bool = ...) -> Posterior: ...

    @overload
    def encode(self, x: OnGpu) -> DevicePosterior: ...

    def encode(self, x: Any, *, tile: TileLike | None = None, pad: bool = False) -> Posterior | DevicePosterior:
        """The approximate posterior q(z|x).

        Args:
            x: (B, *data) float32 in the data's range, or uint8, which is scaled onto that range. On a GPU also an
                array of PyTorch, CuPy, JAX or this package that lies there, float32 and contiguous; its values are not
                checked, and the result stays there. A caller with streams other than the default one leaves the array
                unchanged until the result is complete.
            tile: encode images in overlapping tiles of so many pixels, or as a `Tile` says, where they are larger in
                either direction. Mean and log-variance are blended separately, the latter as the graph returns it,
                after its clamp; diffusers blends before it. Arrays of the host only.
            pad: grow sizes that the model does not take, by repeating the edge at the bottom and at the right. The
                posterior is then that of the padded image: decode, and crop. Arrays of the host only.

        Raises:
            InputError: x is not such an array, or the tile does not suit the model.
        """
        if type(x) is np.ndarray and tile is None and pad is False:  # the shortest way
            return self._posterior(self._data("encode", x))
        check_flags("encode", pad=pad)
        tile = tile_of(tile)
        x, on_device = self._examples("encode", x, pad)
        if not on_device:
            return self._posterior(x, tile)
        check_host_only("encode", "x", tile)
        return self._device_posterior(x)

    @overload
    def decode(
        self, z: npt.NDArray[Any], *, tile: TileLike | None = ..., scaled: bool = ..., out: Array | None = ...
    ) -> Array: ...

    @overload
    def decode(self, z: OnGpu) -> DeviceArray: ...

    def decode(self, z: Any, *, tile: TileLike | None = None, scaled: bool = False, out: Array | None = None) -> Any:
        """The mean of p(x|z).

        Args:
            z: (B, *latent) float32; on a GPU also an array that lies there, as for `encode`.
            tile: decode to images in overlapping tiles of so many pixels of the image, or as a `Tile` says, where it
                is larger in either direction. Arrays of the host only.
            scaled: z is scaled for latent diffusion, as `Posterior.latent` returns it: undo that first. Arrays of the
                host only.
            out: a NumPy array (B, *data) float32, C-contiguous, aligned and writable, that shares no memory with z:
                the result is written there; a large one on the CPU by ONNX Runtime itself, without another array. After
                an error its content is undefined. Arrays of the host only.

        Returns:
            (B, *data) float32 in the data's range, not clamped. On the GPU where z is. `out` itself if it is given.

        Raises:
            InputError: z or out is not such an array, the tile does not suit the model, or the manifest names no
                scaling.
        """
        if type(z) is np.ndarray and tile is None and scaled is False and out is None:  # the shortest way
            return self._run("decoder", {"z": self._latent("decode", z)}, _SAMPLE)[0]
        check_flags("decode", scaled=scaled)
        tile = tile_of(tile)
        z, on_device = self._latent.anywhere("decode", z)
        if on_device:
            check_host_only("decode", "z", tile, out)
            if scaled:
                raise InputError("decode: z lies on a GPU, and scaled is done on the host. Pass a NumPy array")
        if scaled:
            z = self._latent("decode", unscaled(self.model.latent, z))
        self._check_out("decode", out, z.shape, z)
        return self._run("decoder", {"z": z}, _SAMPLE, on_device, tile, out=out)[0]

    def likelihood(self, z: Any) -> dict[str, Array]:
        """All parameters of p(x|z), by the names of `model.DECODER_OUTPUTS`: (B, *data) float32 each.

        Arguments and errors are those of `decode`.
        """
        z = self._latent("likelihood", z)
        return self._parameters(z, self._execution.rows(z.shape[1:], "decoder"))

    def sample(
        self,
        n: int,
        seed: int = 0,
        start: int = 0,
        *,
        draw: bool = False,
        size: Mapping[str, int] | None = None,
        on_device: bool = False,
        out: Array | None = None,
    ) -> Any:
        """Draw latents from the prior and decode them. On a GPU the latents are drawn there.

        Args:
            n: the number of samples, ≥ 1.
            seed: of the noise, 0 ≤ seed < 2^64.
            start: the index of the first sample.
            draw: draw from p(x|z), too, instead of returning its mean. That is done on the host.
            size: for models whose data has named dimensions, such as {"height": 64, "width": 96}.
            on_device: leave the samples on the GPU, as a `gpu.DeviceArray`.
            out: (n, *data), as for `decode`; not with on_device.

        Returns:
            (n, *data) float32; `out` itself if it is given.

        Raises:
            InputError: an argument is out of range, draw is set for a model without a likelihood, or out is not such
                an array.
        """
        check_flags("sample", draw=draw)
        z = self._execution.prior("sample", n, seed, start, size, on_device, out)
        self._check_out("sample", out, z.shape)
        if not draw:
            return self._run("decoder", {"z": z}, _SAMPLE, on_device, out=out)[0]
        likelihood = likelihoods.of(self.model)
        if on_device:
            raise InputError("sample: draw is done on the host; ask for one of draw and on_device")
        most = self._execution.rows(z.shape[1:], "decoder")
        if out is None:
            out = np.empty((len(z), *self._execution.result_shape("decoder", z.shape[1:])), np.float32)
        for rows in slices(len(z), most):
            out[rows] = likelihood.sample(self._parameters(z[rows], most), seed, z.first + rows.start)
        return out

    def generate(
        self,
        n: int,
        seed: int = 0,
        start: int = 0,
        *,
        size: Mapping[str, int] | None = None,
        on_device: bool = False,
        out: npt.NDArray[np.uint8] | None = None,
    ) -> Any:
        """Pictures of draws from the prior: those of `sample`, as bytes.

        Args:
            n: as for `sample`.
            seed: as for `sample`.
            start: as for `sample`.
            size: as for `sample`.
            on_device: leave the pictures on the GPU, as a `gpu.DeviceArray`: with a build only.
            out: (n, H, W, C) uint8, otherwise as for `decode`; not with on_device.

        Returns:
            (n, H, W, C) uint8: clamped to the data's range, which is mapped to 0 to 255, and rounded half to even.
            `out` itself if it is given.

        Raises:
            InputError: as for `sample`, or the data are no pictures.
        """
        if not is_picture(self.model.data.shape):
            shape = shape_text(self.model.data.shape)
            raise InputError(f"generate: this model's data {shape} are no pictures (B, 1 or 3, H, W). Use sample")
        z = self._execution.prior("generate", n, seed, start, size, on_device, out)
        self._check_out("generate", out, z.shape)
        if self._execution.has_fused("generate", z.shape[1:]):
            return self._run("generate", {"z": z}, _IMAGE, on_device, out=out)[0]
        if on_device:
            raise InputError("generate: only a build makes bytes on the GPU. Run: vae-export build, or use sample")
        x = self._run("decoder", {"z": z}, _SAMPLE)[0]
        return _contiguous(to_uint8(x, self.model.data.range).transpose(0, 2, 3, 1), out)

    @overload
    def reconstruct(
        self,
        x: npt.NDArray[Any],
        seed: int | None = ...,
        start: int = ...,
        *,
        tile: TileLike | None = ...,
        pad: bool = ...,
        out: Array | None = ...,
    ) -> Array: ...

    @overload
    def reconstruct(self, x: OnGpu, seed: int | None = ..., start: int = ...) -> DeviceArray: ...

    def reconstruct(
        self,
        x: Any,
        seed: int | None = None,
        start: int = 0,
        *,
        tile: TileLike | None = None,
        pad: bool = False,
        out: Array | None = None,
    ) -> Any:
        """Encode and decode.

        Args:
            x: as for `encode`.
            seed: of the draw from the posterior, 0 ≤ seed < 2^64; None decodes its mean.
            start: the index of the first example.
            tile: encode and decode in tiles, as `encode` and `decode` do.
            pad: grow sizes as `encode` does, and crop the result back.
            out: (B, *data), as for `decode`. Where pad grows a size, the cropped result is copied there.

        Returns:
            The mean of p(x|z), (B, *data) float32. On the GPU where x is. `out` itself if it is given.

        Raises:
            InputError: x or out is not such an array, the tile does not suit the model, or seed or start is out of
                range.
        """
        check_flags("reconstruct", pad=pad)
        tile = tile_of(tile)
        original, (x, on_device) = x, self._examples("reconstruct", x, pad)
        if on_device:
            check_host_only("reconstruct", "x", tile, out)
        example = np.shape(original)[1:] if pad else tuple(x.shape[1:])
        if out is not None:
            check_out("reconstruct", out, (len(x), *example), np.float32, x)
        if example == tuple(x.shape[1:]):
            return self._reconstructed(x, seed, start, tile, on_device, out)
        result = self._reconstructed(x, seed, start, tile, on_device, None)
        return _contiguous(result[(slice(None), *map(slice, example))], out)

    def _reconstructed(
        self, x: Any, seed: int | None, start: int, tile: Tile | None, on_device: bool, out: Array | None
    ) -> Any:
        gaussian = len(self._encoder_outputs) > 1
        fused = tile is None and self._execution.has_fused("reconstruct", tuple(x.shape[1:]))
        if not fused or (seed is not None and not gaussian):
            posterior = self._device_posterior(x) if on_device else self._posterior(x, tile)
            z = posterior.mode() if seed is None else posterior.sample(seed, start)
            return self._run("decoder", {"z": z}, _SAMPLE, on_device, tile, out=out)[0]
        inputs = {"x": x}
        if gaussian:
            shape = (x.shape[0], *self._execution.result_shape("encoder", tuple(x.shape[1:])))
            inputs["eps"] = (
                np.zeros(shape, np.float32) if seed is None else Normals(seed, noise.POSTERIOR, start, shape)
            )
        return self._run("reconstruct", inputs, _SAMPLE, on_device, out=out)[0]

    def elbo(self, x: Any, seed: int = 0, start: int = 0) -> Elbo:
        """The evidence lower bound with one draw from the posterior (Kingma & Welling 2014, eq. 3), with all constants.

        Computed by one fused graph where a build has it, otherwise from encoder and decoder.

        Args:
            x: as for `encode`.
            seed: of the draw, 0 ≤ seed < 2^64.
            start: the index of the first example.

        Raises:
            InputError: x is not such an array, or the model has no likelihood or no posterior variance.
        """
        start = check_count("elbo", "start", start, 0)
        likelihood = likelihoods.of(self.model)
        x = self._data("elbo", x)
        if self.model.has_elbo and self._execution.has_fused("score", x.shape[1:]):
            shape = (len(x), *self._execution.result_shape("encoder", x.shape[1:]))
            eps = Normals(seed, noise.POSTERIOR, start, shape)
            fused, divergence, _ = self._run("score", {"x": x, "eps": eps}, SCORE_OUTPUTS)
            return Elbo(fused - divergence, fused, divergence)  # a runner may subtract in float32
        reconstruction, kl = np.empty(len(x)), np.empty(len(x))
        most = self._execution.rows(x.shape[1:], "encoder", "decoder")
        for rows in slices(len(x), most):
            part = x[rows]
            posterior = self._posterior(part, rows=most)
            outputs = self._parameters(posterior.sample(seed, start + rows.start), most)
            reconstruction[rows] = elbo.per_example(likelihood.log_prob_terms(part, outputs))
            kl[rows] = posterior.kl()
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
        k = check_count("log_likelihood", "k", k, 1)
        start = check_count("log_likelihood", "start", start, 0)
        likelihood = likelihoods.of(self.model)
        x = self._data("log_likelihood", x)
        bound = np.empty(len(x))
        most = self._execution.rows(x.shape[1:], "encoder", "decoder")
        for rows in slices(len(x), most):
            part = x[rows]
            posterior = self._posterior(part, rows=most)
            # Few examples leave room in the micro-batch: several draws share one run.
            group = max(1, most // len(part))
            log_weights = np.empty((k, len(part)))
            for draw in range(0, k, group):
                draws = range(draw, min(draw + group, k))
                eps = np.concatenate([posterior._noise(seed, start + rows.start, d) for d in draws])
                tiled = posterior._repeat(len(draws))
                z = tiled._at(eps)
                xs = np.tile(part, (len(draws), *[1] * (part.ndim - 1)))
                log_prob = elbo.per_example(likelihood.log_prob_terms(xs, self._parameters(z, most)))
                weights = elbo.monte_carlo_elbo(log_prob, z, eps, tiled._gaussian())
                log_weights[draw : draw + len(draws)] = weights.reshape(len(draws), -1)
            bound[rows] = elbo.importance_weighted_bound(log_weights)
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
        steps = check_count("interpolate", "steps", steps, 2)
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
            strength: the factor of direction, finite.

        Returns:
            (B, *data) float32.

        Raises:
            InputError: x or direction is not such an array, or strength is not finite.
        """
        mean = self._posterior(self._data("edit", x)).mode()
        direction = check_direction(self.model.latent, mean.shape, direction, strength)
        with np.errstate(over="ignore"):  # the check of z refuses what is infinite
            z = (mean + float(strength) * direction.astype(np.float64)).astype(np.float32)
        result: Array = self._run("decoder", {"z": self._latent("edit", z)}, _SAMPLE)[0]
        return result

    def _examples(self, verb: str, x: Any, pad: bool) -> tuple[Any, bool]:
        """The checked array, and whether it lies on the GPU."""
        return (self._data.padded(verb, x), False) if pad else self._data.anywhere(verb, x)

    def _check_out(self, verb: str, out: Any, latents: tuple[int, ...], *sources: Any) -> None:
        """Refuse an `out` that is not for the decoded latents."""
        if out is not None:
            graph, dtype = ("generate", np.uint8) if verb == "generate" else ("decoder", np.float32)
            check_out(verb, out, (latents[0], *self._execution.result_shape(graph, latents[1:])), dtype, *sources)

    def _posterior(self, x: Array, tile: Tile | None = None, rows: int = 0) -> Posterior:
        outputs = self._run("encoder", {"x": x}, self._encoder_outputs, tile=tile, rows=rows)
        return Posterior(outputs[0], outputs[1] if len(outputs) > 1 else None, self.model.latent)

    def _device_posterior(self, x: Any) -> DevicePosterior:
        mean, *logvar = self._run("encoder", {"x": x}, self._encoder_outputs, on_device=True)
        backend = cast(DeviceBackend, self._backend)
        return DevicePosterior(mean, logvar[0] if logvar else None, backend, self.model.latent)

    def _parameters(self, z: Array | Normals, rows: int) -> dict[str, Array]:
        outputs = self._run("decoder", {"z": z}, self._decoder_outputs, rows=rows)
        return dict(zip(self._decoder_outputs, outputs, strict=True))

    def _run(
        self,
        graph: str,
        inputs: dict[str, Value],
        outputs: tuple[str, ...],
        on_device: bool = False,
        tile: Tile | None = None,
        rows: int = 0,
        out: npt.NDArray[Any] | None = None,
    ) -> list[Any]:
        """Run a graph: on the backend at once where nothing needs a plan, otherwise see `Execution.run`."""
        if tile is None and self._budget is None and not on_device:
            targets = None if out is None else (out,)
            return self._backend.run(graph, inputs, outputs, rows or self._micro_batch, out=targets)
        return self._execution.run(graph, inputs, outputs, on_device, tile, rows, out)


def _contiguous(value: npt.NDArray[Any], out: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    """The value in C order; written to `out` if that is given, which is then returned."""
    if out is None:
        return np.ascontiguousarray(value)
    out[...] = value
    return out
