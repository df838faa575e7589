import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax

GRADS = np.array([[1.0, -2.0, 3.0, 0.0, 1.0], [-3.0, -1.0, -3.0, 0.0, 0.5]])


def many(tx, grads, count):
    """Updates for many keys, one per row."""
    update = lambda key: tx.update(jnp.asarray(grads), tx.init(None), key=key)[0]
    return np.asarray(
        jax.jit(jax.vmap(update))(jax.random.split(jax.random.key(1), count))
    )


def test_one_sign_survives_in_each_element():
    positive = np.where(GRADS > 0, GRADS, 0.0).sum(axis=0)
    negative = np.where(GRADS < 0, GRADS, 0.0).sum(axis=0)
    for update in many(mtjax.graddrop(), GRADS.astype(np.float32), 20):
        assert np.all(np.isclose(update, positive) | np.isclose(update, negative))


def test_odds_are_the_purity():
    # P g_+ + (1 - P) g_- with P the share of the positive part in the absolute sum.
    positive = np.where(GRADS > 0, GRADS, 0.0).sum(axis=0)
    negative = np.where(GRADS < 0, GRADS, 0.0).sum(axis=0)
    purity = positive / np.maximum(positive - negative, 1e-9)
    expected = purity * positive + (1 - purity) * negative
    updates = many(mtjax.graddrop(), GRADS.astype(np.float32), 4000)
    np.testing.assert_allclose(updates.mean(axis=0), expected, atol=0.2)


def test_agreeing_signs_are_kept_whole():
    grads = np.abs(GRADS).astype(np.float32)
    updates = many(mtjax.graddrop(), grads, 200)
    np.testing.assert_allclose(updates, np.tile(grads.sum(axis=0), (200, 1)))
    np.testing.assert_allclose(many(mtjax.graddrop(), -grads, 200), -updates)


@pytest.mark.parametrize("leak", [[1.0, 1.0], [1.0, 0.0]])
def test_leak_lets_a_task_through(leak):
    tx = mtjax.graddrop(leak=leak)
    updates = many(tx, GRADS.astype(np.float32), 50)
    if leak == [1.0, 1.0]:
        np.testing.assert_allclose(updates, np.tile(GRADS.sum(axis=0), (50, 1)))
    else:
        # Of the second task either everything survives or nothing.
        rest = updates - GRADS[0]
        assert np.all(np.isclose(rest, GRADS[1]) | np.isclose(rest, 0.0))


def test_leaves_draw_independently_and_keys_advance():
    leaf = jnp.tile(jnp.array([[1.0], [-1.0]]), (1, 50))
    tx = mtjax.graddrop()
    update = jax.jit(functools.partial(tx.update, {"a": leaf, "b": leaf}))
    first, state = update(tx.init(None))
    again, _ = update(tx.init(None))
    second, _ = update(state)
    np.testing.assert_array_equal(first["a"], again["a"])
    assert np.any(first["a"] != first["b"])
    assert np.any(first["a"] != second["a"])
