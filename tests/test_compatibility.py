"""Bundles and builds of version 0.5.0, with what it computed: they open, and give the same results.

`data/v0.5.0/make.py` wrote them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rounding

import vae_export
from vae_export.numerics import noise
from vae_export.runtimes import processor

DATA = Path(__file__).parent / "data" / "v0.5.0"
SEED = 7
RUNS = [("flat", "bundle"), ("flat", "fp32"), ("flat", "int8"), ("spatial", "bundle"), ("spatial", "fp32")]
SIZES = {"flat": None, "spatial": {"height": 8, "width": 8}}


def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", ["flat", "spatial"])
def test_bundles_open(name: str) -> None:
    bundle = vae_export.Bundle(DATA / f"{name}.bundle")
    bundle.check()
    assert bundle.manifest.tools["vae-export"] == "0.5.0"
    assert bundle.manifest.name == name


@pytest.mark.parametrize("name", ["flat", "spatial"])
def test_noise_is_the_same_bits(name: str) -> None:
    old = recorded(name)
    for key, stream in (("z", noise.PRIOR), ("eps", noise.POSTERIOR)):
        rows = old[key].reshape(len(old[key]), -1)
        np.testing.assert_array_equal(noise.normals(SEED, stream, 0, *rows.shape).reshape(rows.shape), rows)


@pytest.mark.parametrize(("name", "runner"), RUNS)
def test_results_are_the_same(name: str, runner: str) -> None:
    """Within what rounding explains; those in 8 bits within what 8 bits cost, as a rounded value may be another one."""
    if runner == "int8" and "vnni" not in processor.features():
        pytest.skip(f"builds of 0.5.0 in 8 bits need VNNI, which {processor.processor().model} lacks")
    old = recorded(name)
    build = False if runner == "bundle" else DATA / f"{name}.{runner}.build"
    with vae_export.load(DATA / f"{name}.bundle", build=build, device="cpu") as vae:
        posterior, elbo = vae.encode(old["x"]), vae.elbo(old["x"], seed=SEED)
        results = {
            "mean": posterior.mean,
            "logvar": posterior.logvar,
            "decode": vae.decode(old["z"]),
            "sample": vae.sample(len(old["z"]), seed=SEED, size=SIZES[name]),
            **elbo._asdict(),
        }
    for key, result in results.items():
        expected = old[f"{runner}.{key}"]
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
        error = np.abs(result - expected)
        worst, rms = rounding.MULTIPLE * old[f"moved.{key}"]
        if runner == "int8":
            cost = np.abs(expected - old[f"bundle.{key}"])
            worst, rms = cost.max(), np.sqrt(np.mean(cost**2))
        assert error.max() <= worst, key
        assert np.sqrt(np.mean(error**2)) <= rms, key


@pytest.mark.parametrize(
    "verb",
    [
        vae_export.verify,
        functools.partial(vae_export.verify, build=DATA / "flat.fp32.build"),
        functools.partial(vae_export.build, target="cpu", seconds=0.01),
    ],
)
def test_what_needs_a_new_export(verb: Callable[[Path], object]) -> None:
    """Golden examples of 0.5.0 do not have what tolerances are computed from."""
    with pytest.raises(vae_export.BundleError, match=r"^flat: .*before (version )?0\.6.*Export the model again"):
        verb(DATA / "flat.bundle")
