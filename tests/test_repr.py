"""The one line that a public object shows of itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vae_export
from vae_export.contract.bundle import Bundle
from vae_export.runtimes import DevicePosterior, Elbo, Posterior, Settings, Tile, open_bundle
from vae_export.runtimes.gpu.device import DeviceArray


class Untouched:
    """Stands for the GPU: any use of it is an error."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"repr uses the GPU's {name}")


def on_gpu(*shape: int) -> DeviceArray:
    unused: Any = Untouched()
    return DeviceArray(unused, unused, shape, np.dtype(np.float32), unused)


def test_of_a_vae(digits: dict[str, Path]) -> None:
    with vae_export.load(digits["bernoulli"], device="cpu", build=False) as vae:
        facts = "data (B, 1, 8, 8), latent (B, 8), float32"
        assert repr(vae) == f"VAE('bernoulli', {facts}, onnxruntime on cpu)"
    assert repr(vae) == f"VAE('bernoulli', {facts}, closed)"


def test_of_named_sizes(member: Callable[[str], Any]) -> None:
    with vae_export.load(member("spatial-named").bundle, device="cpu", build=False) as vae:
        assert "data (B, 3, height, width), latent (B, 4, height/4, width/4), float32" in repr(vae)


def test_of_a_posterior(digits: dict[str, Path]) -> None:
    with vae_export.load(digits["bernoulli"], device="cpu", build=False) as vae:
        assert repr(vae.encode(np.zeros((3, 1, 8, 8), np.float32))) == "Posterior(3 × (8,), Gaussian)"
    assert repr(Posterior(np.zeros((2, 4, 8, 8), np.float32), None)) == "Posterior(2 × (4, 8, 8), deterministic)"


def test_of_arrays_on_a_gpu() -> None:
    unused: Any = Untouched()
    assert repr(on_gpu(2, 5)) == "DeviceArray((2, 5), float32)"
    posterior = DevicePosterior(on_gpu(2, 5), on_gpu(2, 5), unused)
    assert repr(posterior) == "DevicePosterior(2 × (5,), Gaussian, on the GPU)"
    assert repr(DevicePosterior(on_gpu(1, 4, 2, 2), None, unused)) == (
        "DevicePosterior(1 × (4, 2, 2), deterministic, on the GPU)"
    )


def test_of_an_elbo(digits: dict[str, Path]) -> None:
    bound = Elbo(np.array([-3.5, -1.5]), np.array([-2.0, -1.0]), np.array([1.5, 0.5]))
    assert repr(bound) == "Elbo(2 examples, mean -2.5 = -1.5 − 1 nats)"
    with vae_export.load(digits["bernoulli"], device="cpu") as vae:
        large = repr(vae.elbo(np.zeros((1000, 1, 8, 8), np.float32)))
    assert re.fullmatch(r"Elbo\(1000 examples, mean -\d[\d.]* = -\d[\d.]* − \d[\d.]* nats\)", large)


@pytest.mark.parametrize(("tile", "text"), [(Tile(64), "Tile(size=64, overlap=0.25)"), (Settings(2), "Settings(thr")])
def test_of_settings(tile: object, text: str) -> None:
    assert repr(tile).startswith(text)


def test_of_an_opened_bundle(digits: dict[str, Path]) -> None:
    opened = open_bundle(Bundle(digits["bernoulli"]), device="cpu", build=False)
    pattern = r"Opened\(float32, the bundle's own graphs, onnxruntime [\d.]+, CPUExecutionProvider\)"
    assert re.fullmatch(pattern, repr(opened))
