"""Take a trained variational autoencoder from PyTorch to a verified ONNX bundle, and run it anywhere.

Public names are imported when they are first used: `import vae_export` alone imports the standard library.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

# From a checkout, the sibling folders `runtimes` and `trainers` are not inside the package's own folder.
if not (Path(__file__).parent / "runtimes").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from vae_export.building.builder import Built, build, refit
    from vae_export.certification.certificate import Certificate
    from vae_export.certification.verifier import verify
    from vae_export.contract.bundle import Bundle
    from vae_export.contract.manifest import Manifest
    from vae_export.errors import BackendError, BundleError, InputError, TileWarning, VaeExportError, VerificationError
    from vae_export.exporting.exporter import export
    from vae_export.runtimes import VAE, Elbo, Posterior, Tile, load
    from vae_export.sources.module import Source

__version__ = "0.7.0"

#: Where each public name is defined.
_HOMES = {
    name: f"vae_export.{module}"
    for module, names in {
        "building.builder": ("Built", "build", "refit"),
        "certification.certificate": ("Certificate",),
        "certification.verifier": ("verify",),
        "contract.bundle": ("Bundle",),
        "contract.manifest": ("Manifest",),
        "errors": ("BackendError", "BundleError", "InputError", "TileWarning", "VaeExportError", "VerificationError"),
        "exporting.exporter": ("export",),
        "runtimes": ("VAE", "Elbo", "Posterior", "Tile", "load"),
        "sources.module": ("Source",),
    }.items()
    for name in names
}
__all__ = [
    "VAE",
    "BackendError",
    "Built",
    "Bundle",
    "BundleError",
    "Certificate",
    "Elbo",
    "InputError",
    "Manifest",
    "Posterior",
    "Source",
    "Tile",
    "TileWarning",
    "VaeExportError",
    "VerificationError",
    "__version__",
    "build",
    "export",
    "load",
    "refit",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name in ("export", "Source"):
        from vae_export.errors import EXPORT_NEEDS, require

        for module, extra in EXPORT_NEEDS:
            require(module, extra, "export")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
