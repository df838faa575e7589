import numpy as np
import pytest
from jaxtyping import TypeCheckError

from mtjax.training import delta_m, mean_rank, seed_table

BASE = {"seg": {"miou": 40.0, "acc": 80.0}, "depth": {"abs": 0.5}}
MULTI = {"seg": {"miou": 44.0, "acc": 76.0}, "depth": {"abs": 0.4}}
BETTER = {"seg": {"miou": "higher", "acc": "higher"}, "depth": {"abs": "lower"}}


def test_both_averages_and_both_signs():
    # +10 % and -5 % on one task, +20 % on the other.
    values = {
        (averaging, convention): delta_m(
            MULTI,
            BASE,
            BETTER,
            baseline_name="single",
            averaging=averaging,
            convention=convention,
        ).value
        for averaging in ("tasks", "metrics")
        for convention in ("higher_is_better", "lower_is_better")
    }
    np.testing.assert_allclose(
        list(values.values()), [11.25, -11.25, 25 / 3, -25 / 3], rtol=1e-12
    )


def test_parts_and_text():
    result = delta_m(MULTI, BASE, BETTER, baseline_name="single-task")
    np.testing.assert_allclose(result.per_task["seg"], 2.5)
    np.testing.assert_allclose(result.per_metric["seg"]["acc"], -5.0)
    assert str(result) == "Δm = +11.25 % against single-task (higher is better)"


def test_the_baseline_against_itself_is_zero():
    assert delta_m(BASE, BASE, BETTER, baseline_name="itself").value == 0.0


def test_negative_baseline_keeps_the_sign():
    result = delta_m(
        {"a": {"r2": -0.5}},
        {"a": {"r2": -1.0}},
        {"a": {"r2": "higher"}},
        baseline_name="b",
    )
    assert result.value == 50.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": {**BASE, "depth": {"abs": 0.0}}}, "must not be zero"),
        ({"baseline": {"seg": BASE["seg"]}}, "`baseline` must hold every metric"),
        ({"results": {**MULTI, "seg": {"acc": 1.0}}}, "nothing for 'miou' of 'seg'"),
        ({"directions": {}}, "at least one metric"),
        ({"directions": {"seg": {}}}, "at least one metric"),
    ],
)
def test_errors(change, message):
    arguments = {"results": MULTI, "baseline": BASE, "directions": BETTER, **change}
    with pytest.raises(ValueError, match=message):
        delta_m(**arguments, baseline_name="b")


def test_mean_rank_shares_ties_and_puts_nan_last():
    table = {
        "sum": {"a": {"acc": 0.8, "auc": 0.5}, "b": {"mae": 2.0}},
        "mgda": {"a": {"acc": 0.9, "auc": float("nan")}, "b": {"mae": 2.0}},
        "uw": {"a": {"acc": 0.7, "auc": 0.6}, "b": {"mae": 3.0}},
    }
    directions = {"a": {"acc": "higher", "auc": "higher"}, "b": {"mae": "lower"}}
    ranks = mean_rank(table, directions)
    np.testing.assert_allclose(ranks["sum"], (2 + 2 + 1.5) / 3)
    np.testing.assert_allclose(ranks["mgda"], (1 + 3 + 1.5) / 3)
    np.testing.assert_allclose(ranks["uw"], (3 + 1 + 3) / 3)


@pytest.mark.parametrize(
    "change",
    [
        {"directions": {"seg": {"miou": "up"}}},
        {"convention": "better"},
        {"averaging": "mean"},
    ],
)
def test_unknown_choices(change):
    arguments = {"results": MULTI, "baseline": BASE, "directions": BETTER, **change}
    # The type checker of the tests comes before the check of the function.
    with pytest.raises((ValueError, TypeCheckError), match=next(iter(change))):
        delta_m(**arguments, baseline_name="b")


def test_mean_rank_errors():
    with pytest.raises(ValueError, match="must not be empty"):
        mean_rank({}, BETTER)
    with pytest.raises(ValueError, match="table"):
        mean_rank({"sum": {"a": {}}}, BETTER)


def test_table_of_seeds():
    runs = {"a": [{"x": 1.0, "y": 3}, {"x": 2.0, "y": 3}], "b": [{"z": 0.123456}]}
    assert seed_table(runs).splitlines() == [
        "| method | x | y | z |",
        "|---|---|---|---|",
        "| a | 1.5 ± 0.71 | 3 ± 0 |  |",
        "| b |  |  | 0.1235 |",
    ]
    with pytest.raises(ValueError, match=r"`runs` must hold .* got {'a': 0}"):
        seed_table({"a": []})
