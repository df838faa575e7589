"""The experiment on HoME: sizes that match, and its quick run, interrupted."""

from dataclasses import replace

import numpy as np
import pytest

from experiments import home as experiment
from experiments import home_models
from experiments.ranking_training import made_up
from experiments.recsys_study import size_of

CONFIG = experiment.Config().home


@pytest.fixture(scope="module")
def problem():
    return made_up(tuple(home_models.CATEGORIES))


@pytest.mark.parametrize("name", home_models.BASELINES)
def test_baselines_are_as_large_as_home(name, problem):
    target = size_of(home_models.home("HoME", problem, CONFIG), problem)
    found = size_of(home_models.baseline(name, problem, CONFIG), problem)
    assert abs(found - target) < 0.05 * target


def test_ablations_differ(problem):
    sizes = {
        name: size_of(home_models.home(name, problem, CONFIG), problem)
        for name in home_models.ABLATIONS
    }
    assert {*experiment.Config().ablations, "HoME"} == {*sizes}
    # The other switches add or take parameters.
    same = {n for n, size in sizes.items() if size == sizes["HoME"]}
    assert same == {"HoME", "uncertainty weighting"}


@pytest.mark.slow
def test_quick_run_goes_on_after_an_interruption(tmp_path, dies):
    config = replace(experiment.QUICK, baselines=("CGC",))
    calls = dies(experiment, "fit", 3)
    with pytest.raises(KeyboardInterrupt):
        experiment.main(config, tmp_path)
    found = experiment.main(config, tmp_path)
    # CGC and HoME tuned, an ablation, which was begun twice, HoME at a high rate.
    assert len(calls) == 5
    row = found["results"]["HoME"][0]
    np.testing.assert_allclose(np.sum(row["gates"], axis=1), 1.0, rtol=1e-5)
    assert np.shape(row["gates"]) == (4, 7)
    assert len(row["zero rates"]) == 6 + 7
    assert 0 < row["own share, income"] < 1
    assert np.shape(found["results"]["CGC"][0]["gates"]) == (4, 6)
    text = (tmp_path / "table.md").read_text()
    assert "| no self-gate |" in text
    assert "| to HoME |" in text
    for name in ("home.png", "home_gates.png"):
        assert (tmp_path / name).stat().st_size > 5_000
    with pytest.raises(ValueError, match="seeds: 1 there, 2 here"):
        experiment.main(replace(config, seeds=2), tmp_path)
