"""Pictures of a run: training curves, reconstructions, samples, interpolations, latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vae_export.contract import atomic
from vae_export.numerics import images, noise
from vae_export.numerics.pixels import is_picture
from vae_export.trainers.checkpoint import Epoch
from vae_export.trainers.datasets import Dataset
from vae_export.trainers.models import VAEModel

Array = npt.NDArray[np.float32]

_ACROSS = 12  # pictures in a row of a grid
_SIDE = 20  # pictures in a row of the manifold


@torch.no_grad()
def write(folder: Path, model: VAEModel, dataset: Dataset, history: tuple[Epoch, ...]) -> dict[str, Image.Image]:
    """Write the pictures that the shapes of data and latents allow, and return the grids of examples by name.

    Args:
        folder: to write to; created if it does not exist.
        model: in evaluation mode, on its device.
        dataset: whose test examples are shown.
        history: the completed epochs.
    """
    folder.mkdir(exist_ok=True)
    device = next(model.parameters()).device
    latent = model.config.latent_shape

    def encode(x: Array) -> Array:
        return _host(model.encode(torch.from_numpy(x).to(device))[0])

    def decode(z: Array) -> Array:
        return _host(model.decode(torch.from_numpy(np.asarray(z, np.float32)).to(device))[0])

    variational = model.config.posterior == "diagonal_gaussian"
    _save(folder / "curves.png", curves(history, variational=variational))
    if latent == (2,):
        shown = np.arange(min(2000, len(dataset.test)))
        labels = None if dataset.test.labels is None else dataset.test.labels[shown]
        _save(folder / "latents.png", scatter(encode(dataset.test.read(shown)), labels))
    grids: dict[str, Image.Image] = {}
    if not is_picture(dataset.shape):
        return grids
    x = dataset.test.read(np.arange(min(4 * _ACROSS, len(dataset.test))))
    grids["reconstructions"] = images.pairs(x, decode(encode(x)), dataset.range, _ACROSS)
    if variational:
        z = noise.normals(0, noise.PRIOR, 0, 8 * _ACROSS, math.prod(latent)).reshape(-1, *latent)
        grids["samples"] = images.grid(decode(z), dataset.range, _ACROSS)
    grids["interpolation"] = interpolation(encode(x), decode, dataset.range)
    if latent == (2,) and variational:
        grids["manifold"] = images.grid(decode(manifold(_SIDE)), dataset.range, _SIDE)
    for name, grid in grids.items():
        _save(folder / f"{name}.png", grid)
    return grids


def curves(history: tuple[Epoch, ...], *, variational: bool) -> Figure:
    """Plot bound and KL over the epochs; for a plain autoencoder the squared error."""
    figure = Figure(figsize=(9 if variational else 5, 3.5), layout="constrained")
    axes = figure.subplots(1, 2 if variational else 1, squeeze=False)[0]
    sign = 1 if variational else -1
    trained = [sign * row.train_bound for row in history]
    validated = [sign * row.validation_bound for row in history]
    _two_lines(axes[0], trained, validated)
    axes[0].set_ylabel("bound on log p(x), nats" if variational else "squared error")
    if len(history) > 20:  # the first epochs would flatten the rest of the curve
        shown = trained[len(history) // 10 :] + validated[len(history) // 10 :]
        margin = 0.05 * (max(shown) - min(shown)) + 1e-9
        axes[0].set_ylim(min(shown) - margin, max(shown) + margin)
    if variational:
        _two_lines(axes[1], [row.train_kl for row in history], [row.validation_kl for row in history])
        axes[1].set_ylabel("KL, nats")
    return figure


def _two_lines(axes: Axes, trained: list[float], validated: list[float]) -> None:
    epochs = range(1, len(trained) + 1)
    axes.plot(epochs, trained, label="training, current weights")
    axes.plot(epochs, validated, label="validation, averaged weights")
    axes.set_xlabel("epoch")
    axes.legend()
    axes.grid(alpha=0.3)


def scatter(means: Array, labels: npt.NDArray[np.int64] | None) -> Figure:
    """Plot points (N, 2), coloured by their labels (N,) if there are any."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    drawn = axes.scatter(means[:, 0], means[:, 1], c=labels, s=8, cmap="tab10" if labels is not None else None)
    if labels is not None:
        axes.legend(*drawn.legend_elements(), title="label", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel("z₁")
    axes.set_ylabel("z₂")
    axes.set_aspect("equal", adjustable="datalim")
    return figure


def manifold(side: int) -> Array:
    """(side², 2) latents: centres of a grid over the unit square, through the inverse normal distribution function.

    Kingma & Welling 2014, figure 4. z₁ rises from left to right, z₂ falls from top to bottom.
    """
    quantiles = [NormalDist().inv_cdf((i + 0.5) / side) for i in range(side)]
    return np.array([(a, b) for b in reversed(quantiles) for a in quantiles], np.float32)


def interpolation(means: Array, decode: Callable[[Array], Array], value_range: tuple[float, float]) -> Image.Image:
    """Decode equal steps along the lines between pairs of posterior means, one line for each row of the grid."""
    pairs = len(means) // 2 if len(means) > 1 else 0
    first, last = (means[:1], means[:1]) if pairs == 0 else (means[:pairs], means[pairs : 2 * pairs])
    steps = np.linspace(0, 1, _ACROSS, dtype=np.float32)
    rows = [decode(a + steps.reshape(-1, *[1] * a.ndim) * (b - a)) for a, b in zip(first[:8], last, strict=False)]
    return images.grid(np.concatenate(rows), value_range, _ACROSS)


def _host(tensor: torch.Tensor) -> Array:
    result: Array = tensor.float().cpu().numpy()
    return result


def _save(path: Path, picture: Figure | Image.Image) -> None:
    with atomic.atomic_file(path) as stage:
        (picture.savefig if isinstance(picture, Figure) else picture.save)(stage)
