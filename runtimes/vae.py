"""The VAE that an app holds: encode, sample, decode, reconstruct, ELBO, edit."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from vae_export.contract.manifest import Tiled
from vae_export.contract.model import DECODER_OUTPUTS, ENCODER_OUTPUTS, GRAPHS, SCORE_OUTPUTS, Model, shape_text
from vae_export.errors import BundleError, InputError, check_flags
from vae_export.numerics import elbo, likelihoods, noise
from vae_export.numerics.noise import Normals
from vae_export.numerics.pixels import is_picture, to_uint8
from vae_export.runtimes import memory
from vae_export.runtimes.backend import Array, Backend, Value, slices
from vae_export.runtimes.inputs import ArrayCheck, check_out
from vae_export.runtimes.memory import Budget
from vae_export.runtimes.posterior import NO_SCALING, DevicePosterior, Elbo, Float64, Posterior, channels
from vae_export.runtimes.tiling import Axis, Seams, Tile, TileLike, grid, run_tiled, tile_of

if TYPE_CHECKING:
    from vae_export.runtimes.gpu.device import DeviceArray

_SAMPLE = ("sample",)
_IMAGE = ("image",)


class OnGpu(Protocol):
    """An array that lies on a GPU: of PyTorch, CuPy, JAX or ours."""

    def __dlpack_device__(self) -> tuple[Any, int]:
        """Where it lies."""
        ...

    def __dlpack__(self, *, stream: Any = ...) -> Any:
        """Hand it over in the order of a stream."""
        ...


class VAE:
    """A trained variational autoencoder on a backend. Made by `load`; safe to use from many threads.

    Every method that draws takes `seed` and `start`: the noise of example i of seed s, and so a latent of the prior, is
    the same bits whatever the batch, the micro-batch, the thread or the machine. What graphs compute of it is the same
    to rounding: another batch may take another kernel, which sums in another order (of float32, differences of about
    1e-6 of the largest value); `describe` says where a build has other kernels for other batches.
    """

    def __init__(
        self,
        model: Model,
        backend: Backend,
        *,
        micro_batch: int = 64,
        name: str = "",
        facts: Mapping[str, Any] | None = None,
        budget: Budget | None = None,
        tiled: Mapping[str, Tiled] | None = None,
        check_range: bool = True,
        reopen: tuple[Callable[..., VAE], tuple[Any, ...]] | None = None,
    ) -> None:
        """Join a model's description and a backend that has its graphs.

        Args:
            model: the description.
            backend: has `encoder` and `decoder`, and may have fused graphs.
            micro_batch: as for `load`.
            name: of the bundle.
            facts: for `describe`: as `Opened.facts`; None is that of a bundle's own graphs.
            budget: for the memory of intermediate results; None is no limit.
            tiled: what was measured of tiles, by graph: where they are seen, the first tiled call warns.
            check_range: as for `load`.
            reopen: a function of a module, and arguments, that open the same again; without it there is no pickle.

        Raises:
            InputError: micro_batch is below 1.
        """
        micro_batch = _count("load", "micro_batch", micro_batch, 1)
        self.model = model
        self.name = name
        self._backend = backend
        self._micro_batch = micro_batch
        self._budget = budget
        own: Mapping[str, Any] = {"precision": "float32", "build": None, "passed_over": {}, "notes": []}
        self._facts = dict(own if facts is None else facts)
        self._seams = Seams(tiled or {})
        self._reopen = reopen
        self._data = ArrayCheck("x", model, on_gpu=backend.on_gpu, check_range=check_range)
        self._latent = ArrayCheck("z", model, on_gpu=backend.on_gpu)
        # What each graph gives for one example, where that holds for every call: without named dimensions.
        self._gives = {} if model.data.named() else {graph: self._expected(graph, {}) for graph in backend.graphs}
        self._encoder_outputs = ENCODER_OUTPUTS[model.posterior.kind]
        self._decoder_outputs = DECODER_OUTPUTS[model.likelihood.kind]

    @overload
    def encode(self, x: npt.NDArray[Any], *, tile: TileLike | None = ..., pad: bool = ...) -> Posterior: ...

    @overload
    def encode(self, x: OnGpu) -> DevicePosterior: ...

    def encode(self, x: Any, *, tile: TileLike | None = None, pad: bool = False) -> Posterior | DevicePosterior:
        """The approximate posterior q(z|x).

        Args:
            x: (B, *data) float32 in the data's range, or uint8, which is scaled onto that range. On a GPU also an
                array of PyTorch, CuPy, JAX or ours that lies there, float32 and contiguous; its values are not
                checked, and the result stays there. Whoever uses it on streams of their own, not the default one,
                leaves it unchanged until the result is complete.
            tile: encode images in overlapping tiles of so many pixels, or as a `Tile` says, where they are larger in
                either direction. The mean and the logarithm of the variance are blended each by itself, the latter as
                the graph gives it, after its limits; diffusers blends before them. Arrays of the host only.
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
        self._host_only("encode", "x", tile)
        return self._on_device(x)

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
            scaled: z is what latent diffusion works on, as `Posterior.latent` gives: undo the scaling first. Arrays
                of the host only.
            out: a NumPy array (B, *data) float32, C-contiguous, aligned and writable, that shares no memory with z:
                the result is written there; a large one on the CPU by ONNX Runtime itself, without another array for
                it. After an error anything may be in it. Arrays of the host only.

        Returns:
            (B, *data) float32 in the data's range, not clamped. On the GPU where z is. `out` itself where it is given.

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
            self._host_only("decode", "z", tile, out)
            if scaled:
                raise InputError("decode: z lies on a GPU, and scaled is done on the host. Pass a NumPy array")
        if scaled:
            z = self._unscaled(z)
        if out is not None:
            check_out("decode", out, (len(z), *self._example("decoder", z.shape[1:])), np.float32, z)
        return self._run("decoder", {"z": z}, _SAMPLE, on_device, tile, out=out)[0]

    def likelihood(self, z: Any) -> dict[str, Array]:
        """All parameters of p(x|z), by the names of `manifest.DECODER_OUTPUTS`: (B, *data) float32 each.

        Arguments and errors are those of `decode`.
        """
        z = self._latent("likelihood", z)
        return self._parameters(z, self._rows(z.shape[1:], "decoder"))

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
        """Draw latents from the prior and decode them.

        On a GPU the latents are made there: nothing is copied to it.

        Args:
            n: how many, ≥ 1.
            seed: of the noise, 0 ≤ seed < 2^64.
            start: the index of the first one.
            draw: draw from p(x|z), too, instead of giving its mean. That is done on the host.
            size: for models whose data has named dimensions, such as {"height": 64, "width": 96}.
            on_device: leave the samples on the GPU, as a `gpu.DeviceArray`.
            out: (n, *data), as for `decode`; not with on_device.

        Returns:
            (n, *data) float32; `out` itself where it is given.

        Raises:
            InputError: an argument is out of range, draw was asked of a model without a likelihood, or out is not such
                an array.
        """
        check_flags("sample", draw=draw)
        z = self._prior("sample", n, seed, start, size, on_device, out)
        if out is not None:
            check_out("sample", out, (len(z), *self._example("decoder", z.shape[1:])), np.float32)
        if not draw:
            return self._run("decoder", {"z": z}, _SAMPLE, on_device, out=out)[0]
        likelihood = likelihoods.of(self.model)
        if on_device:
            raise InputError("sample: draw is done on the host; ask for one of draw and on_device")
        most = self._rows(z.shape[1:], "decoder")
        drawn = np.empty((len(z), *self._example("decoder", z.shape[1:])), np.float32) if out is None else out
        for rows in slices(len(z), most):
            drawn[rows] = likelihood.sample(self._parameters(z[rows], most), seed, z.first + rows.start)
        return drawn

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
            on_device: leave the pictures on the GPU, as a `gpu.DeviceArray`. Builds can.
            out: (n, H, W, C) uint8, otherwise as for `decode`; not with on_device.

        Returns:
            (n, H, W, C) uint8: clamped to the data's range, which becomes 0 to 255, and rounded to even. `out` itself
            where it is given.

        Raises:
            InputError: as for `sample`, or the data are no pictures.
        """
        if not is_picture(self.model.data.shape):
            shape = shape_text(self.model.data.shape)
            raise InputError(f"generate: this model's data {shape} are no pictures (B, 1 or 3, H, W). Use sample")
        z = self._prior("generate", n, seed, start, size, on_device, out)
        if out is not None:
            check_out("generate", out, (len(z), *self._example("generate", z.shape[1:])), np.uint8)
        if self._fused("generate", z.shape[1:]):
            return self._run("generate", {"z": z}, _IMAGE, on_device, out=out)[0]
        if on_device:
            raise InputError("generate: only a build makes bytes on the GPU. Run: vae-export build, or use sample")
        x = self._run("decoder", {"z": z}, _SAMPLE)[0]
        image = to_uint8(x, self.model.data.range).transpose(0, 2, 3, 1)
        return _copied(image, out)

    def _prior(
        self, verb: str, n: int, seed: int, start: int, size: Mapping[str, int] | None, on_device: bool, out: Any
    ) -> Normals:
        """The address of n latents of the prior."""
        check_flags(verb, on_device=on_device)
        n = _count(verb, "n", n, 1)
        start = _count(verb, "start", start, 0)
        if on_device and not self._backend.on_gpu:
            raise InputError(f"{verb}: on_device is for a GPU, and this VAE runs on the CPU. Drop it")
        if on_device and out is not None:
            raise InputError(
                f"{verb}: out is an array of the host, and on_device leaves the result on the GPU. Drop one"
            )
        known = self._gives.get("encoder") if size is None else None
        latent = known or self.model.latent_shape(size)
        value = 1 if verb == "generate" and "generate" in self._backend.graphs else 4
        needed = value * n * math.prod(self._example("decoder", latent))
        if out is None and not on_device and needed > memory.of_this_machine():
            raise InputError(
                f"{verb}: {n:,} examples take {needed / 2**30:,.0f} GiB, and this machine has "
                f"{memory.of_this_machine() / 2**30:,.0f} GiB. Draw them in parts, by start"
            )
        return Normals(seed, noise.PRIOR, start, (n, *latent))

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
            seed: of the draw from the posterior; None goes through its mean.
            start: the index of the first example.
            tile: encode and decode in tiles, as `encode` and `decode` do.
            pad: grow sizes as `encode` does, and crop the result back.
            out: (B, *data), as for `decode`. Where pad grows a size, the cropped result is copied there.

        Returns:
            The mean of p(x|z), (B, *data) float32. On the GPU where x is. `out` itself where it is given.

        Raises:
            InputError: x or out is not such an array, the tile does not suit the model, or seed or start is out of
                range.
        """
        check_flags("reconstruct", pad=pad)
        tile = tile_of(tile)
        given, (x, on_device) = x, self._examples("reconstruct", x, pad)
        if on_device:
            self._host_only("reconstruct", "x", tile, out)
        example = np.shape(given)[1:] if pad else tuple(x.shape[1:])
        if out is not None:
            check_out("reconstruct", out, (len(x), *example), np.float32, x)
        if example == tuple(x.shape[1:]):
            return self._reconstructed(x, seed, start, tile, on_device, out)
        result = self._reconstructed(x, seed, start, tile, on_device, None)
        return _copied(result[(slice(None), *map(slice, example))], out)

    def _reconstructed(
        self, x: Any, seed: int | None, start: int, tile: Tile | None, on_device: bool, out: Array | None
    ) -> Any:
        gaussian = len(self._encoder_outputs) > 1
        fused = tile is None and self._fused("reconstruct", tuple(x.shape[1:]))
        if not fused or (seed is not None and not gaussian):
            posterior = self._on_device(x) if on_device else self._posterior(x, tile)
            z = posterior.mode() if seed is None else posterior.sample(seed, start)
            return self._run("decoder", {"z": z}, _SAMPLE, on_device, tile, out=out)[0]
        inputs = {"x": x}
        if gaussian:
            shape = (x.shape[0], *self._example("encoder", tuple(x.shape[1:])))
            drawn = np.zeros(shape, np.float32) if seed is None else Normals(seed, noise.POSTERIOR, start, shape)
            inputs["eps"] = drawn
        return self._run("reconstruct", inputs, _SAMPLE, on_device, out=out)[0]

    def elbo(self, x: Any, seed: int = 0, start: int = 0) -> Elbo:
        """The evidence lower bound with one draw from the posterior, Gaussian constants kept.

        In one run where a build has a graph for it, otherwise by parts.

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
        if self.model.has_elbo and self._fused("score", x.shape[1:]):
            eps = Normals(seed, noise.POSTERIOR, start, (len(x), *self._example("encoder", x.shape[1:])))
            fused, divergence, _ = self._run("score", {"x": x, "eps": eps}, SCORE_OUTPUTS)
            return Elbo(fused - divergence, fused, divergence)  # a runner may subtract in float32
        reconstruction, kl = np.empty(len(x)), np.empty(len(x))
        most = self._rows(x.shape[1:], "encoder", "decoder")
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
        k = _count("log_likelihood", "k", k, 1)
        start = _count("log_likelihood", "start", start, 0)
        likelihood = likelihoods.of(self.model)
        x = self._data("log_likelihood", x)
        bound = np.empty(len(x))
        most = self._rows(x.shape[1:], "encoder", "decoder")
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
        if not (isinstance(strength, (int, float, np.number)) and abs(strength) <= float(np.finfo(float).max)):
            raise InputError(f"edit: strength is {strength!r}; expected a finite number")
        with np.errstate(over="ignore"):  # too far is told by decode's own check
            z = (mean + float(strength) * direction.astype(np.float64)).astype(np.float32)
        result: Array = self._run("decoder", {"z": self._latent("edit", z)}, _SAMPLE)[0]
        return result

    def warmup(self, batches: Iterable[int] = (1,), size: Mapping[str, int] | None = None) -> None:
        """Run every graph that the methods use once, so that an app's first call is as fast as its later ones.

        The first run at a shape takes memory, and on a GPU compiles kernels and captures CUDA graphs, in every lane.

        Args:
            batches: of examples, ≥ 1 each: those that the app will use.
            size: for models whose data has named dimensions, as for `sample`.

        Raises:
            InputError: batches are no such numbers, the model does not take the size, or max_memory holds not even a
                tile of it.
        """
        try:
            counts = sorted({operator.index(batch) for batch in batches})
        except TypeError:
            counts = []
        if not counts or counts[0] < 1:
            raise InputError(f"warmup: batches is {batches!r}; expected numbers from 1 on, such as (1, 8)")
        sizes = self.model.sizes(self.model.latent_shape(size))
        for graph in sorted(self._backend.graphs):
            for n in counts:
                self._warm(graph, n, sizes)

    def _warm(self, graph: str, n: int, sizes: Mapping[str, int]) -> None:
        """Run a graph, if a method would: tile by tile where max_memory holds no more, and then one tile is enough."""
        inputs, outputs = self.model.signature(graph)
        example = self.model.tensor_shape(inputs[0], n, sizes)[1:]
        if graph not in GRAPHS and not self._fused(graph, example):
            return
        rows, axes = self._plan(graph, example, None)
        if axes:
            sizes = self.model.input_sizes(graph, (example[0], *(axis.parts[0] for axis in axes)))
        low, high = self.model.data.range
        feed: dict[str, Value] = {}
        for tensor in inputs:
            shape = self.model.tensor_shape(tensor, n, sizes)
            stream = noise.POSTERIOR if tensor.name == "eps" else noise.PRIOR
            feed[tensor.name] = Normals(0, stream, 0, shape)
            if tensor.name == "x":  # what is constant may take other ways through caches and kernels
                uniform = noise.uniforms(0, noise.PRIOR, 0, n, math.prod(shape[1:]))
                feed["x"] = (low + (high - low) * uniform).astype(np.float32).reshape(shape)
        self._backend.warm(graph, feed, [tensor.name for tensor in outputs], rows)

    def describe(self) -> dict[str, Any]:
        """What this is and what it runs on, as plain values.

        `precision` is what the graphs compute in, such as `float32` or `float32 encoder, int8 decoder`; `build` the
        folder of the build that runs, or None for the bundle's own graphs; `passed_over` what would have come first,
        and why it did not; `notes` what to know of the build: another processor, other kernels for other batches.
        """
        model = self.model
        return {
            "bundle": self.name,
            "architecture": model.architecture,
            "parameters": model.parameters,
            "data": shape_text(model.data.shape),
            "data_range": list(model.data.range),
            "latent": shape_text(model.latent.shape),
            **self._scaling(),
            "prior": model.prior,
            "posterior": model.posterior.kind,
            "likelihood": model.likelihood.kind,
            "micro_batch": self._micro_batch,
            "max_memory": self._budget.limit if self._budget else None,
            "tiles": self._seams.facts,
            **self._facts,
            **self._backend.describe(),
        }

    def release_memory(self) -> None:
        """Give back the memory that is kept for the next calls, which take it again: the first of them is slower.

        After a call of an unusually large batch or size. Calls that run meanwhile keep theirs. On the CPU that is the
        memory of intermediate results, which in ONNX Runtime all VAEs of a process with named sizes share; on a GPU the
        lanes' buffers, and the CUDA graphs that were captured on them. Weights stay.
        """
        self._backend.release_memory()

    def close(self) -> None:
        """Give back what the backend holds; the VAE cannot be used afterwards."""
        self._backend.close()

    def __reduce__(self) -> tuple[Callable[..., VAE], tuple[Any, ...]]:
        """For pickle, and so for processes that are spawned: the bundle is opened again there, by its path.

        Raises:
            InputError: it was not made by `load`.
        """
        if self._reopen is None:
            raise InputError(
                "a VAE that load did not make has no path to be opened again by. Load the bundle where it is needed"
            )
        return self._reopen

    def __enter__(self) -> VAE:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _examples(self, verb: str, x: Any, pad: bool) -> tuple[Any, bool]:
        """What the caller gave, checked, and whether it lies on the GPU."""
        return (self._data.padded(verb, x), False) if pad else self._data.anywhere(verb, x)

    def _host_only(self, verb: str, name: str, tile: Tile | None, out: Any = None) -> None:
        if tile is not None:
            raise InputError(f"{verb}: {name} lies on a GPU, and tiles are joined on the host. Pass a NumPy array")
        if out is not None:
            raise InputError(
                f"{verb}: {name} lies on a GPU, where the result stays, and out is an array of the host. Drop out, or "
                "pass a NumPy array"
            )

    def _unscaled(self, z: Array) -> Array:
        """What `Posterior.latent` made of latents, undone."""
        latent = self.model.latent
        if not latent.scaled:
            raise InputError(f"decode: {NO_SCALING}. Drop scaled")
        shift, std = channels(latent)
        with np.errstate(over="ignore"):  # too large is told by the check
            return self._latent("decode", z * std / np.float32(latent.scaling) + shift)

    def _scaling(self) -> dict[str, Any]:
        """For `describe`: how latent diffusion scales latents, where it does."""
        latent = self.model.latent
        if not latent.scaled:
            return {}
        if latent.mean is None or latent.std is None:
            return {"latent_scaling": {"scaling": latent.scaling, "shift": latent.shift}}
        mean, std = list(latent.mean), list(latent.std)
        return {"latent_scaling": {"scaling": latent.scaling, "mean": mean, "std": std}}

    def _posterior(self, x: Array, tile: Tile | None = None, rows: int = 0) -> Posterior:
        outputs = self._run("encoder", {"x": x}, self._encoder_outputs, tile=tile, rows=rows)
        return Posterior(outputs[0], outputs[1] if len(outputs) > 1 else None, self.model.latent)

    def _on_device(self, x: Any) -> DevicePosterior:
        mean, *logvar = self._run("encoder", {"x": x}, self._encoder_outputs, on_device=True)
        return DevicePosterior(mean, logvar[0] if logvar else None, self._backend, self.model.latent)

    def _parameters(self, z: Array | Normals, rows: int) -> dict[str, Array]:
        outputs = self._run("decoder", {"z": z}, self._decoder_outputs, rows=rows)
        return dict(zip(self._decoder_outputs, outputs, strict=True))

    def _fused(self, graph: str, example: tuple[int, ...]) -> bool:
        """Whether a fused graph is there, and max_memory lets one example of its first input through."""
        return graph in self._backend.graphs and (
            self._budget is None or self._budget.rows(graph, self.model.input_sizes(graph, example)) > 0
        )

    def _rows(self, example: tuple[int, ...], *graphs: str) -> int:
        """How many examples of the first graph's input may go through graphs at once, where nothing is tiled."""
        if self._budget is None:
            return self._micro_batch
        sizes = self.model.input_sizes(graphs[0], example)
        return min(self._micro_batch, *(self._budget.at_least_one(graph, sizes) for graph in graphs))

    def _plan(self, graph: str, example: tuple[int, ...], tile: Tile | None) -> tuple[int, tuple[Axis, Axis] | None]:
        """How many examples go through a graph at once, and the tiles of each, for a given tile or for max_memory."""
        sizes = self.model.input_sizes(graph, example)
        budget = self._budget
        if tile is None and budget is not None:
            if rows := budget.rows(graph, sizes):
                return min(rows, self._micro_batch), None
            tile = budget.tile(graph, sizes)
        axes = grid(self.model, graph, example, tile) if tile else None
        if budget is None:
            return self._micro_batch, axes
        if axes:
            sizes = self.model.input_sizes(graph, (example[0], *(axis.parts[0] for axis in axes)))
        return min(max(1, budget.rows(graph, sizes)), self._micro_batch), axes

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
        """Run a graph; with `rows`, so many examples at once and uncut, otherwise as `tile` and max_memory say.

        Its one output is written to `out`, where that is given.
        """
        if not rows:
            rows = self._micro_batch
            if tile is not None or self._budget is not None:
                first = next(iter(inputs.values()))
                rows, axes = self._plan(graph, tuple(first.shape[1:]), tile)
                if axes:
                    return self._tiled(graph, first, outputs, rows, axes, on_device, out)
        targets = None if out is None else (out,)
        shape = next(iter(inputs.values())).shape
        if self._budget is None:
            results = self._backend.run(graph, inputs, outputs, rows, on_device=on_device, out=targets)
        else:
            sizes = self.model.input_sizes(graph, tuple(shape[1:]))
            with self._budget.held(graph, sizes, min(rows, shape[0])):
                results = self._backend.run(graph, inputs, outputs, rows, on_device=on_device, out=targets)
        gives = self._gives.get(graph)
        expected = (shape[0], *(self._example(graph, tuple(shape[1:])) if gives is None else gives))
        for result in results:
            if result.shape != expected:
                of = f"{self.name}: " if self.name else ""
                raise BundleError(
                    f"{of}the {graph} gave shape {result.shape}; the manifest promises {expected}. The bundle "
                    "contradicts itself: export the model again"
                )
        return results

    def _tiled(
        self,
        graph: str,
        value: Array | Normals,
        outputs: tuple[str, ...],
        rows: int,
        axes: tuple[Axis, Axis],
        on_device: bool,
        out: Array | None,
    ) -> list[Any]:
        if on_device:
            raise InputError(
                f"max_memory holds no example of this size in the {graph}, and tiles are joined on the host. Pass "
                "NumPy arrays and drop on_device, or load with a larger max_memory"
            )

        self._seams.tell(graph)

        def run(tile: Array) -> list[Any]:
            return self._run(graph, {name: tile}, outputs, rows=rows)

        (name,) = (tensor.name for tensor in self.model.signature(graph)[0])
        shape = (len(value), *self._example(graph, value.shape[1:]))
        results = [np.empty(shape, np.float32) for _ in outputs] if out is None else [out]
        for part in slices(len(value), rows):
            whole = value[part]
            examples = whole.numpy() if isinstance(whole, Normals) else whole
            run_tiled(run, examples, *axes, tuple(result[part] for result in results))
        return results

    def _example(self, graph: str, example: tuple[int, ...]) -> tuple[int, ...]:
        """What a graph gives for one example of its first input."""
        gives = self._gives.get(graph)
        return self._expected(graph, self.model.input_sizes(graph, example)) if gives is None else gives

    def _expected(self, graph: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """What a graph gives for one example of these sizes."""
        return self.model.tensor_shape(self.model.signature(graph)[1][0], 1, sizes)[1:]


def _copied(value: npt.NDArray[Any], out: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    """The value in C order: in `out` where that is given, which is then returned."""
    if out is None:
        return np.ascontiguousarray(value)
    out[...] = value
    return out


def _count(verb: str, name: str, value: Any, least: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise InputError(f"{verb}: {name} is {value!r}; expected an integer") from None
    if count < least:
        raise InputError(f"{verb}: {name} is {count}; expected {least} or more")
    return count
