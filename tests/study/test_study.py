"""A study from start to report, on problems that take seconds."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from mtjax.data import Problem, Task
from mtjax.study import Config, run_study, write_report
from mtjax.study import runs as runs_module
from mtjax.study import study as study_module
from mtjax.study.runs import Runs
from mtjax.study.setting import Setting, metric_of
from mtjax.study.summary import SINGLE, Spread
from mtjax.training.run_config import ConfigMismatchError


def make_problem(images: bool = False) -> Problem:
    """Three kinds of task on the same inputs, one with missing labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 8, 8, 1) if images else (120, 5)).astype(np.float32)
    flat = x.reshape(120, -1)
    targets = {
        "kind": flat[:, :3].argmax(1).astype(np.int32),
        "sign": (flat[:, 0] > 0).astype(np.float32),
        "size": flat[:, 1],
    }
    labelled = np.arange(120) % 3 > 0
    tasks = (
        Task("kind", "classification", 3, "accuracy", True),
        Task("sign", "binary", 2, "roc_auc", True),
        Task("size", "regression", None, "rmse", False),
    )

    def split(rows):
        return {
            "inputs": x[rows],
            "targets": {t: y[rows] for t, y in targets.items()},
            "mask": {"size": labelled[rows]},
        }

    return Problem(
        name="tiny",
        tasks=tasks,
        train=split(slice(0, 80)),
        validation=split(slice(80, 100)),
        test=split(slice(100, 120)),
        description="made up",
        licence="none",
    )


CONFIG = Config(data="tiny", methods=("equal", "mgda"), seeds=2, steps=4, batch_size=16)
# Fewer runs, for tests that are not about the table.
SMALL = dataclasses.replace(CONFIG, seeds=1, single_task=False)


@pytest.fixture(autouse=True)
def tiny_problem(monkeypatch):
    monkeypatch.setattr(study_module, "load_problem", lambda *_: make_problem())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that ran to its end, and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "load_problem", lambda *_: make_problem())
        return run_study(CONFIG, folder, progress=False), folder


def test_a_study_trains_tabulates_and_reports(finished):
    summary, folder = finished
    assert [row.method for row in summary.rows] == [SINGLE, "equal", "mgda"]
    for row in summary.rows:
        assert set(row.metrics) == {"kind", "sign", "size"}
        assert all(
            np.isfinite(m.mean) and len(m.values) == 2 for m in row.metrics.values()
        )
    equal, mgda = summary.rows[1:]
    assert equal.step_ratio == 1.0
    assert mgda.step_ratio > 0.0
    assert np.isfinite(mgda.delta_m.mean)
    assert 0.0 <= mgda.conflict_rate.mean <= 1.0
    assert equal.mean_rank + mgda.mean_rank == pytest.approx(3.0)
    assert summary.curves["mgda"].metrics["sign"].shape == (2, 4)

    paths = write_report(CONFIG, summary, folder)
    page = paths[0].read_text()
    assert [p.suffix for p in paths] == [".html", ".png", ".png", ".png"]
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="http', page)
    assert json.loads((folder / "results.json").read_text())["rows"][0]["method"] == (
        SINGLE
    )


def test_delta_m_and_table_have_the_sign_of_each_metric(finished):
    summary, _ = finished
    single, equal, _ = summary.rows
    changes = []
    for task in summary.tasks:
        base, value = single.metrics[task.name].mean, equal.metrics[task.name].mean
        sign = 1.0 if metric_of(task).direction == "higher" else -1.0
        changes.append(100 * sign * (value - base) / abs(base))
    assert equal.delta_m.mean == pytest.approx(np.mean(changes), rel=1e-5)
    assert len(summary.headers()) == len(summary.cells(equal)) == 8
    assert "size\nrmse ↓" in summary.headers()


def test_one_seed_claims_no_spread(finished):
    summary, _ = finished
    several = summary.cells(summary.rows[1])[1:5]
    assert all("±" in cell for cell in several)
    row = dataclasses.replace(
        summary.rows[1],
        metrics={
            t: Spread.of(m.values[:1]) for t, m in summary.rows[1].metrics.items()
        },
        delta_m=Spread.of([1.0]),
    )
    assert not any("±" in cell for cell in summary.cells(row))


def test_an_interrupted_study_goes_on_and_gives_the_same_numbers(
    finished, tmp_path, monkeypatch
):
    whole, _ = finished
    trained = []
    original = Runs._train

    def interrupted(self, seeds, folder, on_progress):
        trained.append(folder.name)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return original(self, seeds, folder, on_progress)

    monkeypatch.setattr(Runs, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(CONFIG, tmp_path, progress=False)
    resumed = run_study(CONFIG, tmp_path, progress=False)
    # Three were finished; the fourth is trained again, then the last.
    assert trained[3:] == ["equal", "equal", "mgda"]
    for a, b in zip(whole.rows, resumed.rows):
        assert a.metrics == b.metrics


def test_checkpoints_within_a_run_resume_exactly(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, save_every=1, methods=("mgda",))
    whole = run_study(config, tmp_path / "whole", progress=False)
    original, calls = runs_module.make_step, []

    def breaking(*args, **kwargs):
        step = original(*args, **kwargs)

        def counted(state, batch):
            calls.append(int(state.step))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return step(state, batch)

        return counted

    monkeypatch.setattr(runs_module, "make_step", breaking)
    with pytest.raises(KeyboardInterrupt):
        run_study(config, tmp_path / "part", progress=False)
    resumed = run_study(config, tmp_path / "part", progress=False)
    assert calls[:5] == [0, 1, 2, 2, 3]
    assert resumed.rows[0].metrics == whole.rows[0].metrics
    log = "runs/mgda/seed_0.jsonl"
    assert (tmp_path / "part" / log).read_text() == (
        tmp_path / "whole" / log
    ).read_text()
    assert len((tmp_path / "whole" / log).read_text().splitlines()) == 4


def test_another_configuration_is_refused(finished):
    _, folder = finished
    with pytest.raises(ConfigMismatchError, match="steps"):
        run_study(dataclasses.replace(CONFIG, steps=5), folder, progress=False)


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match="`out` must be new"):
        run_study(CONFIG, tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_vmapped_and_looped_seeds_agree():
    setting = Setting(make_problem(), make_problem().tasks, CONFIG.batch_size)
    together = Runs(setting, "mgda", CONFIG)
    assert together._vmapped
    state = together.step(together.fresh_state())
    alone = Runs(setting, "mgda", SMALL)
    single = alone.step(alone.fresh_state())
    for many, one in zip(jax.tree.leaves(state.params), jax.tree.leaves(single.params)):
        np.testing.assert_allclose(many[0], one, rtol=1e-4, atol=1e-6)


def test_images_are_looped_on_cpu():
    problem = make_problem(images=True)
    setting = Setting(problem, problem.tasks, 8)
    runs = Runs(setting, "equal", CONFIG)
    state = runs.step(runs.fresh_state())
    assert state.params["params"]["encoder"]["Conv_0"]["kernel"].ndim == 4
    assert int(state.step) == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("methods", ("pcgard",), "did you mean 'pcgrad'"),
        ("methods", (), "must name at least one"),
        ("methods", ("equal", "equal"), "twice"),
        ("steps", 0, "`steps` must be at least 1, got 0"),
        ("learning_rate", -1.0, "`learning_rate` must be positive, got -1.0"),
        ("save_every", 0, "`save_every` must be at least 1, got 0"),
    ],
)
def test_bad_configurations_say_what_to_do(field, value, message):
    with pytest.raises(ValueError, match=message):
        Config(**{field: value})
