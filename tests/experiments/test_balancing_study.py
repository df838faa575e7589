"""The study of balancers: cut short and taken up again, and its tables."""

import dataclasses
import json
import re

import numpy as np
import pytest

from experiments import balancing_study
from mtjax.study.sweep import Sweep

TINY = dataclasses.replace(balancing_study.QUICK, methods=("equal", "mgda"))


def invented(sweep: Sweep, steps: int) -> list:
    """What `Sweep.results` returns; the second learning rate validates best."""
    del steps
    lanes = []
    for rate, seed in sweep.lanes:
        quality = {1e-3: 0.5, 1e-2: 0.6}[rate]
        parts = {"validation": quality, "test": 1.4 * quality - 0.01 * seed}
        scores = {
            part: {t: {"accuracy": value, "loss": 1.0} for t in ("left", "right")}
            for part, value in parts.items()
        }
        conflict = {"cosine": 0.1, "conflict_rate": 0.25}
        lane = {"learning_rate": rate, "seed": seed, "skipped": 1}
        lanes.append(lane | scores | conflict)
    return lanes


@pytest.fixture
def untrained(monkeypatch):
    """Nothing is compiled: the results are invented."""
    monkeypatch.setattr(Sweep, "results", invented)
    monkeypatch.setattr(balancing_study, "relative_time", lambda a, b: 2.0 - (a is b))
    return monkeypatch


@pytest.mark.slow
def test_quick_run_goes_on_with_the_same_numbers(tmp_path, dies):
    trained = dies(Sweep, "results", 4)  # both tasks alone and the plain sum are done
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        balancing_study.main(TINY, out)
    cells = {path.stem for path in (out / "multi_mnist").iterdir()}
    assert cells == {"single-task left", "single-task right", "equal"}
    assert not (out / "results.json").exists()

    resumed = balancing_study.main(TINY, out)["multi_mnist"]
    assert len(trained) == 5  # only the one that was cut off
    whole = balancing_study.main(TINY, tmp_path / "whole")["multi_mnist"]
    assert len(trained) == 9
    for row, other in zip(resumed.rows, whole.rows, strict=True):
        same = dataclasses.replace(row, step_ratio=other.step_ratio)
        assert same == other
    equal, mgda = resumed.rows[1:]
    assert equal.metrics != mgda.metrics
    assert mgda.step_ratio > 0


def test_tables_and_figures(tmp_path, untrained):
    summary = balancing_study.main(TINY, tmp_path)["multi_mnist"]
    assert [row.method for row in summary.rows] == ["single-task", "equal", "mgda"]
    # Of the learning rate 0.01 the test values are 0.84 and 0.83.
    assert summary.rows[2].metrics["left"].values == pytest.approx((0.84, 0.83))
    text = (tmp_path / "tables.md").read_text()
    line = r"^\| mgda \| 83.50±0.71 \| .* \| 2.00 \| 25 \| 0.01 \| 2 \|$"
    assert re.search(line, text, re.MULTILINE)
    assert re.search(r"^\| mgda \| Gramian \| \+0.00 ± 0.00 \|", text, re.MULTILINE)
    rows = json.loads((tmp_path / "results.json").read_text())["multi_mnist"]["rows"]
    assert rows[1]["metrics"]["left"][0] == pytest.approx(0.835)
    for name in ("delta_m.png", "tradeoff_multi_mnist.png"):
        assert (tmp_path / name).stat().st_size > 5_000


def test_a_method_that_fails_is_shown(tmp_path, untrained):
    def failing(sweep, steps):
        failing.calls += 1
        if failing.calls == 4:
            raise FloatingPointError("too large\nand more")
        return invented(sweep, steps)

    failing.calls = 0
    untrained.setattr(Sweep, "results", failing)
    balancing_study.main(TINY, tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "| mgda | FloatingPointError: too large |\n" in text
    assert "| mgda | Gramian | failed | 2.0 |" in text
    assert (tmp_path / "delta_m.png").exists()


def test_a_method_without_numbers_is_shown(tmp_path, untrained):
    def diverging(sweep, steps):
        lanes = invented(sweep, steps)
        diverging.calls += 1
        if diverging.calls == 4:
            for lane in lanes:
                for part in ("validation", "test"):
                    lane[part]["left"]["accuracy"] = np.nan
        return lanes

    diverging.calls = 0
    untrained.setattr(Sweep, "results", diverging)
    summary = balancing_study.main(TINY, tmp_path)["multi_mnist"]
    assert np.isnan(summary.rows[2].delta_m.mean)
    assert re.search(
        r"^\| mgda \| nan±nan \|", (tmp_path / "tables.md").read_text(), re.MULTILINE
    )
    assert balancing_study.mean_ranks({"": summary}, TINY) == {"equal": 1, "mgda": 2}


def test_a_failing_baseline_is_an_error(tmp_path, untrained):
    def failing(sweep, steps):
        raise FloatingPointError("too large")

    untrained.setattr(Sweep, "results", failing)
    with pytest.raises(FloatingPointError):
        balancing_study.main(TINY, tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_the_plain_sum_must_take_part():
    with pytest.raises(ValueError, match="`methods` must contain 'equal'"):
        balancing_study.Config(methods=("mgda",))


def test_missing_tables_are_an_error_before_anything_is_written(tmp_path):
    config = dataclasses.replace(TINY, data=("census_income_kdd",), data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="mtjax data prepare"):
        balancing_study.main(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
