import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from tests.balancing import model


def reference(steps, step_size):
    """The public code's loop, in float64: weights after each step."""
    squares, weights, first = 0.0, np.ones(len(steps[0])), None
    for grads in steps:
        squares = squares + grads**2
        excess = (grads**2 / np.sqrt(squares + 1e-7)).sum(axis=1)
        first = excess if first is None else first
        weights = weights * np.exp(step_size * excess / first)
        weights *= len(weights) / weights.sum()
        yield weights


def compiled(tx):
    update = jax.jit(lambda g, s, p: tx.update(g, s, present=p))
    return lambda g, s, p=(True,) * 3: update(
        jnp.asarray(g, jnp.float32), s, jnp.array(p)
    )


def test_follows_the_public_code():
    tx = mtjax.excess_mtl(3, step_size=0.5)
    update, state = compiled(tx), tx.init(jnp.zeros(4))
    steps = np.random.default_rng(0).standard_normal((5, 3, 4))
    steps[:, 1] *= 0.7 ** np.arange(5)[:, None]
    for grads, weights in zip(steps, reference(steps, 0.5)):
        got, state = update(grads, state)
        np.testing.assert_allclose(got, weights @ grads, rtol=1e-4, atol=1e-5)
        assert weights.sum() == pytest.approx(3.0)
    assert abs(weights - 1).max() > 0.1


def test_equal_relative_risks_leave_the_weights_as_they_are():
    tx = mtjax.excess_mtl(3, step_size=1.0)
    update, state = compiled(tx), tx.init(jnp.zeros(3))
    for factor in (1.0, 0.5, 0.7):
        grads = factor * np.diag([1.0, 10.0, 100.0])
        got, state = update(grads, state)
        np.testing.assert_allclose(got, np.diagonal(grads), rtol=1e-4)


def test_a_task_at_its_optimum_loses_weight_and_a_noisy_one_gains_none():
    """The loss of the noisy task is large and stays; its gradient averages out."""
    tx = mtjax.excess_mtl(3, step_size=0.1)
    update, state = compiled(tx), tx.init(jnp.zeros(3))
    for i in range(20):
        grads = np.diag([0.5**i, 1.0, 1.0])
        _, state = update(grads, state)
    shares = np.asarray(jax.nn.softmax(state.logits))
    assert shares[0] < shares[1] == shares[2]


def test_a_zero_gradient_is_no_baseline_and_an_absent_task_starts_late():
    tx = mtjax.excess_mtl(3, step_size=0.5)
    update, state = compiled(tx), tx.init(jnp.zeros(3))
    start = np.diag([0.0, 1.0, 2.0])
    _, state = update(start, state, (True, True, False))
    np.testing.assert_allclose(state.first, [0.0, 1.0, 0.0], rtol=1e-5)
    np.testing.assert_array_equal(state.squares[2], 0.0)
    _, state = update(np.diag([3.0, 1.0, 2.0]), state)
    np.testing.assert_allclose(state.first, [3.0, 1.0, 2.0], rtol=1e-5)
    ratios = np.array([1.0, 1.0 + 1 / np.sqrt(2), 1.0])
    np.testing.assert_allclose(state.logits, 0.5 * ratios, rtol=1e-5)


def test_weighs_own_parameters_too_and_measures_the_shared_ones():
    params = model.params()
    tx = mtjax.excess_mtl(3, step_size=0.5)
    state = tx.init(params)
    for seed in range(2):
        losses, grads = model.grad_fn(params, model.batch(seed=seed))
        updates, state = tx.update(grads, state, params, losses=losses)
    weights = 3 * jax.nn.softmax(state.logits)
    plain = grads.combine()
    for i, name in enumerate(model.NAMES):
        np.testing.assert_allclose(
            updates["heads"][name], weights[i] * plain["heads"][name], rtol=1e-4
        )
        np.testing.assert_array_equal(state.squares["heads"][name], 0.0)
    assert np.all(np.asarray(state.squares["trunk"]["kernel"]) > 0)


def test_a_gradient_that_is_not_finite_does_not_stay():
    tx = mtjax.excess_mtl(3)
    update = compiled(tx)
    _, state = update(np.eye(3), tx.init(jnp.zeros(3)))
    got, after = update(np.diag([1.0, np.nan, 1.0]), state)
    assert np.isnan(got[1])
    assert after.logits[1] == state.logits[1]
    np.testing.assert_array_equal(after.squares[1], state.squares[1])
    assert np.all(np.isfinite(after.logits))


def test_bad_step_size():
    with pytest.raises(ValueError, match="`step_size` must be positive, got 0"):
        mtjax.excess_mtl(2, step_size=0.0)
