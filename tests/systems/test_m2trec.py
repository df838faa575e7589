"""M2TRec: items are their metadata, at the input and at the output."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax
from mtjax.nn.item_features import ItemFeatures
from mtjax.systems.m2trec import (
    M2TRec,
    M2TRecConfig,
    equal_metadata,
    m2trec_losses,
    recommend,
    sampled_losses,
)
from mtjax.training import full_ranks, top_k_metrics

SIZES = {"kind": 5, "decade": 4, "title": 20}
LEVELS = ("kind", "decade")
CONFIG = M2TRecConfig(width=8, layers=1, hidden=8, dropout=0.0, max_length=6)
NUMBER = 9
# Rows 7 and 8 say the same.
ITEMS = {
    "categorical": np.int32(
        [[0, 0], [1, 1], [2, 2], [3, 3], [4, 2], [2, 3], [0, 2], [4, 3], [4, 3]]
    ),
    "multi_hot": {"tags": np.float32(np.eye(9)[:, 3:7])},
    "tokens": {
        "title": np.int32(
            [[0, 0], [0, 0], [2, 3], [4, 0], [5, 6], [7, 8], [9, 3], [4, 11], [4, 11]]
        )
    },
}
HISTORY = np.int32([[2, 3, 0, 0], [4, 5, 6, 7], [8, 0, 0, 0]])
TARGETS = jnp.array([5, 6, 3])
CANDIDATES = np.arange(NUMBER) >= 2


def made(num_items=None, **changes):
    features = ItemFeatures(
        SIZES, LEVELS, multi_hot={"tags": 4}, texts=("title",), width=5
    )
    return M2TRec(features, LEVELS, replace(CONFIG, **changes), num_items)


def taken(rows):
    return jax.tree.map(lambda x: x[rows], ITEMS)


MODEL = made()


@pytest.fixture(scope="module")
def variables():
    start = jax.jit(MODEL.init)(jax.random.key(0), ITEMS, HISTORY)
    # Away from the zero biases of the start.
    return jax.tree.map(
        lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size) + 1.0).reshape(x.shape), start
    )


apply = jax.jit(MODEL.apply)


def test_scores_are_inner_products_with_the_metadata(variables):
    found = apply(variables, ITEMS, HISTORY)
    params = jax.tree.map(np.float64, variables["params"])
    apply_features = jax.jit(MODEL.features.apply)
    features = apply_features({"params": variables["params"]["features"]}, ITEMS)
    flat = np.float64(features).reshape(NUMBER, -1)
    vectors = flat @ params["item"]["kernel"] + params["item"]["bias"]
    s = MODEL.apply(
        variables,
        jnp.asarray(vectors[HISTORY], jnp.float32),
        jnp.asarray(HISTORY) > 0,
        method=lambda module, x, mask: module.session(x, mask),
    )
    expected = np.float64(s) @ params["query"]["kernel"] @ vectors.T
    np.testing.assert_allclose(found.items, expected, rtol=1e-4, atol=1e-5)
    for name, values in (("kind", 3), ("decade", 2)):
        head = params[f"level_{name}"]
        expected = np.float64(s) @ head["kernel"] + head["bias"]
        assert found.levels[name].shape == (3, values)
        np.testing.assert_allclose(found.levels[name], expected, rtol=1e-4, atol=1e-5)


def test_items_with_equal_metadata_are_equal(variables):
    scores = np.asarray(apply(variables, ITEMS, HISTORY).items)
    np.testing.assert_array_equal(scores[:, 7], scores[:, 8])
    vectors = np.asarray(MODEL.apply(variables, ITEMS, method="item_vectors"))
    np.testing.assert_array_equal(vectors[7], vectors[8])
    groups = equal_metadata(taken(np.arange(2, NUMBER)))
    assert groups[5] == groups[6]
    assert len(set(groups)) == NUMBER - 3


def test_the_catalogue_may_grow_and_be_shuffled(variables):
    whole = np.asarray(apply(variables, ITEMS, HISTORY).items)
    longer = np.r_[np.arange(NUMBER), 3, 6, 4, 4, 7, 5, 2]
    grown = np.asarray(apply(variables, taken(longer), HISTORY).items)
    np.testing.assert_array_equal(grown[:, :NUMBER], whole)
    np.testing.assert_array_equal(grown[:, NUMBER:], whole[:, longer[NUMBER:]])

    order = np.r_[0, np.random.default_rng(0).permutation(np.arange(1, NUMBER))]
    places = np.argsort(order).astype(np.int32)
    shuffled = apply(variables, taken(order), places[HISTORY])
    np.testing.assert_allclose(shuffled.items, whole[:, order], rtol=1e-5, atol=1e-6)


def test_padding_does_not_count(variables):
    scores = apply(variables, ITEMS, HISTORY)
    longer = np.pad(HISTORY, ((0, 0), (0, 2)))
    left = np.pad(HISTORY[:1, :2], ((0, 0), (2, 0)))
    other = jax.tree.map(np.copy, ITEMS)
    for leaf in jax.tree.leaves(other):
        leaf[0] = leaf[4]  # what the row of padding says
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    same(apply(variables, ITEMS, longer).items, scores.items)
    same(apply(variables, ITEMS, left).items[0], scores.items[0])
    same(apply(variables, other, HISTORY).items[:, 1:], scores.items[:, 1:])


def test_loss_of_outputs_that_say_nothing(variables):
    params = dict(variables["params"])
    for name in ("query", "level_kind", "level_decade"):
        params[name] = jax.tree.map(jnp.zeros_like, params[name])
    scores = apply({"params": params}, ITEMS, HISTORY)
    losses = m2trec_losses(MODEL, scores, ITEMS, TARGETS, CANDIDATES)
    assert list(losses) == ["item", "kind", "decade"]
    expected = {"item": np.log(NUMBER - 2), "kind": np.log(3), "decade": np.log(2)}
    assert {k: float(v) for k, v in losses.items()} == pytest.approx(expected)


def test_losses_are_of_the_next_item(variables):
    """Cross-entropies by hand; labels are the target's, not the last item's."""
    scores = apply(variables, ITEMS, HISTORY)
    candidates = CANDIDATES & (np.arange(NUMBER) != 3)
    losses = m2trec_losses(MODEL, scores, ITEMS, TARGETS, candidates)

    def error(logits, label):
        logits = np.float64(logits)
        return np.log(np.exp(logits).sum()) - logits[label]

    # Item 3 is no candidate, item 6 has no kind.
    rows = np.flatnonzero(candidates)
    item = [
        error(scores.items[i][rows], list(rows).index(t)) for i, t in ((0, 5), (1, 6))
    ]
    kind = [error(scores.levels["kind"][i], label) for i, label in ((0, 0), (2, 1))]
    decade = [
        error(scores.levels["decade"][i], label) for i, label in enumerate((1, 0, 1))
    ]
    expected = {"item": np.mean(item), "kind": np.mean(kind), "decade": np.mean(decade)}
    assert {k: float(v) for k, v in losses.items()} == pytest.approx(expected, rel=1e-5)


def test_a_weight_of_zero_removes_a_task(variables):
    def losses_fn(params):
        scores = MODEL.apply({"params": params}, ITEMS, HISTORY)
        return m2trec_losses(MODEL, scores, ITEMS, TARGETS, CANDIDATES)

    def update(params, kind):
        tx = mtjax.constant({"item": 1.0, "kind": kind, "decade": 0.0})
        losses, grads = mtjax.value_and_task_grads(losses_fn)(params)
        return tx.update(grads, tx.init(params), params, losses=losses)[0]

    @jax.jit
    def run(params):
        expected = jax.grad(lambda p: losses_fn(p)["item"])(params)
        return update(params, 0.0), update(params, 1.0), expected

    alone, both, expected = run(variables["params"])
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for name in ("level_kind", "level_decade"):
        np.testing.assert_array_equal(alone[name]["kernel"], 0)
    assert np.abs(both["level_kind"]["kernel"]).max() > 0
    np.testing.assert_array_equal(both["level_decade"]["kernel"], 0)


def test_parameters_do_not_depend_on_the_catalogue(key):
    count = lambda model, items: sum(
        x.size for x in jax.tree.leaves(jax.eval_shape(model.init, key, items, HISTORY))
    )
    twice = taken(np.r_[np.arange(NUMBER), np.arange(NUMBER)])
    assert count(MODEL, ITEMS) == count(MODEL, twice)
    for rows in (NUMBER, 2 * NUMBER):  # a row and a bias each, in place of W_s
        linear = count(made(rows, output="linear"), twice)
        own = rows * (CONFIG.width + 1) - CONFIG.width**2
        assert linear == count(MODEL, ITEMS) + own


def test_a_linear_output_never_recommends_new_items(key):
    model = made(7, output="linear")
    variables = jax.jit(model.init)(key, ITEMS, HISTORY)
    scores = np.asarray(jax.jit(model.apply)(variables, ITEMS, HISTORY).items)
    assert np.isfinite(scores).all()
    ranks = full_ranks(scores, np.array([7, 8, 2]), excluded=~CANDIDATES)
    assert ranks.tolist()[:2] == [6.5, 6.5]
    assert ranks[2] <= 5
    fewer = model.apply(variables, taken(np.arange(5)), HISTORY[:1])
    np.testing.assert_allclose(fewer.items, scores[:1, :5], rtol=1e-5)


def test_sampled_losses_with_all_items_are_the_full_ones(key):
    for changes in ({}, {"temperature": 0.5, "category_bias": True}):
        model = made(**changes)
        variables = jax.jit(model.init)(key, ITEMS, HISTORY)
        variables = jax.tree.map(lambda x: x + 0.1, variables)
        full = m2trec_losses(
            model,
            jax.jit(model.apply)(variables, ITEMS, HISTORY),
            ITEMS,
            TARGETS,
            CANDIDATES,
        )
        negatives = jnp.arange(2, NUMBER)
        log_q = jnp.full(len(negatives), -jnp.log(len(negatives)))
        arguments = (ITEMS, jnp.asarray(HISTORY), TARGETS, negatives, log_q)
        sampled = jax.jit(partial(sampled_losses, model))(variables, *arguments)
        for name, loss in full.items():
            np.testing.assert_allclose(sampled[name], loss, rtol=1e-5)
    shapes = jax.eval_shape(
        lambda key: sampled_losses(model, variables, *arguments, key=key), key
    )
    assert set(shapes) == set(full)
    with pytest.raises(ValueError, match="`model` must have a tied output"):
        sampled_losses(made(7, output="linear"), variables, *arguments)


def test_cosines_and_biases_of_categories(key):
    model = made(temperature=0.1, category_bias=True)
    variables = jax.jit(model.init)(key, ITEMS, HISTORY)
    run = jax.jit(model.apply)
    plain = np.asarray(run(variables, ITEMS, HISTORY).items)
    assert np.abs(plain).max() <= 10.0001
    vectors = model.apply(variables, ITEMS, method="item_vectors")
    keys = model.apply(variables, ITEMS, vectors, method="keys")
    np.testing.assert_allclose(jnp.linalg.norm(keys[:, :-1], axis=1), 1, rtol=1e-5)
    params = dict(variables["params"])
    params["bias_kind"] = jnp.arange(5.0)
    params["bias_decade"] = 10 * jnp.arange(4.0)
    moved = run({"params": params}, ITEMS, HISTORY).items
    bias = ITEMS["categorical"] @ np.array([1, 10])
    np.testing.assert_allclose(
        moved - plain, np.tile(bias, (3, 1)), rtol=1e-4, atol=1e-4
    )


def test_ties_have_a_rule_and_get_their_mean_rank():
    scores = np.array([[9.0, 9.0, 5.0, 1.0, 5.0], [9.0, 9.0, 1.0, 3.0, 2.0]])
    excluded = np.arange(5) < 2
    best = recommend(jnp.asarray(scores), 2, excluded=jnp.asarray(excluded))
    assert best.tolist() == [[2, 4], [3, 4]]
    ranks = full_ranks(scores, np.array([4, 2]), excluded=excluded)
    assert ranks.tolist() == [1.5, 3.0]
    found = top_k_metrics(ranks, ks=[1, 2])
    assert (found["recall@1"], found["recall@2"]) == (0.0, 0.5)
    assert found["mrr@2"] == pytest.approx(1 / 1.5 / 2)


def test_sessions_without_items_learn_nothing_wrong(variables):
    empty = np.zeros((1, 4), np.int32)

    def loss(variables):
        scores = MODEL.apply(variables, ITEMS, empty)
        losses = m2trec_losses(MODEL, scores, ITEMS, TARGETS[:1], CANDIDATES)
        return losses["item"], scores.items

    (value, scores), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
    np.testing.assert_array_equal(scores, 0)
    assert value == pytest.approx(np.log(NUMBER - 2))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))


def test_new_items_are_learnt_from_their_metadata(variables):
    """Items of a kind follow each other; the ones held out are found at once."""
    kinds = np.repeat([2, 3, 4], 10)
    rows = np.arange(30)
    table = np.zeros((32, 2), np.int32)
    table[2:] = np.stack([kinds, 2 + rows % 2], axis=1)
    items = {"categorical": table}
    features = ItemFeatures(SIZES, LEVELS, width=5)
    model = M2TRec(features, LEVELS, CONFIG)
    new = rows % 10 == 9
    known = 2 + rows[~new]
    rng = np.random.default_rng(0)
    history = rng.choice(known, (64, 3)).astype(np.int32)
    history[:, 1:] = history[:, :1] // 10 * 10 + 2  # same kind, another row
    history = np.where(np.isin(history, known), history, history[:, :1])
    same = table[history[:, 0], 0]
    targets = jnp.array([rng.choice(known[kinds[~new] == k]) for k in same])
    candidates = np.isin(np.arange(32), known)
    tx = optax.adam(0.02)
    params = jax.jit(model.init)(jax.random.key(0), items, history)

    @jax.jit
    def run(params):
        def step(carry, _):
            def total(p):
                scores = model.apply(p, items, history)
                losses = m2trec_losses(model, scores, items, targets, candidates)
                return sum(losses.values())

            slopes = jax.grad(total)(carry[0])
            updates, state = tx.update(slopes, carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), None, length=60)[0][0]

    scores = model.apply(run(params), items, history).items
    best = np.asarray(recommend(scores, 10, excluded=jnp.arange(32) < 2))
    assert np.mean(table[best, 0] == same[:, None]) > 0.95
    assert np.isin(best, 2 + rows[new]).sum() == len(best)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 7}, "`heads` must divide `width`, got 2 and 7"),
        ({"layers": 0}, "must be at least 1"),
        ({"dropout": 1.0}, "`dropout` must be in"),
        ({"temperature": 0.0}, "`temperature` must be positive or None"),
    ],
)
def test_configurations_that_are_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_models_that_are_wrong(key):
    features = ItemFeatures(SIZES, LEVELS, width=5)
    for model, message in (
        (M2TRec(features, ("title",), CONFIG), r"`levels` must name `fields`"),
        (M2TRec(features, (), replace(CONFIG, category_bias=True)), "needs `levels`"),
        (made(output="linear"), "`num_items` must be given for the linear output"),
        (made(5), "`num_items` must be given for the linear output"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, key, ITEMS, HISTORY)
