import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from tests.balancing import model

STRATEGIES = {
    "both": lambda ratio: ratio,
    "reduce": lambda ratio: min(ratio, 1.0),
    "enlarge": lambda ratio: max(ratio, 1.0),
}


def draw(seed, scales=(1.0, 0.2, 5.0)):
    """Stacked gradients of two arrays, with norms that differ by array and task."""
    rng = np.random.default_rng(seed)
    scales = np.array(scales)
    return {
        "a": rng.standard_normal((3, 4)) * scales[:, None],
        "b": rng.standard_normal((3, 2, 3)) * scales[::-1, None, None],
    }


def compiled(tx):
    @jax.jit
    def update(grads, state, present):
        return tx.update(grads, state, present=present)

    def call(grads, state, present=(True, True, True)):
        grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
        return update(grads, state, jnp.array(present))

    return call


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_follows_the_paper_array_by_array(strategy):
    target, relax, beta = 1, 0.7, 0.9
    tx = mtjax.metabalance(3, target, strategy=strategy)
    update, state = compiled(tx), tx.init(jax.tree.map(lambda g: g[0], draw(0)))
    averages = {"a": np.zeros(3), "b": np.zeros(3)}
    for seed in range(3):
        grads = draw(seed)
        got, state = update(grads, state)
        for name, rows in grads.items():
            norms = np.array([np.linalg.norm(row) for row in rows])
            averages[name] = beta * averages[name] + (1 - beta) * norms
            expected = 0.0
            for row, average in zip(rows, averages[name], strict=True):
                ratio = averages[name][target] / average
                factor = relax * STRATEGIES[strategy](ratio) + 1 - relax
                expected = expected + factor * row
            np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-5)


def test_without_relaxation_it_is_the_sum():
    tx = mtjax.metabalance(3, 0, relax=0.0)
    got, _ = compiled(tx)(draw(0), tx.init(jax.tree.map(lambda g: g[0], draw(0))))
    for name, rows in draw(0).items():
        np.testing.assert_allclose(got[name], rows.sum(axis=0), rtol=1e-5, atol=1e-6)


def test_fully_relaxed_every_gradient_gets_the_norm_of_the_target():
    tx = mtjax.metabalance(3, 2, relax=1.0, beta=0.0)
    start = tx.init(jax.tree.map(lambda g: g[0], draw(0)))
    grads = draw(0)
    total, _ = compiled(tx)(grads, start)
    for name, rows in grads.items():
        units = [row / np.linalg.norm(row) for row in rows]
        expected = np.linalg.norm(rows[2]) * sum(units)
        np.testing.assert_allclose(total[name], expected, rtol=1e-4, atol=1e-5)


def test_names_its_target_and_leaves_own_parameters_alone():
    params, batch = model.params(), model.batch()
    losses, grads = model.grad_fn(params, batch)
    updates = []
    for target in ("b", 1):
        tx = mtjax.metabalance(3, target)
        updates.append(tx.update(grads, tx.init(params), params, losses=losses)[0])
    assert jax.tree.all(jax.tree.map(jnp.array_equal, *updates))
    plain = grads.combine()
    for name in model.NAMES:
        np.testing.assert_allclose(
            updates[0]["heads"][name], plain["heads"][name], rtol=1e-5
        )
    assert not np.allclose(updates[0]["trunk"]["bias"], plain["trunk"]["bias"])


def test_absent_tasks_count_from_when_they_are_seen():
    """A task's first steps are averages of its own, not of zeros before them."""
    tx = mtjax.metabalance(3, 0, relax=1.0)
    update = compiled(tx)
    grads = {"a": np.eye(3) * np.array([2.0, 1.0, 0.5])}
    state = tx.init({"a": jnp.zeros(3)})
    for _ in range(3):
        got, state = update(grads, state, (True, True, False))
        np.testing.assert_allclose(got["a"], [2.0, 2.0, 0.0], rtol=1e-5)
    got, state = update(grads, state)
    np.testing.assert_allclose(got["a"], [2.0, 2.0, 2.0], rtol=1e-5)
    # Without the target in the batch its latest average is the measure.
    got, _ = update(grads, state, (False, True, True))
    np.testing.assert_allclose(got["a"], [0.0, 2.0, 2.0], rtol=1e-5)


def test_nothing_is_scaled_before_the_target_was_seen():
    tx = mtjax.metabalance(3, 0)
    grads = {"a": np.eye(3) * np.array([2.0, 1.0, 0.5])}
    present = (False, True, True)
    got, _ = compiled(tx)(grads, tx.init({"a": jnp.zeros(3)}), present)
    np.testing.assert_allclose(got["a"], [0.0, 1.0, 0.5], rtol=1e-6)


def test_a_gradient_that_is_not_finite_does_not_stay():
    tx = mtjax.metabalance(3, 0)
    update = compiled(tx)
    grads, broken = draw(0), draw(0)
    broken["a"][1, 0] = np.nan
    _, state = update(grads, tx.init(jax.tree.map(lambda g: g[0], grads)))
    got, after = update(broken, state)
    assert np.isnan(got["a"][0])
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert np.all(np.isfinite(new))
        assert old[1] == new[1]


@pytest.mark.parametrize(
    ("target", "arguments", "rule", "found"),
    [
        (0, {"relax": 1.5}, r"`relax` must be in \[0, 1\]", "1.5"),
        (0, {"beta": 1.0}, r"`beta` must be in \[0, 1\)", "1.0"),
        (2, {}, "`target` must be a task's name or a place from 0 to 1", "2"),
        (-1, {}, "`target` must be a task's name or a place from 0 to 1", "-1"),
    ],
)
def test_bad_arguments(target, arguments, rule, found):
    with pytest.raises(ValueError, match=f"{rule}.*got {found}"):
        mtjax.metabalance(2, target, **arguments)


def test_unknown_target():
    tx = mtjax.metabalance(2, "depth")
    with pytest.raises(ValueError, match=r"`target` must be one of.*got 'depth'"):
        tx.update(jnp.eye(2), tx.init(jnp.zeros(2)))
