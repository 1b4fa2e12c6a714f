"""Run a bundle without PyTorch."""

from __future__ import annotations

from vae_export.runtimes.backend import Backend, Settings
from vae_export.runtimes.loading import BuildLike, Opened, load, open_backend, open_bundle, summary
from vae_export.runtimes.posterior import DevicePosterior, Elbo, Posterior
from vae_export.runtimes.tiling import Tile
from vae_export.runtimes.vae import VAE

__all__ = [
    "VAE",
    "Backend",
    "BuildLike",
    "DevicePosterior",
    "Elbo",
    "Opened",
    "Posterior",
    "Settings",
    "Tile",
    "load",
    "open_backend",
    "open_bundle",
    "summary",
]
