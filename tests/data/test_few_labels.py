"""A few labelled examples, trusted pseudo-labels, and batches that mix them in."""

import numpy as np
import pytest

from mtjax.data.few_shot import few_shot_rows
from mtjax.data.pseudo_labels import trusted_labels, two_streams

RNG = np.random.default_rng(0)
LABELS = RNG.permutation(np.repeat([0, 1, 2], [30, 20, 3])).astype(np.int32)


def test_shots_per_class():
    rows = few_shot_rows(LABELS, 4, seed=1)
    assert len(set(rows)) == len(rows)
    np.testing.assert_array_equal(LABELS[rows], [0] * 4 + [1] * 4 + [2] * 3)
    np.testing.assert_array_equal(rows, few_shot_rows(LABELS, 4, seed=1))
    assert set(rows) != set(few_shot_rows(LABELS, 4, seed=2))
    # Fewer shots are a part of more.
    assert set(few_shot_rows(LABELS, 1, seed=1)) < set(rows)
    with pytest.raises(ValueError, match=r"`shots` must be at least 1 .* got 0"):
        few_shot_rows(LABELS, 0)


def test_trusted_are_the_most_confident_of_each_class():
    logits = RNG.normal(size=(90, 3)).astype(np.float32)
    logits[:, 2] -= 9  # never predicted
    found = trusted_labels(logits)
    p = np.exp(np.float64(logits))
    p /= p.sum(1, keepdims=True)
    guesses, confidence = p.argmax(1), p.max(1)
    for c in range(2):
        rows = np.flatnonzero(found == c)
        assert len(rows) == 90 // 3 // 10
        assert (guesses[rows] == c).all()
        others = np.setdiff1d(np.flatnonzero(guesses == c), rows)
        assert confidence[rows].min() >= confidence[others].max()
    assert (found != 2).all()
    assert (trusted_labels(logits, most=1) >= 0).sum() == 2
    # Also where all confidences are 1 up to rounding.
    np.testing.assert_array_equal(trusted_labels(60 * logits), found)


def test_two_streams():
    labels = np.full(50, -1, np.int32)
    labels[:5] = 1
    batches = two_streams(labels, 8, seed=3)
    for _ in range(20):
        rows = next(batches)
        assert rows.shape == (8,)
        assert (labels[rows] >= 0).sum() == 4
    again = two_streams(labels, 8, seed=3)
    first = two_streams(labels, 8, seed=3)
    np.testing.assert_array_equal(next(again), next(first))
    untrusted = np.full(50, -1, np.int32)
    assert next(two_streams(untrusted, 8)).shape == (8,)
