"""From a trained PyTorch model to a verified bundle."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

import msgspec
import numpy as np
import onnx_ir
import safetensors.numpy
import torch
from torch import nn

from vae_export import (
    bundle,
    certificate,
    golden,
    images,
    model_card,
    noise,
    onnx_reader,
    sealed,
    sources,
    verifier,
    versions,
)
from vae_export import manifest as manifests
from vae_export.certificate import Certificate
from vae_export.errors import BundleError, InputError
from vae_export.graph import write
from vae_export.graph.weights import apart
from vae_export.manifest import Graph, Manifest, Model, SizeDim
from vae_export.onnx_reader import Weights
from vae_export.pixels import is_picture
from vae_export.progress import Progress, silent
from vae_export.runtimes import VAE, open_backend
from vae_export.sources import Described, cost
from vae_export.sources import reference as references
from vae_export.sources.adapter import advice
from vae_export.sources.module import Source
from vae_export.sources.protocol import Decoder, Encoder, Trained

#: The newest version of the ONNX operators that PyTorch's exporter writes by default; every backend that
#: is built for has kernels for it.
OPSET = 20
_CALIBRATION_ROWS = 512
_CALIBRATION_LIMIT = 16 << 20
_WEIGHTS = "model.onnx_data"  # beside a graph, as Optimum calls it
_TRACE_BATCH = 3  # not 1, which tracing would take for a constant
_TOOLS = (
    "vae-export",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "diffusers",
)


def export(
    source: str | os.PathLike[str] | nn.Module | Source | Trained,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    **described: Unpack[Described],
) -> Certificate:
    """Export a trained model, and prove that the export computes the same.

    The bundle appears at `path` whole, and only if every check of its certificate holds.

    Args:
        source: a checkpoint folder of our trainer; an autoencoder in the layout of diffusers, as a folder or a
            `.safetensors` file; `package.module:factory`; a PyTorch module with `encode` and `decode`, or a
            `vae_export.Source` of one.
        path: the bundle's folder.
        overwrite: replace a bundle that is there.
        progress: called with the name of each step, and the share of it that is done.
        described: what the source does not say itself: see `sources.Described`.

    Returns:
        The certificate, which the bundle holds as `verification.json`.

    Raises:
        InputError: the source cannot be read or exported, its graphs would be no pure functions (random
            operators, loops, custom operators), or something is at `path`.
        BackendError: ONNX Runtime, or diffusers for its folders, is not installed.
        VerificationError: the exported graphs differ from the model by more than their budgets.
    """
    path = Path(path)
    bundle.check_target(path, overwrite=overwrite)
    source = sources.resolve(source, **described)
    _check_size(source)
    name = re.sub(r"\.bundle$", "", path.resolve().name)
    if not name or not name.isprintable():
        raise InputError(f"export: {path} gives the bundle no printable name. Choose another path")
    model = source.model

    graphs: dict[str, bytes] = {}
    weights: dict[str, Weights] = {}
    records: dict[str, Graph] = {}
    latent = model.latent_shape(source.sizes())
    for kind, wrapper, shape in (("encoder", Encoder, source.example_shape), ("decoder", Decoder, latent)):
        progress(f"tracing the {kind}")
        module = wrapper(source.module, model).eval()
        graphs[kind], data, records[kind] = _trace(kind, module, shape, model)
        if data is not None:
            weights[kind] = Weights(_WEIGHTS, data)
        try:
            onnx_reader.check_operators(graphs[kind], kind, weights.get(kind))
        except BundleError as error:
            raise InputError(f"export: {error}") from None

    costs = cost.count(source)
    records = {kind: msgspec.structs.replace(record, cost=costs[kind]) for kind, record in records.items()}
    reference = references.compute(source, costs, progress)
    backend = open_backend(graphs, model, device="cpu", weights=weights)
    measured = verifier.measure(model, backend, reference, name, progress=progress)
    measured.require()

    progress("writing the bundle")
    kept = reference.shrunk()
    rows = golden.encode(kept)
    golden.decode(rows, kept.record, model)
    vae = VAE(model, backend, micro_batch=min(64, kept.record.prior))
    with bundle.create(path, overwrite=overwrite) as folder:
        for kind, graph in graphs.items():
            file = folder / records[kind].file
            file.parent.mkdir()
            file.write_bytes(graph)
            if kind in weights:
                (file.parent / _WEIGHTS).write_bytes(weights[kind].data)
        (folder / "config.json").write_bytes(source.config)
        (folder / golden.FILE).write_bytes(rows)
        (folder / golden.CALIBRATION_FILE).write_bytes(_calibration(source))
        (folder / "verification.json").write_bytes(certificate.encode(measured))
        picture = is_picture(model.data.shape)
        if picture:
            examples = vae.sample(min(64, kept.record.prior), size=source.sizes())
            images.grid(examples, model.data.range, columns=16 if len(examples) > 16 else 8).save(
                folder / model_card.PICTURE
            )
        if source.training and source.training.pictures:
            (folder / model_card.TRAINING).mkdir()
            for file_name, (_, content) in source.training.pictures.items():
                (folder / model_card.TRAINING / file_name).write_bytes(content)
        card = model_card.write(path.resolve().name, model, source.origin, measured, source.training, picture=picture)
        (folder / model_card.FILE).write_text(card, encoding="utf-8")
        manifest = Manifest(
            format=manifests.FORMAT,
            version=manifests.VERSION,
            digest="",
            name=name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            model=model,
            graphs=records,
            golden=kept.record,
            origin=source.origin,
            tools=versions.tools(_TOOLS),
            files=sealed.list_files(folder),
        )
        bundle.write_manifest(folder, manifest)
    return measured


def _trace(kind: str, module: nn.Module, shape: tuple[int, ...], model: Model) -> tuple[bytes, bytes | None, Graph]:
    """One graph as ONNX bytes, with dynamic batch and named dimensions; weights to lie beside it; and its record."""
    inputs, outputs = model.ends(kind)
    into = inputs[0].shape
    example = torch.zeros(_TRACE_BATCH, *shape)
    names = {i: re.sub(r"\W", "_", d) for i, d in enumerate(into) if isinstance(d, str)}
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                input_names=[tensor.name for tensor in inputs],
                output_names=[tensor.name for tensor in outputs],
                dynamic_shapes=(names,),
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
            if isinstance(cause, InputError):
                raise cause from None
        raise InputError(
            f"export: PyTorch could not trace the {kind} as one graph that is the same for every input. "
            "Control flow that depends on values is the usual reason. PyTorch says: "
            f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}\n"
            f"Replace branches on values by torch.where, or leave them out. {advice(model.likelihood.kind)}"
        ) from error
    assert program is not None
    graph = program.model
    _rename_inner(graph)
    ends = zip((*graph.graph.inputs, *graph.graph.outputs), (*inputs, *outputs), strict=True)
    for value, tensor in ends:
        value.shape = onnx_ir.Shape(tensor.shape)
    _forget_origin(graph)
    data = apart(graph, _WEIGHTS)
    record = Graph(
        file=f"vae_{kind}/model.onnx",
        opset=graph.opset_imports[""],
        inputs=inputs,
        outputs=outputs,
        weights=None if data is None else f"vae_{kind}/{_WEIGHTS}",
    )
    return write(graph), data, record


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what PyTorch's exporter says about itself: its own deprecations, and missing torchvision."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(level)


def _rename_inner(model: onnx_ir.Model) -> None:
    """Keep the names of inputs and outputs for them: PyTorch may call an inner value `mean`, too."""
    ends = [*model.graph.inputs, *model.graph.outputs]
    names = {value.name for value in ends}
    inner = [value for node in model.graph.all_nodes() for value in node.outputs]
    for index, value in enumerate([*inner, *model.graph.initializers.values()]):
        if value.name in names and not any(value is end for end in ends):
            value.name = f"{value.name}_inner_{index}"


def _forget_origin(model: onnx_ir.Model) -> None:
    """Drop the stack traces and paths of the exporting machine that PyTorch writes beside every node."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def _check_size(source: Trained) -> None:
    shape = source.model.data.shape
    fits = len(shape) == len(source.example_shape) and all(
        dim.allows(size) if isinstance(dim, SizeDim) else dim == size
        for dim, size in zip(shape, source.example_shape, strict=True)
    )
    if not fits:
        raise InputError(f"export: example_shape {source.example_shape} does not fit the data's shape {shape}")
    for name in ("held_out", "calibration"):
        rows = getattr(source, name)
        if rows is not None and (len(rows) == 0 or rows.shape[1:] != source.example_shape):
            raise InputError(
                f"export: {name} has shape {rows.shape}; expected one row or more of {source.example_shape}"
            )


def _calibration(source: Trained) -> bytes:
    """Examples to choose a lower precision by: training data where there is any, else none."""
    if source.calibration is None:
        return safetensors.numpy.save({"x": np.zeros((0, *source.example_shape), np.float32)})
    rows = source.calibration
    limit = max(1, min(_CALIBRATION_ROWS, _CALIBRATION_LIMIT // rows[0].nbytes))
    chosen = noise.permutation(references.SEED, noise.VERIFIER, 1, len(rows))[:limit]
    return safetensors.numpy.save({"x": np.ascontiguousarray(rows[np.sort(chosen)], np.float32)})
