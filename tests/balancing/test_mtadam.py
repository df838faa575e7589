import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from tests.balancing import matrices


def samples(count, size=3):
    rows = [matrices.sample(matrices.normal, size, seed) for seed in range(count)]
    return [g * np.array([1.0, 50.0, 0.02])[:, None] for g in rows]


def test_is_the_algorithm_on_whole_gradients():
    tx = mtjax.mtadam(3, b1=0.8, b2=0.9, b3=0.7, eps=1e-6)
    update, state = jax.jit(tx.update), tx.init(jnp.zeros(matrices.DIMENSION))
    norms, first, second = np.zeros(3), 0.0, 0.0
    for i, grads in enumerate(samples(4), start=1):
        lengths = np.linalg.norm(grads, axis=1)
        norms = lengths if i == 1 else 0.7 * norms + 0.3 * lengths
        g = grads * (norms[0] / norms)[:, None]
        first, second = 0.8 * first + 0.2 * g, 0.9 * second + 0.1 * g**2
        roots = np.sqrt(second / (1 - 0.9**i)).max(axis=0)
        expected = np.sum(first / (1 - 0.8**i), axis=0) / (roots + 1e-6)
        updates, state = update(jnp.asarray(grads, jnp.float32), state)
        np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-4)


def test_one_task_is_adam():
    tx, adam = mtjax.mtadam(1), optax.scale_by_adam()
    state, adam_state = tx.init(jnp.zeros(80)), adam.init(jnp.zeros(80))
    for grads in samples(3):
        row = jnp.asarray(grads[:1], jnp.float32)
        updates, state = tx.update(row, state)
        expected, adam_state = adam.update(row[0], adam_state)
        np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-5)


def test_each_leaf_has_norms_of_its_own():
    tx = mtjax.mtadam(2)
    tree = {"a": jnp.array([[4.0], [1.0]]), "b": jnp.array([[0.0], [9.0]])}
    updates, state = tx.update(tree, tx.init(jax.tree.map(lambda x: x[0], tree)))
    np.testing.assert_allclose(state.norms["a"], [4.0, 1.0])
    # In the second leaf the second task is the first that has a gradient.
    np.testing.assert_allclose(updates["a"], [2.0], rtol=1e-4)
    np.testing.assert_allclose(updates["b"], [1.0], rtol=1e-4)


def test_absent_task_keeps_its_moments():
    tx = mtjax.mtadam(3)
    first, second = (jnp.asarray(g, jnp.float32) for g in samples(2))
    _, state = tx.update(first, tx.init(first[0]))
    few = jnp.array([True, False, True])
    _, after = tx.update(second.at[1].set(jnp.nan), state, present=few)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        moved = np.asarray(old != new).reshape(3, -1).any(axis=1)
        np.testing.assert_array_equal(moved, few)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`b3` must be in \[0, 1\), got 1.0"):
        mtjax.mtadam(2, b3=1.0)
    with pytest.raises(ValueError, match="`eps` must be positive, got 0"):
        mtjax.mtadam(2, eps=0.0)
