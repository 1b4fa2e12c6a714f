"""log p(x|z) against scipy.stats and torch.distributions; draws against their mean; extremes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from vae_export.contract.model import DECODER_OUTPUTS, Data, Latent, Likelihood, Model, Posterior
from vae_export.errors import InputError
from vae_export.numerics import elbo, likelihoods, noise
from vae_export.trainers.objective import log_prob_of

pytestmark = pytest.mark.quick

SHAPE = (2, 3, 4)


def of(kind: str, data_range: tuple[float, float] = (0.0, 1.0), **fields: object) -> likelihoods.Likelihood:
    return likelihoods.of(
        Model(
            architecture="test",
            parameters=0,
            data=Data(shape=SHAPE, range=data_range),
            latent=Latent(shape=(1,)),
            prior="standard_normal",
            posterior=Posterior(kind="diagonal_gaussian"),
            likelihood=Likelihood(kind=kind, **fields),
        )
    )


def normals(row: int, count: int = 50) -> np.ndarray:
    return noise.normals(9, noise.VERIFIER, row * 1000, count, 24).reshape(count, *SHAPE).astype(np.float64)


def test_bernoulli() -> None:
    logits, x = 4 * normals(0), (normals(1) > 0).astype(np.float64)
    terms = of("bernoulli").log_prob_terms(x, {"logits": logits})
    np.testing.assert_allclose(terms, stats.bernoulli.logpmf(x, 1 / (1 + np.exp(-logits))), rtol=1e-9)
    assert of("bernoulli").log_prob_terms(np.ones((1, 1)), {"logits": np.array([[-800.0]])}) == -800.0
    assert of("bernoulli").log_prob_terms(np.ones((1, 1)), {"logits": np.array([[800.0]])}) == 0.0


def test_gaussian() -> None:
    x, mean, logvar = normals(0), normals(1), 2 * normals(2)
    terms = of("gaussian").log_prob_terms(x, {"sample": mean, "sample_logvar": logvar})
    np.testing.assert_allclose(terms, stats.norm.logpdf(x, mean, np.exp(logvar / 2)), rtol=1e-12)


def test_gaussian_fixed() -> None:
    x, mean = normals(0), normals(1)
    terms = of("gaussian_fixed", variance=0.25).log_prob_terms(x, {"sample": mean})
    np.testing.assert_allclose(terms, stats.norm.logpdf(x, mean, 0.5), rtol=1e-12)


@pytest.mark.parametrize("data_range", [(0.0, 1.0), (-1.0, 1.0)])
def test_discretized_logistic(data_range: tuple[float, float]) -> None:
    low, high = data_range
    step = (high - low) / 255
    location, log_scale = normals(0), normals(1) - 3
    levels = low + step * np.arange(256)
    likelihood = of("discretized_logistic", data_range)
    outputs = {"location": location, "log_scale": log_scale}
    # A true distribution over the 256 levels.
    total = sum(np.exp(likelihood.log_prob_terms(np.full(location.shape, level), outputs)) for level in levels)
    np.testing.assert_allclose(total, 1.0, rtol=1e-9)
    x = levels[(np.abs(normals(2)) * 80).astype(int) % 256]
    scale = np.exp(log_scale)
    upper = np.where(x > high - step / 2, 1.0, stats.logistic.cdf(x + step / 2, location, scale))
    lower = np.where(x < low + step / 2, 0.0, stats.logistic.cdf(x - step / 2, location, scale))
    terms, mass = likelihood.log_prob_terms(x, outputs), upper - lower
    enough = mass > 1e-6  # below, the difference of the two cancels in the expected value, not in ours
    np.testing.assert_allclose(terms[enough], np.log(mass[enough]), rtol=1e-7, atol=1e-9)
    assert np.isfinite(terms).all()


@pytest.mark.parametrize("kind", sorted(likelihoods._KINDS))
def test_against_torch(kind: str) -> None:
    x = np.rint(np.clip(normals(0) / 4 + 0.5, 0, 1) * 255) / 255
    names = DECODER_OUTPUTS[kind]
    outputs = {name: normals(1 + row) for row, name in enumerate(names)}
    parameters = tuple(torch.from_numpy(outputs[name]) for name in names)
    record = Likelihood(kind=kind, variance=0.3 if kind == "gaussian_fixed" else None)
    expected = log_prob_of(record, Data(shape=SHAPE, range=(0.0, 1.0)))(torch.from_numpy(x), parameters).numpy()
    found = of(kind, **({"variance": 0.3} if kind == "gaussian_fixed" else {})).log_prob_terms(x, outputs)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", sorted(likelihoods._KINDS))
def test_draws_follow_the_distribution(kind: str) -> None:
    count, mean = 20_000, 0.3
    full = np.full((count, *SHAPE), mean, np.float32)
    outputs = {
        "sample": full,
        "logits": np.log(full / (1 - full)),
        "sample_logvar": np.full_like(full, np.log(0.04)),
        "location": full,
        "log_scale": np.full_like(full, -4.0),
    }
    likelihood = of(kind, **({"variance": 0.04} if kind == "gaussian_fixed" else {}))
    drawn = likelihood.sample(outputs, 0, 0)
    assert drawn.shape == full.shape
    assert drawn.dtype == np.float32
    variance = {"bernoulli": mean * (1 - mean), "discretized_logistic": np.exp(-8.0) * np.pi**2 / 3}.get(kind, 0.04)
    assert drawn.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / drawn.size))
    assert drawn.var() == pytest.approx(variance, rel=0.02)
    part = likelihood.sample({name: value[10:20] for name, value in outputs.items()}, 0, 10)
    assert np.array_equal(part, drawn[10:20])


def test_none_is_refused_in_words() -> None:
    with pytest.raises(InputError, match=r"no likelihood p\(x\|z\), and so neither an ELBO nor samples"):
        of("none")


def test_no_value_overflows() -> None:
    """Logits, variances and scales far beyond any model's: no warning, and limits where there are any."""
    logits = np.array([-1e6, -800.0, 0.0, 800.0, 1e6])
    np.testing.assert_array_equal(likelihoods.sigmoid(logits), [0.0, 0.0, 0.5, 1.0, 1.0])
    x = np.array([[0.0, 1.0]])
    far = {"sample": np.zeros_like(x), "sample_logvar": np.full_like(x, -1e4)}
    terms = likelihoods.Gaussian().log_prob_terms(x, far)
    assert terms[0, 0] == pytest.approx(5e3, rel=1e-3)
    assert terms[0, 1] == -np.inf
    levels = likelihoods.DiscretizedLogistic(Data(shape=(2,), range=(0.0, 1.0)))
    for log_scale in (-1e4, 1e4):
        found = levels.log_prob_terms(x, {"location": np.zeros_like(x), "log_scale": np.full_like(x, log_scale)})
        assert not np.isnan(found).any()
    kl = elbo.kl_between_terms(*(np.array([value]) for value in (0.0, -1e4, 0.0, -1e4)))
    np.testing.assert_array_equal(kl, [0.0])
    assert elbo.kl_terms(np.zeros(1), np.full(1, 1e4))[0] == np.inf
