"""Losses on all impressions: ESMM in logarithms, unbiased estimates of ESCM2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from mtjax.losses import (
    doubly_robust_loss,
    entire_space_losses,
    imputation_loss,
    inverse_propensity_loss,
    product_of_chances,
)

A, B = (np.linspace(-4, 4, 9)[:, None] * np.ones((1, 9)) for _ in range(2))
A, B = A.ravel().astype(np.float32), B.T.ravel().astype(np.float32)


def test_product_of_chances():
    log_p = product_of_chances(jnp.asarray(A), jnp.asarray(B))
    p = expit(np.float64(A)) * expit(np.float64(B))
    np.testing.assert_allclose(log_p.yes, np.log(p), rtol=1e-5)
    np.testing.assert_allclose(log_p.no, np.log1p(-p), rtol=1e-5)
    smaller = np.minimum(expit(np.float64(A)), expit(np.float64(B)))
    assert (np.exp(log_p.yes) <= smaller).all()
    # Where the product rounds to 0 or 1 in float32.
    extreme = jnp.array([-60.0, 60.0, 60.0, -60.0])
    other = jnp.array([-60.0, 60.0, -60.0, 0.0])
    log_p = product_of_chances(extreme, other)
    np.testing.assert_allclose(
        log_p.yes, [-120, -2 * np.exp(-60.0), -60, -60.693147], rtol=1e-5
    )
    np.testing.assert_allclose(log_p.no[1], np.log(2) - 60, rtol=1e-5)
    total = lambda a, b: sum(jnp.sum(x) for x in product_of_chances(a, b))
    assert all(np.isfinite(g).all() for g in jax.grad(total, (0, 1))(extreme, other))


def test_conversions_learn_from_what_was_not_clicked():
    rng = np.random.default_rng(0)
    clicks = rng.integers(0, 2, len(A))
    # Conversions without a click are not counted.
    conversions = rng.integers(0, 2, len(A))
    both = clicks * conversions

    def losses(a, b):
        return entire_space_losses(a, b, clicks, conversions)

    found = losses(jnp.asarray(A), jnp.asarray(B))
    cross_entropy = lambda y, p: -np.mean(y * np.log(p) + (1 - y) * np.log1p(-p))
    p, q = expit(np.float64(A)), expit(np.float64(B))
    np.testing.assert_allclose(found.click, cross_entropy(clicks, p), rtol=1e-5)
    np.testing.assert_allclose(found.both, cross_entropy(both, p * q), rtol=1e-5)
    slopes = jax.grad(lambda b: losses(jnp.asarray(A), b).both)(jnp.asarray(B))
    # d/db of -log(1 - p q) is p q (1 - q) / (1 - p q).
    expected = np.where(both, -(1 - q), p * q * (1 - q) / (1 - p * q)) / len(A)
    np.testing.assert_allclose(slopes, expected, rtol=1e-4, atol=1e-8)
    assert (np.asarray(slopes)[clicks == 0] > 0).all()
    by_click = jax.grad(lambda b: losses(jnp.asarray(A), b).click)(jnp.asarray(B))
    assert not by_click.any()


N = 2000
RNG = np.random.default_rng(1)
ERRORS = RNG.gamma(2.0, size=N)
LOGITS = RNG.normal(-1.0, 1.0, N)
IMPUTED = RNG.gamma(1.0, size=N)


def estimates(loss, propensity, *args, **options):
    """Means and standard error over 400 draws of clicks."""
    clicks = np.random.default_rng(2).random((400, N)) < propensity
    one = lambda o: loss(
        *args, o.astype(jnp.float32), jnp.asarray(LOGITS, jnp.float32), **options
    )
    found = np.float64(jax.jit(jax.vmap(one))(jnp.asarray(clicks)))
    return found.mean(), found.std() / 20


def test_estimates_are_unbiased_with_the_true_propensity():
    errors, imputed = (jnp.asarray(v, jnp.float32) for v in (ERRORS, IMPUTED))
    propensity = expit(LOGITS)
    for loss, args in [
        (inverse_propensity_loss, (errors,)),
        (doubly_robust_loss, (errors, imputed)),
    ]:
        mean, spread = estimates(loss, propensity, *args, clip=0.0)
        assert mean == pytest.approx(ERRORS.mean(), abs=5 * spread)
    mean, spread = estimates(imputation_loss, propensity, errors, imputed, clip=0.0)
    assert mean == pytest.approx(((ERRORS - IMPUTED) ** 2).mean(), abs=5 * spread)


@pytest.mark.parametrize("normalise", [False, True])
def test_clicks_at_random_with_a_constant_propensity(normalise):
    errors = jnp.asarray(ERRORS, jnp.float32)
    clicks = np.random.default_rng(2).random((400, N)) < 0.25
    logit = jnp.full(N, np.log(0.25 / 0.75), jnp.float32)
    loss = functools.partial(inverse_propensity_loss, normalise=normalise)
    estimate = jax.vmap(loss, in_axes=(None, 0, None))
    found = np.float64(estimate(errors, jnp.asarray(clicks, jnp.float32), logit))
    assert found.mean() == pytest.approx(ERRORS.mean(), abs=5 * found.std() / 20)
    if normalise:
        clicked = (clicks * ERRORS).sum(1) / clicks.sum(1)
        np.testing.assert_allclose(found, clicked, rtol=1e-4)


def test_a_right_imputation_needs_no_propensity():
    errors = jnp.asarray(ERRORS, jnp.float32)
    clicks = (RNG.random(N) < 0.3).astype(np.float32)
    for seed in range(3):
        wrong = jnp.asarray(np.random.default_rng(seed).normal(size=N), jnp.float32)
        found = doubly_robust_loss(errors, errors, clicks, wrong)
        assert found == pytest.approx(ERRORS.mean(), rel=1e-5)
        assert imputation_loss(errors, errors, clicks, wrong) == 0


def test_propensities_are_clipped_and_get_no_gradient():
    errors, clicks = jnp.array([2.0, 5.0]), jnp.array([1.0, 0.0])
    rare = jnp.array([-80.0, 0.0])
    assert inverse_propensity_loss(errors, clicks, rare, clip=0.1) == 10
    assert jnp.isfinite(
        inverse_propensity_loss(errors, clicks, -2 * rare.at[0].set(80), clip=0.0)
    )
    slopes = jax.grad(lambda z: inverse_propensity_loss(errors, clicks, z))(rare)
    assert not slopes.any()
    assert inverse_propensity_loss(errors, 0 * clicks, rare, normalise=True) == 0
    with pytest.raises(ValueError, match=r"`clip` must be a probability.*got 1.5"):
        doubly_robust_loss(errors, errors, clicks, rare, clip=1.5)
