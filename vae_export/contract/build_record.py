"""Builds: what was made from a bundle for one target, where it lies, and whether it may run here.

`build.json` is a sealed record (see `records`) and the only record of an engine. A build lies in the user's own
cache, `builds/<digest of the bundle's manifest>/<slot>/`, or where it was asked to be. A slot is the target's name for
float32, and for each other precision the target's name with its (`cpu-auto`, `cuda-fp16`): none replaces another. What
a build in a slot computes in is read from its record. An engine is native code:
it is opened from the cache, or from a folder that the caller names, never because a bundle brought it along; and
only after everything that is said here of it was compared with the machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from vae_export.contract.folders import RecordFolder
from vae_export.contract.manifest import Manifest
from vae_export.contract.model import FUSED, GRAPHS, MAX_SIZE, parts_of
from vae_export.contract.records import File, Part, RecordFormat, check_paths, check_text, is_sha256
from vae_export.contract.targets import TOLERANCE_NAMES, Asked, FlavourName, Precision, Profile, Runner, Wanted, parse
from vae_export.errors import BundleError, InputError

FORMAT: Final = "vae_export.build"
VERSION: Final = 1

CERTIFICATE = "verification.json"


class ExecutionPlan(Part, frozen=True, kw_only=True):
    """How a graph runs on the CPU, for batches up to a limit.

    Attributes:
        max_batch: the largest batch that this plan runs; null for no limit. `up_to` in the file.
        file: the ONNX file in the build's folder; empty for a graph that is in no build. Several plans may share one.
        runner: what runs it.
        precision: what its heavy nodes compute in, but those in `kept`.
        threads: inside one call; null leaves it to the runner.
        exact: `batch`, and the sizes of the data's named dimensions, for which OpenVINO compiles the graph once more
            when it first meets them: it is faster where shapes are known.
        passes: what was done to the graph: for each pass the number of places that it changed.
        kept: nodes of a low-precision graph that stayed in float32, each with the reason.
        requires: what a processor must have for the graph to be right, by the names of `processor.features`.
    """

    max_batch: int | None = msgspec.field(default=None, name="up_to")
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
        if self.max_batch is not None and not 1 <= self.max_batch <= MAX_SIZE:
            raise ValueError(f"max_batch: a number from 1 to {MAX_SIZE} expected, got {self.max_batch}")
        if self.threads is not None and not 1 <= self.threads < 1 << 16:
            raise ValueError(f"threads: a number from 1 to 65535 expected, got {self.threads}")
        if self.runner == "openvino" and self.precision == "fp16":
            raise ValueError("precision fp16: OpenVINO computes in it on no processor here; fp32, bf16, int8 expected")

    def __str__(self) -> str:
        limit = "" if self.max_batch is None else f" up to {self.max_batch}"
        threads = "" if self.threads is None else f", {self.threads} threads"
        return f"{self.runner} in {self.precision}{threads}{limit}"


class Measurement(Part, frozen=True, kw_only=True):
    """What was measured of one way to run a graph.

    Attributes:
        graph: its name.
        batch: examples in a call.
        runner: what ran it.
        precision: as in `ExecutionPlan`.
        passes: those that changed the graph.
        threads: as in `ExecutionPlan`.
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
    variants: tuple[ExecutionPlan, ...] = ()

    def __post_init__(self) -> None:
        check_text(*self.passes, *self.kept, *self.kept.values())
        if not (is_sha256(self.onnx_sha256) and is_sha256(self.structure)):
            raise ValueError("onnx_sha256 and structure: 64 lower-case hexadecimal digits expected")
        limits = [variant.max_batch for variant in self.variants]
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
            flavour = parse(self.target).flavour
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


RECORD_FORMAT = RecordFormat(
    record=Build,
    format=FORMAT,
    version=VERSION,
    file="build.json",
    name="build's record",
    folder="build",
    made="build",
    remedy="Build it again (vae-export build)",
)


class BuildFolder(RecordFolder[Build]):
    """An opened build: its record is verified, and nothing else of it has been read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the build at `path`.

        Raises:
            InputError: there is no folder at `path`.
            BundleError: its record is missing, damaged, newer than this version or was changed.
        """
        super().__init__(path, RECORD_FORMAT)

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
                    f"{RECORD_FORMAT.remedy}"
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

    def variants(self) -> dict[str, list[tuple[ExecutionPlan, bytes]]]:
        """How each graph of a build for the CPU runs, with its verified bytes, by rising batch.

        Raises:
            BundleError: a file is missing or was changed.
        """
        chosen = {
            name: graph.variants or (ExecutionPlan(file=graph.file, runner="onnxruntime"),)
            for name, graph in self.record.graphs.items()
        }
        named = {variant.file for variants in chosen.values() for variant in variants}
        contents = {file: self.read(file) for file in sorted(named)}
        self.check()
        return {name: [(v, contents[v.file]) for v in variants] for name, variants in chosen.items()}
