import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score

from mtjax.training import (
    delta_m,
    full_ranks,
    full_ranks_in_blocks,
    mtl_gain,
    top_k_metrics,
)


def problem(rows=60, items=25, ties=False, seed=0):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(rows, items))
    if ties:
        scores = np.round(scores)
    return scores, generator.integers(0, items, rows)


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_are_those_of_scipy(ties):
    scores, targets = problem(ties=ties)
    expected = rankdata(-scores, axis=1)[np.arange(60), targets]
    np.testing.assert_array_equal(full_ranks(scores, targets), expected)
    assert ties == (expected % 1 > 0).any()


def test_excluded_items_are_not_ranked_but_the_target_is():
    scores, targets = problem(ties=True)
    excluded = np.random.default_rng(1).random(scores.shape) < 0.5
    kept = ~excluded
    kept[np.arange(60), targets] = True
    expected = [
        rankdata(-row[keep])[keep[:target].sum()]
        for row, keep, target in zip(scores, kept, targets)
    ]
    ranks = full_ranks(scores, targets, excluded=excluded)
    np.testing.assert_array_equal(ranks, expected)
    # One mask for all rows, such as padding.
    padding = np.arange(25) < 2
    np.testing.assert_array_equal(
        full_ranks(scores, np.maximum(targets, 2), excluded=padding),
        full_ranks(scores[:, 2:], np.maximum(targets, 2) - 2),
    )


def test_blocks_rank_like_the_whole():
    scores, targets = problem(ties=True)
    excluded = np.random.default_rng(1).random(scores.shape) < 0.3
    cuts = [7, 8, 20]
    own = scores[np.arange(60), targets]
    ranks = full_ranks_in_blocks(
        (block for block in np.split(scores, cuts, axis=1)),
        targets,
        own,
        excluded=np.split(excluded, cuts, axis=1),
    )
    np.testing.assert_array_equal(ranks, full_ranks(scores, targets, excluded=excluded))


def test_a_model_that_scores_all_alike_gets_the_rank_of_chance():
    ranks = full_ranks(np.zeros((4, 9)), np.arange(4))
    np.testing.assert_array_equal(ranks, 5.0)
    assert top_k_metrics(ranks, [4])["recall@4"] == 0.0


def test_metrics_at_k_are_those_of_scikit_learn():
    scores, targets = problem()
    relevance = np.eye(25)[targets]
    ranks = full_ranks(scores, targets)
    found = top_k_metrics(ranks, [1, 5, 25])
    for k in (1, 5, 25):
        np.testing.assert_allclose(
            found[f"ndcg@{k}"], ndcg_score(relevance, scores, k=k)
        )
        best = np.argsort(-scores, axis=1)[:, :k]
        hits = (best == targets[:, None]).any(axis=1)
        np.testing.assert_allclose(found[f"recall@{k}"], hits.mean())
    # With one right item, average precision is the reciprocal rank.
    np.testing.assert_allclose(
        found["mrr@25"], label_ranking_average_precision_score(relevance, scores)
    )
    np.testing.assert_allclose(
        found["mrr@5"], np.mean(np.where(ranks <= 5, 1 / ranks, 0))
    )
    assert all(np.isnan(value) for value in top_k_metrics(np.zeros(0), [3]).values())


def test_gain_and_relative_gain_have_the_sign_of_the_metric():
    multi = {"click": {"auc": 0.66, "log_loss": 0.30}, "buy": {"auc": 0.60}}
    single = {"click": {"auc": 0.60, "log_loss": 0.25}, "buy": {"auc": 0.80}}
    better = {"click": {"auc": "higher", "log_loss": "lower"}, "buy": {"auc": "higher"}}
    gain = mtl_gain(multi, single, better)
    np.testing.assert_allclose(gain["click"]["auc"], 0.06)
    np.testing.assert_allclose(gain["click"]["log_loss"], -0.05)
    np.testing.assert_allclose(gain["buy"]["auc"], -0.2)
    relative = delta_m(multi, single, better, baseline_name="single")
    np.testing.assert_allclose(relative.per_metric["click"]["log_loss"], -20.0)
    np.testing.assert_allclose(relative.value, ((10.0 - 20.0) / 2 - 25.0) / 2)
    with pytest.raises(ValueError, match="`single` must hold every metric"):
        mtl_gain(multi, {"click": {"auc": 0.6}}, better)


def test_bad_inputs_are_explained():
    scores, targets = problem()
    with pytest.raises(ValueError, match="`targets` must be columns of the scores"):
        full_ranks(scores, targets + 25)
    with pytest.raises(ValueError, match="`targets` must be columns of the scores"):
        full_ranks_in_blocks([scores], targets + 25, np.zeros(60))
    with pytest.raises(ValueError, match="`targets` must have an entry per row"):
        full_ranks(scores, targets[:3])
    scores[3, targets[3]] = np.nan
    with pytest.raises(ValueError, match="`target_scores` must not be NaN, got 1"):
        full_ranks(scores, targets)
    with pytest.raises(ValueError, match="`ks` must be at least 1"):
        top_k_metrics(np.ones(3), [0])
    with pytest.raises(ValueError, match="`ranks` must be at least 1"):
        top_k_metrics(np.zeros(3), [5])
