import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.balancing.dualproj import project_on_dual_cone
from tests.balancing import matrices, references

project = jax.jit(project_on_dual_cone, static_argnums=2)


def solve(grads, wanted=None, reg_eps=1e-4):
    size = len(grads)
    wanted = np.full(size, 1 / size) if wanted is None else np.asarray(wanted)
    gramian = jnp.asarray(matrices.gramian(grads))
    weights, _ = project(gramian, jnp.asarray(wanted, jnp.float32), reg_eps)
    return np.asarray(weights, np.float64)


@pytest.mark.parametrize("size", [2, 16])
@pytest.mark.parametrize("kind", matrices.REGULAR, ids=lambda k: k.__name__)
def test_is_the_closest_direction_that_hurts_no_task(kind, size):
    for seed in range(2):
        grads = matrices.sample(kind, size, seed)
        weights, mean = solve(grads, reg_eps=1e-7), grads.mean(axis=0)
        update = weights @ grads
        lengths = np.linalg.norm(grads, axis=1)
        slack = grads @ update / lengths / np.linalg.norm(mean)
        assert slack.min() > -1e-3
        # What was added to the mean pushes off the tasks that bind, and off no other.
        multipliers = weights - np.float32(1 / size)
        assert multipliers.min() >= 0
        assert np.all(np.abs(slack[multipliers > 0]) < 1e-3)
        assert np.linalg.norm(update) <= np.linalg.norm(mean) * (1 + 1e-3)


@pytest.mark.parametrize(
    "kind", [*matrices.REGULAR, *matrices.DEGENERATE], ids=lambda k: k.__name__
)
def test_weights_are_those_of_a_reference(kind):
    grads = matrices.sample(kind, 16)
    rounded = matrices.gramian(grads).astype(np.float64)
    expected = references.dual_cone_weights(rounded, np.full(16, 1 / 16), 1e-4)
    np.testing.assert_allclose(solve(grads), expected, rtol=1e-5, atol=1e-5)


def test_agreeing_gradients_give_the_mean():
    grads = matrices.sample(matrices.agreeing, 16)
    np.testing.assert_allclose(solve(grads), 1 / 16, rtol=1e-6)


def test_new_task_is_projected_off_the_old_ones():
    # Gradient episodic memory: the last task steps, the others must not be hurt.
    grads = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-2.0, 1.0, 3.0]])
    update = solve(grads, [0.0, 0.0, 1.0], 1e-7) @ grads
    np.testing.assert_allclose(update, [0.0, 1.0, 3.0], atol=1e-5)


def test_long_gradients_prevail_unlike_in_upgrad():
    tx, other = mtjax.dualproj(reg_eps=1e-7), mtjax.upgrad(reg_eps=1e-7)
    grads = jnp.array([[1.0, 0.0], [-10.0, 10.0]])
    update = tx.update(grads, tx.init(None))[0]
    np.testing.assert_allclose(update, [0.0, 5.0], atol=1e-3)
    update = other.update(grads, other.init(None))[0]
    np.testing.assert_allclose(update, [0.25, 5.25], atol=1e-3)


def test_preference_of_an_absent_task_is_left_out():
    tx = mtjax.dualproj(preference=[1.0, 3.0, 2.0])
    update = jax.jit(lambda g, present: tx.update(g, tx.init(None), present=present)[0])
    got = update(jnp.eye(3), jnp.array([True, False, True]))
    np.testing.assert_allclose(got, [1.0, 0.0, 2.0], rtol=1e-6)
