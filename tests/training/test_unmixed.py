"""Steps of one task each, on one state."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.data import array_source, mixture
from mtjax.training import Checkpoints, TrainState, fit, make_unmixed_step
from tests.balancing import model

RATIOS = {"a": 0.5, "b": 0.3, "c": 0.2}
LOSS_FNS = {
    task: lambda params, batch, task=task: model.losses_fn(params, batch)[task]
    for task in model.NAMES
}
SPLIT = mtjax.parameter_split(model.losses_fn, model.params(), model.batch())


def make_tx():
    return mtjax.mt_adamw(0.05, RATIOS, split=SPLIT)


def fresh(tx):
    return TrainState.create(model.params(), tx, key=jax.random.key(0))


def test_equals_the_loop_by_hand_and_compiles_once_per_task():
    tx, traces = make_tx(), []

    def counted(params, batch, task):
        traces.append(task)
        return LOSS_FNS[task](params, batch)

    step = make_unmixed_step(
        {t: functools.partial(counted, task=t) for t in model.NAMES}, tx
    )
    state, params, opt_state = fresh(tx), model.params(), tx.init(model.params())
    for seed, task in enumerate("acbacbc"):
        # Batches of a task have a size of their own.
        batch = model.batch(4 + 2 * model.NAMES.index(task), seed=seed)
        grads = jax.grad(LOSS_FNS[task])(params, batch)
        updates, opt_state = tx.update(
            grads, opt_state, params, task_id=model.NAMES.index(task)
        )
        loss = LOSS_FNS[task](params, batch)
        params = optax.apply_updates(params, updates)
        state, metrics = step(state, {task: batch})
        assert metrics["losses"].keys() == {task}
        np.testing.assert_allclose(metrics["losses"][task], loss, rtol=1e-5)
        if seed == 2:
            compiled = len(traces)
    chex.assert_trees_all_close(state.params, params, rtol=1e-4, atol=1e-6)
    assert len(traces) == compiled


def test_accumulates_within_the_task_before_normalising():
    tx, results = make_tx(), []
    for accumulate in (1, 2):
        step = make_unmixed_step(LOSS_FNS, tx, accumulate=accumulate)
        state = fresh(tx)
        for seed, task in enumerate("ab"):
            state, _ = step(state, {task: model.batch(8, seed=seed)})
        results.append(state)
    chex.assert_trees_all_close(results[0].params, results[1].params, rtol=1e-4)


def test_keys_model_state_and_aux_pass_through():
    def loss(params, batch, *, model_state, key):
        noise = jax.random.normal(key, ())
        return params * batch, (model_state + 1, noise)

    tx = optax.sgd(0.1)
    flags = {"with_model_state": True, "with_key": True, "has_aux": True}
    step = make_unmixed_step({"a": loss, "b": loss}, tx, **flags)
    state = TrainState.create(
        jnp.ones(()), tx, model_state=jnp.int32(0), key=jax.random.key(0)
    )
    state, first = step(state, {"b": jnp.array(2.0)})
    state, second = step(state, {"a": jnp.array(2.0)})
    assert int(state.model_state) == 2
    assert float(first["aux"]) != float(second["aux"])
    np.testing.assert_allclose(state.params, 1 - 2 * 0.1 * 2)


def test_a_loss_that_is_not_finite_is_skipped():
    tx = make_tx()
    step = make_unmixed_step(LOSS_FNS, tx)
    state, _ = step(fresh(tx), {"a": model.batch()})
    kept = jax.tree.map(jnp.copy, state)
    bad = jax.tree.map(lambda x: x * jnp.nan, model.batch())
    state, metrics = step(state, {"b": bad})
    assert int(metrics["skipped"]) == 1
    chex.assert_trees_all_equal(state.params, kept.params)
    chex.assert_trees_all_equal(state.opt_state, kept.opt_state)


def stream():
    rows = jax.tree.map(np.asarray, model.batch(32))
    sources = {task: array_source(rows) for task in model.NAMES}
    return mixture(
        sources, batch_size={"a": 4, "b": 8, "c": 2}, weights=RATIOS, order="random"
    )


def test_resume_reproduces_the_tasks_and_the_numbers(tmp_path):
    tx, drawn = make_tx(), []
    step = make_unmixed_step(LOSS_FNS, tx)

    def noted(state, batch):
        drawn.append(next(iter(batch)))
        return step(state, batch)

    straight, _ = fit(fresh(tx), noted, stream(), num_steps=12)
    expected, drawn[:] = list(drawn), []
    for num_steps in (5, 12):
        with Checkpoints(tmp_path) as checkpoints:
            resumed, _ = fit(
                fresh(tx), noted, stream(), num_steps=num_steps, checkpoints=checkpoints
            )
    assert drawn == expected
    assert set(drawn) == set(RATIOS)
    chex.assert_trees_all_equal(resumed.params, straight.params)
    chex.assert_trees_all_equal(resumed.opt_state, straight.opt_state)


def test_any_plain_optimizer_will_do():
    tx = optax.adamw(0.05)
    step, state = make_unmixed_step(LOSS_FNS, tx), fresh(tx)
    start = [float(LOSS_FNS[t](state.params, model.batch(32))) for t in "abc"]
    for batch in itertools.islice(stream(), 60):
        state, _ = step(state, batch)
    after = [float(LOSS_FNS[t](state.params, model.batch(32))) for t in "abc"]
    assert sum(after) < 0.7 * sum(start)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`loss_fns` must hold at least one task"):
        make_unmixed_step({}, optax.sgd(0.1))
    tx = make_tx()
    step = make_unmixed_step(LOSS_FNS, tx)
    for batch in ({}, {"z": 1.0}, dict.fromkeys("ab", model.batch())):
        with pytest.raises(ValueError, match="`batch` must hold exactly one of the ta"):
            step(fresh(tx), batch)
