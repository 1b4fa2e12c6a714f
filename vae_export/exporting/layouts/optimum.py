"""A bundle's encoder and decoder in the layout of Hugging Face Optimum's ONNX Runtime pipelines.

This layout has no prior, no likelihood, no golden examples and no checksums, so vae_export does not read it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir

from vae_export import graph as graphs
from vae_export.certification import golden
from vae_export.contract import atomic, onnx_guard
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import GRAPHS, LatentDim, Model, SizeDim, Tensor, shape_text
from vae_export.contract.onnx_guard import Arrays
from vae_export.errors import BundleError, InputError, VerificationError, require
from vae_export.graph import weights as graph_weights
from vae_export.graph.fuse import finish, prefix_inner
from vae_export.runtimes.ort_session import session_options

#: Files of this layout, besides weights beside a graph.
FILES = frozenset(f"vae_{name}/{file}" for name in GRAPHS for file in ("model.onnx", "config.json"))
_WEIGHTS = "model.onnx_data"
_ROWS = 8
_AXES = ("channels", "height", "width")

Array = npt.NDArray[np.float32]


def optimum(bundle: str | os.PathLike[str], path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a bundle's graphs as Hugging Face Optimum's ONNX Runtime pipelines read a VAE.

    `path/vae_encoder/model.onnx` takes `sample` and gives `latent_parameters` (mean and logvar), or `latent_sample`
    where the encoder is deterministic. `path/vae_decoder/model.onnx` takes `latent_sample` and gives `sample`. Both
    have a `config.json` beside them: the source's own if that is of diffusers; else one with the numbers of channels
    and the scaling of latents, which is enough for Optimum's encoder and decoder, but not for a pipeline that counts
    the blocks of a diffusers model. As in Optimum, scaling is not in the graphs: pipelines apply it.

    ONNX Runtime must compute the same bits with the new graphs as with the bundle's, else nothing is written.

    Args:
        bundle: the bundle's folder.
        path: the folder to write; copy its contents into a pipeline's.
        overwrite: replace an existing folder of this layout.

    Raises:
        InputError: there is no bundle, the model is not one of pictures with spatial latents, or `path` exists.
        BundleError: the bundle is incomplete, damaged, inconsistent, or newer than this version.
        BackendError: ONNX Runtime is not installed.
        VerificationError: the new graphs do not compute what the bundle's do.
    """
    opened, path = Bundle(bundle), Path(path)
    model = opened.manifest.model
    _check_model(model)
    require("onnxruntime", "cpu", "layout")
    if path.resolve().is_relative_to(opened.path.resolve()):
        raise InputError(f"layout: {path} lies inside the bundle, which is never changed. Choose a path outside of it")
    check_target(path, overwrite=overwrite)
    sources, weights = opened.graphs()
    opened.check()
    arrays = {name: onnx_guard.check_operators(source, name, weights.get(name)) for name, source in sources.items()}
    config = _config(opened)
    rows = golden.decode(opened.read(golden.FILE), opened.manifest.golden, model).tensors
    x, z = rows["x"][:_ROWS], rows["mean"][:_ROWS].astype(np.float32)
    with atomic.atomic_folder(
        path, overwrite=overwrite, check=lambda folder: check_target(folder, overwrite=True)
    ) as stage:
        for name, rename, value in (("encoder", rename_encoder, x), ("decoder", rename_decoder, z)):
            folder = stage / f"vae_{name}"
            folder.mkdir()
            renamed = rename(graphs.read(sources[name], arrays[name]), model)
            if (data := graph_weights.apart(renamed, _WEIGHTS)) is not None:
                (folder / _WEIGHTS).write_bytes(data)
            (folder / "model.onnx").write_bytes(graphs.write(renamed))
            (folder / "config.json").write_bytes(config)
            _check_same(
                name, _run(sources[name], value, arrays[name]), _run(str(folder / "model.onnx"), value, Arrays())
            )


def rename_encoder(graph: onnx_ir.Model, model: Model) -> onnx_ir.Model:
    """An encoder with Optimum's names. The graph is used up.

    Requires: inputs and outputs as in `Model.signature`; data (C, H, W) and latents (C, h, w).
    Ensures: `sample` → `latent_parameters`, mean and logvar concatenated along the channels, or `latent_sample` of a
    deterministic encoder. Sizes that vary have Optimum's names, and an output's size is an expression of the input's,
    such as `sample_height / 8`, which Optimum evaluates to allocate the output. All other nodes stay.
    """
    data, latent = model.data.shape, model.latent.shape
    axes = {dim.name: f"sample_{axis}" for dim, axis in zip(data, _AXES, strict=True) if isinstance(dim, SizeDim)}
    prefix_inner(graph, "encoder")
    _rename_input(graph, "sample", tuple(axes[dim.name] if isinstance(dim, SizeDim) else dim for dim in data))
    shape = tuple(_expression(axes[dim.name], "/", dim) if isinstance(dim, LatentDim) else dim for dim in latent)
    outputs = list(graph.graph.outputs)
    if len(outputs) == 1:
        outputs[0].name = "latent_sample"
        return finish(graph, "vae_encoder", (_tensor("latent_sample", shape),))
    node = onnx_ir.node("Concat", outputs, {"axis": 1}, name="latent_parameters.node")
    node.outputs[0].name = "latent_parameters"
    node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph.graph.append(node)
    channels = shape[0]
    assert isinstance(channels, int)
    return finish(graph, "vae_encoder", (_tensor("latent_parameters", (2 * channels, *shape[1:])),))


def rename_decoder(graph: onnx_ir.Model, model: Model) -> onnx_ir.Model:
    """A decoder with Optimum's names, `latent_sample` → `sample`, the mean of p(x|z). The graph is used up.

    Requires and ensures: as `rename_encoder`.
    """
    axes = [(f"latent_{axis}", dim) for axis, dim in zip(_AXES, model.latent.shape, strict=True)]
    sizes = {dim.name: _expression(axis, "*", dim) for axis, dim in axes if isinstance(dim, LatentDim)}
    prefix_inner(graph, "decoder")
    _rename_input(graph, "latent_sample", tuple(axis if isinstance(dim, LatentDim) else dim for axis, dim in axes))
    shape = tuple(sizes[dim.name] if isinstance(dim, SizeDim) else dim for dim in model.data.shape)
    return finish(graph, "vae_decoder", (_tensor("sample", shape),))


def _rename_input(graph: onnx_ir.Model, name: str, shape: tuple[int | str, ...]) -> None:
    value = graph.graph.inputs[0]
    value.name, value.shape = name, onnx_ir.Shape(("batch_size", *shape))


def _tensor(name: str, shape: tuple[int | str, ...]) -> Tensor:
    return Tensor(name=name, dtype="float32", shape=("batch_size", *shape))


def _expression(axis: str, operator: str, dim: LatentDim) -> str:
    return axis if dim.divided_by == 1 else f"{axis} {operator} {dim.divided_by}"


def _check_model(model: Model) -> None:
    data, latent = model.data.shape, model.latent.shape
    if len(data) != 3 or len(latent) != 3 or not (isinstance(data[0], int) and isinstance(latent[0], int)):
        raise InputError(
            "layout: Optimum's is for pictures (B, channels, height, width) with latents of the same order; this model "
            f"has data {shape_text(data)} and latents {shape_text(latent)}. Use the bundle itself"
        )


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a path at which the layout cannot be written.

    Raises:
        InputError: `path` exists and overwrite is false, or it has files that are not of this layout, or not all.
    """
    atomic.check_target(path, overwrite=overwrite)
    if not path.is_dir():
        return
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_symlink() or not p.is_dir()}
    if others := sorted(files - FILES - {f"vae_{name}/{_WEIGHTS}" for name in GRAPHS}):
        raise InputError(
            f"{path} holds files that are not of this layout: {', '.join(others[:5])}. Move them away, or choose "
            "another path"
        )
    if files and (missing := sorted(FILES - files)):
        raise InputError(
            f"{path} exists and is not a whole layout: it has no {', '.join(missing)}. Remove it yourself, or choose "
            "another path"
        )


def _config(bundle: Bundle) -> bytes:
    """The `config.json` beside each graph."""
    if bundle.manifest.origin.kind == "diffusers":
        raw = bundle.read("config.json")
        try:
            valid = isinstance(json.loads(raw), dict)
        except ValueError:
            valid = False
        if not valid:
            raise BundleError(
                f"{bundle.path}: config.json is not the JSON object of a diffusers model. Export it again"
            )
        return raw
    model = bundle.manifest.model
    latent = model.latent
    facts: dict[str, Any] = {
        "in_channels": model.data.shape[0],
        "out_channels": model.data.shape[0],
        "latent_channels": latent.shape[0],
        "scaling_factor": latent.scaling,
        "shift_factor": latent.shift or None,
        "latents_mean": latent.mean,
        "latents_std": latent.std,
        "force_upcast": model.force_upcast,
    }
    return (json.dumps(facts, indent=2) + "\n").encode()


def _check_same(name: str, original: Mapping[str, Array], renamed: Mapping[str, Array]) -> None:
    """Compare results bit by bit, both computed without fusions: with fewer outputs others are possible."""
    expected = original["sample"] if name == "decoder" else np.concatenate(list(original.values()), axis=1)
    (result,) = renamed.values()
    if result.shape != expected.shape or result.tobytes() != expected.tobytes():
        raise VerificationError(
            f"layout: the {name} in the new layout does not compute the same bits as the bundle's, for the first "
            f"{len(result)} golden examples. Nothing was written; please report it"
        )


def _run(graph: bytes | str, value: Array, arrays: Arrays) -> Mapping[str, Array]:
    """All outputs of a graph by name, computed without fusions."""
    import onnxruntime as ort

    settings = session_options(ort, arrays)
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: value}), strict=True))
