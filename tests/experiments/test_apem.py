"""The experiment on APEM: sizes that match, late labels, and its quick run."""

from dataclasses import replace

import numpy as np
import pytest

from experiments import apem as experiment
from experiments.ranking_training import made_up
from experiments.recsys_study import size_of

TASKS = ("start", "go on", "end")


@pytest.fixture(scope="module")
def runs():
    runs = experiment.Runs(experiment.Config(made_up=True))
    runs.problem = made_up(TASKS, rows=4000)
    return runs


@pytest.mark.parametrize("name", ["shared bottom", "MMoE", "AITM"])
def test_baselines_are_as_large_as_apem(name, runs):
    target = size_of(runs.apem(), runs.problem)
    found = size_of(runs.baseline(name), runs.problem)
    assert abs(found - target) < 0.05 * target


def test_mmoe_in_its_usual_size(runs):
    model = runs.baseline("MMoE, 8 x 16").body
    assert (model.num_experts, model.widths) == (8, ((16,),))


def test_ablations_are_models_of_their_own(runs):
    models = {n: runs.apem(o) for n, o in experiment.ABLATIONS.items()}
    same = {name for name, model in models.items() if model == runs.apem()}
    # These differ in losses and labels.
    assert same == {"no penalty", "late are negative", "late are masked"}
    assert len({*models.values()}) == len(models) - len(same) + 1


def test_late_labels(runs):
    true = runs.problem.train["labels"]
    naive, masked = (
        experiment.with_late_labels(runs.problem, m).train["labels"]
        for m in (False, True)
    )
    for task in TASKS[:2]:
        np.testing.assert_array_equal(naive[task], true[task])
        np.testing.assert_array_equal(masked[task], true[task])
    known = ~np.isnan(masked["end"])
    np.testing.assert_array_equal(np.asarray(masked["end"])[known], true["end"][known])
    assert abs(known.mean() - 0.5) < 0.05
    # Of the positives a quarter is not seen: half of the young half.
    lost = 1 - naive["end"].sum() / true["end"].sum()
    assert abs(lost - 0.25) < 0.05
    assert (naive["end"] <= true["end"]).all()


def test_measures(runs):
    labels = {t: np.array([0.0, 1.0, 1.0, 0.0], np.float32) for t in TASKS}
    problem = replace(runs.problem, test={"labels": labels})
    p = np.array([0.1, 0.8, 0.6, 0.2])
    predicted = {"start": p, "go on": p / 2, "end": p - [0, 0.1, 0, 0.15]}
    found = experiment.measures(problem, predicted)
    assert found["start AUC"] == found["start PR-AUC"] == found["mean AUC"] == 1
    assert found["rising"] == pytest.approx(3 / 4)
    assert found["start predicted / real"] == pytest.approx(1.7 / 2)
    assert found["start ECE"] == pytest.approx((0.1 + 0.2 + 0.4 + 0.2) / 4)


def test_quick_run_goes_on_after_an_interruption(tmp_path, dies):
    config = replace(experiment.QUICK, ablations=("late are masked",))
    calls = dies(experiment, "fit", 4)
    with pytest.raises(KeyboardInterrupt):
        experiment.main(config, tmp_path)
    found = experiment.main(config, tmp_path)
    # Both models tuned, then trained, and an ablation; the fourth was begun twice.
    assert len(calls) == 6
    assert [*found] == ["MMoE", "APEM", "late are masked"]
    row = found["APEM"][0]
    np.testing.assert_allclose(np.sum(row["selection"], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.sum(row["fields"], axis=1), 1, rtol=1e-5)
    assert np.shape(row["fields"]) == (3, 4)
    assert 0 < row["apart"] < 1
    text = (tmp_path / "table.md").read_text()
    assert "| late are masked |" in text
    assert "| end AUC to APEM |" in text
    for name in ("apem.png", "apem_selection.png"):
        assert (tmp_path / name).stat().st_size > 5_000
