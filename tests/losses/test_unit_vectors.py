"""Directions, and what has none."""

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.losses.unit_vectors import unit_vectors


def test_values_and_slopes():
    x = jnp.array([[3.0, -4.0, 0.0], [1e-6, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found, slopes = jax.vjp(unit_vectors, x)
    np.testing.assert_allclose(found, [[0.6, -0.8, 0], [1, 0, 0], [0, 0, 0]], rtol=1e-5)
    (back,) = slopes(jnp.ones_like(x))
    assert np.isfinite(back).all()
    # What points along the vector does not change it.
    np.testing.assert_allclose(jnp.sum(back * x, axis=1), 0, atol=1e-6)
