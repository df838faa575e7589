"""One device and eight give the same update."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mtjax
from tests.balancing import model
from tests.balancing.catalogue import METHODS

# At least one of each way to use the gradients: pull, Gramian, stack.
CHOSEN = [
    m
    for m in METHODS
    if m.factory in (mtjax.uw, mtjax.pcgrad, mtjax.nash_mtl, mtjax.graddrop)
]
KEY = jax.random.key(1)
SPLIT, REPLICATED = PartitionSpec("data"), PartitionSpec()


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@functools.cache
def on_one_device(method):
    tx, params = method.make(3), model.params()
    step = jax.jit(functools.partial(model.update, tx))
    return step(params, tx.init(params), model.batch(16), key=KEY)


@pytest.mark.parametrize("method", CHOSEN, ids=lambda m: m.label)
def test_jit_on_a_mesh(method, mesh):
    tx, params = method.make(3), model.params()
    batch = jax.device_put(model.batch(16), NamedSharding(mesh, SPLIT))
    params, state = jax.device_put(
        (params, tx.init(params)), NamedSharding(mesh, REPLICATED)
    )
    updates, after = jax.jit(functools.partial(model.update, tx))(
        params, state, batch, key=KEY
    )
    assert len(jax.tree.leaves(updates)[0].sharding.device_set) == 8
    _assert_same((updates, after), on_one_device(method))


@pytest.mark.parametrize("method", CHOSEN, ids=lambda m: m.label)
def test_shard_map_with_an_axis_name(method, mesh):
    tx, params = method.make(3), model.params()
    grad_fn = mtjax.value_and_task_grads(model.losses_fn, axis_name="data")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(REPLICATED, REPLICATED, SPLIT),
        out_specs=REPLICATED,
    )
    def step(params, state, batch):
        return model.update(tx, params, state, batch, grad_fn, key=KEY)

    got = step(params, tx.init(params), model.batch(16))
    _assert_same(got, on_one_device(method))


def _assert_same(got, expected):
    chex.assert_trees_all_close(
        jax.device_get(model.raw(got)),
        jax.device_get(model.raw(expected)),
        rtol=1e-4,
        atol=1e-5,
    )
    assert any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(got[0]))
