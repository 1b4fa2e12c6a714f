"""The manifest of a bundle, `manifest.json`: its files and its model. The contract between exporter and runtime.

It is a record with a digest: see `records`.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final, Literal

from vae_export.contract.checks import check_paths, check_text
from vae_export.contract.model import GRAPHS, Cost, Model, Tensor, shape_text, signature_text
from vae_export.contract.records import File, Part, RecordFormat

FORMAT: Final = "vae_export.bundle"
VERSION: Final = 1


class Tiled(Part, frozen=True, kw_only=True):
    """The error of running a graph in tiles, in pixels: tiled against untiled, measured at the export.

    For the decoder these are its own pixels; for the encoder those that the untiled decoder gives for latents encoded
    in tiles, against those for latents encoded untiled. Pixels are clamped to the data's range.

    Attributes:
        tile: height and width of the tiles, which overlap by a quarter.
        size: height and width of the pictures.
        worst: the largest difference, in levels of 255.
        off1: the share of values that differ by more than 1 of 255.
        off2: the share of values that differ by more than 2 of 255.
        psnr: peak signal-to-noise ratio, in dB; 300 where nothing differs.
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
        file: its path in the bundle; size and hash are in `Manifest.files`.
        opset: the version of the standard ONNX operators that it uses.
        inputs: in the graph's order.
        outputs: in the graph's order.
        cost: of one example; null where it was not counted.
        weights: the file beside it with its external weights, where one file would be too large; or null.
        tiled: the error of running it in tiles; null where it cannot be tiled, or where that was not measured.
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
    """The examples of `golden.safetensors`, in its order. Their noise is generated again from the seed.

    Attributes:
        seed: of the noise.
        reference: what computed the results, such as `PyTorch 2.13.0 float64`.
        extremes: rows at the ends of the data's range.
        held_out: rows of data, if possible data that the model was not trained on.
        decoded: rows of decoded prior draws, which take the place of data where there is too little of it.
        prior: draws from the prior.
        draws: perturbed runs of the reference, from which float32's tolerances follow; 0 for bundles without them,
            whose certificate cannot be measured.
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
        data: the model's training data, where that is known.
    """

    kind: Literal["checkpoint", "diffusers", "module"]
    name: str
    weights_sha256: str | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        check_text(self.name, self.weights_sha256 or "", self.data or "")


class Manifest(Part, frozen=True, kw_only=True):
    """The content of `manifest.json`.

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
        tools: versions of the packages that exported the bundle.
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

    def __repr__(self) -> str:
        model = self.model
        shapes = f"{shape_text(model.data.shape)} → {shape_text(model.latent.shape)}"
        return f"Manifest({self.name!r}, {model.architecture} {shapes}, {len(self.files)} files)"

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
        inputs, outputs = self.model.signature(name)
        if graph.inputs != inputs or graph.outputs != outputs:
            raise ValueError(
                f"{name}: {signature_text(inputs, outputs)} expected, got {signature_text(graph.inputs, graph.outputs)}"
            )


RECORD_FORMAT = RecordFormat(
    record=Manifest,
    format=FORMAT,
    version=VERSION,
    file="manifest.json",
    name="manifest",
    folder="bundle",
    command="export",
    remedy="Export or copy the bundle again",
)
