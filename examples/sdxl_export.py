"""Take an SDXL autoencoder from disk to a verified bundle.

    python examples/sdxl_export.py path/to/sdxl/vae out/sdxl.bundle

Needs the extras of `pip install '.[cpu,export,diffusers]'`, run in the checkout. The folder is the autoencoder's or the
pipeline's, with weights in safetensors. Without one, a small autoencoder of the same kind, untrained, stands in.
"""

import sys
import tempfile
from pathlib import Path

import vae_export


def stand_in(folder: Path) -> Path:
    """A small AutoencoderKL with SDXL's scaling, as diffusers saves it."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    model.save_pretrained(folder)
    return folder


def main(source: Path | None, bundle: Path) -> None:
    """Export, and show the certificate's verdict."""
    with tempfile.TemporaryDirectory() as scratch:
        size = None if source else {"height": 32, "width": 32}  # to trace and verify at; the default is 64 × 64
        source = source or stand_in(Path(scratch) / "vae")
        certificate = vae_export.export(source, bundle, size=size, overwrite=True)
    worst = certificate.check("end_to_end.pixel.max").measured
    print(f"{bundle}: passed: {certificate.passed}; worst pixel {worst:.1e} of the range")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(given[0] if given else None, given[1] if len(given) > 1 else Path("out/sdxl.bundle"))
