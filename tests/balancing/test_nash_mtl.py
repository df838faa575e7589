import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from tests.balancing import matrices, references


def update_of(tx):
    return jax.jit(lambda grads, state: tx.update(grads, state))


UNCLIPPED = mtjax.nash_mtl(6, max_norm=None)
unclipped = update_of(UNCLIPPED)


def solve(grads):
    updates, _ = unclipped(jnp.asarray(grads, jnp.float32), UNCLIPPED.init(None))
    return np.asarray(updates, np.float64)


@pytest.mark.parametrize("kind", matrices.REGULAR, ids=lambda k: k.__name__)
def test_bargaining_solution(kind):
    for seed in range(3):
        grads = matrices.sample(kind, 6, seed)
        update = solve(grads)
        np.testing.assert_allclose(update, references.bargain(grads), atol=1e-2)
        # Weights that solve the equation are the inverse improvements.
        weights = 1.0 / (grads @ update)
        assert weights.min() > 0
        np.testing.assert_allclose(weights @ grads, update, atol=1e-2)
        assert update @ update == pytest.approx(6.0, rel=1e-3)


def test_orthogonal_gradients_weigh_by_inverse_norms():
    lengths = np.array([1e-10, 1e-3, 1.0, 2.0, 1e3, 1e15])
    np.testing.assert_allclose(solve(np.diag(lengths)), 1.0, rtol=1e-5)


def test_scaling_losses_changes_nothing():
    grads = matrices.sample(matrices.conflicting, 6)
    scales = np.geomspace(1e-6, 1e6, 6)[:, None]
    np.testing.assert_allclose(solve(grads * scales), solve(grads), atol=1e-3)


def test_clips_to_the_longest_norm():
    tx = mtjax.nash_mtl(6, max_norm=0.7)
    grads = jnp.asarray(matrices.sample(matrices.normal, 6), jnp.float32)
    updates, _ = update_of(tx)(grads, tx.init(None))
    np.testing.assert_allclose(np.linalg.norm(updates), 0.7, rtol=1e-5)


def test_recovers_at_once_from_a_stationary_step():
    stationary = matrices.sample(matrices.rank_one, 6)
    grads = matrices.sample(matrices.normal, 6)
    _, state = unclipped(jnp.asarray(stationary, jnp.float32), UNCLIPPED.init(None))
    updates, _ = unclipped(jnp.asarray(grads, jnp.float32), state)
    np.testing.assert_allclose(updates, solve(grads), atol=1e-3)


def test_solves_every_so_many_steps():
    tx = mtjax.nash_mtl(6, max_norm=None, update_every=3)
    update, state, shares = update_of(tx), tx.init(None), []
    for seed in range(4):
        grads = jnp.asarray(matrices.sample(matrices.conflicting, 6, seed), jnp.float32)
        _, state = update(grads, state)
        shares.append(np.asarray(state.shares))
    np.testing.assert_array_equal(shares[1], shares[0])
    np.testing.assert_array_equal(shares[2], shares[0])
    assert np.abs(shares[3] - shares[0]).max() > 1e-2
