"""What features tell of each other: entropies, sums by hand, and the bias of few."""

import numpy as np
import pytest

from mtjax.nn.feature_information import mutual_information
from mtjax.nn.item_features import ItemFeatures

NUMBER = 400


def drawn():
    rng = np.random.default_rng(0)
    a = rng.integers(2, 7, NUMBER)
    categorical = np.stack([a, a, rng.permutation(a), np.maximum(a, 4)], axis=1)
    # Two of five words each; flags that the field says.
    words = 1 + np.argsort(rng.random((NUMBER, 5)), axis=1)[:, :3]
    words[: NUMBER // 2, 2] = 0
    words[:7] = 0
    flags = np.eye(7)[a] + np.eye(7)[(a + 1) % 7]
    return {
        "categorical": categorical.astype(np.int32),
        "numeric": rng.normal(size=(NUMBER, 1)).astype(np.float32),
        "multi_hot": {"flags": flags.astype(np.float32)},
        "tokens": {"words": words.astype(np.int32)},
    }


FEATURES = ItemFeatures(
    dict.fromkeys(("a", "copy", "shuffled", "coarse", "words"), 9),
    ("a", "copy", "shuffled", "coarse"),
    ("price",),
    multi_hot={"flags": 7},
    texts=("words",),
)
ITEMS = drawn()
NAMES = FEATURES.names


def entropy(p):
    p = np.asarray(p, np.float64).ravel()
    p = p[p > 0] / p.sum()
    return -np.sum(p * np.log(p))


def by_hand(first, second):
    """Values of an item are drawn one of each, all items alike."""
    joint = np.zeros((20, 20))
    for xs, ys in zip(first, second, strict=True):
        for x in xs:
            for y in ys:
                joint[x, y] += 1 / (len(xs) * len(ys) * len(first))
    return entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint)


def test_laws():
    found = mutual_information(FEATURES, ITEMS)
    np.testing.assert_array_equal(found, found.T)
    assert (found >= 0).all()
    a, copy, coarse, price = (NAMES.index(x) for x in ("a", "copy", "coarse", "price"))
    own = entropy(np.bincount(ITEMS["categorical"][:, 0]))
    assert found[a, a] == pytest.approx(own)
    assert found[a, copy] == pytest.approx(own)
    # A function of `a` tells its own entropy.
    assert found[a, coarse] == pytest.approx(found[coarse, coarse])
    np.testing.assert_allclose(found[price], 0, atol=1e-9)


def test_several_values_by_hand():
    found = mutual_information(FEATURES, ITEMS)
    words = [[w for w in row if w] or [0] for row in ITEMS["tokens"]["words"]]
    flags = [list(1 + np.flatnonzero(row)) for row in ITEMS["multi_hot"]["flags"]]
    fields = [[x] for x in ITEMS["categorical"][:, 0]]
    place = NAMES.index
    pairs = {
        ("a", "flags"): (fields, flags),
        ("a", "words"): (fields, words),
        ("flags", "words"): (flags, words),
    }
    for (x, y), values in pairs.items():
        expected = by_hand(*values)
        assert found[place(x), place(y)] == pytest.approx(expected, abs=1e-9)


def test_correction_of_few_items():
    """Of an independent column nearly nothing is left."""
    plain = mutual_information(FEATURES, ITEMS)
    corrected = mutual_information(FEATURES, ITEMS, corrected=True)
    a, shuffled = NAMES.index("a"), NAMES.index("shuffled")
    joint = len({*map(tuple, ITEMS["categorical"][:, [0, 2]].tolist())})
    expected = plain[a, shuffled] + (5 + 5 - joint - 1) / (2 * NUMBER)
    assert corrected[a, shuffled] == pytest.approx(max(0.0, expected))
    assert corrected[a, shuffled] < 0.05
    assert (corrected >= 0).all()
