import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.balancing.upgrad import projection_weights
from tests.balancing import matrices, references

weigh = jax.jit(projection_weights, static_argnums=2)


def solve(grads, reg_eps=1e-4):
    preference = jnp.full(len(grads), 1 / len(grads))
    weights, _ = weigh(jnp.asarray(matrices.gramian(grads)), preference, reg_eps)
    return np.asarray(weights, np.float64)


@pytest.mark.parametrize("size", [2, 16, 64])
@pytest.mark.parametrize(
    "kind", [*matrices.REGULAR, *matrices.DEGENERATE], ids=lambda k: k.__name__
)
def test_weights_are_those_of_a_reference(kind, size):
    grads = matrices.sample(kind, size)
    rounded = matrices.gramian(grads).astype(np.float64)
    expected = references.mean_projection(rounded, 1e-4)
    np.testing.assert_allclose(solve(grads), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 16, 64])
@pytest.mark.parametrize("kind", matrices.REGULAR, ids=lambda k: k.__name__)
def test_hurts_no_task(kind, size):
    for seed in range(3):
        grads = matrices.sample(kind, size, seed)
        update = solve(grads) @ grads
        lengths = np.linalg.norm(grads, axis=1) * np.linalg.norm(update)
        assert np.min(grads @ update / lengths) > -2e-3


def test_agreeing_gradients_give_the_mean():
    grads = matrices.sample(matrices.agreeing, 16)
    np.testing.assert_allclose(solve(grads), 1 / 16, rtol=1e-5)


def test_two_tasks_project_on_each_others_complement():
    g1, g2 = grads = np.array([[1.0, 0.0], [-2.0, 1.0]])
    p1 = g1 - (g1 @ g2) / (g2 @ g2) * g2
    p2 = g2 - (g2 @ g1) / (g1 @ g1) * g1
    update = solve(grads, 1e-7) @ grads
    np.testing.assert_allclose(update, 0.5 * (p1 + p2), atol=1e-4)


def test_preference_weighs_the_projections():
    tx = mtjax.upgrad(preference=[0.0, 2.0], reg_eps=1e-7)
    update = jax.jit(lambda g: tx.update(g, tx.init(None))[0])
    expected = 2.0 * np.array([0.0, 1.0])
    got = update(jnp.array([[1.0, 0.0], [-2.0, 1.0]]))
    np.testing.assert_allclose(got, expected, atol=2e-3)
