import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from tests.balancing import matrices, references_gradients


@functools.cache
def updater(num_tasks, **options):
    """A compiled `(grads, state, present) -> update, state`; the first task leads."""
    tx = mtjax.pcd(num_tasks, 0, **options)
    step = jax.jit(lambda g, state, present: tx.update(g, state, present=present))

    def call(grads, state=None, present=None):
        present = np.ones(num_tasks, bool) if present is None else present
        state = tx.init(None) if state is None else state
        updates, state = step(jnp.asarray(grads, jnp.float32), state, present)
        return np.asarray(updates, np.float64), state

    return call


# Where all promises can be kept.
KINDS = (
    matrices.normal,
    matrices.conflicting,
    matrices.agreeing,
    matrices.duplicated,
    matrices.scaled,
)


@pytest.mark.parametrize("size", [2, 4, 16])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_is_the_direction_of_a_float64_reference(kind, size):
    tau = np.linspace(0.0, 0.5, size - 1)
    update = updater(size, tau=tuple(tau.tolist()), eps=0.0)
    for seed in range(3):
        first, second = (matrices.sample(kind, size, s) for s in (seed, seed + 10))
        _, state = update(first)
        found, _ = update(second, state)
        squares = np.sum(first**2, axis=1), np.sum(second**2, axis=1)
        norms = np.sqrt((0.999 * squares[0] + squares[1]) / 1.999)
        expected = references_gradients.prioritised(second, norms, tau)
        missed = np.linalg.norm(found - expected)
        assert missed < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("size", [2, 3, 8, 16])
@pytest.mark.parametrize("tau", [0.02, 0.5])
def test_promises_are_kept_and_no_multiplier_is_wasted(size, tau):
    update = updater(size, tau=tau)
    for kind in (matrices.normal, matrices.conflicting, matrices.narrow):
        for seed in range(3):
            grads = matrices.sample(kind, size, seed)
            units = grads / np.linalg.norm(grads, axis=1, keepdims=True)
            found, _ = update(grads)
            assert np.linalg.norm(found) == pytest.approx(
                np.linalg.norm(grads[0]), rel=1e-4
            )
            # The direction before rescaling has a multiplier of one on the first.
            weights = np.linalg.lstsq(units.T, found)[0]
            direction = found / weights[0]
            slack = units[1:] @ direction - tau
            scale = np.linalg.norm(direction)
            assert slack.min() > -1e-4 * scale
            multipliers = weights[1:] / weights[0]
            assert multipliers.min() > -1e-3 * scale
            assert np.abs(multipliers * slack).max() < 1e-3 * scale**2


def test_without_conflict_the_primary_gradient_is_followed():
    grads = matrices.sample(matrices.agreeing, 6)
    np.testing.assert_allclose(updater(6)(grads)[0], grads[0], rtol=1e-6)


def test_no_primary_gradient_no_update():
    grads = matrices.sample(matrices.normal, 3)
    update = updater(3)
    np.testing.assert_array_equal(update(grads, present=[False, True, True])[0], 0.0)
    grads[0] = 0.0
    np.testing.assert_array_equal(update(grads)[0], 0.0)


def test_contradictory_promises_are_dropped():
    rng = np.random.default_rng(0)
    for size in (3, 4, 16):
        opposite = matrices.sample(matrices.normal, size)
        opposite[-1] = -3.0 * opposite[-2]
        balanced = matrices.sample(matrices.normal, size)
        balanced[-1] = -rng.uniform(0.5, 1.0, size - 2) @ balanced[1:-1]
        for grads in (opposite, balanced):
            found, _ = updater(size)(grads)
            np.testing.assert_allclose(found, grads[0], rtol=1e-5)


def test_promises_that_barely_agree_are_kept():
    grads = np.array([[0.0, -1.0, 1.0], [1.0, 0.02, 0.0], [-1.0, 0.02, 0.0]])
    found, _ = updater(3)(grads)
    expected = references_gradients.prioritised(
        grads, np.linalg.norm(grads, axis=1), 0.02
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_update_vanishes_if_its_direction_does():
    grads = np.array([[3.0, -4.0], [-6.0, 8.0]])
    np.testing.assert_array_equal(updater(2, tau=0.0)(grads)[0], 0.0)
    # With any promise there is a direction: the secondary task's own.
    found, _ = updater(2, tau=0.02)(grads)
    np.testing.assert_allclose(found, [-3.0, 4.0], rtol=1e-4)


def test_units_of_a_secondary_loss_do_not_matter():
    first, second = (matrices.sample(matrices.conflicting, 5, s) for s in range(2))
    update = updater(5)
    factors = np.array([1.0, 1e6, 1.0, 1e-2, 1.0])[:, None]
    before, _ = update(second, update(first)[1])
    after, _ = update(factors * second, update(factors * first)[1])
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def test_without_eps_tiny_gradients_are_treated_like_large_ones():
    grads = matrices.sample(matrices.conflicting, 5)
    found, _ = updater(5, eps=0.0)(1e-8 * grads)
    expected, _ = updater(5, eps=0.0)(grads)
    np.testing.assert_allclose(1e8 * found, expected, rtol=1e-4, atol=1e-4)


def test_an_absent_task_is_promised_nothing_and_keeps_its_average():
    grads = matrices.sample(matrices.conflicting, 3)
    update = updater(3)
    _, state = update(grads)
    found, after = update(2.0 * grads, state, [True, True, False])
    assert after.squares[2] == state.squares[2]
    assert after.totals[2] == state.totals[2]
    fewer = updater(2)
    expected, _ = fewer(2.0 * grads[:2], fewer(grads[:2])[1])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_primary_by_name_and_fractions_in_the_order_of_the_others():
    rows = matrices.sample(matrices.conflicting, 3)
    names = ("a", "b", "c")
    tx = mtjax.pcd(3, "b", tau=[0.1, 0.4])

    @jax.jit
    def update(grads):
        losses = dict.fromkeys(names, jnp.ones(()))
        return tx.update(grads, tx.init(None), losses=losses)[0]

    moved = [1, 0, 2]
    expected, _ = updater(3, tau=(0.1, 0.4))(rows[moved])
    found = update(jnp.asarray(rows, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
