import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.balancing.imtl_g import equal_projection_weights
from tests.balancing import matrices, references_gradients

weigh = jax.jit(equal_projection_weights)


def solve(grads):
    return np.asarray(weigh(jnp.asarray(matrices.gramian(grads))), np.float64)


@pytest.mark.parametrize("size", [2, 6, 16])
@pytest.mark.parametrize(
    "kind",
    [*(k for k in matrices.REGULAR if k is not matrices.duplicated), matrices.scaled],
    ids=lambda k: k.__name__,
)
def test_is_the_papers_closed_form(kind, size):
    for seed in range(2):
        grads = matrices.sample(kind, size, seed)
        expected = references_gradients.equal_projections(grads)
        np.testing.assert_allclose(
            solve(grads) @ grads, expected, atol=2e-3 * np.linalg.norm(expected)
        )


@pytest.mark.parametrize("size", [2, 6, 16])
@pytest.mark.parametrize(
    "kind",
    [*matrices.REGULAR, *matrices.DEGENERATE],
    ids=lambda k: k.__name__,
)
def test_projections_are_equal_and_weights_sum_to_one(kind, size):
    for seed in range(2):
        grads = matrices.sample(kind, size, seed)
        lengths = np.linalg.norm(grads, axis=1)
        if np.any(lengths == 0):
            continue
        weights = solve(grads)
        assert weights.sum() == pytest.approx(1.0, abs=1e-4)
        projections = grads @ (weights @ grads) / lengths
        assert np.ptp(projections) < 1e-4 * lengths.min()


def test_at_stationary_points_it_vanishes():
    for kind in (matrices.strongly_stationary, matrices.weakly_stationary):
        grads = matrices.sample(kind, 6)
        shortest = np.linalg.norm(grads, axis=1).min()
        assert np.linalg.norm(solve(grads) @ grads) < 1e-4 * shortest


def test_weights_may_be_negative_and_stay_bounded():
    # The long gradient has to be taken back for the short one to keep up.
    angle = np.deg2rad(20.0)
    grads = np.array([[1.0, 0.0], [9.0 * np.cos(angle), 9.0 * np.sin(angle)]])
    weights = solve(np.vstack([grads, [0.0, -1.0]]))
    assert weights.min() < 0
    # Lengths for which the weights of the unit gradients would sum to zero.
    units = grads / np.linalg.norm(grads, axis=1, keepdims=True)
    units = np.vstack([units, [np.cos(2.0 * angle), np.sin(2.0 * angle)]])
    units = np.hstack([units, 0.3 * np.eye(3)])
    dual = np.linalg.solve(units @ units.T, np.ones(3)) / 1.0
    inverse = np.ones(3)
    inverse[1] = -(dual[0] + dual[2]) / dual[1]
    assert inverse[1] > 0
    singular = solve(units / inverse[:, None])
    assert np.all(np.isfinite(singular))
    assert np.abs(singular).max() < 2e4


def test_zero_gradient_counts_as_absent():
    grads = matrices.sample(matrices.normal, 4)
    without = solve(grads[[0, 1, 3]])
    grads[2] = 0.0
    np.testing.assert_allclose(solve(grads), np.insert(without, 2, 0.0), rtol=1e-4)
