"""`vae-export sample`, `reconstruct` and `score`: the verbs that run a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vae_export.commands import options, terminal
from vae_export.commands.options import option
from vae_export.contract.choices import Wanted
from vae_export.errors import InputError

if TYPE_CHECKING:
    from vae_export.runtimes import VAE

Input = Annotated[
    str,
    typer.Argument(metavar="INPUT", help="The examples: a picture, a folder of pictures, array.npy or arrays.npz:key."),
]
PrecisionOption = Annotated[
    Wanted | None, option("Run the cache's build in this precision; by default, in VAE_EXPORT_PRECISION or fp32.")
]
NoBuild = Annotated[bool, option("Run the bundle's own graphs even if the cache has a build.", "--no-build")]
NoiseSeed = Annotated[int, option("The seed of the noise.")]
Start = Annotated[int, option("The index of the first example, which with the seed selects its noise.")]
AnyRange = Annotated[bool, option("Accept values outside of the data's range.", "--any-range")]
Resize = Annotated[bool, option("Scale pictures that have another size.", "--resize")]


def sample(
    bundle: options.BundlePath,
    out: Annotated[Path, option("Write to grid.png or array.npy.")],
    n: Annotated[int, option("The number of samples.")] = 64,
    seed: NoiseSeed = 0,
    start: Start = 0,
    draw: Annotated[bool, option("Draw x from p(x|z) instead of taking its mean.", "--draw")] = False,
    size: Annotated[
        str | None, option("Make samples of this size, for models with named sizes, such as height=64,width=96.")
    ] = None,
    device: options.DeviceOption = "auto",
    build: options.BuildOption = None,
    no_build: NoBuild = False,
    precision: PrecisionOption = None,
) -> None:
    """Decode draws from the prior."""
    from vae_export.numerics import images

    sizes = options.sizes("sample", size) if size else None
    with _load("sample", bundle, device, build, no_build, precision) as vae:
        images.check_target(options.check_outside(out, bundle), vae.model.data)
        images.write(out, vae.sample(n, seed, start, draw=draw, size=sizes), vae.model.data)
    terminal.say(f"{out}: {n} samples, seed {seed}, from {start}")


def reconstruct(
    bundle: options.BundlePath,
    input: Input,
    out: Annotated[Path, option("Write to grid.png (originals above reconstructions) or array.npy.")],
    seed: Annotated[int | None, option("Draw z from the posterior with this seed instead of taking its mean.")] = None,
    start: Start = 0,
    resize: Resize = False,
    any_range: AnyRange = False,
    device: options.DeviceOption = "auto",
    build: options.BuildOption = None,
    no_build: NoBuild = False,
    precision: PrecisionOption = None,
) -> None:
    """Encode and decode examples."""
    from vae_export.numerics import images

    with _load("reconstruct", bundle, device, build, no_build, precision, any_range) as vae:
        data = vae.model.data
        images.check_target(options.check_outside(out, bundle), data)
        x = images.read(input, data, resize=resize)
        images.write(out, x, data, below=vae.reconstruct(x, seed, start))
    terminal.say(f"{out}: {len(x)} reconstructions")


def score(
    bundle: options.BundlePath,
    input: Input,
    k: Annotated[
        int | None, option("Compute the importance-weighted bound of so many draws instead of the ELBO.")
    ] = None,
    seed: NoiseSeed = 0,
    start: Start = 0,
    json: Annotated[bool, option("Write JSON instead of CSV.", "--json")] = False,
    out: Annotated[Path | None, option("Write to this file instead of the terminal.")] = None,
    resize: Resize = False,
    any_range: AnyRange = False,
    device: options.DeviceOption = "auto",
    build: options.BuildOption = None,
    no_build: NoBuild = False,
    precision: PrecisionOption = None,
) -> None:
    """Compute each example's ELBO in nats, or a tighter bound on its evidence, as CSV or JSON."""
    from vae_export.commands import scoring
    from vae_export.contract import atomic
    from vae_export.numerics import images

    target = options.check_outside(out, bundle) if out else None
    with _load("score", bundle, device, build, no_build, precision, any_range) as vae:
        x = images.read(input, vae.model.data, resize=resize)
        columns = scoring.score(vae, x, k=k, seed=seed, start=start)
    text = scoring.to_json(columns) if json else scoring.to_csv(columns)
    if target:
        with atomic.atomic_file(target) as stage:
            stage.write_text(text, encoding="utf-8")
    else:
        typer.echo(text, nl=False)  # numbers, possibly many: nothing to escape


def _load(
    verb: str,
    bundle: Path,
    device: str,
    build: Path | None,
    no_build: bool,
    precision: Wanted | None,
    any_range: bool = False,
) -> VAE:
    """Open a bundle as the options say, and print what runs."""
    from vae_export.runtimes import load, summary

    if build and no_build:
        raise InputError(f"{verb}: name one of --build and --no-build")
    chosen: Path | Literal[False] | None = False if no_build else build
    vae = load(bundle, device=device, build=chosen, precision=precision, check_range=not any_range)
    facts = vae.describe()
    terminal.note("; ".join([summary(facts), *facts["notes"]]))
    return vae
