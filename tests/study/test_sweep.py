"""Lanes of a sweep are the runs that they stand for."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from mtjax.data import Problem, Task
from mtjax.study.methods import METHODS
from mtjax.study.setting import Setting
from mtjax.study.sweep import Sweep
from mtjax.study.tuning import tuned_lanes
from mtjax.training import TrainState, make_train_step

TASKS = (
    Task("sign", "binary", 2, "roc_auc", True),
    Task("size", "regression", None, "rmse", False),
)


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    targets = {"sign": (x[:, 0] > 0).astype(np.float32), "size": x[:, 1]}
    part = {"inputs": x, "targets": targets, "mask": None}
    return Setting(Problem("tiny", TASKS, part, part, part, "", ""), TASKS, 8)


@pytest.fixture(scope="module")
def sweep(setting):
    return Sweep(setting, "uw", learning_rates=(1e-3, 1e-1), seeds=2, steps_per_epoch=3)


def test_a_lane_is_the_run_with_its_learning_rate_and_seed(setting, sweep):
    assert sweep.lanes == [(1e-3, 0), (1e-3, 1), (1e-1, 0), (1e-1, 1)]
    found = sweep.results(3)[3]
    tx = optax.chain(METHODS["uw"].make(2, 3), optax.adam(1e-1))
    step = make_train_step(setting.losses_fn, tx, with_key=True)
    init_key, key = jax.random.split(jax.random.key(1))
    state = TrainState.create(setting.init(init_key), tx, key=key)
    for _ in range(3):
        state, _ = step(state, setting.data)
    assert (found["learning_rate"], found["seed"], found["skipped"]) == (1e-1, 1, 0)
    for split in ("validation", "test"):
        expected = setting.evaluate(state.params, split)
        for task, scores in expected.items():
            assert found[split][task] == pytest.approx(scores, rel=1e-4)
    conflict = setting.conflict(state.params)
    assert {k: found[k] for k in conflict} == pytest.approx(conflict, rel=1e-3)


def test_steps_add_up(sweep):
    twice = sweep.advance(sweep.advance(sweep.fresh_state(), 1), 2)
    once = sweep.advance(sweep.fresh_state(), 3)
    assert int(once.step) == int(twice.step) == 3
    for a, b in zip(jax.tree.leaves(once.params), jax.tree.leaves(twice.params)):
        np.testing.assert_array_equal(a, b)


def test_lanes_that_diverge_have_no_numbers(sweep, monkeypatch):
    state = sweep.fresh_state()
    params = jax.tree.map(lambda x: x.at[0].set(np.nan), state.params)
    state = dataclasses.replace(state, params=params)
    monkeypatch.setattr(sweep, "fresh_state", lambda: state)
    first, *others = sweep.results(2)
    assert first["skipped"] == 2
    assert np.isnan(first["test"]["sign"]["roc_auc"])
    assert all(np.isfinite(x["test"]["sign"]["roc_auc"]) for x in others)
    assert all(x["skipped"] == 0 for x in others)


def lanes(values):
    """One lane per learning rate, from pairs of an area and an error."""
    return [
        {
            "learning_rate": rate,
            "validation": {"sign": {"roc_auc": auc}, "size": {"rmse": rmse}},
        }
        for rate, (auc, rmse) in zip((0.1, 0.2, 0.3), values, strict=True)
    ]


def test_learning_rates_are_chosen_on_validation_data():
    alone = [(0.6, 2.0), (0.8, 1.0), (0.7, 0.5)]
    sweeps = {
        "single-task sign": lanes(alone),
        "single-task size": lanes(alone),
        # Against 0.8 and 0.5: +12.5 - 100, -12.5 - 20, 0 - 40 per cent.
        "mgda": lanes([(0.9, 1.0), (0.7, 0.6), (0.8, 0.7)]),
        "uw": lanes([(np.nan, 1.0), (np.nan, 0.6), (0.5, 9.0)]),
        "gls": lanes([(np.nan, 1.0)] * 3),
    }
    kept = tuned_lanes(TASKS, sweeps)
    rates = {name: [x["learning_rate"] for x in own] for name, own in kept.items()}
    assert rates == {
        "single-task sign": [0.2],
        "single-task size": [0.3],
        "mgda": [0.2],
        "uw": [0.3],
        "gls": [0.1],
    }
