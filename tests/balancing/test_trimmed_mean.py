import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import mtjax
from tests.balancing import matrices


@functools.cache
def updater(trim):
    tx = mtjax.trimmed_mean(trim=trim)
    return jax.jit(
        lambda grads, present: tx.update(grads, tx.init(None), present=present)[0]
    )


def run(grads, trim, present=None):
    present = np.ones(len(grads), bool) if present is None else np.asarray(present)
    return np.asarray(updater(trim)(jnp.asarray(grads, jnp.float32), present))


@pytest.mark.parametrize("trim", [0, 1, 2])
def test_is_the_trimmed_mean_of_every_coordinate(trim):
    grads = matrices.sample(matrices.normal, 7)
    expected = stats.trim_mean(grads, trim / 7 + 1e-9, axis=0)
    np.testing.assert_allclose(run(grads, trim), expected, atol=1e-6)


def test_no_leaf_is_mixed_with_another():
    grads = matrices.sample(matrices.normal, 5).astype(np.float32)
    tree = {"a": grads[:, :30].reshape(5, 5, 6), "b": grads[:, 30:]}
    tx = mtjax.trimmed_mean()
    updates, _ = tx.update(jax.tree.map(jnp.asarray, tree), tx.init(None))
    together = np.concatenate([updates["a"].ravel(), updates["b"]])
    np.testing.assert_allclose(together, run(grads, 1), rtol=1e-6)


def test_a_few_arbitrary_gradients_do_not_leave_the_range_of_the_others():
    rng = np.random.default_rng(0)
    honest = rng.standard_normal((5, 20))
    for scale in (1e3, 1e15):
        liars = scale * rng.standard_normal((2, 20))
        update = run(np.vstack([liars, honest]), 2)
        assert np.all(update >= honest.min(0) - 1e-6)
        assert np.all(update <= honest.max(0) + 1e-6)


def test_too_many_dropped_is_the_median_of_those_present():
    grads = matrices.sample(matrices.normal, 6)
    for present in ([1, 1, 1, 0, 1, 1], [1, 0, 0, 1, 1, 1]):
        present = np.array(present, bool)
        expected = np.median(grads[present], axis=0)
        np.testing.assert_allclose(run(grads, 5, present), expected, atol=1e-6)


def test_trim_is_a_number_of_tasks():
    with pytest.raises(ValueError, match="`trim` must not be negative, got -1"):
        mtjax.trimmed_mean(trim=-1)
