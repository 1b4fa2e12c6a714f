"""The manifest: what a bundle contains and what its model is. The contract of exporter and runtime.

`manifest.json` is a sealed record: see `records`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Final, Literal

from vae_export.errors import InputError
from vae_export.records import File, Part, Seal, check_paths, check_text

FORMAT: Final = "vae_export.bundle"
VERSION: Final = 1

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

#: A height and width to look at a model with, where nobody names one: latents of 8 × 8 for Stable Diffusion.
EXAMPLE_SIZE = 64

#: The outputs of the graph `score`, in order: log p(x|z) at one draw z, KL(q(z|x) || p(z)), and their difference.
SCORE_OUTPUTS = ("log_likelihood", "kl", "elbo")

#: The graphs of a bundle: encoder x → q(z|x), decoder z → p(x|z).
GRAPHS = ("encoder", "decoder")
#: The graphs that only builds have: see `Model.ends`.
FUSED = ("reconstruct", "generate", "score")

#: The largest size of a dimension.
MAX_SIZE = (1 << 31) - 1
#: The largest coefficient of a cost: far above any model, and far enough below what a float can hold.
_MAX_COST = 1e24


def parts_of(graph: str) -> tuple[str, ...]:
    """Those of GRAPHS that a graph has in it."""
    return {"encoder": ("encoder",), "decoder": ("decoder",), "generate": ("decoder",)}.get(graph, GRAPHS)


LikelihoodKind = Literal["bernoulli", "gaussian", "gaussian_fixed", "discretized_logistic", "none"]
PosteriorKind = Literal["diagonal_gaussian", "deterministic"]


class SizeDim(Part, frozen=True, kw_only=True):
    """A dimension of the data that may differ from call to call, such as the height of an image.

    Attributes:
        name: what it is called, such as `height`; unique within the shape.
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
        range: the smallest and the largest value that the model was trained on. uint8 pictures are scaled
            onto it.
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
        scaling: for latent diffusion: such a pipeline works on (z − shift) · scaling, or, where there are a
            mean and a deviation, on (z − mean) · scaling / std. The graphs of a bundle never apply it.
        shift: see scaling.
        mean: of each channel, or null; see scaling.
        std: of each channel, > 0, or null.
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
        """Whether a diffusion model works on other values than the encoder's."""
        return self.scaling != 1.0 or self.shift != 0.0 or self.mean is not None


class Posterior(Part, frozen=True, kw_only=True):
    """The approximate posterior q(z|x) that the encoder gives.

    Attributes:
        kind: `diagonal_gaussian` (the graph's outputs: mean, logvar) or `deterministic` (mean).
        logvar_clamp: the limits between which the encoder's graph clamps logvar, or null.
    """

    kind: PosteriorKind
    logvar_clamp: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _check_clamp(self.logvar_clamp, self.kind, "diagonal_gaussian")


class Likelihood(Part, frozen=True, kw_only=True):
    """The likelihood p(x|z) that the decoder gives.

    Attributes:
        kind: the distribution of each value of x; DECODER_OUTPUTS has the graph's outputs for each.
        variance: the one variance of `gaussian_fixed`, > 0; null for the others.
        logvar_clamp: the limits between which the decoder's graph clamps sample_logvar, or null.
        log_scale_clamp: the limits between which it clamps log_scale, or null.
        nominal: the model was not trained with this likelihood: it is a convention, and so is the ELBO.
    """

    kind: LikelihoodKind
    variance: float | None = None
    logvar_clamp: tuple[float, float] | None = None
    log_scale_clamp: tuple[float, float] | None = None
    nominal: bool = False

    def __post_init__(self) -> None:
        _check_clamp(self.logvar_clamp, self.kind, "gaussian")
        _check_clamp(self.log_scale_clamp, self.kind, "discretized_logistic")
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


Ends = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class Model(Part, frozen=True, kw_only=True):
    """The model that the graphs compute.

    Attributes:
        architecture: the model's name, such as `conv`. For people; nothing depends on it.
        parameters: the number of trained values in encoder and decoder.
        data: the examples x.
        latent: the latents z.
        prior: p(z).
        posterior: q(z|x).
        likelihood: p(x|z).
        force_upcast: its makers say that it overflows in float16.
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
        """Whether the prior is one that the model was trained with, so that decoded draws from it are samples."""
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

    def ends(self, graph: str) -> Ends:
        """A graph's inputs and outputs, in order.

        Args:
            graph: one of GRAPHS, or of those that only builds have: `reconstruct` (x, and eps ~ N(0, I) unless
                the encoder is deterministic → sample), `generate` (z → image, uint8, channels last) and, where
                `has_elbo`, `score` (x, eps → SCORE_OUTPUTS, nats of each example, float64).
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
        """A graph's input or output in numbers, for a batch of examples of these sizes."""
        latent = [dim for dim in self.latent.shape if isinstance(dim, LatentDim)]
        known = {"batch": batch, **{str(dim): sizes[dim.name] // dim.divided_by for dim in latent}, **sizes}
        return tuple(dim if isinstance(dim, int) else known[dim] for dim in tensor.shape)

    def sizes(self, latent: tuple[int, ...]) -> dict[str, int]:
        """The sizes of the data's named dimensions for a latent's shape."""
        dims = zip(self.latent.shape, latent, strict=True)
        return {dim.name: size * dim.divided_by for dim, size in dims if isinstance(dim, LatentDim)}


class Cost(Part, frozen=True, kw_only=True):
    """What one example costs in a graph, as a polynomial of its pixels: c0 + c1 · p + c2 · p², p = height · width.

    For data without named dimensions it is the constant c0. The square is that of attention.

    Attributes:
        multiply_adds: of convolutions and products.
        activations: the most bytes of float32 intermediate results that are needed at once, as counted in PyTorch;
            a backend may need more.
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


class Tiled(Part, frozen=True, kw_only=True):
    """How far tiles move what a graph gives, in pixels of the picture: tiled against untiled, measured at the export.

    For the decoder these are its own pixels; for the encoder those of the untiled decoder, given the latents that were
    encoded in tiles and the ones that were not. Pixels are clamped to the data's range.

    Attributes:
        tile: height and width of the tiles, with an overlap of a quarter.
        size: height and width of the pictures.
        worst: the largest difference, in levels of 255.
        off1: the share of values off by more than 1 of 255.
        off2: the share of values off by more than 2 of 255.
        psnr: dB of the range; 300 where nothing differs.
    """

    tile: tuple[int, int]
    size: tuple[int, int]
    worst: float
    off1: float
    off2: float
    psnr: float

    def __post_init__(self) -> None:
        shares = all(0 <= share <= 1 for share in (self.off1, self.off2))
        sizes = min(*self.tile, *self.size) >= 1
        if not (sizes and 0 <= self.worst <= 255 and shares and 0 <= self.psnr <= 300):
            raise ValueError("tiled: sizes from 1, levels from 0 to 255, shares from 0 to 1 and 0 to 300 dB expected")

    def __str__(self) -> str:
        tile, size = (f"{height} × {width}" for height, width in (self.tile, self.size))
        return (
            f"in tiles of {tile}, pixels of pictures of {size} are off by up to {self.worst:.0f} of 255 from the "
            f"untiled ones, {self.off1:.0%} of them by more than 1"
        )


class Graph(Part, frozen=True, kw_only=True):
    """One ONNX graph.

    Attributes:
        file: its file in the bundle; size and hash are in `Manifest.files`.
        opset: the version of the standard ONNX operators that it uses.
        inputs: in the graph's order.
        outputs: in the graph's order.
        cost: of one example; null where it was not counted.
        weights: the file beside it that has its large weights, where one file would be too large; or null.
        tiled: how far tiles move what it gives; null where it takes none, or where it was not measured.
    """

    file: str
    opset: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    cost: Cost | None = None
    weights: str | None = None
    tiled: Tiled | None = None


class GoldenSize(Part, frozen=True, kw_only=True):
    """Golden examples at another size of the data's named dimensions.

    Attributes:
        sizes: of the named dimensions.
        examples: rows of data; 0 where the size was not measured.
        prior: draws from the prior; 0 where the size was not measured.
        absent: why it was not measured, or why its rows are not kept; null where they are.
    """

    sizes: dict[str, int]
    examples: int = 0
    prior: int = 0
    absent: str | None = None

    def __post_init__(self) -> None:
        check_text(self.absent or "")
        counts = (self.examples, self.prior)
        if min(counts) < 0 or (self.absent is None) != (min(counts) > 0):
            raise ValueError("golden: a size has one example or more and one prior draw or more, or a reason why not")


class Golden(Part, frozen=True, kw_only=True):
    """The examples of `golden.safetensors`, in its order. Their noise is made again from the seed.

    Attributes:
        seed: of the noise.
        reference: what computed the results, such as `PyTorch 2.13.0 float64`.
        extremes: rows at the ends of the data's range.
        held_out: rows of data, best such as the model was not trained on.
        decoded: rows of decoded prior draws, which stand in where there is too little data.
        prior: draws from the prior.
        draws: perturbed runs of the reference from which float32's tolerances come; 0 for bundles that have none, whose
            certificate cannot be measured.
        sizes: further sizes of the data's named dimensions, in the order of the file.
    """

    seed: int
    reference: str
    extremes: int
    held_out: int
    decoded: int
    prior: int
    draws: int = 0
    sizes: tuple[GoldenSize, ...] = ()

    def __post_init__(self) -> None:
        check_text(self.reference)
        if self.draws < 0:
            raise ValueError("golden: draws of 0 or more expected")
        data = self.held_out + self.decoded
        if min(self.seed, self.extremes, self.held_out, self.decoded) < 0 or self.prior < 1 or data < 1:
            raise ValueError("golden: a seed of 0 or more, one example or more and one prior draw or more expected")

    @property
    def examples(self) -> int:
        """The rows of x."""
        return self.extremes + self.held_out + self.decoded


class Origin(Part, frozen=True, kw_only=True):
    """Where the model came from.

    Attributes:
        kind: `checkpoint` (of our trainer), `diffusers` (a folder) or `module` (a PyTorch module).
        name: the checkpoint folder's or the module class's name.
        weights_sha256: hash of the weights' files, or of a module's tensors by name.
        data: what the model was trained on, where that is known.
    """

    kind: Literal["checkpoint", "diffusers", "module"]
    name: str
    weights_sha256: str | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        check_text(self.name, self.weights_sha256 or "", self.data or "")


class Manifest(Part, frozen=True, kw_only=True):
    """What `manifest.json` says.

    Attributes:
        format: always `vae_export.bundle`.
        version: of this format: 1.
        digest: SHA-256 of the manifest's own bytes with this field empty.
        name: of the bundle.
        created: date and time of the export, UTC, ISO 8601.
        model: what the graphs compute.
        graphs: `encoder` (x → posterior) and `decoder` (z → likelihood).
        golden: what `golden.safetensors` holds.
        origin: where the model came from.
        tools: versions of the packages that made the bundle.
        files: every file of the bundle but the manifest, by its path with forward slashes.
    """

    format: Literal["vae_export.bundle"]
    version: Literal[1]
    digest: str
    name: str
    created: str
    model: Model
    graphs: dict[str, Graph]
    golden: Golden
    origin: Origin
    tools: dict[str, str]
    files: dict[str, File]

    def __post_init__(self) -> None:
        check_text(self.name, self.created, *self.tools, *self.tools.values())
        if not self.name or set(self.name) & set("/\\"):
            raise ValueError(f"name {self.name!r}: a name without slashes expected")
        check_paths(self.files)
        if set(self.graphs) != set(GRAPHS):
            raise ValueError(f"graphs: an encoder and a decoder expected, got {sorted(self.graphs)}")
        for name in GRAPHS:
            self._check_graph(name)
        missing = {"config.json", "golden.safetensors", "verification.json"} - set(self.files)
        if missing:
            raise ValueError(f"files: {', '.join(sorted(missing))} must be listed")

    def _check_graph(self, name: str) -> None:
        graph = self.graphs[name]
        if graph.file not in self.files:
            raise ValueError(f"{name}: its file {graph.file!r} is not listed in files")
        if graph.weights is not None:
            beside = PurePosixPath(graph.weights).parent == PurePosixPath(graph.file).parent
            if graph.weights not in self.files or graph.weights == graph.file or not beside:
                raise ValueError(f"{name}: weights {graph.weights!r} is no other listed file in the graph's folder")
        if graph.opset < 1:
            raise ValueError(f"{name}: opset {graph.opset} is none")
        inputs, outputs = self.model.ends(name)
        if graph.inputs != inputs or graph.outputs != outputs:
            raise ValueError(
                f"{name}: {_signature(inputs, outputs)} expected, got {_signature(graph.inputs, graph.outputs)}"
            )


SEAL = Seal(
    record=Manifest,
    format=FORMAT,
    version=VERSION,
    file="manifest.json",
    name="manifest",
    folder="bundle",
    made="export",
    remedy="Export or copy the bundle again",
)


def _signature(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> str:
    def end(tensor: Tensor) -> str:
        dtype = f"{tensor.dtype} " * (tensor.dtype != "float32")
        return f"{tensor.name} {dtype}({', '.join(map(str, tensor.shape))})"

    return " → ".join(", ".join(map(end, tensors)) for tensors in (inputs, outputs))


def _check_clamp(clamp: tuple[float, float] | None, kind: str, owner: str) -> None:
    if clamp is None:
        return
    if kind != owner:
        raise ValueError(f"logvar_clamp belongs to {owner}, got one for {kind}")
    if not (math.isfinite(clamp[0]) and math.isfinite(clamp[1]) and clamp[0] < clamp[1]):
        raise ValueError(f"logvar_clamp: two finite, rising numbers expected, got {list(clamp)}")


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
