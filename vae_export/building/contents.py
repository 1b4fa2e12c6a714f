"""What goes into a build, a bundle's graphs and examples, and what comes out: the parts of a build's folder."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from vae_export.certification import golden
from vae_export.certification.certificate import Certificate
from vae_export.contract import onnx_guard
from vae_export.contract.build_record import BuiltGraph, Engine, Measurement
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import Cost, Model
from vae_export.errors import BundleError
from vae_export.numerics.pixels import is_picture
from vae_export.runtimes.backend import Array


@dataclass(frozen=True)
class Contents:
    """A bundle in memory.

    Attributes:
        name: of the bundle.
        model: what the graphs compute.
        graphs: `encoder` and `decoder`, serialized ONNX in float32 with their weights.
        reference: the golden examples.
        calibration: (n, *data) to record activations on; n may be 0.
        costs: of one example in each graph; None where the bundle does not say.
    """

    name: str
    model: Model
    graphs: Mapping[str, bytes]
    reference: golden.Reference
    calibration: Array
    costs: Mapping[str, Cost | None]

    def simplified(self, passes: Iterable[str]) -> tuple[dict[str, bytes], dict[str, dict[str, int]]]:
        """The graphs after graph passes, their nodes named; and for each pass the number of places it changed."""
        from vae_export import graph
        from vae_export.graph import edit, rewrites

        contents, counts = {}, {}
        for part, content in self.graphs.items():
            model = graph.read(content)
            counts[part] = rewrites.optimize(model, passes)
            edit.name_nodes(model)
            contents[part] = graph.write(model)
        return contents, counts


@dataclass(frozen=True)
class Artifacts:
    """What a build's folder holds, and its record: see `Build` for the attributes of the same name.

    Attributes:
        files: ONNX graphs or engines, by their name in the folder.
        certificate: measured on this machine; None where it cannot run the target.
        unmeasured: why there is no certificate, in words; None where there is one.
    """

    files: Mapping[str, bytes]
    graphs: dict[str, BuiltGraph]
    certificate: Certificate | None
    unmeasured: str | None = None
    engine: Engine | None = None
    measurements: tuple[Measurement, ...] = ()
    absent: tuple[str, ...] = ()
    calibrated: Mapping[str, int] = field(default_factory=dict)


def read(bundle: Bundle) -> Contents:
    """Read and verify a bundle. Before anything runs, its graphs are checked, and the sizes of their constants.

    Raises:
        BundleError: the bundle is damaged or inconsistent, or a graph hides how large its folded constants become.
    """
    from vae_export import graph

    manifest, model = bundle.manifest, bundle.manifest.model
    sources, weights = bundle.graphs()
    arrays = {name: onnx_guard.check_operators(source, name, weights.get(name)) for name, source in sources.items()}
    if hidden := [name for name, beside in arrays.items() if not beside.foldable]:
        raise BundleError(
            f"build: the {hidden[0]} does not tell how large the values are that it computes from constants alone, and "
            "a compiler would compute them first. The bundle itself runs; it cannot be built"
        )
    whole = {
        name: graph.write(graph.read(source, arrays[name])) if arrays[name] else source
        for name, source in sources.items()
    }
    reference = golden.decode(bundle.read(golden.FILE), manifest.golden, model)
    calibration = golden.decode_calibration(bundle.read(golden.CALIBRATION_FILE), model)
    bundle.check()
    costs = {name: record.cost for name, record in manifest.graphs.items()}
    return Contents(manifest.name, model, whole, reference, calibration, costs)


def fused(encoder: bytes, decoder: bytes, model: Model, without: Collection[str] = ()) -> dict[str, bytes]:
    """The fused graphs that a model has, of its encoder and decoder; but those in `without`."""
    from vae_export import graph
    from vae_export.graph import fuse

    fusions = {}
    if "reconstruct" not in without:
        fusions["reconstruct"] = fuse.reconstruct(graph.read(encoder), graph.read(decoder), model)
    if "score" not in without and model.has_elbo:
        fusions["score"] = fuse.score(graph.read(encoder), graph.read(decoder), model)
    if is_picture(model.data.shape):
        fusions["generate"] = fuse.generate(graph.read(decoder), model)
    return {name: graph.write(each) for name, each in fusions.items()}
