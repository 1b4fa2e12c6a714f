"""Small autoencoders of every family of diffusers, with deterministic weights, as folders on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import odd
import safetensors.torch
import torch
from torch import nn
from zoo import fill, pictures

from vae_export.numerics import noise

_KL: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 32,
}

#: The published kinds, small, chosen for their differences.
CONFIGS: dict[str, dict[str, Any]] = {
    "kl-sd15": _KL | {"scaling_factor": 0.18215},
    "kl-sdxl": _KL
    | {"scaling_factor": 0.13025, "force_upcast": True, "latents_mean": [-1.6, 2.2, 0.1, -0.2],
       "latents_std": [8.4, 5.6, 7.1, 4.5], "layers_per_block": 2},
    "kl-sd3": _KL
    | {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
       "use_post_quant_conv": False, "force_upcast": True},
    "kl-flux": _KL
    | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
       "use_post_quant_conv": False, "mid_block_add_attention": False, "block_out_channels": [8, 8, 16],
       "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
    "tiny": {
        "_class_name": "AutoencoderTiny", "encoder_block_out_channels": [8, 8, 8],
        "decoder_block_out_channels": [8, 8, 8], "num_encoder_blocks": [1, 1, 1], "num_decoder_blocks": [1, 1, 1],
    },
    "dc": {
        "_class_name": "AutoencoderDC", "latent_channels": 4, "attention_head_dim": 4,
        # Two, between which the picture is halved and doubled, as in the published ones.
        "encoder_block_types": ["EfficientViTBlock"] * 2, "decoder_block_types": ["EfficientViTBlock"] * 2,
        "encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8],
        "encoder_layers_per_block": [1, 1], "decoder_layers_per_block": [1, 1],
        "encoder_qkv_multiscales": [[], [5]], "decoder_qkv_multiscales": [[], [5]],
        "upsample_block_type": "interpolate", "downsample_block_type": "pixel_unshuffle",
        "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "scaling_factor": 0.41407,
    },
    "asymmetric": {
        "_class_name": "AsymmetricAutoencoderKL", "down_block_types": ["DownEncoderBlock2D"] * 2,
        "down_block_out_channels": [8, 16], "up_block_types": ["UpDecoderBlock2D"] * 2,
        "up_block_out_channels": [16, 16], "norm_num_groups": 4, "scaling_factor": 0.18215,
    },
}  # fmt: skip

_FULL_KL = _KL | {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
#: For benchmarks: the published configurations in full, of 84 million parameters each, one of their shape and a quarter
#: of their widths, the published tiny one, and more of the first's shape, named by their first width.
FULL: dict[str, dict[str, Any]] = {
    "kl-small": _FULL_KL | {"block_out_channels": [32, 64, 128, 128], "scaling_factor": 0.18215},
    "sd15": _FULL_KL | {"scaling_factor": 0.18215, "sample_size": 512},
    "sdxl": _FULL_KL | {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
    "flux": _FULL_KL
    | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
       "use_post_quant_conv": False, "sample_size": 1024, "force_upcast": True},
    "tiny-full": {"_class_name": "AutoencoderTiny"},
    **{f"kl-{width}": _FULL_KL | {"block_out_channels": [width, 2 * width, 4 * width, 4 * width],
       "norm_num_groups": 10, "scaling_factor": 0.18215} for width in (10, 20, 40, 80)},
}  # fmt: skip


ALL = CONFIGS | FULL | odd.CONFIGS


def model(name: str) -> nn.Module:
    """The model of a name in PyTorch."""
    config = ALL[name]
    return settle(getattr(diffusers, config["_class_name"]).from_config(config))


def settle(module: nn.Module) -> nn.Module:
    """Deterministic weights that keep latents and pictures in the range that a trained model gives them.

    Norms keep their weights near 1, as trained ones do; the last layers are scaled, by powers of 2, so that a smooth
    picture has latents, and unit latents have pictures, of a deviation near 1 and near ½.
    """
    fill(module)
    with torch.no_grad():
        for child in module.modules():
            if "Norm" in type(child).__name__:
                for parameter, value in ((child.weight, 1.0), (child.bias, 0.0)):
                    if parameter is not None:
                        parameter.mul_(0.1).add_(value)
        x = torch.from_numpy(pictures(2, (3, 32, 32))) * 2 - 1
        encoded = module.encode(x)
        latent = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded[0]
        _scale(_last(module.encoder), 1.0 / float(latent.std()))
        z = torch.from_numpy(noise.normals(0, 0, 0, 2, latent[0].numel()).reshape(latent.shape))
        _scale(_last(module.decoder), 0.5 / float(module.decode(z).sample.std()))
    return module


def _last(module: nn.Module) -> nn.Module:
    """The layer that gives the outputs."""
    return [child for child in module.modules() if isinstance(child, nn.Conv2d)][-1]


def _scale(layer: nn.Module, factor: float) -> None:
    for parameter in layer.parameters():
        parameter.mul_(2.0 ** round(math.log2(factor)))


def fresh(name: str) -> nn.Module:
    """The model of a name with the weights that a training begins with: rounding grows less in it than in `model`."""
    config = ALL[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
    return module.eval()


def write(folder: Path, name: str, dtype: torch.dtype = torch.float32, module: nn.Module | None = None) -> Path:
    """The model of a name as a folder of diffusers, with the weights of `model` or of a module."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(ALL[name]))
    state = {k: v.to(dtype).contiguous() for k, v in (module or model(name)).state_dict().items()}
    safetensors.torch.save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return folder
