"""The trainer against what is known exactly: a linear VAE is probabilistic PCA, and its evidence can be computed."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import closed_forms
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vae_export.numerics import noise
from vae_export.trainers import checkpoint, datasets, evaluate
from vae_export.trainers.config import DataConfig, TrainConfig, model_config, train_config
from vae_export.trainers.fit import fit
from vae_export.trainers.models import VAEModel, build
from vae_export.trainers.objective import Objective, draw

DIGITS = (1, 8, 8)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`--model linear`, in a tenth of the default's steps, which are larger: `make trainer` measures the default."""
    path = tmp_path_factory.mktemp("linear") / "run"
    fast = {"epochs": 300, "batch_size": 256, "learning_rate": 5e-2, "ema": 0.99}
    fit(path, model_config("linear", data_shape=DIGITS), train_config("linear", device="cpu", **fast))
    return path


@pytest.fixture(scope="module")
def split() -> tuple[np.ndarray, np.ndarray]:
    dataset = datasets.load(DataConfig(), 0)
    return tuple(part.read(np.arange(len(part))) for part in (dataset.train, dataset.test))  # type: ignore[return-value]


def test_the_linear_model_becomes_probabilistic_pca(linear: Path, split: tuple[np.ndarray, np.ndarray]) -> None:
    train, test = split
    config, model = checkpoint.read(linear)
    best = closed_forms.ppca_log_likelihood(train, train, 10).mean()
    gap = best - closed_forms.exact_elbo(model, train).mean()
    assert 0 < gap < 0.1
    assert closed_forms.exact_elbo(model, test).mean() < closed_forms.exact_evidence(model, test).mean()
    assert config.result
    assert config.result.elbo == pytest.approx(closed_forms.exact_elbo(model, test).mean(), abs=0.5)  # one draw each


def test_pca_against_scipy(split: tuple[np.ndarray, np.ndarray]) -> None:
    """And no other covariance of its kind is likelier than the one of maximum likelihood."""
    train, test = (part.reshape(len(part), -1).astype(np.float64) for part in split)
    values, vectors = np.linalg.eigh(np.cov(train.T, bias=True))
    noise_variance = values[:-10].mean()

    def covariance(variance: float) -> np.ndarray:
        principal = vectors[:, -10:]
        return (principal * (values[-10:] - variance)) @ principal.T + variance * np.eye(64)

    expected = stats.multivariate_normal(train.mean(axis=0), covariance(noise_variance)).logpdf(test)
    np.testing.assert_allclose(closed_forms.ppca_log_likelihood(train, test, 10), expected, rtol=1e-9)
    best = closed_forms.ppca_log_likelihood(train, train, 10).mean()
    for factor in (0.8, 1.25):
        other = stats.multivariate_normal(train.mean(axis=0), covariance(noise_variance * factor))
        assert other.logpdf(train).mean() < best


def test_importance_weighted_bound_against_the_exact_evidence(
    linear: Path, split: tuple[np.ndarray, np.ndarray]
) -> None:
    """With an encoder that is twice too wide, the gap closes as K rises, and the bound stays one."""
    _, model = checkpoint.read(linear)
    model = model.double()
    closed_forms.widen(model, 2.0)
    x = split[1].astype(np.float64)
    exact = closed_forms.exact_evidence(model, x)
    gaps = []
    for k in (1, 10, 100, 1000):
        config = TrainConfig(importance_draws=k)
        bound = evaluate.importance_weighted(model, torch.from_numpy(x), config, 0).numpy()
        gaps.append(exact - bound)
        assert gaps[-1].mean() > -3 * gaps[-1].std() / math.sqrt(len(x))
    means = [gap.mean() for gap in gaps]
    assert means == sorted(means, reverse=True)
    assert means[0] > 1
    assert means[-1] < 0.02


def a_linear_model(seed: int) -> VAEModel:
    """With random weights in float64, and an encoder that fits them badly."""
    model = build(model_config("linear", data_shape=(1, 2, 3), latent=2)).double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            drawn = noise.normals(seed, noise.VERIFIER, index, 1, parameter.numel())[0]
            parameter.copy_(0.7 * torch.from_numpy(drawn).double().reshape(parameter.shape))
    return model.eval()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000))
def test_laws_of_the_bounds(seed: int) -> None:
    """KL ≥ 0; ELBO ≤ evidence; the importance-weighted bound rises with K."""
    model = a_linear_model(seed)
    x = noise.normals(seed, noise.VERIFIER, 100, 4, 6).astype(np.float64).reshape(4, 1, 2, 3)
    exact = closed_forms.exact_evidence(model, x)
    elbo = closed_forms.exact_elbo(model, x)
    assert (elbo <= exact + 1e-9).all()
    tensor = torch.from_numpy(x)
    eps = torch.from_numpy(noise.normals(seed, noise.VERIFIER, 200, 512 * 4, 2)).double().reshape(512, 4, 2)
    with torch.no_grad():
        drawn = draw(model, model.log_prob(), tensor, eps)
    assert (drawn.kl_by_dimension() >= 0).all()
    weights = drawn.reconstruction() + drawn.log_ratio()  # (512, 4)
    # Within each example the mean over disjoint groups of k draws rises with k, exactly: Jensen.
    bounds = []
    for k in (1, 2, 8, 64, 512):
        groups = torch.logsumexp(weights.reshape(-1, k, 4), 1) - math.log(k)
        bounds.append(groups.mean(0).numpy())
    for low, high in itertools.pairwise(bounds):
        assert (low <= high + 1e-12).all()
    sampled = weights.mean(0).numpy()
    error = weights.std(0).numpy() / math.sqrt(512)
    assert (np.abs(sampled - elbo) < 6 * error + 1e-9).all()


@pytest.mark.parametrize("kind", ["elbo", "elbo_monte_carlo", "importance_weighted"])
def test_objectives_agree_with_each_other(kind: str) -> None:
    """At one draw, the Monte-Carlo ELBO is the importance-weighted bound; all have the same expectation."""
    model = a_linear_model(3)
    x = torch.from_numpy(noise.normals(0, noise.VERIFIER, 100, 5, 6)).double().reshape(5, 1, 2, 3)
    eps = torch.from_numpy(noise.normals(0, noise.VERIFIER, 300, 5, 2)).double().reshape(1, 5, 2)
    with torch.no_grad():
        bound = Objective(model, kind)(x, eps)
        three = draw(model, model.log_prob(), x, eps)
    assert bound.kl_by_dimension.shape == (5, 2)
    torch.testing.assert_close(bound.reconstruction, three.log_likelihood)
    if kind == "elbo":
        torch.testing.assert_close(bound.bound, bound.reconstruction - three.kl_by_dimension().sum(1))
    else:
        torch.testing.assert_close(bound.bound, (three.reconstruction() + three.log_ratio())[0])


def test_the_tightest_bound_is_where_q_is_the_posterior() -> None:
    """With the exact posterior every weight is the evidence: the bound is tight at any K, without any noise."""
    model = a_linear_model(5)
    layer, sigma = model.decoder[0], model.likelihood().variance
    assert sigma
    with torch.no_grad():  # orthogonal columns make the exact posterior a diagonal one (Lucas et al. 2019)
        layer.weight.copy_(torch.linalg.qr(layer.weight)[0] * torch.tensor([1.5, 0.6]).double())
        inverse = torch.linalg.inv(layer.weight.T @ layer.weight + sigma * torch.eye(2).double())
        model.encoder[1].weight.copy_(inverse @ layer.weight.T)
        model.encoder[1].bias.copy_(-inverse @ layer.weight.T @ layer.bias)
        model.encoder[2].logvar.copy_(torch.log(sigma * torch.diagonal(inverse)))
    x = noise.normals(1, noise.VERIFIER, 0, 7, 6).astype(np.float64).reshape(7, 1, 2, 3)
    exact = closed_forms.exact_evidence(model, x)
    np.testing.assert_allclose(closed_forms.exact_elbo(model, x), exact, rtol=1e-9)
    for k in (1, 3):
        config = msgspec.structs.replace(TrainConfig(), importance_draws=k)
        bound = evaluate.importance_weighted(model, torch.from_numpy(x), config, 0)
        np.testing.assert_allclose(bound.numpy(), exact, rtol=1e-9)
