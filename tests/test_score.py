"""The fused graph `score`: the ELBO in one run, against the ELBO by parts in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import zoo

import vae_export
from vae_export import graph
from vae_export.certification import golden, verifier
from vae_export.contract.build_record import BuildFolder
from vae_export.contract.bundle import Bundle
from vae_export.contract.model import (
    DECODER_OUTPUTS,
    ENCODER_OUTPUTS,
    SCORE_OUTPUTS,
    Cost,
    Data,
    Latent,
    Likelihood,
    Model,
    Posterior,
)
from vae_export.errors import BundleError, InputError
from vae_export.graph import fuse
from vae_export.graph.likelihood import log_prob_terms
from vae_export.graph.nodes import Formula
from vae_export.numerics import elbo, likelihoods, noise
from vae_export.runtimes import VAE, open_backend, open_bundle
from vae_export.runtimes.memory import Budget

#: Of a term of log p(x|z), in float32: a few roundings.
TERM = 8 * 2.0**-24
#: Of the sum of absolute terms: decoding on another path may round otherwise.
SUM = 2e-6
WITH_ELBO = [name for name in zoo.MEMBERS if name != "plain"]
#: Made-up weights amplify rounding: these are refused in float16, whose ELBO would be off by more than 1e-3.
_REFUSED = ("conv-gaussian", "spatial", "spatial-named")
BUILT = [(name, kind) for name in WITH_ELBO for kind in ("fp32", "fp16") if kind == "fp32" or name not in _REFUSED]

Builds = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def built(member: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """A member's build for the CPU."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, precision: str) -> Path:
        if (name, precision) not in made:
            out = tmp_path_factory.mktemp("score") / f"{name}-{precision}"
            # Without forms, the fused graph and its parts are of the same nodes.
            options = {"precision": precision, "passes": "none"}
            made[name, precision] = vae_export.build(member(name).bundle, "cpu", out=out, **options).path
        return made[name, precision]

    return get


def examples(model: Model, count: int, size: tuple[int, ...]) -> np.ndarray:
    low, high = model.data.range
    return (zoo.pictures(count, size) * (high - low) + low).astype(np.float32)


def session(raw: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("name", "precision"), BUILT)
def test_the_graph_against_numpy(member: Any, built: Builds, name: str, precision: str) -> None:
    """Encoder and decoder of the same build, joined by NumPy, their terms and sums in float64."""
    source = member(name).source
    model, graphs = source.model, BuildFolder(built(name, precision)).graphs()
    x = examples(model, 7, source.example_shape)
    run = {part: session(raw) for part, raw in graphs.items()}
    mean, logvar = run["encoder"].run(ENCODER_OUTPUTS["diagonal_gaussian"], {"x": x})
    eps = noise.normals(7, noise.POSTERIOR, 3, 7, mean[0].size).reshape(mean.shape)
    names = DECODER_OUTPUTS[model.likelihood.kind]
    z = mean + np.exp(np.float32(0.5) * logvar) * eps
    outputs = dict(zip(names, run["decoder"].run(names, {"z": z}), strict=True))
    terms = likelihoods.of(model).log_prob_terms(x, outputs)
    expected = elbo.per_example(terms)
    got, divergence, bound = run["score"].run(SCORE_OUTPUTS, {"x": x, "eps": eps})
    assert [value.dtype for value in (got, divergence, bound)] == [np.float64] * 3
    assert [value.shape for value in (got, divergence, bound)] == [(7,)] * 3
    scale = elbo.per_example(np.abs(terms)) * (SUM if precision == "fp32" else 1e-4)
    assert (np.abs(got - expected) <= scale).all()
    np.testing.assert_allclose(divergence, elbo.kl(mean, logvar), rtol=1e-5 if precision == "fp32" else 1e-3)
    assert np.array_equal(bound, got - divergence)


@pytest.mark.parametrize(("name", "precision"), BUILT)
def test_the_graph_is_valid(member: Any, built: Builds, name: str, precision: str) -> None:
    proto = onnx.ModelProto.FromString(BuildFolder(built(name, precision)).graphs()["score"])
    onnx.checker.check_model(proto, full_check=True)
    kinds = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.DOUBLE: "float64"}

    def end(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
        tensor = value.type.tensor_type
        return value.name, kinds[tensor.elem_type], tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)

    for found, wanted in zip(
        (proto.graph.input, proto.graph.output), member(name).source.model.signature("score"), strict=True
    ):
        assert [end(value) for value in found] == [(t.name, t.dtype, t.shape) for t in wanted]


def by_parts(path: Path, build: Path, **options: Any) -> VAE:
    """A VAE on a build as one that had no graph for the ELBO."""
    bundle = Bundle(path)
    backend: Any = open_bundle(bundle, build=build).backend
    backend.graphs -= {"score"}
    return VAE(bundle.manifest.model, backend, **options)


@pytest.mark.parametrize(("name", "precision"), BUILT)
def test_the_elbo_by_parts_and_in_one(member: Any, built: Builds, name: str, precision: str) -> None:
    """Of the whole batch and of any split, from any start."""
    path, build = member(name).bundle, built(name, precision)
    x = examples(member(name).source.model, 20, member(name).source.example_shape)
    share = SUM if precision == "fp32" else 1e-4
    with by_parts(path, build) as parts:
        expected = parts.elbo(x, seed=3, start=100)
    scale = np.abs(expected.reconstruction) + expected.kl
    for micro_batch in (1, 7, 64):
        with vae_export.load(path, build=build, micro_batch=micro_batch) as vae:
            found = vae.elbo(x, seed=3, start=100)
            later = vae.elbo(x[13:], seed=3, start=113)
        for got, rest, want in zip(found, later, expected, strict=True):
            assert got.dtype == np.float64
            assert (np.abs(got - want) <= share * scale).all()
            assert (np.abs(rest - want[13:]) <= share * scale[13:]).all()
        assert np.array_equal(found.elbo, found.reconstruction - found.kl)


class Counted:
    """A backend that counts what it runs."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.graphs, self.on_gpu = inner, inner.graphs, inner.on_gpu
        self.runs: list[str] = []
        self.factor = 1.0

    def run(self, graph: str, *args: Any, **options: Any) -> list[Any]:
        self.runs.append(graph)
        results = self.inner.run(graph, *args, **options)
        return [value * self.factor for value in results] if graph == "score" else results

    def describe(self) -> Any:
        return self.inner.describe()


@pytest.fixture
def counted(member: Any, built: Builds) -> Counted:
    opened = open_bundle(Bundle(member("spatial-named").bundle), build=built("spatial-named", "fp32"))
    return Counted(opened.backend)


def test_one_run_where_the_budget_allows(member: Any, counted: Counted) -> None:
    """And by parts, in whatever slices fit, where it does not; errors are those of the parts."""
    source = member("spatial-named").source
    x = examples(source.model, 4, (3, 16, 24))
    vae = VAE(source.model, counted)
    expected = vae.elbo(x, seed=1)
    assert counted.runs == ["score"]
    flat = Cost(multiply_adds=(0.0, 0.0, 0.0), activations=(1000.0, 0.0, 0.0))
    budget = Budget(3000, source.model, {"encoder": flat, "decoder": flat})
    counted.runs.clear()
    found = VAE(source.model, counted, budget=budget).elbo(x, seed=1)  # two at once
    assert counted.runs == ["score"]
    np.testing.assert_allclose(found.elbo, expected.elbo, rtol=SUM)
    large = Cost(multiply_adds=(0.0, 0.0, 0.0), activations=(0.0, 1000.0, 0.0))
    with pytest.raises(
        InputError, match=r"max_memory is 3,000 bytes, and the encoder needs .* Load with as much or more"
    ):
        VAE(source.model, counted, budget=Budget(3000, source.model, {"encoder": large, "decoder": flat})).elbo(x)
    with pytest.raises(InputError, match=r"noise: seed is -1; expected 0 to"):
        vae.elbo(x, seed=-1)


def test_the_certificate_measures_it(member: Any, counted: Counted) -> None:
    """A graph for the ELBO that is off fails the checks of the ELBO and no other."""
    bundle = Bundle(member("spatial-named").bundle)
    manifest = bundle.manifest
    reference = golden.decode(bundle.read(golden.FILE), manifest.golden, manifest.model)
    assert verifier.measure(manifest.model, counted, reference, "right").passed
    counted.factor = 1 + 1e-4
    failed = [check for check in verifier.measure(manifest.model, counted, reference, "off").checks if not check.passed]
    assert {check.id for check in failed} == {"elbo.bound.max", "elbo.reconstruction.max", "elbo.kl.max"}


def test_models_without_an_elbo_have_none(member: Any, built: Builds) -> None:
    assert not member("plain").source.model.has_elbo
    assert set(BuildFolder(built("plain", "fp32")).graphs()) == {"encoder", "decoder", "reconstruct"}
    vae = vae_export.load(member("plain").bundle, build=built("plain", "fp32"))
    with vae, pytest.raises(InputError, match="this model has no likelihood"):
        vae.elbo(np.zeros((1, 12), np.float32))


def test_a_score_of_another_type_is_refused(member: Any, built: Builds, tmp_path: Path) -> None:
    """A graph whose sums are in float32 is not what the model has."""
    graphs = BuildFolder(built("linear", "fp32")).graphs()
    proto = onnx.ModelProto.FromString(graphs["score"])
    last = proto.graph.output[0].name
    for node in proto.graph.node:
        node.output[:] = ["summed" if name == last else name for name in node.output]
        node.input[:] = ["summed" if name == last else name for name in node.input]
    proto.graph.node.append(onnx.helper.make_node("Cast", ["summed"], [last], to=onnx.TensorProto.FLOAT))
    proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    changed = graphs | {"score": proto.SerializeToString()}
    with pytest.raises(BundleError, match=r"the manifest promises .*'log_likelihood', 'tensor\(double\)'"):
        open_backend(changed, member("linear").source.model, device="cpu")


# The terms of log p(x|z) alone, where float32 ends.


def model_of(kind: str, value_range: tuple[float, float], **likelihood: Any) -> Model:
    return Model(
        architecture="test",
        parameters=0,
        data=Data(shape=(1,), range=value_range),
        latent=Latent(shape=(1,)),
        prior="standard_normal",
        posterior=Posterior(kind="diagonal_gaussian"),
        likelihood=Likelihood(kind=kind, **likelihood),
    )


def terms_of(model: Model, feed: dict[str, np.ndarray]) -> np.ndarray:
    """What the nodes compute for x and the parameters of p(x|z)."""
    kind = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    ends = {name: onnx_ir.Value(name=name, type=kind, shape=onnx_ir.Shape(["n", 1])) for name in feed}
    made = onnx_ir.Graph(list(ends.values()), [], nodes=[], opset_imports={"": 18}, name="terms")
    f = Formula(made, "terms")
    terms = f.double(log_prob_terms(f, ends["x"], ends, model))
    terms.shape = onnx_ir.Shape(["n", 1])
    made.outputs.append(terms)
    (found,) = session(graph.write(onnx_ir.Model(made, ir_version=10))).run(None, feed)
    return found[:, 0]


def grid(**values: Any) -> dict[str, np.ndarray]:
    """Every combination: (N, 1) float32 each."""
    axes = np.meshgrid(*(np.asarray(v, np.float32) for v in values.values()), indexing="ij")
    return {name: axis.reshape(-1, 1) for name, axis in zip(values, axes, strict=True)}


SIZES = np.array([0, 1e-30, 1e-7, 1e-3, 0.5, 1, 3, 8, 16, 17, 20, 40, 87, 89, 104, 1e3, 1e10, 1e30])
WIDE = np.concatenate([-SIZES, SIZES])
LEVELS = np.arange(256) / 127.5 - 1
CASES = {
    "bernoulli": (
        model_of("bernoulli", (0.0, 1.0)),
        grid(x=[0, 1e-30, 1e-6, 0.25, 0.5, 0.75, 1 - 2.0**-23, 1 - 2.0**-24, 1], logits=WIDE),
    ),
    "gaussian": (
        model_of("gaussian", (-1.0, 1.0)),
        grid(x=[-1, -1e-6, 0, 0.3, 1], sample=[-1e6, -1, 0, 0.3, 1], sample_logvar=[-300, -90, -20, -1e-6, 0, 30, 200]),
    ),
    "gaussian_fixed": (
        model_of("gaussian_fixed", (-1.0, 1.0), variance=1e-8),
        grid(x=[-1, -1e-6, 0, 0.3, 1], sample=[-1e6, -1, 0, 0.3, 1, 1e25]),
    ),
    "discretized_logistic": (
        model_of("discretized_logistic", (-1.0, 1.0)),
        grid(
            x=LEVELS[[0, 1, 2, 100, 127, 128, 253, 254, 255]],
            location=[-3, -1, 0, 1 / 255, 0.5, 1, 3, 1e4],
            log_scale=[-60, -20, -12, -7, -3, 0, 3, 12, 30],
        ),
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_every_term_at_the_extremes(kind: str) -> None:
    """Each against NumPy's by itself: nothing that cancels is lost in a sum."""
    model, feed = CASES[kind]
    outputs = {name: value for name, value in feed.items() if name != "x"}
    outputs.setdefault("sample", feed["x"])
    exact = likelihoods.of(model).log_prob_terms(feed["x"], outputs)[:, 0]
    assert np.isfinite(exact).all()
    found = terms_of(model, feed)
    least = 1e-37 if kind == "bernoulli" else 1e-14  # where float32 has no more normal numbers, and float64's rounding
    assert (np.abs(found - exact) <= np.maximum(TERM * np.abs(exact), least)).all()


def test_a_posterior_that_is_the_prior_has_no_negative_kl() -> None:
    """exp(v) − 1 − v of small v is rounding alone."""
    encoder = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node("Mul", ["x", "zero"], ["mean"]),
                onnx.helper.make_node("Identity", ["x"], ["logvar"]),
            ],
            "encoder",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 1])],
            [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 1]) for n in ("mean", "logvar")],
            [onnx.numpy_helper.from_array(np.zeros(1, np.float32), "zero")],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=10,
    )
    decoder = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", ["z"], ["sample"])],
            "decoder",
            [onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["batch", 1])],
            [onnx.helper.make_tensor_value_info("sample", onnx.TensorProto.FLOAT, ["batch", 1])],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=10,
    )
    parts = (graph.read(part.SerializeToString()) for part in (encoder, decoder))
    fused = graph.write(fuse.score(*parts, model_of("gaussian_fixed", (-1.0, 1.0), variance=1.0)))
    x = np.concatenate([SIZES[SIZES < 50], -SIZES[SIZES < 50]]).astype(np.float32)[:, None]
    (kl,) = session(fused).run(["kl"], {"x": x, "eps": np.zeros_like(x)})
    assert (kl >= 0).all()
    np.testing.assert_allclose(kl, elbo.kl(np.zeros_like(x), x), rtol=1e-12, atol=1e-15)
