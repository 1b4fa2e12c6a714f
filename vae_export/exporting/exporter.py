"""From a trained PyTorch model to a verified bundle."""

from __future__ import annotations

import datetime
import math
import os
import re
from pathlib import Path
from typing import Unpack

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy
from torch import nn

from vae_export import sources, versions
from vae_export.certification import certificate, golden, tiles, verifier
from vae_export.certification import reference as references
from vae_export.certification.certificate import Certificate
from vae_export.contract import bundle, folders, onnx_guard
from vae_export.contract import manifest as manifests
from vae_export.contract.manifest import Graph, Manifest
from vae_export.contract.model import SizeDim
from vae_export.contract.onnx_guard import Weights
from vae_export.errors import BundleError, InputError, check_flags
from vae_export.exporting import model_card, tracing
from vae_export.numerics import noise
from vae_export.progress import Progress, silent
from vae_export.runtimes import VAE, open_backend
from vae_export.sources import Described, cost
from vae_export.sources.module import Source
from vae_export.sources.protocol import Decoder, Encoder, Trained

_CALIBRATION_ROWS = 512
_CALIBRATION_LIMIT = 16 << 20
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
    check_flags("export", overwrite=overwrite)
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
        graphs[kind], data, records[kind] = tracing.trace(kind, module, shape, model)
        if data is not None:
            weights[kind] = Weights(tracing.WEIGHTS, data)
        try:
            onnx_guard.check_operators(graphs[kind], kind, weights.get(kind))
        except BundleError as error:
            raise InputError(f"export: {error}") from None

    costs = cost.count(source)
    records = {kind: msgspec.structs.replace(record, cost=costs[kind]) for kind, record in records.items()}
    reference = references.compute(source, costs, progress)
    try:
        backend = open_backend(graphs, model, device="cpu", weights=weights)
        measured = verifier.measure(model, backend, reference, name, progress=progress)
        measured.require()
        tiled = tiles.measure_tiles(model, backend, reference.tensors["x"][golden.EXTREMES :], costs)
    except BundleError as error:  # the graphs are not what the model is said to be
        raise InputError(f"export: {error}") from None
    measured = msgspec.structs.replace(measured, checks=(*measured.checks, *tiles.checks(tiled)))
    records = {kind: msgspec.structs.replace(record, tiled=tiled.get(kind)) for kind, record in records.items()}

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
                (file.parent / tracing.WEIGHTS).write_bytes(weights[kind].data)
        (folder / "config.json").write_bytes(source.config)
        (folder / golden.FILE).write_bytes(rows)
        (folder / golden.CALIBRATION_FILE).write_bytes(_calibration(source, reference.record.held_out))
        (folder / "verification.json").write_bytes(certificate.encode(measured))
        held_out = kept.tensors["x"][golden.EXTREMES :][: kept.record.held_out]
        picture = model_card.picture(vae, held_out, source.sizes(), min(64, kept.record.prior))
        if picture:
            picture.image.save(folder / picture.file)
        if source.training and source.training.pictures:
            (folder / model_card.TRAINING).mkdir()
            for file_name, (_, content) in source.training.pictures.items():
                (folder / model_card.TRAINING / file_name).write_bytes(content)
        card = model_card.write(
            path.resolve().name, model, source.origin, measured, source.training, source.sizes(), picture
        )
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
            files=folders.list_files(folder),
        )
        bundle.write_manifest(folder, manifest)
    return measured


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


def _calibration(source: Trained, used: int) -> bytes:
    """Examples to choose a lower precision by: the source's, or what the certificate leaves of held-out data.

    Args:
        source: the model.
        used: rows of its held-out data that are golden examples.
    """
    rows: npt.NDArray[np.float32] = np.zeros((0, *source.example_shape), np.float32)
    order: npt.NDArray[np.intp] = np.zeros(0, np.intp)
    if source.calibration is not None:
        rows = source.calibration
        order = noise.permutation(references.SEED, noise.VERIFIER, 1, len(rows))
    elif source.held_out is not None:
        rows = source.held_out
        order = references.order(len(rows))[used:]
    limit = max(1, min(_CALIBRATION_ROWS, _CALIBRATION_LIMIT // (4 * math.prod(source.example_shape))))
    return safetensors.numpy.save({"x": np.ascontiguousarray(rows[np.sort(order[:limit])], np.float32)})
