import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.balancing.conic_grad import conic_weights
from tests.balancing import matrices, references, references_gradients

weigh = jax.jit(conic_weights, static_argnums=2)


def solve(grads, c):
    present = jnp.ones(len(grads), bool)
    weights = weigh(jnp.asarray(matrices.gramian(grads)), present, c)
    return np.asarray(weights, np.float64) @ grads


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("c", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", matrices.REGULAR, ids=lambda k: k.__name__)
def test_no_direction_in_the_cone_is_better(kind, c):
    for seed in range(2):
        grads = matrices.sample(kind, 6, seed)
        update, mean = solve(grads, c), grads.mean(axis=0)
        assert cosine(update, mean) > c - 1e-3
        worst = np.min(grads @ update) / np.linalg.norm(update)
        best = references_gradients.best_in_cone(grads, c)
        assert abs(worst - best) < 1e-3 * np.linalg.norm(grads, axis=1).mean()


@pytest.mark.parametrize(
    "kind", [*matrices.REGULAR, *matrices.DEGENERATE], ids=lambda k: k.__name__
)
def test_length_is_that_of_the_mean_and_the_angle_is_kept(kind):
    for size in (2, 6):
        grads = matrices.sample(kind, size)
        update, mean = solve(grads, 0.5), grads.mean(axis=0)
        if np.linalg.norm(mean) < 1e-6 * np.linalg.norm(grads):
            continue
        length = np.linalg.norm(mean)
        assert np.linalg.norm(update) == pytest.approx(length, rel=2e-2)
        assert cosine(update, mean) > 0.5 - 5e-3


def test_is_parallel_to_mgda_where_that_lies_in_the_cone():
    grads = matrices.sample(matrices.normal, 6)
    shortest = references.shortest_in_hull(grads)
    angle = np.arccos(cosine(shortest, grads.mean(axis=0)))
    inside, narrow = np.cos(1.2 * angle), np.cos(0.8 * angle)
    assert cosine(solve(grads, inside), shortest) > 1 - 1e-5
    outside = solve(grads, narrow)
    assert cosine(outside, shortest) < 1 - 1e-4
    assert cosine(outside, grads.mean(axis=0)) == pytest.approx(narrow, abs=1e-3)


def test_a_narrow_cone_is_the_mean():
    grads = matrices.sample(matrices.conflicting, 6)
    assert cosine(solve(grads, 0.9999), grads.mean(axis=0)) > 0.9998


def test_opposite_gradients_leave_the_mean():
    grads = np.array([[3.0, 4.0], [-1.2, -1.6]])
    np.testing.assert_allclose(solve(grads, 0.5), grads.mean(0), rtol=1e-3)


def test_zero_gradient_counts_in_the_mean_alone():
    grads = matrices.sample(matrices.conflicting, 5)
    grads[2] = 0.0
    update, mean = solve(grads, 0.3), grads.mean(axis=0)
    assert np.linalg.norm(update) == pytest.approx(np.linalg.norm(mean), rel=1e-3)
    others = np.delete(np.arange(5), 2)
    assert np.min(grads[others] @ update) > np.min(grads[others] @ mean)


@pytest.mark.parametrize("c", [-0.1, 1.0])
def test_c_is_a_cosine(c):
    with pytest.raises(ValueError, match=r"`c` must be in \[0, 1\), got"):
        mtjax.conic_grad(c=c)
