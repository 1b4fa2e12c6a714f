"""Builds: what was made from a bundle for one target, where it lies, and whether it may run here.

`build.json` is a sealed record (see `records`) and the only record of an engine. A build lies in the user's own
cache, `builds/<digest of the bundle's manifest>/<slot>/`, or where it was asked to be. A slot is the target's name for
float32, and for each other precision the target's name with its (`cpu-auto`, `cuda-fp16`): none replaces another. What
a build in a slot computes in is read from its record. An engine is native code:
it is opened from the cache, or from a folder that the caller names, never because a bundle brought it along; and
only after everything that is said here of it was compared with the machine.
"""

from __future__ import annotations

import operator
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import msgspec
from platformdirs import user_cache_path

from vae_export.errors import BackendError, BundleError, InputError
from vae_export.manifest import FUSED, GRAPHS, MAX_SIZE, Manifest, Model, SizeDim, Tensor, parts_of
from vae_export.records import File, Part, Seal, check_paths, check_text, is_sha256
from vae_export.sealed import SealedFolder

FORMAT: Final = "vae_export.build"
VERSION: Final = 1

Precision = Literal["fp32", "fp16", "bf16", "int8"]
#: What can be asked for: `auto` is the fastest of all that holds.
Asked = Literal["auto", "fp32", "fp16", "bf16", "int8"]
#: What can be loaded: float32 whose products a GPU may round to TF32's 10 bits, too.
Wanted = Literal["auto", "fp32", "tf32", "fp16", "bf16", "int8"]
Runner = Literal["onnxruntime", "openvino"]
FlavourName = Literal["tensorrt", "tensorrt-rtx"]
Range = tuple[int, int, int]
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

CERTIFICATE = "verification.json"
#: The names of a precision in certificates.
TOLERANCE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
_TARGET = re.compile(r"cpu|cuda|tensorrt|tensorrt-rtx(?:-sm(\d{1,2})(\d))?")
_SLOT = re.compile(rf"({_TARGET.pattern})(?:-(?:{'|'.join(name for name in get_args(Wanted) if name != 'fp32')}))?")
_TARGETS = "cpu, cuda, tensorrt, tensorrt-rtx, or tensorrt-rtx-smNN for a compute capability such as sm89"


@dataclass(frozen=True)
class Target:
    """What a build is for.

    Attributes:
        name: as it was asked for, such as `tensorrt-rtx-sm89`.
        flavour: of TensorRT, or None for ONNX Runtime.
        capability: the one compute capability that was asked for, such as `8.9`, or None.
    """

    name: str
    flavour: FlavourName | None
    capability: str | None

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return "cpu" if self.name == "cpu" else "cuda"


def target(name: str) -> Target:
    """A target by its name.

    Raises:
        InputError: there is none of this name.
    """
    if not isinstance(name, str) or not (found := _TARGET.fullmatch(name)):
        raise InputError(f"build: target is {name!r}; expected {_TARGETS}")
    flavour: FlavourName | None = None
    if name.startswith("tensorrt"):
        flavour = "tensorrt" if name == "tensorrt" else "tensorrt-rtx"
    return Target(name, flavour, f"{found[1]}.{found[2]}" if found[1] else None)


class Profile(Part, frozen=True, kw_only=True):
    """Shapes that an engine takes, fastest at the middle ones: (smallest, middle, largest).

    Attributes:
        batch: of examples.
        sizes: of the data's named dimensions.
    """

    batch: Range
    sizes: dict[str, Range] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for low, middle, high in (self.batch, *self.sizes.values()):
            if not 1 <= low <= middle <= high:
                raise ValueError(f"profile: 1 ≤ smallest ≤ middle ≤ largest expected, got {low}, {middle}, {high}")

    def shapes(self, tensor: Tensor, model: Model) -> Shapes:
        """The smallest, middle and largest shape of a graph's input."""
        low, middle, high = (
            model.tensor_shape(tensor, self.batch[which], {name: size[which] for name, size in self.sizes.items()})
            for which in range(3)
        )
        return low, middle, high

    def fits(self, batch: int, sizes: Mapping[str, int]) -> bool:
        """Whether a batch of examples of these sizes can run, filled up to the smallest batch."""
        return batch <= self.batch[2] and all(
            name in sizes and low <= sizes[name] <= high for name, (low, _, high) in self.sizes.items()
        )

    @property
    def volume(self) -> int:
        """The largest batch times the largest sizes."""
        product = self.batch[2]
        for _, _, high in self.sizes.values():
            product *= high
        return product

    def __str__(self) -> str:
        sizes = [f"{name} {low} to {high}" for name, (low, _, high) in self.sizes.items()]
        return ", ".join([f"batch {self.batch[0]} to {self.batch[2]}", *sizes])


def profiles(
    model: Model,
    batches: Sequence[int],
    sizes: Sequence[Mapping[str, int]],
    *,
    static: bool = False,
) -> tuple[Profile, ...]:
    """One profile for each batch size and each size: a batch between two belongs to the larger one.

    Args:
        model: whose data may have named dimensions.
        batches: rising or not, each ≥ 1.
        sizes: of the named dimensions; empty for data of fixed size.
        static: take these batches and sizes only; a smaller batch is filled up.

    Raises:
        InputError: a batch size is below 1, or a size is not one that the model takes.
    """
    try:
        batches = sorted({operator.index(batch) for batch in batches})
    except TypeError:
        raise InputError(f"build: batches are {batches!r}; expected numbers from 1 on") from None
    if not batches or batches[0] < 1:
        raise InputError(f"build: batches are {list(batches)}; expected numbers from 1 on")
    named = model.data.named()
    for size in sizes or [{}]:
        model.latent_shape(size)
    made = []
    for size in sizes or [{}]:
        ranges = {
            name: (value if static else _smallest(named[name], value), value, value) for name, value in size.items()
        }
        for before, batch in zip([0, *batches], batches, strict=False):
            made.append(Profile(batch=(batch if static else before + 1, batch, batch), sizes=ranges))
    return tuple(made)


def _smallest(dim: SizeDim, largest: int) -> int:
    return min(largest, -(-dim.min // dim.multiple_of) * dim.multiple_of)


def choose(profiles: Sequence[Profile], batch: int, sizes: Mapping[str, int]) -> tuple[int, int] | None:
    """The smallest profile that fits: its index, and the batch to run at, which may be larger. None if none does."""
    fitting = [(p.volume, index) for index, p in enumerate(profiles) if p.fits(batch, sizes)]
    if not fitting:
        return None
    index = min(fitting)[1]
    return index, max(batch, profiles[index].batch[0])


class Variant(Part, frozen=True, kw_only=True):
    """How a graph runs on the CPU, for batches up to a size.

    Attributes:
        up_to: the largest batch that runs this way; null for all that are larger than the others'.
        file: its ONNX file in the build's folder. Several variants may share one.
        runner: what runs it.
        precision: what its heavy nodes compute in, but those in `kept`.
        threads: inside one call; null leaves it to the runner.
        exact: `batch`, and the sizes of the data's named dimensions, for which OpenVINO compiles the graph once more
            when it first meets them: it is faster where shapes are known.
        passes: what was done to the graph: for each pass the number of places that it changed.
        kept: nodes of a low-precision graph that stayed in float32, each with the reason.
        requires: what a processor must have for the graph to be right, by the names of `processor.features`.
    """

    up_to: int | None = None
    file: str
    runner: Runner
    precision: Precision = "fp32"
    threads: int | None = None
    exact: tuple[dict[str, int], ...] = ()
    passes: dict[str, int] = msgspec.field(default_factory=dict)
    kept: dict[str, str] = msgspec.field(default_factory=dict)
    requires: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_text(*self.passes, *self.kept, *self.kept.values(), *self.requires)
        if any("batch" not in shape or not all(1 <= n <= MAX_SIZE for n in shape.values()) for shape in self.exact):
            raise ValueError(f"exact: a batch and sizes from 1 to {MAX_SIZE} expected")
        if self.up_to is not None and not 1 <= self.up_to <= MAX_SIZE:
            raise ValueError(f"up_to: a number from 1 to {MAX_SIZE} expected, got {self.up_to}")
        if self.threads is not None and not 1 <= self.threads < 1 << 16:
            raise ValueError(f"threads: a number from 1 to 65535 expected, got {self.threads}")
        if self.runner == "openvino" and self.precision == "fp16":
            raise ValueError("precision fp16: OpenVINO computes in it on no processor here; fp32, bf16, int8 expected")


class Measurement(Part, frozen=True, kw_only=True):
    """What was measured of one way to run a graph.

    Attributes:
        graph: its name.
        batch: examples in a call.
        runner: what ran it.
        precision: as in `Variant`.
        passes: those that changed the graph.
        threads: as in `Variant`.
        median_us: the median of the turns' medians, in microseconds; null where it was not timed.
        spread: the interquartile range of the turns' medians, as a share of the median.
        verdict: `chosen`, or why not, in words.
    """

    graph: str
    batch: int
    runner: Runner
    precision: Precision
    passes: tuple[str, ...] = ()
    threads: int | None = None
    median_us: float | None = None
    spread: float | None = None
    verdict: str

    def __post_init__(self) -> None:
        check_text(self.graph, self.verdict, *self.passes)


class BuiltGraph(Part, frozen=True, kw_only=True):
    """One graph of a build.

    Attributes:
        file: its engine or ONNX file in the build's folder.
        onnx_sha256: of the ONNX graph that the engine was made from; for ONNX, of the file.
        structure: SHA-256 of that graph without the values of its weights.
        passes: what was done to the graph: for each pass the number of places that it changed.
        kept: nodes of a low-precision graph that stayed in float32, each with the reason.
        variants: on the CPU, how it runs, by rising batch; the last one's file is `file`. None: as it is, on ONNX
            Runtime.
    """

    file: str
    onnx_sha256: str
    structure: str
    passes: dict[str, int] = msgspec.field(default_factory=dict)
    kept: dict[str, str] = msgspec.field(default_factory=dict)
    variants: tuple[Variant, ...] = ()

    def __post_init__(self) -> None:
        check_text(*self.passes, *self.kept, *self.kept.values())
        if not (is_sha256(self.onnx_sha256) and is_sha256(self.structure)):
            raise ValueError("onnx_sha256 and structure: 64 lower-case hexadecimal digits expected")
        limits = [variant.up_to for variant in self.variants]
        rising = [limit for limit in limits if limit is not None]
        if limits and (rising != sorted(set(rising)) or limits != [*rising, None]):
            raise ValueError(f"variants: rising limits and then none expected, got {limits}")


class Engine(Part, frozen=True, kw_only=True):
    """What made the engines, and what they run on.

    Attributes:
        flavour: of TensorRT.
        version: its exact version; no other reads the engine.
        capabilities: the compute capabilities that the engine runs on, such as `8.6`.
        platform: operating system and processor, such as `linux x86_64`.
        gpu: the GPU that it was built on; null where there was none.
        driver: the version of CUDA that its driver had; null where there was none.
    """

    flavour: FlavourName
    version: str
    capabilities: tuple[str, ...]
    platform: str
    gpu: str | None = None
    driver: str | None = None

    def __post_init__(self) -> None:
        check_text(self.version, *self.capabilities, self.platform, self.gpu or "", self.driver or "")
        if not self.capabilities:
            raise ValueError("capabilities: one or more expected")


class Processor(Part, frozen=True, kw_only=True):
    """What a build for the CPU was measured on.

    Attributes:
        model: its name, as the system gives it.
        architecture: such as `x86_64` or `aarch64`.
        features: what it computes by itself, by the names of `processor.features`, sorted.
        cores: that could be used.
        threads: of these cores, that could be used.
    """

    model: str
    architecture: str
    features: tuple[str, ...] = ()
    cores: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        check_text(self.model, self.architecture, *self.features)
        if min(self.cores, self.threads) < 1:
            raise ValueError("cores and threads: numbers from 1 on expected")

    def __str__(self) -> str:
        return f"{self.model} ({self.architecture}, {self.cores} core{'s' * (self.cores > 1)})"


class Options(Part, frozen=True, kw_only=True):
    """How a build was asked for.

    Attributes:
        precision: what the heavy part of the graphs computes in, as asked for.
        budget: the precision whose tolerances `auto` is held to.
        passes: the graph passes that may be used; null for builds of versions that had none.
        tf32: whether float32 products on a GPU may be rounded to TF32's 10 bits.
        nhwc: whether ONNX Runtime keeps channels last on CUDA.
        refittable: whether other weights of the same architecture can be put into the engines.
        profiles: shapes that the engines take; none for ONNX Runtime, which takes all.
    """

    precision: Asked = "fp32"
    budget: Precision = "int8"
    passes: tuple[str, ...] | None = None
    tf32: bool = False
    nhwc: bool = False
    refittable: bool = False
    profiles: tuple[Profile, ...] = ()

    @property
    def wanted(self) -> Wanted:
        """What to ask `load` for to get such a build."""
        return "tf32" if self.precision == "fp32" and self.tf32 else self.precision

    @property
    def tolerance(self) -> str:
        """The name of the tolerances that a certificate is held to."""
        precision = self.budget if self.precision == "auto" else self.precision
        if precision == "fp32":
            return "tf32" if self.tf32 else "float32"
        return TOLERANCE_NAMES[precision]


class Build(Part, frozen=True, kw_only=True):
    """What `build.json` says.

    Attributes:
        format: always `vae_export.build`.
        version: of this format: 1.
        digest: SHA-256 of the record's own bytes with this field empty.
        bundle: the bundle's name.
        manifest: the digest of the bundle's manifest.
        sources: SHA-256 of the bundle's graphs.
        target: what the build is for.
        created: when it was made, UTC, ISO 8601.
        options: how it was asked for.
        graphs: encoder, decoder, reconstruct; generate for pictures; for ONNX Runtime score, where there is an ELBO.
        engine: of TensorRT; null for ONNX Runtime.
        tools: versions of the packages that made the build.
        measurements: on the CPU, every way to run a graph that was measured, and what became of it.
        absent: what could not be measured there, and why.
        processor: on the CPU, what it was measured on; null for builds of versions that did not look.
        calibrated: of graphs in 8 bits or float16, how many rows of which kind their activations were recorded on:
            `calibration` data of the bundle, of its golden examples `held_out` data and `decoded` draws from the prior;
            and of `prior`, the draws that the decoder was given.
        files: every file of the build but the record, by its path with forward slashes.
    """

    format: Literal["vae_export.build"]
    version: Literal[1]
    digest: str
    bundle: str
    manifest: str
    sources: dict[str, str]
    target: str
    created: str
    options: Options
    graphs: dict[str, BuiltGraph]
    engine: Engine | None = None
    tools: dict[str, str]
    measurements: tuple[Measurement, ...] = ()
    absent: tuple[str, ...] = ()
    processor: Processor | None = None
    calibrated: dict[str, int] = msgspec.field(default_factory=dict)
    files: dict[str, File]

    def __post_init__(self) -> None:
        check_text(self.bundle, self.created, self.target, *self.tools, *self.tools.values(), *self.absent)
        check_text(*self.calibrated)
        check_paths(self.files)
        named = {graph.file for graph in self.graphs.values()}
        named |= {variant.file for graph in self.graphs.values() for variant in graph.variants}
        missing = named - set(self.files)
        if missing:
            raise ValueError(f"files: {', '.join(sorted(missing))} must be listed")
        if not set(GRAPHS) <= set(self.graphs) <= {*GRAPHS, *FUSED}:
            known = ", ".join(FUSED)
            raise ValueError(
                f"graphs: encoder, decoder and, as far as there are, {known} expected, got {sorted(self.graphs)}"
            )
        if (self.engine is None) != (not self.options.profiles):
            raise ValueError("profiles belong to engines, and every engine has one or more")
        try:
            flavour = target(self.target).flavour
        except InputError as error:
            raise ValueError(str(error)) from None
        if self.target != "cpu" and any(graph.variants for graph in self.graphs.values()):
            raise ValueError("variants belong to the target cpu")
        if flavour != (self.engine.flavour if self.engine else None):
            raise ValueError(f"target {self.target}: its engine is of another flavour")

    @property
    def held_to(self) -> dict[str, str]:
        """See `held_to`."""
        asked = self.options
        return held_to(self.precisions.items(), asked.budget if asked.precision == "auto" else None)

    @property
    def measured(self) -> bool:
        """Whether it has a certificate: it ran where it was made."""
        return CERTIFICATE in self.files

    @property
    def exact(self) -> bool:
        """Whether it holds float32's certificate."""
        return self.measured and set(self.held_to.values()) == {TOLERANCE_NAMES["fp32"]}

    @property
    def precisions(self) -> dict[str, Precision | Literal["tf32"]]:
        """What the heavy nodes of each graph compute in, but those that were kept in float32."""
        asked: Precision | Literal["tf32"] = "tf32" if self.options.wanted == "tf32" else _one(self.options.precision)
        return {
            name: min((variant.precision for variant in graph.variants), key=_RANK.index) if graph.variants else asked
            for name, graph in self.graphs.items()
        }

    def in_words(self) -> str:
        """What the graphs compute in, such as `float32` or `float32 encoder, int8 decoder`."""
        names = {name: TOLERANCE_NAMES.get(kind, kind) for name, kind in self.precisions.items() if name in GRAPHS}
        if len(set(names.values())) == 1:
            return names["decoder"]
        return ", ".join(f"{names[graph]} {graph}" for graph in GRAPHS)


def held_to(precisions: Iterable[tuple[str, str]], budget: str | None) -> dict[str, str]:
    """The precision whose tolerances encoder and decoder are held to, by its name in certificates.

    Args:
        precisions: graphs, fused ones included, and what each computes in.
        budget: of `auto`: no looser than this; None is no limit.
    """
    pairs, found = list(precisions), {}
    for part in GRAPHS:
        kind = min((kind for graph, kind in pairs if part in parts_of(graph)), key=_RANK.index)
        if budget is not None:
            kind = max(kind, budget, key=_RANK.index)
        found[part] = TOLERANCE_NAMES.get(kind, kind)
    return found


#: The least exact first.
_RANK: Final[Sequence[str]] = ("int8", "bf16", "fp16", "tf32", "fp32")


def _one(asked: Asked) -> Precision:
    """What all graphs without variants are in: `auto` is the CPU's, whose builds have variants."""
    return "fp32" if asked == "auto" else asked


SEAL = Seal(
    record=Build,
    format=FORMAT,
    version=VERSION,
    file="build.json",
    name="build's record",
    folder="build",
    made="build",
    remedy="Build it again (vae-export build)",
)


class BuildFolder(SealedFolder[Build]):
    """An opened build: its record is verified, and nothing else of it has been read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the build at `path`.

        Raises:
            InputError: there is no folder at `path`.
            BundleError: its record is missing, damaged, newer than this version or was changed.
        """
        super().__init__(path, SEAL)

    def check_source(self, manifest: Manifest) -> None:
        """Refuse a build of another bundle.

        Raises:
            BundleError: it was made from another bundle, or from this one before it was exported again.
        """
        if self.record.manifest == manifest.digest:
            names = {"batch", *manifest.model.data.named()}
            exact = (shape for g in self.record.graphs.values() for v in g.variants for shape in v.exact)
            if wrong := next((shape for shape in exact if set(shape) != names), None):
                raise BundleError(
                    f"{self.path}: exact: sizes of {', '.join(sorted(names))} expected, got {', '.join(wrong)}. "
                    f"{SEAL.remedy}"
                )
            return
        ours = {name: manifest.files[graph.file].sha256 for name, graph in manifest.graphs.items()}
        changed = sorted(name for name, digest in ours.items() if self.record.sources.get(name) != digest)
        what = f"its {' and '.join(changed)} changed since" if changed else "it was exported again since"
        raise BundleError(
            f"{self.path}: built from bundle {self.record.bundle} with manifest {self.record.manifest[:12]}…; this "
            f"bundle, {manifest.name}, has manifest {manifest.digest[:12]}…: {what}. "
            f"Run: vae-export build BUNDLE --target {self.record.target}"
        )

    def graphs(self) -> dict[str, bytes]:
        """The verified bytes of all graphs; every other file is verified, too.

        Raises:
            BundleError: a file is missing or was changed.
        """
        found = {name: self.read(graph.file) for name, graph in self.record.graphs.items()}
        self.check()
        return found

    def variants(self) -> dict[str, list[tuple[Variant, bytes]]]:
        """How each graph of a build for the CPU runs, with its verified bytes, by rising batch.

        Raises:
            BundleError: a file is missing or was changed.
        """
        chosen = {
            name: graph.variants or (Variant(file=graph.file, runner="onnxruntime"),)
            for name, graph in self.record.graphs.items()
        }
        named = {variant.file for variants in chosen.values() for variant in variants}
        contents = {file: self.read(file) for file in sorted(named)}
        self.check()
        return {name: [(v, contents[v.file]) for v in variants] for name, variants in chosen.items()}


@dataclass(frozen=True)
class Machine:
    """What a build is compared with.

    Attributes:
        platform: as `Engine.platform`.
        flavours: the version of each flavour of TensorRT that can be loaded here, or the reason why not.
        capability: of the GPU that is used, such as `9.0`; None without one.
        gpu: its name, or why there is none.
    """

    platform: str
    flavours: Mapping[str, str | BackendError]
    capability: str | None
    gpu: str


def mismatch(engine: Engine, machine: Machine) -> str | None:
    """What keeps an engine from running on a machine, in words, or None.

    It is asked before a byte of the engine is deserialized.
    """
    version = machine.flavours.get(engine.flavour)
    if not isinstance(version, str):
        return f"built for {_TITLES[engine.flavour]} {engine.version}; this machine has none: {version}"
    if version != engine.version:
        return f"built for {_TITLES[engine.flavour]} {engine.version}; this machine has {version}"
    if machine.platform != engine.platform:
        return f"built for {engine.platform}; this machine is {machine.platform}"
    if machine.capability not in engine.capabilities:
        built = ", ".join(engine.capabilities)
        has = f"{machine.capability} ({machine.gpu})" if machine.capability else f"no GPU ({machine.gpu})"
        return f"built for compute capability {built}; this machine has {has}"
    return None


def unfit(record: Build, here: Processor) -> str | None:
    """What keeps a build for the CPU from being right on a processor, in words, or None.

    It is asked before a runner opens a graph: what runs without the instruction may be wrong without any error.
    """
    for name, graph in record.graphs.items():
        for variant in graph.variants:
            if missing := sorted(_required(variant, record) - set(here.features)):
                words = " and ".join(f"{feature} ({_FEATURES.get(feature, 'not known here')})" for feature in missing)
                return f"the {name} computes in {variant.precision} and needs {words}, which {here.model} does not have"
    return None


def elsewhere(record: Build, here: Processor) -> str | None:
    """For a build for the CPU that was measured on another processor: what that means here, in words."""
    there = record.processor
    if there is None or there == here:
        return None
    if (there.model, there.architecture, there.features) == (here.model, here.architecture, here.features):
        return f"measured with {_cores(there)}, and here are {_cores(here)}: another choice may be faster"
    return (
        f"measured on {there}, and this is {here}: its graphs are right here, too, but its certificate is from there "
        "(vae-export verify --build measures it here), and another choice may be faster (vae-export build makes it)"
    )


def _cores(has: Processor) -> str:
    return f"{has.cores} core{'s' * (has.cores > 1)}, {has.threads} thread{'s' * (has.threads > 1)}"


def _required(variant: Variant, record: Build) -> set[str]:
    """What a variant needs; builds that do not know their processor do not say it, and have 8-bit weights."""
    required = set(variant.requires)
    if record.processor is None and variant.precision == "int8":
        required.add("vnni")
    return required | ({"bf16"} if variant.precision == "bf16" else set())


_FEATURES = {"vnni": "sums of 8-bit products that do not overflow", "bf16": "products of bfloat16"}

_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}


def title(flavour: FlavourName) -> str:
    """A flavour's name in words."""
    return _TITLES[flavour]


def cache() -> Path:
    """The folder of the user's own cache: VAE_EXPORT_CACHE, or where this system keeps caches."""
    named = os.environ.get("VAE_EXPORT_CACHE")
    return Path(named) if named else user_cache_path("vae_export", appauthor=False)


def slot(target: str, wanted: Wanted = "fp32") -> str:
    """The name under which the cache keeps a bundle's build for a target in a precision."""
    return target if wanted == "fp32" else f"{target}-{wanted}"


def cached(manifest: Manifest, name: str) -> Path:
    """Where the cache keeps a bundle's build of a slot, whether it is there or not."""
    return cache() / "builds" / manifest.digest / name


def cached_slots(manifest: Manifest) -> list[str]:
    """The slots in which the cache holds a build of this bundle."""
    folder = cache() / "builds" / manifest.digest
    found = sorted(path.name for path in folder.iterdir() if (path / SEAL.file).is_file()) if folder.is_dir() else []
    return [name for name in found if _SLOT.fullmatch(name)]


def slot_target(name: str) -> Target:
    """The target of a slot that `cached_slots` gave."""
    found = _SLOT.fullmatch(name)
    assert found is not None
    return target(found[1])


def check_cache() -> Path:
    """The cache, made if it is missing, that nobody but this user can reach: an engine is native code.

    Raises:
        BackendError: it belongs to another user or is open to others.
    """
    root = cache()
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
    status = root.stat()
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077):
        raise BackendError(
            f"{root}: the cache belongs to another user or is open to others, who could put native code there. "
            f"Run: chmod 700 {root} (if it is yours), or set VAE_EXPORT_CACHE to a folder of your own"
        )
    return root
