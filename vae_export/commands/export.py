"""`vae-export export`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vae_export.commands import options, terminal
from vae_export.commands.options import option
from vae_export.errors import EXPORT_NEEDS, require


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A checkpoint's folder, a diffusers autoencoder (a folder or a .safetensors file), or a factory as "
            "package.module:function, whose code is run.",
        ),
    ],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder to write the bundle to.")],
    config: options.ConfigOption = None,
    size: Annotated[
        str | None, option("Trace and verify a diffusers autoencoder at this size, such as height=128,width=128.")
    ] = None,
    held_out: Annotated[
        str | None,
        option("Verify a diffusers autoencoder on these pictures (a file, folder or array), scaled to the size."),
    ] = None,
    shape: options.ShapeOption = None,
    likelihood: options.LikelihoodOption = None,
    data_range: options.RangeOption = None,
    variance: options.VarianceOption = None,
    multiple_of: options.MultipleOption = None,
    layout: Annotated[
        Literal["bundle", "optimum"], option("Write a bundle, or the folder that Optimum's pipelines read.")
    ] = "bundle",
    force: options.Force = False,
) -> None:
    """Export a trained model to ONNX, and prove that the export computes the same."""
    given = locals()
    for module, extra in EXPORT_NEEDS:
        require(module, extra, "export")
    from vae_export.commands import tables
    from vae_export.exporting.exporter import export as run
    from vae_export.exporting.layouts import optimum
    from vae_export.progress import bar

    described = options.source_options("export", given)
    if held_out:
        described["held_out"] = _held_out(held_out, described.get("size", {}))
    with bar(terminal.console(err=True)) as progress, contextlib.ExitStack() as stack:
        folder = bundle
        if layout == "optimum":
            import tempfile

            optimum.check_target(bundle, overwrite=force)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / bundle.name
        certificate = run(source, folder, overwrite=force, progress=progress, **described)
        if layout == "optimum":
            optimum.optimum(folder, bundle, overwrite=force)
    terminal.say(f"{bundle} is written and verified\n{tables.verdict(certificate)}")
    terminal.console().print(tables.certificate(certificate))


def _held_out(given: str, sizes: dict[str, int]) -> Any:
    """Pictures (B, 3, height, width) float32 in [−1, 1], scaled to the size that is verified."""
    from vae_export.contract.model import EXAMPLE_SIZE, Data
    from vae_export.numerics import images
    from vae_export.numerics.pixels import from_uint8

    size = dict.fromkeys(("height", "width"), EXAMPLE_SIZE) | sizes
    data = Data(shape=(3, size["height"], size["width"]), range=(-1.0, 1.0))
    x = images.read(given, data, resize=True)
    return from_uint8(x, data.range) if x.dtype.name == "uint8" else x
