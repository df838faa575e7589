"""Compressed changes of one model: mixing, storage, subsets, sparse leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.merging.experts import Experts, smaller
from mtjax.merging.low_rank import LowRank, low_rank
from mtjax.merging.sparse import sparse

RNG = np.random.default_rng(0)
SHARED = {
    "bias": jnp.asarray(RNG.normal(size=3), jnp.float32),
    "kernel": jnp.asarray(RNG.normal(size=(4, 6)), jnp.bfloat16),
    "steps": jnp.array(7),
}
FULL = jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)
FEW = jnp.zeros((4, 6)).at[1, 2].set(3.0).at[3, 5].set(-2.0)
EXPERTS = Experts(
    SHARED,
    {
        "b/x": {"kernel": sparse(FEW), "bias": jnp.arange(3.0)},
        "a": {"kernel": low_rank(FULL, 2)},
    },
)


def test_mixture_against_numpy():
    u, s, v = np.linalg.svd(np.asarray(FULL, np.float64), full_matrices=False)
    product = (u[:, :2] * s[:2]) @ v[:2]
    found = EXPERTS.mixed(jnp.array([0.25, -2.0]))  # a, b/x
    expected = np.asarray(SHARED["kernel"], np.float64) + 0.25 * product - 2 * FEW
    assert found["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found["kernel"].astype(jnp.float32), expected, rtol=0.01)
    bias = np.asarray(SHARED["bias"]) - 2 * np.arange(3)
    np.testing.assert_allclose(found["bias"], bias, rtol=1e-6)
    assert found["steps"] == 7


def test_no_weight_gives_the_shared_model():
    found = EXPERTS.mixed(jnp.zeros(2))
    for path, leaf in SHARED.items():
        np.testing.assert_array_equal(found[path], leaf)


def test_factors_are_kept_apart_only_if_all_tasks_have_them():
    both = Experts(SHARED, {t: {"kernel": low_rank(FULL, 2)} for t in "ab"})
    assert isinstance(both.factors("kernel"), LowRank)
    assert both.factors("kernel").left.shape == (2, 4, 2)
    ranks = Experts(SHARED, {"a": {"kernel": low_rank(FULL, 2)}, "b": {}})
    ranks.changes["c"] = {"kernel": low_rank(FULL, 1)}
    for experts in (EXPERTS, ranks, ranks.subset("ac")):
        assert experts.factors("kernel").shape == (len(experts.tasks), 4, 6)
    np.testing.assert_array_equal(ranks.rows("kernel")[1], 0)


def test_names_not_places():
    assert EXPERTS.tasks == ("a", "b/x")
    assert set(EXPERTS.paths) == {"bias", "kernel"}
    only = EXPERTS.subset(["b/x"])
    alone = only.mixed(jnp.ones(1))["bias"]
    np.testing.assert_array_equal(alone, EXPERTS.mixed(jnp.array([0.0, 1.0]))["bias"])
    with pytest.raises(ValueError, match=r"`tasks` must be among a, b/x, got \['c'\]"):
        EXPERTS.subset(["a", "c"])


def test_bytes():
    shared = 3 * 4 + 24 * 2 + SHARED["steps"].nbytes
    # r (m + n) numbers; two numbers with their places; three numbers.
    assert EXPERTS.nbytes == shared + 4 * 2 * (4 + 6) + 2 * (4 + 4) + 3 * 4


def test_arrays_bring_everything_back():
    arrays = EXPERTS.arrays()
    assert all(isinstance(x, jax.Array) for x in arrays.values())
    stored = {name: np.asarray(x) for name, x in arrays.items()}
    for like in (None, SHARED):
        again = Experts.from_arrays(stored, like)
        assert jax.tree.structure(again) == jax.tree.structure(EXPERTS)
        same = jax.tree.map(
            lambda x, y: x.dtype == y.dtype and (x == y).all(), again, EXPERTS
        )
        assert jax.tree.all(same)


def test_arrays_of_other_trees():
    experts = Experts((jnp.ones(2), [jnp.zeros((2, 2))]), {"a": {"1/0": jnp.eye(2)}})
    again = Experts.from_arrays(experts.arrays(), like=experts.shared)
    np.testing.assert_array_equal(again.mixed(jnp.ones(1))[1][0], np.eye(2))


def test_sparse():
    found = sparse(FEW)
    np.testing.assert_array_equal(found.places, [8, 23])
    np.testing.assert_array_equal(found.dense(), FEW)
    np.testing.assert_array_equal(jax.jit(lambda x: x.dense())(found), FEW)
    np.testing.assert_array_equal(sparse(jnp.zeros((2, 2))).dense(), np.zeros((2, 2)))


def test_the_smaller_form():
    assert smaller(sparse(FEW)).places.shape == (2,)
    np.testing.assert_array_equal(smaller(sparse(FULL)), FULL)
    assert isinstance(smaller(low_rank(FULL, 2)), LowRank)  # 20 of 24 numbers
    three = low_rank(FULL, 3)  # 30
    np.testing.assert_array_equal(smaller(three), three.dense())
