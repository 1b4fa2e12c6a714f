"""Use an autoencoder of latent diffusion from an app that has no PyTorch.

    python examples/sdxl_app.py out/sdxl.bundle photo.jpg out/again.png

Needs the extras of `pip install '.[cpu]'`, run in the checkout. Without a photo, a gradient stands in.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import vae_export


def main(bundle: Path, photo: Path | None, out: Path) -> None:
    """Photo → latents as the diffusion model wants them → photo, within 1 GiB."""
    with vae_export.load(bundle, max_memory="1GiB") as vae:
        if photo:
            pixels = np.asarray(Image.open(photo).convert("RGB"))
        else:
            ramp = np.linspace(0, 255, 256, dtype=np.uint8)
            pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(128)), axis=-1)
        x = np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]  # (1, 3, H, W) uint8
        z = vae.encode(x, pad=True).latent()  # a diffusion model would go on from here
        decoded = vae.decode(z, scaled=True)[0, :, : x.shape[2], : x.shape[3]]
        picture = np.clip((decoded + 1) * 127.5, 0, 255).round().astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(picture).save(out)
        print(f"{out}: {picture.shape}, latents {z.shape}, {vae.describe()['latent_scaling']}")
    assert "torch" not in sys.modules


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(
        given[0] if given else Path("out/sdxl.bundle"),
        given[1] if len(given) > 1 else None,
        given[2] if len(given) > 2 else Path("out/again.png"),
    )
