import math

import numpy as np
import pytest

from mtjax.training import metrics as m

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, 50)
SCORES = RNG.normal(size=50) + LABELS
VALUES = RNG.normal(size=50)
GUESSES = VALUES + 0.3 * RNG.normal(size=50)


def auc_by_pairs(labels, scores):
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None]
    return np.mean((pairs > 0) + 0.5 * (pairs == 0))


def f1_by_counts(labels, predicted):
    true_positive = np.sum(labels * predicted)
    return 2 * true_positive / (np.sum(labels) + np.sum(predicted))


PREDICTED = (SCORES > 0.5).astype(int)
PROBABILITIES = 1 / (1 + np.exp(-SCORES))
BOTH = np.stack([1 - PROBABILITIES, PROBABILITIES], axis=1)


def gap_by_bins(labels, probabilities, count=15):
    total = 0.0
    confidence = np.maximum(probabilities, 1 - probabilities)
    correct = (probabilities > 0.5) == labels
    for i in range(count):
        inside = (confidence > i / count) & (confidence <= (i + 1) / count)
        if inside.any():
            gap = correct[inside].mean() - confidence[inside].mean()
            total += inside.mean() * abs(gap)
    return total


CASES = [
    (m.ACCURACY, LABELS, PREDICTED, np.mean(LABELS == PREDICTED)),
    (m.F1, LABELS, PREDICTED, f1_by_counts(LABELS, PREDICTED)),
    (
        m.F1_MACRO,
        LABELS,
        PREDICTED,
        (f1_by_counts(LABELS, PREDICTED) + f1_by_counts(1 - LABELS, 1 - PREDICTED)) / 2,
    ),
    (m.ROC_AUC, LABELS, SCORES, auc_by_pairs(LABELS, SCORES)),
    (
        m.LOG_LOSS,
        LABELS,
        PROBABILITIES,
        -np.mean(np.log(np.where(LABELS, PROBABILITIES, 1 - PROBABILITIES))),
    ),
    (m.BRIER, LABELS, PROBABILITIES, np.mean((PROBABILITIES - LABELS) ** 2)),
    (m.BRIER, LABELS, BOTH, 2 * np.mean((PROBABILITIES - LABELS) ** 2)),
    (m.CALIBRATION_ERROR, LABELS, PROBABILITIES, gap_by_bins(LABELS, PROBABILITIES)),
    (m.CALIBRATION_ERROR, LABELS, BOTH, gap_by_bins(LABELS, PROBABILITIES)),
    (m.RMSE, VALUES, GUESSES, np.sqrt(np.mean((VALUES - GUESSES) ** 2))),
    (m.MAE, VALUES, GUESSES, np.mean(np.abs(VALUES - GUESSES))),
    (m.R2, VALUES, GUESSES, 1 - np.mean((VALUES - GUESSES) ** 2) / VALUES.var()),
    (
        m.PEARSON,
        VALUES,
        GUESSES,
        np.mean((VALUES - VALUES.mean()) * (GUESSES - GUESSES.mean()))
        / (VALUES.std() * GUESSES.std()),
    ),
]


@pytest.mark.parametrize(
    ("metric", "targets", "predictions", "expected"), CASES, ids=lambda x: str(x)[:20]
)
def test_against_the_definition(metric, targets, predictions, expected):
    np.testing.assert_allclose(metric(targets, predictions), expected, rtol=1e-12)


@pytest.mark.parametrize("metric", [case[0] for case in CASES] + [m.AVERAGE_PRECISION])
def test_better_predictions_move_in_the_stated_direction(metric):
    targets = VALUES if metric in (m.RMSE, m.MAE, m.R2, m.PEARSON) else LABELS
    perfect = np.clip(targets, 0.01, 0.99) if metric is m.LOG_LOSS else targets
    poor = perfect[::-1].copy()
    better, worse = metric(targets, perfect), metric(targets, poor)
    assert (better > worse) == (metric.direction == "higher")


def test_values_that_do_not_exist_are_nan():
    empty, one = np.zeros(0), np.ones(1)
    constant = np.ones(4)
    cases = [
        (m.RMSE, empty, empty),
        (m.ROC_AUC, constant, np.arange(4.0)),
        (m.AVERAGE_PRECISION, constant, np.arange(4.0)),
        (m.R2, one, one),
        (m.PEARSON, np.arange(4.0), constant),
        (m.PEARSON, one, one),
    ]
    for metric, targets, predictions in cases:
        assert math.isnan(metric(targets, predictions)), metric.name


def test_f1_of_a_class_that_never_occurs_is_zero():
    assert m.F1(np.zeros(3, int), np.zeros(3, int)) == 0.0


def test_log_loss_of_several_classes_of_which_some_do_not_occur():
    probabilities = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    value = m.LOG_LOSS(np.array([0, 0]), probabilities)
    np.testing.assert_allclose(value, (np.log(2) + np.log(4)) / 2)


def test_score_leaves_unlabelled_examples_out():
    targets = {"a": np.array([0.0, np.nan, 2.0]), "b": np.array([1, 0, 1])}
    predictions = {"a": np.array([1.0, 5.0, 2.0]), "b": np.array([1, 1, 1])}
    labelled = {"a": ~np.isnan(targets["a"])}
    results = m.score(
        {"a": [m.MAE], "b": [m.ACCURACY, m.F1]}, targets, predictions, labelled
    )
    np.testing.assert_allclose(results["a"]["mae"], 0.5)
    assert results["b"].keys() == {"accuracy", "f1"}


def test_errors():
    with pytest.raises(ValueError, match="got 2 and 3"):
        m.MAE(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="without 'b'"):
        m.score({"b": [m.MAE]}, {"a": np.zeros(1)}, {"a": np.zeros(1)})


def test_calibration_error_of_sure_predictions():
    sure = np.eye(4)[np.array([0, 1, 2, 3])]
    assert m.CALIBRATION_ERROR(np.array([0, 1, 2, 3]), sure) == 0.0
    assert m.CALIBRATION_ERROR(np.array([0, 1, 3, 2]), sure) == pytest.approx(0.5)
    assert m.CALIBRATION_ERROR(np.array([1, 2, 3, 0]), np.full((4, 4), 0.25)) == (
        pytest.approx(0.0)
    )


def test_entropy_of_predictions():
    assert m.predictive_entropy(np.eye(3)) == 0.0
    assert m.predictive_entropy(np.full((5, 8), 1 / 8)) == pytest.approx(math.log(8))
