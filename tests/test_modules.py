"""A user's own module: what is recognized, and what is said of what is not."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor, nn

import vae_export
from vae_export import sources
from vae_export.errors import InputError
from vae_export.manifest import LatentDim, SizeDim
from vae_export.sources import reference
from vae_export.sources.adapter import Adapter

Normal, Bernoulli = torch.distributions.Normal, torch.distributions.Bernoulli
ADAPTER = r"Write an adapter, and export that:\n\nclass Adapted\(torch\.nn\.Module\):"


class Base(nn.Module):
    """Vectors of 6 in [0, 1], latents of 3: what the members below wrap in their own ways."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back = nn.Linear(6, 6), nn.Linear(3, 12)
        zoo.fill(self)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.into(x).chunk(2, 1)
        return mean, logvar

    def parameters_of(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.back(torch.tanh(z)).chunk(2, 1)
        return mean, logvar.clamp(-4.0, 4.0)

    def encode(self, x: Tensor) -> Any:
        return self.posterior(x)

    def decode(self, z: Tensor) -> Any:
        return self.parameters_of(z)[0]


def made(encode: Any = None, decode: Any = None) -> nn.Module:
    """`Base` with other methods."""
    methods = {name: method for name, method in (("encode", encode), ("decode", decode)) if method}
    return type("Users", (Base,), methods)()


class Output(OrderedDict):
    """As pythae documents its ModelOutput: an ordered mapping whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Pythae(nn.Module):
    """A model of pythae by its documentation: `encoder` and `decoder` return a ModelOutput each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _Part(True), _Part(False)
        zoo.fill(self)

    def forward(self, inputs: Any) -> Any:
        raise AssertionError("it samples")


class _Part(nn.Module):
    def __init__(self, encoder: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.layer = nn.Linear(6, 6) if encoder else nn.Linear(3, 6)

    def forward(self, value: Tensor) -> Output:
        out = self.layer(value)
        if not self.encoder:
            return Output(reconstruction=torch.sigmoid(out))
        return Output(embedding=out[:, :3], log_covariance=out[:, 3:])


class Vanilla(nn.Module):
    """As AntixK/PyTorch-VAE documents its models: `encode` gives a list of two, `decode` a picture after a Tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU())
        self.fc_mu, self.fc_var = nn.Linear(64, 5), nn.Linear(64, 5)
        self.decoder_input = nn.Linear(5, 64)
        self.final_layer = nn.Sequential(
            nn.ConvTranspose2d(4, 4, 3, 2, 1, 1), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Conv2d(4, 3, 3, 1, 1), nn.Tanh()
        )  # fmt: skip
        zoo.fill(self)

    def encode(self, input: Tensor) -> list[Tensor]:
        flat = torch.flatten(self.encoder(input), start_dim=1)
        return [self.fc_mu(flat), self.fc_var(flat)]

    def decode(self, z: Tensor) -> Tensor:
        return self.final_layer(self.decoder_input(z).view(-1, 4, 4, 4))

    def forward(self, input: Tensor) -> list[Tensor]:
        raise AssertionError("it samples")


def x(shape: tuple[int, ...] = (6,), batch: int = 3) -> np.ndarray:
    return zoo.pictures(batch, shape)


def diffusers_like(self: Any, value: Tensor) -> Any:
    mean, logvar = self.posterior(value)
    inside = SimpleNamespace(
        mean=mean, logvar=logvar, std=torch.exp(0.5 * logvar), var=torch.exp(logvar), sample=lambda: mean
    )
    return SimpleNamespace(latent_dist=inside)


def distribution(self: Any, value: Tensor) -> Any:
    mean, logvar = self.posterior(value)
    return Normal(mean, torch.exp(0.5 * logvar))


def independent(self: Any, value: Tensor) -> Any:
    return torch.distributions.Independent(distribution(self, value), 1)


def mapping(*names: str) -> Callable[[Any, Tensor], dict[str, Tensor]]:
    def encode(self: Any, value: Tensor) -> dict[str, Tensor]:
        mean, logvar = self.posterior(value)
        change = {"std": torch.exp(0.5 * logvar), "variance": torch.exp(logvar)}
        return {names[0]: mean, names[1]: change.get(names[1], logvar), "extra": mean}

    return encode


ENCODERS = {
    "pair": None,
    "list": lambda self, value: list(self.posterior(value)),
    "normal": distribution,
    "independent": independent,
    "diffusers": diffusers_like,
    "mu and log_var": mapping("mu", "log_var"),
    "mean and variance": mapping("mean", "variance"),
    "loc and std": mapping("loc", "std"),
    "object": lambda self, value: SimpleNamespace(mu=self.posterior(value)[0], log_var=self.posterior(value)[1]),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders(kind: str) -> None:
    """All say the same posterior."""
    module = made(ENCODERS[kind])
    value = torch.from_numpy(x())
    got = Adapter(module, "none", None).encode(value)
    for tensor, expected in zip(got, module.posterior(value), strict=True):
        torch.testing.assert_close(tensor, expected)


DECODERS = {
    "logits": ("bernoulli", "logits", lambda self, z: self.parameters_of(z)[0]),
    "mean": ("bernoulli", "mean", lambda self, z: torch.sigmoid(self.parameters_of(z)[0])),
    "named logits": ("bernoulli", None, lambda self, z: {"logits": self.parameters_of(z)[0]}),
    "named mean": ("bernoulli", "mean", lambda self, z: {"reconstruction": torch.sigmoid(self.parameters_of(z)[0])}),
    "bernoulli": ("bernoulli", None, lambda self, z: Bernoulli(logits=self.parameters_of(z)[0])),
    "probs": ("bernoulli", None, lambda self, z: Bernoulli(torch.sigmoid(self.parameters_of(z)[0]))),
    "pair": ("gaussian", None, lambda self, z: self.parameters_of(z)),
    "normal": (
        "gaussian", None, lambda self, z: Normal(self.parameters_of(z)[0], torch.exp(0.5 * self.parameters_of(z)[1]))
    ),
    "output": ("none", None, lambda self, z: SimpleNamespace(sample=self.parameters_of(z)[0])),
}  # fmt: skip


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders(kind: str) -> None:
    likelihood, outputs, decode = DECODERS[kind]
    module = made(decode=decode)
    z = torch.linspace(-1, 1, 6).reshape(2, 3)
    got = Adapter(module, likelihood, outputs).decode(z)
    first, second = module.parameters_of(z)
    expected = {"bernoulli": (torch.sigmoid(first), first), "gaussian": (first, second), "none": (first,)}[likelihood]
    for tensor, right in zip(got, expected, strict=True):
        torch.testing.assert_close(tensor, right, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_ROWS", 12)


EXPORTS: dict[str, Callable[[], vae_export.Source]] = {
    "distribution": lambda: vae_export.Source(
        made(independent, DECODERS["normal"][2]), x(), "gaussian", (0, 1), held_out=x(batch=20)
    ),
    "dict": lambda: vae_export.Source(made(mapping("mu", "std")), x(), "gaussian_fixed", (0, 1), variance=0.1),
    "pythae": lambda: vae_export.Source(Pythae(), x(), "bernoulli", (0, 1), outputs="mean"),
    "PyTorch-VAE": lambda: vae_export.Source(Vanilla(), x((3, 8, 8)) * 2 - 1, "gaussian_fixed", (-1, 1), variance=1.0),
    "deterministic": lambda: vae_export.Source(
        made(lambda self, value: self.posterior(value)[0]), torch.from_numpy(x()), "none", (0, 1)
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exported(name: str, tmp_path: Path) -> None:
    """Its certificate holds, and what runs is what the module gives."""
    source = EXPORTS[name]()
    module = copy.deepcopy(source.module)
    assert vae_export.export(source, tmp_path / "b").passed
    assert source.module.training == module.training  # as it was
    manifest = vae_export.Bundle(tmp_path / "b").manifest
    assert manifest.origin.kind == "module"
    assert manifest.model.likelihood.kind == source.likelihood
    adapter = Adapter(module.eval(), source.likelihood, source.outputs)
    value = np.asarray(source.example)
    with torch.no_grad(), vae_export.load(tmp_path / "b") as vae:
        posterior = adapter.encode(torch.from_numpy(value))
        ours = vae.encode(value)
        np.testing.assert_allclose(ours.mean, posterior[0], rtol=1e-4, atol=1e-5)
        if len(posterior) == 2:
            np.testing.assert_allclose(ours.logvar, posterior[1], rtol=1e-4, atol=1e-5)
            assert np.isfinite(vae.elbo(value).elbo).all()
        np.testing.assert_allclose(vae.decode(ours.mean), adapter.decode(posterior[0])[0], rtol=1e-4, atol=1e-5)


def test_sizes(tmp_path: Path) -> None:
    """A convolutional module takes any multiple, and runs at other sizes than the example's."""
    module = zoo.fill(zoo.Spatial())
    example = x((3, 16, 24)) * 2 - 1
    certificate = vae_export.export(
        module, tmp_path / "b", example=example, likelihood="gaussian", data_range=(-1, 1), multiple_of=8
    )
    assert certificate.passed
    model = vae_export.Bundle(tmp_path / "b").manifest.model
    assert model.data.shape == (3, *(SizeDim(name=n, multiple_of=8, min=8) for n in ("height", "width")))
    assert model.latent.shape[1:] == tuple(LatentDim(name=n, divided_by=4) for n in ("height", "width"))
    other = x((3, 32, 8), 2) * 2 - 1
    with vae_export.load(tmp_path / "b") as vae, torch.no_grad():
        np.testing.assert_allclose(vae.encode(other).mean, module.encode(torch.from_numpy(other))[0], atol=1e-4)


def test_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text(
        "import torch, numpy, vae_export\n"
        "class V(torch.nn.Module):\n"
        "    def __init__(self): super().__init__(); self.a = torch.nn.Linear(4, 4); self.b = torch.nn.Linear(2, 4)\n"
        "    def encode(self, x): return self.a(x).chunk(2, 1)\n"
        "    def decode(self, z): return self.b(z)\n"
        "def bare(): return V()\n"
        "def whole(): return vae_export.Source(V(), numpy.full((1, 4), 0.5, numpy.float32), 'none', (0, 1))\n"
        "def wrong(): return 3\n"
        "def fails(): raise KeyError('weights')\n"
        "number = 3\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "needs.py").write_text("import is_not_there\n")
    monkeypatch.chdir(tmp_path)
    assert sources.resolve("theirs:whole").model.likelihood.kind == "none"
    bare = {"shape": (4,), "likelihood": "none", "data_range": (0.0, 1.0)}
    assert sources.resolve("theirs:bare", **bare).example_shape == (4,)
    for name, said, match in (
        ("theirs:bare", {"shape": (4,)}, "returns a bare module. Say what it is of: --likelihood, --range"),
        ("theirs:whole", bare, "returns a Source, which says everything itself. Drop shape, likelihood, data_range"),
        ("theirs:wrong", {}, "returns a int; expected a vae_export.Source or a torch.nn.Module"),
        ("theirs:fails", {}, r"theirs:fails\(\) fails: KeyError: 'weights'"),
        ("theirs:number", {}, "theirs has a int called 'number'; expected a function"),
        ("theirs:nothing", {}, "theirs has nothing called 'nothing'"),
        ("nowhere:f", {}, "there is no module 'nowhere' in the current folder or installed"),
        ("broken:f", {}, "importing broken fails: ZeroDivisionError"),
        ("needs:f", {}, "importing needs fails: No module named 'is_not_there'"),
    ):
        with pytest.raises(InputError, match=match):
            sources.resolve(name, **said)


class Branches(Base):
    def encode(self, value: Tensor) -> Any:
        mean, logvar = self.posterior(value)
        return (mean, logvar) if mean[0].sum() > 0 else (logvar, mean)


class Stubborn(Base):
    """Its dropout stays on."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if not hasattr(self, "drop"):
            self.drop = nn.Dropout(0.0)
        self.drop.training = True
        return self


class Unsteady(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)

    def encode(self, value: Tensor) -> Any:
        return self.posterior(self.norm(torch.cat([value, value + 1])[: len(value)] * torch.arange(1.0, 7.0)))


class Conditional(Base):
    def encode(self, value: Tensor, label: Tensor) -> Any:
        return self.posterior(value)


class NoMethods(nn.Module):
    pass


class Uncopied(Base):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("a lock")


def _sampled(self: Any, value: Tensor) -> Tensor:
    mean, logvar = self.posterior(value)
    return mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)


WRONG: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no methods": (NoMethods, {}, rf"NoMethods has neither methods encode and decode.*{ADAPTER}"),
    "not recognized": (
        lambda: made(lambda self, value: SimpleNamespace(code=value)), {},
        rf"encode returns a SimpleNamespace with code, which is not recognized. {ADAPTER}",
    ),
    "a mapping not recognized": (
        lambda: made(lambda self, value: {"z": value}), {}, "encode returns a dict with z, which is not recognized",
    ),
    "no tensors": (
        lambda: made(lambda self, value: (value, "logvar")), {}, "encode returns a tuple of Tensor, str, which is not",
    ),
    "ambiguous tuple": (
        lambda: made(lambda self, value: (value, *self.posterior(value))), {},
        rf"encode returns 3 tensors, and which of them.*{ADAPTER}",
    ),
    "ambiguous mean": (
        lambda: made(lambda self, value: {"mean": value, "mu": value}), {}, "a dict with mean and mu, and which",
    ),
    "ambiguous variance": (
        lambda: made(lambda self, value: {"mean": value, "logvar": value, "std": value}), {},
        "more than one of a log-variance, a deviation and a variance",
    ),
    "other posterior": (
        lambda: made(lambda self, value: torch.distributions.Laplace(value, value + 1)), {},
        "got a Laplace distribution; expected Normal.*not supported",
    ),
    "discrete": (
        lambda: made(lambda self, value: torch.distributions.Categorical(logits=value)), {},
        "got a Categorical distribution.*Discrete latents",
    ),
    "samples": (lambda: made(_sampled), {}, rf"encode gives other values when it is run again.*{ADAPTER}"),
    "samples in decode": (
        lambda: made(decode=lambda self, z: torch.nn.functional.dropout(self.parameters_of(z)[0], training=True)), {},
        "decode gives other values when it is run again: it draws random numbers",
    ),
    "training": (Stubborn, {}, "drop stay in training mode after eval"),
    "batch norm": (Unsteady, {}, "encode gives an example other values in another batch: batch norm"),
    "conditional": (Conditional, {}, "encode of Conditional needs more than one argument.*conditional VAEs are not"),
    "decode not recognized": (
        lambda: made(decode=lambda self, z: {"picture": z}), {}, "decode returns a dict with picture, which is not",
    ),
    "decode of no tensors": (lambda: made(decode=lambda self, z: [3]), {}, "decode returns a list of int, which"),
    "one Bernoulli tensor": (Base, {"likelihood": "bernoulli"}, "one tensor.*outputs='logits', or outputs='mean'"),
    "Bernoulli not recognized": (
        lambda: made(decode=lambda self, z: {"picture": z}), {"likelihood": "bernoulli"}, "a dict with picture, which",
    ),
    "too few outputs": (
        Base, {"likelihood": "gaussian"}, "decode gives 1 tensor; a gaussian likelihood needs sample, sample_logvar",
    ),
    "shapes of a posterior": (
        lambda: made(lambda self, value: (value[:, :3], value[:, :2])), {},
        r"a mean of shape \(3, 3\) and a log-variance of \(3, 2\)",
    ),
    "shape of a latent": (
        lambda: made(lambda self, value: value[:, :3, None]), {}, r"latents of shape \(3, 3, 1\) for a batch of 3",
    ),
    "shape of data": (
        lambda: made(decode=lambda self, z: z), {}, r"decode gives shape \(3, 3\) for data of shape \(3, 6\)",
    ),
    "no deviation": (
        lambda: made(lambda self, value: {"mean": value[:, :3], "std": -value[:, :3]}), {},
        "encode gives values that are not finite for the example",
    ),
    "cannot be copied": (Uncopied, {}, "Uncopied cannot be copied: RuntimeError: a lock"),
    "likelihood": (Base, {"likelihood": "poisson"}, "likelihood is 'poisson'; expected one of bernoulli, gaussian"),
    "outputs": (Base, {"outputs": "odds"}, "outputs is 'odds'; expected 'logits' or 'mean'"),
    "range": (Base, {"data_range": (1, 0)}, r"data_range is \(1, 0\); expected two finite, rising numbers"),
    "no range": (Base, {"data_range": 3}, "data_range is 3; expected two numbers such as"),
    "Bernoulli range": (
        lambda: made(decode=DECODERS["named logits"][2]), {"likelihood": "bernoulli", "data_range": (-1, 1)},
        r"a Bernoulli likelihood needs data in \[0, 1\]",
    ),
    "no variance": (Base, {"likelihood": "gaussian_fixed"}, "variance belongs to gaussian_fixed"),
    "example outside": (Base, {"example": x() + 1}, r"example has values from .*, outside of data_range \[0, 1\]"),
    "example's dtype": (Base, {"example": x().astype(np.float64)}, "example has dtype float64; expected float32"),
    "example of one": (Base, {"example": x()[0]}, r"example has shape \(6,\); expected a batch \(B, \*data\)"),
    "example's type": (Base, {"example": [0.5]}, "example is a list; expected a tensor or an array"),
    "example not finite": (Base, {"example": x() * np.nan}, "example has values that are not finite"),
    "multiple of vectors": (Base, {"multiple_of": 2}, r"multiple_of is for pictures \(C, H, W\)"),
    "multiple": (
        zoo.Spatial, {"example": x((3, 16, 24)), "multiple_of": 6, "likelihood": "gaussian"},
        r"multiple_of is 6, and the example \(3, 16, 24\) has latents \(4, 4, 6\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str) -> None:
    make, said, match = WRONG[case]
    described = {"example": x(), "likelihood": "none", "data_range": (0, 1)} | said
    module = make()
    state = torch.random.get_rng_state()
    with pytest.raises(InputError, match=f"(?s){match}"):
        sources.resolve(module, **described)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_control_flow_is_told_with_the_adapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"(?s)could not trace the encoder.*depends on values.*{ADAPTER}"):
        vae_export.export(Branches(), tmp_path / "b", example=x(), likelihood="none", data_range=(0, 1))


def test_what_is_not_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a module does not say likelihood, data_range\. Pass them: export\("):
        sources.resolve(Base(), example=x())
    with pytest.raises(InputError, match="got a int; expected a checkpoint's or a diffusers"):
        sources.resolve(3)
    with pytest.raises(InputError, match=r"a vae_export\.Source says everything itself; got likelihood"):
        sources.resolve(vae_export.Source(Base(), x(), "none", (0, 1)), likelihood="none")
    with pytest.raises(InputError, match="got a int for the module"):
        sources.resolve(vae_export.Source(3, x(), "none", (0, 1)))  # type: ignore[arg-type]
