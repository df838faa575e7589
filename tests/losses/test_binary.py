"""Cross-entropies of several binary tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.losses.binary import binary_losses


def test_is_the_mean_over_labelled_examples_in_float64():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=9), rng.integers(2, size=9).astype(float)
    y[[1, 4]] = np.nan
    p = 1 / (1 + np.exp(-z))
    known = ~np.isnan(y)
    terms = -(y * np.log(p) + (1 - y) * np.log(1 - p))[known]
    found = binary_losses({"a": jnp.float32(z)}, {"a": jnp.float32(y)})
    np.testing.assert_allclose(found["a"], terms.mean(), rtol=1e-6)


def test_absent_labels_give_no_loss_and_no_gradient():
    labels = {"a": jnp.full(3, jnp.nan), "b": jnp.array([1.0, jnp.nan, 0.0])}
    loss = lambda z: sum(binary_losses({"a": z, "b": z}, labels).values())
    alone = lambda z: binary_losses({"b": z}, labels)["b"]
    z = jnp.array([0.3, -40.0, 40.0])
    np.testing.assert_array_equal(jax.grad(loss)(z), jax.grad(alone)(z))
    assert jax.grad(loss)(z)[1] == 0
    assert float(binary_losses({"a": z}, labels)["a"]) == 0


def test_large_logits_stay_finite():
    logits = {"a": jnp.array([-1e4, 1e4])}
    found = binary_losses(logits, {"a": jnp.array([1.0, 0.0])})["a"]
    np.testing.assert_allclose(found, 1e4)


def test_a_task_without_labels_is_named():
    with pytest.raises(ValueError, match=r"`labels` must hold .*\['buy'\]"):
        binary_losses({"buy": jnp.zeros(2)}, {"click": jnp.zeros(2)})
