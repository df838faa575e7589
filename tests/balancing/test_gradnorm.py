import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from tests.balancing import matrices, model

RATE = 0.01


def slopes(weights, norms, target):
    """Central differences of the sum of distances to the targets."""
    objective = lambda w: np.abs(w * norms - target).sum()
    steps = 1e-6 * np.eye(len(weights))
    changes = [objective(weights + h) - objective(weights - h) for h in steps]
    return np.array(changes) / 2e-6


def reference(history, rows, alpha, initial_steps):
    """The paper's loop with plain gradient descent on the weights, in float64."""
    weights, seen = np.ones(rows.shape[1]), []
    for losses, grads in zip(history, rows):
        seen = [*seen, losses][:initial_steps]
        yield weights
        progress = losses / np.mean(seen, axis=0)
        norms = np.linalg.norm(grads, axis=1)
        target = np.mean(weights * norms) * (progress / progress.mean()) ** alpha
        slope = slopes(weights, norms, target)
        weights = weights - RATE * slope
        weights = weights * len(weights) / weights.sum()


@functools.cache
def compiled(**settings):
    tx = mtjax.gradnorm(3, optimizer=optax.sgd(RATE), **settings)

    @jax.jit
    def update(grads, state, losses, present):
        return tx.update(grads, state, losses=losses, present=present)

    return tx.init(None), update


@pytest.mark.parametrize(("alpha", "initial_steps"), [(1.5, 1), (0.5, 3)])
def test_follows_the_paper(alpha, initial_steps):
    state, update = compiled(alpha=alpha, initial_steps=initial_steps)
    rng = np.random.default_rng(0)
    history = rng.uniform(0.5, 2.0, (6, 3))
    rows = rng.standard_normal((6, 3, 5)) * np.array([0.3, 1.0, 3.0])[:, None]
    expected = reference(history, rows, alpha, initial_steps)
    for losses, grads, weights in zip(history, rows, expected):
        np.testing.assert_allclose(state.weights, weights, rtol=1e-4)
        assert float(state.weights.sum()) == pytest.approx(3.0, rel=1e-5)
        got, state = update(
            jnp.asarray(grads, jnp.float32), state, losses, jnp.ones(3, bool)
        )
        np.testing.assert_allclose(got, weights @ grads, rtol=1e-3, atol=1e-4)


def test_settles_where_all_weighted_norms_are_the_same():
    state, update = compiled(alpha=0.0)
    grads = jnp.diag(jnp.array([0.5, 1.0, 2.0]))
    for _ in range(150):
        _, state = update(grads, state, jnp.ones(3), jnp.ones(3, bool))
    norms = np.asarray(state.weights) * [0.5, 1.0, 2.0]
    np.testing.assert_allclose(norms, norms.mean(), rtol=0.05)


def test_keeps_its_weights_where_norms_and_rates_are_equal():
    state, update = compiled()
    turn = jnp.eye(3)[jnp.array([2, 0, 1])]
    for factor in (1.0, 0.5, 0.25):
        losses = factor * jnp.array([1.0, 2.0, 8.0])
        _, state = update(factor * turn, state, losses, jnp.ones(3, bool))
        np.testing.assert_array_equal(state.weights, 1.0)


def test_a_task_that_lags_behind_gains_weight():
    state, update = compiled()
    for losses in ([1.0, 1.0, 1.0], [0.5, 0.5, 0.9], [0.3, 0.3, 0.8]):
        _, state = update(jnp.eye(3), state, jnp.array(losses), jnp.ones(3, bool))
    assert state.weights[2] > 1.0 > state.weights[0] == state.weights[1]


def test_weights_of_the_present_keep_their_sum_and_stay_positive():
    state, update = compiled()
    grads = jnp.asarray(100.0 * matrices.sample(matrices.normal, 3), jnp.float32)
    losses, present = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])
    for i in range(4):  # steps that overshoot by far
        _, state = update(grads, state, losses * 0.5**i, present)
        assert float(state.weights[0] + state.weights[2]) == pytest.approx(2.0)
        assert float(state.weights.min()) > 0
        assert state.weights[1] == 1.0


def test_a_loss_that_is_not_positive_counts_as_the_smallest():
    state, update = compiled(eps=1e-2)
    small, low = jnp.array([1e-2, 1.0, 1.0]), jnp.array([-5.0, 1.0, 1.0])
    present = jnp.ones(3, bool)
    _, state = update(jnp.eye(3), state, jnp.ones(3), present)
    after = [update(jnp.eye(3), state, x, present)[1] for x in (low, small)]
    np.testing.assert_array_equal(after[0].weights, after[1].weights)
    assert np.all(np.isfinite(after[0].weights))


def test_takes_norms_at_the_shared_representation():
    """The norms are those of the Gramian, whatever the engine makes of it."""
    params, batch = model.params(), model.batch()
    tx = mtjax.gradnorm(3, alpha=0.0, optimizer=optax.sgd(RATE))

    def encode(params):
        return jnp.tanh(batch["x"] @ params["trunk"]["kernel"])

    def losses_from_representation(params, z):
        return {
            t: jnp.mean((z @ params["heads"][t] - batch["y"][:, i]) ** 2)
            for i, t in enumerate(model.NAMES)
        }

    pair = (encode, losses_from_representation)
    weights = {}
    for engine in ("stacked", "representation"):
        losses, grads = mtjax.value_and_task_grads(pair, engine=engine)(params)
        _, state = tx.update(grads, tx.init(params), params, losses=losses)
        norms = np.sqrt(np.diagonal(grads.gramian()))
        slope = norms * np.sign(norms - norms.mean())
        expected = 1.0 - RATE * slope
        weights[engine] = np.asarray(state.weights)
        np.testing.assert_allclose(
            weights[engine], 3 * expected / expected.sum(), rtol=1e-5
        )
    assert not np.allclose(weights["stacked"], weights["representation"], rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "rule", "found"),
    [
        ({"alpha": -1.0}, "`alpha` must not be negative", "-1"),
        ({"initial_steps": 0}, "`initial_steps` must be at least 1", "0"),
        ({"eps": 0.0}, "`eps` must be positive", "0"),
    ],
)
def test_bad_arguments(arguments, rule, found):
    with pytest.raises(ValueError, match=f"{rule}, got {found}"):
        mtjax.gradnorm(2, **arguments)
