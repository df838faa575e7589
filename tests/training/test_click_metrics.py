import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, roc_auc_score

from mtjax.training import (
    calibration_ratio,
    click_calibration_error,
    click_metrics,
    gauc,
)


def impressions(rows=400, users=20, seed=0):
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, users, rows) * 1_000
    scores = generator.integers(0, 8, rows) / 8
    targets = (generator.random(rows) < 0.2 + 0.5 * scores).astype(np.int64)
    # Two users with one class.
    targets[groups == 0] = 1
    targets[groups == 1_000] = 0
    return targets, scores, groups


def test_gauc_is_the_weighted_mean_of_scikit_learn():
    targets, scores, groups = impressions()
    result = gauc(targets, scores, groups)
    areas, weights = [], []
    for user in np.unique(groups):
        rows = groups == user
        if targets[rows].min() < targets[rows].max():
            areas.append(roc_auc_score(targets[rows], scores[rows]))
            weights.append(rows.sum())
    np.testing.assert_allclose(result.value, np.average(areas, weights=weights))
    assert (result.users, result.skipped) == (len(areas), 20 - len(areas))
    assert result.skipped >= 2
    np.testing.assert_allclose(result.impressions, sum(weights) / 400)


def test_gauc_of_one_user_is_the_pairwise_definition():
    targets, scores, _ = impressions(seed=1)
    positive, negative = scores[targets == 1], scores[targets == 0]
    gaps = positive[:, None] - negative
    pairwise = np.mean((gaps > 0) + 0.5 * (gaps == 0))
    result = gauc(targets, scores, np.zeros(400))
    np.testing.assert_allclose(result.value, pairwise)
    np.testing.assert_allclose(result.value, roc_auc_score(targets, scores))
    # Only the order counts, whatever the names of the users.
    again = gauc(targets, np.exp(5 * scores), np.full(400, "somebody"))
    np.testing.assert_allclose(again.value, pairwise)


def test_users_with_one_class_are_no_halves():
    targets, scores = np.array([0, 1, 1, 1]), np.array([0.1, 0.9, 0.5, 0.5])
    result = gauc(targets, scores, np.array([1, 1, 2, 2]))
    assert result == (1.0, 1, 1, 0.5)
    nobody = gauc(np.ones(3), np.arange(3.0), np.arange(3))
    assert np.isnan(nobody.value)
    assert nobody[1:] == (0, 3, 0.0)
    empty = gauc(np.zeros(0), np.zeros(0), np.zeros(0, np.int64))
    assert np.isnan(empty.value)


def test_calibration_is_that_of_scikit_learn():
    generator = np.random.default_rng(2)
    probabilities = generator.random(2_000) ** 2
    targets = (generator.random(2_000) < probabilities).astype(np.int64)
    for strategy in ("uniform", "quantile"):
        actual, predicted = calibration_curve(
            targets, probabilities, n_bins=10, strategy=strategy
        )
        if strategy == "uniform":
            edges = np.linspace(0, 1, 11)
        else:
            edges = np.quantile(probabilities, np.linspace(0, 1, 11))
        sizes, _ = np.histogram(probabilities, edges)
        np.testing.assert_allclose(
            click_calibration_error(targets, probabilities, bins=10, strategy=strategy),
            np.average(np.abs(actual - predicted), weights=sizes),
        )
    assert abs(calibration_ratio(targets, probabilities) - 1.0) < 0.1
    np.testing.assert_allclose(
        calibration_ratio(targets, probabilities / 2),
        probabilities.sum() / 2 / targets.sum(),
    )
    assert np.isnan(calibration_ratio(np.zeros(3), np.full(3, 0.1)))
    assert np.isnan(click_calibration_error(np.zeros(0), np.zeros(0)))


def test_metrics_of_tasks_skip_what_has_no_label():
    targets, scores, groups = impressions(seed=3)
    buys = np.where(np.arange(400) % 3 == 0, np.nan, targets)
    labels = {"click": targets, "buy": buys, "never": np.zeros(400)}
    probabilities = dict.fromkeys(labels, 0.05 + 0.9 * scores)
    result = click_metrics(labels, probabilities, groups)
    known = ~np.isnan(buys)
    p = probabilities["buy"][known]
    np.testing.assert_allclose(
        result["buy"]["roc_auc"], roc_auc_score(buys[known], p), rtol=1e-12
    )
    np.testing.assert_allclose(
        result["buy"]["log_loss"], log_loss(buys[known], p), rtol=1e-12
    )
    assert result["buy"]["labelled"] == known.sum()
    assert result["buy"]["gauc"] == gauc(buys[known], p, groups[known]).value
    never = result["never"]
    assert np.isnan(never["roc_auc"])
    assert np.isnan(never["gauc"])
    assert np.isnan(never["calibration_ratio"])
    assert np.isfinite(never["log_loss"])
    assert (never["positives"], never["gauc_skipped"]) == (0.0, 20.0)
    nothing = click_metrics({"click": np.full(3, np.nan)}, {"click": np.full(3, 0.5)})
    assert nothing["click"]["labelled"] == 0.0
    assert np.isnan(nothing["click"]["log_loss"])


def test_bad_inputs_are_explained():
    half, labels = np.full(2, 0.5), np.array([0, 1])
    with pytest.raises(ValueError, match="`targets` must be 0 or 1, got 2"):
        gauc(np.array([0, 2]), half, labels)
    with pytest.raises(ValueError, match="`scores` must not be NaN, got 2"):
        gauc(labels, half * np.nan, labels)
    with pytest.raises(ValueError, match="`groups` must have an entry per target"):
        gauc(labels, half, np.arange(3))
    with pytest.raises(ValueError, match="`targets` and `scores` must be equally long"):
        gauc(labels, np.ones(3), labels)
    with pytest.raises(ValueError, match="`probabilities` must be in"):
        calibration_ratio(labels, np.array([-3.0, 2.0]))
    with pytest.raises(ValueError, match="`bins` must be at least 1"):
        click_calibration_error(labels, half, bins=0)
    with pytest.raises(ValueError, match="must hold the task 'buy'"):
        click_metrics({"buy": labels}, {})
    with pytest.raises(ValueError, match="a row per label of 'buy'"):
        click_metrics({"buy": labels}, {"buy": np.ones(3)})
