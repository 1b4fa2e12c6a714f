"""A checkpoint of our own trainer as a source."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vae_export.contract.manifest import Origin
from vae_export.contract.model import Data, Latent, Model, Posterior
from vae_export.errors import BackendError, InputError
from vae_export.sources.protocol import Trained, Training
from vae_export.trainers import checkpoint, datasets
from vae_export.trainers import config as configs
from vae_export.trainers.config import is_checkpoint as is_checkpoint

_ROWS = 1024


def load(path: Path) -> Trained:
    """Read a checkpoint, and its data set for held-out examples, where that is still available and unchanged.

    Raises:
        InputError: there is no checkpoint at `path`, or its files do not fit each other.
    """
    config, module = checkpoint.read(path)
    dataset: datasets.Dataset | None
    try:
        dataset = datasets.load(config.data, config.train.seed)
        if config.model.likelihood == "discretized_logistic":
            dataset = dataset.quantized()
        if config.split and dataset.split.fingerprint != config.split.fingerprint:
            dataset = None  # it has changed: rows held out now may have been trained on
    except (BackendError, InputError):  # the data are not on this machine: the certificate records that
        dataset = None
    clamp = config.model.logvar_clamp if config.model.posterior == "diagonal_gaussian" else None
    return Trained(
        module=module,
        model=Model(
            architecture=config.model.model,
            parameters=sum(p.numel() for p in module.parameters()),
            data=Data(shape=config.model.data_shape, range=config.model.data_range),
            latent=Latent(shape=config.model.latent_shape),
            prior="standard_normal",
            posterior=Posterior(kind=config.model.posterior, logvar_clamp=clamp),
            likelihood=module.likelihood(),
        ),
        origin=Origin(
            kind="checkpoint",
            name=path.resolve().name,
            weights_sha256=hashlib.sha256((path / configs.WEIGHTS).read_bytes()).hexdigest(),
            data=dataset.name if dataset else config.data.spec,
        ),
        config=configs.encode(config),
        example_shape=config.model.data_shape,
        held_out=_rows(dataset.test) if dataset else None,
        calibration=_rows(dataset.train) if dataset else None,
        training=_training(path, config),
    )


def _training(path: Path, config: configs.CheckpointConfig) -> Training | None:
    """Figures and pictures of the run."""
    result = config.result
    if result is None:
        return None
    latents = math.prod(config.model.latent_shape)
    figures = {
        "test ELBO": (result.elbo, "{:.2f} nats"),
        "reconstruction, log p(x\\|z)": (result.reconstruction, "{:.2f} nats"),
        "KL": (result.kl, "{:.2f} nats"),
        f"log p(x), at least, with {config.train.importance_draws} draws": (result.log_likelihood, "{:.2f} nats"),
        "bits per dimension, at most": (result.bits_per_dimension, "{:.3f}"),
        "active latent dimensions": (result.active_units, f"{{}} of {latents}"),
        "squared error": (result.squared_error, "{:.4g}"),
        "epoch": (result.epoch, f"{{}} of {config.train.epochs}"),
    }
    pictures = {
        name: (caption, (path / checkpoint.PICTURES / name).read_bytes())
        for name, caption in checkpoint.CAPTIONS.items()
        if (path / checkpoint.PICTURES / name).is_file()
    }
    return Training(
        {what: form.format(value) for what, (value, form) in figures.items() if value is not None}, pictures
    )


def _rows(part: datasets.Subset) -> npt.NDArray[np.float32]:
    """The first rows, as many as an export can use."""
    return part.read(np.arange(min(len(part), _ROWS)))
