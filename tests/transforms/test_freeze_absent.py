import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from tests.balancing import model

SPLIT = mtjax.parameter_split(model.losses_fn, model.params(), model.batch())
CHAINS = {
    "adamw": lambda: optax.chain(mtjax.pcgrad(), optax.adamw(0.1, weight_decay=0.1)),
    "momentum": lambda: optax.chain(mtjax.uw(3), optax.sgd(0.1, momentum=0.9)),
    "multi_transform": lambda: optax.chain(
        mtjax.equal(),
        optax.multi_transform(
            {
                "shared": optax.adamw(0.1),
                **{name: optax.adam(0.2) for name in model.NAMES},
            },
            SPLIT.labels(),
        ),
    ),
}


def of_head(tree, name):
    """What belongs to a task's head anywhere in a tree of parameters or state."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jax.tree_util.keystr(path).endswith(f"['heads']['{name}']")
    }


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_absent_task_keeps_head_and_moments_bit_for_bit(chain):
    params, batch, tx = model.params(), model.batch(), mtjax.freeze_absent(chain())
    step = jax.jit(functools.partial(model.update, tx))
    state = tx.init(params)
    chex.assert_trees_all_equal_structs(state, chain().init(params))
    everyone, without_b = jnp.array([True] * 3), jnp.array([True, False, True])
    updates, state = step(params, state, batch, present=everyone)
    params = optax.apply_updates(params, updates)
    start = (params, state)
    for _ in range(3):
        updates, state = step(params, state, batch, present=without_b)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(model.raw(state), model.raw(start[1]))
    assert of_head(state, "b")
    chex.assert_trees_all_equal(of_head((params, state), "b"), of_head(start, "b"))
    for name in ("a", "c"):
        before, after = of_head(start, name), of_head((params, state), name)
        assert all(np.any(after[path] != before[path]) for path in before)
    assert np.all(params["trunk"]["kernel"] != start[0]["trunk"]["kernel"])


@pytest.mark.parametrize("present", [None, jnp.array([True, True, True])])
def test_with_everyone_present_it_is_the_chain_itself(present):
    params, batch, chain = model.params(), model.batch(), CHAINS["adamw"]()
    got, expected = (
        jax.jit(functools.partial(model.update, tx))(
            params, tx.init(params), batch, present=present
        )
        for tx in (mtjax.freeze_absent(chain), chain)
    )
    chex.assert_trees_all_equal(model.raw(got), model.raw(expected))


def test_with_nobody_present_nothing_moves():
    params, batch = model.params(), model.batch()
    tx = mtjax.freeze_absent(CHAINS["adamw"]())
    step = jax.jit(functools.partial(model.update, tx))
    _, state = step(params, tx.init(params), batch, present=jnp.array([True] * 3))
    updates, after = step(params, state, batch, present=jnp.array([False] * 3))
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    chex.assert_trees_all_equal(after[1][0].mu, state[1][0].mu)
    chex.assert_trees_all_equal(after[1][0].nu, state[1][0].nu)


def test_plain_stacked_gradients_count_as_shared():
    tx = mtjax.freeze_absent(optax.chain(mtjax.equal(), optax.adamw(0.1)))
    params, grads = jnp.ones(2), jnp.eye(2)
    update = jax.jit(
        lambda present: tx.update(grads, tx.init(params), params, present=present)
    )
    some, _ = update(jnp.array([True, False]))
    nobody, _ = update(jnp.array([False, False]))
    assert np.all(some != 0)
    np.testing.assert_array_equal(nobody, 0.0)


def test_unreached_parameters_follow_the_chain():
    def losses_fn(params):
        return {"a": params["used"].sum(), "b": 2.0 * params["used"].sum()}

    params = {"used": jnp.ones(2), "unused": jnp.ones(2)}
    tx = mtjax.freeze_absent(
        optax.chain(mtjax.equal(), optax.adamw(0.1, weight_decay=0.5))
    )
    _, grads = mtjax.value_and_task_grads(losses_fn)(params)
    updates, _ = tx.update(
        grads, tx.init(params), params, present=jnp.array([False, False])
    )
    np.testing.assert_array_equal(updates["used"], 0.0)
    np.testing.assert_allclose(updates["unused"], -0.05, rtol=1e-5)
