"""Autoencoders in the layout of diffusers: every family is exported, and its bundle equals diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cards
import numpy as np
import pytest
import rounding
import safetensors.torch
import torch
import zoo
import zoo_diffusers

import vae_export
from vae_export import sources
from vae_export.certification import reference
from vae_export.errors import InputError
from vae_export.sources import cost, diffusers_folder

WEIGHTS = f"{diffusers_folder.WEIGHTS}.safetensors"


@pytest.mark.parametrize("name", zoo_diffusers.CONFIGS)
def test_every_family(exported: Callable[[str], Any], name: str) -> None:
    """Its certificate holds, and its bundle equals diffusers at other sizes than the traced one."""
    bundle, certificate = exported(name)
    assert certificate.passed
    assert certificate.batches == (1, 2, 7)
    module, config = zoo_diffusers.model(name), zoo_diffusers.CONFIGS[name]
    manifest = vae_export.Bundle(bundle).manifest
    assert manifest.model.architecture == config["_class_name"] == type(module).__name__
    assert manifest.model.parameters == sum(p.numel() for p in module.parameters())
    assert manifest.model.latent.scaling == config.get("scaling_factor", 1.0)
    assert manifest.model.latent.shift == config.get("shift_factor", 0.0)
    assert manifest.model.latent.mean == (tuple(config["latents_mean"]) if "latents_mean" in config else None)
    assert manifest.origin.kind == "diffusers"
    gaussian = "KL" in config["_class_name"]
    assert manifest.model.posterior.kind == ("diagonal_gaussian" if gaussian else "deterministic")
    assert manifest.model.likelihood.nominal == gaussian
    with vae_export.load(bundle) as vae:
        for height, width in ((32, 48), (40, 16), (24, 56)):
            # Three pictures at once, then the first alone: diffusers computes them once.
            x = zoo.pictures(3, (3, height, width)) * 2 - 1
            posteriors = [vae.encode(x), vae.encode(x[:1])]
            names = ("mean", "logvar") if gaussian else ("mean",)
            ours = [np.concatenate([getattr(posterior, name) for posterior in posteriors]) for name in names]
            rounding.assert_near(ours, lambda m, x: [_and_first(y) for y in _encoded(m, x)], module, x)
            z = posteriors[0].mean
            decoded = np.concatenate([vae.decode(z), vae.decode(z[:1])])
            rounding.assert_near([decoded], lambda m, z: [_and_first(m.decode(z).sample)], module, z)


def _and_first(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, rows[:1]])


def _encoded(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    encoded = module.encode(x)
    if not hasattr(encoded, "latent_dist"):
        return [encoded[0]]
    return [encoded.latent_dist.mean, encoded.latent_dist.logvar]


@pytest.mark.parametrize("name", zoo_diffusers.CONFIGS)
def test_the_card_is_right(exported: Callable[[str], Any], name: str) -> None:
    """Nothing of them is a sample: they were not trained to have a prior, and no held-out data is known."""
    card = cards.check(exported(name)[0])
    assert "vae.encode(x)" in card
    assert "sample" not in card.partition("## Certificate")[0]
    assert "![" not in card


def test_deterministic_encoders_say_so(exported: Callable[[str], Any]) -> None:
    bundle, _ = exported("tiny")
    with vae_export.load(bundle) as vae:
        posterior = vae.encode(zoo.pictures(1, (3, 16, 16)) * 2 - 1)
        assert posterior.logvar is None
        with pytest.raises(InputError, match="this model's encoder is deterministic"):
            posterior.sample(seed=0)
        with pytest.raises(InputError, match="this model has no likelihood"):
            vae.elbo(zoo.pictures(1, (3, 16, 16)) * 2 - 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return zoo_diffusers.write(tmp_path / "m", "kl-sd15")


def _same(source: sources.Trained, name: str = "kl-sd15") -> None:
    """The weights are those of the model, in float32."""
    expected = zoo_diffusers.model(name).state_dict()
    state = source.module.vae.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_layouts_of_a_folder(folder: Path, tmp_path: Path) -> None:
    """With and without `vae/`, in parts, one file with its configuration, older names of weights."""
    _same(sources.resolve(folder))
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    _same(sources.resolve(tmp_path / "pipeline"))
    single = tmp_path / "alone.safetensors"
    shutil.copy(folder / WEIGHTS, single)
    _same(sources.resolve(single, config=folder / "config.json"))
    state = safetensors.torch.load_file(folder / WEIGHTS)
    old = {_old(name): value for name, value in state.items()}
    assert any(".query." in name for name in old)
    safetensors.torch.save_file(old, folder / WEIGHTS)
    _same(sources.resolve(folder))
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.torch.save_file({name: state[name] for name in part}, folder / file)
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    _same(sources.resolve(folder))
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks b\.safetensors, which its index names"):
        sources.resolve(folder)
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}')
    with pytest.raises(InputError, match="expected files of its own folder"):
        sources.resolve(folder)
    (folder / f"{WEIGHTS}.index.json").write_text("[]")
    with pytest.raises(InputError, match="is no index of weights"):
        sources.resolve(folder)


def _old(name: str) -> str:
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f".{new}.", f".{old}.")
    return name


def test_float16_weights_are_widened(tmp_path: Path) -> None:
    folder = zoo_diffusers.write(tmp_path / "m", "kl-sd15", torch.float16)
    (folder / WEIGHTS).rename(folder / f"{diffusers_folder.WEIGHTS}.fp16.safetensors")
    module = sources.resolve(folder).module
    expected = zoo_diffusers.model("kl-sd15").half().float()
    assert all(torch.equal(wide, value) for wide, value in zip(module.parameters(), expected.parameters(), strict=True))


def _config(folder: Path, **changed: Any) -> None:
    place = folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | changed))


def test_refused(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, path: Path = folder, **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            sources.resolve(path, **options)

    refused(r"height \(a multiple of 2.*got height = 15", size={"height": 15, "width": 16})
    outside = np.full((1, 3, 64, 64), 2.0, np.float32)
    refused(r"held_out has values from 2 to 2, outside of data_range \(-1, 1\)", held_out=outside)
    refused("a diffusers autoencoder takes config, size, held_out; got likelihood. Omit it", likelihood="none")
    refused("does not exist; expected a checkpoint's or a diffusers", tmp_path / "nowhere")
    shutil.copy(folder / WEIGHTS, tmp_path / "alone.safetensors")
    refused("Pass the autoencoder's configuration with --config", tmp_path / "alone.safetensors")
    refused("has no _class_name", tmp_path / "alone.safetensors", config=_write(tmp_path / "c.json", "{}"))
    refused("is not JSON", tmp_path / "alone.safetensors", config=_write(tmp_path / "c.json", "{"))
    refused("cannot be read", folder, config=tmp_path / "none.json")
    _config(folder, norm_num_groups=3)
    refused("diffusers cannot make a AutoencoderKL")
    _config(folder, norm_num_groups=4, layers_per_block=2)
    refused(r"the weights lack \d+ of the model's \d+ tensors, such as ")
    _config(folder, layers_per_block=1, use_quant_conv=False)
    refused("the weights have quant_conv.*, which the model of its config.json does not have")
    _config(folder, use_quant_conv=True, latent_channels=5)
    refused(r"has shape \(.*\); the model of its config.json has \(")
    _config(folder, latent_channels=4, scaling_factor=-1.0)
    refused("scaling must be positive")
    for kind, why in (
        ("AutoencoderKLWan", "is for video"), ("VQModel", "its latents are discrete"), ("UNet2DModel", "expected Auto"),
        ("ConsistencyDecoderVAE", "draws random numbers"),
    ):  # fmt: skip
        _config(folder, _class_name=kind)
        refused(f"is a {kind}.*{why}")
    _config(folder, _class_name="AutoencoderKL", scaling_factor=1.0)
    (folder / WEIGHTS).write_bytes(b"no")
    refused("is not a safetensors file")
    (folder / WEIGHTS).unlink()
    refused("no index of its parts")
    (folder / f"{diffusers_folder.WEIGHTS}.bin").write_bytes(b"\x80")
    refused(r"is a pickle, which can run any code.*refused.*convert it.*: python -c .*diffusion_pytorch_model\.bin")


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_suggested_conversion_works(folder: Path, tmp_path: Path) -> None:
    """The command of the message makes a folder that is accepted."""
    import shlex
    import subprocess
    import sys

    state = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / f"{diffusers_folder.WEIGHTS}.bin")
    with pytest.raises(InputError) as refused:
        sources.resolve(folder)
    command = shlex.split(str(refused.value).partition("in its folder: ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=folder, check=True)
    _same(sources.resolve(folder))


def test_without_diffusers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(vae_export.BackendError, match=r"'diffusers' is not installed.*vae-export\[diffusers\]"):
        sources.resolve(folder)


def test_costs_are_those_of_pytorch(folder: Path) -> None:
    """The polynomial holds at sizes at which it was not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    source = sources.resolve(folder)
    counted = cost.count(source)
    for height, width in ((16, 24), (128, 96)):
        x = torch.zeros(1, 3, height, width)
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            mean, _ = source.module.encode(x)
        assert counted["encoder"].at({"height": height, "width": width})[0] == flops.get_total_flops() // 2
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            source.module.decode(mean)
        assert counted["decoder"].at({"height": height, "width": width})[0] == flops.get_total_flops() // 2


#: As published: stride 32 and heads of 32; narrow.
_STAGES = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
PUBLISHED_DC = zoo_diffusers.CONFIGS["dc"] | {
    "latent_channels": 8, "attention_head_dim": 32, "encoder_block_types": _STAGES, "decoder_block_types": _STAGES,
    "encoder_block_out_channels": [8, 8, 16, 32, 64, 64], "decoder_block_out_channels": [8, 8, 16, 32, 64, 64],
    "encoder_layers_per_block": [1] * 6, "decoder_layers_per_block": [1] * 6,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]], "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
}  # fmt: skip


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[sources.Trained, Any, Path]:
    """The published topology of AutoencoderDC as a source, diffusers' own module, and the source's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo_diffusers.ALL, "dc-published", PUBLISHED_DC)
        folder = zoo_diffusers.write(tmp_path_factory.mktemp("dc") / "m", "dc-published")
        return sources.resolve(folder), zoo_diffusers.model("dc-published"), folder


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (64, 192), (256, 128)])
def test_linear_attention_equals_both_forms(deep: tuple[sources.Trained, Any, Path], size: tuple[int, int]) -> None:
    """On both sides of diffusers' switch; the small ones have its quadratic form in every stage, or in some."""
    source, module, _ = deep
    x = torch.from_numpy(zoo.pictures(1, (3, *size)) * 2 - 1)
    with torch.no_grad():
        latent = module.encode(x)[0]
        pairs = [(source.module.encode(x), latent), (source.module.decode(latent), module.decode(latent).sample)]
    for ours, expected in pairs:
        assert (ours - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_memory_of_deep_compression_is_linear(deep: tuple[sources.Trained, Any, Path]) -> None:
    counted = cost.count(deep[0])
    for one in counted.values():
        small, large = (one.at({"height": side, "width": side})[1] for side in (1024, 2048))
        assert large <= 4.4 * small


def test_another_attention_is_refused(deep: tuple[sources.Trained, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention_processor import SanaMultiscaleLinearAttention

    linear = SanaMultiscaleLinearAttention.apply_linear_attention
    monkeypatch.setattr(
        SanaMultiscaleLinearAttention, "apply_linear_attention", lambda self, q, k, v: 1.01 * linear(self, q, k, v)
    )
    with pytest.raises(InputError, match=r"the installed diffusers computes .* of AutoencoderDC differently"):
        sources.resolve(deep[2])


def test_fewer_rows_for_what_costs_more() -> None:
    """256 rows for a model of a million multiply-adds, never fewer than three."""

    def rows(multiply_adds: float) -> int:
        value = vae_export.contract.manifest.Cost(multiply_adds=(multiply_adds, 0.0, 0.0), activations=(1.0, 0.0, 0.0))
        return reference.rows({"encoder": value, "decoder": value}, {})

    assert rows(1e6) == 256
    assert 3 < rows(5e8) < 256
    assert rows(1e12) == 3
