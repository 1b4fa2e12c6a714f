"""`vae-export bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vae_export.commands import options, terminal
from vae_export.errors import InputError


def bench(
    bundle: options.BundlePath,
    target: Annotated[
        str | None, typer.Option(help="Time the cache's build for this target, such as cpu or cuda.")
    ] = None,
    build: Annotated[
        list[Path] | None,
        typer.Option(
            "--build",
            help="Time this build of the bundle; may be repeated. Name only builds that you trust: an engine is native "
            "code.",
        ),
    ] = None,
    no_build: Annotated[
        bool,
        typer.Option("--no-build", help="Time the bundle's own graphs even if the cache has a build in float32."),
    ] = False,
    precision: options.CachedPrecision = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="With --peers: the SOURCE that the bundle was exported from, to time PyTorch on it. A factory's code "
            "is run."
        ),
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also time PyTorch, torch.compile, diffusers and OpenVINO.")
    ] = False,
    verbs: Annotated[
        str | None,
        typer.Option(
            help="The verbs to time, separated by commas: encode, decode, sample, reconstruct, elbo. By default, all "
            "that the model has."
        ),
    ] = None,
    batches: Annotated[str, typer.Option(help="The batch sizes to time.")] = "1,8,64",
    size: Annotated[
        str | None,
        typer.Option(help="The size to time, for models with named sizes, such as height=64,width=96."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="The number of threads of every call; by default, one for each core.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="The seconds to time each runner for, for each verb and batch.")] = 2.0,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also measure the peak memory of each runner, each in its own process.")
    ] = False,
    json: options.Json = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw latency against batch size to this .png file.")] = None,
) -> None:
    """Time verbs and batches, in turns: our runtime, a bare ONNX Runtime session, and other ways to run the model."""
    from vae_export import bench as module
    from vae_export.runtimes import said

    wanted = options.numbers("bench: batches", batches)
    picture = options.check_outside(plot, bundle) if plot else None
    if picture:
        module.check_plot(picture)
    console = terminal.console()
    cached = options.cached_build("bench", bundle, target, precision)
    builds = [*(build or ()), *([cached] if cached else ())]
    if no_build and builds:
        raise InputError("bench: --no-build takes none, and a build is named. Drop one of them")
    with (
        module.candidates(
            bundle, builds=builds, source=source, peers=module.PEERS if peers else (), threads=threads, own=no_build
        ) as selection,
        terminal.console(err=True).status("bench") as status,
    ):
        for runner in selection.runners:
            if isinstance(runner, module.Ours):
                terminal.note(f"{runner.name}: {said(runner.vae.describe())}")
        report = module.run(
            selection,
            verbs.split(",") if verbs else None,
            wanted,
            sizes=options.sizes("bench", size) if size else None,
            seconds=seconds,
            memory=memory,
            progress=status.update,
        )
    if picture:
        module.plot(report, picture)
    if json:
        terminal.say_json(report.to_dict())
        return
    terminal.say(module.verdict(report))
    console.print(module.table(report, brief=console.width < module.FULL_WIDTH))
    for line in module.summary(report):
        terminal.say(line)
