import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from tests.balancing import matrices


def run(steps, beta=0.9, beta_sigma=0.0, present=None):
    """Updates and last state of a series of (gradients, losses)."""
    size = len(steps[0][0])
    tx = mtjax.db_mtl(size, beta=beta, beta_sigma=beta_sigma)
    update = jax.jit(lambda g, s, L, p: tx.update(g, s, losses=L, present=p))
    state, found = tx.init(jnp.zeros(steps[0][0].shape[1])), []
    for i, (grads, losses) in enumerate(steps):
        who = np.ones(size, bool) if present is None else np.asarray(present[i])
        grads = jnp.asarray(grads, jnp.float32)
        updates, state = update(grads, state, jnp.asarray(losses, jnp.float32), who)
        found.append(np.asarray(updates, np.float64))
    return found, state


def series(count, size=4, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (matrices.sample(matrices.normal, size, i), rng.uniform(0.5, 2.0, size))
        for i in range(count)
    ]


@pytest.mark.parametrize("beta_sigma", [0.0, 0.5])
def test_is_the_algorithm_on_whole_gradients(beta_sigma):
    steps, average = series(4), np.zeros((4, matrices.DIMENSION))
    for i, update in enumerate(run(steps, 0.9, beta_sigma)[0]):
        grads, losses = steps[i]
        g = grads / losses[:, None]
        average = g + 0.9 / (i + 1) ** beta_sigma * (average - g)
        norms = np.linalg.norm(average, axis=1)
        expected = (norms.max() / norms) @ average
        np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-4)


def test_scale_of_a_loss_does_not_matter():
    steps, factors = series(3), np.array([1e3, 1.0, 1e-2, 30.0])
    scaled = [(g * factors[:, None], losses * factors) for g, losses in steps]
    for before, after in zip(run(steps)[0], run(scaled)[0], strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-4)


def test_all_averages_count_with_the_longest_length():
    (update,), state = run(series(1), beta=0.5)
    norms = np.linalg.norm(state.average, axis=1)
    parts = np.asarray(state.average) * (norms.max() / norms)[:, None]
    np.testing.assert_allclose(np.linalg.norm(parts, axis=1), norms.max(), rtol=1e-5)
    np.testing.assert_allclose(update, parts.sum(0), rtol=1e-4, atol=1e-5)


def test_average_of_an_absent_task_stays_and_does_not_move_the_parameters():
    steps = series(3)
    few = [True, False, True, True]
    steps[2][0][1], steps[2][1][1] = np.nan, np.nan
    _, before = run(steps[:2])
    updates, after = run(steps, present=[[True] * 4] * 2 + [few])
    np.testing.assert_array_equal(before.average[1], after.average[1])
    moved = np.any(np.asarray(before.average != after.average), axis=1)
    np.testing.assert_array_equal(moved, few)
    norms = np.linalg.norm(np.asarray(after.average)[few], axis=1)
    expected = (norms.max() / norms) @ np.asarray(after.average)[few]
    np.testing.assert_allclose(updates[-1], expected, rtol=1e-4, atol=1e-4)


def test_own_parameters_get_the_gradients_of_their_log_losses():
    def losses_fn(params):
        shared = params["trunk"] ** 2
        return {t: 3.0 * shared + params["own"][t] for t in "ab"}

    params = {
        "trunk": jnp.array(2.0),
        "own": {"a": jnp.array(1.0), "b": jnp.array(8.0)},
    }
    tx = mtjax.db_mtl(2, beta=0.0)
    losses, grads = mtjax.value_and_task_grads(losses_fn)(params)
    updates, _ = tx.update(grads, tx.init(params), params, losses=losses)
    assert float(updates["own"]["a"]) == pytest.approx(1 / 13)
    assert float(updates["own"]["b"]) == pytest.approx(1 / 20)
    # Both gradients of the trunk as long as the longer of them.
    assert float(updates["trunk"]) == pytest.approx(2 * 12 / 13, rel=1e-5)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`beta` must be in \[0, 1\), got 1.0"):
        mtjax.db_mtl(2, beta=1.0)
    with pytest.raises(ValueError, match="`beta_sigma` must not be negative"):
        mtjax.db_mtl(2, beta_sigma=-1.0)
    tx = mtjax.db_mtl(2)
    with pytest.raises(ValueError, match="`db_mtl` needs the extra argument `losses`"):
        tx.update(jnp.eye(2), tx.init(jnp.zeros(2)))
