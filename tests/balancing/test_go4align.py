import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.balancing.go4align import group_means
from tests.balancing.losses_only import LOSSES, weights_of

grouped = jax.jit(group_means, static_argnums=2)
EVERY = np.ones(6, bool)


def best_split(values, num_groups):
    """Least sum of squared deviations over all partitions into intervals."""
    ordered = np.sort(values)
    splits = itertools.combinations(range(1, len(values)), num_groups - 1)
    costs = (
        sum(((part - part.mean()) ** 2).sum() for part in np.split(ordered, split))
        for split in splits
    )
    return min(costs)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 6])
def test_groups_are_the_best_of_all(num_groups):
    for seed in range(5):
        values = np.random.default_rng(seed).lognormal(0.0, 2.0, 6)
        means = np.asarray(grouped(values, EVERY, num_groups), np.float64)
        assert len(np.unique(means)) <= num_groups
        for mean in np.unique(means):
            assert values[means == mean].mean() == pytest.approx(mean, rel=1e-5)
        cost = ((values - means) ** 2).sum()
        scale = (values**2).sum()
        assert cost <= best_split(values, num_groups) + 1e-6 * scale


def test_equal_values_need_no_second_group():
    values = np.array([2.0, 5.0, 2.0, 2.0, 5.0, 5.0])
    np.testing.assert_allclose(grouped(values, EVERY, 3), values, rtol=1e-6)


def test_groups_of_the_present_and_at_every_scale():
    values = np.array([1.0, np.nan, 1.2, 9.0, np.inf, 9.2])
    present = np.isfinite(values)
    for scale in (1e-30, 1.0, 1e30):
        expected = scale * np.array([1.1, 0.0, 1.1, 9.1, 0.0, 9.1])
        got = grouped(np.where(present, scale * values, values), present, 2)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_as_many_groups_as_tasks_follow_the_paper():
    step_size = 0.1
    update = weights_of(mtjax.go4align(3, 3, step_size=step_size))
    state = mtjax.go4align(3, 3).init(None)
    shares = np.ones(3) / 3
    for losses in np.random.default_rng(0).uniform(0.5, 4.0, (4, 3)):
        shares = shares * np.exp(-step_size * losses)
        shares /= shares.sum()
        weights, state = update(losses, state)
        np.testing.assert_allclose(weights, shares * losses.sum() / losses, rtol=1e-4)


def test_one_group_weighs_all_the_same_and_two_groups_the_near_ones():
    losses = np.array([1.0, 1.1, 8.0])
    indicators = np.exp(-1e-4 * losses) / np.exp(-1e-4 * losses).sum()
    indicators = indicators * losses.sum() / losses
    near = indicators[:2].mean()
    two = [near, near, indicators[2]]
    for groups, expected in ((1, [indicators.mean()] * 3), (2, two)):
        tx = mtjax.go4align(3, groups)
        weights, _ = weights_of(tx)(losses, tx.init(None))
        np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_losses_that_are_not_positive_count_as_the_smallest():
    tx = mtjax.go4align(3, 3, eps=1e-2)
    update = weights_of(tx)
    small, _ = update(np.array([1e-2, 1.0, 4.0]), tx.init(None))
    for low in (0.0, -3.0):
        got, state = update(np.array([low, 1.0, 4.0]), tx.init(None))
        np.testing.assert_array_equal(got, small)
        assert np.all(np.isfinite(state.logits))


def test_keeps_its_shares_when_a_loss_is_not_finite():
    tx = mtjax.go4align(3, 2)
    _, state = weights_of(tx)(LOSSES, tx.init(None))
    _, after = weights_of(tx)(np.array([0.5, np.nan, 4.0]), state)
    assert after.logits[1] == state.logits[1]
    assert np.all(np.isfinite(after.logits))


@pytest.mark.parametrize(
    ("make", "rule", "found"),
    [
        (lambda: mtjax.go4align(3, 0), "`num_groups` must be from 1 to the 3", "0"),
        (lambda: mtjax.go4align(3, 4), "`num_groups` must be from 1 to the 3", "4"),
        (lambda: mtjax.go4align(3, 1, step_size=0.0), "`step_size` must be", "0"),
        (lambda: mtjax.go4align(3, 1, eps=0.0), "`eps` must be positive", "0"),
    ],
)
def test_bad_arguments(make, rule, found):
    with pytest.raises(ValueError, match=f"{rule}.*got {found}"):
        make()


def test_gradients_are_scaled_by_the_weights():
    tx = mtjax.go4align(2, 1)
    grads = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    update, _ = tx.update(grads, tx.init(None), losses=jnp.array([1.0, 3.0]))
    weight, _ = tx.update(jnp.eye(2), tx.init(None), losses=jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(update, weight @ grads, rtol=1e-6)
