"""The models' shapes and parameters, and the bound that training sees, for each model and likelihood."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import vae_export
from vae_export.contract.model import DECODER_OUTPUTS
from vae_export.numerics import likelihoods, noise
from vae_export.trainers.config import ModelConfig, model_config
from vae_export.trainers.models import VAEModel, build
from vae_export.trainers.objective import Bound, Objective, elbo, training_loss

DIGITS = (1, 8, 8)
LIKELIHOODS = ("bernoulli", "gaussian", "gaussian_fixed", "discretized_logistic")
BODIES = {
    "linear": {"widths": ()},
    "mlp": {"widths": (6, 5)},
    "conv": {"widths": (4, 8)},
    "resnet": {"widths": (4, 8), "blocks": 2, "attention": True},
}


@pytest.mark.parametrize(("name", "likelihood"), [*itertools.product(BODIES, (*LIKELIHOODS, "none"))])
def test_shapes(name: str, likelihood: str) -> None:
    if name == "linear" and likelihood not in ("gaussian_fixed", "none"):
        pytest.skip("a linear model is probabilistic PCA")
    for shape in (DIGITS, (3, 12, 20), (2, 4, 4)):
        posterior = "deterministic" if likelihood == "none" else "diagonal_gaussian"
        config = ModelConfig(
            model=name, data_shape=shape, likelihood=likelihood, posterior=posterior, latent=7, **BODIES[name]
        )
        model = build(config)
        latent = (7, shape[1] // 2, shape[2] // 2) if name == "resnet" else (7,)
        assert config.latent_shape == latent
        encoded = model.encode(torch.rand(5, *shape))
        assert [t.shape for t in encoded] == [(5, *latent)] * (1 if likelihood == "none" else 2)
        decoded = model.decode(encoded[0])
        assert [t.shape for t in decoded] == [(5, *shape)] * len(DECODER_OUTPUTS[likelihood])
        if likelihood != "none":
            eps = torch.randn(3, 5, *latent)
            bound = Objective(model, "elbo")(torch.rand(5, *shape), eps)
            assert [t.shape for t in bound] == [(5,), (5,), (5,), (5, math.prod(latent))]
            bound.bound.sum().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())


def test_defaults_depend_on_the_model() -> None:
    for name in BODIES:
        model_config(name, data_shape=DIGITS).check()
        model_config(name, data_shape=DIGITS, posterior="deterministic").check()
    assert model_config("linear", data_shape=DIGITS).likelihood == "gaussian_fixed"
    assert model_config("mlp", data_shape=DIGITS, latent=3).latent == 3


def test_log_variances_are_clamped_as_recorded() -> None:
    for likelihood, clamp in (("gaussian", "sample_logvar_clamp"), ("discretized_logistic", "log_scale_clamp")):
        config = ModelConfig(model="mlp", data_shape=DIGITS, likelihood=likelihood, widths=(4,))
        model = build(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1e4)
            _, logvar = model.encode(torch.ones(8, *DIGITS))
            *_, spread = model.decode(torch.ones(8, 16) * torch.arange(8)[:, None])
        assert (logvar.min().item(), logvar.max().item()) == config.logvar_clamp
        assert (spread.min().item(), spread.max().item()) == getattr(config, clamp)


def test_a_learned_variance_is_recorded_and_floored() -> None:
    config = ModelConfig(model="mlp", data_shape=DIGITS, likelihood="gaussian_fixed", widths=(4,))
    model = build(config)
    for value, expected in ((-2.0, math.exp(-2)), (-50.0, math.exp(-13.5)), (3.0, math.exp(3))):
        with torch.no_grad():
            model.noise_logvar.fill_(value)
        assert model.likelihood().variance == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        model.noise_logvar.fill_(-20.0)
    x = torch.rand(2, *DIGITS)
    model.log_prob()(x, (x + 1,)).sum().backward()
    assert model.noise_logvar.grad is not None
    assert model.noise_logvar.grad > 0  # from below the floor there is a way back
    fixed = build(ModelConfig(model="mlp", data_shape=DIGITS, likelihood="gaussian_fixed", widths=(4,), variance=0.3))
    assert fixed.likelihood().variance == 0.3
    assert not [name for name, _ in fixed.named_parameters() if "noise" in name]


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
@settings(deadline=None, max_examples=60)
@given(location=st.floats(-1.5, 1.5), log_scale=st.floats(-6.5, 1.5))
def test_the_discretized_logistics_mean(value_range: tuple[float, float], location: float, log_scale: float) -> None:
    """`sample` is the mean over the 256 levels, to a tenth of a level, also where the tails are cut."""
    low, high = value_range
    config = ModelConfig(
        model="mlp", data_shape=(1, 1, 1), likelihood="discretized_logistic", widths=(1,), data_range=value_range
    )
    model = build(config)
    model.decoder = torch.nn.Identity()
    sample, *_ = model.decode(torch.tensor([location, log_scale]).reshape(1, 2, 1, 1))
    outputs = {"location": np.full((256, 1, 1, 1), location), "log_scale": np.full((256, 1, 1, 1), log_scale)}
    levels = np.linspace(low, high, 256).reshape(256, 1, 1, 1)
    model_record = zoo.trainer_model("mlp", "discretized_logistic", (1, 1, 1), data_range=value_range).model
    mass = np.exp(likelihoods.of(model_record).log_prob_terms(levels, outputs))
    assert mass.sum() == pytest.approx(1.0)
    assert low - 1e-6 <= sample.item() <= high + 1e-6
    # Scales far below a level's width are rounded to one level, the mean is not: half a level at most.
    near = 0.1 if math.exp(log_scale) > 0.3 * (high - low) / 255 else 0.51
    assert sample.item() == pytest.approx((mass * levels).sum(), abs=near * (high - low) / 255)


EXPORTED = {
    "bernoulli": "conv-bernoulli",
    "gaussian": "conv-gaussian",
    "gaussian_fixed": "linear",
    "discretized_logistic": "resnet",
}


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_numpy_and_torch_agree_on_every_likelihood(likelihood: str, member: Callable[[str], Any]) -> None:
    """One model, exported: the runtime's ELBO is PyTorch's, with the same noise."""
    source, bundle = member(EXPORTED[likelihood]).source, member(EXPORTED[likelihood]).bundle
    model = source.module
    assert isinstance(model, VAEModel)
    assert model.config.likelihood == likelihood
    low, high = model.config.data_range
    x = (low + (high - low) * zoo.pictures(6, model.config.data_shape)).astype(np.float32)
    latent = model.config.latent_shape
    eps = noise.normals(9, noise.POSTERIOR, 0, 6, math.prod(latent)).reshape(6, *latent)
    with torch.no_grad():
        expected = elbo(model, model.log_prob(), torch.from_numpy(x), torch.from_numpy(eps))
    with vae_export.load(bundle) as vae:
        measured = vae.elbo(x, seed=9)
    np.testing.assert_allclose(measured.reconstruction, expected.reconstruction.numpy(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(measured.kl, expected.kl.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("likelihood", ["gaussian", "gaussian_fixed", "discretized_logistic"])
def test_limits_follow_the_datas_range(likelihood: str) -> None:
    """The same model of the same data in another unit: every limit moves with it."""
    of = {
        width: ModelConfig(model="mlp", data_shape=DIGITS, likelihood=likelihood, widths=(4,), data_range=(0.0, width))
        for width in (1.0, 255.0)
    }
    shift = math.log(255)
    assert np.subtract(of[255.0].sample_logvar_limits, of[1.0].sample_logvar_limits) == pytest.approx([2 * shift] * 2)
    assert np.subtract(of[255.0].log_scale_limits, of[1.0].log_scale_limits) == pytest.approx([shift] * 2)
    record = build(of[255.0]).likelihood()
    if likelihood == "gaussian":
        assert record.logvar_clamp == of[255.0].sample_logvar_limits
    if likelihood == "gaussian_fixed":
        assert record.variance == pytest.approx(255.0**2, rel=1e-4)
    if likelihood == "discretized_logistic":
        assert record.log_scale_clamp == of[255.0].log_scale_limits


def a_bound() -> Bound:
    kl = torch.tensor([[0.1, 2.0], [0.3, 1.0]])
    reconstruction = torch.tensor([-5.0, -7.0])
    return Bound(reconstruction - kl.sum(1), reconstruction, kl.sum(1), kl)


def test_training_loss() -> None:
    bound = a_bound()
    torch.testing.assert_close(training_loss(bound, "elbo", 1.0, 0.0, None), -bound.bound)
    torch.testing.assert_close(training_loss(bound, "elbo", 3.0, 0.0, None), 3 * bound.kl - bound.reconstruction)
    # The first dimension has 0.2 nats on average: below 0.5 it costs 0.5 and has no gradient.
    bound.kl_by_dimension.requires_grad_()
    loss = training_loss(bound, "elbo", 1.0, 0.5, torch.tensor([0.2, 1.5]))
    torch.testing.assert_close(loss, torch.tensor([0.5 + 2.0 + 5.0, 0.5 + 1.0 + 7.0]))
    loss.sum().backward()
    assert bound.kl_by_dimension.grad is not None
    assert bound.kl_by_dimension.grad.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    for kind in ("importance_weighted", "autoencoder"):
        torch.testing.assert_close(training_loss(bound, kind, 1.0, 0.0, None), -bound.bound)


def test_an_autoencoders_bound_is_minus_the_squared_error() -> None:
    config = ModelConfig(model="mlp", data_shape=DIGITS, posterior="deterministic", likelihood="none", widths=(4,))
    model = build(config)
    x = torch.rand(3, *DIGITS)
    bound = Objective(model, "autoencoder")(x, torch.zeros(1, 3, 16))
    expected = (model.decode(*model.encode(x))[0] - x).square().sum((1, 2, 3))
    torch.testing.assert_close(bound.bound, -expected)
    assert bound.kl.tolist() == [0.0] * 3
