"""Published, trained weights: they load, export, verify and build, and their pictures look right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trained

import vae_export
from vae_export.certification.certificate import Certificate
from vae_export.exporting.exporter import export_trained

pytestmark = pytest.mark.skipif(trained.missing() is not None, reason=trained.missing() or "")

ROWS = 24


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Certificate]]:
    """The bundle of a name and its certificate, on few rows."""
    exported: dict[str, tuple[Path, Certificate]] = {}

    def get(name: str) -> tuple[Path, Certificate]:
        if name not in exported:
            path = tmp_path_factory.mktemp(name) / f"{name}.bundle"
            exported[name] = path, export_trained(trained.load(name), path, rows=ROWS)
        return exported[name]

    return get


@pytest.mark.parametrize("name", trained.NAMES)
def test_it_exports_and_verifies(bundle: Callable[[str], tuple[Path, Certificate]], name: str) -> None:
    path, certificate = bundle(name)
    assert certificate.passed
    assert 8 <= certificate.examples["held_out"] <= ROWS
    vae_export.verify(path, device="cpu").require()


@pytest.mark.parametrize(("name", "error"), [("btcvae_dsprites", 0.01), ("betaH_chairs", 0.02), ("taef2", 0.05)])
def test_reconstructions_look_right(bundle: Callable[[str], tuple[Path, Certificate]], name: str, error: float) -> None:
    """With layers or latents in a wrong order, the pictures would be others."""
    path, _ = bundle(name)
    vae = vae_export.load(path, device="cpu")
    x = trained.load(name).held_out
    assert x is not None
    assert np.abs(vae.reconstruct(x[:24]) - x[:24]).mean() < error


def test_digits_are_told_apart(bundle: Callable[[str], tuple[Path, Certificate]]) -> None:
    """The bound of real digits is far above that of the same pixels in another order."""
    vae = vae_export.load(bundle("VAE_mnist")[0], device="cpu")
    x = trained.load("VAE_mnist").held_out
    assert x is not None
    x = x[:24]
    turned = np.ascontiguousarray(x[..., ::-1, :])
    mixed = np.ascontiguousarray(x.reshape(24, -1)[:, np.random.default_rng(0).permutation(1024)].reshape(x.shape))
    right, upside_down, noise = (vae.elbo(part, seed=0).elbo.mean() for part in (x, turned, mixed))
    assert right > upside_down > noise


def test_a_build(bundle: Callable[[str], tuple[Path, Certificate]], tmp_path: Path) -> None:
    path, _ = bundle("VAE_mnist")
    built = vae_export.build(path, "cpu", out=tmp_path / "b", batches=(8,), seconds=0.01)
    assert built.certificate is not None
    assert built.certificate.passed


def test_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "FOLDER", tmp_path)
    assert trained.missing() == f"no trained weights in {tmp_path}; name their folder in VAE_EXPORT_TRAINED"
