"""What is known about items, feature by feature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.item_features import ItemFeatures

SIZES = {"brand": 5, "colour": 4, "name": 9}
ITEMS = {
    "categorical": np.int32([[2, 3], [4, 0], [0, 1]]),
    "multi_hot": {"tags": np.float32([[1, 0, 1], [0, 0, 0], [0, 1, 0]])},
    "tokens": {"name": np.int32([[3, 4, 5, 0], [0, 0, 0, 0], [7, 0, 0, 0]])},
}


def features(**changes):
    return ItemFeatures(
        SIZES,
        ("brand", "colour"),
        multi_hot={"tags": 3},
        texts=("name",),
        width=6,
        **changes,
    )


@pytest.mark.parametrize("zero_missing", [False, True])
def test_against_loops(key, zero_missing):
    model = features(zero_missing=zero_missing)
    variables = jax.jit(model.init)(key, ITEMS)
    params = jax.tree.map(np.float64, variables["params"])
    table = params["embeddings"]["table_6"]
    first = {"brand": 0, "colour": 5, "name": 9}

    def vector(name, number):
        row = table[first[name] + number]
        return 0 * row if zero_missing and number == 0 else row

    expected = []
    for i in range(3):
        brand, colour = ITEMS["categorical"][i]
        set_flags = np.flatnonzero(ITEMS["multi_hot"]["tags"][i])
        if len(set_flags):
            tags = params["flags_tags"][set_flags].mean(axis=0)
        else:
            tags = np.zeros(6) if zero_missing else params["missing_tags"][0]
        words = [w for w in ITEMS["tokens"]["name"][i] if w] or [0]
        name = np.mean([vector("name", word) for word in words], axis=0)
        expected.append([vector("brand", brand), vector("colour", colour), tags, name])
    found = jax.jit(model.apply)(variables, ITEMS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert np.any(found[1, 3]) != zero_missing
    assert model.names == ("brand", "colour", "tags", "name")


def test_words_beyond_the_text_have_no_gradient(key):
    model = features()
    variables = jax.jit(model.init)(key, ITEMS)
    items = jax.tree.map(lambda x: jnp.asarray(x[:1]), ITEMS)
    slopes = jax.grad(lambda v: model.apply(v, items).sum())(variables)["params"]
    table = np.asarray(slopes["embeddings"]["table_6"])
    used = np.flatnonzero(np.abs(table).sum(axis=1))
    assert used.tolist() == [2, 5 + 3, 9 + 3, 9 + 4, 9 + 5]
    np.testing.assert_array_equal(slopes["missing_tags"], 0)


def test_numbers_are_multiples_of_a_vector(key):
    model = ItemFeatures(SIZES, ("brand", "colour"), ("price", "age"), width=6)
    items = {**ITEMS, "numeric": np.float32([[1, 0], [-2, 3], [0, 0]])}
    variables = jax.jit(model.init)(key, items)
    vectors = variables["params"]["embeddings"]["number_vectors"]
    found = jax.jit(model.apply)(variables, items)
    expected = np.einsum("nf,fk->nfk", items["numeric"], vectors)
    np.testing.assert_allclose(found[:, 2:], expected, rtol=1e-6)
    assert model.names == ("brand", "colour", "price", "age")


def test_missing_features_are_an_error(key):
    with pytest.raises(ValueError, match=r"\['name'\] are missing in 'tokens'"):
        jax.eval_shape(features().init, key, {**ITEMS, "tokens": {}})
    with pytest.raises(ValueError, match="one column per field"):
        jax.eval_shape(
            features().init, key, {**ITEMS, "categorical": ITEMS["categorical"][:, :1]}
        )
