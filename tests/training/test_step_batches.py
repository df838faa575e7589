"""Steps that get further batches and held-out data beside their batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.training import TrainState, data_mesh, make_train_step, shard_batch
from tests.balancing import model


def observer():
    """Adds the gradients up and keeps what else it was told in its state."""

    def init(params):
        del params
        return {"slopes": jnp.zeros((2, 3)), "held_out": jnp.zeros(3)}

    def update(updates, state, params=None, *, resampled, validation_losses_fn, **rest):
        del rest
        ones = optax.tree.ones_like(params)
        held_out = validation_losses_fn(params)
        state = {
            "slopes": jnp.stack([grads.inner(ones) for grads in resampled]),
            "held_out": jnp.stack([held_out[name] for name in model.NAMES]),
        }
        return updates.combine(), state

    return optax.GradientTransformationExtraArgs(init, update)


def fresh(tx, **kwargs):
    return TrainState.create(model.params(), tx, key=jax.random.key(7), **kwargs)


def expected():
    """What the observer sees of batches 2, 3 and held-out batch 4, one by one."""
    params = model.params()

    def slopes(seed):
        _, grads = model.grad_fn(params, model.batch(16, seed=seed))
        return grads.inner(optax.tree.ones_like(params))

    held_out = model.losses_fn(params, model.batch(16, seed=4))
    return {
        "slopes": np.stack([slopes(2), slopes(3)]),
        "held_out": np.stack([held_out[name] for name in model.NAMES]),
    }


BATCH, *OTHERS, HELD_OUT = (model.batch(16, seed=seed) for seed in (1, 2, 3, 4))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_balancers_see_the_other_batches_at_the_same_parameters(accumulate):
    tx = observer()
    step = make_train_step(model.losses_fn, tx, accumulate=accumulate)
    state, metrics = step(fresh(tx), BATCH, resampled=OTHERS, validation=HELD_OUT)
    chex.assert_trees_all_close(state.opt_state, expected(), rtol=1e-5)
    plain = make_train_step(model.losses_fn, mtjax.equal())
    alone, alone_metrics = plain(fresh(mtjax.equal()), BATCH)
    chex.assert_trees_all_close(state.params, alone.params, atol=1e-6)
    chex.assert_trees_all_close(metrics, alone_metrics, rtol=1e-5)


def test_eight_devices_see_the_same():
    tx = observer()
    mesh, spec = data_mesh(), jax.sharding.PartitionSpec
    step = make_train_step(model.losses_fn, tx, axis_name="data")
    split = spec("data")
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(spec(), split, spec(), split, split),
        out_specs=spec(),
    )
    batches = shard_batch((BATCH, OTHERS, HELD_OUT), mesh)
    state, _ = jax.jit(mapped)(
        fresh(tx), batches[0], jnp.ones(3, bool), batches[1], batches[2]
    )
    chex.assert_trees_all_close(state.opt_state, expected(), rtol=1e-5)


def test_absent_tasks_are_absent_from_the_other_batches():
    def update(grads, state, step):
        del state
        bias = [other.stack()["trunk"]["bias"] for other in step.resampled]
        return grads.combine(), jnp.stack(bias)

    tx = mtjax.balancing.balancer("sum", lambda params: jnp.zeros((2, 3, 3)), update)
    step = make_train_step(model.losses_fn, tx)
    state, _ = step(fresh(tx), BATCH, jnp.array([True, False, True]), OTHERS)
    np.testing.assert_array_equal(state.opt_state[:, 1], 0.0)
    assert np.all(np.asarray(state.opt_state)[:, [0, 2]] != 0.0)


def test_every_batch_has_a_key_of_its_own_and_the_first_alone_changes_the_model_state():
    def losses_fn(params, batch, *, model_state, key):
        noise = jax.random.normal(key, ())
        losses = model.losses_fn(params, batch)
        losses = {name: loss * noise for name, loss in losses.items()}
        return losses, {"mean": jnp.mean(batch["x"]) + 0.0 * model_state["mean"]}

    tx = observer()
    step = make_train_step(losses_fn, tx, with_model_state=True, with_key=True)
    state = fresh(tx, model_state={"mean": jnp.zeros(())})
    state, metrics = step(state, BATCH, resampled=[BATCH, BATCH], validation=BATCH)
    np.testing.assert_allclose(
        state.model_state["mean"], np.mean(np.asarray(BATCH["x"])), rtol=1e-5
    )
    first, second = state.opt_state["slopes"]
    reported = np.stack([metrics["losses"][name] for name in model.NAMES])
    assert not np.allclose(first, second)
    assert not np.allclose(reported, state.opt_state["held_out"])


def test_what_a_balancer_needs_and_a_step_does_not_get_is_named():
    tx = optax.chain(mtjax.modo(3), optax.sgd(0.1))
    step = make_train_step(model.losses_fn, tx)
    with pytest.raises(ValueError, match="`modo` needs the extra argument `resampled`"):
        step(fresh(tx), BATCH)
    with pytest.raises(TypeError, match=r"`resampled` must be a sequence.*got dict"):
        step(fresh(tx), BATCH, resampled=BATCH)


def test_a_stochastic_balancer_learns():
    tx = optax.chain(mtjax.modo(3), optax.adam(0.02))
    step, state = make_train_step(model.losses_fn, tx), fresh(tx)
    for _ in range(30):
        state, metrics = step(state, BATCH, resampled=OTHERS)
    start = model.losses_fn(model.params(), BATCH)
    assert sum(metrics["losses"].values()) < 0.9 * sum(start.values())
