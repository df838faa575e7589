import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.balancing.aligned_mtl import aligned_weights
from tests.balancing import matrices, references_gradients

MODES = ("min", "median", "rmse")
weigh = jax.jit(aligned_weights, static_argnums=2)


def solve(grads, preference, mode):
    gramian = jnp.asarray(matrices.gramian(grads))
    weights = weigh(gramian, jnp.asarray(preference, jnp.float32), mode)
    return np.asarray(weights, np.float64) @ grads


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "kind", [*matrices.REGULAR, matrices.low_rank], ids=lambda k: k.__name__
)
def test_is_the_sum_of_the_aligned_gradients(kind, mode):
    for size in (2, 7):
        grads, preference = matrices.sample(kind, size), 1.0 + np.arange(size)
        expected, _ = references_gradients.aligned(grads, preference, mode)
        np.testing.assert_allclose(
            solve(grads, preference, mode),
            expected,
            atol=1e-3 * np.linalg.norm(expected),
        )


@pytest.mark.parametrize("mode", MODES)
def test_aligned_gradients_are_orthogonal_and_equally_long(mode):
    grads = matrices.sample(matrices.narrow, 6)
    rows = np.stack([solve(grads, unit, mode) for unit in np.eye(6)])
    singular = np.linalg.svd(rows, compute_uv=False)
    before = np.linalg.svd(grads, compute_uv=False)
    expected = {
        "min": before[-1],
        "median": before[3],
        "rmse": np.sqrt(np.mean(before**2)),
    }[mode]
    np.testing.assert_allclose(singular, expected, rtol=1e-3)
    # Of all such rows, the nearest to the gradients: their product is symmetric.
    product = rows @ grads.T
    np.testing.assert_allclose(product, product.T, atol=1e-3 * np.abs(product).max())


def test_orthogonal_gradients_of_one_length_are_added_up():
    grads = 5.0 * np.eye(4)
    for mode in MODES:
        np.testing.assert_allclose(solve(grads, np.ones(4), mode), 5.0, rtol=1e-5)


def test_gradients_below_the_precision_of_the_gramian_count_as_zero():
    grads = np.array([[1.0, 0.0], [0.0, 1e-5]])
    np.testing.assert_allclose(solve(grads, np.ones(2), "min"), [1.0, 0.0], atol=1e-5)


def test_at_the_representation():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((5, 4)), rng.standard_normal((4, 3))
    heads = rng.standard_normal((3, 3))
    params = {
        "trunk": jnp.asarray(kernel, jnp.float32),
        "heads": {t: jnp.asarray(h, jnp.float32) for t, h in zip("abc", heads)},
    }
    batch = jnp.asarray(x, jnp.float32)
    encode = lambda params, x: x @ params["trunk"]
    losses = lambda params, z, x: {
        t: 0.5 * jnp.mean((z @ h) ** 2) for t, h in params["heads"].items()
    }
    grad_fn = mtjax.value_and_task_grads((encode, losses), engine="representation")
    tx = mtjax.aligned_mtl()
    updates, _ = jax.jit(lambda p: tx.update(grad_fn(p, batch)[1], tx.init(p), p))(
        params
    )
    # The gradient at the representation is that of the mean over five examples.
    z = x @ kernel
    at_z = np.stack([np.outer(z @ h, h).ravel() / 5 for h in heads])
    combined, _ = references_gradients.aligned(at_z, np.ones(3), "min")
    expected = x.T @ combined.reshape(5, 3)
    np.testing.assert_allclose(
        updates["trunk"], expected, atol=1e-3 * np.abs(expected).max()
    )
    own = z.T @ (z @ heads[1]) / 5
    np.testing.assert_allclose(updates["heads"]["b"], own, rtol=1e-4)


def test_preference_is_that_of_the_task():
    grads = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    tx = mtjax.aligned_mtl(preference=[2.0, 5.0])
    update = jax.jit(functools.partial(tx.update, state=tx.init(None)))
    np.testing.assert_allclose(update(grads)[0], [2.0, 5.0], rtol=1e-5)


def test_preference_is_checked():
    with pytest.raises(ValueError, match="`preference` must not be negative"):
        mtjax.aligned_mtl(preference=[1.0, -1.0])
