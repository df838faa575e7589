import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from mtjax.balancing.solvers import cosines, nash_equilibrium, nonnegative_qp
from tests.balancing import matrices

SIZES = (2, 16, 64)
each_size = pytest.mark.parametrize("size", SIZES)
each_regular = pytest.mark.parametrize(
    "kind", matrices.REGULAR, ids=lambda k: k.__name__
)
each_degenerate = pytest.mark.parametrize(
    "kind", matrices.DEGENERATE, ids=lambda k: k.__name__
)
solve_qp = jax.jit(nonnegative_qp)
solve_nash = jax.jit(nash_equilibrium)


def cosine_matrix(kind, size, seed=0):
    grads = matrices.sample(kind, size, seed)
    units = grads / np.linalg.norm(grads, axis=1, keepdims=True)
    return units @ units.T


def qp_objective(matrix, linear, x):
    return 0.5 * x @ matrix @ x + linear @ x


@each_size
@each_regular
def test_qp_reaches_the_optimum_of_a_reference(kind, size):
    matrix = cosine_matrix(kind, size) + 1e-6 * np.eye(size)
    factor = np.linalg.cholesky(matrix).T
    for seed in range(3):
        linear = np.random.default_rng(seed).standard_normal(size)
        expected, _ = nnls(factor, -np.linalg.solve(factor.T, linear), maxiter=10_000)
        x, _ = solve_qp(
            jnp.asarray(matrix, jnp.float32),
            jnp.asarray(linear, jnp.float32),
            jnp.ones(size, bool),
        )
        x = np.asarray(x, np.float64)
        best = qp_objective(matrix, linear, expected)
        assert x.min() >= 0
        assert qp_objective(matrix, linear, x) - best <= 1e-3 * abs(best)


@each_size
@each_regular
def test_qp_fulfils_the_optimality_conditions_of_the_shortest_vector(kind, size):
    matrix = cosine_matrix(kind, size)
    x, free = solve_qp(
        jnp.asarray(matrix, jnp.float32), -jnp.ones(size), jnp.ones(size, bool)
    )
    x = np.asarray(x, np.float64)
    slope = matrix @ x - 1.0
    assert slope.min() > -1e-3
    np.testing.assert_allclose(slope[np.asarray(free)], 0.0, atol=1e-3)
    np.testing.assert_array_equal(x > 0, free)


@each_size
@each_degenerate
def test_qp_terminates_and_is_finite(kind, size):
    matrix = jnp.asarray(cosine_matrix(kind, size), jnp.float32)
    for linear in (-jnp.ones(size), jnp.zeros(size), jnp.linspace(-1e15, 1e-10, size)):
        x, _ = solve_qp(matrix, linear, jnp.ones(size, bool))
        assert np.all(np.isfinite(x))
        assert np.all(x >= 0)


def test_qp_respects_what_is_allowed_and_starts_anywhere():
    matrix = jnp.asarray(cosine_matrix(matrices.normal, 16), jnp.float32)
    linear = jnp.asarray(np.random.default_rng(0).standard_normal(16), jnp.float32)
    allowed = jnp.arange(16) < 9
    x, free = solve_qp(matrix, linear, allowed)
    np.testing.assert_array_equal(x[9:], 0.0)
    for start in (jnp.ones(16, bool), jnp.arange(16) % 2 == 0, free):
        again, _ = solve_qp(matrix, linear, allowed, start)
        np.testing.assert_allclose(again, x, atol=1e-5)


@each_size
@each_regular
@pytest.mark.parametrize("start", ["equal", "huge", "scattered"])
def test_nash_equation_holds_from_any_start(kind, size, start):
    matrix = cosine_matrix(kind, size)
    beta = {
        "equal": np.ones(size),
        "huge": np.full(size, 1e6),
        "scattered": np.geomspace(1e-3, 1e3, size),
    }[start]
    beta = solve_nash(jnp.asarray(matrix, jnp.float32), jnp.asarray(beta, jnp.float32))
    beta = np.asarray(beta, np.float64)
    assert beta.min() > 0
    np.testing.assert_allclose(matrix @ beta * beta, 1.0, atol=1e-3)


@each_size
@each_degenerate
def test_nash_terminates_and_is_finite(kind, size):
    matrix = jnp.asarray(cosine_matrix(kind, size), jnp.float32)
    beta = solve_nash(matrix, jnp.ones(size))
    assert np.all(np.isfinite(beta))
    assert np.all(beta > 0)


def test_cosines_do_not_depend_on_scale():
    grads = matrices.sample(matrices.normal, 4)
    lengths = np.array([1e-10, 1.0, 1e15, 0.0])
    got = cosines(jnp.asarray(matrices.gramian(grads * lengths[:, None])))
    units = grads / np.linalg.norm(grads, axis=1, keepdims=True)
    expected = units @ units.T
    expected[3] = expected[:, 3] = np.eye(4)[3]
    np.testing.assert_allclose(got.matrix, expected, atol=1e-6)
    np.testing.assert_array_equal(got.active, [True, True, True, False])
