"""The comparison of masks on a tiny bench whose models were never trained."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import concrete_subspace
from experiments.merge_bench_models import Bench
from mtjax import training
from mtjax.systems.concrete_subspace import ConcreteConfig, init_state

TASKS = ("b", "a", "c")


@pytest.mark.slow
def test_all_numbers_and_the_figure(drawn_bench, prepared, tmp_path):
    config = replace(concrete_subspace.QUICK, meta_steps=4, steps=2, batch_size=2)
    calls = prepared(lambda *_: drawn_bench(TASKS))
    results = concrete_subspace.main(config, tmp_path, tmp_path)
    rows = results[0]["rows"]
    methods = [
        f"{prefix}{kind}"
        for prefix in ("", "Concrete ")
        for kind in concrete_subspace.ADAPTED
    ]
    assert {"Concrete TA", *methods} < set(rows)
    assert {*TASKS, "mean", "on the stream", "entropy"} < set(rows["Concrete TA"])
    # Four meta steps of 0.005 move no gate far.
    for gate in results[0]["gates"]["TA"].values():
        assert 0.49 < gate["5 %"] <= gate["50 %"] <= gate["95 %"] < 0.51
    assert {len(x) for x in results[0]["accuracy"].values()} == {config.points}
    assert all(0 < x < 3 * np.log(3) for x in results[0]["entropy"]["Concrete TA"])
    assert set(results[0]["unseen"]["Concrete TA"]) == {"seen", "unseen"}
    assert len(results[0]["ablations"]) == 6
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in table for name in [*rows, "hard"])
    assert (tmp_path / "concrete_subspace.png").stat().st_size > 5_000

    # A second start reads what is there; another configuration is refused.
    assert concrete_subspace.main(config, tmp_path, tmp_path) == results
    assert len(calls) == 1
    with pytest.raises(training.ConfigMismatchError, match="steps: 2 there, 3 here"):
        concrete_subspace.main(replace(config, steps=3), tmp_path, tmp_path)


class NearBench(Bench):
    """Accuracy is the closeness to the model of the task."""

    def accuracy(self, params, task, split="test", most=None):
        """In place of a count."""
        gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, self.models[task])
        return 1 / (1 + float(max(jax.tree.leaves(gaps))))


def test_individual_models_are_those_of_their_tasks():
    """Without a mask every task gets its own fine-tuned model, whatever its place."""
    rng = np.random.default_rng(0)
    draw = lambda: {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
    data = {task: {"stream": {"images": np.zeros(1)}} for task in TASKS}
    models = {task: draw() for task in TASKS}
    bench = NearBench(TASKS, draw(), models, {}, data, None)
    measures = concrete_subspace.Measures(bench)
    masks = concrete_subspace.Masks(measures, concrete_subspace.QUICK, 0)
    how = ConcreteConfig()
    state = init_state(masks.base, masks.vectors, how, key=jax.random.key(0))
    found = masks.individual(concrete_subspace.Learnt(state, how, [], []))
    assert found == pytest.approx(dict.fromkeys([*TASKS, "mean"], 100), rel=1e-5)
    # Another mask is seen in it.
    logits = {"w": jnp.arange(6.0).reshape(3, 2)}
    moved = concrete_subspace.Learnt(state._replace(logits=logits), how, [], [])
    assert masks.individual(moved)["mean"] < 90
