"""The names that users may lean on, each with its documentation."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import vae_export

pytestmark = pytest.mark.quick


def modules() -> list[ModuleType]:
    """All modules of the package, wherever it is imported from: a checkout has two of its folders beside it."""
    names = {"vae_export"}
    for package in ("vae_export", "vae_export.runtimes", "vae_export.trainers"):
        path = importlib.import_module(package).__path__[:1]
        names |= {info.name for info in pkgutil.walk_packages(path, f"{package}.")}
    assert {"vae_export.contract.manifest", "vae_export.runtimes.gpu.lanes", "vae_export.trainers.fit"} <= names
    return [importlib.import_module(name) for name in sorted(names - {"vae_export.__main__"})]


def test_names() -> None:
    assert set(vae_export.__all__) == {
        *("BackendError", "Built", "Bundle", "BundleError", "Certificate", "Elbo", "InputError", "Manifest"),
        *("Posterior", "Source", "Tile", "TileWarning", "VAE", "VaeExportError", "VerificationError", "__version__"),
        *("build", "export", "load", "refit", "verify"),
    }
    for name in vae_export.__all__:
        assert getattr(vae_export, name) is not None
    assert dir(vae_export) == sorted(vae_export.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        vae_export.nothing  # noqa: B018


def test_every_public_thing_is_documented() -> None:
    missing = []
    for module in modules():
        assert module.__doc__, module.__name__
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                missing += [f"{module.__name__}.{name}"] * (not value.__doc__)
            if inspect.isclass(value) and not name.startswith("_"):
                for member, method in vars(value).items():
                    public = inspect.isfunction(method) and not member.startswith("_")
                    # An override (torch's forward) and typing's own members inherit their text.
                    missing += [f"{module.__name__}.{name}.{member}"] * (public and not inspect.getdoc(method))
    assert not missing


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert vae_export.__version__ == version("vae-export")
