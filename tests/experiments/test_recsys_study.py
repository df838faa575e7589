"""The study of rankers: what its training does, and its quick run."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import recsys_study
from experiments.ranking_training import (
    Training,
    embedded,
    evaluate,
    fit,
    made_up,
    num_parameters,
    per_method,
)
from mtjax.nn import SharedBottomRanker

TRAINING = Training(epochs=3, batch_size=60, learning_rate=0.03)


@pytest.fixture(scope="module")
def problem():
    return made_up()


@pytest.fixture(scope="module")
def model(problem):
    return embedded(SharedBottomRanker(problem.tasks, (4,)), problem)


@pytest.fixture(scope="module")
def trained(model, problem):
    return fit(model, problem, TRAINING, seed=0)


def test_training_learns_and_keeps_its_best_epoch(model, problem, trained):
    scores = evaluate(model, trained.variables, problem, "validation")
    assert scores["mean AUC"] == max(trained.aucs) > 0.7
    assert trained.losses[-1]["click"] < trained.losses[0]["click"]


def test_same_seed_same_numbers(model, problem, trained):
    again = fit(model, problem, TRAINING, seed=0)
    jax.tree.map(np.testing.assert_array_equal, again.variables, trained.variables)


def test_order_of_examples_is_the_one_stated(model, problem):
    # One epoch of one batch is one step of Adam, whose first step is the sign of the
    # gradient times the learning rate.
    one = Training(epochs=1, batch_size=len(problem.train["numeric"]))
    found = fit(model, problem, one, seed=3).variables["params"]
    start = model.init(jax.random.key(3), jax.tree.map(jnp.asarray, problem.train))
    moved = jax.tree.map(lambda x, y: jnp.abs(x - y), found, start["params"])
    largest = max(float(x.max()) for x in jax.tree.leaves(moved))
    assert math.isclose(largest, one.learning_rate, rel_tol=1e-3)


def test_parameters_are_counted_without_embeddings(model, trained):
    body = trained.variables["params"]["body"]
    assert num_parameters(trained.variables) == sum(
        x.size for x in jax.tree.leaves(body)
    )


def test_a_batch_larger_than_the_data_is_an_error(model, problem):
    with pytest.raises(ValueError, match="`batch_size` must be at most the 240"):
        fit(model, problem, Training(batch_size=241), seed=0)


@pytest.mark.parametrize("name", sorted(recsys_study.ARCHITECTURES))
def test_architectures_match_in_size(name, problem):
    target = 1500
    size = recsys_study.matched(name, problem, problem.tasks, target, 4)
    found = recsys_study.size_of(
        recsys_study.ranker(name, problem, problem.tasks, size, 4), problem
    )
    assert abs(found - target) < 0.15 * target
    for other in (size - 1, size + 1):
        model = recsys_study.ranker(name, problem, problem.tasks, other, 4)
        further = abs(recsys_study.size_of(model, problem) - target)
        assert further >= abs(found - target)


def test_methods_are_run_once_per_seed(tmp_path):
    calls = []
    run = lambda seed: calls.append(seed) or {"AUC": float(seed)}
    for seeds in (2, 3):
        found = per_method(TRAINING, tmp_path, {"a/b": run}, seeds)
    assert calls == [0, 1, 2]
    assert found == {"a/b": [{"AUC": 0.0}, {"AUC": 1.0}, {"AUC": 2.0}]}


def test_quick_writes_table_and_figure(tmp_path):
    recsys_study.quick(out=tmp_path)
    assert (tmp_path / "recsys_study.png").stat().st_size > 1000
    assert "| MMoE |" in (tmp_path / "made-up.md").read_text()
    found = json.loads((tmp_path / "results" / "made-up MMoE, seed 0.json").read_text())
    assert 0 <= found["mean AUC"] <= 1
