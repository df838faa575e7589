"""Methods that look at losses alone: with an identity Jacobian, updates are weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from tests.balancing import references
from tests.balancing.losses_only import LOSSES, weights_of


def test_equal_is_the_sum_and_the_mean():
    for reduction, expected in (("sum", 1.0), ("mean", 1 / 3)):
        tx = mtjax.equal(reduction=reduction)
        np.testing.assert_allclose(tx.update(jnp.eye(3), tx.init(None))[0], expected)


def test_constant_takes_weights_by_name_or_in_order():
    update = weights_of(mtjax.constant({"c": 3.0, "a": 1.0, "b": 2.0}))
    np.testing.assert_allclose(update(LOSSES, optax.EmptyState())[0], [1.0, 2.0, 3.0])
    scheduled = {"c": optax.linear_schedule(1.0, 0.0, 2), "a": 1.0, "b": 2.0}
    update = weights_of(mtjax.constant(scheduled))
    state = mtjax.constant(scheduled).init(None)
    for last in (1.0, 0.5, 0.0, 0.0):
        weights, state = update(LOSSES, state)
        np.testing.assert_allclose(weights, [1.0, 2.0, last])
    update = weights_of(mtjax.constant([1.0, 0.0, 3.0]))
    np.testing.assert_allclose(update(LOSSES, optax.EmptyState())[0], [1.0, 0.0, 3.0])


@pytest.mark.parametrize(
    ("form", "fixed_point"),
    [("regression", np.log(LOSSES)), ("classification", np.log(2 * LOSSES))],
)
def test_uw_settles_where_the_weight_is_half_the_inverse_loss(form, fixed_point):
    tx = mtjax.uw(3, form=form, optimizer=optax.sgd(0.5))
    update, state = weights_of(tx), tx.init(None)
    for _ in range(150):
        weights, state = update(LOSSES, state)
    np.testing.assert_allclose(state.log_variances, fixed_point, atol=1e-4)
    np.testing.assert_allclose(weights, 1 / (2 * LOSSES), rtol=1e-4)


def test_uw_moves_along_the_gradient_of_its_objective():
    tx = mtjax.uw(3, optimizer=optax.sgd(0.1), start=0.4)
    weights, state = weights_of(tx)(LOSSES, tx.init(None))
    np.testing.assert_allclose(weights, 0.5 * np.exp(-0.4), rtol=1e-6)
    slope = 0.5 - 0.5 * np.exp(-0.4) * LOSSES
    np.testing.assert_allclose(state.log_variances, 0.4 - 0.1 * slope, rtol=1e-5)


def test_dwa_over_epochs():
    steps, tau = 2, 1.5
    tx = mtjax.dwa(3, steps, temperature=tau)
    update, state = weights_of(tx), tx.init(None)
    history = np.random.default_rng(0).uniform(0.5, 2.0, (5, steps, 3))
    means = history.mean(axis=1)
    for epoch, batches in enumerate(history):
        expected = np.ones(3)
        if epoch >= 2:
            expected = np.exp(means[epoch - 1] / means[epoch - 2] / tau)
            expected *= 3 / expected.sum()
        for losses in batches:
            weights, state = update(losses, state)
            np.testing.assert_allclose(weights, expected, rtol=1e-5)
            assert float(weights.sum()) == pytest.approx(3.0, abs=1e-5)


def test_dwa_with_equal_ratios_weighs_equally():
    tx = mtjax.dwa(3, 1)
    update, state = weights_of(tx), tx.init(None)
    for factor in (1.0, 0.7, 0.49, 0.343):
        weights, state = update(factor * LOSSES, state)
        np.testing.assert_allclose(weights, 1.0, rtol=1e-5)


def famo_reference(history, afters, *, learning_rate, weight_decay, floor, eps):
    """The paper's loop; `afters` are the losses that each step led to."""
    logits, moments = np.zeros(3), (np.zeros(3), np.zeros(3), 0)
    gaps = lambda losses: np.maximum(losses - floor, 0.0) + eps
    softmax = lambda w: np.exp(w) / np.exp(w).sum()
    for losses, after in zip(history, afters, strict=True):
        z = softmax(logits)
        ratios = z / gaps(losses)
        yield ratios / ratios.sum()
        delta = np.log(gaps(losses)) - np.log(gaps(after))
        slope = z * (delta - z @ delta) + weight_decay * logits
        change, moments = references.adam(slope, moments, learning_rate)
        logits = logits + change


@pytest.mark.parametrize("again", [True, False], ids=["same batch", "next batch"])
def test_famo_follows_the_paper(again):
    settings = {"learning_rate": 0.1, "weight_decay": 0.01}
    optimizer = optax.identity() if again else None
    tx = mtjax.famo(3, optimizer=optimizer, min_losses=0.1, eps=1e-3, **settings)
    update, state = weights_of(tx), tx.init(jnp.zeros(3))
    rng = np.random.default_rng(1)
    history = rng.uniform(0.2, 2.0, (6, 3))
    afters = history * rng.uniform(0.5, 1.0, (6, 3)) if again else history[1:]
    expected = famo_reference(
        history[: len(afters)], afters, floor=0.1, eps=1e-3, **settings
    )
    for losses, after, weights in zip(history, afters, expected):
        got, state = update(losses, state, after)
        np.testing.assert_allclose(got, weights, rtol=1e-4)
        assert float(got.sum()) == pytest.approx(1.0, abs=1e-5)


def test_famo_keeps_its_weights_when_all_losses_fall_alike():
    tx = mtjax.famo(3, weight_decay=0.0)
    update, state = weights_of(tx), tx.init(jnp.zeros(3))
    for factor in (1.0, 0.5, 0.25):
        _, state = update(factor * LOSSES, state)
    # Adam makes something of rounding errors in a zero slope, hence exact powers of 2.
    np.testing.assert_allclose(state.logits, 0.0, atol=0.05)


def test_famo_wraps_its_optimizer():
    inner = optax.sgd(0.1, momentum=0.9)
    tx = mtjax.famo(3, optimizer=inner)
    update, state = weights_of(tx), tx.init(jnp.zeros(3))
    inner_state = inner.init(jnp.zeros(3))
    for _ in range(2):
        weights = jax.nn.softmax(state.logits) / jnp.asarray(LOSSES + 1e-8)
        expected, inner_state = inner.update(weights / weights.sum(), inner_state)
        got, state = update(LOSSES, state, 0.9 * LOSSES)
        np.testing.assert_allclose(got, expected, rtol=1e-4)
