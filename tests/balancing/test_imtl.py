import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from tests.balancing import matrices, model, references_gradients


def test_equal_projections_of_the_gradients_of_scaled_losses():
    tx = mtjax.imtl(4, optimizer=optax.sgd(0.1))
    update = jax.jit(lambda g, state, losses: tx.update(g, state, losses=losses))
    rng, state, log_scales = np.random.default_rng(0), tx.init(None), np.zeros(4)
    for seed in range(3):
        grads = matrices.sample(matrices.normal, 4, seed)
        losses = rng.uniform(0.5, 2.0, 4)
        scaled = grads * np.exp(log_scales)[:, None]
        updates, state = update(
            jnp.asarray(grads, jnp.float32), state, jnp.asarray(losses, jnp.float32)
        )
        expected = references_gradients.equal_projections(scaled)
        np.testing.assert_allclose(updates, expected, atol=1e-3)
        projections = scaled @ updates / np.linalg.norm(scaled, axis=1)
        assert np.ptp(projections) < 1e-3
        log_scales -= 0.1 * (np.exp(log_scales) * losses - 1.0)
        np.testing.assert_allclose(state.log_scales, log_scales, rtol=1e-4, atol=1e-6)


def test_scales_settle_at_inverse_losses():
    tx = mtjax.imtl(2, optimizer=optax.sgd(0.2))
    losses, grads = jnp.array([4.0, 0.5]), jnp.eye(2)
    step = lambda state, _: (tx.update(grads, state, losses=losses)[1], None)
    state = jax.jit(lambda: jax.lax.scan(step, tx.init(None), length=300)[0])()
    np.testing.assert_allclose(np.exp(state.log_scales) * losses, 1.0, rtol=1e-4)


def test_is_the_chain_of_its_parts():
    params, batch = model.params(), model.batch()
    make = lambda: optax.sgd(0.5)
    whole = mtjax.imtl(3, optimizer=make())
    chain = optax.chain(
        mtjax.scale_by_weighting(mtjax.imtl_l(3, optimizer=make())), mtjax.imtl_g()
    )

    @jax.jit
    def both(states):
        pairs = [
            model.update(tx, params, state, batch)
            for tx, state in zip((whole, chain), states, strict=True)
        ]
        return [u for u, _ in pairs], [s for _, s in pairs]

    states = [whole.init(params), chain.init(params)]
    for _ in range(2):
        (mine, theirs), states = both(states)
        chex.assert_trees_all_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_needs_losses():
    tx = mtjax.imtl(2)
    with pytest.raises(ValueError, match="`imtl` needs the extra argument `losses`"):
        tx.update(jnp.eye(2), tx.init(None))
