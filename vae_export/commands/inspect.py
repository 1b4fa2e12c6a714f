"""`vae-export inspect`: a bundle, a build, a checkpoint, or a source that is not exported yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vae_export.commands import options, terminal
from vae_export.commands.options import option
from vae_export.errors import require


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE|SOURCE|BUILD",
            help="The folder of a bundle, a build, a checkpoint or a diffusers autoencoder, a .safetensors file, or a "
            "factory as package.module:function, whose code is run.",
        ),
    ],
    config: options.ConfigOption = None,
    size: Annotated[
        str | None, option("Count multiply-adds and memory at this size, such as height=512,width=512.")
    ] = None,
    shape: options.ShapeOption = None,
    likelihood: options.LikelihoodOption = None,
    data_range: options.RangeOption = None,
    variance: options.VarianceOption = None,
    multiple_of: options.MultipleOption = None,
    json: options.Json = False,
) -> None:
    """Show what a bundle, a source or a build is, after verifying every file of a bundle or build."""
    given = {name: value for name, value in locals().items() if name != "size"}  # here, the one to count at
    from vae_export.contract.build_record import RECORD_FORMAT
    from vae_export.contract.bundle import MANIFEST
    from vae_export.trainers.config import is_checkpoint

    path, sizes = Path(source), options.sizes("inspect", size) if size else None
    if (path / RECORD_FORMAT.file).is_file():
        verdict, plain, shown = _build(path)
    elif (path / MANIFEST).exists():
        verdict, plain, shown = _bundle(path, sizes)
    elif is_checkpoint(path):
        verdict, plain, shown = _checkpoint(path)
    elif path.exists() or ":" in source:
        verdict, plain, shown = _source(source, options.source_options("inspect", given), sizes)
    else:
        verdict, plain, shown = _bundle(path, sizes)  # its error says what a bundle is
    if json:
        terminal.say_json(plain)
        return
    terminal.say(verdict)
    for table in shown:
        terminal.console().print(table)


#: One line, plain values for JSON, and tables.
Shown = tuple[str, dict[str, Any], list[Any]]


def _build(path: Path) -> Shown:
    import msgspec

    from vae_export.commands import tables
    from vae_export.contract.build_record import BuildFolder

    folder = BuildFolder(path)
    folder.check()
    record = folder.record
    plain = {"kind": "build", **msgspec.to_builtins(record), "unlisted": folder.unlisted()}
    shown = [tables.measurements(record)] if record.measurements else []
    verdict = f"{path}: a build of {record.bundle} for {record.target} in {record.in_words()}; every file is intact"
    return verdict, plain, [*shown, tables.build(path, record)]


def _checkpoint(path: Path) -> Shown:
    import msgspec

    from vae_export.commands import tables
    from vae_export.trainers import config

    plain = msgspec.to_builtins(config.read(path))
    parts = ("model", "data", "train", "split", "result")
    shown = [tables.facts(f"{path}: {part}", plain[part] or {}) for part in parts]
    return f"{path}: a checkpoint of a {plain['model']['model']} model", {"kind": "checkpoint", **plain}, shown


def _bundle(path: Path, sizes: dict[str, int] | None) -> Shown:
    import msgspec

    from vae_export.certification import certificate
    from vae_export.commands import tables
    from vae_export.contract import cache
    from vae_export.contract.bundle import Bundle
    from vae_export.contract.model import EXAMPLE_SIZE

    opened = Bundle(path)
    measured = certificate.decode(opened.read("verification.json"))
    opened.check()
    manifest, model = opened.manifest, opened.manifest.model
    at = sizes or {
        name: dim.multiple_of * -(-EXAMPLE_SIZE // dim.multiple_of) for name, dim in model.data.named().items()
    }
    model.latent_shape(at)  # refuses a size that the model does not take
    costs = tables.costs(model, {name: graph.cost for name, graph in manifest.graphs.items() if graph.cost}, at)
    unlisted, cached = opened.unlisted(), cache.cached_slots(manifest)
    plain = {**msgspec.to_builtins(manifest), "certificate": measured.to_dict(), "builds": cached, "costs": costs}
    verdict = f"{path}: a bundle; every file is intact; at its export: {tables.verdict(measured)}"
    shown = tables.bundle(path, manifest, measured, unlisted, cached, costs)
    return verdict, {"kind": "bundle", **plain, "unlisted": unlisted}, shown


def _source(source: str, described: dict[str, Any], sizes: dict[str, int] | None) -> Shown:
    require("torch", "export", "inspect")
    import msgspec

    from vae_export import sources
    from vae_export.commands import tables
    from vae_export.sources import cost

    trained = sources.resolve(source, **described)
    counted = cost.count(trained)
    at = sizes or trained.sizes()
    trained.model.latent_shape(at)
    costs = tables.costs(trained.model, counted, at)
    plain = {"model": msgspec.to_builtins(trained.model), "origin": msgspec.to_builtins(trained.origin)}
    shown = [tables.source(source, trained.model, trained.origin, costs)]
    return f"{source}: a source, not exported yet", {"kind": "source", **plain, "costs": costs}, shown
