"""Precisions below float32 on more rows than the golden examples: errors of one row in a thousand are detected."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zoo
from quick import PATIENT, measured_as
from torch import Tensor, nn

import vae_export
from vae_export import graph, timing
from vae_export.building import mixed_precision
from vae_export.certification import certificate, golden, tail, verifier
from vae_export.certification.certificate import Check
from vae_export.commands import tables
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import GRAPHS
from vae_export.errors import BackendError, VerificationError
from vae_export.graph.half import to_half
from vae_export.numerics import noise
from vae_export.runtimes import Settings
from vae_export.runtimes.backend import planned
from vae_export.runtimes.cpu.dispatch import CpuBackend

#: x[0] of a decoded draw is a standard normal: 0.2 % of them are above this.
RARE = 2.9


class Rare(nn.Module):
    """A linear encoder that adds and subtracts a feature that few rows have: in float16 the difference is not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.mean, self.logvar = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.back = nn.Linear(2, 6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for row, sign in enumerate((1.0, -1.0)):
                self.into.weight[2 * row : 2 * row + 2, :2] = sign * torch.eye(2)
                self.mean.weight[:, 2 * row : 2 * row + 2] = sign * torch.eye(2)
            for row, weight in ((4, 1.0), (5, 2.7)):
                self.into.weight[row, 0], self.into.bias[row] = weight, -weight * RARE
                self.mean.weight[0, row] = (9 - 2 * row) * 4000.0 / weight
            self.back.weight[:2] = torch.eye(2)
            self.back.weight[2:] = 0.25

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.into(x))
        return self.mean(hidden), self.logvar(hidden)

    def decode(self, z: Tensor) -> Tensor:
        decoded: Tensor = self.back(z)
        return decoded


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle: no golden example but the extremes has the feature, and no calibration data has it."""
    path = tmp_path_factory.mktemp("rare") / "rare.bundle"
    data = 2.0 * zoo.pictures(300, (6,)) - 1.0
    described: dict[str, Any] = {"likelihood": "gaussian_fixed", "variance": 1.0, "data_range": (-6, 6)}
    vae_export.export(Rare().eval(), path, example=data, **described)
    bundle = Bundle(path)
    x = golden.decode(bundle.read(golden.FILE), bundle.manifest.golden, bundle.manifest.model).tensors["x"]
    assert x[golden.EXTREMES :, 0].max() < RARE
    return path


def parts(path: Path) -> tuple[Any, ...]:
    """The arguments of `tail.make` for a bundle."""
    bundle = Bundle(path)
    model = bundle.manifest.model
    reference = golden.decode(bundle.read(golden.FILE), bundle.manifest.golden, model)
    costs = {name: found.cost for name, found in bundle.manifest.graphs.items()}
    calibration = golden.decode_calibration(bundle.read(golden.CALIBRATION_FILE), model)
    return *bundle.graphs(), model, costs, reference, calibration


def test_a_tail_that_golden_examples_do_not_have_is_refused(rare: Path) -> None:
    graphs, weights, model, costs, reference, calibration = parts(rare)
    ways = {name: [planned(raw)] for name, raw in graphs.items()}
    low = graph.write(to_half(graph.read(graphs["encoder"]), "fp16", "encoder"))
    ways["encoder"] = [planned(mixed_precision.rounding(low), precision="fp16")]
    kinds = {"encoder": "float16", "decoder": "float32"}
    more = tail.make(graphs, weights, model, costs, reference, calibration)
    assert isinstance(more, tail.Tail)
    backend = CpuBackend(ways, model, Settings())
    measured = verifier.measure(model, backend, reference, "rare", kinds)
    assert measured.passed
    assert measured.nearest.share < 0.5
    measured = verifier.measure(model, backend, reference, "rare", kinds, more=more)
    assert {check.id for check in measured.checks if not check.passed} == {"tail.mean.sigma", "tail.kl.dimension"}
    assert (measured.examples["more calibration"], measured.examples["more prior"]) == (44, 1956)
    check = measured.check("tail.mean.sigma")
    assert check.rows == 2000
    assert check.example is not None
    assert more.x[check.example, 0] > RARE
    words = (
        r"rare differs from its reference:\n(?s:.*)encoder: error of the mean of more rows is \S+ posterior standard "
        r"deviations, tolerance 0\.05 \(example \d+, worst of 2,000 rows, 99\.9 % are within \S+\) "
        r"\[tail\.mean\.sigma\]"
    )
    with pytest.raises(VerificationError, match=words):
        measured.require()
    shown = tables.as_text(tables.certificate(measured), width=300)
    assert re.search(r"error of the mean of more rows \(2,000: 99\.9 % are within \S+\)", shown)
    assert "44 more calibration, 1,956 more prior" in shown
    assert certificate.decode(certificate.encode(measured)) == measured
    # What was written without more rows has neither field, and is read.
    plain = msgspec.json.decode(certificate.encode(measured))
    for each in plain["checks"]:
        del each["rows"], each["quantile"]
    assert certificate.decode(msgspec.json.encode(plain)).check("tail.mean.sigma").rows is None


def test_nodes_are_kept_until_the_tail_holds(rare: Path, tmp_path: Path) -> None:
    built = vae_export.build(rare, "cpu", precision="fp16", out=tmp_path / "b", batches=(8,))
    assert built.certificate is not None
    assert built.certificate.passed
    encoder = built.record.graphs["encoder"].variants[0]
    refused = next((why for why in built.record.absent if why.startswith("the encoder in fp16: ")), None)
    assert encoder.kept or (refused is not None and "[tail." in refused)
    z = noise.normals(1, noise.PRIOR, 0, 20_000, 2)
    with vae_export.load(rare, build=built.path) as vae, vae_export.load(rare, device="cpu", build=False) as plain:
        x = np.clip(plain.decode(z), -6, 6)
        assert (x[:, 0] > RARE).any()
        posterior = plain.encode(x)
        assert posterior.std is not None
        assert (np.abs(vae.encode(x).mean - posterior.mean) / posterior.std).max() < 0.05
    again = vae_export.verify(rare, device="cpu", build=built.path)
    assert again.check("tail.pixel.off1").rows == built.certificate.check("tail.pixel.off1").rows == 2000
    assert again.passed


def test_the_rows(member: Callable[[str], Any]) -> None:
    """Calibration data and draws that are in no golden example; the rows of a choice are not those of a certificate."""
    graphs, weights, model, costs, reference, calibration = parts(member("conv-bernoulli").bundle)
    found = tail.make(graphs, weights, model, costs, reference, calibration)
    assert isinstance(found, tail.Tail)
    assert (len(found.x), found.calibration, found.draws) == (2000, 40, 1960)
    assert np.array_equal(found.x[:40], calibration)
    with vae_export.load(member("conv-bernoulli").bundle, device="cpu", build=False) as vae:
        np.testing.assert_allclose(found.posterior["mean"], vae.encode(found.x).mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.decoded, vae.decode(found.z), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.z[:40], vae.encode(calibration).mean, rtol=1e-5, atol=1e-5)
    choosing = tail.make(graphs, weights, model, costs, reference, calibration, choosing=True)
    assert isinstance(choosing, tail.Tail)
    known = noise.normals(reference.record.seed, noise.PRIOR, 0, reference.record.prior, model.latent.shape[0])
    rows = [*known, *found.z[40:], *choosing.z[40:]]
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_why_there_are_none(member: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, weights, model, costs, reference, calibration = parts(member("conv-bernoulli").bundle)
    words = "more rows than the golden examples: "
    nominal = msgspec.structs.replace(model, likelihood=msgspec.structs.replace(model.likelihood, nominal=True))
    dear = {name: msgspec.structs.replace(cost, multiply_adds=(1e9, 0.0, 0.0)) for name, cost in costs.items()}
    for changed, why in (
        ({"model": nominal}, "there is no calibration data, and the model has no prior"),
        ({"costs": dear}, "an example takes 2 billion multiply-adds and 572 bytes"),
        ({"costs": {**costs, "decoder": None}}, "the bundle does not say what an example costs"),
    ):
        given = {"model": model, "costs": costs, **changed}
        got = tail.make(graphs, weights, given["model"], given["costs"], reference, calibration[:0])
        assert got == words + why
    measured = verifier.measure(
        model, _plain(graphs, model), reference.first(4), "b", {"encoder": "float16", "decoder": "float32"}, more="why"
    )
    assert measured.absent[-1] == "why"
    assert "why" not in verifier.measure(model, _plain(graphs, model), reference.first(4), "b", more="why").absent

    def missing(*_: Any, **__: Any) -> Any:
        raise BackendError("run needs onnxruntime.\nRun: pip install it")

    monkeypatch.setattr(tail, "open_backend", missing)
    got = tail.make(graphs, weights, model, costs, reference, calibration)
    assert got == words + "run needs onnxruntime. Run: pip install it"


def _plain(graphs: dict[str, bytes], model: Any) -> CpuBackend:
    return CpuBackend({name: [planned(raw)] for name, raw in graphs.items()}, model, Settings())


def test_data_stand_for_themselves(member: Callable[[str], Any]) -> None:
    """Exact results for decoded noise do not outweigh errors on data; and noise alone is reported."""
    graphs, _, model, _, reference, _ = parts(member("plain").bundle)
    few = dataclasses.replace(
        reference, record=msgspec.structs.replace(reference.record, held_out=2, decoded=reference.record.decoded + 254)
    )
    sample = few.tensors["sample"].copy()
    sample[golden.EXTREMES : golden.EXTREMES + 2] += 0.05
    few = dataclasses.replace(few, tensors={**few.tensors, "sample": sample})
    kinds = {"encoder": "float32", "decoder": "int8"}
    backend = _plain(graphs, model)
    width = model.data.range[1] - model.data.range[0]
    found = verifier.measure(model, backend, few, "b", kinds).check("decoder.pixel.psnr")
    assert found.measured == pytest.approx(-20 * np.log10(0.05 / width), abs=0.1)
    none = msgspec.structs.replace(few.record, held_out=0, decoded=few.record.decoded + 2)
    told = "data: the bundle has only decoded noise. Export the model with held_out (--held-out) data"
    for record, kind, said in ((none, "int8", True), (none, "float32", False), (few.record, "int8", False)):
        measured = verifier.measure(model, backend, dataclasses.replace(few, record=record), "b", kind, batches=(64,))
        assert (told in measured.absent) == said


# Visible errors must be paid for by speed


def _check(which: str, measured: float, *, at_least: bool = False, graph: str = "decoder") -> Check:
    return Check(id=which, graph=graph, quantity="q", unit="u", measured=measured, tolerance=30.0, at_least=at_least)  # type: ignore[arg-type]


def test_beyond_half_precision() -> None:
    """The check that exceeds float16's tolerance most, with that tolerance; on data and on more rows."""
    within = [_check("decoder.pixel.off1", 0.009), _check("decoder.pixel.psnr", 51.0, at_least=True)]
    assert certificate.beyond_half(within, "decoder") is None
    off, worse = _check("decoder.pixel.off1", 0.25), _check("tail.pixel.off2", 0.9)
    found = certificate.beyond_half([*within, off, _check("prior.pixel.off1", 1.0)], "encoder")
    assert found is None
    found = certificate.beyond_half([*within, off], "decoder")
    assert found == msgspec.structs.replace(off, tolerance=0.01)
    assert certificate.beyond_half([off, worse], "decoder") == msgspec.structs.replace(worse, tolerance=0.001)
    rough = _check("decoder.pixel.psnr", 47.3, at_least=True)
    assert certificate.beyond_half([rough], "decoder") == msgspec.structs.replace(rough, tolerance=50.0)


@pytest.mark.parametrize("both", [False, True])
def test_what_is_seen_and_no_faster_stays_in_float32(
    member: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, both: bool
) -> None:
    path = member("mlp-bernoulli").bundle
    lost = _check("decoder.pixel.off1", 0.25)
    slow = "it is 0.98 times as fast as float32, and only more than 1.05 counts: float32 stays"

    def seen(checks: Any, name: str) -> Check | None:
        return lost if both or name == "decoder" else None

    monkeypatch.setattr(certificate, "beyond_half", seen)
    monkeypatch.setattr(timing, "measure", measured_as({"fp32": 0.98}))
    told = {name: f"the {name} in int8 loses more than half precision may: {lost}; and {slow}" for name in GRAPHS}
    options: dict[str, Any] = {"precision": "int8", "batches": (1,), "out": tmp_path / "b", "search": PATIENT}
    if both:
        reasons = "; ".join(map(re.escape, told.values()))
        words = rf"build: int8 is not worth what it loses of mlp-bernoulli: .*{reasons}\. "
        with pytest.raises(VerificationError, match=f"{words}Build with --precision fp32 or auto"):
            vae_export.build(path, "cpu", **options)
        return
    built = vae_export.build(path, "cpu", **options)
    kinds = {name: {v.precision for v in found.variants} for name, found in built.record.graphs.items()}
    assert (kinds["encoder"], kinds["decoder"]) == ({"int8"}, {"fp32"})
    assert told["decoder"] in built.record.absent
    assert slow in {row.verdict for row in built.record.measurements if row.graph == "decoder"}
    assert built.record.calibrated == {"calibration": 40, "prior": 40}
    shown = tables.as_text(tables.build(built.path, built.record), width=200)
    assert "40 rows of calibration data, 40 draws from the prior for the decoder" in shown


def test_what_activations_are_recorded_on(member: Callable[[str], Any]) -> None:
    """Calibration data; where that is little, golden examples, data before decoded noise."""
    _, _, model, _, reference, calibration = parts(member("conv-bernoulli").bundle)
    golden_x = reference.tensors["x"][golden.EXTREMES :]
    x, counts = mixed_precision.calibration_rows(model, reference, calibration)
    assert counts == {"calibration": 40, "prior": 40}
    assert np.array_equal(x, calibration)
    x, counts = mixed_precision.calibration_rows(model, reference, calibration[:5])
    assert counts == {"calibration": 5, "held_out": 27, "prior": 32}
    assert np.array_equal(x, np.concatenate([calibration[:5], golden_x[:27]]))
    few = dataclasses.replace(
        reference, record=msgspec.structs.replace(reference.record, held_out=3, decoded=len(golden_x) - 3)
    )
    assert mixed_precision.calibration_rows(model, few, calibration[:5])[1] == {
        "calibration": 5, "held_out": 3, "decoded": 24, "prior": 32,
    }  # fmt: skip
    x, counts = mixed_precision.calibration_rows(model, few, calibration[:0])
    assert counts == {"held_out": 3, "decoded": len(golden_x) - 3, "prior": len(golden_x)}
    assert np.array_equal(x, golden_x)
