"""The ELBO's parts against closed forms, sampling, and PyTorch's independent definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vae_export.contract.model import Data, Latent, Likelihood, Model, Posterior
from vae_export.numerics import elbo, likelihoods, noise
from vae_export.trainers.objective import Elbo, log_prob_of
from vae_export.trainers.objective import elbo as torch_elbo

pytestmark = pytest.mark.quick

values = hnp.arrays(np.float64, (3, 4), elements=st.floats(-8, 8))


def a_model(kind: str) -> Model:
    return Model(
        architecture="test",
        parameters=0,
        data=Data(shape=(6,), range=(0.0, 1.0)),
        latent=Latent(shape=(4,)),
        prior="standard_normal",
        posterior=Posterior(kind="diagonal_gaussian"),
        likelihood=Likelihood(kind=kind),
    )


@given(values, values)
def test_kl_is_never_negative(mean: np.ndarray, logvar: np.ndarray) -> None:
    assert (elbo.kl(mean, logvar) >= 0).all()
    between = elbo.kl_between_terms(mean, logvar, np.zeros((3, 4)), np.zeros((3, 4)))
    np.testing.assert_allclose(elbo.kl_terms(mean, logvar), between, rtol=1e-12, atol=1e-12)


def test_kl_of_the_prior_is_zero() -> None:
    assert elbo.kl(np.zeros((1, 5)), np.zeros((1, 5))) == 0.0
    # exp(v) − 1 − v cancels for small v; the result is v²/2 all the same.
    np.testing.assert_allclose(elbo.kl(np.zeros((1, 1)), np.full((1, 1), 1e-5)), 2.5e-11, rtol=1e-5)


@given(values, values, values, values)
def test_kl_between_against_torch(m: np.ndarray, v: np.ndarray, n: np.ndarray, w: np.ndarray) -> None:
    p, q = (torch.distributions.Normal(torch.from_numpy(a), torch.from_numpy(b / 2).exp()) for a, b in ((m, v), (n, w)))
    expected = torch.distributions.kl_divergence(p, q).numpy()
    np.testing.assert_allclose(elbo.kl_between_terms(m, v, n, w), expected, rtol=1e-9, atol=1e-9)


def test_closed_form_kl_against_three_terms() -> None:
    """E_q[log q(z|x) − log p(z)] over 200,000 draws, within 4 standard errors of the closed form."""
    size, draws = 4, 200_000
    mean, logvar = np.array([[0.7, -1.2, 0.0, 2.0]]), np.array([[-1.0, 0.5, -3.0, 0.2]])
    eps = noise.normals(0, noise.POSTERIOR, 0, draws, size).astype(np.float64)
    z = mean + np.exp(logvar / 2) * eps
    sampled = -elbo.monte_carlo_elbo(np.zeros(draws), z, eps, np.broadcast_to(logvar, z.shape))
    error = sampled.std() / np.sqrt(draws)
    assert abs(sampled.mean() - elbo.kl(mean, logvar)[0]) < 4 * error
    assert error < 0.01


@pytest.mark.parametrize("kind", ["bernoulli", "gaussian"])
@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000))
def test_numpy_elbo_equals_torch_elbo(kind: str, seed: int) -> None:
    """Same model in float64, same noise: ≤ 1e-12 relative to Σ|ELBO terms|."""
    draw = noise.normals(seed, noise.VERIFIER, 0, 8, 40).astype(np.float64)
    mean, logvar, eps = draw[:, 0:4], 3 * draw[:, 4:8], draw[:, 8:12]
    x = 1 / (1 + np.exp(-draw[:, 12:18]))
    weights = draw[:4, 18:24]

    class Fixed:
        def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.from_numpy(mean), torch.from_numpy(logvar)

        def decode(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out = z @ torch.from_numpy(weights)
            return (out.sigmoid(), out) if kind == "bernoulli" else (out, out.sin() * 4)

    expected: Elbo = torch_elbo(
        Fixed(), log_prob_of(a_model(kind).likelihood, a_model(kind).data), torch.from_numpy(x), torch.from_numpy(eps)
    )
    out = (mean + np.exp(0.5 * logvar) * eps) @ weights
    outputs = {"sample": out, "logits": out, "sample_logvar": np.sin(out) * 4}
    terms = likelihoods.of(a_model(kind)).log_prob_terms(x, outputs)
    scale = elbo.per_example(np.abs(terms)) + elbo.kl(mean, logvar)
    assert (np.abs(elbo.per_example(terms) - expected.reconstruction.numpy()) <= 1e-12 * scale).all()
    assert (np.abs(elbo.kl(mean, logvar) - expected.kl.numpy()) <= 1e-12 * scale).all()


@given(hnp.arrays(np.float64, (5, 3), elements=st.floats(-1e4, 1e4)))
def test_importance_weighted_bound(log_weights: np.ndarray) -> None:
    bound = elbo.importance_weighted_bound(log_weights)
    assert (bound >= log_weights.mean(axis=0) - 1e-9).all()  # Jensen
    assert (bound <= log_weights.max(axis=0) + 1e-9).all()
    np.testing.assert_allclose(bound, np.logaddexp.reduce(log_weights) - np.log(5), rtol=1e-12, atol=1e-9)


def test_importance_weights_that_are_all_zero() -> None:
    assert elbo.importance_weighted_bound(np.full((3, 1), -np.inf)) == -np.inf


def test_sums_are_in_float64() -> None:
    terms = np.full((1, 1 << 20), 0.1, np.float32)
    assert elbo.per_example(terms)[0] == pytest.approx(float(np.float32(0.1)) * (1 << 20), rel=1e-12)
    assert elbo.per_example(terms.reshape(1, 4, -1)).shape == (1,)
