"""What every balancer promises as an optax transform, over the whole catalogue."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

import mtjax
from tests.balancing import matrices, model
from tests.balancing.catalogue import METHODS, jitted

by_label = lambda method: method.label
each_method = pytest.mark.parametrize("method", METHODS, ids=by_label)
SIZE = len(model.NAMES)


@functools.cache
def step_of(method):
    """A compiled step of the model, which counts its traces, and the balancer."""
    tx = method.make(SIZE)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(params, state, batch, present, key):
        return model.update(
            tx, params, state, batch, present=present, key=key, unknown="ignored"
        )

    return step, tx


EVERYONE = jnp.ones(SIZE, bool)
KEY = jax.random.key(5)


@each_method
def test_keeps_structure_and_dtype_in_one_trace(method):
    params, batch = model.params(), model.batch()
    step, tx = step_of(method)
    state = start = tx.init(params)
    for i in range(3):
        updates, state = step(params, state, batch, EVERYONE, jax.random.key(i))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(model.raw(state), model.raw(start))
    chex.assert_tree_all_finite(updates)


@each_method
def test_keeps_bfloat16_parameters_and_a_float32_state(method):
    params, batch = model.params(jnp.bfloat16), model.batch(dtype=jnp.bfloat16)
    tx = method.make(SIZE)
    state = tx.init(params)
    updates, after = jax.eval_shape(
        functools.partial(model.update, tx), params, state, batch
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        after, jax.eval_shape(lambda: tx.init(params))
    )
    floats = [
        x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert {x.dtype for x in floats} <= {jnp.dtype("float32")}


@each_method
def test_fresh_states_can_be_donated(method):
    tx, params = method.make(SIZE), model.params()
    touch = jax.jit(lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0)
    for _ in range(2):  # a buffer that two states share is gone the second time
        state = touch(tx.init(params))
    chex.assert_trees_all_equal(model.raw(state), model.raw(tx.init(params)))


@each_method
def test_runs_in_scan_cond_and_vmap(method):
    tx, batch, seeds = method.make(SIZE), model.batch(), (0, 1)

    @jax.jit
    @jax.vmap
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = jax.lax.cond(
                params["trunk"]["bias"][0] < 1e6,
                lambda: model.update(tx, params, state, batch, key=KEY),
                lambda: (optax.tree.zeros_like(params), state),
            )
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=2)[0][0]

    starts = [model.params(seed=seed) for seed in seeds]
    trained = train(jax.tree.map(lambda *x: jnp.stack(x), *starts))
    for i, params in enumerate(starts):
        state = tx.init(params)
        for _ in range(2):
            updates, state = step_of(method)[0](params, state, batch, EVERYONE, KEY)
            params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], trained), params, rtol=1e-3, atol=1e-4
        )


@each_method
def test_lazy_and_stacked_gradients_agree(method):
    rows = jnp.asarray(matrices.sample(matrices.conflicting, SIZE), jnp.float32)
    tx = method.make(SIZE)
    losses = dict.fromkeys(model.NAMES, jnp.ones(()))

    def losses_fn(params):
        steep = rows @ params
        # With these slopes, but as in the catalogue the same wherever they are taken.
        values = 1.0 + steep - jax.lax.stop_gradient(steep)
        return dict(zip(model.NAMES, values, strict=True))

    @jax.jit
    def lazy(params, key):
        _, grads = mtjax.value_and_task_grads(losses_fn)(params)
        # The first step's weights do not depend on how the losses went on.
        return tx.update(
            grads,
            tx.init(params),
            params,
            losses=losses,
            losses_fn=losses_fn,
            validation_losses_fn=losses_fn,
            resampled=[grads, grads],
            key=key,
        )[0]

    stacked, _ = jitted(method, SIZE)(rows, key=KEY)
    chex.assert_trees_all_close(lazy(rows[0], KEY), stacked, rtol=1e-4, atol=1e-4)


@each_method
@pytest.mark.parametrize(
    "kind", [*matrices.REGULAR, *matrices.DEGENERATE], ids=lambda k: k.__name__
)
def test_is_total_on_matrices_of_every_kind_and_scale(method, kind):
    update = jitted(method, 6)
    for scale in (1e-10, 1.0, 1e15):
        if kind is matrices.extreme and scale != 1.0:
            continue
        grads = matrices.sample(kind, 6) * scale
        losses = np.full(6, scale)
        state = None
        for _ in range(2):
            updates, state = update(grads, state, losses)
        chex.assert_tree_all_finite((updates, model.raw(state)))


@each_method
def test_is_total_on_zero_gradients_and_losses(method):
    grads = matrices.sample(matrices.normal, 6)
    for rows in (np.zeros_like(grads), grads * (np.arange(6) > 0)[:, None]):
        state = None
        for _ in range(2):
            updates, state = jitted(method, 6)(rows, state, np.zeros(6))
        chex.assert_tree_all_finite((updates, model.raw(state)))
    np.testing.assert_array_equal(jitted(method, 6)(0.0 * grads)[0], 0.0)


@each_method
def test_absent_task_is_as_if_it_did_not_exist(method):
    grads = matrices.sample(matrices.conflicting, 3)
    losses = np.array([1.0, 2.0, 3.0])
    three, two = jitted(method, 3), jitted(method, 2)
    present, key = [True, True, False], jax.random.key(5)
    state3, state2 = None, None
    for i in range(3):
        now = losses * (1.0 - 0.1 * i)
        with_nan = np.where(present, now, np.nan)
        updates3, state3 = three(grads, state3, with_nan, present, key)
        updates2, state2 = two(grads[:2], state2, now[:2], key=key)
        np.testing.assert_allclose(updates3, updates2, rtol=2e-4, atol=1e-5)


@each_method
def test_state_of_absent_task_stays_bit_identical(method):
    grads = matrices.sample(matrices.normal, 3)
    update, losses = jitted(method, 3), np.array([1.0, 2.0, 3.0])
    state = None
    for i in range(3):
        _, state = update(grads, state, losses * 0.9**i)
    _, after = update(grads, state, 0.5 * losses, [True, True, False])
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        if old.shape == (3,):
            assert old[2] == new[2]
    updates, after_none = update(grads, state, losses, [False, False, False])
    np.testing.assert_array_equal(updates, 0.0)
    for old, new in zip(
        jax.tree.leaves(state), jax.tree.leaves(after_none), strict=True
    ):
        if old.shape == (3,):
            np.testing.assert_array_equal(old, new)


@functools.cache
def chain_of(method):
    """A balancer first in a chain of optax's wrappers, compiled."""
    only_trunk = {"trunk": True, "heads": False}
    adam = optax.inject_hyperparams(optax.adam)(learning_rate=0.02)
    tx = optax.chain(
        method.make(SIZE),
        optax.masked(optax.clip(10.0), only_trunk),
        optax.apply_if_finite(adam, 3),
    )
    return tx, jax.jit(functools.partial(model.update, tx))


@each_method
def test_first_in_a_chain_it_lowers_the_losses(method):
    params, batch = model.params(), model.batch()
    tx, step = chain_of(method)
    state, start = tx.init(params), sum(model.losses_fn(params, batch).values())
    for _ in range(30):
        updates, state = step(params, state, batch)
        params = optax.apply_updates(params, updates)
    assert sum(model.losses_fn(params, batch).values()) < 0.9 * start


@each_method
def test_nan_shows_in_the_update_and_not_in_the_state(method):
    params, batch = model.params(), model.batch()
    tx, step = chain_of(method)
    _, state = step(params, tx.init(params), batch)
    broken = jax.tree.map(lambda x: x * jnp.nan, batch)
    updates, state = step(params, state, broken)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    updates, state = step(params, state, batch)
    chex.assert_tree_all_finite(updates)
    assert int(state[-1].total_notfinite) == 1
    assert any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    "method", [m for m in METHODS if jax.tree.leaves(m.make(3).init(0))], ids=by_label
)
def test_state_survives_a_checkpoint_bit_for_bit(method, tmp_path):
    params, batch = model.params(), model.batch()
    step, tx = step_of(method)
    _, state = step(params, tx.init(params), batch, EVERYONE, KEY)
    path = str(tmp_path / "state")
    ocp.save(path, state)
    restored = ocp.load(path, abstract_state=jax.tree.map(_abstract, state))
    chex.assert_trees_all_equal(model.raw(restored), model.raw(state))
    chex.assert_trees_all_equal(
        step(params, restored, batch, EVERYONE, KEY)[0],
        step(params, state, batch, EVERYONE, KEY)[0],
    )


def _abstract(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
