"""Entropy of reliable predictions, and losses at the worst point nearby."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.losses.reliable_entropy import reliable_entropy_loss
from mtjax.losses.sharpness_aware import sharpness_aware

LOGITS = (3 * np.random.default_rng(0).normal(size=(30, 5))).astype(np.float32)


@pytest.mark.parametrize("margin", [0.3, 0.4, 1.0])
def test_against_numpy(margin):
    p = np.exp(np.float64(LOGITS))
    p /= p.sum(1, keepdims=True)
    entropies = -(p * np.log(p)).sum(1)
    reliable = entropies < margin * np.log(5)
    assert 0 < reliable.sum() <= 30
    assert reliable.all() == (margin == 1.0)
    loss = lambda z: reliable_entropy_loss(z, margin=margin)
    value, slopes = jax.value_and_grad(loss)(jnp.array(LOGITS))
    assert value == pytest.approx(entropies[reliable].mean(), rel=1e-5)
    np.testing.assert_array_equal(np.abs(slopes).sum(1) > 0, reliable)


def test_nothing_is_reliable():
    value, slopes = jax.value_and_grad(reliable_entropy_loss)(jnp.zeros((3, 4)))
    assert value == 0
    np.testing.assert_array_equal(slopes, 0)


def test_margin_out_of_range():
    with pytest.raises(ValueError, match=r"`margin` must be in \(0, 1\], got 0.0"):
        reliable_entropy_loss(jnp.array(LOGITS), margin=0.0)


def test_sharpness_aware_slopes_are_those_of_the_worst_point():
    """Two arrays, whose norm is one; a loss that is not quadratic."""
    variables = {"a": jnp.array([0.3, -0.2]), "b": jnp.array([[1.5]])}
    loss = lambda x, scale: (
        scale * (jnp.sum(x["a"] ** 4) + jnp.exp(x["b"][0, 0]) * x["a"][0]),
        x["a"],
    )
    a, b = np.float64(variables["a"]), 1.5
    slopes_at = lambda a, b: (
        4 * 2 * a**3 + 2 * np.exp(b) * np.array([1, 0]),
        2 * np.exp(b) * a[0],
    )
    of_a, of_b = slopes_at(a, b)
    norm = np.sqrt((of_a**2).sum() + of_b**2)
    a_moved, b_moved = a + 0.1 * of_a / norm, b + 0.1 * of_b / norm
    expected_a, expected_b = slopes_at(a_moved, b_moved)
    worst = sharpness_aware(loss, 0.1)
    slopes, report = jax.grad(worst, has_aux=True)(variables, 2.0)
    np.testing.assert_allclose(slopes["a"], expected_a, rtol=1e-5)
    np.testing.assert_allclose(slopes["b"][0, 0], expected_b, rtol=1e-5)
    np.testing.assert_allclose(report, a_moved, rtol=1e-6)
    value, _ = worst(variables, 2.0)
    assert value > loss(variables, 2.0)[0]


def test_sharpness_aware_at_a_minimum_and_without_a_radius():
    loss = lambda x: (jnp.sum(x**2), None)
    slopes, _ = jax.grad(sharpness_aware(loss, 0.5), has_aux=True)(jnp.zeros(3))
    np.testing.assert_array_equal(slopes, 0)
    x = jnp.array([1.0, 2.0])
    plain, _ = jax.grad(sharpness_aware(loss, 0.0), has_aux=True)(x)
    np.testing.assert_array_equal(plain, 2 * x)
    with pytest.raises(ValueError, match="`rho` must not be negative, got -1"):
        sharpness_aware(loss, -1.0)
