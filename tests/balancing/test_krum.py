import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from tests.balancing import matrices, references_gradients


@functools.cache
def updater(n_byzantine, n_selected):
    tx = mtjax.krum(n_byzantine=n_byzantine, n_selected=n_selected)
    return jax.jit(
        lambda grads, present: tx.update(grads, tx.init(None), present=present)[0]
    )


def run(grads, n_byzantine, n_selected, present=None):
    present = np.ones(len(grads), bool) if present is None else np.asarray(present)
    update = updater(n_byzantine, n_selected)
    return np.asarray(update(jnp.asarray(grads, jnp.float32), jnp.asarray(present)))


@pytest.mark.parametrize(("n_byzantine", "n_selected"), [(0, 1), (2, 1), (2, 3)])
def test_is_the_selection_on_whole_gradients(n_byzantine, n_selected):
    for kind in (matrices.normal, matrices.agreeing, matrices.scaled):
        for seed in range(2):
            grads = matrices.sample(kind, 8, seed)
            if kind is matrices.scaled:
                grads = grads / np.linalg.norm(grads) + matrices.sample(
                    matrices.normal, 8, seed
                )
            expected = references_gradients.krum(grads, n_byzantine, n_selected)
            np.testing.assert_allclose(
                run(grads, n_byzantine, n_selected), expected, atol=1e-5
            )


def test_outliers_do_not_move_it():
    rng = np.random.default_rng(0)
    honest = 1.0 + 0.1 * rng.standard_normal((6, 10))
    for scale in (1e2, 1e15):
        liars = scale * rng.standard_normal((2, 10))
        grads = np.vstack([honest[:3], liars, honest[3:]])
        update = run(grads, 2, 3)
        if scale == 1e2:
            expected = references_gradients.krum(honest, 0, 3)
            assert np.linalg.norm(update - expected) < 0.5
        assert np.linalg.norm(update - 1.0) < 1.0


def test_absent_tasks_are_no_neighbours():
    grads = matrices.sample(matrices.normal, 7)
    present = np.array([1, 0, 1, 1, 0, 1, 1], bool)
    np.testing.assert_allclose(
        run(grads, 1, 2, present), run(grads[present], 1, 2), rtol=1e-6
    )


def test_more_selected_than_there_are_is_the_mean():
    grads = matrices.sample(matrices.normal, 3)
    np.testing.assert_allclose(run(grads, 1, 9), grads.mean(0), atol=1e-6)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`n_byzantine` must not be negative, got -1"):
        mtjax.krum(n_byzantine=-1)
    with pytest.raises(ValueError, match="`n_selected` must be at least 1, got 0"):
        mtjax.krum(n_selected=0)
