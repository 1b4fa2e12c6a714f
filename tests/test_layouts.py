"""A bundle in other tools' layouts, read as they read it.

Optimum's own reader, the distribution optimum-onnx, is not a dependency of the tests: it needs transformers below
4.58, which needs huggingface_hub below 1, and diffusers needs huggingface_hub from 1.32 on. `Reader` does what its
documentation says instead.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch
import zoo
import zoo_diffusers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

import vae_export
from vae_export.contract import bundle as bundles
from vae_export.contract import folders
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import Data, Latent, LatentDim, Likelihood, Model, Posterior, SizeDim
from vae_export.errors import BundleError, InputError, VerificationError
from vae_export.exporting.exporter import export_trained
from vae_export.exporting.layouts import optimum
from vae_export.sources.protocol import Trained


@pytest.fixture(scope="session")
def diffusers(exported: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small AutoencoderKL, its bundle, and its layout."""
    bundle, _ = exported("kl-sd15")
    layout = tmp_path_factory.mktemp("layout") / "onnx"
    optimum.optimum(bundle, layout)
    return SimpleNamespace(model=zoo_diffusers.model("kl-sd15"), bundle=bundle, layout=layout)


class Reader:
    """A VAE as Optimum's pipelines hold one: a session and a configuration for each half."""

    def __init__(self, path: Path) -> None:
        self.encoder, self.decoder = (
            ort.InferenceSession(path / part / "model.onnx", providers=["CPUExecutionProvider"])
            for part in ("vae_encoder", "vae_decoder")
        )
        self.configs = [json.loads((path / p / "config.json").read_text()) for p in ("vae_encoder", "vae_decoder")]

    def encode(self, sample: np.ndarray) -> DiagonalGaussianDistribution:
        """The posterior, as of `AutoencoderKL.encode`."""
        (parameters,) = self.encoder.run(["latent_parameters"], {"sample": sample})
        return DiagonalGaussianDistribution(torch.from_numpy(parameters))

    def decode(self, latents: Tensor) -> np.ndarray:
        """As `AutoencoderKL.decode`."""
        return self.decoder.run(["sample"], {"latent_sample": latents.numpy()})[0]


def dims(value: onnx.ValueInfoProto) -> tuple[str, list[int | str]]:
    shape = value.type.tensor_type.shape.dim
    return value.name, [dim.dim_param or dim.dim_value for dim in shape]


def names_of(path: Path, part: str) -> list[tuple[str, list[int | str]]]:
    graph = onnx.load(path / f"vae_{part}" / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    return [dims(value) for value in (*graph.graph.input, *graph.graph.output)]


def close(result: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(result, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("size", [(1, 16, 12), (3, 8, 32)])
def test_the_reader_of_optimum_gives_what_diffusers_gives(
    diffusers: SimpleNamespace, size: tuple[int, int, int]
) -> None:
    reader, model = Reader(diffusers.layout), diffusers.model
    for config in reader.configs:
        assert config["_class_name"] == "AutoencoderKL"
        assert config["scaling_factor"] == 0.18215
        assert config["block_out_channels"] == [8, 16]
    batch, height, width = size
    x = 2 * zoo.pictures(batch, (3, height, width)) - 1
    factor = reader.configs[1]["scaling_factor"]
    with torch.no_grad():
        theirs = model.encode(torch.from_numpy(x)).latent_dist
        ours = reader.encode(x)
        close(ours.mean.numpy(), theirs.mean.numpy())
        close(ours.logvar.numpy(), theirs.logvar.numpy())
        latents = ours.sample(torch.Generator().manual_seed(0)) * factor
        close(latents.numpy(), (theirs.sample(torch.Generator().manual_seed(0)) * factor).numpy())
        close(reader.decode(latents / factor), model.decode(latents / factor).sample.numpy())


def test_the_names_of_optimum(diffusers: SimpleNamespace) -> None:
    """Optimum evaluates an output's size as an expression of the input's names."""
    assert names_of(diffusers.layout, "encoder") == [
        ("sample", ["batch_size", 3, "sample_height", "sample_width"]),
        ("latent_parameters", ["batch_size", 8, "sample_height / 2", "sample_width / 2"]),
    ]
    assert names_of(diffusers.layout, "decoder") == [
        ("latent_sample", ["batch_size", 4, "latent_height", "latent_width"]),
        ("sample", ["batch_size", 3, "latent_height * 2", "latent_width * 2"]),
    ]
    written = {p.relative_to(diffusers.layout).as_posix() for p in diffusers.layout.rglob("*") if p.is_file()}
    assert written == optimum.FILES
    config = (diffusers.bundle / "config.json").read_bytes()
    assert (diffusers.layout / "vae_decoder" / "config.json").read_bytes() == config


def test_other_outputs_are_dropped_with_their_nodes(member: Callable[..., object], tmp_path: Path) -> None:
    """A model of fixed sizes that is not of diffusers: sizes stay numbers, and the facts are the manifest's."""
    path = member("spatial").bundle
    optimum.optimum(path, tmp_path / "onnx")
    assert names_of(tmp_path / "onnx", "encoder")[1] == ("latent_parameters", ["batch_size", 8, 4, 6])
    assert names_of(tmp_path / "onnx", "decoder") == [
        ("latent_sample", ["batch_size", 4, 4, 6]),
        ("sample", ["batch_size", 3, 16, 24]),
    ]
    operators = [node.op_type for node in onnx.load(tmp_path / "onnx" / "vae_decoder" / "model.onnx").graph.node]
    assert "Clip" not in operators  # of sample_logvar
    config = json.loads((tmp_path / "onnx" / "vae_encoder" / "config.json").read_text())
    assert config["latent_channels"] == 4
    assert config["scaling_factor"] == 1.0
    x = np.ascontiguousarray(2 * zoo.pictures(2, (3, 16, 24)) - 1)
    with vae_export.load(path, device="cpu") as vae:
        close(Reader(tmp_path / "onnx").encode(x).mean.numpy(), vae.encode(x).mean)


class Tiny(nn.Module):
    """A deterministic autoencoder on pictures whose sizes the latents have, too."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.into(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.back(z)


def test_a_deterministic_encoder_gives_a_sample(tmp_path: Path) -> None:
    """As of AutoencoderTiny: Optimum passes `latent_sample` on as `latents`."""
    source = Trained(
        module=zoo.fill(Tiny()),
        model=Model(
            architecture="tiny",
            parameters=39,
            data=Data(shape=(1, SizeDim(name="rows"), 8), range=(0.0, 1.0)),
            latent=Latent(shape=(2, LatentDim(name="rows"), 8)),
            prior="standard_normal",
            posterior=Posterior(kind="deterministic"),
            likelihood=Likelihood(kind="none"),
        ),
        origin=zoo.ORIGIN,
        config=zoo.CONFIG,
        example_shape=(1, 6, 8),
    )
    export_trained(source, tmp_path / "tiny.bundle", rows=12)
    optimum.optimum(tmp_path / "tiny.bundle", tmp_path / "onnx")
    assert names_of(tmp_path / "onnx", "encoder") == [
        ("sample", ["batch_size", 1, "sample_height", 8]),
        ("latent_sample", ["batch_size", 2, "sample_height", 8]),
    ]
    assert names_of(tmp_path / "onnx", "decoder")[1] == ("sample", ["batch_size", 1, "latent_height", 8])


def test_models_that_are_no_pictures_with_spatial_latents(member: Callable[..., Any], tmp_path: Path) -> None:
    """Vectors as data, or as latents."""
    for bundle in (member("plain").bundle, Path(__file__).parent / "data" / "v0.5.0" / "flat.bundle"):
        with pytest.raises(InputError, match=r"Optimum's is for pictures.*has data \(B, .*Use the bundle itself"):
            optimum.optimum(bundle, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_what_is_there_is_replaced_on_purpose_only(diffusers: SimpleNamespace, tmp_path: Path) -> None:
    out = Path(shutil.copytree(diffusers.layout, tmp_path / "onnx"))
    with pytest.raises(InputError, match="exists already"):
        optimum.optimum(diffusers.bundle, out)
    (out / "vae_encoder" / "config.json").write_text("{}")
    optimum.optimum(diffusers.bundle, out, overwrite=True)
    assert json.loads((out / "vae_encoder" / "config.json").read_text())
    (out / "unet").mkdir()
    (out / "unet" / "model.onnx").write_text("mine")
    with pytest.raises(InputError, match=r"holds files that are not of this layout: unet/model\.onnx\. Move them away"):
        optimum.optimum(diffusers.bundle, out, overwrite=True)
    shutil.rmtree(out / "unet")
    (out / "vae_decoder" / "config.json").unlink()
    with pytest.raises(InputError, match=r"is not a whole layout: it has no vae_decoder/config\.json\. Remove it"):
        optimum.optimum(diffusers.bundle, out, overwrite=True)
    inside = diffusers.bundle / "onnx"
    with pytest.raises(InputError, match="lies inside the bundle, which is never changed"):
        optimum.optimum(diffusers.bundle, inside)


def test_a_difference_is_found(diffusers: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = optimum.rename_decoder

    def wrong(graph: object, model: Model) -> object:
        changed = right(graph, model)
        weight = next(v for v in changed.graph.initializers.values() if v.const_value.dtype.name == "FLOAT")
        weight.const_value = onnx_ir.tensor(weight.const_value.numpy() + 1, name=weight.name)
        return changed

    monkeypatch.setattr(optimum, "rename_decoder", wrong)
    with pytest.raises(
        VerificationError, match=r"the decoder in the new layout does not compute the same bits.*Nothing was wr"
    ):
        optimum.optimum(diffusers.bundle, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", [b"[1]", b"{"])
def test_a_config_that_is_no_json_object(diffusers: SimpleNamespace, tmp_path: Path, config: bytes) -> None:
    path = Path(shutil.copytree(diffusers.bundle, tmp_path / "copy.bundle"))
    (path / "config.json").write_bytes(config)
    with pytest.raises(BundleError, match="was changed"):
        optimum.optimum(path, tmp_path / "onnx")
    manifest = Bundle(diffusers.bundle).manifest
    (path / bundles.MANIFEST).unlink()
    bundles.write_manifest(path, msgspec.structs.replace(manifest, files=folders.list_files(path)))
    with pytest.raises(BundleError, match=r"config\.json is not the JSON object of a diffusers model"):
        optimum.optimum(path, tmp_path / "onnx")
