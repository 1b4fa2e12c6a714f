"""Modules of users: which are recognized and exported, and which are refused, with which messages."""

from __future__ import annotations

import dataclasses
import random
import sys
import types
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import size_dependent
import sympy
import torch
import zoo
from torch import Tensor, nn
from torch.distributions import Bernoulli, Beta, Categorical, Independent, Normal

import vae_export
from vae_export.certification import golden
from vae_export.contract.bundle import Bundle
from vae_export.errors import InputError
from vae_export.exporting import sizes, tracing
from vae_export.exporting.exporter import export_trained
from vae_export.sources import module
from vae_export.sources.adapter import Adapter
from vae_export.sources.protocol import Decoder

SHAPE = (1, 4, 4)
ROWS = 24  # of the certificates
ADVICE = r"(?s).*class Adapted\(torch\.nn\.Module\):.*def encode.*return mean, logvar.*def decode"


class Output(OrderedDict):
    """As pythae's ModelOutput is: an ordered mapping whose values are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Gaussian:
    """As diffusers' DiagonalGaussianDistribution is: parameters that say the same several times, and methods."""

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean, self.logvar = mean, logvar
        self.std, self.var = torch.exp(0.5 * logvar), torch.exp(logvar)

    def sample(self) -> Tensor:
        raise AssertionError("nobody samples here")


@dataclasses.dataclass
class KLOutput:
    """As diffusers' AutoencoderKLOutput is."""

    latent_dist: Gaussian


Pair = namedtuple("Pair", ("log_sigma", "mu"))

ENCODE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "pair": lambda m, v: (m, v),
    "list": lambda m, v: [m, v],
    "normal": lambda m, v: Normal(m, torch.exp(0.5 * v)),
    "independent": lambda m, v: Independent(Normal(m, torch.exp(0.5 * v)), 1),
    "dict": lambda m, v: {"mu": m, "log_var": v, "z": m + torch.randn_like(m)},
    "variance": lambda m, v: {"loc": m, "variance": v.exp()},
    "named tuple": lambda m, v: Pair(0.5 * v, m),
    "object": lambda m, v: types.SimpleNamespace(loc=m, scale=torch.exp(0.5 * v)),
    "diffusers": lambda m, v: KLOutput(Gaussian(m, v)),
    "deterministic": lambda m, v: m,
}
DECODE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda m, v: m,
    "tuple of one": lambda m, v: (m,),
    "sample": lambda m, v: Output(sample=m),
    "sigmoid": lambda m, v: torch.sigmoid(m.flatten(1)).reshape(m.shape),
    "saturated": lambda m, v: Bernoulli(probs=torch.sigmoid(30 * m)),
    "logits": lambda m, v: Independent(Bernoulli(logits=m), 3),
    "probs": lambda m, v: {"probs": 0.5 + 0.4 * torch.sin(m)},
    "both": lambda m, v: (torch.sigmoid(m), m),
    "pair": lambda m, v: (m, v),
    "normal": lambda m, v: Normal(m, torch.exp(0.5 * v)),
    "dict": lambda m, v: {"x_hat": m, "logvar": v},
    "logistic": lambda m, v: {"sample": m, "location": m, "log_scale": v - 3},
}


class User(nn.Module):
    """A user's VAE on small pictures, whose encode and decode return what two functions make of their results."""

    def __init__(self, encode: Any = "pair", decode: Any = "tensor") -> None:
        super().__init__()
        self.into, self.back = nn.Linear(16, 6), nn.Linear(3, 32)
        self.returns = (ENCODE.get(encode, encode), DECODE.get(decode, decode))

    def encode(self, x: Tensor) -> Any:
        return self.returns[0](*self.into(x.flatten(1)).chunk(2, dim=1))

    def decode(self, z: Tensor) -> Any:
        return self.returns[1](*self.back(z).unflatten(1, (2, *SHAPE)).unbind(1))


def user(
    encode: Any = "pair", decode: Any = "tensor", likelihood: Any = "gaussian_fixed", **changes: Any
) -> vae_export.Source:
    changes.setdefault("variance", 0.1 if likelihood == "gaussian_fixed" else None)
    return vae_export.Source(
        **{
            "module": zoo.fill(User(encode, decode)),
            "example": zoo.pictures(2, SHAPE),
            "likelihood": likelihood,
            "data_range": (0.0, 1.0),
            **changes,
        }
    )


class Vanilla(nn.Module):
    """Has the interface of AntixK/PyTorch-VAE: lists, and a forward that returns what its loss needs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Dropout(0.5))
        self.fc_mu, self.fc_var = nn.Linear(16, 3), nn.Linear(16, 3)
        self.decoder_input = nn.Linear(3, 16)
        self.final_layer = nn.Sequential(nn.ConvTranspose2d(4, 1, 4, 2, 1), nn.Tanh())

    def encode(self, x: Tensor) -> list[Tensor]:
        result = torch.flatten(self.encoder(x), start_dim=1)
        return [self.fc_mu(result), self.fc_var(result)]

    def decode(self, z: Tensor) -> Tensor:
        return self.final_layer(self.decoder_input(z).view(-1, 4, 2, 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        mu, log_var = self.encode(x)
        return [self.decode(mu + torch.randn_like(mu) * torch.exp(0.5 * log_var)), x, mu, log_var]


class Part(nn.Module):
    """An encoder or decoder of pythae's."""

    def __init__(self, layer: nn.Module, returns: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.returns = layer, returns

    def forward(self, x: Tensor) -> Any:
        return self.returns(self.layer(x))


class Pythae(nn.Module):
    """Has the interface of pythae's models: modules `encoder` and `decoder`, which return a ModelOutput."""

    def __init__(self, encoder: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()

        def encoded(h: Tensor) -> Output:
            return Output(embedding=h[:, :3], log_covariance=h[:, 3:])

        self.encoder = Part(nn.Sequential(nn.Flatten(), nn.Linear(16, 6)), encoder or encoded)
        decoder = nn.Sequential(nn.Linear(3, 16), nn.Sigmoid(), nn.Unflatten(1, SHAPE))
        self.decoder = Part(decoder, lambda h: Output(reconstruction=h))


class Spatial(nn.Module):
    """Fully convolutional; on request with latents that do not follow the size."""

    def __init__(self, pool: int | None = None) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 4, 4, 2, 1), nn.ConvTranspose2d(2, 1, 4, 2, 1)
        self.pool = nn.Identity() if pool is None else nn.AdaptiveAvgPool2d(pool)

    def encode(self, x: Tensor) -> Any:
        return self.pool(self.down(x)).chunk(2, dim=1)

    def decode(self, z: Tensor) -> Tensor:
        return self.up(z)


def spatial(pool: int | None = None, **changes: Any) -> vae_export.Source:
    changes = {"example": zoo.pictures(1, (1, 8, 12)), "multiple_of": 4, **changes}
    return user(module=zoo.fill(Spatial(pool)), **changes)


def vanilla() -> vae_export.Source:
    source = user(module=zoo.fill(Vanilla()), data_range=(-1, 1), example=torch.from_numpy(zoo.pictures(3, SHAPE)))
    return dataclasses.replace(source, held_out=zoo.pictures(20, SHAPE), scaling=0.5, shift=0.1, name="my vae")


EXPORTS: dict[str, Callable[[], vae_export.Source]] = {
    "AntixK": vanilla,
    "pythae": lambda: user(module=zoo.fill(Pythae()), likelihood="bernoulli"),
    "sizes": spatial,
    **{
        f"{encode}, {likelihood} {decode}": lambda e=encode, d=decode, k=likelihood: user(e, d, k)
        for encode, likelihood, decode in (
            ("pair", "gaussian", "normal"),
            ("normal", "bernoulli", "saturated"),
            ("independent", "bernoulli", "logits"),
            ("dict", "bernoulli", "tensor"),
            ("variance", "bernoulli", "probs"),
            ("object", "discretized_logistic", "logistic"),
            ("diffusers", "none", "sample"),
            ("deterministic", "bernoulli", "sigmoid"),
        )
    },
}


@pytest.mark.parametrize("name", EXPORTS)
def test_modules_are_exported(tmp_path: Path, name: str) -> None:
    """A real export each: the certificate compares the bundle with the module in float64."""
    source = EXPORTS[name]()
    trained = module.resolve(source)
    assert export_trained(trained, tmp_path / "b", rows=ROWS).passed
    manifest = Bundle(tmp_path / "b").manifest
    assert manifest.model == trained.model
    assert manifest.origin.kind == "module"
    assert manifest.model.architecture == type(source.module).__name__
    x = np.asarray(source.example, np.float32)
    with vae_export.load(tmp_path / "b") as vae, torch.no_grad():
        posterior = vae.encode(x)
        mean = Adapter(source.module, source.likelihood).encode(torch.from_numpy(x))[0]
        np.testing.assert_allclose(posterior.mean, mean, rtol=1e-4, atol=1e-5)
        assert vae.decode(posterior.mean).shape == x.shape


def test_what_the_manifest_says() -> None:
    trained = module.resolve(vanilla())
    assert (trained.origin.name, trained.model.architecture) == ("my vae", "Vanilla")
    assert (trained.model.latent.scaling, trained.model.latent.shift) == (0.5, 0.1)
    assert (trained.model.likelihood.variance, trained.model.data.range) == (0.1, (-1.0, 1.0))
    assert trained.model.parameters == sum(p.numel() for p in vanilla().module.parameters())
    assert trained.held_out is not None
    assert len(trained.held_out) == 20
    assert trained.calibration is not None
    assert len(trained.calibration) == 3
    assert module.resolve(user(nominal=True)).model.likelihood.nominal
    model = module.resolve(spatial()).model
    assert [str(dim) for dim in model.data.shape] == [
        "1",
        *(f"{n} (a multiple of 4, at least 4)" for n in ("height", "width")),
    ]
    assert [str(dim) for dim in model.latent.shape] == ["2", "height/2", "width/2"]
    other = vanilla()
    assert trained.origin.weights_sha256 == module.resolve(other).origin.weights_sha256
    with torch.no_grad():
        other.module.fc_mu.bias += 1e-6
    assert trained.origin.weights_sha256 != module.resolve(other).origin.weights_sha256


def test_the_example_is_data(tmp_path: Path) -> None:
    """The bundle is verified on it, or, where there is held-out data, a lower precision is chosen by it."""
    x, held_out = zoo.pictures(5, SHAPE), zoo.pictures(40, SHAPE)[5:]

    def rows(name: str, **changes: Any) -> tuple[Any, np.ndarray, np.ndarray]:
        export_trained(module.resolve(user(**changes)), tmp_path / name, rows=ROWS)
        bundle = Bundle(tmp_path / name)
        record, model = bundle.manifest.golden, bundle.manifest.model
        golden_x = golden.decode(bundle.read(golden.FILE), record, model).tensors["x"][record.extremes :]
        return record, golden_x, golden.decode_calibration(bundle.read(golden.CALIBRATION_FILE), model)

    record, verified, calibration = rows("alone", example=x)
    assert (record.held_out, record.decoded, len(calibration)) == (5, ROWS - 5, 0)
    assert {row.tobytes() for row in verified[:5]} == {row.tobytes() for row in x}

    record, verified, calibration = rows("beside", example=x, held_out=held_out)
    assert (record.held_out, record.decoded) == (ROWS, 0)
    assert {row.tobytes() for row in calibration} == {row.tobytes() for row in x}

    record, verified, calibration = rows("held out", example=x, held_out=held_out, keep_example=False)
    assert (record.held_out, len(calibration)) == (ROWS, 35 - ROWS)
    assert {row.tobytes() for row in (*verified, *calibration)} == {row.tobytes() for row in held_out}

    record, verified, calibration = rows("made up", example=x, keep_example=False)
    assert (record.held_out, record.decoded, len(calibration)) == (0, ROWS, 0)
    assert not {row.tobytes() for row in verified} & {row.tobytes() for row in x}


@pytest.mark.parametrize("name", ["list", "named tuple", "normal", "variance", "object", "diffusers"])
def test_every_form_is_the_same_posterior(name: str) -> None:
    x = torch.from_numpy(zoo.pictures(4, SHAPE))
    with torch.no_grad():
        mean, logvar = module.resolve(user(name)).module.encode(x)
        expected = zoo.fill(User()).encode(x)
    torch.testing.assert_close(mean, expected[0])
    torch.testing.assert_close(logvar, expected[1])


@pytest.mark.parametrize(
    ("decode", "likelihood", "changes"),
    [
        *[(name, "bernoulli", {}) for name in ("tensor", "sigmoid", "logits", "both")],
        (lambda m, v: 1 / (1 + torch.exp(-m)), "bernoulli", {"outputs": "probabilities"}),
        ("tensor", "bernoulli", {"outputs": "logits"}),
        *[(name, "gaussian", {}) for name in ("pair", "normal", "dict")],
        *[(name, "gaussian_fixed", {}) for name in ("tensor", "tuple of one", "sample")],
    ],
)
def test_every_form_is_the_same_likelihood(decode: Any, likelihood: str, changes: dict[str, Any]) -> None:
    z = torch.linspace(-2, 2, 12).reshape(4, 3)
    with torch.no_grad():
        decoded = module.resolve(user("pair", decode, likelihood, **changes)).module.decode(z)
        mean, logvar = zoo.fill(User(decode="pair")).decode(z)
    expected = {"bernoulli": (mean.sigmoid(), mean), "gaussian": (mean, logvar), "gaussian_fixed": (mean,)}[likelihood]
    assert len(decoded) == len(expected)
    for one, other in zip(decoded, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_sigmoid_gives_its_logits_exactly() -> None:
    """At 40 the sigmoid is 1 in float32, from which no logit can be had."""
    decode = module.resolve(user("pair", lambda m, v: torch.sigmoid(40 + 0 * m), "bernoulli")).module.decode
    assert (decode(torch.zeros(1, 3))[1] == 40).all()


def test_the_users_module_is_not_changed() -> None:
    source = user(module=zoo.fill(User()).half().train())
    before = {name: tensor.clone() for name, tensor in source.module.state_dict().items()}
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    trained = module.resolve(source)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    with pytest.raises(ValueError, match="Expected parameter scale"):
        Normal(0.0, -1.0)  # distributions check their arguments again
    assert source.module.training
    assert {p.dtype for p in source.module.parameters()} == {torch.float16}
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.module.state_dict().items())
    assert {p.dtype for p in trained.module.parameters()} == {torch.float32}
    assert not any(part.training for part in trained.module.modules())


class Labelled(User):
    def encode(self, x: Tensor, label: Tensor) -> Any:  # type: ignore[override]
        return super().encode(x)


class Dropping(User):
    def encode(self, x: Tensor) -> Any:
        return super().encode(nn.functional.dropout(x, 0.5, training=True))


class Stuck(User):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def train(self, mode: bool = True) -> Any:
        self.training = mode
        return self


class Mixing(User):
    def __init__(self, features: int = 16) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16, track_running_stats=False)

    def encode(self, x: Tensor) -> Any:
        return super().encode(self.norm(x.flatten(1)))


class Centred(User):
    def decode(self, z: Tensor) -> Any:
        return super().decode(z - z.mean(0))


class Uncopied(User):
    def __init__(self) -> None:
        super().__init__()
        self.kept = self.into.weight * 2


class Branching(User):
    def encode(self, x: Tensor) -> Any:
        mean, logvar = super().encode(x)
        return (mean, logvar) if x.sum() > 0 else (-mean, logvar)


def encoding(function: Callable[[Tensor, Tensor], Any]) -> vae_export.Source:
    return user(function)


def decoding(function: Callable[[Tensor, Tensor], Any], likelihood: str = "gaussian_fixed") -> vae_export.Source:
    return user("pair", function, likelihood)


#: Refused sources, a pattern of the message, and whether it shows the adapter to write.
REFUSED: dict[str, tuple[Callable[[], vae_export.Source], str, bool]] = {
    "no methods": (lambda: user(module=nn.Linear(16, 3)), "Linear has no encode and no decode; expected enc", True),
    "features": (
        lambda: user(module=Pythae(lambda h: h)),
        r"Pythae has no encode and decode, and its encoder returned a tensor of shape \(2, 6\); expected a mapping "
        "with embedding, as pythae's models return",
        True,
    ),
    "unknown type": (
        lambda: encoding(lambda m, v: types.SimpleNamespace(a=m, b=v)),
        r"User\.encode returned a SimpleNamespace with the attributes a, b; expected mean and logvar, std or var",
        True,
    ),
    "no attributes": (lambda: encoding(lambda m, v: 3), "encode returned a int; expected mean and logvar", True),
    "unknown keys": (
        lambda: encoding(lambda m, v: {"a": m, "b": v}),
        r"returned a dict with the keys a, b; expected mean or mu or loc or embedding in it",
        True,
    ),
    "no mean": (lambda: encoding(lambda m, v: {"logvar": v}), "keys logvar; expected a mean in it", True),
    "nothing": (lambda: encoding(lambda m, v: ()), "encode returned a tuple of 0; expected tensors in it", True),
    "two means": (
        lambda: encoding(lambda m, v: {"mu": m, "mean": m + 1, "logvar": v}),
        "the keys mu, mean, logvar, which is ambiguous: mean and mu are each a candidate for mean",
        True,
    ),
    "unknown variance": (
        lambda: encoding(lambda m, v: {"mu": m, "lv": v}),
        "which is ambiguous: lv may be a variance or something else",
        True,
    ),
    "three": (
        lambda: encoding(lambda m, v: (m, m, v)),
        r"returned a tuple of 3 \(a tensor of shape \(2, 3\), .*ambiguous: which of them are the mean and the log",
        True,
    ),
    "std in a pair": (
        lambda: user(lambda m, v: (m, v.exp()), example=zoo.pictures(4, SHAPE)),
        "User.encode gave a pair whose second is positive throughout: it may be a standard deviation",
        True,
    ),
    "std in a pair of decode": (
        lambda: decoding(lambda m, v: (m, v.exp()), "gaussian"),
        "User.decode gave a pair whose second is positive throughout",
        True,
    ),
    "negative std": (
        lambda: encoding(lambda m, v: Normal(m, -v.exp())),
        r"User\.encode gave a std of -.*; expected positive values",
        False,
    ),
    "categories": (
        lambda: encoding(lambda m, v: Categorical(logits=m)),
        "encode returned a distribution Categorical: discrete latents are not supported; expected a Normal, alone",
        False,
    ),
    "indices": (lambda: encoding(lambda m, v: m.argmax(1)), "a mean of int64: discrete latents are not supp", False),
    "bytes": (lambda: decoding(lambda m, v: m.int()), "decode gave a mean of int32; expected floating", False),
    "another distribution": (
        lambda: decoding(lambda m, v: Beta(m.exp(), v.exp())),
        "decode returned a distribution Beta: it is not supported; expected a Normal or a Bernoulli",
        False,
    ),
    "conditional": (
        lambda: user(module=Labelled()),
        r"Labelled: encode needs x, label; expected one argument\. Conditional VAEs are not supported",
        False,
    ),
    "sampling in encode": (
        lambda: encoding(lambda m, v: (m + torch.randn_like(m), v)),
        r"User\.encode draws random numbers: two calls with the same argument differ\. Either it samples, which is",
        True,
    ),
    "NumPy in decode": (
        lambda: decoding(lambda m, v: m + np.random.rand()),
        r"User\.decode draws random numbers",
        True,
    ),
    "dropout": (lambda: user(module=zoo.fill(Dropping())), "or dropout stays on after eval", True),
    "training mode": (
        lambda: user(module=Stuck()),
        r"Stuck stays in training mode after eval\(\): .*drop \(Dropout\)\. A train\(\) or eval\(\) of its own",
        False,
    ),
    "statistics of the batch": (
        lambda: user(module=zoo.fill(Mixing())),
        r"Mixing\.encode mixes the examples of a batch: the first gives other results alone.*as norm has none",
        False,
    ),
    "mean of the batch": (
        lambda: user(module=zoo.fill(Centred()), example=zoo.pictures(1, SHAPE)),
        r"Centred\.decode mixes the examples of a batch.*must use its running statistics; train",
        False,
    ),
    "copies": (
        lambda: user(module=Uncopied()),
        r"Uncopied cannot be copied: .*What is exported is a copy: drop",
        False,
    ),
    "latents differ": (
        lambda: encoding(lambda m, v: (m, v[:, :1])),
        r"gave mean \(2, 3\) and logvar \(2, 1\) for a batch of 2 of \(1, 4, 4\); expected \(B, D\) or \(B, C, h, w\)",
        False,
    ),
    "latents of rank 2": (
        lambda: encoding(lambda m, v: m[:, None]),
        r"gave mean \(2, 1, 3\) for a batch of 2",
        False,
    ),
    "another batch": (
        lambda: user(example=zoo.pictures(3, (16, 16))),
        r"encode failed on a batch of 3 of \(16, 16\): RuntimeError: mat1 .* The first axis of example is the batch",
        False,
    ),
    "data's shape": (
        lambda: decoding(lambda m, v: m.flatten(1)),
        r"decode gave sample of shape \(2, 16\) for a batch of 2; expected \(2, 1, 4, 4\), the shape of example\. Le",
        True,
    ),
    "not finite": (
        lambda: encoding(lambda m, v: m / 0),
        "encode gave values that are not finite on the example",
        False,
    ),
    "decode unknown": (
        lambda: decoding(lambda m, v: {"picture": m}),
        "decode returned a dict with the keys picture; expected sample or reconstruction",
        True,
    ),
    "no variance": (
        lambda: decoding(lambda m, v: m, "gaussian"),
        r"likelihood 'gaussian' needs sample, sample_logvar\. Return the log-variance beside the mean; if the mod",
        True,
    ),
    "a variance too much": (
        lambda: decoding(lambda m, v: Normal(m, v.exp())),
        r"returned a Normal.*; likelihood 'gaussian_fixed' needs sample\. If the decoder gives a variance for each",
        True,
    ),
    "too many": (
        lambda: decoding(lambda m, v: (m, v), "none"),
        r"returned a tuple of 2 .*likelihood 'none' needs sample\. Return the reconstruction alone",
        True,
    ),
    "too few": (
        lambda: decoding(lambda m, v: (m, v), "discretized_logistic"),
        r"returned a tuple of 2 .*likelihood 'discretized_logistic' needs sample, location, log_scale\.",
        True,
    ),
    "logits or probabilities": (
        lambda: decoding(lambda m, v: 0.5 + 0.4 * torch.sin(m), "bernoulli"),
        r"decode returned a tensor of shape .* with no sigmoid at its end, .*Pass outputs=\"logits\" or outputs=\"prob",
        False,
    ),
    "no probabilities": (
        lambda: user("pair", "tensor", "bernoulli", outputs="probabilities"),
        r"decode gave probabilities from -.*; expected values in \[0, 1\]\. If they are logits, pass outputs=",
        False,
    ),
    "a sigmoid said to give logits": (
        lambda: user("pair", "sigmoid", "bernoulli", outputs="logits"),
        r'outputs is "logits", and User\.decode ends in a sigmoid, so it returns probabilities\. Pass outputs=',
        False,
    ),
    "another sigmoid": (
        lambda: decoding(lambda m, v: (torch.sigmoid(v), m), "bernoulli"),
        "gave two tensors, and the first is not the sigmoid of the second: they differ by",
        False,
    ),
    # Attributes of the source.
    "no module": (lambda: user(module={"weights": 1}), "module is a dict with the keys weights; expected a to", False),
    "likelihood": (lambda: user(likelihood="mse"), "likelihood is 'mse'; expected one of bernoulli, gaussian,", False),
    "no fixed variance": (
        lambda: user(variance=None),
        r"likelihood gaussian_fixed needs its variance\. For a model trained with the mean squared error",
        False,
    ),
    "variance of another": (
        lambda: user(likelihood="none", variance=1.0),
        "variance belongs to gaussian_fixed and to no other likelihood, got 1.0 for none",
        False,
    ),
    "outputs of another": (
        lambda: user(outputs="logits"),
        "outputs is 'logits' and the likelihood gaussian_fixed; expected logits or probabilities, for bernoulli only",
        False,
    ),
    "range": (
        lambda: user(data_range=(1, 0)),
        r"data_range is \(1, 0\); expected two finite, ascending",
        False,
    ),
    "no range": (lambda: user(data_range=None), "data_range is None; expected two finite, ascending", False),
    "Bernoulli's range": (
        lambda: user(likelihood="bernoulli", data_range=(-1, 1)),
        r"a Bernoulli likelihood needs data_range \(0, 1\), got \(-1, 1\)",
        False,
    ),
    "outside": (
        lambda: user(example=zoo.pictures(2, SHAPE) * 255),
        r"example has values from .* to 2.*, outside of data_range \(0, 1\)\. Give the range",
        False,
    ),
    "integers": (
        lambda: user(example=torch.zeros(2, *SHAPE, dtype=torch.uint8)),
        "example has the type uint8; expected floating-point values, scaled onto data_range",
        False,
    ),
    "infinite": (lambda: user(example=np.full((2, *SHAPE), np.inf)), "example has values that are not finite", False),
    "no batch": (
        lambda: user(example=np.zeros(16)),
        r"example has shape \(16,\); expected \(B, \*data\) with one example or more\. Add the batch axis to a",
        False,
    ),
    "no array": (lambda: user(example=[1.0]), "example is a list of 1 .*; expected a tensor or an array of", False),
    "held out": (
        lambda: user(held_out=np.zeros((5, 16))),
        r"held_out has shape \(5, 16\); expected rows of shape \(1, 4, 4\), as in example",
        False,
    ),
    "multiple": (lambda: spatial(multiple_of=0), "multiple_of is 0; expected a whole number of 1 or more", False),
    "flat latents": (lambda: user(multiple_of=2), r"multiple_of needs pictures .* the latents' \(3,\)", False),
    "no multiple": (lambda: spatial(multiple_of=5), r"height and width \(8, 12\), which are no multiples of 5", False),
    "too small a multiple": (
        lambda: spatial(multiple_of=1),
        r"latents of \(4, 6\) for pictures of \(8, 12\) .* multiples of 1: the model divides by 2 and 2, of which",
        False,
    ),
    "latents that stay": (
        lambda: spatial(4, example=zoo.pictures(1, (1, 8, 8))),
        r"multiple_of=4, and for pictures \(1, 12, 16\) the module gave latents \(2, 4, 4\) and reconstructions "
        r"\(1, 8, 8\); expected \(2, 6, 8\) and \(1, 12, 16\)",
        False,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_sources(name: str) -> None:
    source, words, adapter = REFUSED[name]
    with pytest.raises(InputError, match=f"^export: (?s:.)*{words}") as raised:
        module.resolve(source())
    assert ("class Adapted(torch.nn.Module):" in str(raised.value)) == adapter
    if adapter:
        assert raised.match(ADVICE)


def test_positive_log_variances_that_may_well_be() -> None:
    """Of few values, in a wide range, or called so by the module."""
    module.resolve(user(lambda m, v: (m, v.exp())))
    module.resolve(user("pair", lambda m, v: (m, v.exp()), "gaussian", data_range=(-100, 100)))
    module.resolve(user(lambda m, v: {"mean": m, "logvar": v.exp()}, example=zoo.pictures(4, SHAPE)))


def test_an_undecided_decoder_is_refused_when_it_is_called() -> None:
    with pytest.raises(InputError, match="can read as logits or as probabilities"):
        Adapter(User(), "bernoulli").decode(torch.zeros(1, 3))


def test_branches_on_values(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"could not trace the encoder.*Control flow that depends on values"):
        export_trained(module.resolve(user(module=zoo.fill(Branching()))), tmp_path / "b")


def trace_decoder(source: vae_export.Source) -> None:
    trained = module.resolve(source)
    decoder = Decoder(trained.module, trained.model).eval()
    tracing.trace("decoder", decoder, trained.model.latent_shape(trained.sizes()), trained.model)


@pytest.mark.parametrize("name", size_dependent.KINDS)
def test_what_depends_on_the_size(tmp_path: Path, name: str) -> None:
    """Each is right at sizes that were not traced, or refused with the dimension and what to write instead."""
    function, refused = size_dependent.KINDS[name]
    decoding = zoo.fill(size_dependent.Decoding(function))
    height, width = (2 * size for size in size_dependent.TRACED)
    source = user(module=decoding, example=zoo.pictures(1, (1, height, width)), multiple_of=8)
    if refused is not None:
        with pytest.raises(InputError, match=f"^export: (?s:.)*{refused}"):
            trace_decoder(source)
        return
    export_trained(module.resolve(source), tmp_path / "b", rows=ROWS)
    with vae_export.load(tmp_path / "b") as vae, torch.no_grad():
        for size in ((8, 8), (24, 40), (64, 72)):
            z = zoo.pictures(2, (2, size[0] // 2, size[1] // 2))
            np.testing.assert_allclose(vae.decode(z), decoding.decode(torch.from_numpy(z)), rtol=1e-4, atol=1e-5)


class Reflecting(Spatial):
    """Padding by reflection needs more pixels than it adds."""

    def encode(self, x: Tensor) -> Any:
        padded = nn.functional.pad(x, (0, 0, 9, 9), mode="reflect")
        return super().encode(padded[:, :, 9:-9])


def test_the_smallest_size_is_found() -> None:
    model = module.resolve(
        user(module=zoo.fill(Reflecting()), example=zoo.pictures(1, (1, 24, 24)), multiple_of=4)
    ).model
    assert {name: dim.min for name, dim in model.data.named().items()} == {"height": 12, "width": 4}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_old_norms_of_weights(tmp_path: Path) -> None:
    """They keep the weight that they computed, after a training step with the graph of its gradients."""
    normed = zoo.fill(User())
    nn.utils.weight_norm(normed.into)
    nn.utils.spectral_norm(normed.back)
    x = torch.from_numpy(zoo.pictures(2, SHAPE))
    normed.decode(normed.encode(x)[0]).sum().backward()
    trained = module.resolve(user(module=normed))
    normed.eval()
    with torch.no_grad():
        torch.testing.assert_close(trained.module.encode(x), normed.encode(x))
        torch.testing.assert_close(trained.module.decode(x[:, 0, 0, :3])[0], normed.decode(x[:, 0, 0, :3]))
    assert export_trained(trained, tmp_path / "b", rows=ROWS).passed


FACTORIES = """
import torch
import test_modules_user

def source():
    return test_modules_user.user()

def bare():
    return test_modules_user.zoo.fill(test_modules_user.User())

def fails():
    raise RuntimeError("weights.pt is not there")

def number():
    return 3

thing = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a module of factories, one that does not import, and this file under a name of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    monkeypatch.setitem(sys.modules, "test_modules_user", sys.modules[__name__])
    for name in ("factories", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_factories(factories: Path) -> None:
    before = list(sys.path)
    assert module.from_factory("factories:source").likelihood == "gaussian_fixed"
    source = module.from_factory(
        "factories:bare", shape=SHAPE, likelihood="gaussian_fixed", data_range=(-1, 3), variance=0.5
    )
    assert sys.path == before
    trained = module.resolve(source)
    assert trained.example_shape == SHAPE
    assert trained.model.likelihood.variance == 0.5
    assert trained.model.data.range == (-1.0, 3.0)
    assert trained.held_out is None  # a made-up example is no data


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        (
            "models.py",
            {},
            r"'models\.py' names no function; expected package\.module:function, such as models\.vae:make",
        ),
        ("a/b:c", {}, r"'a/b:c' names no function"),
        ("missing:make", {}, r"missing could not be imported: .* There is no such module in .* or among what is inst"),
        ("broken:make", {}, r"broken could not be imported: ModuleNotFoundError: No module named 'nothing_.*name'\.$"),
        ("factories:make", {}, "the module factories has no 'make'; expected a function that makes the model"),
        ("factories:thing", {}, "factories:thing is a int; expected a function that makes the model"),
        ("factories:fails", {}, "factories:fails failed: RuntimeError: weights.pt is not there. It is called without"),
        ("factories:number", {}, r"returned a int; expected a vae_export\.Source or torch\.nn\.Module"),
        ("factories:bare", {"shape": SHAPE}, "a User alone; likelihood, data_range must be given with it, or let it"),
        ("factories:source", {"shape": SHAPE}, "returned a Source, which has shape itself. Omit it, or return"),
        (
            "factories:bare",
            {"shape": (0, 4), "likelihood": "none", "data_range": (0, 1)},
            r"shape must be positive whole numbers such as \(3, 32, 32\), got \(0, 4\)",
        ),
    ],
)
def test_factories_that_are_refused(factories: Path, spec: str, options: dict[str, Any], words: str) -> None:
    before = list(sys.path)
    with pytest.raises(InputError, match=words):
        module.from_factory(spec, **options)
    assert sys.path == before


def test_that_a_product_of_sizes_is_not_one_is_ignored() -> None:
    """As for a single size: PyTorch guards memory layouts so, and the certificate covers the smallest size."""
    height, width = sympy.symbols("height width", integer=True, positive=True)
    symbols = {height: "height", width: "width"}
    allowed = [{"height": 4, "width": 4}, {"height": 64, "width": 32}]
    product = sympy.Max(1, height // 4) * sympy.Max(1, width // 4)
    assert sizes.first_broken([product > 1], symbols, allowed) is None
    broken = sizes.first_broken([product > 2], symbols, allowed)
    assert broken is not None
    assert broken[1] == {"height": 4, "width": 4}


def test_a_limit_of_the_whole_batch_is_ignored() -> None:
    """PyTorch chooses implementations by how much there is to do: Stable Diffusion's attention has such a limit."""
    batch, height, width = sympy.symbols("batch height width", integer=True, positive=True)
    symbols = {batch: "batch", height: "height", width: "width"}
    allowed = [{"batch": 64, "height": 65, "width": 65}]
    assert sizes.first_broken([batch * height * width <= 262144], symbols, allowed) is None
    assert sizes.first_broken([height * width <= 4096], symbols, allowed) is not None  # a size's own
    assert sizes.first_broken([sympy.Eq(batch * height, 8)], symbols, allowed) is not None  # a baked number
