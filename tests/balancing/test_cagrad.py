import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.balancing import conflict_averse_weights
from tests.balancing import matrices, references
from tests.balancing.catalogue import METHODS, jitted

weigh = jax.jit(conflict_averse_weights, static_argnums=2)
METHOD = next(m for m in METHODS if m.factory is mtjax.cagrad)


def solve(grads, c):
    present = jnp.ones(len(grads), bool)
    weights, _ = weigh(jnp.asarray(matrices.gramian(grads)), present, c)
    return np.asarray(weights, np.float64)


@pytest.mark.parametrize("c", [0.2, 0.5])
@pytest.mark.parametrize("kind", matrices.REGULAR, ids=lambda k: k.__name__)
def test_is_the_optimum_of_the_primal_problem(kind, c):
    for seed in range(2):
        grads = matrices.sample(kind, 6, seed)
        update = solve(grads, c) @ grads
        expected = references.conflict_averse(grads, c)
        length = np.linalg.norm(grads, axis=1).mean() * np.linalg.norm(expected)
        assert abs(np.min(grads @ update) - np.min(grads @ expected)) < 1e-4 * length


@pytest.mark.parametrize("size", [2, 16, 64])
@pytest.mark.parametrize(
    "kind",
    [
        *matrices.REGULAR,
        *(k for k in matrices.DEGENERATE if k is not matrices.weakly_stationary),
    ],
    ids=lambda k: k.__name__,
)
def test_no_direction_in_the_ball_is_better(kind, size):
    c, tolerance = 0.5, 1e-4 if kind in matrices.REGULAR else 1e-3
    for seed in range(2):
        grads = matrices.sample(kind, size, seed)
        mean, lengths = grads.mean(axis=0), np.linalg.norm(grads, axis=1)
        weights = solve(grads, c)
        update = weights @ grads
        radius = c * np.linalg.norm(mean)
        assert np.linalg.norm(update - mean) == pytest.approx(radius, rel=tolerance)
        # By weak duality any weights bound the worst improvement from above.
        mix = np.maximum(weights - np.float32(1 / size), 0.0)
        mixed = mix @ grads / mix.sum()
        bound = mixed @ mean + radius * np.linalg.norm(mixed)
        missing = (bound - grads @ update) / lengths
        # The rounding of the Gramian hides what is 1e-6 of the gradients.
        rounding = 1e-6 * lengths.mean()
        assert np.max(missing) < 1e-4 * np.linalg.norm(mean) + rounding


@pytest.mark.parametrize("c", [0.5, 2.0])
@pytest.mark.parametrize("kind", matrices.DEGENERATE, ids=lambda k: k.__name__)
def test_where_nothing_improves_all_tasks_it_stays_in_the_ball(kind, c):
    for size in (6, 16):
        grads = matrices.sample(kind, size)
        mean, lengths = grads.mean(axis=0), np.linalg.norm(grads, axis=1)
        update = solve(grads, c) @ grads
        radius = c * np.linalg.norm(mean)
        assert np.linalg.norm(update - mean) <= radius * (1 + 1e-3)
        improvement = grads @ update / lengths / np.linalg.norm(mean)
        before = grads @ mean / lengths / np.linalg.norm(mean)
        assert improvement.min() > min(before.min(), 0.0) - 0.05


def test_radius_zero_gives_the_mean():
    grads = matrices.sample(matrices.normal, 6)
    np.testing.assert_allclose(solve(grads, 0.0), 1 / 6, rtol=1e-6)


@pytest.mark.parametrize(("rescale", "divisor"), [(0, 1.0), (1, 1.25), (2, 1.5)])
def test_equal_gradients_and_rescaling(rescale, divisor):
    tx = mtjax.cagrad(c=0.5, rescale=rescale)
    update = jax.jit(functools.partial(tx.update, state=tx.init(None)))
    grads = jnp.tile(jnp.array([[3.0, -4.0]]), (3, 1))
    expected = 1.5 * np.array([3.0, -4.0]) / divisor
    np.testing.assert_allclose(update(grads)[0], expected, rtol=1e-5)


def test_zero_gradient_counts_in_the_mean_alone():
    grads = matrices.sample(matrices.conflicting, 6)
    grads[2] = 0.0
    update = 1.25 * np.asarray(jitted(METHOD, 6)(grads)[0], np.float64)
    mean = grads.mean(axis=0)
    assert np.linalg.norm(update - mean) == pytest.approx(
        0.5 * np.linalg.norm(mean), rel=1e-3
    )
    others = np.delete(np.arange(6), 2)
    assert np.min(grads[others] @ update) > np.min(grads[others] @ mean)
