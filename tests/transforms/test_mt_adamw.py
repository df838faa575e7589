"""MT-AdamW: one task per step, whatever its scale and its share of the steps."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.transforms import mt_adamw, normalize_by_task_norm, scale_by_mt_adam
from tests.balancing import model

SPLIT = mtjax.parameter_split(model.losses_fn, model.params(), model.batch())
RATIOS = (0.6, 0.3, 0.1)


def stream(steps=6, seed=0):
    """Gradients of a trunk and a bias, and the tasks that they are of."""
    rng = np.random.default_rng(seed)
    grads = [
        {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32), "b": jnp.ones(2) * i}
        for i in range(1, steps + 1)
    ]
    return list(zip(grads, rng.integers(3, size=steps).tolist()))


def unit(tree):
    return jax.tree.map(lambda g: g / optax.tree.norm(tree), tree)


def follow(tx, grads, params=None, ids=True):
    """All updates of a stream, and the last state."""
    params = jax.tree.map(jnp.ones_like, grads[0][0]) if params is None else params
    state, update, updates = tx.init(params), jax.jit(tx.update), []
    for grad, task in grads:
        extra = {"task_id": jnp.int32(task)} if ids else {}
        change, state = update(grad, state, params, **extra)
        params = optax.apply_updates(params, change)
        updates.append(change)
    return updates, state


def test_golden_values():
    """An independent derivation in float64."""
    grads = stream()
    got, _ = follow(mt_adamw(0.1, RATIOS, (1, 2, 0.5), weight_decay=0.01), grads)
    theta, m, n = np.ones(8), np.zeros(8), np.zeros(8)
    for t, ((grad, task), update) in enumerate(zip(grads, got), 1):
        g = np.concatenate([np.ravel(grad["w"]), grad["b"]]).astype(np.float64)
        g = (1, 2, 0.5)[task] * g / np.linalg.norm(g)
        m = 0.9 * m + 0.1 / RATIOS[task] * g
        n = 0.999 * n + 0.001 / RATIOS[task] * g * g
        step = (m / (1 - 0.9**t)) / (np.sqrt(n / (1 - 0.999**t)) + 1e-8)
        step = -0.1 * (step + 0.01 * theta)
        theta = theta + step
        found = np.concatenate([np.ravel(update["w"]), update["b"]])
        np.testing.assert_allclose(found, step, rtol=1e-4, atol=1e-6)


def test_one_task_is_adamw_on_normalised_gradients():
    grads = [(grad, 0) for grad, _ in stream()]
    got, _ = follow(mt_adamw(0.1, [1.0], weight_decay=0.1), grads)
    units = [(unit(grad), 0) for grad, _ in grads]
    expected, _ = follow(optax.adamw(0.1, weight_decay=0.1), units, ids=False)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-7)


def test_equal_ratios_scale_moments_by_k_and_updates_by_its_root():
    grads = stream()
    got, state = follow(mt_adamw(1.0, [1, 1, 1], eps=0.0, weight_decay=0.0), grads)
    adam = optax.adam(1.0, eps=0.0)
    units = [(unit(grad), task) for grad, task in grads]
    expected, base = follow(adam, units, ids=False)
    times = lambda c, tree: jax.tree.map(lambda x: c * x, tree)
    # Moments cancel in places: absolutely, to a rounding of their terms.
    chex.assert_trees_all_close(state[1].mu, times(3, base[0].mu), rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(state[1].nu, times(3, base[0].nu), rtol=1e-5)
    chex.assert_trees_all_close(got, times(3**0.5, expected), rtol=1e-4)


@pytest.mark.parametrize("norm_scope", ["global", "per_tensor"])
def test_the_scale_of_a_loss_does_not_matter(norm_scope):
    grads = stream()
    scaled = [
        (jax.tree.map(lambda g, c=(1e-10, 1.0, 1e15)[t]: c * g, grad), t)
        for grad, t in grads
    ]
    tx = mt_adamw(0.1, RATIOS, norm_scope=norm_scope)
    chex.assert_trees_all_close(follow(tx, scaled)[0], follow(tx, grads)[0], rtol=1e-4)


def test_norm_scopes():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]]), "z": jnp.zeros(2)}
    of = lambda **kwargs: normalize_by_task_norm([5.0], **kwargs).update(
        grads, optax.EmptyState(), task_id=0
    )[0]
    want = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]]), "z": jnp.zeros(2)}
    chex.assert_trees_all_close(of(), want, rtol=1e-6)
    want = {"a": jnp.array([5.0, 0.0]), "b": jnp.array([[5.0]]), "z": jnp.zeros(2)}
    chex.assert_trees_all_close(of(norm_scope="per_tensor"), want, rtol=1e-6)


def test_moments_are_those_of_the_sum_over_tasks_in_expectation():
    rng, steps = np.random.default_rng(0), 20_000
    units = rng.normal(size=(3, 4))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    scales = np.array([1.0, 2.0, 0.5])
    ids = jnp.asarray(rng.choice(3, size=steps, p=RATIOS))
    tx = optax.chain(
        normalize_by_task_norm(scales.tolist()),
        scale_by_mt_adam(RATIOS, b1=0.9, b2=0.9, inactive="decay"),
    )
    rows = jnp.asarray(7 * units, jnp.float32)

    @jax.jit
    def run(ids):
        def body(state, task):
            _, state = tx.update(rows[task], state, task_id=task)
            return state, (state[1].mu, state[1].nu)

        return jax.lax.scan(body, tx.init(rows[0]), ids)[1]

    first, second = (np.asarray(x)[100:].mean(axis=0) for x in run(ids))
    # The standard error of a mean of steps draws, each of size up to scale / ratio.
    error = np.sqrt(np.sum(scales**2 / RATIOS) / steps)
    np.testing.assert_allclose(first, scales @ units, atol=4 * error)
    squares = scales**2 @ units**2
    error = np.sqrt(np.sum(scales**4 / RATIOS) / steps)
    np.testing.assert_allclose(second, squares, atol=4 * error)


def test_weight_decay_is_decoupled():
    params = model.params()
    zeros = optax.tree.zeros_like(params)
    tx = mt_adamw(0.1, RATIOS, weight_decay=0.5, split=SPLIT)
    updates, state = tx.update(zeros, tx.init(params), params, task_id=1)
    shrunk = lambda tree: jax.tree.map(lambda p: -0.05 * p, tree)
    chex.assert_trees_all_close(updates["trunk"], shrunk(params["trunk"]), rtol=1e-6)
    np.testing.assert_allclose(
        updates["heads"]["b"], -0.05 * params["heads"]["b"], rtol=1e-6
    )
    np.testing.assert_array_equal(updates["heads"]["a"], 0.0)
    chex.assert_trees_all_equal(state[1].mu, zeros)
    chex.assert_trees_all_equal(state[1].nu, zeros)


def task_gradient(params, batch, task):
    """The gradient of a traced task, by a switch over losses."""
    losses = [lambda p, t=t: model.losses_fn(p, batch)[t] for t in model.NAMES]
    return jax.grad(lambda p: jax.lax.switch(task, losses, p))(params)


@pytest.mark.parametrize("split", [SPLIT, None])
def test_freeze_keeps_what_the_task_does_not_use_bit_for_bit(split):
    tx = mt_adamw(0.1, RATIOS, weight_decay=0.1, split=split)
    params, batch, traces = model.params(), model.batch(), []

    @jax.jit
    def step(params, state, task):
        traces.append(1)
        grads = task_gradient(params, batch, task)
        updates, state = tx.update(grads, state, params, task_id=task)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for task in (0, 1, 2, 0):
        before, moments = params, state[1]
        params, state = step(params, state, jnp.int32(task))
        for i, name in enumerate(model.NAMES):
            same = np.array_equal(params["heads"][name], before["heads"][name])
            kept = all(
                np.array_equal(new["heads"][name], old["heads"][name])
                for new, old in zip(state[1], moments)
            )
            assert same == kept == (i != task)
        assert np.all(params["trunk"]["kernel"] != before["trunk"]["kernel"])
    assert len(traces) == 1
    assert [int(state[1].counts["heads"][n]) for n in model.NAMES] == [2, 1, 1]
    assert int(state[1].counts["trunk"]["kernel"]) == 4


def test_decay_moves_heads_by_momentum():
    tx = mt_adamw(0.1, RATIOS, inactive="decay", weight_decay=0.0)
    params, batch = model.params(), model.batch()
    state = tx.init(params)
    for task in (0, 1):
        grads = task_gradient(params, batch, task)
        updates, state = tx.update(grads, state, params, task_id=task)
    assert np.all(updates["heads"]["a"] != 0)
    np.testing.assert_array_equal(updates["heads"]["c"], 0.0)


def test_a_head_of_one_task_follows_adam_itself():
    grads = jax.tree.map(lambda p: 0.01 * jnp.ones_like(p), model.params())
    adam = scale_by_mt_adam(RATIOS, split=SPLIT)
    _, state = adam.update(grads, adam.init(grads), task_id=2)
    np.testing.assert_allclose(state.mu["heads"]["c"], 0.1 * 0.01, rtol=1e-5)
    np.testing.assert_allclose(state.mu["trunk"]["bias"], 1.0 * 0.01, rtol=1e-5)
    np.testing.assert_allclose(state.nu["trunk"]["bias"], 1e-2 * 1e-4, rtol=1e-5)


def test_ratios_among_the_tasks_that_share_a_leaf():
    def losses_fn(p):
        return {
            "a": p["ab"] + p["all"],
            "b": 2 * p["ab"] + p["all"],
            "c": p["all"] * 3.0,
        }

    params = {"ab": jnp.array(1.0), "all": jnp.array(1.0)}
    split = mtjax.parameter_split(losses_fn, params)
    tx = scale_by_mt_adam(RATIOS, b1=0.0, split=split)
    ones = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(ones, tx.init(params), task_id=1)
    np.testing.assert_allclose(state.mu["ab"], 0.9 / 0.3, rtol=1e-6)
    np.testing.assert_allclose(state.mu["all"], 1 / 0.3, rtol=1e-6)


@functools.cache
def spike(ratio, max_compensation=None):
    """Update of a rare task's own entry when it first comes, after 500 other steps."""
    tx = mt_adamw(
        1.0,
        [1 - ratio, ratio],
        weight_decay=0.0,
        inactive="decay",
        max_compensation=max_compensation,
    )
    often, rare = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    update = jax.jit(tx.update)
    state = tx.init(often)
    for _ in range(500):
        _, state = update(often, state, often, task_id=0)
    updates, _ = update(rare, state, often, task_id=1)
    return float(jnp.abs(updates[1]))


def test_rare_tasks_move_far_and_the_bound_stops_it():
    for ratio in (0.1, 0.01, 0.001):
        # The docstring's size, and the bias correction of the second moment.
        expected = 0.1 / np.sqrt(0.001 * ratio) * np.sqrt(1 - 0.999**501)
        np.testing.assert_allclose(spike(ratio), expected, rtol=1e-3)
    assert spike(0.001) > 9 * spike(0.1)
    np.testing.assert_allclose(spike(0.001, 10.0), spike(0.1), rtol=1e-3)


def test_zero_gradients_and_low_precision_stay_finite():
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jnp.ones(3, dtype)
        tx = mt_adamw(0.1, RATIOS, eps=0.0, inactive="decay")
        state = tx.init(params)
        for grads in (jnp.zeros(3, dtype), jnp.array([0, 1e-10, 1e15], dtype)):
            updates, state = tx.update(grads, state, params, task_id=0)
            chex.assert_tree_all_finite((updates, state))
            assert updates.dtype == dtype
        assert state[1].mu.dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mt_adamw(0.1, [0.5, 0.0]), "`sampling_ratios` must be positive"),
        (lambda: mt_adamw(0.1, []), "`task_scales` must hold one finite number per"),
        (lambda: mt_adamw(0.1, [1.0], [-1.0]), "`task_scales` must not be negative"),
        (lambda: mt_adamw(0.1, [1.0], [1.0, 1.0]), "`task_scales` must be of the"),
        (lambda: mt_adamw(0.1, {"a": 1}, {"b": 1}), "`task_scales` must be of the"),
        (lambda: mt_adamw(0.1, [1.0], b1=1.0), "`b1` must be in [0, 1), got 1.0"),
        (lambda: mt_adamw(0.1, [1.0], b2=-0.1), "`b2` must be in [0, 1), got -0.1"),
        (lambda: mt_adamw(0.1, [1.0], eps=-1.0), "`eps` must not be negative"),
        (lambda: mt_adamw(0.1, [1.0], weight_decay=-1.0), "`weight_decay` must not"),
        (lambda: mt_adamw(0.1, [1.0], max_compensation=0.5), "`max_compensation` mu"),
        (lambda: mt_adamw(0.1, [1.0], split=SPLIT), "one for each of the tasks ('a'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_split_of_other_parameters():
    tx = scale_by_mt_adam(RATIOS, split=SPLIT)
    with pytest.raises(ValueError, match="`split` must be that of the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), task_id=0)


@pytest.mark.parametrize(
    ("name", "tx"),
    [
        ("normalize_by_task_norm", normalize_by_task_norm([1.0])),
        ("scale_by_mt_adam", scale_by_mt_adam([1.0])),
        ("mt_adamw", mt_adamw(0.1, [1.0])),
    ],
)
def test_task_id_is_asked_for(name, tx):
    with pytest.raises(ValueError, match=f"`{name}` needs the extra argument `task_id"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
