import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.balancing.mgda import min_norm_weights
from tests.balancing import matrices, references

weigh = jax.jit(min_norm_weights)


def solve(grads):
    weights, _ = weigh(jnp.asarray(matrices.gramian(grads)))
    weights = np.asarray(weights, np.float64)
    return weights, weights @ grads


@pytest.mark.parametrize("size", [2, 16, 64])
@pytest.mark.parametrize(
    "kind", [*matrices.REGULAR, *matrices.DEGENERATE], ids=lambda k: k.__name__
)
def test_is_the_shortest_vector_in_the_hull(kind, size):
    for seed in range(2):
        grads = matrices.sample(kind, size, seed)
        weights, update = solve(grads)
        lengths = np.linalg.norm(grads, axis=1)
        expected = np.linalg.norm(references.shortest_in_hull(grads))
        assert np.linalg.norm(update) - expected < 1e-3 * lengths.min()
        # No task improves less than the update's squared norm says.
        missing = update @ update - grads @ update
        assert np.max(missing / lengths) < 1e-3 * lengths.min()
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1.0, abs=1e-5)


def test_closed_form_of_two_tasks():
    for seed in range(20):
        g1, g2 = grads = matrices.sample(matrices.scaled, 2, seed)
        share = np.clip((g2 - g1) @ g2 / ((g1 - g2) @ (g1 - g2)), 0.0, 1.0)
        np.testing.assert_allclose(solve(grads)[0], [share, 1 - share], atol=1e-5)


def test_orthogonal_gradients_weigh_by_inverse_squares():
    lengths = np.array([1.0, 2.0, 3.0, 4.0])
    weights, _ = solve(np.diag(lengths))
    np.testing.assert_allclose(weights, lengths**-2 / np.sum(lengths**-2), rtol=1e-5)


@pytest.mark.parametrize("normalize", ["none", "l2", "loss", "loss+l2"])
def test_normalisations(normalize):
    grads, losses = matrices.sample(matrices.normal, 4), np.array([0.1, 1.0, 2.0, 9.0])
    tx = mtjax.mgda(normalize=normalize)
    update = jax.jit(lambda g: tx.update(g, tx.init(None), losses=jnp.array(losses))[0])
    norms = np.linalg.norm(grads, axis=1)
    scale = {"none": 1.0, "l2": norms, "loss": losses, "loss+l2": losses * norms}
    weights, _ = solve(grads / np.broadcast_to(scale[normalize], 4)[:, None])
    got = update(jnp.asarray(grads, jnp.float32))
    np.testing.assert_allclose(got, weights @ grads, rtol=1e-3, atol=1e-3)


def test_zero_gradient_counts_as_absent():
    grads = matrices.sample(matrices.normal, 4)
    grads[1] = 0.0
    weights, _ = solve(grads)
    kept = np.delete(np.arange(4), 1)
    np.testing.assert_allclose(weights[kept], solve(grads[kept])[0], atol=1e-6)
    assert weights[1] == 0
