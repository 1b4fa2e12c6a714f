"""The README of a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from vae_export.certification.certificate import Certificate
from vae_export.contract.manifest import Origin
from vae_export.contract.model import Model, SizeDim, shape_text
from vae_export.numerics import images
from vae_export.numerics.pixels import is_picture

if TYPE_CHECKING:
    from vae_export.runtimes import VAE
    from vae_export.sources.protocol import Training

FILE = "README.md"
TRAINING = "training"
_ROWS = 64  # of samples, or of pairs
_COLUMNS = 8


@dataclass(frozen=True)
class Picture:
    """The picture at the head of a card: its file name in the bundle, its caption in lower case, and the image."""

    file: str
    caption: str
    image: Image.Image


def picture(vae: VAE, held_out: npt.NDArray[np.float32], sizes: Mapping[str, int], rows: int = _ROWS) -> Picture | None:
    """Samples from the prior, or data above their reconstructions.

    Samples are shown only of models that were trained to have them. With a deterministic encoder, or a likelihood that
    is only a convention, the latents have no known distribution, and decoded noise would not represent the model.

    Args:
        vae: the exported model.
        held_out: (N, *data) float32 in the data's range: its golden examples of data; N may be 0.
        sizes: of the data's named dimensions, for samples.
        rows: the most examples that are shown.

    Returns:
        None if the data are no pictures, or if there are neither samples nor data to show.
    """
    model = vae.model
    if not is_picture(model.data.shape):
        return None
    if model.has_samples:
        x = vae.sample(rows, size=sizes or None)
        image = images.grid(x, model.data.range, columns=2 * _COLUMNS if rows > 2 * _COLUMNS else _COLUMNS)
        return Picture("samples.png", "samples from the prior", image)
    x = held_out[:rows]
    if not len(x):
        return None
    image = images.pairs(x, vae.reconstruct(x), model.data.range, columns=min(_COLUMNS, len(x)))
    return Picture("reconstructions.png", "data above their reconstructions", image)


def write(
    name: str,
    model: Model,
    origin: Origin,
    certificate: Certificate,
    training: Training | None,
    sizes: Mapping[str, int],
    picture: Picture | None,
) -> str:
    """The model card, as Markdown; the pictures of its training lie in the folder `TRAINING`.

    Args:
        name: of the bundle's folder.
        model: its shapes, range, posterior and likelihood.
        origin: the source of the model.
        certificate: of the export.
        training: figures and pictures of the training, where they are known.
        sizes: of the data's named dimensions, for the example.
        picture: the one at the head of the card, which the caller writes beside it.
    """
    limits = {
        "posterior logvar": model.posterior.logvar_clamp,
        "likelihood logvar": model.likelihood.logvar_clamp,
        "likelihood log_scale": model.likelihood.log_scale_clamp,
    }
    clamps = "; ".join(f"{k} clamped to [{v[0]:g}, {v[1]:g}]" for k, v in limits.items() if v)
    variance = "" if model.likelihood.variance is None else f", variance {model.likelihood.variance:.4g}"
    low, high = model.data.range
    facts = {
        "architecture": f"{model.architecture}, {model.parameters:,} parameters",
        "data": f"{shape_text(model.data.shape)} float32 in [{low:g}, {high:g}]",
        "latent": shape_text(model.latent.shape),
        **({"a diffusion model's latents": model.latent.formula} if model.latent.scaled else {}),
        "prior": model.prior,
        "posterior": model.posterior.kind,
        "likelihood": model.likelihood.kind + variance + (" (nominal)" if model.likelihood.nominal else ""),
        "limits": clamps or "none",
        "from": f"{origin.kind} `{origin.name}`" + (f", trained on {origin.data}" if origin.data else ""),
        "reference": certificate.reference,
    }
    checks = (
        (
            *(check.graph, check.quantity, f"{check.measured:.3g} {check.unit}"),
            *("" if value is None else f"{value:.3g}" for value in (check.tolerance, check.pytorch)),
        )
        for check in certificate.checks
    )
    shown = f"\n![{name}: {picture.caption}]({picture.file})\n" if picture else ""
    return f"""# {name}

A variational autoencoder as a verified bundle of `vae_export`.
{shown}
```python
{_example(name, model, sizes)}
```

{_table(("", ""), facts.items())}
{_trained(training) if training else ""}
## Certificate

Measured at the export, worst over batches of {", ".join(map(str, certificate.batches))}.
`vae-export verify` measures it again on your machine.

{_table(("graph", "quantity", "measured", "tolerance", "PyTorch float32"), checks)}
"""


def _example(name: str, model: Model, sizes: Mapping[str, int]) -> str:
    """A program that uses the bundle, to be run in the folder that contains it."""
    load = f"vae = vae_export.load({json.dumps(name, ensure_ascii=False)})"
    if model.has_samples:
        size = f", size={json.dumps(dict(sizes))}" if sizes else ""
        return f"import vae_export\n\n{load}\nx = vae.sample(16, seed=0{size})"
    low, high = model.data.range
    shape = tuple(sizes[dim.name] if isinstance(dim, SizeDim) else dim for dim in model.data.shape)
    return "\n".join(
        [
            *("import numpy as np", "import vae_export", "", load),
            f"x = np.full({(1, *shape)}, {(low + high) / 2:g}, np.float32)  # your data, from {low:g} to {high:g}",
            *("z = vae.encode(x).mode()", "again = vae.decode(z)"),
        ]
    )


def _trained(training: Training) -> str:
    shown = "\n\n".join(
        f"![{caption}]({TRAINING}/{name})\n\n{caption[0].upper()}{caption[1:]}."
        for name, (caption, _) in training.pictures.items()
    )
    return f"""
## Training

On test data that the model was not trained on, in PyTorch:

{_table(("", ""), training.figures.items())}

{shown}
"""


def _table(headings: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    """A Markdown table. Bars are escaped, also in code, where they would end the cell as well."""
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
