"""A checkpoint of our own trainer as a source."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vae_export.errors import BackendError
from vae_export.manifest import Data, Latent, Likelihood, Model, Origin, Posterior
from vae_export.sources.protocol import Source
from vae_export.trainers import checkpoint, data
from vae_export.trainers import config as configs


def load(path: Path) -> Source:
    """Read a checkpoint, and its data set again for held-out examples, where that can still be had.

    Raises:
        InputError: there is no checkpoint at `path`, or its files do not fit each other.
    """
    config, module = checkpoint.read(path)
    try:
        dataset = data.load(config.train.data, config.train.seed)
    except BackendError:  # the package that has it is not on this machine: the certificate will say so
        dataset = None
    gaussian = config.model.likelihood == "gaussian"
    return Source(
        module=module,
        model=Model(
            architecture=config.model.model,
            parameters=sum(p.numel() for p in module.parameters()),
            data=Data(shape=config.model.data_shape, range=config.model.data_range),
            latent=Latent(shape=(config.model.latent,)),
            prior="standard_normal",
            posterior=Posterior(kind="diagonal_gaussian", logvar_clamp=config.model.logvar_clamp),
            likelihood=Likelihood(
                kind=config.model.likelihood,
                logvar_clamp=config.model.sample_logvar_clamp if gaussian else None,
            ),
        ),
        origin=Origin(
            kind="checkpoint",
            name=path.resolve().name,
            weights_sha256=hashlib.sha256((path / configs.WEIGHTS).read_bytes()).hexdigest(),
            data=dataset.name if dataset else config.train.data,
        ),
        config=configs.encode(config),
        example_shape=config.model.data_shape,
        held_out=dataset.held_out if dataset else None,
        calibration=dataset.train if dataset else None,
    )
