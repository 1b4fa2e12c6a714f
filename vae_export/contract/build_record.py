"""The record of a build, `build.json`: its graphs, the options and the machine that it was built with.

It is a record with a digest (see `records`), and the only description of an engine. What the graphs compute in is read
from it, never from the folder's name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from vae_export.contract.checks import check_paths, check_text, is_sha256
from vae_export.contract.choices import Asked, Precision, Wanted
from vae_export.contract.folders import RecordFolder
from vae_export.contract.manifest import Manifest
from vae_export.contract.model import FUSED, GRAPHS, MAX_SIZE, parts_of
from vae_export.contract.records import File, Part, RecordFormat
from vae_export.contract.targets import TOLERANCE_NAMES, FlavourName, Profile, Runner, parse
from vae_export.errors import BundleError, InputError

FORMAT: Final = "vae_export.build"
VERSION: Final = 1

CERTIFICATE = "verification.json"


class ExecutionPlan(Part, frozen=True, kw_only=True):
    """How a graph runs on the CPU, for batches up to a limit.

    Attributes:
        max_batch: the largest batch that this plan runs; null for no limit. `up_to` in the file.
        file: the ONNX file in the build's folder; empty for a graph that is in no build. Several plans may share one.
        runner: the package that runs it.
        precision: of its matrix products and convolutions, except the nodes in `kept`.
        threads: in one call; null is the runner's default.
        exact: shapes, as `batch` and the sizes of the data's named dimensions, for which OpenVINO compiles the graph
            again at their first call: it is faster where shapes are static.
        passes: the number of changes to the graph, by graph pass.
        kept: nodes of a low-precision graph that stayed in float32, each with the reason.
        requires: processor features without which the graph's results are wrong, by the names of `processor.features`.
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
    """A plan for a graph that was considered, its time, and whether it was chosen.

    Attributes:
        graph: its name.
        batch: examples in a call.
        runner: what ran it.
        precision: as in `ExecutionPlan`.
        passes: the graph passes that changed it.
        threads: as in `ExecutionPlan`.
        median_us: the median of the turns' medians, in microseconds; null where it was not timed.
        spread: the interquartile range of the turns' medians, as a share of the median.
        verdict: `chosen`, or the reason why not.
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
        onnx_sha256: of the ONNX graph that the engine was built from; for ONNX, of the file.
        structure: SHA-256 of that graph without the values of its weights.
        passes: the number of changes to the graph, by graph pass.
        kept: nodes of a low-precision graph that stayed in float32, each with the reason.
        variants: on the CPU its plans, by increasing batch; the last one's file is `file`. Empty: `file` runs on ONNX
            Runtime as it is.
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
    """What built the TensorRT engines, and what they run on.

    Attributes:
        flavour: of TensorRT.
        version: of TensorRT, exactly; no other version reads the engine.
        capabilities: the compute capabilities that the engine runs on, such as `8.6`.
        platform: operating system and processor, such as `linux x86_64`.
        gpu: the GPU that it was built on; null where there was none.
        driver: the CUDA version of that GPU's driver; null where there was none.
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
    """The processor that a build for the CPU was measured on.

    Attributes:
        model: its name, as the operating system reports it.
        architecture: such as `x86_64` or `aarch64`.
        features: its instruction sets, by the names of `processor.features`, sorted.
        cores: number of cores that could be used.
        threads: number of hardware threads of these cores that could be used.
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
    """The options that a build was requested with.

    Attributes:
        precision: of matrix products and convolutions, as requested.
        budget: the precision whose tolerances apply to `auto`.
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
        """The precision with which `load` finds such a build."""
        return "tf32" if self.precision == "fp32" and self.tf32 else self.precision

    @property
    def tolerance(self) -> str:
        """The name, in certificates, of the precision whose tolerances apply."""
        precision = self.budget if self.precision == "auto" else self.precision
        if precision == "fp32":
            return "tf32" if self.tf32 else "float32"
        return TOLERANCE_NAMES[precision]


class Build(Part, frozen=True, kw_only=True):
    """The content of `build.json`.

    Attributes:
        format: always `vae_export.build`.
        version: of this format: 1.
        digest: SHA-256 of the record's own bytes with this field empty.
        bundle: the bundle's name.
        manifest: the digest of the bundle's manifest.
        sources: SHA-256 of the bundle's graphs.
        target: what the build is for.
        created: date and time of the build, UTC, ISO 8601.
        options: that it was requested with.
        graphs: encoder, decoder, reconstruct; generate for pictures; for ONNX Runtime score, where there is an ELBO.
        engine: of TensorRT; null for ONNX Runtime.
        tools: versions of the packages that built it.
        measurements: on the CPU, every plan for a graph that was considered, and whether it was chosen.
        absent: what could not be measured there, and why.
        processor: on the CPU, what it was measured on; null for builds of versions that did not record it.
        calibrated: of graphs in int8 or float16, how many rows of which kind their activations were recorded on:
            `calibration` data of the bundle, `held_out` data and `decoded` prior draws of its golden examples, and
            `prior` draws as the decoder's input.
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
        budget = self.options.budget if self.options.precision == "auto" else None
        return held_to(self.precisions.items(), budget)

    @property
    def measured(self) -> bool:
        """Whether it has a certificate: its target was available where it was built."""
        return CERTIFICATE in self.files

    @property
    def exact(self) -> bool:
        """Whether its certificate is one of float32."""
        return self.measured and set(self.held_to.values()) == {TOLERANCE_NAMES["fp32"]}

    @property
    def precisions(self) -> dict[str, Precision | Literal["tf32"]]:
        """The precision of each graph's products and convolutions, except nodes that were kept in float32."""
        wanted = self.options.wanted
        uniform: Precision | Literal["tf32"] = "fp32" if wanted == "auto" else wanted  # auto: the CPU's, with variants
        return {
            name: min((variant.precision for variant in graph.variants), key=_RANK.index) if graph.variants else uniform
            for name, graph in self.graphs.items()
        }

    def in_words(self) -> str:
        """The graphs' precisions as text, such as `float32` or `float32 encoder, int8 decoder`."""
        names = {name: TOLERANCE_NAMES.get(kind, kind) for name, kind in self.precisions.items() if name in GRAPHS}
        if len(set(names.values())) == 1:
            return names["decoder"]
        return ", ".join(f"{names[graph]} {graph}" for graph in GRAPHS)


def held_to(precisions: Iterable[tuple[str, str]], budget: str | None) -> dict[str, str]:
    """The precisions whose tolerances apply to encoder and decoder, by their names in certificates.

    Args:
        precisions: of each graph, fused ones included.
        budget: of `auto`: tolerances are no looser than this precision's; None is no limit.
    """
    pairs, names = list(precisions), {}
    for part in GRAPHS:
        kind = min((kind for graph, kind in pairs if part in parts_of(graph)), key=_RANK.index)
        if budget is not None:
            kind = max(kind, budget, key=_RANK.index)
        names[part] = TOLERANCE_NAMES.get(kind, kind)
    return names


#: The least accurate first.
_RANK: Final[Sequence[str]] = ("int8", "bf16", "fp16", "tf32", "fp32")


RECORD_FORMAT = RecordFormat(
    record=Build,
    format=FORMAT,
    version=VERSION,
    file="build.json",
    name="build's record",
    folder="build",
    command="build",
    remedy="Build it again (vae-export build)",
)


class BuildFolder(RecordFolder[Build]):
    """An opened build, as `RecordFolder`.

    An engine is native code: it is opened from the user's own cache, or from a folder that the caller names, never
    because a bundle contains it; and only after `compatibility` has compared its record with the machine.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the build at `path`.

        Raises:
            InputError: there is no folder at `path`.
            BundleError: its record is missing, damaged, inconsistent or newer than this version.
        """
        super().__init__(path, RECORD_FORMAT)

    def check_source(self, manifest: Manifest) -> None:
        """Check that this is a build of a bundle.

        Raises:
            BundleError: it is a build of another bundle, or of this one before it was exported again.
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
        """The verified bytes of all graphs. Every other file is verified, too.

        Raises:
            BundleError: a file is missing or damaged.
        """
        contents = {name: self.read(graph.file) for name, graph in self.record.graphs.items()}
        self.check()
        return contents

    def variants(self) -> dict[str, list[tuple[ExecutionPlan, bytes]]]:
        """The plans of each graph of a build for the CPU, by increasing batch, with their graphs' verified bytes.

        Raises:
            BundleError: a file is missing or damaged.
        """
        plans = {
            name: graph.variants or (ExecutionPlan(file=graph.file, runner="onnxruntime"),)
            for name, graph in self.record.graphs.items()
        }
        contents = {file: self.read(file) for file in sorted({plan.file for each in plans.values() for plan in each})}
        self.check()
        return {name: [(plan, contents[plan.file]) for plan in each] for name, each in plans.items()}
