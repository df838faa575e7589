"""Entropy of predictions: by hand, and of huge, masked and half-precision logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.losses import entropy_loss

entropy = jax.jit(entropy_loss, static_argnames="normalise")
entropy_slopes = jax.jit(jax.grad(entropy_loss))


def test_entropy_by_hand():
    logits = np.random.default_rng(1).normal(size=(2, 3, 5)).astype(np.float32)
    share = np.exp(np.float64(logits))
    share /= share.sum(-1, keepdims=True)
    expected = -(share * np.log(share)).sum(-1).mean()
    assert entropy(jnp.asarray(logits)) == pytest.approx(expected, rel=1e-5)
    normalised = entropy(jnp.asarray(logits), normalise=True)
    assert normalised == pytest.approx(expected / np.log(5), rel=1e-5)
    assert 0 < expected < np.log(5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_entropy_is_stable(scale):
    certain = jnp.full((2, 5), -scale).at[:, 2].set(scale)
    uniform = jnp.full((2, 5), scale)
    assert entropy(uniform) == pytest.approx(np.log(5), rel=1e-6)
    assert entropy(uniform, normalise=True) == pytest.approx(1.0, rel=1e-6)
    if scale > 1:
        assert entropy(certain) == 0.0
    for logits in (certain, uniform):
        assert jnp.isfinite(entropy_slopes(logits)).all()


def test_masked_classes_do_not_count():
    logits = jnp.array([[0.0, 1.0, -jnp.inf, -0.5, -jnp.inf]])
    np.testing.assert_allclose(
        entropy(logits), entropy(logits[:, [0, 1, 3]]), rtol=1e-6
    )
    slopes = entropy_slopes(logits)
    assert jnp.isfinite(slopes).all()
    assert slopes[0, 2] == 0


def test_entropy_of_half_precision_is_float32():
    found = entropy(jnp.zeros((2, 4), jnp.bfloat16))
    assert found.dtype == jnp.float32
    assert found == pytest.approx(np.log(4), rel=1e-6)
