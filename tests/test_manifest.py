"""The manifest: strict, canonical, versioned, and with a description of every field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_export.certification import certificate, tolerances
from vae_export.contract import build_record, model, records, targets
from vae_export.contract import manifest as manifests
from vae_export.contract.manifest import File, Golden, Graph, Manifest, Origin
from vae_export.contract.model import Data, Latent, LatentDim, Likelihood, Model, Posterior, SizeDim, Tensor, shape_text
from vae_export.errors import BundleError, InputError

pytestmark = pytest.mark.quick

HASH = "0" * 64
FILES = (
    *("config.json", "golden.safetensors", "verification.json"),
    *("vae_encoder/model.onnx", "vae_decoder/model.onnx"),
)


def a_manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "format": "vae_export.bundle",
        "version": 1,
        "digest": "",
        "name": "test",
        "created": "2026-01-01T00:00:00+00:00",
        "model": a_model(),
        "graphs": {
            "encoder": graph("encoder", {"x": (1, 8, 8)}, {"mean": (2,), "logvar": (2,)}),
            "decoder": graph("decoder", {"z": (2,)}, {"sample": (1, 8, 8), "logits": (1, 8, 8)}),
        },
        "golden": Golden(seed=1, reference="PyTorch", extremes=4, held_out=8, decoded=0, prior=8),
        "origin": Origin(kind="module", name="test"),
        "tools": {"torch": "2.13.0"},
        "files": {name: File(size=1, sha256=HASH) for name in FILES},
    }
    return Manifest(**fields | changes)


Signature = dict[str, tuple[int | str, ...]]


def graph(kind: str, inputs: Signature, outputs: Signature) -> Graph:
    into, out = (
        tuple(Tensor(name=name, dtype="float32", shape=("batch", *shape)) for name, shape in ends.items())
        for ends in (inputs, outputs)
    )
    return Graph(file=f"vae_{kind}/model.onnx", opset=20, inputs=into, outputs=out)


def a_model(**changes: Any) -> Model:
    fields: dict[str, Any] = {
        "architecture": "test",
        "parameters": 1,
        "data": Data(shape=(1, 8, 8), range=(0.0, 1.0)),
        "latent": Latent(shape=(2,)),
        "prior": "standard_normal",
        "posterior": Posterior(kind="diagonal_gaussian", logvar_clamp=(-5.0, 5.0)),
        "likelihood": Likelihood(kind="bernoulli"),
    }
    return Model(**fields | changes)


NAMED = Data(
    shape=(3, SizeDim(name="height", multiple_of=8, min=16, max=64), SizeDim(name="width", multiple_of=8)),
    range=(-1.0, 1.0),
)
SPATIAL = Latent(shape=(4, LatentDim(name="height", divided_by=8), LatentDim(name="width", divided_by=4)))

finite = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(
    name=st.text(min_size=1, max_size=20).filter(lambda t: t.isprintable() and not set(t) & set("/\\")),
    seed=st.integers(0, (1 << 63) - 1),
    scaling=st.floats(1e-300, 1e300),
    low=finite.filter(lambda v: v < 1e308),
)
def test_round_trip(name: str, seed: int, scaling: float, low: float) -> None:
    import math

    data = Data(shape=(SizeDim(name="length"), 3), range=(low, math.nextafter(low, math.inf)))
    latent = Latent(shape=(LatentDim(name="length"),), scaling=scaling, shift=-low)
    manifest = a_manifest(
        name=name,
        model=a_model(data=data, latent=latent, likelihood=Likelihood(kind="gaussian_fixed", variance=scaling)),
        graphs={
            "encoder": graph("encoder", {"x": ("length", 3)}, {"mean": ("length",), "logvar": ("length",)}),
            "decoder": graph("decoder", {"z": ("length",)}, {"sample": ("length", 3)}),
        },
        golden=Golden(seed=seed, reference="", extremes=0, held_out=0, decoded=1, prior=1),
    )
    raw = manifests.RECORD_FORMAT.encode(manifest)
    again = manifests.RECORD_FORMAT.decode(raw)
    assert msgspec.structs.replace(again, digest="") == manifest
    assert again.digest != ""
    assert manifests.RECORD_FORMAT.encode(again) == raw


def test_every_field_is_described() -> None:
    modules = (manifests, model, build_record, targets, certificate, tolerances)
    values = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    found = {value for value in values if issubclass(value, records.Record)}
    assert len(found) > 20
    for record in found - {records.Record, records.Part}:
        for field in record.__struct_fields__:
            assert f"        {field}: " in (record.__doc__ or "") + "\n", f"{record.__name__}.{field}"


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    plain = json.loads(manifests.RECORD_FORMAT.encode(a_manifest()))
    change(plain)
    return json.dumps(plain, indent=2, ensure_ascii=False).encode() + b"\n"


def test_changes_start_from_the_exact_bytes() -> None:
    assert changed(lambda plain: None) == manifests.RECORD_FORMAT.encode(a_manifest())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(version=2), r"has version 2; this vae_export reads versions up to 1\. Run: pip install"),
        (lambda p: p.update(version=0), "Invalid enum value 0"),
        (lambda p: p["model"]["likelihood"].update(nominal=False), "was changed after the export"),
        (lambda p: p.update(format="zip"), "format is 'zip', expected 'vae_export.bundle'"),
        (lambda p: p.update(extra=1), "unknown field `extra`"),
        (lambda p: p.pop("model"), "missing required field `model`"),
        (lambda p: p.update(name=3), r"Expected `str`, got `int` - at `\$\.name`"),
        (lambda p: p.update(name="other"), "was changed after the export: its digest or its form"),
        (lambda p: p.update(digest="0" * 64), "was changed after the export"),
        (lambda p: p["files"].update({"../x": p["files"]["vae_encoder/model.onnx"]}), "a plain path inside"),
        (lambda p: p["files"].update({"/x": p["files"]["vae_encoder/model.onnx"]}), "a plain path inside"),
        (lambda p: p["files"].update({"a\\b": p["files"]["vae_encoder/model.onnx"]}), "a plain path inside"),
        (lambda p: p["files"]["vae_encoder/model.onnx"].update(sha256="X"), "64 lower-case hexadecimal digits"),
        (lambda p: p["graphs"].pop("encoder"), "an encoder and a decoder expected"),
        (lambda p: p["files"].pop("vae_encoder/model.onnx"), "is not listed in files"),
        (lambda p: p["model"]["data"].update(range=[1.0, 0.0]), "two finite, rising numbers"),
        (lambda p: p["model"]["data"].update(shape=[0]), "every size must be from 1 to"),
        (lambda p: p["model"]["data"].update(shape=[]), "one dimension or more"),
        (lambda p: p["model"].update(likelihood={"kind": "gaussian_fixed"}), "variance belongs to gaussian_fixed"),
        (
            lambda p: p["model"].update(likelihood={"kind": "gaussian"}),
            r"sample_logvar \(batch, 1, 8, 8\) expected, got",
        ),
        (
            lambda p: p["model"]["data"].update(shape=[1, 9, 9]),
            r"encoder: x \(batch, 1, 9, 9\) → .* expected, got x \(",
        ),
        (lambda p: p["graphs"]["encoder"].update(opset=-1), "encoder: opset -1 is none"),
        (lambda p: p["graphs"]["encoder"]["inputs"][0].update(dtype="int4"), "Invalid enum value 'int4'"),
        (lambda p: p["graphs"]["encoder"]["inputs"][0].update(dtype="uint8"), r"expected, got x uint8 \(batch"),
        (lambda p: p["golden"].update(held_out=-3), "one example or more"),
        (lambda p: p["model"].update(parameters=-5), "parameters must not be negative"),
        (lambda p: p["model"]["latent"].update(shape=[2, 3]), r"flat \(D,\) or spatial \(C, h, w\), got \(2, 3\)"),
        (lambda p: p["model"]["posterior"].update(logvar_clamp=[5.0, -5.0]), "two finite, rising numbers"),
        (lambda p: p["model"]["likelihood"].update(logvar_clamp=[0.0, 1.0]), "logvar_clamp belongs to gaussian"),
        (lambda p: p["files"].pop("golden.safetensors"), r"files: golden\.safetensors must be listed"),
        (lambda p: p.update(name="../../x"), "a name without slashes"),
        (lambda p: p.update(name="a\x1b[2Jb"), "printable text expected"),
        (lambda p: p["model"]["data"].update(range=[0.0, 2.0]), r"Bernoulli likelihood needs data in \[0, 1\]"),
        (lambda p: p["model"].update(prior="mixture"), "Invalid enum value 'mixture'"),
    ],
)
def test_refusals(change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        manifests.RECORD_FORMAT.decode(changed(change))


@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"x":' * 100_000, b"[]", b"\xff\xfe", b'{"format": 1, "version": 1}', b"null"]
)
def test_what_is_no_manifest(raw: bytes) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json is not a manifest: "):
        manifests.RECORD_FORMAT.decode(raw)


def test_white_space_is_refused() -> None:
    raw = manifests.RECORD_FORMAT.encode(a_manifest())
    with pytest.raises(BundleError, match="its digest or its form"):
        manifests.RECORD_FORMAT.decode(raw.replace(b"  ", b" \t", 1))


def test_named_dimensions() -> None:
    model = a_model(data=NAMED, latent=SPATIAL, likelihood=Likelihood(kind="gaussian"))
    assert model.latent_shape({"height": 32, "width": 24}) == (4, 4, 6)
    assert shape_text(NAMED.shape) == "(B, 3, height, width)"
    assert shape_text(SPATIAL.shape) == "(B, 4, height/8, width/4)"
    assert str(NAMED.shape[1]) == "height (a multiple of 8, at least 16, at most 64)"
    with pytest.raises(InputError, match=r"this model takes height \(a multiple of 8.*got height = 12"):
        model.latent_shape({"height": 12, "width": 24})
    with pytest.raises(InputError, match=r"this model takes height .*got height = '8'"):
        model.latent_shape({"height": "8", "width": 24})
    with pytest.raises(InputError, match=r"this model takes height .*got \{\}"):
        model.latent_shape()
    with pytest.raises(InputError, match=r"this model takes no sizes; got \{'height': 8\}"):
        a_model().latent_shape({"height": 8})


@pytest.mark.parametrize(
    ("data", "latent", "message"),
    [
        (NAMED, Latent(shape=(4,)), "no latent dimension follows height, width"),
        (NAMED, Latent(shape=(*SPATIAL.shape[1:], LatentDim(name="depth"))), "'depth' names no dimension"),
        (NAMED, Latent(shape=(*SPATIAL.shape[:2], LatentDim(name="width", divided_by=3))), "that does not divide"),
        (NAMED, Latent(shape=(*SPATIAL.shape[:2], LatentDim(name="width", divided_by=0))), "that does not divide"),
    ],
)
def test_latents_follow_the_data(data: Data, latent: Latent, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_model(data=data, latent=latent, likelihood=Likelihood(kind="gaussian"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SizeDim(name="a b"), "an identifier that is not batch"),
        (lambda: SizeDim(name="batch"), "an identifier that is not batch"),
        (lambda: SizeDim(name="a", multiple_of=0), "an identifier that is not batch, multiple_of ≥ 1"),
        (lambda: SizeDim(name="a", min=4, max=3), r"no size is a \(at least 4, at most 3\)"),
        (lambda: SizeDim(name="a", multiple_of=8, max=7), "no size is a"),
        (lambda: Data(shape=(SizeDim(name="a"), SizeDim(name="a")), range=(0.0, 1.0)), "no name twice"),
        (lambda: Latent(shape=(1,), scaling=0.0), "scaling must be positive"),
        (lambda: Likelihood(kind="gaussian_fixed", variance=0.0), "variance must be positive, got 0.0"),
        (lambda: Likelihood(kind="bernoulli", variance=1.0), "variance belongs to gaussian_fixed"),
    ],
)
def test_records_check_themselves(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_costs_that_overflow() -> None:
    for number in (1e308, float("inf"), float("nan"), -1.0):
        with pytest.raises(ValueError, match=r"cost: numbers from 0 to 1e\+24 expected"):
            model.Cost(multiply_adds=(number, 0.0, 0.0), activations=(0.0, 0.0, 0.0))
