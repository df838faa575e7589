"""The softmax over the largest logits: its values, and both of its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.sparse_softmax import sparse_softmax

RNG = np.random.default_rng(0)


def reference(logits, k):
    kept = np.zeros(len(logits), bool)
    kept[np.argsort(-logits, kind="stable")[:k]] = True
    weights = np.where(kept, np.exp(logits - logits.max()), 0)
    return weights / weights.sum(), kept


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_values(k, scale):
    logits = scale * RNG.normal(size=(4, 2, 6))
    found = sparse_softmax(jnp.asarray(logits, jnp.float32), k)
    expected = np.apply_along_axis(lambda z: reference(z, k)[0], -1, logits)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_exactly_k_also_where_all_are_equal():
    found = np.asarray(sparse_softmax(jnp.zeros((2, 7)), 3))
    np.testing.assert_allclose(found, [[1 / 3] * 3 + [0] * 4] * 2, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradient(k):
    """Kept: that of finite differences. Others: their entry counts, the sum stays."""
    logits, factors = RNG.normal(size=(2, 6))
    loss = lambda z: jnp.sum(sparse_softmax(z, k) * jnp.asarray(factors, jnp.float32))
    slopes = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(logits, jnp.float32)))
    alpha, kept = reference(logits, k)

    def changed(i, by):
        moved = logits.copy()
        moved[i] += by
        weights, still = reference(moved, k)
        np.testing.assert_array_equal(still, kept)
        return weights @ factors

    step = 1e-6
    differences = [
        (changed(i, step) - changed(i, -step)) / (2 * step) for i in range(6)
    ]
    np.testing.assert_allclose(slopes[kept], np.array(differences)[kept], atol=1e-5)
    np.testing.assert_allclose(np.array(differences)[~kept], 0, atol=1e-9)

    total = np.exp(logits[kept]).sum()
    straight = np.exp(logits) / total * (factors - alpha @ factors)
    np.testing.assert_allclose(slopes[~kept], straight[~kept], rtol=1e-4, atol=1e-6)
    assert np.abs(slopes[~kept]).min() > 1e-3


@pytest.mark.parametrize("scale", [1e-10, 1e3, 1e30])
def test_gradient_is_finite(scale):
    logits = scale * jnp.asarray(RNG.normal(size=(3, 6)), jnp.float32)
    loss = lambda z: jnp.sum(sparse_softmax(z, 2)[:, ::2])
    slopes = jax.jit(jax.grad(loss))(logits)
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize("k", [0, 4])
def test_number_that_is_kept(k):
    with pytest.raises(ValueError, match=f"from 1 to the number of logits, 3, got {k}"):
        sparse_softmax(jnp.zeros(3), k)
