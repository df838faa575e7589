"""The comparison of Twin-Merging and baselines on a tiny bench."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments import merge_bench_models, twin_merging
from experiments.twin_merging_measures import Twin, first
from mtjax.systems.twin_merging import RouterConfig

TASKS = ("b", "a", "c")
ROUTER = RouterConfig(epochs=15, batch_size=20, learning_rate=1e-2)


@pytest.fixture(scope="module")
def bench(drawn_bench):
    """Every task lights another corner, and its model is nearly always right."""
    rng = np.random.default_rng(0)
    made = drawn_bench(TASKS, examples=40, width=6, change=0.3)
    logits = jax.jit(made.logits, static_argnums=1)
    for i, task in enumerate(TASKS):
        for part in made.data[task].values():
            images = rng.integers(60 * i, 60 * i + 90, size=(40, 28, 28))
            images[:, :, :14] //= 2 + i
            part["images"] = images.astype(np.uint8)
            own = logits(made.models[task], task, part["images"]).argmax(-1)
            part["labels"] = np.array(own, np.int32)
            part["labels"][0] = (part["labels"][0] + 1) % 3
    return made


@pytest.fixture(scope="module")
def twin(bench):
    return Twin(bench, ROUTER, (0.2,), jax.random.key(0))


@pytest.mark.slow
def test_all_numbers_and_the_figure(bench, prepared, tmp_path, monkeypatch):
    seen = prepared(lambda *_: bench)

    def finetune(config, base, head, data, key):
        assert config.steps == 7
        (task,) = (t for t in TASKS if bench.data[t]["train"] is data)
        return bench.models[task]

    monkeypatch.setattr(merge_bench_models, "finetune", finetune)
    config = replace(twin_merging.QUICK, router=ROUTER, rates=(0.9,), steps=(7,))
    results = twin_merging.main(config, tmp_path, tmp_path / "models")
    rows = results[0]["rows"]
    assert rows["fine-tuned"]["normalised"] == 100
    one = rows["base"]["MB"]
    assert rows["fine-tuned"]["MB"] == pytest.approx(3 * one)
    oracle, learned = (rows[twin_merging.TWIN + x] for x in (", oracle", ""))
    assert one < oracle["MB"] < learned["MB"]  # the router has its size too
    assert list(results[0]["tasks"]) == ["2 tasks", "3 tasks"]
    whole = results[0]["tasks"]["3 tasks"]
    assert whole["TA (tuned)"] == rows["TA (tuned)"]["normalised"]
    assert whole[twin_merging.TWIN] == learned["normalised"]
    assert list(results[0]["steps"]) == ["7 steps", "150 steps"]
    full = results[0]["steps"]["150 steps"]
    assert full["with a vector"] == oracle["normalised"]
    assert results[0]["steps"]["7 steps"] == full  # they are the same models
    assert (tmp_path / "twin_merging.png").stat().st_size > 10_000
    assert "| Twin, random 0.9, oracle |" in (tmp_path / "table.md").read_text()
    # A second start reads what is there.
    assert twin_merging.main(config, tmp_path, tmp_path / "models") == results
    assert len(seen) == 1
    assert json.loads((tmp_path / "seed_0.json").read_text()) == results[0]


def test_routed_heads_need_the_right_task_and_the_right_class(twin):
    found = twin.learned(twin.experts())
    named, routed, router = (found[k] for k in ("heads", "routed heads", "router"))
    assert router["mean"] > 60
    for task in TASKS:
        least = named[task] + router[task] - 100
        assert least - 1e-4 < routed[task] < min(named[task], router[task]) + 1e-4
    assert named["MB"] > twin.weighted(twin.experts())["MB"]


def test_fewer_tasks(bench):
    some = first(bench, 2)
    assert some.tasks == ("b", "a")
    assert set(some.models) == {"a", "b"}
