"""Weights against float64 solvers of the same Gramian, for all numbers of tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.balancing import (
    conflict_averse_weights,
    fair_weights,
    imbalance_sensitive_weights,
    min_norm_weights,
    project_on_dual_cone,
    projection_weights,
)
from tests.balancing import matrices, references

UNIQUE = (
    matrices.normal,
    matrices.conflicting,
    matrices.agreeing,
    matrices.narrow,
    matrices.scaled,
    matrices.extreme,
)
DEPENDENT = (matrices.low_rank, matrices.duplicated, matrices.agreeing_low_rank)


def all_weights(gramian):
    mean = jnp.full(len(gramian), 1 / len(gramian), jnp.float32)
    present = jnp.ones(len(gramian), bool)
    return {
        "mgda": min_norm_weights(gramian),
        "cagrad": conflict_averse_weights(gramian, present, 0.5),
        "imgrad": imbalance_sensitive_weights(gramian, present, 0.5),
        "dualproj": project_on_dual_cone(gramian, mean, 1e-4),
        "upgrad": projection_weights(gramian, mean, 1e-4),
        "nash": fair_weights(gramian),
        "fair": fair_weights(gramian, alpha=2.0),
    }


solve = jax.jit(all_weights)


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64])
def test_weights_are_those_of_float64_solvers(size):
    for kind in UNIQUE:
        gramian = matrices.gramian(matrices.sample(kind, size))
        found = solve(jnp.asarray(gramian))
        exact = gramian.astype(np.float64)
        expected = {
            "mgda": references.hull_weights(exact),
            "cagrad": references.conflict_averse_weights(exact, 0.5),
            "imgrad": references.imbalance_sensitive_weights(exact, 0.5),
            "dualproj": references.dual_cone_weights(
                exact, np.full(size, 1 / size), 1e-4
            ),
            "upgrad": references.mean_projection(exact, 1e-4),
            "nash": references.fair_weights(exact, 1.0),
            "fair": references.fair_weights(exact, 2.0),
        }
        for name, (weights, info) in found.items():
            assert bool(info.converged), (name, kind.__name__)
            # Of weights of unit gradients, which do not differ by powers of ten.
            norms = np.sqrt(np.diag(exact))
            missed = np.abs(np.asarray(weights, np.float64) - expected[name]) * norms
            largest = np.max(np.abs(expected[name]) * norms)
            assert missed.max() < 1e-4 * largest, (name, kind.__name__)


@pytest.mark.parametrize("size", [2, 4, 16, 64])
def test_dependent_gradients_have_the_reference_update(size):
    for kind in DEPENDENT:
        grads = matrices.sample(kind, size)
        gramian = matrices.gramian(grads)
        weights, info = jax.jit(min_norm_weights)(jnp.asarray(gramian))
        assert bool(info.converged), kind.__name__
        update = np.asarray(weights, np.float64) @ grads
        expected = references.shortest_in_hull(grads)
        # Float32 Gramians know lengths to the root of their precision.
        limit = 1e-3 * np.linalg.norm(grads, axis=1).min()
        assert np.linalg.norm(update - expected) < limit, kind.__name__


def test_ub_is_the_shortest_vector_in_the_hull_at_the_representation():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)
    heads = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)
    params = {"trunk": jnp.asarray(rng.standard_normal((5, 4)), jnp.float32)}

    def encode(params, x):
        return jnp.tanh(x @ params["trunk"])

    def losses_from_representation(params, z, x):
        return {t: jnp.mean((z @ heads[i] - x[:, i]) ** 2) for i, t in enumerate("abc")}

    grad_fn = mtjax.value_and_task_grads((encode, losses_from_representation))
    tx = mtjax.mgda()
    losses, grads = grad_fn(params, x)
    update, _ = tx.update(grads, tx.init(params), params, losses=losses)
    # By hand: slopes at the representation, and the weights that they give.
    z = encode(params, x)
    slopes = jax.jacobian(lambda z: losses_from_representation(params, z, x))(z)
    rows = np.stack([np.ravel(slopes[t]) for t in "abc"]).astype(np.float64)
    weights = references.hull_weights(rows @ rows.T)
    shortest = weights @ rows
    assert np.min(rows @ shortest) > shortest @ shortest * (1 - 1e-4)
    total = lambda params: sum(
        w * loss
        for w, loss in zip(
            weights,
            losses_from_representation(params, encode(params, x), x).values(),
            strict=True,
        )
    )
    expected = jax.grad(total)(params)["trunk"]
    np.testing.assert_allclose(update["trunk"], expected, rtol=1e-4, atol=1e-6)
