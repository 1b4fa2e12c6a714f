"""Write bundles and builds with version 0.5.0 (commit 983dc88), and what it computes with them.

With version 0.5.0 installed, its `tests` and then these `tests` on PYTHONPATH:

    python tests/data/v0.5.0/make.py FOLDER

For each model, MODEL.bundle, its builds MODEL.PRECISION.build, and MODEL.npz with the inputs, the results by runner and
name, and for each name how far float32's rounding moves it (see `rounding`): the worst and the root mean square.
"""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import rounding
import zoo

import vae_export
from vae_export import noise, tuning
from vae_export.sources import reference
from vae_export.sources.protocol import Decoder, Encoder
from vae_export.trainers.objective import kl_terms, log_prob_of

ROWS = 3
SEED = 7
SOURCES = {
    "flat": zoo.trainer_model("mlp", "bernoulli", widths=(16,)),
    "spatial": dataclasses.replace(zoo.spatial(named=True), example_shape=(3, 8, 8)),
}
PRECISIONS = {"flat": ("fp32", "int8"), "spatial": ("fp32",)}


def inputs(source):
    """Data, latents from the prior, and the noise of the posterior."""
    low, high = source.model.data.range
    latent = source.model.latent_shape(source.sizes())
    z, eps = (
        noise.normals(SEED, stream, 0, ROWS, math.prod(latent)).reshape(-1, *latent)
        for stream in (noise.PRIOR, noise.POSTERIOR)
    )
    return {"x": low + (high - low) * zoo.pictures(ROWS, source.example_shape), "z": z, "eps": eps}


def results(vae, source, x, z):
    """What 0.5.0 computes."""
    posterior, elbo = vae.encode(x), vae.elbo(x, seed=SEED)
    return {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "decode": vae.decode(z),
        "sample": vae.sample(ROWS, seed=SEED, size=source.sizes() or None),
        "reconstruction": elbo.reconstruction,
        "kl": elbo.kl,
        "elbo": elbo.elbo,
    }


def moved(source, x, z, eps):
    """How far float32's rounding moves each result."""
    model = source.model
    log_prob = log_prob_of(model.likelihood, model.data)

    def bound(module, x, eps):
        mean, logvar = Encoder(module, model)(x)
        parameters = Decoder(module, model)(mean + (0.5 * logvar).exp() * eps)
        reconstruction = log_prob(x, tuple(parameters)).flatten(1).sum(1)
        kl = kl_terms(mean, logvar).flatten(1).sum(1)
        return [reconstruction, kl, reconstruction - kl]

    spreads = {}
    for names, function, arrays in (
        (("mean", "logvar"), lambda m, x: Encoder(m, model)(x), (x,)),
        (("decode",), lambda m, z: Decoder(m, model)(z)[:1], (z,)),
        (("reconstruction", "kl", "elbo"), bound, (x, eps)),
    ):
        spreads |= dict(zip(names, rounding.exact(function, source.module, *arrays)[1], strict=True))
    spreads["sample"] = spreads["decode"]
    return {name: [spread.max(), np.sqrt(np.mean(spread**2))] for name, spread in spreads.items()}


def main(folder):
    """Two small models: one of vectors as latents, and one of pictures of any size."""
    reference._ROWS = 8
    tuning.SECONDS, tuning.WORTH = 0.01, float("inf")  # fused graphs are there whether they are fast or not
    for name, source in SOURCES.items():
        bundle = folder / f"{name}.bundle"
        vae_export.export(source, bundle)
        builds = {"bundle": None}
        for precision in PRECISIONS[name]:
            builds[precision] = folder / f"{name}.{precision}.build"
            vae_export.build(bundle, "cpu", precision=precision, out=builds[precision], batches=(ROWS,))
        arrays = inputs(source)
        record = dict(arrays)
        for runner, build in builds.items():
            with vae_export.load(bundle, build=build, device="cpu") as vae:
                found = results(vae, source, arrays["x"], arrays["z"])
            record |= {f"{runner}.{key}": value for key, value in found.items()}
        record |= {f"moved.{key}": value for key, value in moved(source, **arrays).items()}
        np.savez_compressed(folder / f"{name}.npz", **record)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
