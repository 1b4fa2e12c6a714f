"""Latents as latent diffusion works on them, against the arithmetic of diffusers' pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import rounding
import torch
import zoo
import zoo_diffusers

from vae_export.contract.bundle import Bundle
from vae_export.contract.model import Latent
from vae_export.errors import InputError
from vae_export.runtimes import VAE, DevicePosterior, Posterior, open_bundle

SHIFTED = {"scaling": 0.3611, "shift": 0.1159}
CHANNELS = {"scaling": 0.5, "mean": (0.5, -1.0, 0.25, 2.0), "std": (1.5, 0.5, 2.0, 3.0)}
SCALINGS = {"scaling": {"scaling": 0.18215}, "shift": SHIFTED, "channels": CHANNELS}


def scaled(bundle: Path, scaling: dict[str, Any], around: Any = lambda backend: backend) -> VAE:
    """A model whose manifest has another scaling, or none."""
    opened = Bundle(bundle)
    model = opened.manifest.model
    model = msgspec.structs.replace(model, latent=Latent(shape=model.latent.shape, **scaling))
    return VAE(model, around(open_bundle(opened).backend))


@pytest.fixture(scope="module")
def autoencoder(exported: Any) -> Path:
    bundle: Path = exported("kl-sd15")[0]
    return bundle


@pytest.fixture
def x() -> np.ndarray:
    return zoo.pictures(3, (3, 8, 12)) * 2 - 1


@pytest.mark.filterwarnings("ignore::vae_export.TileWarning")
@pytest.mark.parametrize("name", SCALINGS)
def test_as_pipelines_do(autoencoder: Path, x: np.ndarray, name: str) -> None:
    """What pipelines of diffusers compute between the autoencoder and the model that denoises."""
    vae, model = scaled(autoencoder, SCALINGS[name]), zoo_diffusers.model("kl-sd15")
    posterior = vae.encode(x)
    if name == "channels":
        mean, std = (torch.tensor(CHANNELS[key]).double().view(1, 4, 1, 1) for key in ("mean", "std"))
    else:
        mean = torch.tensor(SCALINGS[name].get("shift", 0.0))
        std = torch.tensor(1.0)
    scaling = SCALINGS[name]["scaling"]
    found = posterior.latent()
    assert (found.dtype, found.shape) == (np.float32, (3, 4, 4, 6))
    rounding.assert_near([found], lambda m, x: [(m.encode(x).latent_dist.mode() - mean) * scaling / std], model, x)
    decoded = vae.decode(found, scaled=True)
    rounding.assert_near([decoded], lambda m, z: [m.decode(z * std / scaling + mean).sample], model, found)
    assert np.abs(vae.decode(found) - decoded).max() > 1e-3
    tiled = vae.decode(found, scaled=True, tile=8)
    rounding.assert_near([tiled], lambda m, z: [_tiled(m, z * std / scaling + mean)], model, found)


def _tiled(model: Any, z: torch.Tensor) -> torch.Tensor:
    """In tiles of 8 pixels, as diffusers cuts them."""
    model.tile_sample_min_size, model.tile_latent_min_size, model.tile_overlap_factor = 8, 4, 0.25
    decoded: torch.Tensor = model.tiled_decode(z).sample
    return decoded


@pytest.mark.parametrize("name", SCALINGS)
def test_draws(autoencoder: Path, x: np.ndarray, name: str) -> None:
    vae = scaled(autoencoder, SCALINGS[name])
    posterior = vae.encode(x)
    drawn = vae.decode(posterior.latent(7, 100), scaled=True)
    model = zoo_diffusers.model("kl-sd15")
    rounding.assert_near([drawn], lambda m, z: [m.decode(z).sample], model, posterior.sample(7, 100))
    np.testing.assert_array_equal(posterior.latent(7, 100)[1:], vae.encode(x[1:]).latent(7, 101))
    assert np.abs(posterior.latent(0) - posterior.latent()).max() > 1e-2  # a seed of 0 is a seed


def test_flat_latents_of_a_deterministic_encoder(member: Any) -> None:
    vae = scaled(member("plain").bundle, {"scaling": 2.0, "mean": (1.0, 2.0, 3.0), "std": (0.5, 1.0, 4.0)})
    posterior = vae.encode(zoo.pictures(2, (12,)))
    np.testing.assert_allclose(posterior.latent(), (posterior.mean - [1, 2, 3]) * 2 / [0.5, 1, 4], rtol=1e-6)
    np.testing.assert_allclose(vae.decode(posterior.latent(), scaled=True), vae.decode(posterior.mean), rtol=1e-5)
    with pytest.raises(InputError, match="this model's encoder is deterministic"):
        posterior.latent(0)


def test_a_model_without_a_scaling(autoencoder: Path, x: np.ndarray) -> None:
    vae = scaled(autoencoder, {})
    posterior = vae.encode(x)
    for each in (posterior, Posterior(posterior.mean, posterior.logvar)):
        with pytest.raises(
            InputError, match=r"latent: this model's manifest names no scaling .* Use sample\(\) or mode"
        ):
            each.latent()
    with pytest.raises(InputError, match=r"decode: this model's manifest names no scaling of latents. Drop scaled"):
        vae.decode(posterior.mean, scaled=True)
    assert "latent_scaling" not in vae.describe()


def test_latents_that_scaling_takes_too_far(autoencoder: Path) -> None:
    z = np.full((1, 4, 4, 6), 3e38, np.float32)
    with pytest.raises(InputError, match=r"decode: z\[0, 0, 0, 0\] is inf"):
        scaled(autoencoder, SHIFTED).decode(z, scaled=True)
    with pytest.raises(InputError, match=r"decode: z has dtype float64"):
        scaled(autoencoder, SHIFTED).decode(z.astype(np.float64), scaled=True)


def test_what_lies_on_a_gpu_is_not_scaled(autoencoder: Path, x: np.ndarray) -> None:
    class OnGpu:
        """A backend that claims to run on a GPU."""

        on_gpu = True

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    class There:
        """An array that claims to be on a GPU."""

        shape, dtype = (3, 4, 4, 6), "float32"

        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def numpy(self) -> np.ndarray:
            return self.array

    vae = scaled(autoencoder, SHIFTED, OnGpu)
    host = vae.encode(x)
    there = DevicePosterior(There(host.mean), There(host.logvar), vae._backend, vae.model.latent)
    with pytest.raises(InputError, match=r"latent: is computed on the host. Take numpy\(\) first: posterior.numpy\(\)"):
        there.latent()
    np.testing.assert_array_equal(there.numpy().latent(3), host.latent(3))
    with pytest.raises(
        InputError, match=r"decode: z lies on a GPU, and scaled is done on the host. Pass a NumPy array"
    ):
        vae.decode(There(host.mean), scaled=True)


def test_described(autoencoder: Path) -> None:
    assert scaled(autoencoder, SHIFTED).describe()["latent_scaling"] == SHIFTED
    found = scaled(autoencoder, CHANNELS).describe()["latent_scaling"]
    assert found == {"scaling": 0.5, "mean": [0.5, -1.0, 0.25, 2.0], "std": [1.5, 0.5, 2.0, 3.0]}
