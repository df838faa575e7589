import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import mtjax
from mtjax.balancing.fair_grad import fair_weights
from tests.balancing import matrices, references

ALPHAS = (0.5, 1.0, 2.0, 5.0)
weigh = jax.jit(fair_weights, static_argnames="alpha")


def solve(grads, alpha):
    weights, info = weigh(jnp.asarray(matrices.gramian(grads)), alpha=alpha)
    return np.asarray(weights, np.float64), info


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equation_holds(alpha):
    for kind in matrices.REGULAR:
        grads = matrices.sample(kind, 6)
        weights, info = solve(grads, alpha)
        assert bool(info.converged)
        gramian = matrices.gramian(grads).astype(np.float64)
        np.testing.assert_allclose(
            gramian @ weights, weights ** (-1 / alpha), rtol=1e-4
        )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_are_those_of_a_reference(alpha):
    for kind in (*matrices.REGULAR, matrices.scaled):
        grads = matrices.sample(kind, 6)
        expected = references.fair_weights(matrices.gramian(grads), alpha)
        np.testing.assert_allclose(solve(grads, alpha)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_improvements_are_the_fairest_in_a_ball(alpha):
    grads = matrices.sample(matrices.conflicting, 4)
    grads /= np.linalg.norm(grads, axis=1).mean()
    update = solve(grads, alpha)[0] @ grads
    radius = np.linalg.norm(update)

    def utility(d):
        improvements = grads @ (d * radius / np.linalg.norm(d))
        if improvements.min() <= 0:
            return np.inf
        return -np.sum(improvements ** (1 - alpha)) / (1 - alpha)

    rng = np.random.default_rng(0)
    for size in (1e-1, 1e-2):
        for _ in range(20):
            other = update + size * radius * rng.standard_normal(len(update)) / 9
            assert utility(other) > utility(update)
    best = minimize(utility, update, method="Nelder-Mead", options={"maxiter": 200})
    assert best.fun > utility(update) - 1e-4 * abs(utility(update))


def test_alpha_one_is_nash_mtl_before_clipping():
    grads = jnp.asarray(matrices.sample(matrices.conflicting, 6), jnp.float32)
    fair, nash = mtjax.fair_grad(6), mtjax.nash_mtl(6, max_norm=None)
    expected = nash.update(grads, nash.init(None))[0]
    np.testing.assert_allclose(
        fair.update(grads, fair.init(None))[0], expected, rtol=1e-3, atol=1e-5
    )


def test_orthogonal_gradients_have_a_closed_form():
    lengths = np.array([1e-3, 1.0, 2.0, 1e4])
    for alpha in ALPHAS:
        weights, _ = solve(np.diag(lengths), alpha)
        expected = lengths ** (-2 * alpha / (1 + alpha))
        np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_large_alpha_evens_out_the_improvements():
    grads = matrices.sample(matrices.scaled, 4)
    spreads = []
    for alpha in (0.5, 1.0, 5.0):
        improvements = grads @ (solve(grads, alpha)[0] @ grads)
        spreads.append(np.log(improvements.max() / improvements.min()))
    assert spreads[0] > spreads[1] > spreads[2] > 0


def test_scaling_all_losses():
    grads = matrices.sample(matrices.conflicting, 6)
    for alpha in (0.5, 2.0):
        before = solve(grads, alpha)[0] @ grads
        after = solve(64.0 * grads, alpha)[0] @ (64.0 * grads)
        expected = before * 64.0 ** ((1 - alpha) / (1 + alpha))
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_recovers_at_once_from_a_stationary_step(alpha):
    tx = mtjax.fair_grad(6, alpha=alpha)
    update = jax.jit(tx.update)
    stationary = jnp.asarray(matrices.sample(matrices.rank_one, 6), jnp.float32)
    grads = matrices.sample(matrices.normal, 6)
    _, state = update(stationary, tx.init(None))
    got, _ = update(jnp.asarray(grads, jnp.float32), state)
    expected = solve(grads, alpha)[0] @ grads
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_zero_gradient_has_no_weight():
    grads = matrices.sample(matrices.normal, 4)
    kept = np.delete(np.arange(4), 1)
    expected = solve(grads[kept], 2.0)[0]
    grads[1] = 0.0
    weights, _ = solve(grads, 2.0)
    np.testing.assert_allclose(weights[kept], expected, rtol=1e-5)
    assert weights[1] == 0
