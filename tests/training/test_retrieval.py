"""Retrieval in blocks says what all scores at once would say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.training.ranking_metrics import full_ranks
from mtjax.training.retrieval import target_ranks, top_k_items

# Small whole numbers: many equal scores, and no rounding.
QUERIES = jax.random.randint(jax.random.key(0), (4, 3), -1, 2).astype(float)
ITEMS = jax.random.randint(jax.random.key(1), (23, 3), -1, 2).astype(float)
SCORES = QUERIES @ ITEMS.T
EXCLUDED = jnp.arange(23) % 4 == 0


@pytest.mark.parametrize(
    ("k", "block"), [(1, 1), (5, 2), (5, 7), (23, 7), (9, 23), (4, 8192)]
)
@pytest.mark.parametrize("excluded", [None, EXCLUDED, jnp.arange(23) != 20])
def test_top_k(k, block, excluded):
    found = top_k_items(QUERIES, ITEMS, k, excluded=excluded, block=block)
    scores = SCORES if excluded is None else jnp.where(excluded[None], -jnp.inf, SCORES)
    expected = jax.lax.top_k(scores, k)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    # Equal scores: in the order of the numbers.
    order = np.lexsort((np.arange(23)[None].repeat(4, 0), -np.asarray(scores)), axis=1)
    np.testing.assert_array_equal(found[1], order[:, :k])


@pytest.mark.parametrize("block", [1, 7, 23, 8192])
@pytest.mark.parametrize("excluded", [None, EXCLUDED])
def test_ranks(block, excluded):
    targets = jnp.array([0, 22, 8, 14])
    found = target_ranks(QUERIES, ITEMS, targets, excluded=excluded, block=block)
    mask = None if excluded is None else np.asarray(excluded)
    expected = full_ranks(np.asarray(SCORES), np.asarray(targets), excluded=mask)
    assert (expected % 1 != 0).any()
    np.testing.assert_array_equal(found, expected)


def test_ranks_of_scores_that_are_rounded():
    queries = jax.random.normal(jax.random.key(2), (6, 9))
    items = jax.random.normal(jax.random.key(3), (50, 9))
    targets = jnp.arange(6) * 7
    found = target_ranks(queries, items, targets, block=16)
    # The same products in higher precision: no two are close.
    scores = np.float64(queries) @ np.float64(items).T
    np.testing.assert_array_equal(found, full_ranks(scores, np.asarray(targets)))


def test_ranks_without_a_score_are_nan():
    targets = jnp.array([23, -1, 5, 5])
    queries = QUERIES.at[2].set(jnp.nan)
    found = target_ranks(queries, ITEMS, targets, block=7)
    np.testing.assert_array_equal(np.isnan(found), [True, True, True, False])


@pytest.mark.parametrize("run", [top_k_items, target_ranks])
def test_scores_of_all_items_are_never_in_memory(run):
    queries, items = jnp.ones((64, 4)), jnp.ones((40_001, 4))
    last = 10 if run is top_k_items else jnp.zeros(64, int)
    memory = run.lower(queries, items, last, block=500).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 40_001 * 4 / 10


def test_errors():
    for k in (0, 24):
        with pytest.raises(ValueError, match=r"`k` must be from 1 to .* 23, got"):
            top_k_items(QUERIES, ITEMS, k)
    with pytest.raises(ValueError, match="`block` must be at least 1, got 0"):
        top_k_items(QUERIES, ITEMS, 3, block=0)
    with pytest.raises(ValueError, match="`block` must be at least 1, got 0"):
        target_ranks(QUERIES, ITEMS, jnp.zeros(4, int), block=0)
