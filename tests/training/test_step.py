"""The training step: what it passes on, accumulates, skips and keeps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.training import TrainState, data_mesh, make_train_step, shard_batch
from mtjax.training import accumulation as accumulation_module


def make_params(seed=0):
    trunk, *heads = jax.random.split(jax.random.key(seed), 4)
    return {
        "trunk": jax.random.normal(trunk, (4, 8)),
        "heads": {t: jax.random.normal(k, (8,)) for t, k in zip("abc", heads)},
    }


def make_batch(seed=1, rows=16):
    x, y = jax.random.split(jax.random.key(seed))
    return {"x": jax.random.normal(x, (rows, 4)), "y": jax.random.normal(y, (rows, 3))}


def losses_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["trunk"])
    return {
        task: jnp.mean((hidden @ params["heads"][task] - batch["y"][:, i]) ** 2)
        for i, task in enumerate("abc")
    }


def make_state(tx, **kwargs):
    return TrainState.create(make_params(), tx, key=jax.random.key(7), **kwargs)


def test_one_step_equals_the_loop_by_hand():
    tx = optax.chain(mtjax.mgda(), optax.adam(1e-2))
    state = make_state(tx)
    params, opt_state = make_params(), tx.init(make_params())
    step = make_train_step(losses_fn, tx)

    @jax.jit
    def by_hand(params, opt_state, batch):
        losses, grads = mtjax.value_and_task_grads(losses_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, losses=losses)
        return optax.apply_updates(params, updates), opt_state, losses, updates

    for seed in range(3):
        batch = make_batch(seed)
        params, opt_state, losses, updates = by_hand(params, opt_state, batch)
        state, metrics = step(state, batch)
        chex.assert_trees_all_close(metrics["losses"], losses, rtol=1e-6)
        np.testing.assert_allclose(
            metrics["update_norm"], optax.tree.norm(updates), rtol=1e-5
        )
    chex.assert_trees_all_close(state.params, params, rtol=1e-5)
    assert int(state.step) == 3
    assert int(state.skipped) == 0


def test_traces_once():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return losses_fn(params, batch)

    tx = optax.chain(mtjax.pcgrad(), optax.adam(1e-2))
    state, step = make_state(tx), make_train_step(counted, tx)
    state, _ = step(state, make_batch(0))
    first = len(traces)
    for seed in range(3):
        state, _ = step(state, make_batch(seed))
    assert len(traces) == first


def test_the_state_that_was_given_is_donated_and_the_callers_params_are_not():
    tx = optax.chain(mtjax.equal(), optax.sgd(1e-2))
    params = make_params()
    state = TrainState.create(params, tx, key=jax.random.key(0))
    make_train_step(losses_fn, tx)(state, make_batch())
    assert state.params["trunk"].is_deleted()
    assert not params["trunk"].is_deleted()
    state = TrainState.create(params, tx, key=jax.random.key(0))
    make_train_step(losses_fn, tx, donate=False)(state, make_batch())
    assert not state.params["trunk"].is_deleted()


def recorder(seen):
    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates.combine(), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def test_passes_every_extra_argument_on():
    seen = []
    tx = optax.chain(recorder(seen), optax.sgd(0.1))
    step = make_train_step(losses_fn, tx)
    step(make_state(tx), make_batch(), jnp.array([True, False, True]))
    (extra,) = seen
    assert extra.keys() == {
        "losses",
        "present",
        "key",
        "losses_fn",
        "validation_losses_fn",
        "resampled",
    }
    assert sorted(extra["losses"]) == ["a", "b", "c"]


def test_losses_fn_that_balancers_get_is_the_one_of_this_batch_and_key():
    def noisy(params, batch, *, key):
        noise = jax.random.normal(key, batch["x"].shape)
        return losses_fn(params, {**batch, "x": batch["x"] + noise})

    def update(updates, state, params=None, *, losses, losses_fn, **extra_args):
        again = losses_fn(params)
        gaps = jax.tree.map(lambda a, b: jnp.abs(a - b), losses, again)
        return updates.combine(), jnp.max(jnp.stack(jax.tree.leaves(gaps)))

    tx = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    step = make_train_step(noisy, tx, with_key=True)
    state, _ = step(make_state(tx), make_batch())
    np.testing.assert_allclose(state.opt_state, 0.0, atol=1e-6)


def test_keys_depend_on_the_step_and_differ_between_loss_and_balancer():
    def keyed(params, batch, *, key):
        return losses_fn(params, batch), jax.random.key_data(key)

    def update(updates, state, params=None, *, key, **extra_args):
        return updates.combine(), jax.random.key_data(key)

    tx = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(2, jnp.uint32), update
    )
    step = make_train_step(keyed, tx, with_key=True, has_aux=True)
    state, seen = make_state(tx), []
    for _ in range(3):
        state, metrics = step(state, make_batch())
        seen += [metrics["aux"].tolist(), state.opt_state.tolist()]
    assert len({tuple(data) for data in seen}) == 6


@pytest.mark.parametrize(
    ("balancer", "backend"), [("pcgrad", "cpu"), ("mgda", "cpu"), ("pcgrad", "gpu")]
)
def test_accumulation_equals_one_big_batch(balancer, backend, monkeypatch):
    # Off the CPU the micro-batches are scanned; that also runs here, only slower.
    monkeypatch.setattr(accumulation_module.jax, "default_backend", lambda: backend)
    tx = optax.chain(getattr(mtjax, balancer)(), optax.sgd(0.1))
    big, big_metrics = make_train_step(losses_fn, tx)(make_state(tx), make_batch())
    small, small_metrics = make_train_step(losses_fn, tx, accumulate=4)(
        make_state(tx), make_batch()
    )
    chex.assert_trees_all_close(small.params, big.params, atol=1e-6)
    chex.assert_trees_all_close(small_metrics, big_metrics, rtol=1e-5)


def test_accumulation_is_not_the_mean_of_balanced_micro_batches():
    tx = optax.chain(mtjax.pcgrad(), optax.sgd(0.1))
    whole, _ = make_train_step(losses_fn, tx, accumulate=4)(
        make_state(tx), make_batch()
    )
    micro = make_train_step(losses_fn, tx)
    parts = accumulation_module.split_batch(make_batch(), 4)
    each = [
        micro(make_state(tx), jax.tree.map(lambda x, i=i: x[i], parts))[0].params
        for i in range(4)
    ]
    mean = jax.tree.map(lambda *x: sum(x) / 4, *each)
    assert float(jnp.max(jnp.abs(mean["trunk"] - whole.params["trunk"]))) > 1e-4


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_accumulation_threads_model_state_and_stacks_aux(backend, monkeypatch):
    monkeypatch.setattr(accumulation_module.jax, "default_backend", lambda: backend)

    def counting(params, batch, *, model_state, key):
        seen = {"mean": 0.5 * model_state["mean"] + 0.5 * jnp.mean(batch["x"])}
        return losses_fn(params, batch), (seen, jax.random.uniform(key))

    tx = optax.chain(mtjax.equal(), optax.sgd(0.1))
    step = make_train_step(
        counting, tx, with_model_state=True, with_key=True, has_aux=True, accumulate=2
    )
    state = make_state(tx, model_state={"mean": jnp.zeros(())})
    state, metrics = step(state, make_batch())
    x = np.asarray(make_batch()["x"])
    expected = 0.25 * x[0::2].mean() + 0.5 * x[1::2].mean()
    np.testing.assert_allclose(state.model_state["mean"], expected, rtol=1e-5)
    assert metrics["aux"].shape == (2,)
    assert metrics["aux"][0] != metrics["aux"][1]


def test_accumulation_divides_one_batch_per_task():
    def per_task(params, batches):
        return {
            task: jnp.mean((jnp.tanh(x @ params["trunk"]) @ params["heads"][task]) ** 2)
            for task, x in batches.items()
        }

    sizes = {"a": 4, "b": 8, "c": 12}
    batches = {
        t: jax.random.normal(jax.random.key(n), (n, 4)) for t, n in sizes.items()
    }
    tx = optax.chain(mtjax.equal(), optax.sgd(0.1))
    big, _ = make_train_step(per_task, tx)(make_state(tx), batches)
    small, _ = make_train_step(per_task, tx, accumulate=4)(make_state(tx), batches)
    chex.assert_trees_all_close(small.params, big.params, atol=1e-6)


def test_errors_of_accumulation():
    tx = mtjax.equal()
    step = make_train_step(losses_fn, tx, accumulate=3)
    with pytest.raises(
        ValueError, match=r"16 rows for 3 micro-batches in batch\['x'\]"
    ):
        step(make_state(tx), make_batch())
    with pytest.raises(ValueError, match="`accumulate` must be at least 1, got 0"):
        make_train_step(losses_fn, tx, accumulate=0)
    with pytest.raises(ValueError, match="a pair"):
        make_train_step((losses_fn, losses_fn), tx, accumulate=2)


def test_pair_for_the_representation_engine():
    def encode(params, batch):
        return jnp.tanh(batch["x"] @ params["trunk"])

    def losses_from_representation(params, z, batch):
        return {
            task: jnp.mean((z @ params["heads"][task] - batch["y"][:, i]) ** 2)
            for i, task in enumerate("abc")
        }

    tx = optax.chain(recorder([]), optax.sgd(0.1))
    step = make_train_step((encode, losses_from_representation), tx)
    state, metrics = step(make_state(tx), make_batch())
    expected, expected_metrics = make_train_step(losses_fn, tx)(
        make_state(tx), make_batch()
    )
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5)


def batch_norm_losses(params, batch, *, model_state):
    mean, var = jnp.mean(batch["x"], axis=0), jnp.var(batch["x"], axis=0)
    new = {
        "mean": 0.9 * model_state["mean"] + 0.1 * mean,
        "var": 0.9 * model_state["var"] + 0.1 * var,
    }
    x = (batch["x"] - mean[None]) / jnp.sqrt(var + 1e-5)[None]
    return losses_fn(params, {**batch, "x": x}), new


def test_model_state_is_kept_and_not_differentiated():
    tx = optax.chain(mtjax.equal(), optax.adam(1e-2))
    start = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    step = make_train_step(batch_norm_losses, tx, with_model_state=True)
    state = make_state(tx, model_state=start)
    for _ in range(2):
        state, metrics = step(state, make_batch())
    x = np.asarray(make_batch()["x"])
    np.testing.assert_allclose(
        state.model_state["mean"], 0.19 * x.mean(0), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        state.model_state["var"], 0.81 + 0.19 * x.var(0), rtol=1e-5
    )
    assert "aux" not in metrics


def test_step_that_is_not_finite_changes_nothing_but_the_counters():
    # The state of this balancer holds a typed key.
    tx = optax.chain(mtjax.graddrop(), optax.adamw(1e-2))
    step = make_train_step(batch_norm_losses, tx, with_model_state=True, donate=False)
    state = make_state(tx, model_state={"mean": jnp.zeros(4), "var": jnp.ones(4)})
    state, _ = step(state, make_batch())
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), make_batch())
    after, metrics = step(state, bad)
    chex.assert_trees_all_equal(
        (after.params, after.opt_state[1], after.model_state),
        (state.params, state.opt_state[1], state.model_state),
    )
    keys = [jax.random.key_data(s.opt_state[0].key) for s in (after, state)]
    chex.assert_trees_all_equal(*keys)
    assert (int(after.step), int(after.skipped)) == (2, 1)
    assert int(metrics["skipped"]) == 1
    assert float(metrics["update_norm"]) == 0.0
    after, _ = step(after, make_batch())
    chex.assert_tree_all_finite(after.params)
    assert int(after.skipped) == 1


def test_not_finite_can_be_let_through():
    tx = optax.chain(mtjax.equal(), optax.sgd(1e-2))
    step = make_train_step(losses_fn, tx, skip_not_finite=False)
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), make_batch())
    state, _ = step(make_state(tx), bad)
    assert bool(jnp.isnan(state.params["trunk"]).any())
    assert int(state.skipped) == 0


def test_loss_of_an_absent_task_may_be_anything():
    def gated(params, batch):
        losses = losses_fn(params, batch)
        return {**losses, "b": losses["b"] + jnp.where(batch["has_b"], 0.0, jnp.nan)}

    tx = optax.chain(mtjax.equal(), optax.adam(1e-2))
    step = make_train_step(gated, tx, donate=False)
    state = make_state(tx)
    batch = {**make_batch(), "has_b": jnp.array(False)}
    present = jnp.array([True, False, True])
    after, _ = step(state, batch, present)
    assert int(after.skipped) == 0
    chex.assert_tree_all_finite(after.params)
    chex.assert_trees_all_equal(after.params["heads"]["b"], state.params["heads"]["b"])
    after, _ = step(state, batch)
    assert int(after.skipped) == 1


def test_absent_task_keeps_its_head_and_its_moments():
    tx = optax.chain(mtjax.equal(), optax.adamw(1e-2, weight_decay=0.1))
    step = make_train_step(losses_fn, tx, donate=False)
    state, _ = step(make_state(tx), make_batch())
    after, _ = step(state, make_batch(), jnp.array([True, False, True]))

    def head(state, task):
        adam = state.opt_state[1][0]
        return [tree["heads"][task] for tree in (state.params, adam.mu, adam.nu)]

    chex.assert_trees_all_equal(head(after, "b"), head(state, "b"))
    assert bool(jnp.any(head(after, "a")[0] != head(state, "a")[0]))


def test_eight_devices_with_an_axis_name_equal_one():
    tx = optax.chain(mtjax.pcgrad(), optax.sgd(0.1))

    def with_statistics(params, batch, *, model_state):
        del model_state
        return losses_fn(params, batch), {"mean": jnp.mean(batch["x"])}

    start = {"mean": jnp.zeros(())}
    one, one_metrics = make_train_step(with_statistics, tx, with_model_state=True)(
        make_state(tx, model_state=start), make_batch()
    )
    mesh, spec = data_mesh(), jax.sharding.PartitionSpec
    step = make_train_step(with_statistics, tx, with_model_state=True, axis_name="data")
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec()
    )
    many, many_metrics = jax.jit(mapped)(
        make_state(tx, model_state=start), shard_batch(make_batch(), mesh)
    )
    chex.assert_trees_all_close(many.params, one.params, atol=1e-6)
    chex.assert_trees_all_close(many.model_state, one.model_state, atol=1e-6)
    chex.assert_trees_all_close(many_metrics, one_metrics, rtol=1e-5)


def test_create_wants_a_typed_key():
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        TrainState.create({"w": jnp.ones(1)}, optax.sgd(1.0), key=jnp.zeros(2))
