"""Weighting, aggregator and an optimizer per head in one chain."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.training import TrainState, make_train_step
from tests.balancing import model

SPLIT = mtjax.parameter_split(model.losses_fn, model.params(), model.batch())
OPTIMIZERS = {
    "shared": optax.adam(0.01),
    "a": optax.sgd(0.1),
    "b": optax.adamw(0.02, weight_decay=0.1),
    "c": optax.sgd(0.1, momentum=0.9),
}
# One of each kind: of the losses, of the Gramian, of the stacked gradients, and with
# further evaluations.
BALANCERS = {
    "loss weighting": lambda: mtjax.uw(3, optimizer=optax.adam(0.1)),
    "Gramian": lambda: mtjax.cagrad(),
    "stack": lambda: mtjax.graddrop(),
    "task_sam": lambda: mtjax.task_sam(mtjax.cagrad(), rho_shared=0.1, rho_own=0.1),
}
EVERYONE, WITHOUT_C = jnp.array([True] * 3), jnp.array([True, True, False])


def per_head():
    return optax.multi_transform(OPTIMIZERS, SPLIT.labels())


def part(tree, label):
    return tree["trunk"] if label == "shared" else tree["heads"][label]


@pytest.mark.parametrize("balancer", BALANCERS.values(), ids=BALANCERS)
def test_each_head_follows_its_own_optimizer(balancer):
    params, batch = model.params(), model.batch()
    plain, tx = balancer(), mtjax.freeze_absent(optax.chain(balancer(), per_head()))
    raw_step = jax.jit(functools.partial(model.update, plain))
    step = jax.jit(functools.partial(model.update, tx))
    raw_state, state = plain.init(params), tx.init(params)
    states = {k: opt.init(part(params, k)) for k, opt in OPTIMIZERS.items()}
    for present in (EVERYONE, WITHOUT_C, EVERYONE):
        raw, raw_state = raw_step(params, raw_state, batch, present=present)
        before = state
        updates, state = step(params, state, batch, present=present)
        for k, opt in OPTIMIZERS.items():
            if k == "c" and present is WITHOUT_C:
                np.testing.assert_array_equal(updates["heads"]["c"], 0.0)
                moments = [s[1].inner_states["c"] for s in (before, state)]
                chex.assert_trees_all_equal(*moments)
                assert np.any(jax.tree.leaves(moments[0])[0] != 0)
                continue
            expected, states[k] = opt.update(part(raw, k), states[k], part(params, k))
            chex.assert_trees_all_close(
                part(updates, k), expected, rtol=1e-4, atol=1e-6
            )
        params = optax.apply_updates(params, updates)


def test_weighting_aggregator_and_optimizers_on_accumulated_gradients():
    chain = lambda: optax.chain(
        mtjax.scale_by_weighting(mtjax.uw(3, optimizer=optax.adam(0.1))),
        mtjax.pcgrad(),
        per_head(),
    )
    results = []
    for accumulate in (1, 2):
        tx = chain()
        step = make_train_step(model.losses_fn, tx, accumulate=accumulate)
        state = TrainState.create(model.params(), tx, key=jax.random.key(3))
        for seed in range(3):
            state, metrics = step(state, model.batch(8, seed=seed))
        results.append((state.params, model.raw(state.opt_state), metrics))
    chex.assert_trees_all_close(*results, rtol=1e-3, atol=1e-5)
    moved = jax.tree.map(
        lambda x, y: bool(np.all(x != y)), results[0][0], model.params()
    )
    assert all(jax.tree.leaves(moved))


def test_weights_apply_to_heads_and_aggregation_does_not():
    params, batch = model.params(), model.batch()
    weights = [1.0, 4.0, 0.25]
    tx = optax.chain(
        mtjax.scale_by_weighting(mtjax.constant(weights)), mtjax.cagrad(), per_head()
    )
    step = jax.jit(functools.partial(model.update, tx))
    updates, _ = step(params, tx.init(params), batch)
    _, grads = model.grad_fn(params, batch)
    alone = grads.combine()["heads"]
    # Of the two heads with plain SGD in their first step.
    for name, weight in (("a", weights[0]), ("c", weights[2])):
        np.testing.assert_allclose(
            updates["heads"][name], -0.1 * weight * alone[name], rtol=1e-5
        )
