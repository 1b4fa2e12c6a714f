"""The certificate: it holds for what is equal and fails, saying where, for what is not."""

from __future__ import annotations

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
from vae_export.runtimes import open_backend

import vae_export
from vae_export import bundle as bundles
from vae_export import certificate as certificates
from vae_export import golden, sealed, verifier
from vae_export.bundle import Bundle
from vae_export.certificate import TOLERANCES, Check, Tolerance
from vae_export.errors import BundleError, VerificationError


@pytest.mark.parametrize("name", sorted(zoo.MEMBERS))
def test_it_holds(member: Callable[[str], Any], name: str) -> None:
    case = member(name)
    again = vae_export.verify(case.bundle)
    assert again.passed
    again.require()
    assert again.batches == (1, 2, 7, 64)
    written = certificates.decode((case.bundle / "verification.json").read_bytes())
    assert written == case.certificate
    assert [c.quantity for c in written.checks] == [c.quantity for c in again.checks]
    has_elbo = case.source.model.likelihood.kind != "none"
    quantities = {check.quantity for check in again.checks}
    assert ({"ELBO, worst", "ELBO, RMS", "KL, worst", "reconstruction, RMS"} <= quantities) == has_elbo
    assert ("KL(reference || exported)" in quantities) == has_elbo


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_digits(digits: dict[str, Path], likelihood: str) -> None:
    certificate = vae_export.verify(digits[likelihood])
    assert certificate.passed
    assert certificate.examples == {"extremes": 4, "held_out": 256, "decoded": 0, "prior": 256}
    worst = {c.quantity: c for c in certificate.checks if c.quantity.startswith("ELBO")}
    assert worst["ELBO, worst"].got <= worst["ELBO, worst"].allowed == 5e-6
    assert worst["ELBO, worst"].pytorch is not None
    assert worst["ELBO, RMS"].got > 0  # two float32 programs that never differ would be one


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
    bundles.write_manifest(path, msgspec.structs.replace(manifest, files=sealed.list_files(path)))


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
            [r"encoder: KL\(reference \|\| exported\), worst dimension is .* nats, allowed .* \(batch \d+, example"],
        ),
        ("decoder", one_bias, ["end to end: ELBO, RMS is .* of S, allowed", "decoder: sample, worst is"]),
        ("decoder", scaled, ["end to end: ELBO, RMS is .* of S, allowed"]),
        ("encoder", scaled, ["end to end: KL, RMS is .* of S, allowed"]),
        ("decoder", nan, ["decoder: not finite is .* values, allowed 0", "decoder: sample, worst is"]),
        ("encoder", nan, ["encoder: not finite is", r"encoder: logvar, worst"]),
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


def test_every_budget_bites(digits: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With tolerances of zero every measured error that is not exactly zero is out of its budget."""
    zero = Tolerance(**dict.fromkeys(Tolerance.__struct_fields__, 0.0))
    monkeypatch.setitem(TOLERANCES, "float32", zero)
    checks = vae_export.verify(digits["gaussian"]).checks
    failed = {(check.graph, check.quantity) for check in checks if not check.passed}
    assert failed >= {
        *(("encoder", f"{output}, worst") for output in ("mean", "logvar")),
        ("encoder", "KL(reference || exported), worst dimension"),
        *(("decoder", f"{output}, worst") for output in ("pixel", "sample", "sample_logvar")),
        ("end to end", "pixel, worst"),
        *(("end to end", f"{term}, {kind}") for term in ("ELBO", "reconstruction", "KL") for kind in ("worst", "RMS")),
    }
    assert all(check.allowed == 0.0 for check in checks if check.allowed is not None)
    assert not msgspec.structs.replace(checks[0], got=float("nan")).passed


def test_splits_that_differ_are_found(digits: dict[str, Path]) -> None:
    bundle = Bundle(digits["gaussian"])
    manifest = bundle.manifest
    reference = golden.decode(bundle.read(golden.FILE), manifest.golden, manifest.model)
    graphs = {name: bundle.read(graph.file) for name, graph in manifest.graphs.items()}

    real = open_backend(graphs, manifest.model, device="cpu")

    class Uneven:
        """A real backend whose results depend on the batch, as a wrong kernel's would."""

        inner = real
        graphs, on_gpu = real.graphs, False

        def run(self, graph: str, inputs: Any, outputs: Any, micro_batch: int, **options: Any) -> list[Any]:
            results = self.inner.run(graph, inputs, outputs, micro_batch, **options)
            return [value * np.float32(1 + 1e-5 * (micro_batch == 7)) for value in results]

        def draw(self, mean: Any, logvar: Any, eps: Any) -> Any:
            return self.inner.draw(mean, logvar, eps)

        def describe(self) -> Any:
            return self.inner.describe()

        def close(self) -> None:
            self.inner.close()

    certificate = verifier.measure(manifest.model, Uneven(), reference, "uneven")
    failed = [c for c in certificate.checks if not c.passed and "split" in c.quantity]
    assert {c.graph for c in failed} == {"encoder", "decoder"}
    assert {c.batch for c in failed} == {7}
    assert not certificate.splits_identical


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
    raw = certificates.encode(certificate)
    with pytest.raises(BundleError, match="printable text expected"):
        certificates.decode(raw.replace(b'"precision": "float32"', b'"precision": "\\u001b[2J"'))
    with pytest.raises(BundleError, match="one check or more expected"):
        certificates.decode(json.dumps({**json.loads(raw), "checks": []}).encode())


def test_a_check_in_words() -> None:
    check = Check(graph="encoder", quantity="mean", unit="nats", got=2.0, allowed=1.0, batch=7, example=3)
    assert str(check) == "encoder: mean is 2 nats, allowed 1 (batch 7, example 3)"
    assert str(Check(graph="decoder", quantity="PSNR", unit="dB", got=90.0)) == "decoder: PSNR is 90 dB"


def test_tolerances_are_in_one_table() -> None:
    assert all(isinstance(tolerance, Tolerance) for tolerance in TOLERANCES.values())
    assert TOLERANCES["float32"].relative == 5e-6
    assert TOLERANCES["float32"].own_factor == 3.0
