import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from tests.balancing import matrices, references


def series(count, size=4):
    return [matrices.sample(matrices.narrow, size, seed) for seed in range(count)]


def weights_by_mgda(grads):
    direction = references.shortest_in_hull(grads)
    return np.linalg.lstsq(grads.T, direction)[0]


def test_averages_the_weights_of_the_inner_balancer():
    tx = mtjax.cr_mogm(mtjax.mgda(), 4, momentum=0.7)
    update, state, expected = jax.jit(tx.update), tx.init(None), None
    for grads in series(4):
        updates, state = update(jnp.asarray(grads, jnp.float32), state)
        found = weights_by_mgda(grads)
        expected = found if expected is None else 0.7 * expected + 0.3 * found
        np.testing.assert_allclose(state.weights, expected, atol=1e-4)
        np.testing.assert_allclose(updates, expected @ grads, atol=1e-3)


@pytest.mark.parametrize(
    "make", [mtjax.cagrad, mtjax.pcgrad, lambda: mtjax.nash_mtl(4)]
)
def test_without_momentum_is_the_inner_balancer(make):
    inner = make()
    tx, key = mtjax.cr_mogm(inner, 4, momentum=0.0), jax.random.key(1)
    both = jax.jit(
        lambda grads, state, inner_state: (
            tx.update(grads, state, key=key),
            inner.update(grads, inner_state, key=key),
        )
    )
    state, inner_state = tx.init(None), inner.init(None)
    for grads in series(2):
        grads = jnp.asarray(grads, jnp.float32)
        (mine, state), (theirs, inner_state) = both(grads, state, inner_state)
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_task_that_comes_late_starts_with_its_first_weight():
    tx = mtjax.cr_mogm(mtjax.mgda(), 3, momentum=0.9)
    update = jax.jit(tx.update)
    first, second = (jnp.asarray(g[:3], jnp.float32) for g in series(2))
    few = jnp.array([True, False, True])
    _, state = update(first, tx.init(None), present=few)
    assert state.weights[1] == 0
    _, after = update(second, state)
    found = weights_by_mgda(np.asarray(second, np.float64))
    assert float(after.weights[1]) == pytest.approx(found[1], abs=1e-4)
    _, last = update(first, after, present=few)
    assert last.weights[1] == after.weights[1]


def test_passes_on_what_a_loss_weighting_needs():
    tx = mtjax.cr_mogm(mtjax.imtl_l(2, optimizer=optax.sgd(1.0)), 2, momentum=0.5)
    state, losses = tx.init(None), jnp.array([1.0, 3.0])
    _, state = tx.update(jnp.eye(2), state, losses=losses)
    updates, _ = tx.update(jnp.eye(2), state, losses=losses)
    # The second log-scale is -2 in the second step.
    np.testing.assert_allclose(updates, [1.0, 0.5 + 0.5 * np.exp(-2.0)], rtol=1e-5)


def test_refuses_what_has_no_weights():
    tx = mtjax.cr_mogm(mtjax.graddrop(), 2)
    with pytest.raises(TypeError, match="must make do with losses and the Gramian"):
        tx.update(jnp.eye(2), tx.init(None))


def test_momentum_is_below_one():
    with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\), got 1.0"):
        mtjax.cr_mogm(mtjax.mgda(), 2, momentum=1.0)
