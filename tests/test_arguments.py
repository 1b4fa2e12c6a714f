"""Arguments of another kind than a function takes: told in words, whatever they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_modules import user

import vae_export
from vae_export.contract import atomic
from vae_export.errors import InputError
from vae_export.sources import module

SEVERAL = np.zeros(2)


@pytest.fixture(scope="module")
def vae(digits: dict[str, Path]) -> vae_export.VAE:
    return vae_export.load(digits["gaussian"])


X = np.zeros((1, 1, 8, 8), np.float32)
FLAGS: dict[str, Callable[[Any], Any]] = {
    "encode: pad": lambda v: v.encode(X, pad=SEVERAL),
    "decode: scaled": lambda v: v.decode(np.zeros((1, 8), np.float32), scaled=SEVERAL),
    "reconstruct: pad": lambda v: v.reconstruct(X, pad=SEVERAL),
    "sample: draw": lambda v: v.sample(1, draw=SEVERAL),
    "sample: on_device": lambda v: v.sample(1, on_device=SEVERAL),
    "generate: on_device": lambda v: v.generate(1, on_device=SEVERAL),
}


@pytest.mark.parametrize("verb", ["sample", "generate"])
def test_more_than_the_machine_holds(vae: vae_export.VAE, verb: str) -> None:
    said = rf"^{verb}: 99,999,999,999,999 examples take .* GiB, and this machine has .* GiB. Draw them in parts, by"
    with pytest.raises(InputError, match=said):
        getattr(vae, verb)(99_999_999_999_999)


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_calls(vae: vae_export.VAE, name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} is a ndarray; expected True or False$"):
        FLAGS[name](vae)


def test_truths_of_numpy_are_taken(vae: vae_export.VAE) -> None:
    assert np.array_equal(vae.encode(X, pad=np.True_).mean, vae.encode(X).mean)


@pytest.mark.parametrize("strength", [10**400, float("nan"), np.float64("inf")])
def test_too_far_to_edit(vae: vae_export.VAE, strength: float) -> None:
    with pytest.raises(InputError, match=r"^edit: strength is .*; expected a finite number$"):
        vae.edit(X, np.zeros(8, np.float32), strength)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"precision": SEVERAL}, r"load: precision is array\(.*; expected auto, fp32"),
        ({"cuda_graphs": SEVERAL}, r"load: cuda_graphs is array\(.*; expected True, False or None"),
        ({"device": SEVERAL}, r"load: device is array\(.*; expected 'auto', 'cpu' or 'cuda'"),
        ({"check_range": SEVERAL}, "load: check_range is a ndarray; expected True or False"),
    ],
)
def test_load(digits: dict[str, Path], said: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        vae_export.load(digits["gaussian"], **said)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"target": SEVERAL}, r"build: target is array\(.*; expected cpu, cuda"),
        ({"precision": SEVERAL}, r"build: precision is array\(.*; expected auto, fp32"),
        ({"static": SEVERAL}, "build: static is a ndarray; expected True or False"),
        ({"sizes": SEVERAL}, r"build: sizes is array\(.*; expected a sequence of sizes such as \[\{'height': 64\}\]"),
        ({"sizes": 8}, "build: sizes is 8; expected a sequence"),
        ({"out": SEVERAL}, r"build: out is array\(.*; expected the path of a folder, or None for the cache"),
        ({"seconds": SEVERAL}, r"build: seconds is array\(.*; expected a number above 0"),
        ({"passes": 1}, "build: passes is 1; expected a text such as 'all,-winograd'"),
    ],
)
def test_build(digits: dict[str, Path], said: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        vae_export.build(digits["gaussian"], **({"target": "cpu"} | said))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"name": SEVERAL}, "export: name is a ndarray; expected a text"),
        ({"likelihood": SEVERAL}, "export: likelihood is a ndarray; expected a text"),
        ({"variance": SEVERAL}, "export: variance is a ndarray; expected a number"),
        ({"variance": True}, "export: variance is a bool; expected a number"),
        ({"scaling": "1"}, "export: scaling is a str; expected a number"),
        ({"shift": 1j}, "export: shift is a complex; expected a number"),
        ({"nominal": SEVERAL}, "export: nominal is a ndarray; expected True or False"),
        ({"held_out": np.zeros((2, 1, 0, 4), np.float32)}, r"export: held_out has shape \(2, 1, 0, 4\); expected \(B,"),
    ],
)
def test_modules(said: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        module.resolve(dataclasses.replace(user(), **said))


def test_numbers_of_numpy_are_taken() -> None:
    source = user(variance=np.float32(0.5), scaling=np.float64(2), shift=np.int64(1))
    model = module.resolve(source).model
    assert (model.likelihood.variance, model.latent.scaling, model.latent.shift) == (0.5, 2.0, 1.0)


@pytest.mark.parametrize("name", ["variance", "scaling", "shift"])
@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan")])
def test_numbers_that_are_not_finite(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^export: {name} is .*; expected a finite number$"):
        module.resolve(user(**{name: value}))


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_names_that_no_file_can_have(digits: dict[str, Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"^'.*a\\\S+b' is no name of a file\. Choose another path$"):
        vae_export.export(user(), tmp_path / name)
    with pytest.raises(InputError, match="is no name of a file"):
        vae_export.build(digits["gaussian"], "cpu", out=tmp_path / name)
    with pytest.raises(InputError, match="is no name of a file"), atomic.atomic_file(tmp_path / name):
        raise AssertionError("refused before")
