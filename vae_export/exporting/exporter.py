"""From a trained PyTorch model to a verified bundle."""

from __future__ import annotations

import datetime
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy
from torch import Tensor, nn

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
from vae_export.sources import cost
from vae_export.sources.module import Source
from vae_export.sources.protocol import Decoder, Encoder, Trained

_CALIBRATION_ROWS = 512
_CALIBRATION_LIMIT = 16 << 20
_TOOLS = (
    *("vae-export", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy"),
    "diffusers",
)


def export(
    source: str | os.PathLike[str] | nn.Module | Source | Trained,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    config: str | os.PathLike[str] | None = None,
    size: Mapping[str, int] | None = None,
    held_out: Tensor | npt.NDArray[Any] | None = None,
    example: Tensor | npt.NDArray[Any] | None = None,
    shape: tuple[int, ...] | None = None,
    likelihood: str | None = None,
    data_range: tuple[float, float] | None = None,
    variance: float | None = None,
    multiple_of: int | None = None,
    outputs: str | None = None,
    nominal: bool | None = None,
    name: str | None = None,
    scaling: float | None = None,
    shift: float | None = None,
    keep_example: bool | None = None,
) -> Certificate:
    """Export a trained model, and prove that the export computes the same.

    The bundle appears at `path` complete, and only if every check of its certificate holds. The options from `config`
    on describe the source; each belongs to some kinds of it and is an error for the others. A checkpoint, a `Source`
    and a `Trained` take none.

    Args:
        source: a checkpoint folder of our trainer; an autoencoder in the layout of diffusers, as a folder or a
            `.safetensors` file; `package.module:factory`, a function which is then called; a PyTorch module with
            `encode` and `decode`; or a `vae_export.Source` of one.
        path: the bundle's folder.
        overwrite: replace a bundle at `path`.
        progress: called with the name of each step, and the share of it that is done, in [0, 1] or None.
        config: diffusers: the `config.json` of weights in one file; None: the one beside them.
        size: diffusers: height and width in pixels to trace and to verify at, such as {"height": 128, "width": 128};
            None: 64 × 64, or twice the stride if that is more.
        held_out: diffusers, module: (M, *data) floating-point values in the data's range that the model was not trained
            on, to verify on; those of diffusers are (M, 3, height, width) in [−1, 1] of that `size`. They are kept in
            the bundle. None: decoded draws from the prior, or a module's `example`.
        example: module: (B, *data), B ≥ 1, floating-point values in `data_range`, on which the module is tried.
        shape: factory of a bare module: (*data), the shape of one example without the batch.
        likelihood: module, factory: p(x|z): `bernoulli`, `gaussian`, `gaussian_fixed`, `discretized_logistic`, `none`.
        data_range: module, factory: the smallest and the largest value of the data, such as (0, 1).
        variance: module, factory: the one variance of `gaussian_fixed`, in squared units of the data.
        multiple_of: module, factory: in pixels; height and width may be any multiples of it. None: the example's only.
        outputs: module: `logits` or `probabilities`, what a Bernoulli decoder returns, where that cannot be told.
        nominal: module: True if it was not trained with this likelihood, so that the ELBO is a convention; None: False.
        name: module: the model's name; None: the class's.
        scaling: module: latent diffusion works on (z − shift) · scaling; None: 1.
        shift: module: see scaling; None: 0.
        keep_example: module: whether the bundle may keep `example`; None: True.

    Returns:
        The certificate, which the bundle has as `verification.json`.

    Raises:
        InputError: the source cannot be read or exported, an option is wrong or belongs to another kind of source, its
            graphs would be no pure functions (random operators, loops, custom operators), or `path` exists.
        BackendError: ONNX Runtime is not installed, or diffusers for its folders.
        VerificationError: the exported graphs deviate from the model by more than the tolerances.
    """
    path = Path(path)
    check_flags("export", overwrite=overwrite)
    bundle.check_target(path, overwrite=overwrite)
    trained = sources.resolve(
        source, config=config, size=size, held_out=held_out, example=example, shape=shape, likelihood=likelihood,
        data_range=data_range, variance=variance, multiple_of=multiple_of, outputs=outputs, nominal=nominal, name=name,
        scaling=scaling, shift=shift, keep_example=keep_example,
    )  # fmt: skip
    return export_trained(trained, path, overwrite=overwrite, progress=progress)


def export_trained(
    source: Trained, path: Path, *, rows: int = references.ROWS, overwrite: bool = False, progress: Progress = silent
) -> Certificate:
    """Export a model under the protocol, measured on at most `rows` rows of data and as many draws from the prior.

    Other arguments, result and errors: as for `export`.
    """
    _check_shapes(source)
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
    reference = references.compute(source, costs, progress, rows)
    try:
        backend = open_backend(graphs, model, device="cpu", weights=weights)
        measured = verifier.measure(model, backend, reference, name, progress=progress)
        measured.require()
        tiled = tiles.measure_tiles(model, backend, reference.tensors["x"][golden.EXTREMES :], costs)
    except BundleError as error:  # the graphs contradict the model's description
        raise InputError(f"export: {error}") from None
    measured = msgspec.structs.replace(measured, checks=(*measured.checks, *tiles.checks(tiled)))
    for kind, record in records.items():
        records[kind] = msgspec.structs.replace(record, cost=costs[kind], tiled=tiled.get(kind))

    progress("writing the bundle")
    kept = reference.shrunk()
    rows_kept = golden.encode(kept)
    golden.decode(rows_kept, kept.record, model)
    vae = VAE(model, backend, micro_batch=min(64, kept.record.prior))
    with bundle.create(path, overwrite=overwrite) as folder:
        for kind, graph in graphs.items():
            file = folder / records[kind].file
            file.parent.mkdir()
            file.write_bytes(graph)
            if kind in weights:
                (file.parent / tracing.WEIGHTS).write_bytes(weights[kind].data)
        (folder / "config.json").write_bytes(source.config)
        (folder / golden.FILE).write_bytes(rows_kept)
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


def _check_shapes(source: Trained) -> None:
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
                f"export: {name} has shape {rows.shape}; expected at least one row of shape {source.example_shape}"
            )


def _calibration(source: Trained, used: int) -> bytes:
    """Examples to choose a lower precision by: the source's, or the held-out rows that are no golden examples.

    Args:
        source: the model.
        used: the number of held-out rows that are golden examples.
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
