"""`vae-export verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from vae_export.commands import options, terminal
from vae_export.commands.options import option
from vae_export.errors import InputError


def verify(
    bundle: options.BundlePath,
    device: options.DeviceOption = "auto",
    build: options.BuildOption = None,
    target: Annotated[str | None, option("Measure the cache's build for this target.")] = None,
    precision: options.CachedPrecision = None,
    json: options.Json = False,
    out: Annotated[Path | None, option("Also write the certificate to this JSON file.")] = None,
) -> None:
    """Measure the certificate of a bundle's own graphs, or of a build, again on this machine, without PyTorch."""
    from vae_export.certification import certificate
    from vae_export.certification.verifier import verify as run
    from vae_export.commands import tables
    from vae_export.contract import atomic
    from vae_export.progress import bar

    target_file = options.check_outside(out, bundle) if out else None
    cached = options.cached_build("verify", bundle, target, precision)
    if build and cached:
        raise InputError("verify: name one of --build and --target (or --precision)")
    with bar(terminal.console(err=True)) as progress:
        measured = run(bundle, device=device, build=cached or build, progress=progress, opened=terminal.note)
    if target_file:
        with atomic.atomic_file(target_file) as stage:
            stage.write_bytes(certificate.encode(measured))
    if json:
        terminal.say_json(measured.to_dict())
    else:
        terminal.say(f"{measured.bundle}: {tables.verdict(measured)}")
        terminal.console().print(tables.certificate(measured))
    measured.require()
