"""`vae-export build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vae_export.commands import options, terminal
from vae_export.commands.options import option
from vae_export.contract.choices import Asked
from vae_export.errors import InputError, require

BATCHES = "1,8,64"


def build(
    bundle: Annotated[Path | None, typer.Argument(metavar="BUNDLE", help="The folder of a bundle.")] = None,
    target: Annotated[
        str, option("Build for cpu, cuda, tensorrt, tensorrt-rtx, or one GPU architecture such as tensorrt-rtx-sm89.")
    ] = "",
    precision: Annotated[
        Asked, option("Compute convolutions and products in this precision; auto takes the fastest within tolerance.")
    ] = "fp32",
    budget: Annotated[
        Literal["fp16", "bf16", "int8"], option("With --precision auto: keep the tolerances of this precision.")
    ] = "int8",
    passes: Annotated[
        str | None, option("Use these graph passes: all, none, a,b or -a (all but a); the value list shows them.")
    ] = None,
    out: Annotated[
        Path | None, option("Write the build to this folder, to ship it; by default, to this user's cache.")
    ] = None,
    batch: Annotated[
        str, option("Make engines for these batch sizes; on the CPU, measure candidates at them.")
    ] = BATCHES,
    size: Annotated[
        list[str] | None,
        option(
            "Make engines up to this size, such as height=64,width=96 (repeatable); on the CPU, measure "
            "candidates at it."
        ),
    ] = None,
    static: Annotated[bool, option("Make engines for exactly these batches and sizes.", "--static")] = False,
    tf32: Annotated[bool, option("Let a GPU round float32 products to TF32's 10 bits.", "--tf32")] = False,
    nhwc: Annotated[bool, option("Keep channels last (NHWC) in ONNX Runtime on CUDA.", "--nhwc")] = False,
    refittable: Annotated[bool, option("Make engines whose weights --refit can replace.", "--refittable")] = False,
    refit: Annotated[Path | None, option("Put this bundle's weights into a copy of this refittable build.")] = None,
    seconds: Annotated[float | None, option("On the CPU: measure each candidate for so many seconds.")] = None,
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Build a bundle for a target, and prove, where the target runs here, that the build computes the same."""
    import msgspec

    from vae_export.commands import tables

    console = terminal.console()
    if passes == "list":
        for module in ("onnx", "onnx_ir"):
            require(module, "build", "build")
        from vae_export.graph import rewrites

        console.print(tables.facts("graph passes", {name: p.summary for name, p in rewrites.PASSES.items()}))
        return
    if bundle is None:
        raise InputError("build: name a BUNDLE, the folder that `vae-export export` wrote")
    from vae_export.building import builder
    from vae_export.progress import bar

    with bar(terminal.console(err=True)) as progress:
        if refit:
            others = (target, size, static, tf32, nhwc, refittable, passes, seconds)
            if any(others) or (precision, budget, batch) != ("fp32", "int8", BATCHES):
                raise InputError(
                    "build: --refit takes target, precision, shapes and flags from the build that it refits. Drop the "
                    "other options but --out and --force"
                )
            built = builder.refit(bundle, refit, out=out, overwrite=force, progress=progress)
        elif not target:
            raise InputError("build: name a --target: cpu, cuda, tensorrt, tensorrt-rtx or tensorrt-rtx-smNN")
        else:
            built = builder.build(
                bundle, target, out=out, precision=precision, budget=budget, passes=passes, static=static, tf32=tf32,
                nhwc=nhwc, refittable=refittable, seconds=seconds, batches=options.numbers("build: batch", batch),
                sizes=[options.sizes("build", text) for text in size or ()], overwrite=force, progress=progress,
            )  # fmt: skip
    if json:
        measured = built.certificate.to_dict() if built.certificate else None
        plain = {"path": str(built.path), "unmeasured": built.unmeasured, "certificate": measured}
        terminal.say_json({**plain, "build": msgspec.to_builtins(built.record)})
        return
    certificate, record = built.certificate, built.record
    proof = "verified" if certificate else f"not executed here, so without a certificate: {built.unmeasured}"
    terminal.say(f"{built.path} is written, {'and ' * bool(certificate)}{proof}")
    if certificate:
        terminal.say(tables.verdict(certificate))
    if not (out or refit or record.exact):
        wanted = record.options.wanted
        terminal.say(
            f"It computes in {record.in_words()}: load takes it with precision={wanted!r} (--precision {wanted})"
        )
    if record.measurements:
        console.print(tables.measurements(record))
    console.print(tables.build(built.path, record))
    if certificate:
        console.print(tables.certificate(certificate))
