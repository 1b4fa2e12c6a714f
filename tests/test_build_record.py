"""A build's record, its targets and its optimization profiles: read strictly, and refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_manifest import HASH, NAMED, SPATIAL, a_model

from vae_export.contract import build_record, checks, records, targets
from vae_export.contract.build_record import RECORD_FORMAT, Build, BuiltGraph, Engine, Options
from vae_export.contract.manifest import File
from vae_export.contract.model import Likelihood, Model
from vae_export.contract.targets import Profile
from vae_export.errors import BundleError, InputError

pytestmark = pytest.mark.quick

RTX = "tensorrt-rtx-sm86"

# The record


def a_build(**changes: Any) -> Build:
    fields: dict[str, Any] = {
        "format": "vae_export.build",
        "version": 1,
        "digest": "",
        "bundle": "test",
        "manifest": HASH,
        "sources": {"encoder": HASH, "decoder": HASH},
        "target": RTX,
        "created": "2026-01-01T00:00:00+00:00",
        "options": Options(precision="fp16", profiles=(Profile(batch=(1, 4, 4)),)),
        "graphs": {
            name: BuiltGraph(file=f"{name}.engine", onnx_sha256=HASH, structure=HASH) for name in ("encoder", "decoder")
        },
        "engine": Engine(
            flavour="tensorrt-rtx", version="1.7.1", capabilities=("8.6",), platform="linux x86_64", gpu="A10"
        ),
        "tools": {"onnx": "1.18.0"},
        "files": {f"{name}.engine": File(size=1, sha256=HASH) for name in ("encoder", "decoder")},
    }
    return Build(**fields | changes)


FOR_CPU: dict[str, Any] = {"target": "cpu", "engine": None, "options": Options()}


@pytest.mark.parametrize(
    "record",
    [
        a_build(),
        a_build(**FOR_CPU),
        a_build(options=Options(profiles=(Profile(batch=(1, 1, 1), sizes={"h": (1, 2, 2)}),))),
    ],
)
def test_round_trip(record: Build) -> None:
    raw = RECORD_FORMAT.encode(record)
    again = RECORD_FORMAT.decode(raw)
    assert msgspec.structs.replace(again, digest="") == record
    assert checks.is_sha256(again.digest)
    assert RECORD_FORMAT.encode(again) == raw


def test_every_field_is_described() -> None:
    found = [v for v in vars(build_record).values() if isinstance(v, type) and issubclass(v, records.Record)]
    described = [record for record in found if record.__module__ == build_record.__name__]
    assert len(described) >= 5
    for record in described:
        for field in record.__struct_fields__:
            assert f"        {field}: " in (record.__doc__ or "") + "\n", f"{record.__name__}.{field}"


def tampered(change: Callable[[dict[str, Any]], None]) -> bytes:
    plain = json.loads(RECORD_FORMAT.encode(a_build()))
    change(plain)
    return json.dumps(plain, indent=2, ensure_ascii=False).encode() + b"\n"


def with_ways(plain: dict[str, Any], *ways: dict[str, Any]) -> None:
    usual = {"file": "encoder.engine", "runner": "onnxruntime"}
    plain["graphs"]["encoder"].update(variants=[usual | way for way in ways])


def with_measurement(plain: dict[str, Any], **changes: Any) -> None:
    usual = {"graph": "encoder", "batch": 1, "runner": "openvino", "precision": "fp32", "verdict": "chosen"}
    plain.update(measurements=[usual | changes])


def test_tampering_starts_from_the_exact_bytes() -> None:
    assert tampered(lambda plain: None) == RECORD_FORMAT.encode(a_build())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p.update(version=2),
            r"build\.json has version 2; this vae_export reads versions up to 1\. Run: pip",
        ),
        (lambda p: p.update(format="zip"), r"build\.json: format is 'zip', expected 'vae_export\.build'"),
        (lambda p: p.update(extra=1), "unknown field `extra`"),
        (lambda p: p["options"].update(int8=True), "unknown field `int8` - at `\\$\\.options`"),
        (lambda p: p.pop("graphs"), "missing required field `graphs`"),
        (lambda p: p.update(bundle="other"), r"was changed after the build: its digest or its form .*Build it again"),
        (lambda p: p.update(digest=HASH), "was changed after the build"),
        (lambda p: p["options"].update(tf32=False), "was changed after the build"),  # a default is not written
        (lambda p: p["options"].update(precision="int4"), "Invalid enum value 'int4'"),
        (lambda p: p["options"].update(budget="auto"), "Invalid enum value 'auto'"),
        (lambda p: p["engine"].update(flavour="tensorrt-lite"), "Invalid enum value 'tensorrt-lite'"),
        (lambda p: p["engine"].update(capabilities=[]), "capabilities: one or more expected"),
        (lambda p: p["engine"].update(gpu="a\x1b[2Jb"), "printable text expected"),
        (lambda p: p.update(bundle="a\x1b[2Jb"), "printable text expected"),
        (lambda p: p.update(target="tpu"), "build: target is 'tpu'; expected cpu, cuda"),
        (lambda p: p.update(target="tensorrt"), "target tensorrt: its engine is of another flavour"),
        (lambda p: p.update(target="cpu"), "target cpu: its engine is of another flavour"),
        (lambda p: p.pop("engine"), "profiles belong to engines, and every engine has one or more"),
        (lambda p: p["options"].pop("profiles"), "profiles belong to engines, and every engine has one or more"),
        (lambda p: p["options"]["profiles"][0].update(batch=[0, 1, 1]), "1 ≤ smallest ≤ middle ≤ largest expected"),
        (lambda p: p["options"]["profiles"][0].update(batch=[2, 1, 4]), "expected, got 2, 1, 4"),
        (lambda p: p["options"]["profiles"][0].update(batch=[1, 5, 4]), "expected, got 1, 5, 4"),
        (lambda p: p["options"]["profiles"][0].update(sizes={"h": [3, 2, 1]}), "expected, got 3, 2, 1"),
        (lambda p: p["options"]["profiles"][0].update(batch=[1, 1]), "Expected `array` of length 3"),
        (lambda p: p["files"].pop("encoder.engine"), r"files: encoder\.engine must be listed"),
        (lambda p: p["graphs"]["encoder"].update(file="../x"), r"files: \.\./x must be listed"),
        (lambda p: p["files"].update({"../x": p["files"]["encoder.engine"]}), "a plain path inside the folder"),
        (
            lambda p: p["graphs"].pop("encoder"),
            r"encoder, decoder and, as far as there are, reconstruct, generate, score expected, got \['decoder'\]",
        ),
        (lambda p: p["graphs"].update(other=p["graphs"]["encoder"]), "reconstruct, generate, score expected, got"),
        (lambda p: p["graphs"]["encoder"].update(structure="x"), "structure: 64 lower-case hexadecimal digits"),
        (lambda p: p["files"]["encoder.engine"].update(size=-1), "a size of 0 or more"),
        (lambda p: with_ways(p, {}), "variants belong to the target cpu"),
        (lambda p: with_ways(p, {"up_to": 3}), r"variants: rising limits and then none expected, got \[3\]"),
        (lambda p: with_ways(p, {"up_to": 3}, {"up_to": 3}, {}), r"and then none expected, got \[3, 3, None\]"),
        (lambda p: with_ways(p, {}, {}), r"variants: rising limits and then none expected, got \[None, None\]"),
        (lambda p: with_ways(p, {"up_to": 0}, {}), "max_batch: a number from 1 to"),
        (lambda p: with_ways(p, {"threads": -1}), "threads: a number from 1 to 65535"),
        (lambda p: with_ways(p, {"file": "x"}), "files: x must be listed"),
        (lambda p: with_ways(p, {"runner": "tvm"}), "Invalid enum value 'tvm'"),
        (lambda p: with_ways(p, {"kept": {"conv": "a\x1b[2Jb"}}), "printable text expected"),
        (lambda p: p["graphs"]["encoder"].update(kept={"a\x1b[2Jb": "why"}), "printable text expected"),
        (lambda p: with_measurement(p, verdict="a\x1b[2Jb"), "printable text expected"),
        (lambda p: with_measurement(p, precision="auto"), "Invalid enum value 'auto'"),
    ],
)
def test_refusals(change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        RECORD_FORMAT.decode(tampered(change))


def test_white_space_is_refused() -> None:
    with pytest.raises(BundleError, match="its digest or its form"):
        RECORD_FORMAT.decode(RECORD_FORMAT.encode(a_build()).replace(b"  ", b" \t", 1))


# How graphs run


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_batch": 0}, "max_batch: a number from 1 to"),
        ({"threads": 0}, "threads: a number from 1 to 65535"),
        ({"kept": {"a\x1b": "b"}}, "printable text expected"),
        ({"exact": ({"height": 8},)}, "exact: a batch and sizes from 1 to"),
        ({"exact": ({"batch": 0},)}, "exact: a batch and sizes from 1 to"),
    ],
)
def test_plans_that_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_record.ExecutionPlan(file="decoder.onnx", runner="openvino", **changed)


@pytest.mark.parametrize("limits", [(1, 8), (8, 1, None), (None, None), (1, 1, None)])
def test_limits_rise_and_end(limits: tuple[int | None, ...]) -> None:
    variants = tuple(
        build_record.ExecutionPlan(max_batch=limit, file="d.onnx", runner="onnxruntime") for limit in limits
    )
    with pytest.raises(ValueError, match="rising limits and then none expected, got"):
        build_record.BuiltGraph(file="d.onnx", onnx_sha256="0" * 64, structure="0" * 64, variants=variants)


# Targets and profiles


@pytest.mark.parametrize(
    ("name", "flavour", "capability", "device"),
    [
        ("cpu", None, None, "cpu"),
        ("cuda", None, None, "cuda"),
        ("tensorrt", "tensorrt", None, "cuda"),
        ("tensorrt-rtx", "tensorrt-rtx", None, "cuda"),
        ("tensorrt-rtx-sm86", "tensorrt-rtx", "8.6", "cuda"),
        ("tensorrt-rtx-sm120", "tensorrt-rtx", "12.0", "cuda"),
    ],
)
def test_targets(name: str, flavour: str | None, capability: str | None, device: str) -> None:
    found = targets.parse(name)
    assert (found.name, found.flavour, found.capability, found.device) == (name, flavour, capability, device)


@pytest.mark.parametrize(
    "name",
    ["", "CPU", "cpu ", "cpu\n", "tensorrt-sm86", "tensorrt-rtx-", "tensorrt-rtx-sm8", "tensorrt-rtx-sm1200", "../cpu"],
)
def test_what_is_no_target(name: str) -> None:
    with pytest.raises(
        InputError, match=r"build: target is .*; expected cpu, cuda, tensorrt, tensorrt-rtx, or tensorrt"
    ):
        targets.parse(name)


SIZED: Model = a_model(data=NAMED, latent=SPATIAL, likelihood=Likelihood(kind="gaussian"))


@pytest.mark.parametrize(
    ("batches", "static", "expected"),
    [
        ([1], False, ["batch 1 to 1"]),
        ([64, 1, 8, 8], False, ["batch 1 to 1", "batch 2 to 8", "batch 9 to 64"]),
        ([4], False, ["batch 1 to 4"]),
        ([4, 2], True, ["batch 2 to 2", "batch 4 to 4"]),
    ],
)
def test_profiles(batches: list[int], static: bool, expected: list[str]) -> None:
    assert [str(p) for p in targets.profiles(a_model(), batches, [], static=static)] == expected


def test_profiles_of_named_sizes() -> None:
    sizes = [{"height": 32, "width": 24}, {"height": 64, "width": 8}]
    assert [str(p) for p in targets.profiles(SIZED, [1, 4], sizes)] == [
        "batch 1 to 1, height 16 to 32, width 8 to 24",
        "batch 2 to 4, height 16 to 32, width 8 to 24",
        "batch 1 to 1, height 16 to 64, width 8 to 8",
        "batch 2 to 4, height 16 to 64, width 8 to 8",
    ]
    (static,) = targets.profiles(SIZED, [4], sizes[:1], static=True)
    assert str(static) == "batch 4 to 4, height 32 to 32, width 24 to 24"
    x, z = (SIZED.signature(graph)[0][0] for graph in ("encoder", "decoder"))
    assert static.shapes(x, SIZED) == ((4, 3, 32, 24),) * 3
    moving = targets.profiles(SIZED, [4], sizes[:1])[0]
    assert moving.shapes(x, SIZED) == ((1, 3, 16, 8), (4, 3, 32, 24), (4, 3, 32, 24))
    assert moving.shapes(z, SIZED) == ((1, 4, 2, 2), (4, 4, 4, 6), (4, 4, 4, 6))
    with pytest.raises(InputError, match=r"this model takes height .*got height = 12"):
        targets.profiles(SIZED, [1], [{"height": 12, "width": 8}])
    with pytest.raises(InputError, match=r"this model takes height .*got \{\}"):
        targets.profiles(SIZED, [1], [])


THREE = targets.profiles(a_model(), [1, 8, 64], [])
TWO_SIZES = targets.profiles(SIZED, [1, 4], [{"height": 32, "width": 24}, {"height": 64, "width": 8}])
STATIC = targets.profiles(a_model(), [2, 8], [], static=True)


@pytest.mark.parametrize(
    ("profiles", "batch", "sizes", "expected"),
    [
        (THREE, 1, {}, (0, 1)),
        (THREE, 2, {}, (1, 2)),
        (THREE, 8, {}, (1, 8)),
        (THREE, 9, {}, (2, 9)),
        (THREE, 65, {}, None),
        (STATIC, 1, {}, (0, 2)),
        (STATIC, 3, {}, (1, 8)),
        (STATIC, 9, {}, None),
        (TWO_SIZES, 1, {"height": 16, "width": 8}, (2, 1)),
        (TWO_SIZES, 1, {"height": 16, "width": 16}, (0, 1)),
        (TWO_SIZES, 3, {"height": 64, "width": 8}, (3, 3)),
        (TWO_SIZES, 1, {"height": 64, "width": 16}, None),
        (TWO_SIZES, 1, {"height": 8, "width": 8}, None),
        (TWO_SIZES, 1, {}, None),
    ],
)
def test_choose(profiles: Any, batch: int, sizes: dict[str, int], expected: tuple[int, int] | None) -> None:
    assert targets.choose(profiles, batch, sizes) == expected


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(2, 8), st.integers(1, 12)), min_size=1, max_size=3),
    st.booleans(),
    st.integers(1, 110),
    st.tuples(st.integers(2, 8), st.integers(1, 12)),
)
def test_the_chosen_profile_is_the_smallest_that_fits(
    batches: list[int], sizes: list[tuple[int, int]], static: bool, n: int, size: tuple[int, int]
) -> None:
    asked = [{"height": 8 * h, "width": 8 * w} for h, w in sizes]
    made = targets.profiles(SIZED, batches, asked, static=static)
    assert len(made) == len(set(batches)) * len(sizes)
    wanted = {"height": 8 * size[0], "width": 8 * size[1]}

    def fits(profile: Profile) -> bool:
        held = all(low <= wanted[name] <= high for name, (low, _, high) in profile.sizes.items())
        return held and n <= profile.batch[2]

    found = targets.choose(made, n, wanted)
    if found is None:
        assert not any(map(fits, made))
        covered = any(size == s if static else size[0] <= s[0] and size[1] <= s[1] for s in sizes)
        assert n > max(batches) or not covered
        return
    index, rows = found
    chosen = made[index]
    assert fits(chosen)
    assert chosen.volume == min(profile.volume for profile in made if fits(profile))
    assert n <= rows
    assert chosen.batch[0] <= rows <= chosen.batch[2]
    assert rows == (chosen.batch[2] if static else max(n, chosen.batch[0]))
