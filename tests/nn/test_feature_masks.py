"""What views of items show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.feature_masks import (
    augmented,
    correlated_masks,
    draw_masks,
    random_masks,
)
from mtjax.nn.item_features import ItemFeatures

FEATURES = ItemFeatures(
    {"a": 9, "b": 9, "id": 9, "words": 9},
    ("a", "b", "id"),
    ("price",),
    multi_hot={"flags": 4},
    texts=("words",),
)
RNG = np.random.default_rng(0)
NUMBER = 500
ITEMS = {
    "categorical": RNG.integers(2, 9, (NUMBER, 3)).astype(np.int32),
    "numeric": RNG.normal(size=(NUMBER, 1)).astype(np.float32),
    "multi_hot": {"flags": np.ones((NUMBER, 4), np.float32)},
    "tokens": {"words": RNG.integers(1, 9, (NUMBER, 6)).astype(np.int32)},
}


def keys(number):
    return jax.random.split(jax.random.key(0), number)


def test_correlated_masks_hide_a_seed_and_what_tells_it():
    rng = np.random.default_rng(1)
    x = rng.random((6, 6)).astype(np.float32)
    information = x + x.T + 3 * np.eye(6, dtype=np.float32)
    information[2] = information[:, 2] = 99  # an id tells everything
    ranked = np.arange(6) != 2
    draw = lambda key: correlated_masks(information, ranked, key=key)
    masks = np.asarray(jax.jit(jax.vmap(draw))(keys(200)))
    first, second = masks[:, 0], masks[:, 1]
    np.testing.assert_array_equal(first, ~second)
    assert not first[:, 2].any()

    expected = set()
    for seed in np.flatnonzero(ranked):
        others = [i for i in np.flatnonzero(ranked) if i != seed]
        nearest = sorted(others, key=lambda i: -information[seed, i])[:2]
        expected.add(frozenset([seed, *nearest, 2]))
    found = {frozenset(np.flatnonzero(row)) for row in second}
    assert found == expected


def test_random_masks():
    draw = lambda complementary: jax.jit(
        jax.vmap(lambda key: random_masks(5, complementary=complementary, key=key))
    )(keys(400))
    apart, opposite = np.asarray(draw(False)), np.asarray(draw(True))
    for masks in (apart[:, 0], apart[:, 1], opposite[:, 0]):
        assert (masks.sum(axis=1) == 3).all()
        np.testing.assert_allclose(masks.mean(axis=0), 0.6, atol=0.1)
    np.testing.assert_array_equal(opposite[:, 0], ~opposite[:, 1])
    both = (apart[:, 0] & apart[:, 1]).mean(axis=0)
    np.testing.assert_allclose(both, 0.36, atol=0.1)  # independent


def test_masks_per_batch_and_per_item(key):
    information = np.eye(6)
    for masking in ("correlated", "random", "random_complementary", "none"):
        masks = draw_masks(FEATURES, masking, information, ("id",), rows=64, key=key)
        assert masks.shape == (2, 64, 6)
        assert (len(np.unique(masks[0], axis=0)) > 1) == (masking != "none")
    one = draw_masks(FEATURES, "random", key=key)
    assert one.shape == (2, 1, 6)
    other = draw_masks(FEATURES, "random", key=jax.random.key(5))
    assert (one != other).any()


def test_masks_that_cannot_be(key):
    alone = ItemFeatures({"id": 9}, ("id",))
    with pytest.raises(ValueError, match="`features` must be at least two to be hid"):
        draw_masks(alone, "random", key=key)
    assert draw_masks(alone, "none", key=key).all()
    with pytest.raises(ValueError, match="`information` must be given"):
        draw_masks(FEATURES, "correlated", key=key)


def test_hidden_features_are_missing(key):
    visible = jnp.array([[True, False, False, False, True, False]])
    view = augmented(FEATURES, ITEMS, visible, key=key)
    ids = ITEMS["categorical"]
    np.testing.assert_array_equal(view["categorical"][:, 0], ids[:, 0])
    np.testing.assert_array_equal(view["categorical"][:, 1:], 0)
    np.testing.assert_array_equal(view["tokens"]["words"], 0)
    np.testing.assert_array_equal(view["multi_hot"]["flags"], 1)
    # Numbers are shown, unless one asks otherwise.
    np.testing.assert_array_equal(view["numeric"], ITEMS["numeric"])
    view = augmented(FEATURES, ITEMS, visible, mask_numbers=True, key=key)
    np.testing.assert_array_equal(view["numeric"], 0)
    rows = jnp.arange(NUMBER * 6).reshape(NUMBER, 6) % 4 < 2
    view = augmented(FEATURES, ITEMS, rows, key=key)
    np.testing.assert_array_equal(view["categorical"], np.where(rows[:, :3], ids, 0))


def test_values_are_dropped_one_by_one(key):
    visible = jnp.ones((1, 6), bool)
    view = augmented(FEATURES, ITEMS, visible, value_dropout=0.3, key=key)
    words, flags = view["tokens"]["words"], view["multi_hot"]["flags"]
    np.testing.assert_allclose((words == 0).mean(axis=0), 0.3, atol=0.08)
    np.testing.assert_allclose((flags == 0).mean(axis=0), 0.3, atol=0.08)
    np.testing.assert_array_equal(words[words > 0], ITEMS["tokens"]["words"][words > 0])
    np.testing.assert_array_equal(view["categorical"], ITEMS["categorical"])
    # Flags and words have draws of their own.
    assert abs(np.corrcoef(words[:, 0] == 0, flags[:, 0] == 0)[0, 1]) < 0.2
