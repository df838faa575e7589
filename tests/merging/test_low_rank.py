"""Truncated singular value decompositions of leaves against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.merging.low_rank import low_rank, rank_of


@pytest.mark.parametrize("shape", [(7, 5), (4, 9), (3, 2, 2, 6)])
def test_the_nearest_matrix_of_its_rank(shape):
    leaf = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    matrix = leaf.reshape(-1, shape[-1]).astype(np.float64)
    sizes = np.linalg.svd(matrix, compute_uv=False)
    for rank in (2, len(sizes)):
        product = low_rank(jnp.asarray(leaf), rank)
        assert product.left.shape == (*shape[:-1], rank)
        assert product.right.shape == (rank, shape[-1])
        found = product.dense()
        assert found.shape == shape
        # Eckart and Young: the error is what the other singular values have.
        error = np.linalg.norm(np.asarray(found, np.float64) - leaf)
        expected = np.sqrt(np.sum(sizes[rank:] ** 2))
        np.testing.assert_allclose(error, expected, rtol=1e-5, atol=1e-5)
        flat = np.asarray(found, np.float64).reshape(matrix.shape)
        assert np.linalg.matrix_rank(flat, tol=1e-4) == rank


def test_a_larger_rank_is_cut_to_that_of_the_matrix():
    leaf = jnp.arange(6.0).reshape(2, 3)
    product = low_rank(leaf, 100)
    assert product.left.shape == (2, 2)
    np.testing.assert_allclose(product.dense(), leaf, atol=1e-5)


def test_works_inside_jit():
    leaf = jax.random.normal(jax.random.key(0), (5, 4))
    inside = jax.jit(lambda x: low_rank(x, 2).dense())(leaf)
    np.testing.assert_allclose(inside, low_rank(leaf, 2).dense(), atol=1e-6)


def test_half_precision_is_decomposed_in_float32():
    product = low_rank(jnp.ones((3, 3), jnp.bfloat16), 1)
    assert product.left.dtype == product.right.dtype == jnp.float32


def test_ranks_of_a_share():
    # `int((1 - 0.9) * 20)` is 1 and `int(0.29 * 100)` is 28, by a rounding error.
    assert rank_of((20, 30), 1 - 0.9) == 2
    assert rank_of((100, 100), 0.29) == 29
    assert rank_of((64, 128), 0.1) == 6
    assert rank_of((3, 3, 2, 64), 0.5) == 9
    assert rank_of((5, 5), 1 - 0.99) == 1  # never none
    assert rank_of((5, 8), 1.0) == 5


def test_errors():
    with pytest.raises(
        ValueError, match=r"`leaf` must have at least two axes, got .*3"
    ):
        low_rank(jnp.ones(3), 1)
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        low_rank(jnp.ones((3, 3)), 0)
