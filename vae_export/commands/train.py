"""The command line's `train`. Each of its options is a field of a record in `trainers.config`."""

import inspect
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from vae_export.commands import terminal
from vae_export.commands.options import interval, numbers
from vae_export.errors import TRAIN_NEEDS, require
from vae_export.trainers.choices import Binarization, Device, Kept, LikelihoodName, ModelName, ObjectiveName, Precision


class _Default(str):
    """The name of an option that formats as its default, read from the records only when the help is shown."""

    def __format__(self, spec: str) -> str:
        return default(str(self))


def _option(panel: str, help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=panel)


_model, _data, _objective, _training = (partial(_option, panel) for panel in ("Model", "Data", "Objective", "Training"))
_DATA_HELP = (
    "Data set: digits, photos, mnist:DIR, fashion:DIR, cifar10:DIR, images:DIR, array:FILE.npy or array:FILE.npz:KEY."
)
_WIDTHS_HELP = "Units of each hidden layer (mlp) or channels at each level (conv, resnet), such as 64,128."


def train(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the run.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in OUT from its last checkpoint, bit for bit.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run in OUT.")] = False,
    model: Annotated[ModelName | None, _model("Architecture of encoder and decoder.")] = None,
    likelihood: Annotated[LikelihoodName | None, _model("Likelihood p(x|z) of the data.")] = None,
    variance: Annotated[float | None, _model("Variance of a gaussian_fixed likelihood.")] = None,
    latent: Annotated[int | None, _model("Latent dimensions; for resnet, latent channels.")] = None,
    widths: Annotated[str | None, _model(_WIDTHS_HELP)] = None,
    blocks: Annotated[int | None, _model("Residual blocks at each level of resnet.")] = None,
    attention: Annotated[bool | None, _model("Self-attention in the middle of resnet.")] = None,
    data: Annotated[str | None, _data(_DATA_HELP)] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download mnist, fashion or cifar10 to DIR.", rich_help_panel="Data")
    ] = False,
    size: Annotated[str | None, _data("Height and width of pictures in pixels, such as 64 or 48x64.")] = None,
    channels: Annotated[int | None, _data("Channels of images: 1 (grey) or 3 (colour).")] = None,
    range: Annotated[str | None, _data("Smallest and largest value of the data, such as -1,1.")] = None,
    validation: Annotated[float | None, _data("Share of the training data for validation.")] = None,
    test: Annotated[float | None, _data("Share of the data for testing, if there is no test set.")] = None,
    binarize: Annotated[
        Binarization | None, _data("Draw values as 0 or 1: once (static), or at each step (dynamic).")
    ] = None,
    dequantize: Annotated[bool | None, _data("Add uniform noise of one level's width.")] = None,
    flip: Annotated[bool | None, _data("Mirror a random half of the training pictures.")] = None,
    objective: Annotated[
        ObjectiveName | None, _objective("Objective; autoencoder minimizes the squared error.")
    ] = None,
    draws: Annotated[int | None, _objective("Draws from the posterior for each example and step.")] = None,
    beta: Annotated[float | None, _objective("Weight of the KL.")] = None,
    kl_warmup: Annotated[int | None, _objective("Linear warm-up of the KL's weight from 0, in epochs.")] = None,
    free_bits: Annotated[float | None, _objective("KL of each latent dimension that costs nothing, in nats.")] = None,
    seed: Annotated[int | None, _training("Seed of split, initial weights, order and noise.")] = None,
    epochs: Annotated[int | None, _training("Passes over the training data.")] = None,
    batch_size: Annotated[int | None, _training("Examples in a step of one process.")] = None,
    learning_rate: Annotated[float | None, _training("Peak learning rate of AdamW.")] = None,
    warmup: Annotated[int | None, _training("Linear warm-up, in steps; at most a tenth of all.")] = None,
    weight_decay: Annotated[float | None, _training("Weight decay of AdamW.")] = None,
    gradient_clip: Annotated[float | None, _training("Largest norm of the gradient, in nats.")] = None,
    ema: Annotated[float | None, _training("Decay of the averaged weights; 0: no averaging.")] = None,
    keep: Annotated[Kept | None, _training("Weights to keep: the best on validation, or the last.")] = None,
    patience: Annotated[
        int | None, _training("Epochs without a better validation ELBO before stopping; 0: never.")
    ] = None,
    importance_draws: Annotated[int | None, _training("Draws (K) of the final importance-weighted bound.")] = None,
    device: Annotated[Device | None, _training("Device to train on.")] = None,
    precision: Annotated[Precision | None, _training("Precision of training; evaluation is in float32.")] = None,
    compile: Annotated[bool | None, _training("Compile the training step with torch.compile.")] = None,
) -> None:
    """Train a VAE, and write a run: checkpoint, figures and pictures."""
    given = {name: value for name, value in locals().items() if value is not None}
    for module, extra in TRAIN_NEEDS:
        require(module, extra, "train")
    from vae_export.trainers import checkpoint
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
    recorded = configs.read_config(out) if resume and (out / configs.CONFIG).is_file() else None
    if recorded:
        for section in ("model", "data", "train"):
            before = getattr(recorded, section)
            checkpoint.check_fields(out, section, before, _fields(given, type(before)))
    name = given.pop("model", recorded.model.model if recorded else "conv")

    def describe(shape: tuple[int, int, int], values: tuple[float, float]) -> configs.ModelConfig:
        fields = {"data_shape": shape, "data_range": values, **_fields(given, configs.ModelConfig)}
        return configs.model_config(name, **_over(recorded and recorded.model, fields))

    result = fit(
        out,
        describe,
        configs.train_config(name, **_over(recorded and recorded.train, _fields(given, configs.TrainConfig))),
        configs.DataConfig(**_over(recorded and recorded.data, _fields(given, configs.DataConfig))),
        overwrite=force,
        resume=resume,
        download=download,
    )
    if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun starts, only the first prints
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


for _name, _hint in inspect.get_annotations(train).items():
    for _info in getattr(_hint, "__metadata__", ()):
        if isinstance(_info, typer.models.OptionInfo) and inspect.signature(train).parameters[_name].default is None:
            _info.show_default = _Default(_name)


def default(option: str) -> str:
    """The default of an option in words: one for all models, or one for each."""
    from vae_export.trainers import config as configs

    other = {"model": "conv", "variance": "learned", "size": "64 for images, 16 for photos", "channels": "3"}
    if option in other:
        return other[option]
    field = {"data": "spec"}.get(option, option)
    models: dict[str, list[str]] = {}  # by the default
    for model in get_args(ModelName):
        records = configs.DataConfig(), configs.model_config(model, data_shape=(1, 1, 1)), configs.train_config(model)
        value = next(getattr(record, field) for record in records if hasattr(record, field))
        shown = ",".join(f"{item:g}" for item in value) if isinstance(value, tuple) else f"{value}"
        models.setdefault({"True": "on", "False": "off", "": "none"}.get(shown, shown), []).append(model)
    return next(iter(models)) if len(models) == 1 else "; ".join(f"{', '.join(m)}: {v}" for v, m in models.items())


def _fields(given: Mapping[str, Any], record: Any) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in record.__struct_fields__}


def _over(recorded: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of the resumed run's record, with the given ones, which `fit` compares with them."""
    if recorded is None:
        return given
    return {name: getattr(recorded, name) for name in recorded.__struct_fields__ if name != "model"} | given
