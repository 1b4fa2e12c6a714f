"""The README of a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vae_export.certificate import Certificate
from vae_export.manifest import Model, Origin, shape_text
from vae_export.report import scaling

if TYPE_CHECKING:
    from vae_export.sources.protocol import Training

FILE = "README.md"
PICTURE = "samples.png"


TRAINING = "training"


def write(
    name: str, model: Model, origin: Origin, certificate: Certificate, training: Training | None, *, picture: bool
) -> str:
    """The model card, as Markdown; the pictures of its training lie in the folder `TRAINING`."""
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
        **({"a diffusion model's latents": scaling(model.latent)} if model.latent.scaled else {}),
        "prior": model.prior,
        "posterior": model.posterior.kind,
        "likelihood": model.likelihood.kind + variance + (" (nominal)" if model.likelihood.nominal else ""),
        "limits": clamps or "none",
        "from": f"{origin.kind} `{origin.name}`" + (f", trained on {origin.data}" if origin.data else ""),
        "reference": certificate.reference,
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    checks = "\n".join(
        f"| {c.graph} | {c.quantity} | {c.measured:.3g} {c.unit} | "
        f"{'' if c.tolerance is None else f'{c.tolerance:.3g}'} | {'' if c.pytorch is None else f'{c.pytorch:.3g}'} |"
        for c in certificate.checks
    )
    shown = f"\n![{name}: samples from the prior]({PICTURE})\n" if picture else ""
    return f"""# {name}

A variational autoencoder as a verified bundle of `vae_export`.
{shown}
```python
import vae_export

vae = vae_export.load("{name}")
x = vae.sample(16, seed=0)
```

| | |
|---|---|
{rows}
{_trained(training) if training else ""}
## Certificate

Measured at the export, worst over batches of {", ".join(map(str, certificate.batches))}. S is the sum of the
absolute terms of log p(x|z) and KL. `vae-export verify` measures it again on your machine.

| graph | quantity | got | allowed | PyTorch float32 |
|---|---|---|---|---|
{checks}
"""


def _trained(training: Training) -> str:
    rows = "\n".join(f"| {what} | {value} |" for what, value in training.figures.items())
    shown = "\n\n".join(
        f"![{caption}]({TRAINING}/{name})\n\n{caption[0].upper()}{caption[1:]}."
        for name, (caption, _) in training.pictures.items()
    )
    return f"""
## Training

On test data that the model was not trained on, in PyTorch:

| | |
|---|---|
{rows}

{shown}
"""
