"""Products of chances along a chain, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from mtjax.losses import label_chain_penalty
from mtjax.losses.chained_logits import chained_logits

CHAIN = ("a", "b", "c")


def test_products_never_rise_and_keep_their_precision():
    rng = np.random.default_rng(0)
    z = {t: scale * rng.normal(size=50) for t, scale in zip(CHAIN, (1, 8, 20))}
    found = chained_logits(
        {t: jnp.asarray(x, jnp.float32) for t, x in z.items()}, CHAIN
    )
    yes = np.cumsum([-np.logaddexp(0, -z[t]) for t in CHAIN], axis=0)
    for t, log_p in zip(CHAIN, yes):
        expected = log_p - np.log(-np.expm1(log_p))
        np.testing.assert_allclose(found[t], expected, rtol=1e-4, atol=1e-5)
    assert label_chain_penalty(found, CHAIN) == 0


def test_gradient_of_a_rare_step_is_finite_and_not_zero():
    loss = lambda z: chained_logits(dict(zip(CHAIN, z)), CHAIN)["c"].sum()
    slopes = jax.grad(loss)(jnp.array([[-30.0], [30.0], [-40.0]]))
    assert np.isfinite(slopes).all()
    np.testing.assert_allclose(slopes[:, 0], [1, 0, 1], atol=1e-6)
