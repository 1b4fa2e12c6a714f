"""The certificate: it holds for what is equal and fails, saying where, for what is not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import zoo
from onnx import numpy_helper

import vae_export
from vae_export.certification import certificate as certificates
from vae_export.certification import deviations, golden, verifier
from vae_export.certification.certificate import Check
from vae_export.certification.tolerances import TOLERANCES, Tolerance
from vae_export.contract import bundle as bundles
from vae_export.contract import folders
from vae_export.contract.bundle import Bundle
from vae_export.errors import BundleError, VerificationError
from vae_export.runtimes import open_backend


@pytest.mark.parametrize("name", sorted(zoo.MEMBERS))
def test_it_holds(member: Callable[[str], Any], name: str) -> None:
    case = member(name)
    again = vae_export.verify(case.bundle)
    assert again.passed
    again.require()
    assert again.batches == (1, 2, 7, 64)
    written = certificates.decode((case.bundle / "verification.json").read_bytes())
    assert written == case.certificate
    tiles = tuple(check for check in written.checks if check.id.startswith("tiles."))
    assert [c.id for c in written.checks] == [c.id for c in (*again.checks, *tiles)]
    has_elbo = case.source.model.likelihood.kind != "none"
    ids = {check.id for check in again.checks}
    assert ({"elbo.bound.max", "elbo.kl.max", "elbo.reconstruction.max", "encoder.kl.dimension"} <= ids) == has_elbo
    assert set(deviations.conditioned(case.source.model)) <= {check.id for check in again.checks if check.tolerance}


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_digits(digits: dict[str, Path], likelihood: str) -> None:
    certificate = vae_export.verify(digits[likelihood])
    assert certificate.passed
    assert certificate.examples == {"extremes": 4, "held_out": 256, "decoded": 0, "prior": 256}
    bound = certificate.check("elbo.bound.max")
    assert 0 < bound.measured <= bound.tolerance  # two float32 programs that never differ would be one
    assert bound.pytorch is not None
    assert certificate.nearest.share < 1
    with pytest.raises(KeyError):
        certificate.check("elbo.bound.rms")


def change(path: Path, graph: str, edit: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Rewrite a graph's weights, and the manifest so that it fits."""
    file = path / f"vae_{graph}" / "model.onnx"
    model = onnx.load(file)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(edit(tensor.name, array.copy()), tensor.name))
    file.write_bytes(model.SerializeToString())
    manifest = Bundle(path).manifest
    (path / "manifest.json").unlink()
    bundles.write_manifest(path, msgspec.structs.replace(manifest, files=folders.list_files(path)))


def one_bias(name: str, array: np.ndarray) -> np.ndarray:
    if array.ndim == 1 and array.size > 4:
        array[0] += 1e-3
    return array


def nan(name: str, array: np.ndarray) -> np.ndarray:
    return array * np.float32("nan") if array.ndim > 1 else array


def scaled(name: str, array: np.ndarray) -> np.ndarray:
    return array * np.float32(1 + 1e-4) if array.ndim > 1 else array


@pytest.mark.parametrize(
    ("graph", "edit", "messages"),
    [
        (
            "encoder",
            one_bias,
            [r"encoder: KL\(reference ‖ measured\) of the worst latent dimension is .* nats, tolerance .* \(batch \d+"],
        ),
        (
            "decoder",
            one_bias,
            [r"end to end: ELBO is .* relative to Σ\|ELBO terms\|, tolerance", "decoder: sample, worst of draws"],
        ),
        ("decoder", scaled, [r"end to end: ELBO is .* \[elbo\.bound\.max\]"]),
        ("encoder", scaled, [r"end to end: KL\(q\(z\|x\) ‖ p\(z\)\) is .* relative to Σ\|ELBO terms\|, tolerance"]),
        ("decoder", nan, ["decoder: values that are not finite is .* values, tolerance 0", "decoder: sample, worst"]),
        ("encoder", nan, ["encoder: values that are not finite is", "encoder: logvar, worst"]),
    ],
)
def test_it_fails_and_says_where(
    digits: dict[str, Path], tmp_path: Path, graph: str, edit: Any, messages: list[str]
) -> None:
    path = Path(shutil.copytree(digits["gaussian"], tmp_path / "b"))
    change(path, graph, edit)
    certificate = vae_export.verify(path)
    assert not certificate.passed
    for message in messages:
        with pytest.raises(VerificationError, match=message):
            certificate.require()


def test_every_tolerance_bites(digits: dict[str, Path]) -> None:
    """Where rounding moves nothing, an error of 1e-4 in every output is out of every tolerance."""
    bundle, reference = opened(digits["gaussian"])
    none = {name: value * 0 if name.startswith("spread.") else value for name, value in reference.tensors.items()}
    model = bundle.manifest.model
    graphs, _ = bundle.graphs()
    off = Scaled(open_backend(graphs, model, device="cpu"), dict.fromkeys(graphs, 1 + 1e-4))
    checks = verifier.measure(model, off, dataclasses.replace(reference, tensors=none), "none").checks
    assert set(deviations.conditioned(model)) <= {check.id for check in checks if not check.passed}
    assert not msgspec.structs.replace(checks[0], measured=float("nan")).passed
    assert not msgspec.structs.replace(checks[0], measured=float("nan"), tolerance=0.0, at_least=True).passed


def opened(path: Path) -> tuple[Bundle, golden.Reference]:
    bundle = Bundle(path)
    return bundle, golden.decode(bundle.read(golden.FILE), bundle.manifest.golden, bundle.manifest.model)


def test_below_float32_each_graph_is_judged_by_its_own(digits: dict[str, Path]) -> None:
    """The same graphs, wrong by 2 %: too much for float16, and not for 8 bits; of the extremes nothing is asked."""
    bundle, reference = opened(digits["gaussian"])
    model = bundle.manifest.model
    graphs, _ = bundle.graphs()

    def measured(factors: dict[str, float], kinds: dict[str, str]) -> vae_export.Certificate:
        real = open_backend(graphs, model, device="cpu")
        return verifier.measure(model, Scaled(real, factors), reference, "scaled", kinds, batches=(64,))

    off = {"decoder": 1.02, "encoder": 1.0}
    both = measured(off, {"encoder": "float16", "decoder": "float16"})
    assert both.precision == "float16"
    assert {check.graph for check in both.checks if not check.passed} == {"decoder", "end to end"}
    assert both.check("decoder.pixel.psnr").at_least
    apart = measured(off, {"encoder": "float32", "decoder": "int8"})
    assert apart.precision == "encoder float32, decoder int8"
    assert all(check.passed for check in apart.checks if check.graph == "encoder")
    assert apart.check("decoder.pixel.max").passed
    assert apart.check("encoder.mean.max").tolerance is not None
    assert apart.check("prior.sample.max").tolerance is None  # reported
    assert apart.check("decoder.pixel.max").example >= golden.EXTREMES


class Scaled:
    """A real backend whose results are off by a factor for each graph."""

    on_gpu = False

    def __init__(self, inner: Any, factors: dict[str, float]) -> None:
        self.inner, self.factors, self.graphs = inner, factors, inner.graphs

    def run(self, graph: str, inputs: Any, outputs: Any, micro_batch: int, **options: Any) -> list[Any]:
        results = self.inner.run(graph, inputs, outputs, micro_batch, **options)
        return [value * np.float32(self.factors[graph]) for value in results]

    def draw(self, mean: Any, logvar: Any, eps: Any) -> Any:
        return self.inner.draw(mean, logvar, eps)

    def describe(self) -> Any:
        return self.inner.describe()

    def close(self) -> None:
        self.inner.close()


def test_splits_that_differ_are_found(digits: dict[str, Path]) -> None:
    bundle = Bundle(digits["gaussian"])
    manifest = bundle.manifest
    reference = golden.decode(bundle.read(golden.FILE), manifest.golden, manifest.model)
    graphs = {name: bundle.read(graph.file) for name, graph in manifest.graphs.items()}

    real = open_backend(graphs, manifest.model, device="cpu")

    class Uneven(Scaled):
        """A real backend whose results depend on the batch, as a wrong kernel's would."""

        def run(self, graph: str, inputs: Any, outputs: Any, micro_batch: int, **options: Any) -> list[Any]:
            results = self.inner.run(graph, inputs, outputs, micro_batch, **options)
            return [value * np.float32(1 + 1e-5 * (micro_batch == 7)) for value in results]

    certificate = verifier.measure(manifest.model, Uneven(real, {}), reference, "uneven")
    failed = [c for c in certificate.checks if not c.passed]
    assert {c.graph for c in failed} >= {"encoder", "decoder"}
    assert {c.batch for c in failed} == {7}
    assert not certificate.splits_identical
    assert certificate.check(deviations.SPLIT).measured == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda t: t.pop("mean"), r"golden\.safetensors has the tensors .*; expected"),
        (lambda t: t.pop("x"), r"golden\.safetensors has no x of shape \(N, 1, 8, 8\)"),
        (lambda t: t.update(x=t["x"][:5]), r"x has shape \(5, 1, 8, 8\).*expected \(260, 1, 8, 8\)"),
        (lambda t: t.update(mean=t["mean"][:, :2]), r"mean has shape \(260, 2\).*expected \(260, 8\)"),
        (lambda t: t.update(kl=t["kl"].astype(np.float32)), "kl has .*float32; expected .*float64"),
        (lambda t: t.update(sample=t["sample"] * np.nan), "sample has values that are not finite"),
    ],
)
def test_golden_examples_are_checked(digits: dict[str, Path], tensors: Any, message: str) -> None:
    bundle = Bundle(digits["gaussian"])
    record, model = bundle.manifest.golden, bundle.manifest.model
    reference = golden.decode(bundle.read(golden.FILE), record, model)
    changed = dict(reference.tensors)
    tensors(changed)
    with pytest.raises(BundleError, match=message):
        golden.decode(golden.encode(golden.Reference(record, changed)), record, model)
    with pytest.raises(BundleError, match="is not a safetensors file"):
        golden.decode(b"junk", record, model)


def test_certificates_are_strict_json(digits: dict[str, Path]) -> None:
    certificate = vae_export.verify(digits["gaussian"])
    assert certificates.decode(certificates.encode(certificate)) == certificate
    plain = certificate.to_dict()
    assert plain["passed"] is True
    assert all("passed" in check for check in plain["checks"])
    json.dumps(plain, allow_nan=False)
    with pytest.raises(BundleError, match=r"verification\.json is not a certificate"):
        certificates.decode(b"{}")
    with pytest.raises(
        BundleError, match=r"is a certificate of version 1, whose tolerances were not measured\. Export"
    ):
        certificates.decode(b'{"version": 1}')
    raw = certificates.encode(certificate)
    with pytest.raises(BundleError, match="printable text expected"):
        certificates.decode(raw.replace(b'"precision": "float32"', b'"precision": "\\u001b[2J"'))
    with pytest.raises(BundleError, match="one check or more expected"):
        certificates.decode(json.dumps({**json.loads(raw), "checks": []}).encode())


def test_a_check_in_words() -> None:
    where = {"size": "height 8", "batch": 7, "example": 3}
    check = Check(
        id="encoder.mean.max", graph="encoder", quantity="mean", unit="nats", measured=2.0, tolerance=1.0, **where
    )
    assert str(check) == "encoder: mean is 2 nats, tolerance 1 (height 8, batch 7, example 3) [encoder.mean.max]"
    assert check.share == 2.0
    psnr = Check(id="p", graph="decoder", quantity="PSNR", unit="dB", measured=90.0)
    assert str(psnr) == "decoder: PSNR is 90 dB [p]"
    assert psnr.share == 0.0
    assert msgspec.structs.replace(psnr, tolerance=45.0, at_least=True).share == 0.5
    assert not msgspec.structs.replace(psnr, tolerance=91.0, at_least=True).passed
    assert str(msgspec.structs.replace(psnr, tolerance=45.0, at_least=True)).endswith("tolerance at least 45 [p]")


def test_a_check_and_a_certificate_in_a_line(digits: dict[str, Path]) -> None:
    certificate = vae_export.verify(digits["gaussian"])
    nearest = certificate.nearest
    at = f"{nearest.id} at {nearest.share:.0%} of its tolerance"
    assert repr(certificate) == f"Certificate('gaussian', float32, passed, {at})"
    check = certificate.check("decoder.finite")
    assert repr(check) == "Check('decoder.finite', 0 values, passed)"
    failed = msgspec.structs.replace(check, measured=2.0)
    assert repr(failed) == "Check('decoder.finite', 2 values, failed)"
    assert repr(msgspec.structs.replace(failed, tolerance=None)) == "Check('decoder.finite', 2 values, reported)"
    assert repr(msgspec.structs.replace(certificate, checks=(failed,))) == (
        "Certificate('gaussian', float32, failed, decoder.finite at inf% of its tolerance)"
    )


def test_a_graph_that_depends_on_the_size_of_its_trace(digits: dict[str, Path]) -> None:
    certificate = vae_export.verify(digits["gaussian"])
    small = msgspec.structs.replace(certificate.nearest, size="height 8", tolerance=0.0, measured=1.0)
    sized = msgspec.structs.replace(certificate, sizes=("height 16", "height 8"), checks=(small,))
    with pytest.raises(
        VerificationError, match="It passes at height 16: the graph depends on the size that it was tra"
    ):
        sized.require()
    large = msgspec.structs.replace(small, size="height 16")
    with pytest.raises(VerificationError) as caught:
        msgspec.structs.replace(sized, checks=(small, large)).require()
    assert "the graph depends on the size" not in str(caught.value)


def test_tolerances_are_in_one_table() -> None:
    assert all(isinstance(tolerance, Tolerance) for tolerance in TOLERANCES.values())
    assert "float32" not in TOLERANCES  # it is measured


def test_a_bundle_without_conditioning(digits: dict[str, Path]) -> None:
    bundle, reference = opened(digits["gaussian"])
    record = msgspec.structs.replace(bundle.manifest.golden, draws=0)
    old = {name: value for name, value in reference.tensors.items() if not name.startswith(("spread.", "float32."))}
    decoded = golden.decode(golden.encode(golden.Reference(record, old)), record, bundle.manifest.model)
    graphs, _ = bundle.graphs()
    backend = open_backend(graphs, bundle.manifest.model, device="cpu")
    with pytest.raises(BundleError, match=r"do not say how far rounding may move them, .*Export the model again"):
        verifier.measure(bundle.manifest.model, backend, decoded, "old")
