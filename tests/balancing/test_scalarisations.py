"""Weightings that are, or come from, the gradient of one function of the losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.balancing import scalarisation
from tests.balancing.losses_only import LOSSES, weights_of

PREFERENCE = np.array([1.0, 2.0, 5.0])


def weigh(tx, losses=LOSSES):
    return np.asarray(weights_of(tx)(losses, tx.init(None))[0], np.float64)


def slopes(function, losses):
    """Central differences in float64."""
    steps = 1e-6 * np.abs(losses) * np.eye(len(losses))
    return np.array(
        [(function(losses + h) - function(losses - h)) / (2 * h.sum()) for h in steps]
    )


def cosmos(losses):
    r = PREFERENCE / PREFERENCE.sum()
    cosine = r @ losses / np.linalg.norm(r) / np.linalg.norm(losses)
    return r @ losses - 3.0 * cosine


def pbi(losses):
    w = PREFERENCE / np.linalg.norm(PREFERENCE)
    along = w @ (losses - 0.2)
    return along + 4.0 * np.linalg.norm(losses - 0.2 - along * w)


@pytest.mark.parametrize(
    ("tx", "function"),
    [
        (mtjax.scale_invariant(), lambda losses: np.log(losses).sum()),
        (mtjax.gls(), lambda losses: losses.prod() ** (1 / 3)),
        (mtjax.cosmos(PREFERENCE, penalty=3.0), cosmos),
        (mtjax.pbi(PREFERENCE, theta=4.0, reference=0.2), pbi),
        (mtjax.pbi(PREFERENCE, theta=4.0, reference=[0.2, 0.2, 0.2]), pbi),
    ],
    ids=["scale_invariant", "gls", "cosmos", "pbi", "pbi, reference per task"],
)
def test_weights_are_the_slopes_of_the_scalarisation(tx, function):
    for losses in (LOSSES, LOSSES[::-1], np.array([3.0, 0.7, 0.71])):
        np.testing.assert_allclose(
            weigh(tx, losses), slopes(function, losses), rtol=2e-5, atol=1e-6
        )


@pytest.mark.parametrize("make", [mtjax.scale_invariant, mtjax.gls, mtjax.uw_so])
@pytest.mark.parametrize("low", [0.0, -3.0, 1e-9])
def test_losses_that_have_no_logarithm_count_as_the_smallest(make, low):
    tx = make(eps=1e-2)
    got = weigh(tx, np.array([low, 1.0, 4.0]))
    np.testing.assert_allclose(got, weigh(tx, np.array([1e-2, 1.0, 4.0])), rtol=1e-6)
    assert np.all(got > 0) or make is mtjax.uw_so
    assert got[0] == got.max()


def test_an_own_scalarisation_of_the_tasks_that_are_present():
    def largest(losses, present):
        return jnp.max(losses, where=present, initial=0.0)

    tx = scalarisation("largest", largest)
    losses = jnp.array([1.0, 3.0, jnp.nan])
    for present, expected in (([1, 1, 0], [0, 1, 0]), ([1, 0, 0], [1, 0, 0])):
        got, _ = tx.update(
            jnp.eye(3), tx.init(None), losses=losses, present=jnp.array(present)
        )
        np.testing.assert_array_equal(got, expected)


def test_scaling_one_loss_scales_the_geometric_mean_alone():
    tx = mtjax.gls()
    factors = np.array([8.0, 1.0, 1.0])
    # Weights of gradients that grow with their losses.
    after = weigh(tx, factors * LOSSES) * factors
    np.testing.assert_allclose(after, 2.0 * weigh(tx), rtol=1e-5)


def test_uw_so_is_a_softmax_between_equal_weights_and_the_smallest_loss():
    shares = np.exp(1 / (0.5 * LOSSES))
    np.testing.assert_allclose(
        weigh(mtjax.uw_so(temperature=0.5)), shares / shares.sum(), rtol=1e-5
    )
    np.testing.assert_allclose(weigh(mtjax.uw_so(temperature=1e6)), 1 / 3, rtol=1e-5)
    cold = weigh(mtjax.uw_so(temperature=1e-3))
    np.testing.assert_allclose(cold, [1.0, 0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("distribution", ["normal", "dirichlet"])
def test_rlw_is_on_the_simplex_and_equal_in_expectation(distribution):
    tx = mtjax.rlw(distribution=distribution)
    state = tx.init(None)
    draw = jax.jit(jax.vmap(lambda key: tx.update(jnp.eye(3), state, key=key)[0]))
    weights = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    assert np.all(weights > 0)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(weights.mean(axis=0), 1 / 3, atol=0.015)
    if distribution == "dirichlet":  # marginals of a uniform draw from the simplex
        np.testing.assert_allclose(weights.var(axis=0), 1 / 18, rtol=0.1)
    else:
        logs = np.log(weights[:, 0] / weights[:, 1])
        assert logs.std() == pytest.approx(np.sqrt(2), rel=0.05)


def test_rlw_draws_anew_in_every_step_and_again_from_the_same_key():
    tx = mtjax.rlw(key=jax.random.key(3))
    update = jax.jit(lambda state: tx.update(jnp.eye(3), state))
    first, state = update(tx.init(None))
    second, _ = update(state)
    again, _ = update(tx.init(None))
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("make", [mtjax.cosmos, mtjax.pbi])
def test_losses_on_the_preferred_ray_get_its_weights(make):
    losses = 0.3 * PREFERENCE
    weights = weigh(make(PREFERENCE), losses)
    np.testing.assert_allclose(
        weights / weights.sum(), PREFERENCE / PREFERENCE.sum(), rtol=1e-5
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: mtjax.cosmos(PREFERENCE, penalty=20.0),
        lambda: mtjax.pbi(PREFERENCE, theta=20.0),
    ],
    ids=["cosmos", "pbi"],
)
def test_a_large_penalty_weighs_a_loss_below_the_ray_negatively(make):
    losses = np.array([5.0, 2.0, 1.0])
    weights = weigh(make(), losses)
    assert weights[2] < 0 < weights[0]
    # A step against the weights turns the losses towards the ray.
    cosine = lambda x: x @ PREFERENCE / np.linalg.norm(x)
    assert cosine(losses - 1e-3 * weights) > cosine(losses)


@pytest.mark.parametrize("make", [mtjax.cosmos, mtjax.pbi])
def test_preferences_reach_both_ends_of_a_concave_front(make):
    """Where a weighted sum has its minima at the two ends alone."""
    # Losses (sin x, cos x): every x in [0, pi / 2] is Pareto optimal.
    losses_fn = lambda x: {"a": jnp.sin(x), "b": jnp.cos(x)}
    for angle in (0.4, 0.8, 1.2):
        preference = [np.sin(angle), np.cos(angle)]
        tx = optax.chain(make(preference), optax.sgd(0.02))
        grad_fn = mtjax.value_and_task_grads(losses_fn)

        @jax.jit
        def step(carry, _, tx=tx, grad_fn=grad_fn):
            x, state = carry
            losses, grads = grad_fn(x)
            updates, state = tx.update(grads, state, x, losses=losses)
            return (optax.apply_updates(x, updates), state), None

        x = jnp.asarray(0.7)
        (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=300)
        assert float(x) == pytest.approx(angle, abs=0.15)


def stch_reference(losses, nadir, mu):
    above = np.log(losses / nadir)
    return len(losses) * mu * np.log(np.exp(above / mu).sum())


@pytest.mark.parametrize("mu", [0.3, 1.0])
def test_stch_warms_up_measures_the_nadir_and_takes_the_smooth_maximum(mu):
    tx = mtjax.stch(3, warmup_steps=4, nadir_steps=2, mu=mu)
    update, state = weights_of(tx), tx.init(None)
    history = np.random.default_rng(0).uniform(0.5, 2.0, (7, 3))
    nadir = history[2:4].mean(axis=0)
    for i, losses in enumerate(history):
        weights, state = update(losses, state)
        expected = 1 / losses
        if i >= 4:
            expected = slopes(lambda x: stch_reference(x, nadir, mu), losses)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_stch_with_small_mu_moves_the_worst_task_alone():
    tx = mtjax.stch(3, warmup_steps=1, mu=1e-3)
    update, state = weights_of(tx), tx.init(None)
    _, state = update(LOSSES, state)
    weights, _ = update(LOSSES * np.array([0.9, 1.1, 1.0]), state)
    np.testing.assert_allclose(weights, [0.0, 3 / 1.1, 0.0], atol=1e-5)


def test_stch_without_warm_up_starts_from_the_first_losses():
    tx = mtjax.stch(3, warmup_steps=0)
    update, state = weights_of(tx), tx.init(None)
    weights, state = update(LOSSES, state)
    np.testing.assert_allclose(weights, 1 / LOSSES, rtol=1e-5)
    np.testing.assert_allclose(state.sums, LOSSES)
    _, state = update(0.5 * LOSSES, state)
    np.testing.assert_allclose(state.sums, LOSSES)


def test_imtl_l_settles_where_all_scaled_losses_are_one():
    tx = mtjax.imtl_l(3, optimizer=optax.sgd(0.2))
    update, state = weights_of(tx), tx.init(None)
    first, _ = update(LOSSES, state)
    np.testing.assert_array_equal(first, 1.0)
    for _ in range(100):
        weights, state = update(LOSSES, state)
    np.testing.assert_allclose(weights * LOSSES, 1.0, rtol=1e-4)


def test_imtl_l_moves_along_the_gradient_of_its_objective():
    tx = mtjax.imtl_l(3, optimizer=optax.sgd(0.1))
    update, state = weights_of(tx), tx.init(None)
    scales = np.zeros(3)
    for _ in range(3):
        # In terms of 1 + s: differences are relative steps, away from zero.
        slope = slopes(lambda m: np.sum(np.exp(m - 1) * LOSSES - m + 1), 1 + scales)
        _, state = update(LOSSES, state)
        scales = scales - 0.1 * slope
        np.testing.assert_allclose(state.log_scales, scales, rtol=1e-4, atol=1e-6)


def test_imtl_l_stays_bounded_at_losses_that_are_not_positive():
    tx = mtjax.imtl_l(3, optimizer=optax.sgd(0.5), eps=0.1)
    update, state = weights_of(tx), tx.init(None)
    for _ in range(100):
        weights, state = update(np.array([-1.0, 0.0, 1.0]), state)
    np.testing.assert_allclose(weights, [10.0, 10.0, 1.0], rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "rule", "found"),
    [
        (lambda: mtjax.scale_invariant(eps=0.0), "`eps` must be positive", "0"),
        (lambda: mtjax.gls(eps=-1.0), "`eps` must be positive", "-1"),
        (lambda: mtjax.uw_so(temperature=0.0), "`temperature` must be positive", "0"),
        (lambda: mtjax.imtl_l(0), "`num_tasks` of `imtl_l` must be at least 1", "0"),
        (lambda: mtjax.imtl_l(2, eps=0.0), "`eps` must be positive", "0"),
        (lambda: mtjax.stch(2, warmup_steps=-1), "`warmup_steps` must not be", "-1"),
        (
            lambda: mtjax.stch(2, warmup_steps=4, nadir_steps=5),
            "`nadir_steps` must be from 1 to the 4 `warmup_steps`",
            "5",
        ),
        (lambda: mtjax.stch(2, warmup_steps=4, mu=0.0), "`mu` must be positive", "0"),
        (lambda: mtjax.cosmos(penalty=-1.0), "`penalty` must not be negative", "-1"),
        (lambda: mtjax.cosmos([-1.0, 1.0]), "`preference` must not", "-1"),
        (lambda: mtjax.pbi(theta=-1.0), "`theta` must not be negative", "-1"),
        (lambda: mtjax.pbi(reference=np.inf), "`reference` must be finite", "inf"),
        (
            lambda: weigh(mtjax.pbi(reference=[0.0, 1.0])),
            "`reference` must be one number or one per task",
            r"\(2,\)",
        ),
    ],
)
def test_bad_arguments(make, rule, found):
    with pytest.raises(ValueError, match=f"(?s){rule}.*got.*{found}"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        mtjax.scale_invariant,
        mtjax.gls,
        mtjax.rlw,
        lambda: mtjax.imtl_l(3),
        lambda: mtjax.stch(3, warmup_steps=2),
        mtjax.uw_so,
        mtjax.cosmos,
        mtjax.pbi,
    ],
)
def test_gives_the_same_weights_in_front_of_another_balancer(make):
    grads = jnp.array([[1.0, 0.0, 1.0], [0.0, 2.0, -1.0], [1.0, 1.0, 3.0]])
    chain = optax.chain(mtjax.scale_by_weighting(make()), mtjax.equal())
    alone = make()
    state, chain_state = alone.init(grads[0]), chain.init(grads[0])
    for losses in (LOSSES, 0.5 * LOSSES[::-1]):
        losses = jnp.asarray(losses)
        got, chain_state = chain.update(grads, chain_state, losses=losses)
        expected, state = alone.update(grads, state, losses=losses)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
