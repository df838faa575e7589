"""The learning loop: what it returns, scanned and not, and how it fails."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax.merging import learn, repeat_step


def batches(number):
    return [{"x": np.float32(i + 1)} for i in range(number)]


def loss_fn(variables, frozen, batch):
    error = variables["a"] * frozen["scale"] - batch["x"]
    return error**2, {"error": error}


START, FROZEN = {"a": jnp.array(1.0)}, {"scale": jnp.array(2.0)}


@pytest.mark.parametrize("steps_per_call", [1, 3, 7])
def test_learns_as_by_hand(steps_per_call):
    seen = []
    found = learn(
        loss_fn,
        START,
        FROZEN,
        iter(batches(7)),
        steps=7,
        optimizer=optax.sgd(0.1),
        steps_per_call=steps_per_call,
        on_step=lambda i, report: seen.append((i, float(report["error"]))),
    )
    a, errors, path = 1.0, [], [1.0]
    for i in range(7):
        errors.append(2 * a - (i + 1))
        a -= 0.1 * 4 * errors[-1]
        path.append(a)
    np.testing.assert_allclose(found.reports["error"], errors, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.trajectory["a"], path, rtol=1e-5)
    np.testing.assert_allclose(found.variables["a"], path[-1], rtol=1e-5)
    last = sorted({*range(steps_per_call - 1, 7, steps_per_call), 6})
    assert [i for i, _ in seen] == last
    np.testing.assert_allclose(
        [e for _, e in seen], [errors[i] for i in last], rtol=1e-5, atol=1e-6
    )


def test_state_of_any_form_and_one_trace():
    traces = []

    def step(state, frozen, batch):
        traces.append(1)
        key, noise = jax.random.split(state["key"])
        total = state["total"] + frozen * batch["x"] + jax.random.normal(noise)
        return {"key": key, "total": total}, total

    start = {"key": jax.random.key(0), "total": jnp.float32(0.0)}
    state, totals = repeat_step(step, start, jnp.float32(3.0), batches(9), steps=4)
    assert totals.shape == (4,)
    assert totals[-1] == state["total"]
    assert len(traces) == 1
    assert start["total"] == 0  # not changed in place


@pytest.mark.parametrize(("steps", "number"), [(3, 2), (0, 2), (1, 0)])
@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_too_few_batches(steps, number, steps_per_call):
    with pytest.raises(ValueError, match=f"one batch for each of {steps} steps"):
        learn(
            loss_fn,
            START,
            FROZEN,
            batches(number),
            steps=steps,
            optimizer=optax.sgd(0.1),
            steps_per_call=steps_per_call,
        )
