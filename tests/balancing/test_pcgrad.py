import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.balancing.pcgrad import surgery_weights
from tests.balancing import matrices, references
from tests.balancing.catalogue import METHODS, jitted

METHOD = next(m for m in METHODS if m.factory is mtjax.pcgrad)
weigh = jax.jit(surgery_weights)


def orders_of(key, size):
    """One order for each task, as the balancer draws them."""
    keys = jax.random.split(key, size)
    return np.stack([jax.random.permutation(k, size) for k in keys])


@pytest.mark.parametrize("size", [3, 16])
@pytest.mark.parametrize(
    "kind",
    [*matrices.REGULAR, matrices.low_rank, matrices.scaled],
    ids=lambda k: k.__name__,
)
def test_is_the_surgery_on_whole_gradients(kind, size):
    grads, key = matrices.sample(kind, size), jax.random.key(7)
    weights = np.asarray(weigh(jnp.asarray(matrices.gramian(grads)), key=key))
    expected = references.surgery(grads, orders_of(key, size))
    lengths = np.linalg.norm(grads, axis=1)
    np.testing.assert_allclose(
        weights.sum(0) @ grads, expected, atol=1e-4 * sum(lengths)
    )


def test_with_two_tasks_hurts_neither():
    for kind in (*matrices.REGULAR, matrices.scaled, matrices.rank_one):
        grads = matrices.sample(kind, 2)
        updates = np.asarray(jitted(METHOD, 2)(grads)[0], np.float64)
        lengths = np.linalg.norm(grads, axis=1) * np.linalg.norm(grads)
        assert np.min(grads @ updates / lengths) > -1e-6


def test_without_conflict_is_the_sum():
    grads = matrices.sample(matrices.agreeing, 6)
    np.testing.assert_allclose(jitted(METHOD, 6)(grads)[0], grads.sum(0), rtol=1e-5)


def test_each_task_has_an_order_of_its_own():
    draw = jax.jit(functools.partial(orders_of_traced, size=8))
    orders = np.asarray(draw(jax.random.key(0)))
    assert len({tuple(order) for order in orders}) == 8
    # A key for which one order for all tasks would give another direction.
    grads, key = matrices.sample(matrices.narrow, 6), jax.random.key(2)
    orders = orders_of(key, 6)
    shared = references.surgery(grads, [orders[0]] * 6)
    got = jitted(METHOD, 6)(grads, key=key)[0]
    np.testing.assert_allclose(got, references.surgery(grads, orders), atol=1e-3)
    assert np.abs(got - shared).max() > 1e-2


def orders_of_traced(key, size):
    keys = jax.random.split(key, size)
    return jax.vmap(lambda k: jax.random.permutation(k, size))(keys)


def test_keys_reproduce_and_advance():
    grads = jnp.asarray(matrices.sample(matrices.narrow, 6), jnp.float32)
    tx = mtjax.pcgrad(key=jax.random.key(3))
    update = jax.jit(lambda state: tx.update(grads, state))
    state = tx.init(None)
    first, after = update(state)
    np.testing.assert_array_equal(update(state)[0], first)
    assert np.abs(update(after)[0] - first).max() > 1e-3


def test_mean_is_over_present_tasks():
    grads = jnp.asarray(matrices.sample(matrices.conflicting, 3), jnp.float32)
    present, key = jnp.array([True, False, True]), jax.random.key(0)
    total, mean = (
        jax.jit(functools.partial(tx.update, state=tx.init(None)))(
            grads, present=present, key=key
        )[0]
        for tx in (mtjax.pcgrad(), mtjax.pcgrad(reduction="mean"))
    )
    np.testing.assert_allclose(mean, total / 2, rtol=1e-5)
