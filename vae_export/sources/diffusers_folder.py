"""A trained autoencoder in the layout of diffusers as a source: a folder, or one file of weights with its config.

Nothing is downloaded, and no pickle is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from torch import Tensor, nn

from vae_export.contract.manifest import Origin
from vae_export.contract.model import EXAMPLE_SIZE, Data, Latent, LatentDim, Likelihood, Model, Posterior, SizeDim
from vae_export.errors import InputError, require
from vae_export.sources.module import checked_rows
from vae_export.sources.protocol import Trained

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('{name}', weights_only=True, map_location='cpu'), '{stem}.safetensors')\""
)

#: The range of the data that all of them are trained on.
_RANGE = (-1.0, 1.0)
#: To which diffusers' DiagonalGaussianDistribution clamps the log-variance.
_LOGVAR_CLAMP = (-30.0, 20.0)
#: Largest deviation between the forms of AutoencoderDC's attention, relative to max|reference|: sums may be near 0.
_ATTENTION_TOLERANCE = 1e-3
#: Classes that are no autoencoders of pictures with a Gaussian or no posterior, and why.
_REFUSED = {
    "VQModel": "its latents are discrete",
    "ConsistencyDecoderVAE": "its decoder draws random numbers",
}
_VIDEO = re.compile(
    r"Autoencoder(KL)?(Wan|HunyuanVideo|CogVideoX|LTX\w*|Mochi|Magvit|Cosmos|QwenImage|TemporalDecoder)"
)
#: Names of the middle attention's weights: in older files, and today.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def is_diffusers(path: Path) -> bool:
    """Whether `path` is a folder in this layout, or has one in `vae/`, or is a file of weights."""
    return path.suffix == ".safetensors" or any("_class_name" in _config_of(p) for p in (path, path / "vae"))


def load(
    path: Path,
    *,
    config: Path | None = None,
    size: Mapping[str, int] | None = None,
    held_out: npt.NDArray[np.float32] | None = None,
) -> Trained:
    """Read an autoencoder: AutoencoderKL, AutoencoderTiny, AutoencoderDC or AsymmetricAutoencoderKL.

    Weights of lower precision are widened to float32: what is exported and certified computes in float32.

    Args:
        path: the folder, one that has it in `vae/`, or a `.safetensors` file.
        config: its `config.json`, where that is not beside the weights.
        size: height and width to trace and to verify at, in pixels; None: 64 × 64, or twice the stride if that is more.
        held_out: (M, 3, height, width) float32 pictures in [−1, 1] of that size, for the certificate.

    Raises:
        InputError: there is no such autoencoder, its weights are pickled, missing or do not fit, or the model does not
            take the size.
        BackendError: diffusers is not installed.
    """
    folder, settings = _settings(path, config)
    kind = str(settings["_class_name"])
    _check_class(folder, kind)
    library = require("diffusers", "diffusers", "export")
    files = [path] if path.is_file() else _weight_files(folder)
    module = _from_config(getattr(library, kind), settings, folder)
    _load_weights(module, files, folder)
    settings = {**dict(module.config), **settings}  # with the defaults of missing keys
    adapted = _FAMILIES[kind](module)
    stride, channels = adapted.stride, int(settings["in_channels"])
    example = {name: max(EXAMPLE_SIZE, 2 * stride) for name in ("height", "width")} | dict(size or {})
    model = Model(
        architecture=kind,
        parameters=sum(p.numel() for p in module.parameters()),
        data=Data(
            shape=(channels, *(SizeDim(name=name, multiple_of=stride, min=stride) for name in ("height", "width"))),
            range=_RANGE,
        ),
        latent=_latent(settings, stride, folder),
        prior="standard_normal",
        posterior=Posterior(kind=adapted.posterior, logvar_clamp=adapted.logvar_clamp),
        likelihood=adapted.likelihood,
        force_upcast=bool(settings.get("force_upcast", False)) and kind == "AutoencoderKL",
    )
    model.latent_shape(example)  # refuses a size that the model does not take
    return Trained(
        module=adapted.eval(),
        model=model,
        origin=Origin(kind="diffusers", name=path.resolve().name, weights_sha256=_digest(files)),
        config=json.dumps({k: v for k, v in settings.items() if k != "_use_default_values"}, indent=2).encode() + b"\n",
        example_shape=(channels, example["height"], example["width"]),
        held_out=None if held_out is None else checked_rows("held_out", held_out, _RANGE),
    )


class _Family(nn.Module):
    """A class of diffusers under the protocol."""

    posterior: Any = "deterministic"
    widths = "block_out_channels"  # of the configuration: one a level
    logvar_clamp: tuple[float, float] | None = None
    likelihood = Likelihood(kind="none")

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    @property
    def stride(self) -> int:
        """Pixels per latent, along each side."""
        return int(2 ** (len(self.vae.config[self.widths]) - 1))

    def encode(self, x: Tensor) -> Any:
        """(B, C, H, W) → (B, c, h, w), one or two."""
        return self.vae.encode(x).latents

    def decode(self, z: Tensor) -> Any:
        """(B, c, h, w) → (B, C, H, W)."""
        return self.vae.decode(z).sample


class _Gaussian(_Family):
    """AutoencoderKL and AsymmetricAutoencoderKL. They are trained with a perceptual and an adversarial loss beside the
    squared error, so the unit variance is a convention.
    """

    posterior = "diagonal_gaussian"
    logvar_clamp = _LOGVAR_CLAMP
    likelihood = Likelihood(kind="gaussian_fixed", variance=1.0, nominal=True)

    def encode(self, x: Tensor) -> Any:
        posterior = self.vae.encode(x).latent_dist
        return posterior.mean, posterior.logvar


class _Asymmetric(_Gaussian):
    widths = "down_block_out_channels"


class _Tiny(_Family):
    widths = "encoder_block_out_channels"


class _DeepCompression(_Family):
    """AutoencoderDC, whose attention has another form for small images: see `_LinearAttention`.

    Attention leaves channels last in memory. Where PyTorch then halves or doubles a picture by a view, it guards on the
    sizes that need a copy, and a trace would hold for these sizes alone; with contiguous inputs none needs one.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        library = require("diffusers", "diffusers", "export")
        processor = library.models.attention_processor.SanaMultiscaleAttnProcessor2_0
        blocks = library.models.autoencoders.autoencoder_dc
        for name, part in vae.named_modules():
            if isinstance(getattr(part, "processor", None), processor):
                _check_linear(name, part)
                part.processor = _LinearAttention()
            elif isinstance(part, (blocks.DCDownBlock2d, blocks.DCUpBlock2d)):
                part.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())

    @property
    def stride(self) -> int:
        return int(self.vae.spatial_compression_ratio)

    def encode(self, x: Tensor) -> Any:
        return self.vae.encode(x).latent


class _LinearAttention:
    """The attention of AutoencoderDC in its linear form, v (kᵀ q) as (v kᵀ) q, at every size.

    diffusers uses the quadratic form where height · width ≤ attention_head_dim. In exact arithmetic both are equal, the
    epsilon in the divisor included; a graph can hold one of them, and the memory of the quadratic form grows with the
    square of the number of pixels.
    """

    def __call__(self, attention: Any, hidden_states: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W), as diffusers' SanaMultiscaleAttnProcessor2_0, in the input's dtype."""
        x = hidden_states
        batch, _, height, width = x.shape
        last = x.movedim(1, -1)
        projected = torch.cat([attention.to_q(last), attention.to_k(last), attention.to_v(last)], dim=3).movedim(-1, 1)
        scales = torch.cat([projected, *(block(projected) for block in attention.to_qkv_multiscale)], dim=1)
        heads = scales.reshape(batch, -1, 3 * attention.attention_head_dim, height * width)
        query, key, value = heads.chunk(3, dim=2)
        query, key = attention.nonlinearity(query), attention.nonlinearity(key)
        sums = nn.functional.pad(value, (0, 0, 0, 1), value=1.0) @ key.transpose(-1, -2) @ query
        attended = (sums[:, :, :-1] / (sums[:, :, -1:] + attention.eps)).reshape(batch, -1, height, width)
        result: Tensor = attention.to_out(attended.movedim(1, -1))
        if attention.norm_type == "rms_norm":
            result = attention.norm_out(result).movedim(-1, 1)
        else:
            result = attention.norm_out(result.movedim(-1, 1))
        return result + x if attention.residual_connection else result


def _check_linear(name: str, attention: Any) -> None:
    """Compare the linear form with the installed diffusers, at sizes on both sides of its switch.

    Raises:
        InputError: they differ.
    """
    channels = attention.to_q.in_features
    with torch.no_grad():
        for side in (1, math.isqrt(attention.attention_head_dim) + 1):
            x = torch.sin(torch.arange(channels * side * side, dtype=torch.float32)).reshape(1, channels, side, side)
            expected, linear = attention(x), _LinearAttention()(attention, x)
            if not (linear - expected).abs().max() <= _ATTENTION_TOLERANCE * expected.abs().max():
                raise InputError(
                    f"export: the installed diffusers computes {name} of AutoencoderDC differently from the versions "
                    "that are supported. Install the version that vae-export[diffusers] requires"
                )


_FAMILIES: Mapping[str, type[_Family]] = {
    "AutoencoderKL": _Gaussian,
    "AsymmetricAutoencoderKL": _Asymmetric,
    "AutoencoderTiny": _Tiny,
    "AutoencoderDC": _DeepCompression,
}


def _config_of(folder: Path) -> dict[str, Any]:
    """The folder's configuration; empty if there is none or it cannot be read."""
    try:
        value = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _settings(path: Path, config: Path | None) -> tuple[Path, dict[str, Any]]:
    """The folder that has the weights, and its configuration."""
    if path.is_file():
        file = config or path.parent / CONFIG
        if not file.is_file():
            raise InputError(
                f"export: {path} is a file of weights, and there is no {CONFIG} beside it. Pass the autoencoder's "
                "configuration with --config"
            )
        folder = path.parent
    else:
        folder = path if config or (path / CONFIG).is_file() else path / "vae"
        file = config or folder / CONFIG
    try:
        settings = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"export: {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"export: {file} is not JSON: {error}") from None
    if not isinstance(settings, dict) or "_class_name" not in settings:
        raise InputError(f"export: {file} has no _class_name; expected the configuration of a diffusers autoencoder")
    return folder, settings


def _check_class(folder: Path, kind: str) -> None:
    if kind in _FAMILIES:
        return
    reason = _REFUSED.get(kind) or ("it is for video, which is not supported" if _VIDEO.match(kind) else None)
    because = f": {reason}" if reason else ""
    raise InputError(f"export: {folder} is a {kind}{because}; expected {', '.join(_FAMILIES)}")


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights: one, or the shards of an index; those in full precision come before those in float16."""
    for suffix in ("", ".fp16"):
        index = folder / f"{WEIGHTS}.safetensors.index{suffix}.json"
        single = folder / f"{WEIGHTS}{suffix}.safetensors"
        if single.is_file():
            return [single]
        if index.is_file():
            return _shards(index)
    pickles = [p for p in sorted(folder.iterdir()) if p.suffix in _PICKLES] if folder.is_dir() else []
    if pickles:
        name, stem = pickles[0].name, pickles[0].stem
        raise InputError(
            f"export: {pickles[0]} is a pickle, which can run any code when it is read, so it is refused. If you "
            f"trust it, convert it in its folder: {_CONVERT.format(name=name, stem=stem)}"
        )
    raise InputError(
        f"export: {folder} has no {WEIGHTS}.safetensors, no index of its parts, and no .fp16 variant of them"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"export: {index} is no index of weights: expected a weight_map of names to files") from None
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise InputError(f"export: {index} names {outside[0]!r}; expected files of its own folder")
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"export: {index.parent} lacks {', '.join(missing)}, which its index names")
    return files


def _from_config(kind: Any, settings: Mapping[str, Any], folder: Path) -> Any:
    try:
        module = kind.from_config({k: v for k, v in settings.items() if not k.startswith("_")})
    except Exception as error:  # what diffusers' layers raise for a wrong configuration
        raise InputError(
            f"export: diffusers cannot make a {kind.__name__} from {folder / CONFIG}: {type(error).__name__}: {error}"
        ) from None
    return module.float().eval()


def _load_weights(module: nn.Module, files: list[Path], folder: Path) -> None:
    """Load every weight of the model from the files."""
    state, missing = module.state_dict(), set(module.state_dict())
    with torch.no_grad():
        for name, value in _tensors(files):
            name = _current_name(name)
            if name not in state:
                raise InputError(
                    f"export: {folder}: the weights have {name}, which the model of its {CONFIG} does not have"
                )
            target = state[name]
            if value.numel() != target.numel() or (value.shape != target.shape and value.squeeze().ndim != target.ndim):
                raise InputError(
                    f"export: {folder}: {name} has shape {tuple(value.shape)}; the model of its {CONFIG} has "
                    f"{tuple(target.shape)}"
                )
            target.copy_(value.reshape(target.shape))
            missing.discard(name)
    if missing:
        raise InputError(
            f"export: {folder}: the weights lack {len(missing)} of the model's {len(state)} tensors, such as "
            f"{min(missing)}"
        )


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 — not a mapping
                    yield name, opened.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise InputError(f"export: {file} is not a safetensors file: {error}") from None


def _current_name(name: str) -> str:
    parts = name.rsplit(".", 2)
    if len(parts) == 3 and ".attentions." in name and parts[1] in _OLD_NAMES:
        parts[1] = _OLD_NAMES[parts[1]]
    return ".".join(parts)


def _latent(settings: Mapping[str, Any], stride: int, folder: Path) -> Latent:
    shape = (
        int(settings["latent_channels"]),
        LatentDim(name="height", divided_by=stride),
        LatentDim(name="width", divided_by=stride),
    )
    per_channel = {
        name: tuple(float(value) for value in settings[key]) if settings.get(key) else None
        for name, key in (("mean", "latents_mean"), ("std", "latents_std"))
    }
    try:
        return Latent(
            shape=shape,
            scaling=float(settings.get("scaling_factor") or 1.0),
            shift=float(settings.get("shift_factor") or 0.0),
            **per_channel,
        )
    except ValueError as error:
        raise InputError(f"export: {folder / CONFIG}: {error}") from None


def _digest(files: list[Path]) -> str:
    """SHA-256 of the concatenated files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while piece := opened.read(16 << 20):
                digest.update(piece)
    return digest.hexdigest()
