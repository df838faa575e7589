import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import mtjax
from mtjax.balancing import conflict_averse_weights, imbalance_sensitive_weights
from tests.balancing import matrices, references

weigh = jax.jit(imbalance_sensitive_weights, static_argnums=2)


def solve(grads, c):
    present = jnp.ones(len(grads), bool)
    weights, _ = weigh(jnp.asarray(matrices.gramian(grads)), present, c)
    return np.asarray(weights, np.float64)


def by_definition(grads, c):
    """The direction, and the weights that minimise the public code's objective."""
    mean, shortest = grads.mean(axis=0), references.shortest_in_hull(grads)
    length = np.linalg.norm(mean)
    gamma = mean @ shortest / length / np.linalg.norm(shortest)

    def objective(w):
        combined = w @ grads
        balance = gamma * c * length * np.linalg.norm(combined)
        return ((1.5 - gamma) * combined @ mean + balance) / length**2

    size = len(grads)
    weights = minimize(
        objective,
        np.full(size, 1 / size),
        bounds=[(0, 1)] * size,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    ).x
    combined = weights @ grads
    return mean + c * length * combined / np.linalg.norm(combined)


@pytest.mark.parametrize("c", [0.5, 0.8])
@pytest.mark.parametrize("kind", matrices.REGULAR, ids=lambda k: k.__name__)
def test_is_the_direction_of_the_definition(kind, c):
    for size in (2, 6):
        grads = matrices.sample(kind, size)
        update, expected = solve(grads, c) @ grads, by_definition(grads, c)
        missed = np.linalg.norm(update - expected)
        assert missed < 2e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("size", [2, 16, 64])
def test_correction_has_the_length_of_the_radius(size):
    for kind in matrices.REGULAR:
        grads = matrices.sample(kind, size)
        mean, update = grads.mean(axis=0), solve(grads, 0.5) @ grads
        assert np.linalg.norm(update - mean) == pytest.approx(
            0.5 * np.linalg.norm(mean), rel=1e-4
        )


def test_is_cagrad_at_a_cosine_of_three_quarters():
    # The first gradient is the shortest vector; the mean is (3, sqrt(7)) / 3.
    grads = np.array([[1.0, 0.0], [1.0, 2.0 * np.sqrt(7.0) / 3.0]])
    gramian = jnp.asarray(matrices.gramian(grads))
    expected, _ = conflict_averse_weights(gramian, jnp.ones(2, bool), 0.5)
    np.testing.assert_allclose(solve(grads, 0.5), expected, rtol=1e-5)


def test_at_stationary_points_the_most_opposed_gradient_is_followed():
    for seed in range(4):
        grads = matrices.sample(matrices.strongly_stationary, 6, seed)
        mean = grads.mean(axis=0)
        worst = grads[np.argmin(grads @ mean)]
        expected = mean + 0.5 * np.linalg.norm(mean) * worst / np.linalg.norm(worst)
        np.testing.assert_allclose(solve(grads, 0.5) @ grads, expected, atol=1e-4)


def test_radius_zero_gives_the_mean():
    grads = matrices.sample(matrices.normal, 6)
    np.testing.assert_allclose(solve(grads, 0.0), 1 / 6, rtol=1e-6)


@pytest.mark.parametrize(("rescale", "divisor"), [(0, 1.0), (1, 1.25), (2, 1.5)])
def test_equal_gradients_and_rescaling(rescale, divisor):
    tx = mtjax.imgrad(c=0.5, rescale=rescale)
    grads = jnp.tile(jnp.array([[3.0, -4.0]]), (3, 1))
    expected = 1.5 * np.array([3.0, -4.0]) / divisor
    update = jax.jit(lambda g: tx.update(g, tx.init(None))[0])(grads)
    np.testing.assert_allclose(update, expected, rtol=1e-5)
