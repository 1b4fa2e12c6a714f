"""Data sets: every kind is read as it is meant, split once, and refused in words where it is damaged."""

from __future__ import annotations

import gc
import gzip
import hashlib
import http.server
import io
import os
import socket
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vae_export.errors import InputError
from vae_export.numerics import noise
from vae_export.numerics.pixels import to_uint8
from vae_export.trainers import datasets, download, formats, pictures
from vae_export.trainers.config import DataConfig
from vae_export.trainers.datasets import Dataset

Array = np.ndarray[Any, Any]

# pooch leaves the connection of a download that fails to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


def ramp(*shape: int, top: int = 256) -> Array:
    """Values that differ from row to row, made without a random stream."""
    return (np.arange(np.prod(shape)) * 37 % 251 % top).astype(np.uint8).reshape(shape)


def load(spec: str | Path, seed: int = 0, *, quantize: bool = False, **options: Any) -> Dataset:
    dataset = datasets.load(DataConfig(spec=str(spec), **options), seed)
    return dataset.quantized() if quantize else dataset


def everything(dataset: Dataset) -> Array:
    """All examples, each part as it is evaluated, in the order of the whole data set."""
    parts = (dataset.train, dataset.validation, dataset.test)
    order = np.argsort(np.concatenate([part.indices for part in parts]))
    return np.concatenate([part.read(np.arange(len(part))) for part in parts])[order]


def saved(path: Path, array: Array) -> str:
    np.save(path, array)
    return f"array:{path}"


def idx(array: Array, *, magic: int | None = None, sizes: tuple[int, ...] | None = None) -> bytes:
    head = struct.pack(">I", 0x0800 | array.ndim if magic is None else magic)
    return head + struct.pack(f">{array.ndim}I", *(sizes or array.shape)) + array.tobytes()


def mnist(folder: Path, count: int = 20) -> Path:
    """A small MNIST: one file packed, one with the other spelling."""
    folder.mkdir(exist_ok=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(ramp(count, 6, 5))))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(ramp(count, top=10)))
    (folder / "t10k-images.idx3-ubyte").write_bytes(idx(ramp(7, 6, 5)[::-1].copy()))
    (folder / "t10k-labels.idx1-ubyte.gz").write_bytes(gzip.compress(idx(ramp(7, top=10))))
    return folder


def cifar_rows(count: int) -> Array:
    rows = ramp(count, 3073)
    rows[:, 0] = np.arange(count) % 10
    return rows


def cifar(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "data_batch_1.bin").write_bytes(cifar_rows(4).tobytes())
    (folder / "data_batch_3.bin").write_bytes(cifar_rows(5).tobytes())
    (folder / "test_batch.bin").write_bytes(cifar_rows(3).tobytes())
    return folder


def photo(folder: Path, name: str, size: tuple[int, int] = (20, 12), mode: str = "RGB", **options: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ramp(size[1], size[0], 3)).convert(mode).save(path, **options)
    return path


def test_digits() -> None:
    from sklearn.datasets import load_digits

    dataset, digits = load("digits"), load_digits()
    assert (dataset.name, dataset.shape, dataset.levels) == ("scikit-learn handwritten digits", (1, 8, 8), 17)
    assert np.array_equal(everything(dataset)[:, 0], (digits.images / 16).astype(np.float32))
    assert dataset.test.labels is not None
    assert np.array_equal(dataset.test.labels, digits.target[dataset.test.indices])
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1258, 180, 359)
    # The rows that version 0.1.0 held out.
    order = noise.permutation(0, noise.TRAINER, (1 << 64) - 1, 1797)
    assert np.array_equal(dataset.test.indices, order[:359])


def test_photos() -> None:
    from sklearn.datasets import load_sample_images

    dataset = load("photos")
    assert (dataset.shape, dataset.levels, dataset.train.labels) == ((3, 16, 16), 256, None)
    whole = everything(dataset)
    assert len(whole) == 2 * 26 * 40
    first = load_sample_images().images[0]
    assert np.array_equal(np.rint(whole[41] * 255), first[16:32, 16:32].transpose(2, 0, 1))
    assert load("photos", size=(20, 64)).shape == (3, 20, 64)
    with pytest.raises(InputError, match=r"size is \[500, 16\], but a photograph has 427 × 640 pixels\. Give a small"):
        load("photos", size=(500, 16))


@pytest.mark.parametrize(("kind", "name"), [("mnist", "MNIST"), ("fashion", "Fashion-MNIST")])
def test_idx(tmp_path: Path, kind: str, name: str) -> None:
    dataset = load(f"{kind}:{mnist(tmp_path)}")
    assert (dataset.name, dataset.shape, dataset.levels) == (name, (1, 6, 5), 256)
    stored = np.concatenate([ramp(20, 6, 5), ramp(7, 6, 5)[::-1]])[:, None]
    assert np.array_equal(everything(dataset), (stored / 255).astype(np.float32))
    assert dataset.test.indices.tolist() == list(range(20, 27))
    assert (len(dataset.train), len(dataset.validation)) == (18, 2)
    assert dataset.train.labels is not None
    assert dataset.test.labels is not None
    assert np.array_equal(dataset.train.labels, ramp(20, top=10)[dataset.train.indices])
    assert np.array_equal(dataset.test.labels, ramp(7, top=10))
    (tmp_path / "t10k-labels.idx1-ubyte.gz").unlink()
    assert load(f"{kind}:{tmp_path}").train.labels is None


@pytest.mark.parametrize("place", [".", "cifar-10-batches-bin"])
def test_cifar10(tmp_path: Path, place: str) -> None:
    cifar(tmp_path / place)
    dataset = load(f"cifar10:{tmp_path}")
    assert (dataset.name, dataset.shape, dataset.levels) == ("CIFAR-10", (3, 32, 32), 256)
    rows = np.concatenate([cifar_rows(4), cifar_rows(5), cifar_rows(3)])
    assert np.array_equal(everything(dataset), (rows[:, 1:] / 255).astype(np.float32).reshape(-1, 3, 32, 32))
    assert dataset.test.labels is not None
    assert dataset.test.labels.tolist() == [0, 1, 2]


def test_arrays(tmp_path: Path) -> None:
    pictures = ramp(6, 3, 4, 5)
    scaled = (pictures / 255).astype(np.float32)
    for array, expected, levels in (
        (pictures, scaled, 256),
        (np.asfortranarray(pictures), scaled, 256),
        (pictures[:, 0], scaled[:, :1], 256),
        (pictures > 99, (pictures > 99).astype(np.float32), 2),
        (scaled, scaled, None),
        (scaled.astype(">f8"), scaled, None),
        (scaled.astype(np.float16), scaled.astype(np.float16).astype(np.float32), None),
    ):
        dataset = load(saved(tmp_path / "a.npy", array))
        assert np.array_equal(everything(dataset), expected)
        assert (dataset.levels, dataset.shape) == (levels, expected.shape[1:])
    np.savez(tmp_path / "one.npz", x=pictures)
    np.savez(tmp_path / "two.npz", x=pictures, y=pictures[:, :1])
    assert load(f"array:{tmp_path / 'one.npz'}").shape == (3, 4, 5)
    assert load(f"array:{tmp_path / 'two.npz'}:y").shape == (1, 4, 5)


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    saved(tmp_path / "a.npy", ramp(3, 4, 4))
    assert load("array:~/a.npy").shape == (1, 4, 4)


def test_folder_of_pictures(tmp_path: Path) -> None:
    photo(tmp_path, "b.png")
    photo(tmp_path, "a/c.jpg", (40, 16), quality=95)
    photo(tmp_path, "a/D.GIF")
    photo(tmp_path, "e.webp", (5, 9))
    photo(tmp_path, "f.bmp", mode="L")
    (tmp_path / "notes.txt").write_text("no picture")
    dataset = load(f"images:{tmp_path}", size=(12, 20))
    assert (dataset.shape, dataset.levels, dataset.skipped) == ((3, 12, 20), 256, ())
    assert dataset.name == f"pictures in {tmp_path.name}"
    whole = everything(dataset)
    # Sorted: a/D.GIF, a/c.jpg, b.png, e.webp, f.bmp. What has the size already is as it was.
    assert np.array_equal(np.rint(whole[2] * 255), ramp(12, 20, 3).transpose(2, 0, 1))
    grey = np.asarray(Image.open(tmp_path / "f.bmp"))
    assert np.array_equal(np.rint(whole[4] * 255), np.stack([grey] * 3))
    assert load(f"images:{tmp_path}", channels=1).shape == (1, 64, 64)


def test_pictures_are_cut_to_their_centre_and_upright(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "b.png")
    turned = np.zeros((10, 10, 3), np.uint8)
    turned[:, :5] = 255  # bright left half; orientation 6 turns it to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(turned).save(tmp_path / "c.png", exif=exif)
    whole = everything(load(f"images:{tmp_path}", size=(10, 10)))
    assert np.array_equal(whole[:2], np.full((2, 3, 10, 10), 200 / 255, np.float32))
    assert whole[2, :, :5].min() == 1
    assert whole[2, :, 5:].max() == 0


def test_large_pictures_are_averaged_and_not_sampled(tmp_path: Path) -> None:
    """Stripes of one pixel become grey, in a JPEG too, which is decoded at a fraction of its size."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    for name in ("a.png", "b.jpg", "c.webp"):
        Image.fromarray(stripes).save(tmp_path / name)
    whole = everything(load(f"images:{tmp_path}", size=(16, 16)))
    assert np.abs(whole - 0.5).max() < 0.02


def test_deep_and_clear_pictures(tmp_path: Path) -> None:
    """16 bits are scaled, not cut off at 255; what is transparent lies on black."""
    levels = (np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels).save(tmp_path / "b.tif")
    clear = np.full((8, 8, 4), 255, np.uint8)
    clear[:, :, 3] = np.arange(8) * 36
    Image.fromarray(clear).save(tmp_path / "c.png")
    Image.fromarray(clear[..., 2:]).save(tmp_path / "d.png")
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    palette.save(tmp_path / "e.png", transparency=bytes(range(0, 256, 4)) + b"\xff" * 192)
    dataset = load(f"images:{tmp_path}", size=(8, 8), channels=1)
    assert dataset.skipped == ()
    whole = everything(dataset)[:, 0]
    for deep in whole[:2]:
        assert np.allclose(deep, levels / 65535, atol=0.5 / 255 + 1e-6)
    for transparent in whole[2:4]:
        assert np.allclose(transparent[0] * 255, np.arange(8) * 36, atol=1)
    assert whole[4, 0, 0] == 0


def test_what_cannot_be_read_is_skipped_and_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        photo(tmp_path, name)
    good = photo(tmp_path, "z.png").read_bytes()
    (tmp_path / "z.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.gif").write_text("GIF")
    pages = [Image.fromarray(ramp(8, 8)), Image.fromarray(ramp(8, 8)[::-1].copy())]
    pages[0].save(tmp_path / "moves.gif", save_all=True, append_images=pages[1:])
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    huge = bytearray(good)
    huge[16:24] = struct.pack(">II", 60_000, 60_000)  # in the header, which has a checksum
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    (tmp_path / "huge.png").write_bytes(huge)
    dataset = load(f"images:{tmp_path}", size=(4, 4))
    assert len(everything(dataset)) == 3
    assert dataset.split.skipped == len(dataset.skipped) == 6
    reasons = dict(text.split(": ", 1) for text in dataset.skipped)
    assert list(reasons) == ["empty.jpg", "float.tif", "huge.png", "moves.gif", "text.gif", "z.png"]
    assert reasons["empty.jpg"] == "it is empty"
    assert reasons["text.gif"] == "it is not a picture"
    assert reasons["moves.gif"] == "it has 2 frames"
    assert "mode F" in reasons["float.tif"]
    assert "decompression bomb" in reasons["huge.png"]
    assert "truncated" in reasons["z.png"]
    for name in ("a.png", "b.png"):
        (tmp_path / name).unlink()
    with pytest.raises(
        InputError, match=r"has 1 example to train on; expected 3 or more: .*Skipped: empty\.jpg: it is"
    ):
        load(f"images:{tmp_path}")
    (tmp_path / "c.png").unlink()
    with pytest.raises(InputError, match=r"has 6 files with a picture's suffix, and none can be read: empty\.jpg: .*…"):
        load(f"images:{tmp_path}")


def test_a_picture_that_warns_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    for name in ("a.png", "b.png", "c.png"):
        photo(tmp_path, name, (8, 8))
    photo(tmp_path, "d.png", (20, 12))
    (skipped,) = load(f"images:{tmp_path}").skipped
    assert "could be decompression bomb" in skipped


def test_pictures_that_do_not_fit_in_memory_are_read_again(tmp_path: Path) -> None:
    for n in range(6):
        photo(tmp_path, f"{n}.png", (10 + n, 12))
    (tmp_path / "broken.png").touch()
    config = DataConfig(spec=f"images:{tmp_path}", size=(8, 8))
    kept, lazy = (datasets.load(config, 0, memory=memory) for memory in (10_000, 100))
    assert isinstance(kept.train.rows, formats.ArrayRows)
    assert isinstance(lazy.train.rows, pictures.PictureRows)
    assert len(lazy.train.rows) == len(kept.train.rows) == 6
    assert lazy.split == kept.split
    assert np.array_equal(everything(lazy), everything(kept))
    (tmp_path / "3.png").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"3\.png was readable when training began and no longer is: it is empty\. Res"
    ):
        everything(lazy)
    (tmp_path / "3.png").unlink()
    with pytest.raises(InputError, match=r"3\.png was readable when .* No such file"):
        everything(lazy)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="links")
def test_linked_folders_are_entered_once(tmp_path: Path) -> None:
    for name in ("a.png", "b/c.png", "b/d.png"):
        photo(tmp_path / "here", name)
    photo(tmp_path / "there", "e.png")
    (tmp_path / "here" / "b" / "loop").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "there")
    (tmp_path / "here" / "twice").symlink_to(tmp_path / "there")
    files = pictures.find(tmp_path / "here")
    assert len(files) == 4
    assert len({path.resolve() for path in files}) == 4


def test_progress_is_reported(tmp_path: Path) -> None:
    Image.fromarray(ramp(2, 2)).save(tmp_path / "0.bmp")
    content = (tmp_path / "0.bmp").read_bytes()
    for n in range(1, 1001):
        (tmp_path / f"{n}.bmp").write_bytes(content)
    messages: list[str] = []
    datasets.load(DataConfig(spec=f"images:{tmp_path}", size=(2, 2)), 0, report=messages.append)
    assert messages == ["1,000 of 1,001 pictures read"]


@given(
    count=st.integers(3, 200),
    validation=st.floats(0.01, 0.5),
    test=st.floats(0.01, 0.49),
    seed=st.integers(0, 2**64 - 1),
    own=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_parts_are_disjoint_and_cover(count: int, validation: float, test: float, seed: int, own: int) -> None:
    rows = formats.ArrayRows(np.zeros((count + own, 1, 1, 1), np.uint8))
    raw = formats.RawDataset("x", rows, (1, 1, 1), "uint8", 256, test=own)
    parts = datasets.split_rows(raw, DataConfig(validation=validation, test=test), seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(count + own))
    assert min(map(len, parts)) >= 1
    assert len(parts[1]) == min(max(1, round(validation * count)), count - 1 - len(parts[2]) * (not own))
    if own:
        assert parts[2].tolist() == list(range(count, count + own))
    else:
        assert len(parts[2]) == min(max(1, round(test * count)), count - 2)


def test_same_seed_same_data() -> None:
    options: dict[str, Any] = {"binarize": "dynamic", "flip": True}
    first, again, other = (load("digits", seed, **options) for seed in (5, 5, 6))
    some = np.arange(40)
    assert first.split == again.split
    assert first.split.fingerprint == other.split.fingerprint
    assert np.array_equal(first.train.draw(some, 99), again.train.draw(some, 99))
    assert np.array_equal(first.test.read(some), again.test.read(some))
    assert not np.array_equal(first.test.indices, other.test.indices)


@pytest.mark.parametrize("options", [{}, {"binarize": "static"}, {"binarize": "dynamic"}, {"dequantize": True}])
@pytest.mark.parametrize("flip", [False, True])
@given(cut=st.integers(0, 32), first=st.integers(0, 2**62 - 64))
@settings(max_examples=8, deadline=None)
def test_slices_are_slices_of_the_whole(options: dict[str, Any], flip: bool, cut: int, first: int) -> None:
    part = load("digits", 3, flip=flip, **options).train
    rows = (np.arange(32) * 7) % len(part)
    whole = part.draw(rows, first)
    assert whole.dtype == np.float32
    assert whole.flags.c_contiguous
    assert whole.shape == (32, 1, 8, 8)
    assert np.array_equal(np.concatenate([part.draw(rows[:cut], first), part.draw(rows[cut:], first + cut)]), whole)
    read = part.read(rows)
    assert np.array_equal(np.concatenate([part.read(rows[:cut]), part.read(rows[cut:])]), read)
    assert np.array_equal(part.read(rows[::-1]), read[::-1])


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0), (0.1, 0.3)])
def test_levels(tmp_path: Path, value_range: tuple[float, float]) -> None:
    """Level k of L is low + k / (L - 1) of the range; with noise it is uniform over k / L to (k + 1) / L."""
    low, high = value_range
    stored = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    spec = saved(tmp_path / "a.npy", stored)
    whole = everything(load(spec, range=value_range))
    assert np.allclose(whole, low + stored / 255 * (high - low), rtol=1e-6, atol=1e-7)
    assert (whole.min(), whole.max()) == (np.float32(low), np.float32(high))
    assert np.array_equal(to_uint8(whole, value_range), stored)
    dequantized = load(spec, range=value_range, dequantize=True)
    assert dequantized.levels == 256
    for x in (everything(dequantized), everything(load(spec, 1, range=value_range, dequantize=True))):
        assert np.float32(low) <= x.min() < x.max() <= np.float32(high)
        assert np.array_equal(np.floor((x.astype(np.float64) - low) / (high - low) * 256 + 1e-4), stored)


def test_static_noise_is_drawn_once() -> None:
    for options in ({"binarize": "static"}, {"dequantize": True}):
        one, two = load("digits", 0, **options), load("digits", 0, validation=0.3, **options)
        # A row has the same noise in whichever part it is.
        assert np.array_equal(everything(one), everything(two))
    part = load("digits", 0, binarize="static").train
    some = np.arange(50)
    assert np.array_equal(part.draw(some, 0), part.draw(some, 1000))
    assert np.array_equal(part.draw(some, 0), part.read(some))
    assert set(np.unique(part.read(some)).tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("options", [{"binarize": "dynamic"}, {"dequantize": True}])
def test_dynamic_noise_is_drawn_anew(options: dict[str, Any]) -> None:
    part = load("digits", 0, **options).train
    some = np.arange(50)
    draws = [part.draw(some, 0), part.draw(some, 50), part.read(some)]
    for index, x in enumerate(draws):
        for other in draws[index + 1 :]:
            assert not np.array_equal(x, other)


def test_binarized_values_have_their_probability() -> None:
    plain, binary = load("digits"), load("digits", binarize="dynamic")
    assert binary.levels == 2
    probability = plain.train.read(np.arange(20))
    draws = np.stack([binary.train.draw(np.arange(20), first) for first in range(0, 8000, 20)])
    assert set(np.unique(draws).tolist()) == {0.0, 1.0}
    error = np.abs(draws.mean(axis=0) - probability)
    assert error.max() < 5 * 0.5 / np.sqrt(len(draws))
    assert error[(probability == 0) | (probability == 1)].max() == 0


def test_flips() -> None:
    """Half of the training examples are mirrored, left to right; those that are evaluated are not."""
    plain, flipped = load("digits"), load("digits", flip=True)
    rows = np.arange(1000)
    x, y = plain.train.read(rows), flipped.train.draw(rows, 12)
    mirrored = (y == x[..., ::-1]).all(axis=(1, 2, 3))
    kept = (y == x).all(axis=(1, 2, 3))
    assert (mirrored | kept).all()
    assert 400 < mirrored.sum() < 600
    assert np.array_equal(everything(flipped), everything(plain))
    once = load("digits", flip=True, binarize="static").train
    x, y = once.read(rows), once.draw(rows, 12)
    assert ((y == x).all(axis=(1, 2, 3)) | (y == x[..., ::-1]).all(axis=(1, 2, 3))).all()


def test_no_noise_is_used_twice() -> None:
    """Binarization, dequantization, flips and the posterior's draws of one example are independent."""
    draws = [
        *range(3),
        *(draw + once for draw in (datasets.BINARIZE, datasets.DEQUANTIZE) for once in (0, datasets.ONCE)),
    ]
    draws.append(datasets.FLIP)
    assert len(set(draws)) == 8
    assert max(draws) < 1 << 64


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=30),
    st.sampled_from([(-1.0, 1.0), (-1.5, 2.0)]),
)
@settings(max_examples=30, deadline=None)
def test_rounding_to_256_levels(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], value_range: tuple[float, float]
) -> None:
    path = tmp_path_factory.mktemp("levels") / "a.npy"
    x = np.array(values, np.float32)[:, None, None]
    dataset = load(saved(path, x), range=value_range, quantize=True)
    assert dataset.levels == 256
    levels = np.linspace(*value_range, 256).astype(np.float32)
    rounded = everything(dataset)[:, 0]
    assert np.isin(rounded, levels).all()
    assert np.abs(rounded - x).max() <= np.diff(value_range)[0] / 510 * (1 + 1e-5)


def test_rounding_of_what_has_levels(tmp_path: Path) -> None:
    pictures = ramp(5, 1, 6, 6)
    spec = saved(tmp_path / "a.npy", pictures)
    assert np.array_equal(everything(load(spec, quantize=True)), everything(load(spec)))
    digits = load("digits", quantize=True)
    assert digits.levels == 256
    assert np.array_equal(to_uint8(everything(digits), (0, 1)), np.rint(everything(load("digits")) * 255))
    spec = saved(tmp_path / "b.npy", pictures > 99)
    assert np.array_equal(everything(load(spec, quantize=True)), everything(load(spec)))


def test_the_fingerprint_is_of_the_data(tmp_path: Path) -> None:
    def fingerprint(folder: str, array: Array) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        return load(saved(tmp_path / folder / "a.npy", array)).split.fingerprint

    first = fingerprint("a", ramp(4, 6, 6))
    assert len(bytes.fromhex(first)) == 32
    assert fingerprint("b", ramp(4, 6, 6)) == first
    others = {fingerprint("b", ramp(*shape)) for shape in ((5, 6, 6), (4, 9, 4), (2, 2, 6, 6)[::-1])}
    assert len({first, *others, fingerprint("c", ramp(4, 6, 6) > 9)}) == 5
    split = load(f"mnist:{mnist(tmp_path / 'm')}").split
    assert (split.name, split.train, split.validation, split.test, split.skipped) == ("MNIST", 18, 2, 7, 0)
    assert split.fingerprint != load(f"fashion:{tmp_path / 'm'}").split.fingerprint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"spec": "cats"},
            "data set 'cats' is not known; expected digits, photos, mnist:DIR, .*, array:FILE.npy or arr",
        ),
        ({"spec": ""}, "data set '' is not known; expected digits"),
        ({"spec": "mnist"}, "data set 'mnist' needs a path; expected mnist:DIR"),
        ({"spec": "images:"}, "data set 'images' needs a path; expected images:DIR"),
        ({"spec": "digits:here"}, "data set 'digits' takes no path; expected digits"),
        ({"spec": "mnist:/nowhere"}, "/nowhere does not exist; expected a folder"),
        ({"spec": f"cifar10:{__file__}"}, r"test_data\.py is not a folder"),
        ({"spec": "array:/nowhere.npy"}, r"/nowhere\.npy does not exist; expected a file"),
        ({"spec": "array:/"}, "/ is not a file"),
        ({"spec": "images:~nobody-of-this-name/x"}, "~nobody-of-this-name/x does not exist: Could not determine home"),
        (
            {"spec": "digits", "size": (8, 8)},
            r"data set 'digits' has a fixed size, got size \[8, 8\]\. Leave it out",
        ),
        ({"spec": "photos", "channels": 1}, r"channels is 1, but patches of .* has 3\. Only images:DIR converts them"),
        ({"spec": "digits", "binarize": "static", "dequantize": True}, "binarized data has no levels left"),
        ({"spec": "digits", "test": 0.0}, r"validation, test is \(0\.1, 0\.0\); expected positive shares"),
    ],
)
def test_bad_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(**config)


def test_a_folder_without_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pngs").mkdir()
    with pytest.raises(InputError, match=r"KEY\. pngs is a folder: to train on its pictures, use --data images:pngs"):
        load("pngs")
    with pytest.raises(InputError, match=r"data set 'jpgs' is not known; .*KEY$"):
        load("jpgs")


@pytest.mark.parametrize("options", [{"binarize": "dynamic"}, {"dequantize": True}])
def test_rounding_excludes_other_transforms(options: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match="likelihood 'discretized_logistic' needs data with 256 levels, which binarized"
    ):
        load("digits", quantize=True, **options)


def test_too_few_examples(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"a\.npy has 2 examples to train on; expected 3 or more: at least one each for training, validation and",
    ):
        load(saved(tmp_path / "a.npy", ramp(2, 4, 4)))
    mnist(tmp_path, 1)
    with pytest.raises(
        InputError,
        match=r"MNIST has 1 example to train on; expected 2 or more: at least one each for training and validation",
    ):
        load(f"mnist:{tmp_path}")
    photo(tmp_path / "one", "picture.png")
    with pytest.raises(InputError, match=r"pictures in one has 1 example to train on; expected 3 or more"):
        load(f"images:{tmp_path / 'one'}")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"none has no pictures in it \(\.bmp, \.gif, \.jpeg"):
        load(f"images:{tmp_path / 'none'}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train-images-idx3-ubyte",
            b"",
            "begins with nothing; expected 00000803, an IDX file of unsigned bytes, and 3",
        ),
        ("train-images-idx3-ubyte", idx(ramp(20, 6, 5), magic=0x0D03), "begins with 00000d03"),
        ("train-images-idx3-ubyte", idx(ramp(20)), "begins with 00000801"),
        ("train-images-idx3-ubyte", idx(ramp(20, 6, 5))[:9], "begins with 000008030000001400; expected"),
        (
            "train-images-idx3-ubyte",
            idx(ramp(20, 6, 5))[:-1],
            "fewer values than its header claims, 20 × 6 × 5 = 600",
        ),
        ("train-images-idx3-ubyte", idx(ramp(20, 6, 5)) + b"x", "more values than its header claims"),
        (
            "train-images-idx3-ubyte",
            idx(ramp(20, 6, 5), sizes=(2**32 - 1,) * 3),
            "fewer values than its header claims",
        ),
        ("train-images-idx3-ubyte", gzip.compress(idx(ramp(20, 6, 5), sizes=(2**31, 9, 9))), "fewer values than its"),
        ("train-images-idx3-ubyte", gzip.compress(idx(ramp(20, 6, 5)) + bytes(99)), "more values than its header"),
        ("train-images-idx3-ubyte", gzip.compress(idx(ramp(20, 6, 5)))[:-20], "is damaged: Compressed file ended"),
        ("train-images-idx3-ubyte", gzip.compress(b"x" * 9, mtime=0)[:10] + b"\xff" * 9, "is damaged: Error -3"),
        ("train-images-idx3-ubyte", gzip.compress(idx(ramp(20, 6, 5)))[:-8] + bytes(8), "is damaged: CRC check failed"),
        (
            "train-images-idx3-ubyte",
            idx(ramp(0, 6, 5)),
            r"is empty: its header says \[0, 6, 5\]\. Fetch it again \(--d",
        ),
        ("train-labels-idx1-ubyte", idx(ramp(19)), r"has 19 labels; train-images-idx3-ubyte\.gz has 20 pictures"),
        ("t10k-images-idx3-ubyte", idx(ramp(7, 5, 6)), "training pictures of 6 × 5 and test pictures of 5 × 6 pixels"),
    ],
)
def test_damaged_idx(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (mnist(tmp_path) / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(f"mnist:{tmp_path}")


def test_missing_idx(tmp_path: Path) -> None:
    (mnist(tmp_path) / "t10k-images.idx3-ubyte").unlink()
    with pytest.raises(
        InputError, match=r"has no t10k-images-idx3-ubyte or .*\.gz; expected the files of MNIST\. Fetch"
    ):
        load(f"mnist:{tmp_path}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "data_batch_1.bin").write_bytes(bytes(3072)), "has 3,072 bytes; expected a multiple of 3,073"),
        (lambda p: (p / "test_batch.bin").write_bytes(b""), r"test_batch\.bin has 0 bytes"),
        (
            lambda p: (p / "test_batch.bin").write_bytes(bytes(3073) + b"\x0b" * 3073),
            "row 1 has the label 11; expected 0",
        ),
        (
            lambda p: (p / "test_batch.bin").unlink(),
            "has no data_batch_1.bin to .* or no test_batch.bin, nor has cifar",
        ),
        (lambda p: [path.unlink() for path in p.glob("data*")], "expected the binary version of CIFAR-10. Fetch it"),
    ],
)
def test_damaged_cifar10(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(cifar(tmp_path))
    with pytest.raises(InputError, match=message):
        load(f"cifar10:{tmp_path}")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            ramp(9, 8, 8, 3),
            r"\(9, 8, 8, 3\), whose channels look to be last; .* Save it as array\.transpose\(0, 3, 1, 2\)",
        ),
        (ramp(9, 8, 8, 1), "whose channels look to be last"),
        (ramp(9, 8), r"has shape \(9, 8\); expected \(N, C, H, W\) or \(N, H, W\)"),
        (ramp(), r"has shape \(\); expected"),
        (ramp(0, 8, 8), r"has shape \(0, 8, 8\); expected .*, no axis of length 0"),
        (ramp(4, 8, 8).astype(np.int64), r"has dtype int64; expected uint8, bool, .* Convert it: array\.astype"),
        (ramp(4, 8, 8).astype(np.complex64), "has dtype complex64"),
        (np.array([{}] * 4).reshape(4, 1, 1), "is not a plain NumPy array: .*object"),
        (
            np.linspace(0, 1.5, 12).reshape(4, 1, 3),
            r"row 2 has the value 1\.09091; expected values from 0 to 1\. Scale",
        ),
        (np.array([0.5, 0.5, np.nan]).reshape(3, 1, 1), r"row 2 has the value nan; .* state its range \(--range\)"),
        (np.array([0.5, -np.inf, 0.5]).reshape(3, 1, 1), "row 1 has the value -inf"),
        (np.array([1e300, 0, 0]).reshape(3, 1, 1), "row 0 has the value inf"),
        (np.array([0, 1, 7], np.uint8).view(bool).reshape(3, 1, 1), "row 2 has the value 7"),
    ],
)
def test_bad_arrays(tmp_path: Path, array: Array, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=message):
        load(f"array:{tmp_path / 'a.npy'}")


@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
def test_values_are_checked_to_the_last_row(tmp_path: Path, chunk: int) -> None:
    x = np.zeros((33, 1, 4, 4), np.float32)
    formats.check_values(tmp_path, x, (0.0, 1.0), chunk)
    x[32, 0, 3, 3] = 2
    with pytest.raises(InputError, match="row 32 has the value 2"):
        formats.check_values(tmp_path, x, (0.0, 1.0), chunk)


def test_what_is_in_the_range_as_float32_is_in_it(tmp_path: Path) -> None:
    assert load(saved(tmp_path / "a.npy", np.full((3, 2, 2), 1 + 1e-12))).levels is None


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_text("nothing of the kind")
    with pytest.raises(InputError, match=r"a\.npy is not a plain NumPy array: "):
        load(f"array:{tmp_path / 'a.npy'}")
    with (tmp_path / "a.npy").open("wb") as file:
        np.savez(file, x=ramp(3, 4, 4))
    with pytest.raises(InputError, match=r"a\.npy is not a plain NumPy array; is it an \.npz\?"):
        load(f"array:{tmp_path / 'a.npy'}")
    (tmp_path / "a.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match=r"a\.npz is not a NumPy archive of plain arrays: "):
        load(f"array:{tmp_path / 'a.npz'}")
    np.savez(tmp_path / "a.npz", x=ramp(3, 4, 4), y=ramp(3, 4, 4))
    for key in ("", ":z"):
        with pytest.raises(InputError, match=r"a\.npz has the arrays x, y; name one: array:.*a\.npz:KEY"):
            load(f"array:{tmp_path / 'a.npz'}{key}")
    np.savez(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"a\.npz has the arrays none"):
        load(f"array:{tmp_path / 'a.npz'}")
    np.savez(tmp_path / "a.npz", x=np.array([{}] * 3))
    with pytest.raises(InputError, match=r"a\.npz is not a NumPy archive of plain arrays: .*allow_pickle"):
        load(f"array:{tmp_path / 'a.npz'}")


def test_floats_have_no_levels_to_dequantize(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"a\.npy has no levels to dequantize, its values are float32; expected uint8 or"
    ):
        load(saved(tmp_path / "a.npy", np.zeros((4, 4, 4), np.float32)), dequantize=True)


@given(
    array=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)).map(lambda shape: ramp(*shape)),
    packed=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_idx_round_trip(tmp_path_factory: pytest.TempPathFactory, array: Array, packed: bool) -> None:
    path = tmp_path_factory.mktemp("idx") / "x"
    path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    assert np.array_equal(formats.read_idx(path, 3), array)


def npy(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(array: Array) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=array)
    return file.getvalue()


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(ramp(9, 7, 3)).save(file, kind)
    return file.getvalue()


VICTIMS = {
    "idx": ("mnist:{}", "train-images-idx3-ubyte", idx(ramp(20, 6, 5))),
    "packed idx": ("mnist:{}", "train-images-idx3-ubyte", gzip.compress(idx(ramp(20, 6, 5)))),
    "labels": ("mnist:{}", "train-labels-idx1-ubyte", idx(ramp(20, top=10))),
    "cifar": ("cifar10:{}", "test_batch.bin", cifar_rows(2).tobytes()),
    "npy": ("array:{}/a.npy", "a.npy", npy(ramp(5, 1, 4, 4))),
    "float npy": ("array:{}/a.npy", "a.npy", npy(ramp(5, 1, 4, 4) / 255)),
    "npz": ("array:{}/a.npz:x", "a.npz", npz(ramp(5, 1, 4, 4))),
    **{f"{kind} picture": ("images:{}", f"z.{kind}", picture(kind)) for kind in ("png", "jpeg", "gif", "webp", "tiff")},
}


@pytest.mark.parametrize("victim", VICTIMS)
@given(random=st.randoms(use_true_random=False), flips=st.integers(0, 4), cut=st.booleans())
@settings(max_examples=60, deadline=None)
def test_damage_gives_data_or_words(
    tmp_path_factory: pytest.TempPathFactory, victim: str, random: Any, flips: int, cut: bool
) -> None:
    spec, name, content = VICTIMS[victim]
    folder = tmp_path_factory.mktemp("damage")
    if spec.startswith("images"):
        for n in range(3):
            photo(folder, f"{n}.png", (4, 4))
    elif not spec.startswith("array"):
        {"m": mnist, "c": cifar}[spec[0]](folder)
    damaged = bytearray(content)
    for _ in range(flips):
        # Half of the blows hit the header.
        place = random.randrange(min(128, len(damaged)) if random.random() < 0.5 else len(damaged))
        damaged[place] = random.randrange(256)
    if cut:
        del damaged[random.randrange(len(damaged)) :]
    (folder / name).write_bytes(damaged)
    with suppress(InputError):
        whole = everything(load(spec.format(folder)))
        assert whole.dtype == np.float32
        assert ((whole >= 0) & (whole <= 1)).all()


class Server(http.server.ThreadingHTTPServer):
    """A server of a folder that counts what it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are meant to."""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, without a word."""

    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()
    gc.collect()


def remote(server: Server, path: Path, **changed: Any) -> download.Remote:
    content = path.read_bytes() if path.exists() else b""
    facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return download.Remote(f"http://127.0.0.1:{server.server_port}/{path.name}", **{**facts, **changed})


def test_download_of_idx(tmp_path: Path, server: Server) -> None:
    served = tmp_path / "served"
    mnist(served)
    sources = {"mnist": tuple(remote(server, path) for path in sorted(served.iterdir()))}
    messages: list[str] = []
    there = tmp_path / "data" / "mnist"
    download.download("mnist", there, messages.append, sources)
    assert sorted(path.name for path in there.iterdir()) == sorted(path.name for path in served.iterdir())
    assert load(f"mnist:{there}").split == load(f"mnist:{served}").split
    assert len(server.asked) == len(messages) == 4
    assert "t10k-images.idx3-ubyte: 226 of 226 bytes" in messages[0]
    # What is there already, in whatever spelling, is not asked for again.
    packed = there / "train-images-idx3-ubyte.gz"
    (there / "train-images.idx3-ubyte").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    download.download("mnist", there, messages.append, sources)
    assert len(server.asked) == 4


def test_download_of_an_archive(tmp_path: Path, server: Server) -> None:
    archive = tmp_path / "served" / "cifar.tar.gz"
    cifar(tmp_path / formats.CIFAR)
    names = ("data_batch_1.bin", "data_batch_3.bin", "test_batch.bin")
    with tarfile.open(archive, "w:gz") as tar:
        for name in names:
            tar.add(tmp_path / formats.CIFAR / name, f"{formats.CIFAR}/{name}")
        tar.add(__file__, "../outside.py")
        tar.add(__file__, f"{formats.CIFAR}/other.py")
    sources = {"cifar10": (remote(server, archive, members=tuple(f"{formats.CIFAR}/{name}" for name in names)),)}
    there = tmp_path / "data"
    download.download("cifar10", there, sources=sources)
    assert sorted(path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()) == [
        f"{formats.CIFAR}/{name}" for name in names
    ]
    assert not (tmp_path / "outside.py").exists()
    assert len(load(f"cifar10:{there}").test) == 3
    download.download("cifar10", there, sources=sources)
    assert len(server.asked) == 1
    (there / formats.CIFAR / names[1]).unlink()
    download.download("cifar10", there, sources=sources)
    assert (there / formats.CIFAR / names[1]).read_bytes() == cifar_rows(5).tobytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"sha256": "0" * 64},
            "/x cannot be downloaded: SHA256 hash of downloaded file .* does not match the known hash",
        ),
        ({"size": 5, "sha256": "0" * 64}, "the server sends more than 5 bytes"),
        (
            {"url": "/none"},
            r"/none cannot be downloaded: 404 .*not found.*Try again, or download it by hand into .*data",
        ),
    ],
)
def test_downloads_that_go_wrong(tmp_path: Path, server: Server, changed: dict[str, Any], message: str) -> None:
    (tmp_path / "served" / "x").write_bytes(b"123456789")
    wrong = remote(server, tmp_path / "served" / changed.pop("url", "/x")[1:], **changed)
    with pytest.raises(InputError, match=message):
        download.download("mnist", tmp_path / "data", sources={"mnist": (wrong,)})
    assert list((tmp_path / "data").iterdir()) == []
    archive = download.Remote(wrong.url, wrong.size, wrong.sha256, ("a", "b"))
    with pytest.raises(InputError, match=message):
        download.download("cifar10", tmp_path / "data", sources={"cifar10": (archive,)})
    assert list((tmp_path / "data").iterdir()) == []


def test_a_download_that_has_no_end_is_left(tmp_path: Path, server: Server) -> None:
    (tmp_path / "served" / "x").write_bytes(bytes(5 << 20))
    endless = remote(server, tmp_path / "served" / "x", size=10)
    with pytest.raises(InputError, match=r"the server sends more than 10 bytes"):
        download.download("mnist", tmp_path / "data", sources={"mnist": (endless,)})


def test_no_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as deaf:  # has an address and does not listen
        deaf.bind(("127.0.0.1", 0))
        nobody = download.Remote(f"http://127.0.0.1:{deaf.getsockname()[1]}/x", 1, "")
        with pytest.raises(
            InputError, match=r"/x cannot be downloaded: .*refused\. Try again, or download it by hand into .*data"
        ):
            download.download("mnist", tmp_path / "data", sources={"mnist": (nobody,)})
    with pytest.raises(InputError, match="data set 'digits' cannot be downloaded; expected mnist, fashion, cifar10"):
        download.download("digits", tmp_path)


def test_a_server_that_falls_silent(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda self: done.wait(5))
    sources = {"mnist": (remote(server, tmp_path / "x", size=1),)}
    with pytest.raises(InputError, match=r"/x cannot be downloaded: .*timed out"):
        download.download("mnist", tmp_path / "data", sources=sources, timeout=0.2)
    done.set()


def test_the_table_of_sources_gives_what_is_read() -> None:
    for kind, sources in download.SOURCES.items():
        assert kind in formats.READERS
        for source in sources:
            assert len(bytes.fromhex(source.sha256)) == 32
            assert source.url.startswith("https://") or kind == "fashion"
    names = {name for source in download.SOURCES["mnist"] for name in source.files}
    assert names == {f"{part}-{what}-ubyte.gz" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")}
    assert download.SOURCES["cifar10"][0].files[-1] == "cifar-10-batches-bin/test_batch.bin"
