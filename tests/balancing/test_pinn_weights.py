"""`grad_norm_weights` and `ntk_weights`, on a network that solves a small equation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax


def compiled(tx):
    return jax.jit(
        lambda g, s, p=None, present=None: tx.update(g, s, p, present=present)
    )


def test_norm_weights_follow_the_paper():
    tx = mtjax.grad_norm_weights(3, momentum=0.8, update_every=2)
    update, state = compiled(tx), tx.init(None)
    weights = np.ones(3)
    for i, grads in enumerate(np.random.default_rng(0).standard_normal((5, 3, 4))):
        if i % 2 == 0:
            norms = np.linalg.norm(grads, axis=1)
            weights = 0.8 * weights + 0.2 * norms.sum() / norms
        got, state = update(jnp.asarray(grads, jnp.float32), state)
        np.testing.assert_allclose(state.weights, weights, rtol=1e-4)
        np.testing.assert_allclose(got, weights @ grads, rtol=1e-3, atol=1e-4)


def test_norm_weights_settle_where_all_weighted_norms_are_the_sum_of_the_norms():
    tx = mtjax.grad_norm_weights(3, update_every=1)
    update, state = compiled(tx), tx.init(None)
    grads = jnp.diag(jnp.array([0.1, 1.0, 4.0]))
    for _ in range(150):
        got, state = update(grads, state)
    np.testing.assert_allclose(got, 5.1, rtol=1e-4)


@pytest.mark.parametrize("lost", [0.0, np.nan], ids=["zero", "nan"])
def test_a_task_whose_size_says_nothing_keeps_its_weight(lost):
    tx = mtjax.grad_norm_weights(3, update_every=1, momentum=0.5)
    update, state = compiled(tx), tx.init(None)
    _, state = update(jnp.diag(jnp.array([1.0, 2.0, 3.0])), state)
    _, after = update(jnp.diag(jnp.array([1.0, lost, 3.0])), state)
    assert after.weights[1] == state.weights[1]
    expected = 0.5 * state.weights + 0.5 * 4.0 / jnp.array([1.0, 1.0, 3.0])
    np.testing.assert_allclose(after.weights[::2], expected[::2], rtol=1e-5)


def network(params, x):
    hidden = jnp.tanh(x[:, None] * params["in"][None, :] + params["bias"][None, :])
    return hidden @ params["out"]


def residuals(params):
    """Of u' = -u with u(0) = 1."""
    x = jnp.linspace(0.0, 1.0, 5)
    slope = jax.vmap(jax.grad(lambda x: network(params, x[None])[0]))
    return {
        "start": network(params, jnp.zeros(1)) - 1.0,
        "equation": slope(x) + network(params, x),
    }


def parameters():
    draw = np.random.default_rng(0).standard_normal
    names = ("in", "bias", "out")
    return {name: jnp.asarray(draw(4), jnp.float32) for name in names}


@pytest.mark.parametrize("batch_size", [2, 32])
def test_traces_are_those_of_the_kernels(batch_size):
    params = parameters()
    traces = jax.jit(lambda p: mtjax.ntk_traces(residuals, p, batch_size=batch_size))
    jacobians = jax.jacfwd(residuals)(params)
    expected = []
    for task in ("equation", "start"):
        rows = np.concatenate(list(jacobians[task].values()), axis=1)
        kernel = rows.astype(np.float64) @ rows.T
        expected.append(np.trace(kernel))
    np.testing.assert_allclose(traces(params), expected, rtol=1e-5)


def test_ntk_weights_make_the_mean_rates_of_decay_the_same():
    params = parameters()
    traces_fn = lambda params: mtjax.ntk_traces(residuals, params)
    tx = mtjax.ntk_weights(2, traces_fn, momentum=0.0, update_every=2)
    losses_fn = lambda p: {t: 0.5 * jnp.sum(r**2) for t, r in residuals(p).items()}

    @jax.jit
    def step(params, state):
        losses, grads = mtjax.value_and_task_grads(losses_fn)(params)
        return *tx.update(grads, state, params, losses=losses), grads.stack()

    updates, state, rows = step(params, tx.init(params))
    traces = np.asarray(traces_fn(params))
    np.testing.assert_allclose(state.weights * traces, traces.sum(), rtol=1e-5)
    for name in params:
        expected = state.weights @ rows[name]
        np.testing.assert_allclose(updates[name], expected, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda p: 1.5 * p, params)
    _, after, _ = step(moved, state)
    np.testing.assert_array_equal(after.weights, state.weights)
    _, after, _ = step(moved, after)
    assert not np.allclose(after.weights, state.weights, rtol=1e-3)


def test_absent_tasks_do_not_count_in_the_sum_of_traces():
    tx = mtjax.ntk_weights(3, lambda p: jnp.array([1.0, 2.0, 5.0]), momentum=0.0)
    present = jnp.array([True, True, False])
    _, state = compiled(tx)(jnp.eye(3), tx.init(None), jnp.zeros(3), present)
    np.testing.assert_allclose(state.weights, [3.0, 1.5, 1.0], rtol=1e-6)


def test_ntk_weights_stand_in_front_of_another_balancer():
    make = lambda: mtjax.ntk_weights(3, lambda p: p**2, momentum=0.0)
    chain = optax.chain(mtjax.scale_by_weighting(make()), mtjax.equal())
    params, grads = jnp.array([1.0, 2.0, 3.0]), jnp.ones((3, 3)) - jnp.eye(3)
    got, _ = chain.update(grads, chain.init(params), params)
    expected, _ = make().update(grads, make().init(params), params)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def one(params):
    return jnp.ones(1)


@pytest.mark.parametrize(
    ("make", "rule", "found"),
    [
        (lambda: mtjax.grad_norm_weights(2, momentum=1.0), "`momentum` must be", "1"),
        (
            lambda: mtjax.grad_norm_weights(2, update_every=0),
            "`update_every` must",
            "0",
        ),
        (
            lambda: mtjax.ntk_weights(2, one, momentum=-0.1),
            "`momentum` must be",
            "-0.1",
        ),
        (
            lambda: mtjax.ntk_traces(residuals, parameters(), batch_size=0),
            "`batch_size` must be at least 1",
            "0",
        ),
    ],
)
def test_bad_arguments(make, rule, found):
    with pytest.raises(ValueError, match=f"{rule}.*got {found}"):
        make()


def test_bad_calls():
    tx = mtjax.ntk_weights(2, one)
    with pytest.raises(ValueError, match="`ntk_weights` needs `params`"):
        tx.update(jnp.eye(2), tx.init(None))
    with pytest.raises(ValueError, match=r"`traces_fn` must return.*got shape \(1,\)"):
        tx.update(jnp.eye(2), tx.init(None), jnp.zeros(2))
