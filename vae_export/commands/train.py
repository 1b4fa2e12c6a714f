"""The command line's `train`: its many options, each a field of a record in `trainers.config`."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vae_export.commands import terminal
from vae_export.commands.options import interval, numbers
from vae_export.errors import TRAIN_NEEDS, require


class ModelName(enum.StrEnum):
    """What is trained."""

    linear = "linear"
    mlp = "mlp"
    conv = "conv"
    resnet = "resnet"


class LikelihoodName(enum.StrEnum):
    """p(x|z)."""

    bernoulli = "bernoulli"
    gaussian = "gaussian"
    gaussian_fixed = "gaussian_fixed"
    discretized_logistic = "discretized_logistic"
    none = "none"


class ObjectiveName(enum.StrEnum):
    """What is maximized."""

    elbo = "elbo"
    elbo_monte_carlo = "elbo_monte_carlo"
    importance_weighted = "importance_weighted"
    autoencoder = "autoencoder"


class Binarization(enum.StrEnum):
    """Whether values become 0 or 1, and how often they are drawn."""

    none = "none"
    static = "static"
    dynamic = "dynamic"


class Keep(enum.StrEnum):
    """Which weights are the result."""

    best = "best"
    last = "last"


class Accelerator(enum.StrEnum):
    """Where training runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Precision(enum.StrEnum):
    """Its arithmetic, by Lightning Fabric's names."""

    full = "32-true"
    bfloat16 = "bf16-mixed"
    float16 = "16-mixed"


def _option(help: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


_MODEL, _DATA, _TRAINING, _OBJECTIVE = "Model", "Data", "Training", "Objective"
_DATA_HELP = "digits, photos, mnist:DIR, fashion:DIR, cifar10:DIR, images:DIR, array:FILE.npy, array:FILE.npz:KEY."


def train(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The run's folder.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in OUT where it was, bit for bit.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run in OUT.")] = False,
    model: Annotated[ModelName | None, _option("What to train: conv if nothing is said.", _MODEL)] = None,
    likelihood: Annotated[LikelihoodName | None, _option("p(x|z).", _MODEL)] = None,
    variance: Annotated[float | None, _option("Of gaussian_fixed; learned if nothing is said.", _MODEL)] = None,
    latent: Annotated[int | None, _option("Latent dimensions; resnet: channels.", _MODEL)] = None,
    widths: Annotated[
        str | None, _option("mlp: units of each hidden layer; conv, resnet: channels at each level.", _MODEL)
    ] = None,
    blocks: Annotated[int | None, _option("resnet: residual blocks at each level.", _MODEL)] = None,
    attention: Annotated[bool | None, _option("resnet: self-attention in the middle.", _MODEL)] = None,
    data: Annotated[str | None, _option(_DATA_HELP, _DATA)] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch mnist, fashion or cifar10 into DIR.", rich_help_panel=_DATA)
    ] = False,
    size: Annotated[str | None, _option("images, photos: pixels, such as 64 or 48x64.", _DATA)] = None,
    channels: Annotated[int | None, _option("images: 1 (grey) or 3 (colour).", _DATA)] = None,
    range: Annotated[str | None, _option("Of the values, such as -1,1; 0,1 if nothing is said.", _DATA)] = None,
    validation: Annotated[float | None, _option("Share that chooses the best weights.", _DATA)] = None,
    test: Annotated[float | None, _option("Share held out to the end, if there is no test set.", _DATA)] = None,
    binarize: Annotated[Binarization | None, _option("Make each value 0 or 1 with its own probability.", _DATA)] = None,
    dequantize: Annotated[bool | None, _option("Add uniform noise of one level's width.", _DATA)] = None,
    flip: Annotated[bool | None, _option("Mirror half of the training pictures.", _DATA)] = None,
    objective: Annotated[ObjectiveName | None, _option("What to maximize.", _OBJECTIVE)] = None,
    draws: Annotated[int | None, _option("From the posterior, for each example and step.", _OBJECTIVE)] = None,
    beta: Annotated[float | None, _option("Weight of the KL.", _OBJECTIVE)] = None,
    kl_warmup: Annotated[int | None, _option("Epochs in which it rises from 0.", _OBJECTIVE)] = None,
    free_bits: Annotated[float | None, _option("Nats of each latent dimension that cost nothing.", _OBJECTIVE)] = None,
    seed: Annotated[int | None, _option("Of split, weights, order and noise.", _TRAINING)] = None,
    epochs: Annotated[int | None, _option("Passes over the data.", _TRAINING)] = None,
    batch_size: Annotated[int | None, _option("Examples in a step of one process.", _TRAINING)] = None,
    learning_rate: Annotated[float | None, _option("Its peak.", _TRAINING)] = None,
    warmup: Annotated[int | None, _option("Steps in which it rises.", _TRAINING)] = None,
    weight_decay: Annotated[float | None, _option("Of AdamW.", _TRAINING)] = None,
    gradient_clip: Annotated[float | None, _option("The gradient's largest norm.", _TRAINING)] = None,
    ema: Annotated[float | None, _option("Decay of the averaged weights; 0 for the last ones.", _TRAINING)] = None,
    keep: Annotated[
        Keep | None, _option("Weights that are the result: best on validation, or last.", _TRAINING)
    ] = None,
    patience: Annotated[int | None, _option("Epochs without a better validation ELBO, then stop.", _TRAINING)] = None,
    importance_draws: Annotated[int | None, _option("K of the final importance-weighted bound.", _TRAINING)] = None,
    device: Annotated[Accelerator | None, _option("Where to train.", _TRAINING)] = None,
    precision: Annotated[Precision | None, _option("Of the arithmetic.", _TRAINING)] = None,
    compile: Annotated[bool | None, _option("Use torch.compile.", _TRAINING)] = None,
) -> None:
    """Train a VAE, and leave a checkpoint, figures and pictures. Defaults depend on the model: docs/training.md."""
    given = {name: value for name, value in locals().items() if value is not None}
    given = {name: value.value if isinstance(value, enum.Enum) else value for name, value in given.items()}
    for module, extra in TRAIN_NEEDS:
        require(module, extra, "train")
    from vae_export.trainers import config as configs
    from vae_export.trainers.fit import fit

    if "widths" in given:
        given["widths"] = numbers("train: widths", given["widths"])
    if "size" in given:
        sides = numbers("train: sides", given["size"], "x")
        given["size"] = sides * 2 if len(sides) == 1 else sides
    if "range" in given:
        given["range"] = interval("train", given["range"])
    if "data" in given:
        given["spec"] = given.pop("data")
    if given.get("objective") == "autoencoder":
        given["posterior"] = "deterministic"
    recorded = None
    if resume and (out / configs.CONFIG).is_file():
        recorded = configs.read_config(out)
    if recorded:
        for part in ("model", "data", "train"):
            before = getattr(recorded, part)
            configs.check_fields(out, part, before, _fields(given, type(before)))
    name = given.pop("model", recorded.model.model if recorded else "conv")

    def described(shape: tuple[int, int, int], values: tuple[float, float]) -> configs.ModelConfig:
        found = {"data_shape": shape, "data_range": values, **_fields(given, configs.ModelConfig)}
        return configs.model_config(name, **_over(recorded and recorded.model, found))

    result = fit(
        out,
        described,
        configs.train_config(name, **_over(recorded and recorded.train, _fields(given, configs.TrainConfig))),
        configs.DataConfig(**_over(recorded and recorded.data, _fields(given, configs.DataConfig))),
        overwrite=force,
        resume=resume,
        download=download,
    )
    if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun starts, the first one speaks
        return
    figures = {
        "test ELBO {:.2f} nats": result.elbo,
        "reconstruction {:.2f}": result.reconstruction,
        "KL {:.2f}": result.kl,
        "log p(x) at least {:.2f}": result.log_likelihood,
        "{:.3f} bits per dimension": result.bits_per_dimension,
        "{} active latents": result.active_units,
        "squared error {:.4g}": result.squared_error,
    }
    terminal.say(f"{out}: " + ", ".join(form.format(value) for form, value in figures.items() if value is not None))


def _fields(given: Mapping[str, Any], record: Any) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in record.__struct_fields__}


def _over(recorded: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What a run that goes on was begun with, and what is said now, which `fit` compares with it."""
    if recorded is None:
        return given
    return {name: getattr(recorded, name) for name in recorded.__struct_fields__ if name != "model"} | given
