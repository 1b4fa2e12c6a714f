"""Tiles and padding: as in diffusers, measured at the export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import rounding
import torch
import zoo
import zoo_diffusers
from diffusers import AutoencoderKL

import vae_export
from vae_export.certification import certificate, golden, tiles
from vae_export.commands import tables
from vae_export.contract.bundle import Bundle
from vae_export.contract.manifest import Tiled
from vae_export.contract.model import Cost, Data, Model, SizeDim
from vae_export.errors import InputError
from vae_export.runtimes import VAE, Tile, open_bundle, tiling
from vae_export.runtimes.memory import Budget

# Most models here see more than a tile; that this is told has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore::vae_export.TileWarning")

#: Sizes and overlaps whose step in the latent is the step in the image, at strides 2 and 4.
CUTS = [(16, 0.25), (16, 0.5), (16, 0.0), (16, 0.75), (32, 0.25), (32, 0.125)]


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def latents(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def cut(model: Any, size: int, stride: int, overlap: float) -> None:
    model.tile_sample_min_size, model.tile_latent_min_size = size, size // stride
    model.tile_overlap_factor = overlap


@pytest.fixture(scope="module")
def autoencoder(exported: Callable[[str], Any]) -> tuple[VAE, Any]:
    """A small model of diffusers, as our VAE and as itself."""
    return vae_export.load(exported("kl-sd15")[0]), zoo_diffusers.model("kl-sd15")


@pytest.fixture
def spatial(member: Callable[[str], Any]) -> Any:
    return member("spatial-named")


class Recorder:
    """A backend that notes what it runs: graph, shape, and examples at once."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.graphs, self.on_gpu = inner, inner.graphs, inner.on_gpu
        self.runs: list[tuple[str, tuple[int, ...], int]] = []

    def run(self, graph: str, inputs: Any, outputs: Any, micro_batch: int, **options: Any) -> list[Any]:
        self.runs.append((graph, tuple(next(iter(inputs.values())).shape), micro_batch))
        return self.inner.run(graph, inputs, outputs, micro_batch, **options)

    def describe(self) -> Any:
        return self.inner.describe()


def cost(pixel: float = 0.0, constant: float = 0.0) -> Cost:
    return Cost(multiply_adds=(0.0, 0.0, 0.0), activations=(float(constant), float(pixel), 0.0))


def budgeted(case: Any, limit: int | None, encoder: Cost, decoder: Cost, **options: Any) -> tuple[VAE, Recorder]:
    """A bundle on the CPU within a budget, and what it runs."""
    opened = open_bundle(Bundle(case.bundle), device="cpu")
    recorder = Recorder(opened.backend)
    model = options.pop("model", case.source.model)
    budget = Budget(limit, model, {"encoder": encoder, "decoder": decoder}) if limit else None
    return VAE(model, recorder, budget=budget, **options), recorder


@pytest.mark.parametrize(("size", "overlap"), CUTS)
def test_as_diffusers_does(autoencoder: tuple[VAE, Any], size: int, overlap: float) -> None:
    vae, model = autoencoder
    cut(model, size, 2, overlap)
    z, x = latents(2, 4, 19, 27), images(2, 3, 38, 54)
    tile = Tile(size, overlap)
    posterior, decoded = vae.encode(x, tile=tile), vae.decode(z, tile=tile)

    def decode(model: Any, z: Any) -> list[Any]:
        return [model.tiled_decode(z).sample]

    rounding.assert_near([decoded], decode, model, z)
    rounding.assert_near(
        [posterior.mean, posterior.logvar], lambda model, x: model._tiled_encode(x).chunk(2, dim=1), model, x
    )
    rounding.assert_near([vae.reconstruct(x, tile=tile)], decode, model, posterior.mean)
    assert np.abs(vae.decode(z) - decoded).max() > 1e-3  # tiles are another result


@pytest.mark.parametrize(("size", "overlap"), CUTS)
@pytest.mark.parametrize("micro_batch", [1, 64])
def test_of_any_model_on_its_backend(spatial: Any, size: int, overlap: float, micro_batch: int) -> None:
    """The loops of diffusers around another model, whose logvar is clamped before it is blended."""

    def encode(module: Any, x: torch.Tensor) -> Any:
        return AutoencoderKL._tiled_encode(_looped(module, size, overlap), x).chunk(2, dim=1)

    def decode(module: Any, z: torch.Tensor) -> Any:
        return [AutoencoderKL.tiled_decode(_looped(module, size, overlap), z).sample]

    module = spatial.source.module
    x, z, tile = 32 * images(2, 3, 52, 84), latents(2, 4, 13, 21), Tile(size, overlap)
    with vae_export.load(spatial.bundle, device="cpu", micro_batch=micro_batch, check_range=False) as vae:
        posterior = vae.encode(x, tile=tile)
        rounding.assert_near([posterior.mean, posterior.logvar], encode, module, x)
        rounding.assert_near([vae.decode(z, tile=tile)], decode, module, z)
        assert np.abs(posterior.logvar).max() == pytest.approx(8.0, rel=1e-6)
        again = vae.decode(posterior.sample(3, 7), tile=tile)
        np.testing.assert_array_equal(vae.reconstruct(x, seed=3, start=7, tile=tile), again)


def _looped(module: Any, size: int, overlap: float) -> Any:
    """What the loops of diffusers need of a model."""
    own = SimpleNamespace(
        config=SimpleNamespace(use_quant_conv=False, use_post_quant_conv=False),
        encoder=lambda x: torch.cat(module.encode(x), 1),
        decoder=lambda z: module.decode(z)[0],
        blend_v=lambda *a: AutoencoderKL.blend_v(None, *a),
        blend_h=lambda *a: AutoencoderKL.blend_h(None, *a),
    )
    cut(own, size, 4, overlap)
    return own


def test_a_tile_as_large_as_the_image_is_none(spatial: Any) -> None:
    vae, recorder = budgeted(spatial, None, cost(), cost())
    x, z = images(2, 3, 20, 28), latents(2, 4, 5, 7)
    for tile in (28, 64, (20, 28), Tile((40, 28), 0.5)):
        np.testing.assert_array_equal(vae.encode(x, tile=tile).mean, vae.encode(x).mean)
        np.testing.assert_array_equal(vae.decode(z, tile=tile), vae.decode(z))
        np.testing.assert_array_equal(vae.reconstruct(x, tile=tile), vae.reconstruct(x))
    assert {shape[2:] for _, shape, _ in recorder.runs} == {(20, 28), (5, 7)}
    recorder.runs.clear()
    vae.decode(z, tile=Tile((20, 24), 0))
    assert [shape for _, shape, _ in recorder.runs] == [(2, 4, 5, 6), (2, 4, 5, 1)]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("tile", [(4, 8), (8, 4), (12, 4), (40, 4)])
def test_tiles_of_what_is_local_are_the_whole(spatial: Any, tile: tuple[int, int], overlap: float) -> None:
    """A graph whose every output depends on one input gives the same in tiles, of any height and width."""
    scale, shape = 4 if overlap else 1, (2, 4, 13, 21)
    cuts = Tile((tile[0] * scale, tile[1] * scale), overlap)
    axes = tiling.grid(spatial.source.model, "decoder", shape[1:], cuts)
    z = latents(*shape)
    seen, result = [], np.full((2, 4, 52, 84), np.nan, np.float32)

    def local(part: np.ndarray) -> list[np.ndarray]:
        seen.append(part.shape[2:])
        return [part.repeat(4, 2).repeat(4, 3)]

    if axes is None:
        pytest.fail("the image is larger")
    tiling.run_tiled(local, z, *axes, (result,))
    np.testing.assert_allclose(result, z.repeat(4, 2).repeat(4, 3), rtol=1e-6, atol=1e-6)
    assert max(seen) == (min(13, tile[0] * scale // 4), min(21, tile[1] * scale // 4))


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        ("32", "tile: size is '32'; expected pixels of the data, 1 or more: an integer or (height, width)"),
        ((32, 32, 32), "tile: size is (32, 32, 32); expected pixels"),
        (0, "tile: size is 0; expected pixels"),
        ((16, -4), "tile: size is (16, -4); expected pixels"),
        (16.0, "tile: size is 16.0; expected pixels"),
        (18, "tile: size is 18; expected a height that is a multiple of 4. Use 20"),
        ((16, 18), "tile: size is (16, 18); expected a width that is a multiple of 4. Use 20"),
        (
            20,
            "tile: with tiles of 20 pixels, 5 in the latent, and an overlap of 0.25 the parts of the image do not "
            "meet: what overlaps is no whole number of the latent's pixels. Use overlap=0.2",
        ),
    ],
)
def test_a_wrong_tile_is_refused(spatial: Any, tile: Any, message: str) -> None:
    x, z = images(1, 3, 40, 40), latents(1, 4, 10, 10)
    with vae_export.load(spatial.bundle, device="cpu") as vae:
        for call, value in ((vae.encode, x), (vae.decode, z), (vae.reconstruct, x)):
            with pytest.raises(InputError) as caught:
                call(value, tile=tile)
            assert str(caught.value).startswith(message)


@pytest.mark.parametrize("overlap", [1.0, -0.1, float("nan"), "0.25"])
def test_a_wrong_overlap_is_refused(overlap: Any) -> None:
    with pytest.raises(InputError, match=r"tile: overlap is .*; expected a number from 0 on that is below 1"):
        Tile(16, overlap)


@pytest.mark.parametrize("size", [4, 8, 12, 20, 28, 44, 64, (12, 20), (8, 12), (36, 24)])
def test_the_overlap_that_is_named_works(spatial: Any, size: Any) -> None:
    model, refused = spatial.source.model, 0
    for overlap in np.linspace(0, 0.99, 34):
        for graph, example in (("encoder", (3, 400, 400)), ("decoder", (4, 100, 100))):
            try:
                assert tiling.grid(model, graph, example, Tile(size, float(overlap)))
            except InputError as error:
                refused += 1
                named = float(str(error).rpartition("overlap=")[2])
                for each, shape in (("encoder", (3, 400, 400)), ("decoder", (4, 100, 100))):
                    assert tiling.grid(model, each, shape, Tile(size, named))
    assert refused


@pytest.mark.parametrize("name", ["spatial", "plain"])
def test_models_of_fixed_sizes_have_no_tiles(member: Callable[[str], Any], name: str) -> None:
    case = member(name)
    vae = vae_export.load(case.bundle)
    x = images(1, *case.source.example_shape)
    message = r"tile: this model takes no other height and width than its own.* export the model with named sizes"
    for call, value in ((vae.encode, x), (vae.decode, vae.encode(x).mean), (vae.reconstruct, x)):
        with pytest.raises(InputError, match=message):
            call(value, tile=8)


def with_dims(model: Model, **limits: int) -> Model:
    """The named model with other limits of its sizes."""
    dims = [SizeDim(name=name, **({"multiple_of": 4} | limits)) for name in ("height", "width")]
    return msgspec.structs.replace(model, data=Data(shape=(3, *dims), range=(-1.0, 1.0)))


def test_tiles_that_the_model_does_not_take_are_refused(spatial: Any) -> None:
    model = with_dims(spatial.source.model, min=8)
    with pytest.raises(InputError, match=r"tiles of 16 and an overlap of 0.25 one has height 4, .* at least 8\)"):
        tiling.grid(model, "encoder", (3, 28, 48), Tile(16))
    assert tiling.grid(model, "encoder", (3, 32, 32), Tile(16))
    with pytest.raises(InputError, match=r"one has width 4, .* Choose another size or overlap"):
        tiling.grid(model, "decoder", (4, 8, 7), Tile(16))


def test_arrays_on_a_gpu_have_no_tiles_and_no_padding(spatial: Any) -> None:
    class Inner:
        graphs, on_gpu = frozenset({"encoder", "decoder"}), True

    vae = VAE(spatial.source.model, Inner())
    place = {"__dlpack_device__": lambda self: (2, 0), "dtype": "float32"}
    x, z = (type("There", (), place | {"shape": shape})() for shape in ((1, 3, 40, 40), (1, 4, 10, 10)))
    for verb, call, name, value in (
        *(("encode", vae.encode, "x", x), ("decode", vae.decode, "z", z), ("reconstruct", vae.reconstruct, "x", x)),
    ):
        message = f"{verb}: {name} lies on a GPU, and tiles are joined on the host. Pass a NumPy array"
        with pytest.raises(InputError, match=message):
            call(value, tile=16)
        if name == "x":
            with pytest.raises(InputError, match=f"{verb}: x lies on a GPU, and pad is done on the host. Pass a NumPy"):
                call(value, pad=True)


def test_padding(spatial: Any) -> None:
    with vae_export.load(spatial.bundle, device="cpu") as vae:
        x = images(2, 3, 18, 25)
        padded = np.concatenate([x, x[:, :, -1:], x[:, :, -1:]], 2)
        padded = np.concatenate([padded, padded[..., -1:].repeat(3, 3)], 3)
        assert padded.shape == (2, 3, 20, 28)
        np.testing.assert_array_equal(vae.encode(x, pad=True).mean, vae.encode(padded).mean)
        found = vae.reconstruct(x, 3, pad=True)
        np.testing.assert_array_equal(found, vae.reconstruct(padded, 3)[:, :, :18, :25])
        assert found.flags.c_contiguous
        tiles = vae.reconstruct(x, tile=16, pad=True)
        np.testing.assert_array_equal(tiles, vae.reconstruct(padded, tile=16)[:, :, :18, :25])
        np.testing.assert_array_equal(vae.encode(padded, pad=True).mean, vae.encode(padded).mean)
        levels = (127 * (x + 1)).astype(np.uint8)
        np.testing.assert_array_equal(
            vae.reconstruct(torch.from_numpy(levels), pad=True), vae.reconstruct(levels, pad=True)
        )
        for call in (vae.encode, vae.reconstruct):
            with pytest.raises(InputError, match=r"Resize or crop the examples, or use pad=True \(height \(a mult"):
                call(x)
        with pytest.raises(InputError, match=r"elbo: .* Resize or crop the examples \(height"):
            vae.elbo(x)
        for wrong in (x[:0], x[:, :2], x[0], x[:, :, :0]):
            with pytest.raises(InputError, match="has shape"):
                vae.encode(wrong, pad=True)


def test_padding_grows_to_the_smallest_size_and_not_beyond_the_largest(spatial: Any) -> None:
    vae, recorder = budgeted(spatial, None, cost(), cost(), model=with_dims(spatial.source.model, min=10, max=20))
    vae.encode(images(1, 3, 3, 17), pad=True)
    assert recorder.runs[0][1] == (1, 3, 12, 20)
    for pad in (True, False):
        with pytest.raises(InputError, match=r"Resize or crop the examples \(height \(a multiple of 4, at least 10"):
            vae.encode(images(1, 3, 12, 21), pad=pad)


class Patches(torch.nn.Module):
    """Each 4 × 4 pixels by themselves, but for a norm over the whole picture in the decoder, where there is one."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.into = torch.nn.Conv2d(3, 8, 4, 4, bias=False)
        self.back = torch.nn.ConvTranspose2d(4, 3, 4, 4, bias=False)
        self.norm = torch.nn.GroupNorm(1, 4) if norm else torch.nn.Identity()
        zoo.fill(self)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = self.into(x).chunk(2, dim=1)
        return mean, logvar.clamp(-8.0, 8.0)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.back(self.norm(z))


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Bundles of `Patches`, with and without its norm."""
    folder = tmp_path_factory.mktemp("patches")
    described = {"likelihood": "gaussian_fixed", "variance": 0.1, "data_range": (0, 1), "multiple_of": 4}
    for norm in (True, False):
        module = Patches(norm=norm)
        example = zoo.pictures(8, (3, 32, 48))
        vae_export.export(module, folder / str(norm), example=example, keep_example=False, **described)
    return {norm: folder / str(norm) for norm in (True, False)}


def test_tiles_are_measured_at_the_export(patches: dict[bool, Path]) -> None:
    exact, normed = ({k: g.tiled for k, g in Bundle(patches[norm]).manifest.graphs.items()} for norm in (False, True))
    for one in (exact["encoder"], exact["decoder"], normed["encoder"]):
        assert (one.tile, one.size) == ((32, 48), (80, 96))
        assert one.off1 == one.off2 == 0
        assert one.worst < 1e-2  # of 255: other shapes, another order of sums
    # The figure is that of the picture, computed here in another way.
    bundle = Bundle(patches[True])
    one = normed["decoder"]
    x = golden.decode(bundle.read(golden.FILE), bundle.manifest.golden, bundle.manifest.model).tensors["x"][4:6]
    large = torch.nn.functional.interpolate(torch.from_numpy(x), one.size, mode="bilinear").numpy()
    large[1] *= np.linspace(1, 0.3, 80)[:, None] * np.linspace(1, 0.3, 96)
    with vae_export.load(bundle.path, device="cpu") as vae:
        z = vae.encode(large).mean
        off = 255 * np.abs(vae.decode(z, tile=one.tile).clip(0, 1) - vae.decode(z).clip(0, 1))
    assert one.worst == pytest.approx(off.max(), rel=1e-3)
    assert one.worst > 2 * tiling.VISIBLE
    assert one.off1 == pytest.approx((off > 1).mean(), abs=1e-3)
    assert one.off2 == pytest.approx((off > 2).mean(), abs=1e-3)
    assert one.psnr == pytest.approx(-10 * np.log10(np.mean((off / 255) ** 2)), rel=1e-3)
    assert 0 < one.off2 <= one.off1 <= 1


@pytest.mark.filterwarnings("error::vae_export.TileWarning")
def test_tiles_that_are_seen_are_told_once(patches: dict[bool, Path]) -> None:
    z = latents(1, 4, 16, 24)
    one = Bundle(patches[True]).manifest.graphs["decoder"].tiled
    words = (
        f"in tiles of 32 × 48, pixels of pictures of 80 × 96 are off by up to {one.worst:.0f} of 255 from the untiled "
        f"ones, {one.off1:.0%} of them by more than 1"
    )
    with vae_export.load(patches[True], device="cpu") as vae:
        assert vae.describe()["tiles"] == {"decoder": words}
        vae.decode(z)
        vae.decode(z, tile=96)  # not cut
        vae.encode(np.clip(images(1, 3, 64, 96), 0, 1), tile=32)
        with pytest.warns(vae_export.TileWarning, match=f"tile: the decoder sees more .*: {words}, .* Leave tile and"):
            vae.decode(z, tile=32)
        vae.decode(z, tile=32)
    with (
        vae_export.load(patches[True], device="cpu", max_memory=200_000) as vae,
        pytest.warns(vae_export.TileWarning, match="the decoder sees more of a picture than a tile has"),
    ):
        vae.sample(1, size={"height": 512, "width": 512})
    with vae_export.load(patches[False], device="cpu") as vae:
        assert vae.describe()["tiles"] == {}
        np.testing.assert_allclose(vae.decode(z, tile=32), vae.decode(z), atol=1e-5)


def test_figures_of_tiles(patches: dict[bool, Path]) -> None:
    bundle = Bundle(patches[True])
    graphs = bundle.manifest.graphs
    measured = certificate.decode(bundle.read("verification.json"))
    counted = tables.costs(bundle.manifest.model, {}, {"height": 32, "width": 48})
    shown = tables.as_text(*tables.bundle(bundle.path, bundle.manifest, measured, [], [], counted), width=400)
    assert f"tiles in the decoder │ {graphs['decoder'].tiled} " in shown
    found = tiles.checks({name: graph.tiled for name, graph in graphs.items()})
    assert found == measured.checks[-8:]
    assert [check.id for check in found] == [
        f"tiles.{graph}.pixel.{name}" for graph in ("encoder", "decoder") for name in ("max", "off1", "off2", "psnr")
    ]
    assert found[4].measured == graphs["decoder"].tiled.worst
    assert (found[4].graph, found[4].unit) == ("decoder", "levels of 255")
    assert found[4].quantity == "worst pixel in tiles of 32 × 48, against the whole"
    assert found[4].size == "height 80, width 96"


def test_where_tiles_are_not_measured(spatial: Any, member: Callable[[str], Any]) -> None:
    """Models of fixed sizes, and those that take no picture larger than a tile or none of its last tiles."""
    assert all(graph.tiled is None for graph in Bundle(member("spatial").bundle).manifest.graphs.values())
    backend, x = open_bundle(Bundle(spatial.bundle), device="cpu").backend, images(3, 3, 32, 32)
    for limits in ({"max": 32}, {"min": 24}):
        assert tiles.measure_tiles(with_dims(spatial.source.model, **limits), backend, x) == {}
    measured = tiles.measure_tiles(with_dims(spatial.source.model, max=48), backend, x)
    assert {one.size for one in measured.values()} == {(48, 48)}


@pytest.mark.parametrize("wrong", [{"worst": 256.0}, {"off1": 1.5}, {"psnr": -1.0}, {"tile": (0, 4)}])
def test_figures_that_are_none(wrong: Any) -> None:
    right = {"tile": (32, 32), "size": (80, 64), "worst": 1.0, "off1": 0.5, "off2": 0.0, "psnr": 40.0}
    assert msgspec.to_builtins(Tiled(**right))
    with pytest.raises(ValueError, match="tiled: sizes from 1, levels from 0 to 255, shares from 0 to 1"):
        Tiled(**right | wrong)
