"""Attention between sets: who is not there, what is sown, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.set_attention import SetAttention

QUERIES = jax.random.normal(jax.random.key(1), (3, 4))
ENTRIES = jax.random.normal(jax.random.key(2), (2, 5, 4))
PRESENT = jnp.array([[True, False, True, False, True], [False] * 5])
BLOCK = SetAttention()
VARIABLES = BLOCK.init(jax.random.key(0), QUERIES, ENTRIES)


def test_queries_without_a_batch_are_those_of_every_example():
    own = jnp.broadcast_to(QUERIES[None], (2, 3, 4))
    found, expected = (BLOCK.apply(VARIABLES, q, ENTRIES) for q in (QUERIES, own))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_absent_entries_are_neither_keys_nor_values():
    found, state = BLOCK.apply(
        VARIABLES, QUERIES, ENTRIES, PRESENT, mutable=["intermediates"]
    )
    expected = BLOCK.apply(VARIABLES, QUERIES, ENTRIES[:1, ::2])
    np.testing.assert_allclose(found[:1], expected, rtol=1e-5, atol=1e-6)
    (weights,) = state["intermediates"]["attention"]
    assert weights.shape == (2, 2, 3, 5)
    np.testing.assert_array_equal(weights[0][..., 1::2], 0)
    np.testing.assert_allclose(weights[0].sum(-1), 1, rtol=1e-6)
    # Nothing to read: zeros are added to the queries.
    np.testing.assert_array_equal(weights[1], 0)
    zeros = jnp.zeros((1, 1, 4))
    nothing = BLOCK.apply(VARIABLES, QUERIES, zeros)
    np.testing.assert_allclose(found[1:], nothing, rtol=1e-5, atol=1e-6)


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="`heads` must be a divisor of the width, 4"):
        SetAttention(heads=3).init(jax.random.key(0), QUERIES, ENTRIES)
