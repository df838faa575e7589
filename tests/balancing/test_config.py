import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.balancing.config import conflict_free_weights
from tests.balancing import matrices, references_gradients

weigh = jax.jit(conflict_free_weights)


def solve(grads, preference):
    gramian = jnp.asarray(matrices.gramian(grads))
    weights = weigh(gramian, jnp.asarray(preference, jnp.float32))
    return np.asarray(weights, np.float64) @ grads


@pytest.mark.parametrize("size", [2, 6, 16])
@pytest.mark.parametrize(
    "kind", [*matrices.REGULAR, matrices.scaled], ids=lambda k: k.__name__
)
def test_is_the_pseudo_inverse_of_the_unit_gradients(kind, size):
    for preference in (np.ones(size), 1.0 + np.arange(size) % 3):
        grads = matrices.sample(kind, size)
        update = solve(grads, preference)
        if kind is matrices.duplicated:
            # Two preferences of one gradient: their mean.
            preference = 0.5 * (preference + np.roll(preference, size // 2))
        expected = references_gradients.conflict_free(grads, preference)
        np.testing.assert_allclose(
            update, expected, atol=1e-3 * np.linalg.norm(expected)
        )


@pytest.mark.parametrize("size", [2, 6])
def test_cosines_are_the_preference_and_the_length_that_of_the_projections(size):
    for kind in (matrices.normal, matrices.conflicting, matrices.scaled):
        grads, preference = matrices.sample(kind, size), 1.0 + np.arange(size)
        update = solve(grads, preference)
        length = np.linalg.norm(update)
        projections = grads @ update / length
        cosines = projections / np.linalg.norm(grads, axis=1)
        np.testing.assert_allclose(cosines / cosines[0], preference, rtol=5e-3)
        assert cosines.min() > 0
        assert length == pytest.approx(projections.sum(), rel=1e-3)


def test_two_tasks_have_the_direction_of_the_bisector():
    grads = np.array([[3.0, 0.0], [-4.0, 4.0]])
    bisector = np.array([1.0 - np.sqrt(0.5), np.sqrt(0.5)])
    direction = bisector / np.linalg.norm(bisector)
    expected = np.sum(grads @ direction) * direction
    np.testing.assert_allclose(solve(grads, np.ones(2)), expected, rtol=1e-5)


def test_opposite_gradients_have_no_direction():
    grads = np.array([[3.0, 4.0], [-6.0, -8.0]])
    np.testing.assert_allclose(solve(grads, np.ones(2)), 0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("preference", "found"), [([1.0, -1.0], "negative"), ([0.0, 0.0], "positive")]
)
def test_preference_is_checked(preference, found):
    with pytest.raises(ValueError, match=f"`preference` must .*{found}"):
        mtjax.config(preference=preference)


def test_preference_of_the_wrong_length_is_refused():
    tx = mtjax.config(preference=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="each of the 2 tasks"):
        tx.update(jnp.eye(2), tx.init(None))
