"""Options that several verbs share, and how their texts are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vae_export.contract.choices import Wanted
from vae_export.errors import InputError


def option(help: str, *names: str) -> Any:
    """An option of the command line with its help text, and with names where the parameter's own does not do."""
    return typer.Option(*names, help=help)


Device = Literal["auto", "cpu", "cuda"]

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder of a bundle.")]
DeviceOption = Annotated[Device, option("Run on this device; auto takes a GPU if it can be used.")]
BuildOption = Annotated[
    Path | None, option("Run this build. Name only builds that you trust: engines are native code.", "--build")
]
CachedPrecision = Annotated[
    Wanted | None, option("Take the cache's build in this precision; without --target, the one for the CPU.")
]
Json = Annotated[bool, option("Print JSON for scripts instead of tables.", "--json")]
Force = Annotated[bool, option("Replace the output folder if it exists.", "--force")]

ConfigOption = Annotated[Path | None, option("Read this diffusers config.json for weights in one .safetensors file.")]
ShapeOption = Annotated[str | None, option("For a factory's plain module: the shape of one example, such as 3,64,64.")]
LikelihoodOption = Annotated[
    str | None, option("For a factory's plain module: the likelihood p(x|z), such as bernoulli.")
]
RangeOption = Annotated[
    str | None, option("For a factory's plain module: the data's range, such as 0,1 or=-1,1.", "--range")
]
VarianceOption = Annotated[float | None, option("For a factory's plain module: the variance of gaussian_fixed.")]
MultipleOption = Annotated[
    int | None, option("For a factory's plain module: allow all heights and widths that are multiples of this.")
]


def numbers(what: str, text: str, separator: str = ",") -> tuple[int, ...]:
    """Whole numbers with a separator between them. InputError: the text is anything else."""
    try:
        return tuple(int(number) for number in text.split(separator))
    except ValueError:
        raise InputError(f"{what} are {text!r}; expected numbers such as 8{separator}64") from None


def interval(verb: str, text: str) -> tuple[float, float]:
    """A range such as `-1,1`. InputError: the text is not two numbers."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise InputError(f"{verb}: range is {text!r}; expected two numbers such as -1,1") from None
    return low, high


def sizes(verb: str, text: str) -> dict[str, int]:
    """Sizes by name, such as `height=64,width=96`. InputError: the text is anything else."""
    try:
        return {name: int(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise InputError(f"{verb}: size is {text!r}; expected names and numbers such as height=64,width=96") from None


def source_options(verb: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options in `given` that describe a source, parsed, as arguments of `sources.resolve`."""
    parsers: dict[str, Callable[[str], Any]] = {
        "size": partial(sizes, verb),
        "shape": partial(numbers, f"{verb}: shape"),
        "data_range": partial(interval, verb),
    }
    names = ("config", "size", "shape", "likelihood", "data_range", "variance", "multiple_of")
    known = {name: value for name in names if (value := given.get(name)) not in (None, "")}
    return {name: parsers[name](value) if name in parsers else value for name, value in known.items()}


def check_outside(out: Path, bundle: Path) -> Path:
    """The path of a result. InputError: it lies in the bundle, which is never changed after its export."""
    if out.resolve().is_relative_to(bundle.resolve()):
        raise InputError(f"{out} lies inside the bundle, which is never changed. Choose a path outside of it")
    return out


def cached_build(verb: str, bundle: Path, target: str | None, precision: Wanted | None) -> Path | None:
    """The cache's build for a target in a precision; None where neither is given. InputError: it does not exist."""
    if target is None and precision is None:
        return None
    from vae_export.contract import cache, targets
    from vae_export.contract.build_record import BuildFolder
    from vae_export.contract.bundle import Bundle
    from vae_export.errors import BundleError

    manifest, name, wanted = Bundle(bundle).manifest, targets.parse(target or "cpu").name, precision or "fp32"
    builds: dict[str, Path] = {}
    for slot in cache.cached_slots(manifest):
        path = cache.cached(manifest, slot)
        if cache.slot_target(slot).name == name:
            try:
                builds.setdefault(BuildFolder(path).record.options.wanted, path)
            except BundleError:  # reported when this very build is opened
                continue
    canonical = cache.cached(manifest, cache.slot(name, wanted))
    if canonical.is_dir() and canonical not in builds.values():
        return canonical
    if wanted in builds:
        return builds[wanted]
    others = f"; it has one in {', '.join(builds)} (--precision)" if builds else ""
    option = "--tf32" if wanted == "tf32" else f"--precision {wanted}"
    raise InputError(
        f"{verb}: the cache has no build for {name} in {wanted}{others}. "
        f"Run: vae-export build {bundle} --target {name} {option}"
    )
