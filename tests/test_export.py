"""Export: what a bundle holds, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cards
import msgspec
import numpy as np
import onnx
import onnx_ir
import pytest
import safetensors.numpy
import torch
import zoo
from PIL import Image

import vae_export
from vae_export import graph as graphs
from vae_export.certification import golden, reference
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import DECODER_OUTPUTS, ENCODER_OUTPUTS, Data, Likelihood, Posterior
from vae_export.errors import InputError, VerificationError
from vae_export.exporting import model_card, tracing
from vae_export.exporting.exporter import export_trained
from vae_export.numerics import images
from vae_export.sources import cost
from vae_export.sources.protocol import Trained

ROWS = 24  # of the certificates


@pytest.mark.parametrize("name", sorted(zoo.MEMBERS))
def test_graphs_are_as_the_manifest_says(member: Callable[[str], Any], name: str) -> None:
    case = member(name)
    manifest = Bundle(case.bundle).manifest
    assert case.certificate.passed
    for kind, graph in manifest.graphs.items():
        model = onnx.load(case.bundle / graph.file)
        onnx.checker.check_model(model, full_check=True)
        assert graph.opset == model.opset_import[0].version == tracing.OPSET
        for listed, real in ((graph.inputs, model.graph.input), (graph.outputs, model.graph.output)):
            assert [t.name for t in listed] == [v.name for v in real]
            for tensor, value in zip(listed, real, strict=True):
                dims = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
                assert dims == tensor.shape
                assert dims[0] == "batch"
                assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        outputs = ENCODER_OUTPUTS if kind == "encoder" else DECODER_OUTPUTS
        wanted = manifest.model.posterior.kind if kind == "encoder" else manifest.model.likelihood.kind
        assert tuple(t.name for t in graph.outputs) == outputs[wanted]


@pytest.mark.parametrize("name", sorted(zoo.MEMBERS))
def test_the_card_is_right(member: Callable[[str], Any], name: str) -> None:
    case = member(name)
    card = cards.check(case.bundle)
    assert ("![" in card) == ("samples from the prior](samples.png)" in card) == (name not in ("plain",))
    if case.source.model.posterior.kind == "diagonal_gaussian":
        assert "KL(reference ‖ measured)" in card
    assert ('size={"height": 16, "width": 24})' in card) == (name == "spatial-named")


def test_the_picture_says_what_it_shows(member: Callable[[str], Any]) -> None:
    """Samples of what has a prior of its own; of others held-out data above their reconstructions, or nothing."""
    case = member("spatial")
    x = zoo.pictures(3, (3, 16, 24)) * 2 - 1
    with vae_export.load(case.bundle) as vae:
        shown = model_card.picture(vae, x, {}, 4)
        assert (shown.file, shown.caption) == ("samples.png", "samples from the prior")
        expected = images.grid(vae.sample(4), vae.model.data.range, columns=8)
        assert np.array_equal(shown.image, expected)
        nominal = msgspec.structs.replace(vae.model.likelihood, nominal=True)
        vae.model = msgspec.structs.replace(vae.model, likelihood=nominal)
        shown = model_card.picture(vae, x, {}, 64)
        assert (shown.file, shown.caption) == ("reconstructions.png", "data above their reconstructions")
        expected = images.pairs(x, vae.reconstruct(x), vae.model.data.range, columns=3)
        assert np.array_equal(shown.image, expected)
        assert model_card.picture(vae, x[:0], {}, 64) is None
    with vae_export.load(member("plain").bundle) as vae:
        assert model_card.picture(vae, zoo.pictures(3, (12,)), {}, 64) is None


def test_a_bundle_is_portable(digits: dict[str, Path]) -> None:
    """Nothing of the exporting machine is in it: no path, no stack trace, no folder's name."""
    for path in digits["bernoulli"].rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for trace in (b"/home/", b"/root/", b"/tmp/", b"site-packages", str(Path.cwd()).encode(), b"stack_trace"):
                assert trace not in content, f"{path.name} has {trace!r}"


def test_contents(digits: dict[str, Path]) -> None:
    path = digits["gaussian"]
    manifest = Bundle(path).manifest
    assert set(manifest.files) == {
        *("README.md", "calibration.safetensors", "config.json", "golden.safetensors", "samples.png"),
        *("vae_decoder/model.onnx", "vae_encoder/model.onnx", "verification.json"),
        *(f"training/{name}.png" for name in ("curves", "reconstructions", "samples", "interpolation")),
    }
    assert manifest.origin.kind == "checkpoint"
    assert manifest.origin.data == "scikit-learn handwritten digits"
    assert manifest.tools["torch"] == torch.__version__
    assert manifest.model.likelihood.logvar_clamp == (-6.0, 4.0)
    assert json.loads((path / "config.json").read_text())["model"]["likelihood"] == "gaussian"
    card = (path / "README.md").read_text()
    assert "![gaussian.bundle: samples from the prior](samples.png)" in card
    assert "| likelihood | gaussian |" in card
    assert "| end to end | ELBO |" in card
    with Image.open(path / "samples.png") as picture:
        assert picture.mode == "L"
        assert np.asarray(picture).std() > 30


def test_golden_rows_are_the_models_in_float64(digits: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    from vae_export.trainers import checkpoint, datasets
    from vae_export.trainers.config import DataConfig

    bundle = Bundle(digits["gaussian"])
    record = bundle.manifest.golden
    tensors = golden.decode(bundle.read(golden.FILE), record, bundle.manifest.model).tensors
    assert (record.held_out, record.extremes, record.prior, record.decoded) == (256, 4, 256, 0)
    assert record.reference == f"PyTorch {torch.__version__} float64"
    _, module = checkpoint.read(checkpoints["gaussian"])
    with torch.no_grad():
        mean, logvar = module.double().encode(torch.from_numpy(tensors["x"]).double())
    np.testing.assert_allclose(tensors["mean"], mean.numpy(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(tensors["logvar"], logvar.numpy(), rtol=1e-12, atol=1e-13)
    assert tensors["mean"].dtype == np.float64
    x = tensors["x"]
    assert (x[0] == 0).all()
    assert (x[1] == 1).all()
    assert np.array_equal(x[2], 1 - x[3])
    assert x[2].mean() == 0.5
    dataset = datasets.load(DataConfig(), 0)
    held_out, trained = (
        {row.tobytes() for row in part.read(np.arange(len(part)))} for part in (dataset.test, dataset.train)
    )
    assert all(row.tobytes() in held_out for row in x[record.extremes :])
    calibration = safetensors.numpy.load(bundle.read(golden.CALIBRATION_FILE))["x"]
    assert len(calibration) == 512
    assert all(row.tobytes() in trained for row in calibration)


def test_golden_shrinks_to_its_limit() -> None:
    source = zoo.MEMBERS["spatial"]()
    full = reference.compute(source, cost.count(source))
    assert full.shrunk() is full
    for limit in (1 << 20, 300_000, 1):
        small = full.shrunk(limit)
        size = len(golden.encode(small))
        assert size <= limit or small.record.prior == 1
        assert small.record.extremes == golden.EXTREMES
        assert small.record.decoded >= 1
        again = golden.decode(golden.encode(small), small.record, source.model)
        assert np.array_equal(again.tensors["x"], full.tensors["x"][: len(again.tensors["x"])])


def test_a_bundle_is_not_overwritten_by_accident(digits: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    before = (digits["gaussian"] / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=r"exists already\. Choose another path, or overwrite it on purpose"):
        vae_export.export(checkpoints["gaussian"], digits["gaussian"])
    assert (digits["gaussian"] / "manifest.json").read_bytes() == before


def test_a_path_that_gives_no_name(tmp_path: Path) -> None:
    for name in (".bundle", "a\nb"):
        with pytest.raises(InputError, match="gives the bundle no printable name"):
            export_trained(zoo.plain(), tmp_path / name, rows=ROWS)


def test_a_bare_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a module needs example, likelihood, data_range\. Pass them"):
        vae_export.export(zoo.Plain(), tmp_path / "b")


def test_options_are_named() -> None:
    """In the signature, each documented; others are Python's error."""
    options = set(inspect.signature(vae_export.export).parameters) - {"source", "path", "overwrite", "progress"}
    assert options == {"config", "size", "shape"} | {f.name for f in dataclasses.fields(vae_export.Source)} - {"module"}
    assert options <= set(re.findall(r"^ {4}(\w+): ", inspect.getdoc(vae_export.export) or "", re.MULTILINE))
    with pytest.raises(TypeError, match="unexpected keyword argument 'likelyhood'"):
        vae_export.export(zoo.Plain(), "b", likelyhood="none")  # type: ignore[call-arg]


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing does not exist; expected a checkpoint's or a diffusers"):
        vae_export.export(tmp_path / "nothing", tmp_path / "b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"is not a checkpoint: expected a folder with config\.json and model"):
        vae_export.export(tmp_path / "empty", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_progress_has_every_step(tmp_path: Path) -> None:
    calls: list[tuple[str, float | None]] = []
    export_trained(
        zoo.plain(), tmp_path / "b", rows=ROWS, progress=lambda step, share=None: calls.append((step, share))
    )
    shares = [share for _, share in calls if share is not None]
    assert 0 <= min(shares) < max(shares) == 1.0
    assert list(dict.fromkeys(step for step, _ in calls)) == [
        *("tracing the encoder", "tracing the decoder", "computing the reference in float64"),
        *("measuring the certificate", "writing the bundle"),
    ]


class Sampling(zoo.Plain):
    """Draws inside of encode."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        mean = super().encode(x)
        return mean + torch.randn_like(mean)


class Branching(zoo.Plain):
    """Control flow that depends on values."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode(x) if x.sum() > 0 else -super().encode(x)


class Three(zoo.Plain):
    """Returns more than the manifest says."""

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (super().encode(x),) * 3


class Single(zoo.Plain):
    """Computes its decoder in float32 even when it is asked for float64."""

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(z.float(), self.back.weight.float(), self.back.bias.float()).to(z.dtype)


class Named(zoo.Plain):
    """Has an inner value that PyTorch calls `mean`, as the output is called."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.into(x - x.mean(1, keepdim=True)))


class Flat(zoo.Plain):
    """Decodes to another shape than it should."""

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return super().decode(z)[:, :5]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Sampling, r"export: encoder: the graph draws random numbers \(RandomNormal(Like)?\).*let encode return"),
        (Branching, "could not trace the encoder as one graph.*Control flow that depends on values"),
        (Three, r"encode must return 1 tensor \(mean\), got 3"),
        (Flat, r"decode gave sample of shape \(24, 5\) for a batch of 24; expected \(24, 12\)"),
    ],
)
def test_modules_that_cannot_be_exported(tmp_path: Path, module: type[zoo.Plain], message: str) -> None:
    source = dataclasses.replace(zoo.plain(), module=zoo.fill(module()))
    with pytest.raises(InputError, match=message):
        export_trained(source, tmp_path / "b", rows=ROWS)
    assert list(tmp_path.iterdir()) == []


def test_a_float32_reference_is_called_so(tmp_path: Path) -> None:
    source = dataclasses.replace(zoo.plain(), module=zoo.fill(Single()))
    certificate = export_trained(source, tmp_path / "b", rows=ROWS)
    assert certificate.reference.endswith("float64, of which it computes some in float32 all the same")


def test_inner_names_do_not_collide(tmp_path: Path) -> None:
    source = dataclasses.replace(zoo.plain(), module=zoo.fill(Named()))
    assert export_trained(source, tmp_path / "b", rows=ROWS).passed


KINDS = ["bernoulli", "gaussian", "gaussian_fixed", "discretized_logistic", "none"]


class Heads(torch.nn.Module):
    """A decoder with the outputs of any likelihood, and an encoder with or without a variance."""

    def __init__(self, likelihood: str, posterior: str) -> None:
        super().__init__()
        self.likelihood, self.posterior = likelihood, posterior
        self.into, self.back, self.scale = torch.nn.Linear(12, 6), torch.nn.Linear(3, 12), torch.nn.Linear(3, 12)

    def encode(self, x: torch.Tensor) -> Any:
        mean, logvar = self.into(x).chunk(2, dim=1)
        return mean if self.posterior == "deterministic" else (mean, logvar)

    def decode(self, z: torch.Tensor) -> Any:
        out, scale = self.back(z), self.scale(z)
        return {
            "bernoulli": (out.sigmoid(), out),
            "gaussian": (out, scale),
            "gaussian_fixed": out,
            "discretized_logistic": (out, out, scale - 3),
            "none": (out,),
        }[self.likelihood]


@pytest.mark.parametrize("likelihood", KINDS)
@pytest.mark.parametrize("posterior", ["diagonal_gaussian", "deterministic"])
def test_every_likelihood_and_posterior(tmp_path: Path, likelihood: str, posterior: str) -> None:
    source = with_heads(likelihood, posterior)
    certificate = export_trained(source, tmp_path / "b", rows=ROWS)
    has_elbo = likelihood != "none" and posterior == "diagonal_gaussian"
    assert any("ELBO" in check.quantity for check in certificate.checks) == has_elbo
    assert vae_export.verify(tmp_path / "b").passed
    with vae_export.load(tmp_path / "b") as vae:
        if has_elbo:
            assert np.isfinite(vae.elbo(source.held_out[:3]).elbo).all()


def with_heads(likelihood: str, posterior: str = "diagonal_gaussian") -> Trained:
    model = msgspec.structs.replace(
        zoo.plain().model,
        data=Data(shape=(12,), range=(0.0, 1.0)),
        posterior=Posterior(kind=posterior),
        likelihood=Likelihood(kind=likelihood, variance=0.1 if likelihood == "gaussian_fixed" else None),
    )
    module = zoo.fill(Heads(likelihood, posterior))
    return dataclasses.replace(zoo.plain(), module=module, model=model, held_out=zoo.pictures(300, (12,)))


def test_too_little_held_out_data_is_topped_up(tmp_path: Path) -> None:
    source = dataclasses.replace(zoo.plain(), held_out=zoo.pictures(10, (12,)))
    assert export_trained(source, tmp_path / "b", rows=ROWS).examples == {
        "extremes": 4, "held_out": 10, "decoded": ROWS - 10, "prior": ROWS,
    }  # fmt: skip


class Wrong(Heads):
    """Gives logits where the mean belongs."""

    def decode(self, z: torch.Tensor) -> Any:
        out = super().decode(z)
        return out[1], out[1]


def compute(source: Trained) -> None:
    """What an export does between tracing and the certificate."""
    reference.compute(source, cost.count(source), most=ROWS)


def test_claims_that_the_outputs_contradict() -> None:
    source = with_heads("gaussian")
    claimed = msgspec.structs.replace(
        source.model, posterior=Posterior(kind="diagonal_gaussian", logvar_clamp=(5.0, 6.0))
    )
    with pytest.raises(InputError, match=r"logvar is said to be clamped to \[5\.0, 6\.0\], and the model gives values"):
        compute(dataclasses.replace(source, model=claimed))
    source = with_heads("discretized_logistic")
    likelihood = Likelihood(kind="discretized_logistic", log_scale_clamp=(5.0, 6.0))
    claimed = msgspec.structs.replace(source.model, likelihood=likelihood)
    with pytest.raises(InputError, match=r"log_scale is said to be clamped to \[5\.0, 6\.0\], and the model gives"):
        compute(dataclasses.replace(source, model=claimed))
    source = dataclasses.replace(with_heads("bernoulli"), module=zoo.fill(Wrong("bernoulli", "diagonal_gaussian")))
    with pytest.raises(InputError, match=r"with sample = sigmoid\(logits\); they differ by"):
        compute(source)
    source = with_heads("gaussian")
    with torch.no_grad():
        source.module.back.bias.fill_(float("inf"))
    with pytest.raises(InputError, match="the model's sample has values that are not finite"):
        compute(source)


def test_a_graph_that_differs_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traced graph is changed, as a defect of PyTorch's exporter would: export must not pass it."""
    original = tracing.trace

    def corrupt(*arguments: Any) -> Any:
        content, *rest = original(*arguments)
        model = graphs.read(content)
        for value in model.graph.initializers.values():
            array = value.const_value.numpy()
            if array.dtype == np.float32 and array.ndim == 2:
                value.const_value = onnx_ir.tensor(array * np.float32(1.01), name=value.name)
        return graphs.write(model), *rest

    monkeypatch.setattr(tracing, "trace", corrupt)
    with pytest.raises(VerificationError, match=r"decoder: sample, worst of draws .* relative to max\|reference\|,"):
        export_trained(zoo.plain(), tmp_path / "b", rows=ROWS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"example_shape": (11,)}, r"example_shape \(11,\) does not fit"),
        (
            {"held_out": np.zeros((0, 12), np.float32)},
            r"held_out has shape \(0, 12\); expected at least one row of",
        ),
        ({"calibration": np.zeros((3, 11), np.float32)}, r"calibration has shape \(3, 11\)"),
    ],
)
def test_sources_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_trained(dataclasses.replace(zoo.plain(), **changes), tmp_path / "b", rows=ROWS)


class Tiny(zoo.Plain):
    """Constants that nearly do nothing, where they are all that keeps a result finite or a thousandth away."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.into(torch.relu(x - 1.9))  # zero for nearly all data
        return (hidden - hidden) / ((hidden - hidden).abs() + 1e-15) + super().encode(x) * 1.000005

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return super().decode(z) / (
            1.000005 - 1e-12 + torch.relu(z - 9).sum(1, keepdim=True) / (z.abs() + 1e-30)[:, :1]
        )


def test_constants_that_nearly_do_nothing_stay(tmp_path: Path) -> None:
    """PyTorch's exporter optimizes a sum with less than 1e-8 away, and a product with what is near to 1."""
    module = zoo.fill(Tiny())
    certificate = export_trained(dataclasses.replace(zoo.plain(), module=module), tmp_path / "b", rows=ROWS)
    assert certificate.passed
    x = zoo.pictures(3, (12,))
    with vae_export.load(tmp_path / "b") as vae, torch.no_grad():
        mean = vae.encode(x).mean
        assert np.isfinite(mean).all()
        exact = module.double().encode(torch.from_numpy(x).double()).numpy()
        assert np.abs(mean - exact).max() < 1e-6  # without the factor it is off by five times as much
