"""Embeddings of fields and numbers, and weights of fields."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.nn import STEM, FieldEmbeddings, SENet, TaskFieldEmbeddings, is_shared
from mtjax.nn.fields import embedding_width, hash_ids
from mtjax.transforms.sparse_rows import sparse_rows, take_rows, unique_rows

SIZES = {"shop": 5, "brand": 4, "city": 7}
IDS = jnp.array([[2, 0, 6], [4, 3, 1], [-1, 4, 2], [5, -9, 99]])
# What the ids above mean: outside the vocabulary is 1.
MEANT = np.array([[2, 0, 6], [4, 3, 1], [1, 1, 2], [1, 1, 1]])
NUMBERS = jnp.array([[0.5, -1.0], [0.0, 2.0], [1.0, 1.0], [3.0, 0.0]])


def start(module, *args, **options):
    return jax.jit(functools.partial(module.init, **options))(jax.random.key(0), *args)


def apply(module, variables, *args, **options):
    return jax.jit(functools.partial(module.apply, **options))(variables, *args)


def test_one_width_reads_one_table_field_after_field():
    module = FieldEmbeddings(SIZES, width=3)
    variables = start(module, IDS)
    table = np.asarray(variables["params"]["table_3"])
    assert table.shape == (16, 3)
    expected = table[MEANT + np.array([0, 5, 9])]
    stacked = apply(module, variables, IDS, method="stack")
    np.testing.assert_array_equal(stacked, expected)
    np.testing.assert_array_equal(apply(module, variables, IDS), expected.reshape(4, 9))
    rows = module.apply(variables, IDS, method="row_numbers")
    np.testing.assert_array_equal(rows["table_3"], MEANT + np.array([0, 5, 9]))


def test_mixed_widths_keep_the_order_of_columns():
    width = {"shop": 2, "brand": 4, "city": 2}
    module = FieldEmbeddings(SIZES, width=width, numbers=2)
    variables = start(module, IDS, NUMBERS)
    tables = variables["params"]
    assert {k: v.shape for k, v in tables.items()} == {
        "table_2": (12, 2),
        "table_4": (4, 4),
    }
    expected = np.concatenate(
        [
            tables["table_2"][MEANT[:, 0]],
            tables["table_4"][MEANT[:, 1]],
            tables["table_2"][5 + MEANT[:, 2]],
            NUMBERS,
        ],
        axis=1,
    )
    np.testing.assert_array_equal(apply(module, variables, IDS, NUMBERS), expected)
    rows = module.apply(variables, IDS, method="row_numbers")
    np.testing.assert_array_equal(rows["table_2"], MEANT[:, [0, 2]] + np.array([0, 5]))
    np.testing.assert_array_equal(rows["table_4"], MEANT[:, [1]])
    with pytest.raises(ValueError, match="`width` and `number_width` must be the same"):
        module.apply(variables, IDS, NUMBERS, method="stack")


def test_width_by_the_rule():
    # 6 V^(1/4) by hand: 6 * 2 = 12 at 16 and 6 * 10 = 60 at 10^4.
    assert [embedding_width(v) for v in (1, 16, 10**4, 20_736)] == [6, 12, 60, 64]
    module = FieldEmbeddings({"a": 16, "b": 10**4}, width=None)
    variables = start(module, jnp.ones((1, 2), int))
    assert sorted(variables["params"]) == ["table_12", "table_60"]


def test_shared_tables_and_fields_that_are_no_columns():
    sizes = {"item": 6, "last": 6, "word": 9}
    module = FieldEmbeddings(
        sizes, width=4, columns=("last", "item"), shared={"last": "item"}
    )
    ids = jnp.array([[2, 5], [5, 2]])
    variables = start(module, ids)
    table = variables["params"]["table_4"]
    assert table.shape == (15, 4)
    stacked = apply(module, variables, ids, method="stack")
    np.testing.assert_array_equal(stacked, table[ids])
    words = jnp.array([[[3, 0], [8, 99]]])
    embed = functools.partial(module.apply, variables, method="embed")
    np.testing.assert_array_equal(
        embed("word", words), table[6 + np.array([[[3, 0], [8, 1]]])]
    )
    np.testing.assert_array_equal(embed("last", jnp.int32(4)), table[4])
    with pytest.raises(ValueError, match=r"`field` must be one of .*, got 'shop'"):
        embed("shop", words)


def test_numbers_times_a_learned_vector():
    module = FieldEmbeddings(SIZES, width=3, numbers=2, number_width=3)
    variables = start(module, IDS, NUMBERS)
    vectors = variables["params"]["number_vectors"]
    stacked = apply(module, variables, IDS, NUMBERS, method="stack")
    assert stacked.shape == (4, 5, 3)
    expected = NUMBERS[:, :, None] * np.asarray(vectors)[None]
    np.testing.assert_allclose(stacked[:, 3:], expected, rtol=1e-6)
    side_by_side = apply(module, variables, IDS, NUMBERS)
    np.testing.assert_array_equal(side_by_side, stacked.reshape(4, -1))


def test_missing_may_be_zero_and_then_has_no_gradient():
    module = FieldEmbeddings(SIZES, width=3, zero_missing=True)
    variables = start(module, IDS)
    stacked = apply(module, variables, IDS, method="stack")
    assert (stacked[0, 1] == 0).all()
    assert (np.delete(stacked.reshape(12, 3), 1, axis=0) != 0).all()
    grads = jax.grad(lambda v: module.apply(v, IDS).sum())(variables)
    counts = np.zeros(16)
    np.add.at(counts, MEANT + np.array([0, 5, 9]), 1)
    counts[5] = 0
    expected = np.broadcast_to(counts[:, None], (16, 3))
    np.testing.assert_array_equal(grads["params"]["table_3"], expected)


def murmur_finaliser(x):
    """With whole numbers of any size, as in the reference implementation."""
    x %= 2**32
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def test_hash_is_murmurs_finaliser():
    ids = [0, 1, 2, 12345, -1, -(2**31), 2**31 - 1]
    for buckets in (1, 7, 1000, 2**31 - 1):
        expected = [murmur_finaliser(i) % buckets for i in ids]
        assert hash_ids(jnp.array(ids), buckets).tolist() == expected
    # Close to even: chi-squared with 63 degrees of freedom, five deviations.
    counts = np.bincount(hash_ids(jnp.arange(64_000), 64), minlength=64)
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 63) < 5 * np.sqrt(2 * 63)
    with pytest.raises(ValueError, match="`buckets` must be at least 1, got 0"):
        hash_ids(jnp.array(ids), 0)


def test_hashed_fields_take_every_integer():
    module = FieldEmbeddings(SIZES, width=2, hashed=("shop", "city"))
    ids = jnp.array([[0, 0, 1], [1, 1, 0], [-7, 2, 10**9], [88, 4, -1]])
    rows = module.apply(start(module, ids), ids, method="row_numbers")
    expected = np.array(
        [
            [0, 0, 1],
            [1, 1, 0],
            [2 + murmur_finaliser(-7) % 3, 2, 2 + murmur_finaliser(10**9) % 5],
            [2 + murmur_finaliser(88) % 3, 1, 2 + murmur_finaliser(-1) % 5],
        ]
    )
    np.testing.assert_array_equal(rows["table_2"], expected + np.array([0, 5, 9]))


def test_unused_rows_for_an_even_split():
    module = FieldEmbeddings(SIZES, width=2, row_multiple=7)
    assert start(module, IDS)["params"]["table_2"].shape == (21, 2)


def test_tables_of_tasks_feed_stem_and_stay_apart():
    tasks = ("click", "like")
    make = functools.partial(FieldEmbeddings, SIZES, width=2)
    embeddings = TaskFieldEmbeddings(tasks, make)
    stem = STEM(tasks, shared=1, widths=((4,),), gate_hidden=(), tower=())
    variables = start(embeddings, IDS)
    x = apply(embeddings, variables, IDS)
    params = {
        "embeddings": variables["params"],
        "stem": start(stem, x)["params"],
    }

    def losses_fn(params):
        x = embeddings.apply({"params": params["embeddings"]}, IDS)
        logits = stem.apply({"params": params["stem"]}, x)
        return {task: jnp.mean(z**2) for task, z in logits.items()}

    grad_fn = mtjax.value_and_task_grads(losses_fn, shared=is_shared)
    stack = jax.jit(lambda p: grad_fn(p)[1].stack())(params)["embeddings"]
    # Rows: click, like.
    zero = jax.tree.map(lambda g: (np.abs(g).max((1, 2)) == 0).tolist(), stack)
    assert zero == {
        "shared": {"table_2": [False, False]},
        "task_click": {"table_2": [False, True]},
        "task_like": {"table_2": [True, False]},
    }
    # What is read from a table of another task still matters.
    other = jax.tree.map(lambda p: p, params)
    other["embeddings"]["task_like"] = jax.tree.map(
        lambda p: p + 1, params["embeddings"]["task_like"]
    )
    assert losses_fn(other)["click"] != losses_fn(params)["click"]
    history = embeddings.apply(variables, "shop", IDS, method="embed")
    assert {k: v.shape for k, v in history.items()} == {
        "click": (4, 3, 2),
        "like": (4, 3, 2),
        "shared": (4, 3, 2),
    }


def test_rows_of_a_batch_train_like_the_whole_table():
    """What `row_numbers` is for: gradients of the rows read, not of the table."""
    module = FieldEmbeddings(SIZES, width=3)
    variables = start(module, IDS)
    table = variables["params"]["table_3"]
    weights = jax.random.normal(jax.random.key(1), (4, 9))
    whole = jax.grad(lambda v: jnp.sum(weights * module.apply(v, IDS) ** 2))(variables)
    optimizer = optax.sgd(0.1)
    updates, _ = optimizer.update(whole, optimizer.init(variables))
    expected = optax.apply_updates(variables, updates)["params"]["table_3"]

    rows, places = unique_rows(
        module.apply(variables, IDS, method="row_numbers")["table_3"], len(table)
    )
    loss = lambda vectors: jnp.sum(weights * vectors[places].reshape(4, 9) ** 2)
    sparse = sparse_rows(optimizer)
    grads = jax.grad(loss)(take_rows(table, rows))
    found, _ = sparse.update(table, sparse.init(table), rows, grads)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": {"shop": 2}}, "`width` must be given for all fields, not"),
        ({"width": 0}, "`width` must be at least 1, got 0"),
        ({"columns": ("shop", "shop")}, "`columns` must name at least one field"),
        ({"columns": ("x",)}, r"`columns` must name fields .* got \['x'\]"),
        ({"hashed": ("x",)}, r"`hashed` must name fields .* got \['x'\]"),
        ({"shared": {"shop": "city"}}, "'shop' to 'city' does not"),
        ({"row_multiple": 0}, "`row_multiple` must be at least 1"),
        ({"vocabulary_sizes": {"a": 1}}, "must be at least 2 for 'a', got 1"),
        (
            {"vocabulary_sizes": {"a": 2}, "hashed": ("a",)},
            "must be at least 3 for 'a', got 2",
        ),
        ({"numbers": 2}, "`numeric` must have `numbers` = 2 columns, got 0"),
        ({"columns": ("shop",)}, "one column per field"),
    ],
)
def test_contradictions_are_errors(options, message):
    module = FieldEmbeddings(**{"vocabulary_sizes": SIZES, **options})
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), IDS)


@pytest.mark.parametrize("gate", ["relu", "sigmoid", "double_sigmoid"])
def test_senet_weighs_whole_fields(gate):
    fields = jax.random.normal(jax.random.key(2), (3, 7, 4))
    module = SENet(gate=gate)
    variables = start(module, fields)
    found, state = apply(module, variables, fields, mutable=["intermediates"])
    w1, w2 = (
        np.float64(variables["params"][name]["kernel"])
        for name in ("squeeze", "excite")
    )
    assert w1.shape == (7, 2)
    x = np.float64(fields)
    logits = np.maximum(x.mean(2) @ w1, 0) @ w2
    weights = {
        "relu": np.maximum(logits, 0),
        "sigmoid": 1 / (1 + np.exp(-logits)),
        "double_sigmoid": 2 / (1 + np.exp(-logits)),
    }[gate]
    np.testing.assert_allclose(found, x * weights[:, :, None], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        state["intermediates"]["field_weights"][0], weights, rtol=1e-4, atol=1e-6
    )
    # Zero logits: nothing, half, and all of every field.
    zeros = jax.tree.map(jnp.zeros_like, variables)
    factor = {"relu": 0.0, "sigmoid": 0.5, "double_sigmoid": 1.0}[gate]
    np.testing.assert_array_equal(apply(module, zeros, fields), factor * fields)


def test_senet_checks_its_arguments():
    fields = jnp.ones((1, 2, 2))
    with pytest.raises(ValueError, match=r"`gate` must be one of .* got 'tanh'"):
        SENet(gate="tanh").init(jax.random.key(0), fields)
    with pytest.raises(ValueError, match="`reduction` must be at least 1, got 0"):
        SENet(reduction=0).init(jax.random.key(0), fields)
    assert start(SENet(), fields)["params"]["squeeze"]["kernel"].shape == (2, 1)
