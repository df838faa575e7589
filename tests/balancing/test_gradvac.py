import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.balancing.gradvac import vaccinated_weights
from mtjax.balancing.pcgrad import random_orders
from tests.balancing import matrices, references_gradients
from tests.balancing.catalogue import METHODS, jitted

METHOD = next(m for m in METHODS if m.factory is mtjax.gradvac)
rotate = jax.jit(vaccinated_weights)


def targets(size, seed=0):
    draw = np.random.default_rng([size, seed]).uniform(-0.3, 0.6, (size, size))
    return draw * (1 - np.eye(size))


@pytest.mark.parametrize("size", [3, 12])
@pytest.mark.parametrize(
    "kind",
    [*matrices.REGULAR, matrices.low_rank, matrices.scaled],
    ids=lambda k: k.__name__,
)
def test_is_the_vaccine_on_whole_gradients(kind, size):
    grads, key = matrices.sample(kind, size), jax.random.key(7)
    rho_bar = targets(size)
    weights, rho = rotate(
        jnp.asarray(matrices.gramian(grads)),
        jnp.asarray(rho_bar, jnp.float32),
        key=key,
    )
    orders = np.asarray(random_orders(size, key=key))
    expected, after = references_gradients.vaccine(grads, orders, rho_bar, 1.0)
    update = np.asarray(weights, np.float64).sum(0) @ grads
    scale = max(np.linalg.norm(expected), np.linalg.norm(grads, axis=1).max())
    np.testing.assert_allclose(update, expected, atol=1e-3 * scale)
    np.testing.assert_allclose(rho, after, atol=1e-3)


def test_averages_follow_the_cosines():
    beta, key = 0.25, jax.random.key(3)
    tx = mtjax.gradvac(4, beta=beta)
    update = jax.jit(lambda g, state: tx.update(g, state, key=key))
    orders = np.asarray(random_orders(4, key=key))
    state, expected = tx.init(None), np.zeros((4, 4))
    for seed in range(4):
        grads = matrices.sample(matrices.narrow, 4, seed)
        updates, state = update(jnp.asarray(grads, jnp.float32), state)
        direction, expected = references_gradients.vaccine(
            grads, orders, expected, beta
        )
        np.testing.assert_allclose(updates, direction, atol=2e-3)
        np.testing.assert_allclose(state.rho_bar, expected, atol=1e-4)


def test_with_targets_of_zero_is_pcgrad():
    grads, key = matrices.sample(matrices.narrow, 6), jax.random.key(2)
    surgery = next(m for m in METHODS if m.factory is mtjax.pcgrad)
    np.testing.assert_allclose(
        jitted(METHOD, 6)(grads, key=key)[0],
        jitted(surgery, 6)(grads, key=key)[0],
        atol=1e-3,
    )


def test_averages_of_absent_tasks_and_of_zero_gradients_stay():
    grads = jnp.asarray(matrices.sample(matrices.normal, 3), jnp.float32)
    tx = mtjax.gradvac(3, beta=0.5)
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(None))
    everyone, few = jnp.ones(3, bool), jnp.array([True, False, True])
    for rows, present in (
        (grads.at[1].set(jnp.nan), few),
        (grads.at[1].set(0), everyone),
    ):
        _, after = update(rows, state, present=present)
        moved = np.asarray(after.rho_bar != state.rho_bar)
        expected = np.zeros((3, 3), bool)
        expected[[0, 2], [2, 0]] = True
        np.testing.assert_array_equal(moved, expected)


def test_one_set_of_averages_per_group_of_parameters():
    rng = np.random.default_rng(0)
    grads = {
        name: jnp.asarray(rng.standard_normal((2, 3)), jnp.float32) for name in "ab"
    }
    params = jax.tree.map(lambda g: g[0], grads)
    vaccines = {name: mtjax.gradvac(2, beta=0.5) for name in "ab"}
    tx = optax.partition(vaccines, {"a": "a", "b": "b"})
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for name in "ab":
        alone, _ = vaccines[name].update(grads[name], vaccines[name].init(None))
        np.testing.assert_allclose(updates[name], alone, rtol=1e-6)


@pytest.mark.parametrize("beta", [-0.1, 1.5])
def test_beta_is_a_rate(beta):
    with pytest.raises(ValueError, match=r"`beta` must be in \[0, 1\], got"):
        mtjax.gradvac(2, beta=beta)
