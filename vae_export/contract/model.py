"""A model's facts: data, latents, prior, posterior, likelihood, and the signatures of its graphs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from vae_export.contract.checks import check_text
from vae_export.contract.records import Part
from vae_export.errors import InputError

LikelihoodKind = Literal["bernoulli", "gaussian", "gaussian_fixed", "discretized_logistic", "none"]
PosteriorKind = Literal["diagonal_gaussian", "deterministic"]
#: The decoder's outputs, in order, for each likelihood p(x|z). `sample` is always the mean of p(x|z).
DECODER_OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "bernoulli": ("sample", "logits"),
    "gaussian": ("sample", "sample_logvar"),
    "gaussian_fixed": ("sample",),
    "discretized_logistic": ("sample", "location", "log_scale"),
    "none": ("sample",),
}
#: The encoder's outputs, in order, for each posterior q(z|x).
ENCODER_OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "diagonal_gaussian": ("mean", "logvar"),
    "deterministic": ("mean",),
}
#: The height and width of examples where none is given: latents of 8 × 8 for Stable Diffusion.
EXAMPLE_SIZE = 64
#: The outputs of the graph `score`, in order: log p(x|z) at one draw z, KL(q(z|x) || p(z)), and their difference.
SCORE_OUTPUTS = ("log_likelihood", "kl", "elbo")
#: The graphs of a bundle: encoder x → q(z|x), decoder z → p(x|z).
GRAPHS = ("encoder", "decoder")
#: The graphs that only builds have: see `Model.signature`.
FUSED = ("reconstruct", "generate", "score")
#: The largest size of a dimension.
MAX_SIZE = (1 << 31) - 1
#: The largest coefficient of a cost: far above any model's, and far below the largest float64.
_MAX_COST = 1e24


def parts_of(graph: str) -> tuple[str, ...]:
    """Which of GRAPHS a graph contains."""
    return {"encoder": ("encoder",), "decoder": ("decoder",), "generate": ("decoder",)}.get(graph, GRAPHS)


class SizeDim(Part, frozen=True, kw_only=True):
    """A dimension of the data that may differ from call to call, such as the height of an image.

    Attributes:
        name: such as `height`; unique within the shape.
        multiple_of: every size is a multiple of this, ≥ 1.
        min: the smallest size, ≥ 1.
        max: the largest size, or null where the model sets none.
    """

    name: str
    multiple_of: int = 1
    min: int = 1
    max: int | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name == "batch" or self.multiple_of < 1 or self.min < 1:
            raise ValueError(
                f"dimension {self.name!r}: an identifier that is not batch, multiple_of ≥ 1 and min ≥ 1 expected"
            )
        first = -(-self.min // self.multiple_of) * self.multiple_of
        if first > MAX_SIZE or (self.max is not None and self.max < first):
            raise ValueError(f"dimension {self.name!r}: no size is {self}")

    def allows(self, size: int) -> bool:
        """Whether the model takes this size."""
        return size % self.multiple_of == 0 and self.min <= size <= MAX_SIZE and (self.max is None or size <= self.max)

    def __str__(self) -> str:
        limits = [f"a multiple of {self.multiple_of}"] * (self.multiple_of > 1)
        limits += [f"at least {self.min}"] * (self.min > 1)
        limits += [f"at most {self.max}"] * (self.max is not None)
        return f"{self.name} ({', '.join(limits)})" if limits else self.name


class LatentDim(Part, frozen=True, kw_only=True):
    """A dimension of the latent that follows one of the data's named dimensions.

    Attributes:
        name: the name of the data's dimension.
        divided_by: the latent's size is the data's size divided by this, ≥ 1.
    """

    name: str
    divided_by: int = 1

    def __str__(self) -> str:
        return self.name if self.divided_by == 1 else f"{self.name}/{self.divided_by}"


class Data(Part, frozen=True, kw_only=True):
    """The examples x.

    Attributes:
        shape: one example's shape without the batch, such as [1, 28, 28]: integers or named dimensions.
        range: the smallest and the largest value of the training data. uint8 pictures are scaled to it.
    """

    shape: tuple[int | SizeDim, ...]
    range: tuple[float, float]

    def __post_init__(self) -> None:
        _check_shape(self.shape)
        low, high = self.range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"range: two finite, rising numbers expected, got [{low}, {high}]")

    def named(self) -> dict[str, SizeDim]:
        """The dimensions that may differ from call to call."""
        return {dim.name: dim for dim in self.shape if isinstance(dim, SizeDim)}


class Latent(Part, frozen=True, kw_only=True):
    """The latents z.

    Attributes:
        shape: one latent's shape without the batch: flat [D] or spatial [C, h, w], integers or dimensions
            that follow the data's.
        scaling: for latent diffusion, which works on (z − shift) · scaling or, where there are mean and std, on
            (z − mean) · scaling / std. The graphs of a bundle never apply it.
        shift: see scaling.
        mean: of each channel, or null; see scaling.
        std: of each channel, > 0, or null; see scaling.
    """

    shape: tuple[int | LatentDim, ...]
    scaling: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_shape(self.shape)
        if not (math.isfinite(self.scaling) and self.scaling > 0 and math.isfinite(self.shift)):
            raise ValueError(f"scaling must be positive and shift finite, got {self.scaling} and {self.shift}")
        if (self.mean is None) != (self.std is None) or (self.mean is not None and self.shift):
            raise ValueError("mean and std belong together, without a shift")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and (len(values) != self.shape[0] or not all(map(math.isfinite, values))):
                raise ValueError(f"{name}: one finite number for each of {self.shape[0]} channels expected")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std: positive numbers expected, got {list(self.std)}")

    @property
    def scaled(self) -> bool:
        """Whether a latent diffusion model works on other values than the encoder's."""
        return self.scaling != 1.0 or self.shift != 0.0 or self.mean is not None

    @property
    def formula(self) -> str:
        """The values that a latent diffusion model works on, as a formula of z."""
        if self.mean is not None and self.std is not None:
            mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
            return f"(z − mean) · {self.scaling:g} / std, mean ({mean}), std ({std})"
        return f"(z − {self.shift:g}) · {self.scaling:g}" if self.shift else f"z · {self.scaling:g}"


class Posterior(Part, frozen=True, kw_only=True):
    """The approximate posterior q(z|x), whose parameters are the encoder's outputs.

    Attributes:
        kind: `diagonal_gaussian` (the graph's outputs: mean, logvar) or `deterministic` (mean).
        logvar_clamp: the limits between which the encoder's graph clamps logvar, or null.
    """

    kind: PosteriorKind
    logvar_clamp: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _check_clamp("logvar_clamp", self.logvar_clamp, self.kind, "diagonal_gaussian")


class Likelihood(Part, frozen=True, kw_only=True):
    """The likelihood p(x|z), whose parameters are the decoder's outputs.

    Attributes:
        kind: the distribution of each value of x; DECODER_OUTPUTS has the graph's outputs for each.
        variance: the one variance of `gaussian_fixed`, > 0; null for the others.
        logvar_clamp: the limits between which the decoder's graph clamps sample_logvar, or null.
        log_scale_clamp: the limits between which it clamps log_scale, or null.
        nominal: the model was not trained with this likelihood: it and the ELBO are conventions.
    """

    kind: LikelihoodKind
    variance: float | None = None
    logvar_clamp: tuple[float, float] | None = None
    log_scale_clamp: tuple[float, float] | None = None
    nominal: bool = False

    def __post_init__(self) -> None:
        _check_clamp("logvar_clamp", self.logvar_clamp, self.kind, "gaussian")
        _check_clamp("log_scale_clamp", self.log_scale_clamp, self.kind, "discretized_logistic")
        if (self.kind == "gaussian_fixed") != (self.variance is not None):
            raise ValueError(
                f"variance belongs to gaussian_fixed and to no other likelihood, got {self.variance} for {self.kind}"
            )
        if self.variance is not None and not (math.isfinite(self.variance) and self.variance > 0):
            raise ValueError(f"variance must be positive, got {self.variance}")


class Tensor(Part, frozen=True, kw_only=True):
    """An input or output of a graph.

    Attributes:
        name: its name in the ONNX graph.
        dtype: its element type.
        shape: its dimensions, the batch included: integers, or names of dimensions that vary.
    """

    name: str
    dtype: Literal["float32", "uint8", "float64"]
    shape: tuple[int | str, ...]


Signature = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class Model(Part, frozen=True, kw_only=True):
    """The model that the graphs compute.

    Attributes:
        architecture: the model's name, such as `conv`. It is only shown.
        parameters: the number of trained values in encoder and decoder.
        data: the examples x.
        latent: the latents z.
        prior: p(z).
        posterior: q(z|x).
        likelihood: p(x|z).
        force_upcast: the model is declared to overflow in float16 (diffusers' field of this name).
    """

    architecture: str
    parameters: int
    data: Data
    latent: Latent
    prior: Literal["standard_normal"]
    posterior: Posterior
    likelihood: Likelihood
    force_upcast: bool = False

    def __post_init__(self) -> None:
        check_text(self.architecture)
        if self.parameters < 0:
            raise ValueError(f"parameters must not be negative, got {self.parameters}")
        if len(self.latent.shape) not in (1, 3):
            raise ValueError(f"latents are flat (D,) or spatial (C, h, w), got {shape_text(self.latent.shape, '')}")
        named = self.data.named()
        unknown = set(named) - {dim.name for dim in self.latent.shape if isinstance(dim, LatentDim)}
        if unknown:
            raise ValueError(f"no latent dimension follows {', '.join(sorted(unknown))}: decoding could not tell it")
        for dim in self.latent.shape:
            if isinstance(dim, LatentDim):
                if dim.name not in named:
                    raise ValueError(f"latent dimension {dim.name!r} names no dimension of the data")
                if dim.divided_by < 1 or named[dim.name].multiple_of % dim.divided_by:
                    raise ValueError(
                        f"latent dimension {dim}: {dim.name} is a multiple of {named[dim.name].multiple_of}, "
                        "which that does not divide"
                    )
        if self.likelihood.kind == "bernoulli" and self.data.range != (0.0, 1.0):
            raise ValueError(f"a Bernoulli likelihood needs data in [0, 1], got {list(self.data.range)}")

    @property
    def has_elbo(self) -> bool:
        """Whether there is an ELBO: p(x|z) is named, and q(z|x) has a variance."""
        return self.likelihood.kind != "none" and self.posterior.kind == "diagonal_gaussian"

    @property
    def has_samples(self) -> bool:
        """Whether the model was trained with its prior, so that decoded draws from it are samples."""
        return self.has_elbo and not self.likelihood.nominal

    def latent_shape(self, size: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """One latent's shape for data whose named dimensions have these sizes.

        Raises:
            InputError: a named dimension has no size, or one that the model does not take.
        """
        named = self.data.named()
        if size is not None and not isinstance(size, Mapping):
            raise InputError(f"size: expected names and sizes such as {{'height': 64}}, got {size!r}")
        size = size or {}
        wanted = ", ".join(map(str, named.values())) or "no sizes"
        if set(size) != set(named):
            raise InputError(f"size: this model takes {wanted}; got {dict(size)}")
        for name, value in size.items():
            if not isinstance(value, int) or not named[name].allows(value):
                raise InputError(f"size: this model takes {wanted}; got {name} = {value!r}")
        return tuple(dim if isinstance(dim, int) else size[dim.name] // dim.divided_by for dim in self.latent.shape)

    def data_shape(self, latent: tuple[int, ...]) -> tuple[int, ...]:
        """One example's shape for a latent's, the inverse of `latent_shape`."""
        named = self.sizes(latent)
        return tuple(dim if isinstance(dim, int) else named[dim.name] for dim in self.data.shape)

    def signature(self, graph: str) -> Signature:
        """A graph's inputs and outputs, in order.

        Args:
            graph: one of GRAPHS, or of FUSED: `reconstruct` (x, and eps ~ N(0, I) unless the encoder is deterministic
                → sample), `generate` (z → image, uint8, channels last) and, where `has_elbo`, `score` (x, eps →
                SCORE_OUTPUTS, nats of each example, float64).
        """
        shape = self.data.shape
        data = tuple(dim.name if isinstance(dim, SizeDim) else dim for dim in shape)
        latent = tuple(dim if isinstance(dim, int) else str(dim) for dim in self.latent.shape)

        def tensors(names: tuple[str, ...], dims: tuple[int | str, ...]) -> tuple[Tensor, ...]:
            return tuple(Tensor(name=name, dtype="float32", shape=("batch", *dims)) for name in names)

        x, z = tensors(("x",), data), tensors(("z",), latent)
        eps = tensors(("eps",), latent) if self.posterior.kind == "diagonal_gaussian" else ()
        if graph == "encoder":
            return x, tensors(ENCODER_OUTPUTS[self.posterior.kind], latent)
        if graph == "decoder":
            return z, tensors(DECODER_OUTPUTS[self.likelihood.kind], data)
        if graph == "reconstruct":
            return (*x, *eps), tensors(("sample",), data)
        if graph == "score":
            return (*x, *eps), tuple(Tensor(name=name, dtype="float64", shape=("batch",)) for name in SCORE_OUTPUTS)
        return z, (Tensor(name="image", dtype="uint8", shape=("batch", *data[1:], data[0])),)

    def input_sizes(self, graph: str, example: tuple[int, ...]) -> dict[str, int]:
        """The sizes of the data's named dimensions for one example of a graph's first input, x or z."""
        if graph in ("decoder", "generate"):
            return self.sizes(example)
        dims = zip(self.data.shape, example, strict=True)
        return {dim.name: size for dim, size in dims if isinstance(dim, SizeDim)}

    def tensor_shape(self, tensor: Tensor, batch: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of a graph's input or output, for a batch of examples of these sizes."""
        latent = [dim for dim in self.latent.shape if isinstance(dim, LatentDim)]
        known = {"batch": batch, **{str(dim): sizes[dim.name] // dim.divided_by for dim in latent}, **sizes}
        return tuple(dim if isinstance(dim, int) else known[dim] for dim in tensor.shape)

    def sizes(self, latent: tuple[int, ...]) -> dict[str, int]:
        """The sizes of the data's named dimensions for a latent's shape."""
        dims = zip(self.latent.shape, latent, strict=True)
        return {dim.name: size * dim.divided_by for dim, size in dims if isinstance(dim, LatentDim)}


class Cost(Part, frozen=True, kw_only=True):
    """The cost of one example in a graph, as polynomials of its pixels: c0 + c1 · p + c2 · p², p = height · width.

    For data without named dimensions it is the constant c0. The square is that of attention.

    Attributes:
        multiply_adds: of convolutions and matrix products.
        activations: peak bytes of float32 intermediate results, as counted in PyTorch; a backend may need more.
    """

    multiply_adds: tuple[float, float, float]
    activations: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not all(0 <= c <= _MAX_COST for c in (*self.multiply_adds, *self.activations)):
            raise ValueError(f"cost: numbers from 0 to {_MAX_COST:g} expected")

    def at(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """Multiply-adds and bytes for one example whose named dimensions have these sizes."""
        pixels = math.prod(sizes.values()) if sizes else 0
        first, second = (round(c[0] + c[1] * pixels + c[2] * pixels**2) for c in (self.multiply_adds, self.activations))
        return first, second


def signature_text(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> str:
    """A signature as messages show it: `x (batch, 1, 8, 8) → mean (batch, 20), logvar (batch, 20)`."""

    def text(tensor: Tensor) -> str:
        dtype = f"{tensor.dtype} " * (tensor.dtype != "float32")
        return f"{tensor.name} {dtype}({', '.join(map(str, tensor.shape))})"

    return " → ".join(", ".join(map(text, tensors)) for tensors in (inputs, outputs))


def _check_clamp(name: str, clamp: tuple[float, float] | None, kind: str, owner: str) -> None:
    if clamp is None:
        return
    if kind != owner:
        raise ValueError(f"{name} belongs to {owner}, got one for {kind}")
    if not (math.isfinite(clamp[0]) and math.isfinite(clamp[1]) and clamp[0] < clamp[1]):
        raise ValueError(f"{name}: two finite, rising numbers expected, got {list(clamp)}")


def _check_shape(shape: tuple[int | SizeDim, ...] | tuple[int | LatentDim, ...]) -> None:
    names = [dim.name for dim in shape if not isinstance(dim, int)]
    if not shape or len(set(names)) != len(names):
        raise ValueError("shape: one dimension or more expected, and no name twice")
    if any(isinstance(dim, int) and not 1 <= dim <= MAX_SIZE for dim in shape):
        raise ValueError(f"shape: every size must be from 1 to {MAX_SIZE}, got {list(map(str, shape))}")


def shape_text(shape: tuple[int | SizeDim, ...] | tuple[int | LatentDim, ...], batch: str = "B") -> str:
    """A shape as messages show it: `(B, 1, 8, 8)`, `(B, 3, height, width)`, `(B, 20)`."""
    dims = [str(dim) if isinstance(dim, (int, LatentDim)) else dim.name for dim in shape]
    return f"({', '.join([batch, *dims] if batch else dims)})"
