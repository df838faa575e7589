"""Clipping, normalising and weighing each task's gradient by itself."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from tests.balancing import matrices, model

KEY = jax.random.key(0)
GRADS = matrices.sample(matrices.scaled, 4).astype(np.float32)
NORMS = np.linalg.norm(GRADS, axis=1, keepdims=True)


def after(transform, grads=GRADS, **extra_args):
    """The tasks' gradients behind a transform, stacked."""
    task_grads, _ = transform.update(
        jnp.asarray(grads), transform.init(None), **extra_args
    )
    assert isinstance(task_grads, mtjax.TaskGradients)
    return task_grads.stack()


def test_clip_shortens_the_long_and_leaves_the_short():
    clipped = after(mtjax.clip_per_task(2.0))
    assert np.any(NORMS > 2.0)
    assert np.any(NORMS < 2.0)
    np.testing.assert_allclose(clipped, GRADS * np.minimum(1.0, 2.0 / NORMS), rtol=1e-5)


def test_normalize_gives_unit_or_mean_length():
    np.testing.assert_allclose(
        after(mtjax.normalize_per_task()), GRADS / NORMS, rtol=1e-5
    )
    kept = after(mtjax.normalize_per_task(keep_mean_norm=True))
    np.testing.assert_allclose(kept, GRADS / NORMS * NORMS.mean(), rtol=1e-5)


def test_absent_tasks_do_not_count_in_the_mean_norm():
    present = jnp.array([True, False, True, False])
    kept = after(mtjax.normalize_per_task(keep_mean_norm=True), present=present)
    expected = GRADS / NORMS * NORMS[::2].mean() * np.array(present)[:, None]
    np.testing.assert_allclose(kept, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "transform", [mtjax.clip_per_task(1.0), mtjax.normalize_per_task()]
)
def test_zero_and_extreme_gradients_stay_finite(transform):
    chex.assert_tree_all_finite(after(transform, matrices.sample(matrices.extreme, 4)))
    np.testing.assert_array_equal(after(transform, np.zeros((4, 3), np.float32)), 0.0)


def test_own_parameters_are_scaled_by_the_same_factor():
    params, batch = model.params(), model.batch()
    _, grads = model.grad_fn(params, batch)
    clipped, _ = mtjax.clip_per_task(0.1).update(grads, optax.EmptyState())
    factors = 0.1 / jnp.maximum(jnp.sqrt(jnp.diagonal(grads.gramian())), 0.1)
    assert float(factors.min()) < 1
    for i, name in enumerate(model.NAMES):
        np.testing.assert_allclose(
            clipped.combine()["heads"][name],
            factors[i] * grads.combine()["heads"][name],
            rtol=1e-5,
        )


WEIGHTINGS = {
    "constant": lambda: mtjax.constant([0.5, 1.0, 2.0]),
    "uw": lambda: mtjax.uw(3, optimizer=optax.adam(0.1)),
    "dwa": lambda: mtjax.dwa(3, 1),
    "famo": lambda: mtjax.famo(3),
}


@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_weighting_then_sum_is_the_weighting(weighting):
    params, batch = model.params(), model.batch()
    plain = weighting()
    split = optax.chain(mtjax.scale_by_weighting(weighting()), mtjax.equal())

    @jax.jit
    def both(states):
        return [
            model.update(tx, params, state, batch, present=jnp.array([1, 1, 0]))
            for tx, state in zip((plain, split), states, strict=True)
        ]

    states = [tx.init(params) for tx in (plain, split)]
    for _ in range(3):
        (expected, states[0]), (got, states[1]) = both(states)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(states[1][0], states[0], rtol=1e-5)


def test_weighting_clip_aggregator_and_optimizer_compose():
    params, batch = model.params(), model.batch()
    weights = jnp.array([0.5, 1.0, 2.0])
    tx = optax.chain(
        mtjax.scale_by_weighting(mtjax.constant(weights.tolist())),
        mtjax.clip_per_task(0.5),
        mtjax.mgda(),
        optax.adam(0.1),
    )

    @jax.jit
    def by_hand(params):
        _, grads = model.grad_fn(params, batch)
        grads = grads.scale(weights)
        norms = jnp.sqrt(jnp.diagonal(grads.gramian()))
        grads = grads.scale(jnp.minimum(1.0, 0.5 / norms))
        mgda, adam = mtjax.mgda(), optax.adam(0.1)
        updates, _ = mgda.update(grads, mgda.init(params))
        return adam.update(updates, adam.init(params), params)[0]

    got, _ = jax.jit(functools.partial(model.update, tx))(
        params, tx.init(params), batch
    )
    chex.assert_trees_all_close(got, by_hand(params), rtol=1e-3, atol=1e-5)


def test_weighting_that_needs_losses_says_so():
    tx = mtjax.scale_by_weighting(mtjax.uw(4))
    with pytest.raises(ValueError, match="`uw` needs the extra argument `losses`"):
        tx.update(jnp.asarray(GRADS), tx.init(None))
