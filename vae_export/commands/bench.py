"""`vae-export bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from vae_export.commands import options, terminal
from vae_export.commands.options import option
from vae_export.errors import InputError


def bench(
    bundle: options.BundlePath,
    target: Annotated[str | None, option("Time the cache's build for this target.")] = None,
    build: Annotated[
        list[Path] | None,
        option("Time this build (repeatable). Name only builds that you trust: engines are native code.", "--build"),
    ] = None,
    no_build: Annotated[
        bool, option("Time the bundle's own graphs even if the cache has a build in float32.", "--no-build")
    ] = False,
    precision: options.CachedPrecision = None,
    source: Annotated[
        str | None, option("With --peers: time PyTorch on this SOURCE of the bundle. A factory's code is run.")
    ] = None,
    peers: Annotated[bool, option("Also time PyTorch, torch.compile, diffusers and OpenVINO.", "--peers")] = False,
    verbs: Annotated[
        str | None, option("Time these of the verbs encode, decode, sample, reconstruct, elbo, separated by commas.")
    ] = None,
    batches: Annotated[str, option("The batch sizes to time.")] = "1,8,64",
    size: Annotated[
        str | None, option("Time this size of a model with named sizes, such as height=64,width=96.")
    ] = None,
    threads: Annotated[
        int | None, option("Run every call with this many threads; by default, one for each core.")
    ] = None,
    seconds: Annotated[float, option("Time each runner for so many seconds for each verb and batch.")] = 2.0,
    memory: Annotated[
        bool, option("Also measure each runner's peak memory, in a process of its own.", "--memory")
    ] = False,
    json: options.Json = False,
    plot: Annotated[Path | None, option("Also draw latency against batch size to this .png file.")] = None,
) -> None:
    """Time verbs and batches, in turns: our runtime, a bare ONNX Runtime session, and other ways to run the model."""
    from vae_export import bench as module
    from vae_export.runtimes import summary

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
                terminal.note(f"{runner.name}: {summary(runner.vae.describe())}")
        chosen, sizes = verbs.split(",") if verbs else None, options.sizes("bench", size) if size else None
        report = module.run(
            selection, chosen, wanted, sizes=sizes, seconds=seconds, memory=memory, progress=status.update
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
