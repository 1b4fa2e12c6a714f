"""A bundle in the layout of other tools, for those who run it with them.

Other layouts say less than a bundle: they have no prior, no likelihood, no golden examples and no seal. So nothing
reads them back here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vae_export.certification import golden
from vae_export.contract import atomic, onnx_guard
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import GRAPHS, Model, shape_text
from vae_export.contract.onnx_guard import Arrays
from vae_export.errors import BundleError, InputError, VerificationError, require
from vae_export.runtimes.ort_session import session_options

#: The files of Optimum's layout; there may be more weights beside a graph.
_OPTIMUM = {f"vae_{name}/{file}" for name in GRAPHS for file in ("model.onnx", "config.json")}
_WEIGHTS = "model.onnx_data"
_ROWS = 8

Array = npt.NDArray[np.float32]


def optimum(bundle: str | os.PathLike[str], path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a bundle's graphs as Hugging Face Optimum's ONNX Runtime pipelines read a VAE.

    `path/vae_encoder/model.onnx` takes `sample` and gives `latent_parameters` (mean and logvar), or `latent_sample`
    where the encoder is deterministic. `path/vae_decoder/model.onnx` takes `latent_sample` and gives `sample`. Both
    have a `config.json` beside them: the source's own where it came from diffusers; else one with the numbers of
    channels and the scaling of latents, which is enough for Optimum's encoder and decoder, but not for a pipeline that
    counts the blocks of a diffusers model. As there, scaling is not in the graphs: pipelines apply it.

    ONNX Runtime must give the same bits for what was written as for the bundle, else nothing is written.

    Args:
        bundle: the bundle's folder.
        path: the folder to write; copy what is in it into a pipeline's.
        overwrite: replace such a folder that is there.

    Raises:
        InputError: there is no bundle, the model is not one of pictures with spatial latents, or something is at
            `path`.
        BundleError: the bundle is incomplete, damaged, tampered with, or newer than this version.
        BackendError: a package that this needs is not installed.
        VerificationError: what was written does not compute what the bundle does.
    """
    opened, path = Bundle(bundle), Path(path)
    model = opened.manifest.model
    _check_model(model)
    for module, extra in (("onnx", "build"), ("onnx_ir", "build"), ("onnxruntime", "cpu")):
        require(module, extra, "layout")
    from vae_export import graph
    from vae_export.exporting.layouts import names as passes
    from vae_export.graph.weights import apart

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
        for name, change, value in (("encoder", passes.encoder, x), ("decoder", passes.decoder, z)):
            folder = stage / f"vae_{name}"
            folder.mkdir()
            changed = change(graph.read(sources[name], arrays[name]), model)
            if (data := apart(changed, _WEIGHTS)) is not None:
                (folder / _WEIGHTS).write_bytes(data)
            (folder / "model.onnx").write_bytes(graph.write(changed))
            (folder / "config.json").write_bytes(config)
            _check_same(
                name, _run(sources[name], value, arrays[name]), _run(str(folder / "model.onnx"), value, Arrays())
            )


def _check_model(model: Model) -> None:
    data, latent = model.data.shape, model.latent.shape
    if len(data) != 3 or len(latent) != 3 or not (isinstance(data[0], int) and isinstance(latent[0], int)):
        raise InputError(
            "layout: Optimum's is for pictures (B, channels, height, width) with latents of the same order; this model "
            f"has data {shape_text(data)} and latents {shape_text(latent)}. Use the bundle itself"
        )


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a place at which no layout can be made, or one that holds more than a layout.

    Raises:
        InputError: something is at `path` and overwrite is false, or what is there is not just a layout.
    """
    atomic.check_target(path, overwrite=overwrite)
    if not path.is_dir():
        return
    found = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_symlink() or not p.is_dir()}
    if strangers := sorted(found - _OPTIMUM - {f"vae_{name}/{_WEIGHTS}" for name in GRAPHS}):
        raise InputError(
            f"{path} holds files that are not of this layout: {', '.join(strangers[:5])}. Move them away, or choose "
            "another path"
        )
    if found and (missing := sorted(_OPTIMUM - found)):
        raise InputError(
            f"{path} exists and is not a whole layout: it has no {', '.join(missing)}. Remove it yourself, or choose "
            "another path"
        )


def _config(bundle: Bundle) -> bytes:
    """What lies beside each graph."""
    if bundle.manifest.origin.kind == "diffusers":
        raw = bundle.read("config.json")
        try:
            whole = isinstance(json.loads(raw), dict)
        except ValueError:
            whole = False
        if not whole:
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


def _check_same(name: str, ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> None:
    """Compare what was written with the bundle, both without fusions: dropping an output allows others."""
    expected = ours["sample"] if name == "decoder" else np.concatenate(list(ours.values()), axis=1)
    (got,) = theirs.values()
    if got.shape != expected.shape or got.tobytes() != expected.tobytes():
        raise VerificationError(
            f"layout: the {name} that was written does not give the bits that the bundle's gives, for the first "
            f"{len(got)} golden examples. Nothing was kept; please report it"
        )


def _run(graph: bytes | str, value: Array, arrays: Arrays) -> Mapping[str, Array]:
    """All outputs of a graph with one input, by name, computed without fusions."""
    import onnxruntime as ort

    settings = session_options(ort, arrays)
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: value}), strict=True))
