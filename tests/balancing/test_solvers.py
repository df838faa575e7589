import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.balancing.solvers import (
    bounded_qp,
    fair_equilibrium,
    in_units,
    shortest_in_hull,
)
from mtjax.balancing.twofold import residual, two_sum
from tests.balancing import matrices

SIZES = (2, 16, 64)
each_size = pytest.mark.parametrize("size", SIZES)
each_regular = pytest.mark.parametrize(
    "kind", matrices.REGULAR, ids=lambda k: k.__name__
)
each_degenerate = pytest.mark.parametrize(
    "kind", matrices.DEGENERATE, ids=lambda k: k.__name__
)
solve_qp = jax.jit(bounded_qp)
solve_hull = jax.jit(shortest_in_hull)
solve_fair = jax.jit(fair_equilibrium, static_argnames="power")


def scaled_gramian(kind, size, seed=0):
    return in_units(jnp.asarray(matrices.gramian(matrices.sample(kind, size, seed))))


@each_size
@each_regular
def test_qp_fulfils_its_optimality_conditions_in_float64(kind, size):
    matrix = scaled_gramian(kind, size).matrix
    exact = np.asarray(matrix, np.float64)
    rng = np.random.default_rng(0)
    # A bound of zero, as of MGDA, and bounds that pull the solution up, as of UPGrad.
    for linear, lower in (
        (-np.ones(size), 0.0),
        (np.zeros(size), rng.uniform(size=size)),
    ):
        linear = np.asarray(linear, np.float32)
        lower = np.broadcast_to(np.float32(lower), size)
        x, info = solve_qp(matrix, linear, lower, np.ones(size, bool))
        assert bool(info.converged)
        assert int(info.iterations) <= 2 * size + 2
        assert np.all(x >= lower)
        slope = exact @ np.asarray(x, np.float64) + linear
        scale = np.abs(exact @ lower + linear).max()
        # Rounding the solution to float32 alone moves the slopes by this much.
        rounding = 6e-8 * (np.abs(exact) @ np.abs(x)).max()
        assert slope.min() > -1e-6 * scale - 2 * rounding
        free = np.asarray(x) > lower
        np.testing.assert_allclose(slope[free], 0.0, atol=1e-6 * scale + 2 * rounding)


@each_size
@each_degenerate
def test_qp_terminates_and_is_finite(kind, size):
    matrix = scaled_gramian(kind, size).matrix
    for linear in (-jnp.ones(size), jnp.zeros(size), jnp.linspace(-1e15, 1e-10, size)):
        x, info = solve_qp(matrix, linear, jnp.zeros(size), jnp.ones(size, bool))
        assert np.all(np.isfinite(x))
        assert np.all(x >= 0)
        assert not np.isnan(info.kkt_residual)


def test_qp_says_so_where_there_is_no_minimum():
    matrix = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    _, info = solve_qp(matrix, -jnp.ones(2), jnp.zeros(2), jnp.ones(2, bool))
    assert not bool(info.converged)
    assert float(info.kkt_residual) > 0.5


def test_qp_respects_what_is_allowed_and_starts_anywhere():
    matrix = scaled_gramian(matrices.normal, 16).matrix
    linear = jnp.asarray(np.random.default_rng(0).standard_normal(16), jnp.float32)
    allowed, lower = jnp.arange(16) < 9, jnp.zeros(16)
    x, info = solve_qp(matrix, linear, lower, allowed)
    np.testing.assert_array_equal(x[9:], 0.0)
    for start in (jnp.ones(16), (jnp.arange(16) % 2).astype(jnp.float32)):
        again, _ = solve_qp(matrix, linear, lower, allowed, start)
        np.testing.assert_allclose(again, x, atol=1e-6)
    again, warm = solve_qp(matrix, linear, lower, allowed, x)
    np.testing.assert_array_equal(again, x)
    assert int(warm.iterations) == 2 <= int(info.iterations)


def test_qp_adds_the_ridge_exactly():
    matrix, ridge = scaled_gramian(matrices.rank_one, 8).matrix, jnp.full(8, 1e-9)
    lower = jnp.arange(1.0, 9.0)
    x, _ = solve_qp(matrix, jnp.zeros(8), lower, jnp.ones(8, bool), ridge=ridge)
    total = np.asarray(matrix, np.float64) + 1e-9 * np.eye(8)
    slope = total @ np.asarray(x, np.float64)
    assert slope.min() > -1e-6 * np.abs(total @ lower).max()


def test_stationary_hull_has_a_shortest_vector_of_length_zero():
    for kind in (matrices.rank_one, matrices.strongly_stationary):
        grads = matrices.sample(kind, 16)
        weights, info = solve_hull(*in_units(jnp.asarray(matrices.gramian(grads))))
        assert bool(info.converged)
        length = np.linalg.norm(np.asarray(weights, np.float64) @ grads)
        assert length < 1e-4 * np.linalg.norm(grads, axis=1).min()


@each_size
@each_regular
@pytest.mark.parametrize("start", ["equal", "huge", "scattered"])
def test_nash_equation_holds_from_any_start(kind, size, start):
    matrix = scaled_gramian(kind, size).matrix
    beta = {
        "equal": np.ones(size),
        "huge": np.full(size, 1e6),
        "scattered": np.geomspace(1e-3, 1e3, size),
    }[start]
    beta, info = solve_fair(matrix, jnp.asarray(beta, jnp.float32))
    assert bool(info.converged)
    beta = np.asarray(beta, np.float64)
    assert beta.min() > 0
    matrix = np.asarray(matrix, np.float64)
    # Rounding a right solution moves sums that cancel by the size of their terms.
    rounding = 1e-6 * (np.abs(matrix) @ beta * beta)
    assert np.all(np.abs(matrix @ beta * beta - 1.0) <= 1e-5 + rounding)


@each_size
@each_degenerate
def test_nash_terminates_and_is_finite(kind, size):
    matrix = scaled_gramian(kind, size).matrix
    beta, info = solve_fair(matrix, jnp.ones(size))
    assert np.all(np.isfinite(beta))
    assert np.all(beta > 0)
    assert int(info.iterations) <= 300
    if kind is matrices.strongly_stationary:
        assert not bool(info.converged)


@pytest.mark.parametrize("power", [0.1, 0.5, 2.0, 10.0])
@pytest.mark.parametrize("size", [2, 16])
def test_fair_equation_holds_for_any_power(size, power):
    for kind in matrices.REGULAR:
        matrix = scaled_gramian(kind, size).matrix
        rng = np.random.default_rng(0)
        log_rates = -np.abs(rng.standard_normal(size)).astype(np.float32)
        beta, info = solve_fair(
            matrix, jnp.ones(size), log_rates=log_rates, power=power
        )
        assert bool(info.converged), kind.__name__
        beta = np.asarray(beta, np.float64)
        product = np.asarray(matrix, np.float64) @ beta
        expected = np.exp(log_rates) * beta**-power
        # Times the weights: what tasks contribute, some of them next to nothing.
        expected, product = expected * beta, product * beta
        atol = 2e-5 * expected.max()
        np.testing.assert_allclose(product, expected, rtol=2e-5, atol=atol)


def test_units_are_powers_of_two_and_round_nothing():
    grads = matrices.sample(matrices.normal, 4)
    lengths = np.array([1e-10, 1.0, 1e15, 0.0])
    gramian = matrices.gramian(grads * lengths[:, None])
    matrix, units, active = in_units(jnp.asarray(gramian))
    np.testing.assert_array_equal(active, [True, True, True, False])
    assert np.all(np.frexp(units)[0] == 0.5)
    restored = np.asarray(matrix, np.float64) * np.outer(units, units)
    np.testing.assert_array_equal(restored[:3, :3], gramian[:3, :3])
    np.testing.assert_array_equal(matrix[3], np.eye(4)[3])
    diagonal = np.diagonal(matrix)
    assert np.all((diagonal >= 0.5) & (diagonal < 2.0))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_residual_survives_cancellation(size):
    rng = np.random.default_rng(size)
    matrix = rng.standard_normal((5, size)).astype(np.float32)
    x = rng.standard_normal(size).astype(np.float32)
    x_rest = (1e-8 * x).astype(np.float32)
    exact = matrix.astype(np.float64) @ (x.astype(np.float64) + x_rest)
    rhs = exact.astype(np.float32)
    expected = rhs - exact
    terms = np.abs(matrix) @ np.abs(x)
    for run in (residual, jax.jit(residual)):
        got = run(*map(jnp.asarray, (rhs, matrix, x, x_rest)))
        assert np.all(np.abs(got - expected) < 1e-10 * terms)


def test_two_sum_keeps_what_rounding_takes():
    total, lost = jax.jit(two_sum)(jnp.float32(1e8), jnp.float32(-1.23456))
    assert float(total) + float(lost) == 1e8 + float(np.float32(-1.23456))


@pytest.mark.parametrize("size", SIZES)
def test_nan_does_not_loop(size):
    matrix = jnp.full((size, size), jnp.nan)
    x, info = solve_qp(matrix, -jnp.ones(size), jnp.zeros(size), jnp.ones(size, bool))
    assert np.any(np.isnan(x))
    assert not bool(info.converged)
    beta, info = solve_fair(matrix, jnp.ones(size))
    assert not bool(info.converged)
    assert np.any(np.isnan(beta))


@each_size
@each_regular
def test_warm_start_costs_fewer_steps(kind, size):
    scaled = scaled_gramian(kind, size)
    weights, cold = solve_hull(*scaled)
    again, warm = solve_hull(*scaled, weights)
    np.testing.assert_allclose(again, weights, atol=1e-6)
    assert int(warm.iterations) <= int(cold.iterations)
