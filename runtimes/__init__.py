"""Run a bundle without PyTorch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from vae_export import onnx_reader
from vae_export.bundle import Bundle
from vae_export.errors import BackendError, InputError
from vae_export.manifest import Graph

from .backend import Backend
from .ort import OrtBackend
from .vae import VAE, Elbo, Posterior

__all__ = ["VAE", "Backend", "Elbo", "Posterior", "load", "open_backend"]


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    micro_batch: int = 64,
    threads: int | None = None,
) -> VAE:
    """Open a bundle for use. PyTorch is never imported.

    Every file of the bundle is verified against the manifest first.

    Args:
        path: the bundle's folder.
        device: `cpu`, `cuda`, or `auto`: CUDA where ONNX Runtime can open it, else the CPU;
            `VAE.describe` tells which.
        micro_batch: the most examples that go through a graph at once; larger batches are cut into such
            slices. It bounds memory and does not change results.
        threads: threads inside one call; None leaves it to the backend.

    Raises:
        InputError: there is no folder at `path`, or an option is not one of those above.
        BundleError: the bundle is incomplete, damaged, tampered with, or newer than this version.
        BackendError: the device or a package that it needs is not available.
    """
    bundle = Bundle(path)
    manifest = bundle.manifest
    graphs = {name: bundle.read(graph.file) for name, graph in manifest.graphs.items()}
    bundle.check()
    backend = open_backend(graphs, manifest.graphs, device=device, threads=threads)
    return VAE(manifest.model, backend, micro_batch=micro_batch, name=manifest.name)


def open_backend(
    graphs: Mapping[str, bytes],
    records: Mapping[str, Graph],
    *,
    device: str = "auto",
    threads: int | None = None,
) -> Backend:
    """Check and open serialized ONNX graphs, called `encoder` and `decoder`, on a device.

    Args:
        graphs: their verified bytes.
        records: what the manifest says of them.
        device: as for `load`.
        threads: as for `load`.

    Raises:
        InputError, BundleError, BackendError: as for `load`.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"load: device is {device!r}; expected 'auto', 'cpu' or 'cuda'")
    if threads is not None and not (isinstance(threads, int) and 1 <= threads < 1 << 16):
        raise InputError(f"load: threads is {threads!r}; expected a number from 1 on, or None")
    for name, graph in graphs.items():
        onnx_reader.check_operators(graph, name)
    if device == "auto":
        try:
            return OrtBackend(graphs, records, device="cuda", threads=threads)
        except BackendError:
            device = "cpu"
    return OrtBackend(graphs, records, device=device, threads=threads)
