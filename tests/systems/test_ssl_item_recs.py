"""SSL for item recommendation: closed forms, key streams, devices, what learns."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import mtjax
from mtjax.losses.sampled_softmax import in_batch_softmax_loss, log_frequencies
from mtjax.nn.feature_information import mutual_information
from mtjax.nn.feature_masks import augmented
from mtjax.nn.item_features import ItemFeatures, take_items
from mtjax.systems.ssl_item_recs import (
    SSLItemRecsConfig,
    TwoTower,
    Views,
    alignment_and_uniformity,
    contrast,
    spread_out,
    ssl_item_losses,
    views,
)
from mtjax.training import data_mesh

ROWS = 14  # of the catalogue, with padding and unknown
RNG = np.random.default_rng(0)
CATALOGUE = {
    "categorical": np.stack(
        [2 + np.arange(ROWS) % 3, 2 + np.arange(ROWS) % 2, np.arange(ROWS)], axis=1
    ).astype(np.int32),
    "multi_hot": {"tags": np.float32(RNG.random((ROWS, 4)) < 0.5)},
    "tokens": {"title": RNG.integers(0, 9, (ROWS, 3)).astype(np.int32)},
}
FEATURES = ItemFeatures(
    {"kind": 5, "decade": 4, "id": ROWS, "title": 9},
    ("kind", "decade", "id"),
    multi_hot={"tags": 4},
    texts=("title",),
    width=4,
)
INFORMATION = mutual_information(FEATURES, jax.tree.map(lambda x: x[2:], CATALOGUE))
CONFIG = SSLItemRecsConfig(hidden=(6, 5), temperature=0.2, ssl_temperature=0.5)
BATCH = {
    "user": np.int32([1, 2, 3, 0]),
    "history": np.int32([[3, 4, 0], [5, 0, 0], [0, 0, 0], [7, 8, 9]]),
    "target": np.int32([6, 3, 12, 6]),
}
DRAWN = jnp.array([2, 5, 7, 8, 11, 13])
LOG_Q = log_frequencies(jnp.r_[0, 0, jnp.arange(ROWS - 2.0)])


def made(**changes):
    return TwoTower(FEATURES, 4, replace(CONFIG, **changes))


MODEL = made()


@pytest.fixture(scope="module")
def variables():
    init = jax.jit(MODEL.init)
    return init(jax.random.key(0), CATALOGUE, BATCH["user"], BATCH["history"])


def losses(model, variables, key, *, log_q=LOG_Q, drawn=DRAWN):
    form = (CATALOGUE, BATCH, drawn, log_q, INFORMATION, ("id",))
    return ssl_item_losses(model, variables, *form, key=key)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_contrasts_in_closed_form():
    tau, number = 0.3, 5
    eye = jnp.eye(number)
    apart = contrast(Views(eye, eye), temperature=tau)
    expected = np.log(1 + (number - 1) * np.exp(-1 / tau))
    assert apart == pytest.approx(expected, rel=1e-5)
    ones = jnp.ones((number, 1))
    assert contrast(Views(ones, ones)) == pytest.approx(np.log(number), rel=1e-5)
    rng = np.random.default_rng(0)
    z, w = (unit(rng.normal(size=(number, 3))) for _ in range(2))
    scores = z @ w.T / tau
    rows, columns = (
        np.mean(np.log(np.exp(s).sum(1)) - np.diag(s)) for s in (scores, scores.T)
    )
    pair = Views(jnp.float32(z), jnp.float32(w))
    assert contrast(pair, temperature=tau) == pytest.approx(rows, rel=1e-5)
    both = contrast(pair, temperature=tau, symmetric=True)
    assert both == pytest.approx((rows + columns) / 2, rel=1e-5)
    cosines = z @ w.T
    found = alignment_and_uniformity(pair)
    assert found["alignment"] == pytest.approx(np.diag(cosines).mean(), abs=1e-5)
    off = cosines[~np.eye(number, dtype=bool)]
    assert found["uniformity"] == pytest.approx(off.mean(), abs=1e-5)
    square = (z @ z.T)[~np.eye(number, dtype=bool)] ** 2
    assert spread_out(pair.first) == pytest.approx(square.mean(), rel=1e-5)


def test_towers_against_numpy(variables):
    params = jax.tree.map(np.float64, variables["params"])
    vectors = MODEL.features.apply(
        {"params": variables["params"]["features"]}, CATALOGUE
    )
    flat = np.float64(vectors).reshape(ROWS, -1)

    def tower(name, x):
        hidden = params[f"{name}_hidden"]["Dense_0"]
        x = np.maximum(x @ hidden["kernel"] + hidden["bias"], 0)
        return unit(x @ params[f"{name}_out"]["kernel"] + params[f"{name}_out"]["bias"])

    means = [
        flat[row[row > 0]].sum(0) / max(1, (row > 0).sum()) for row in BATCH["history"]
    ]
    users = params["users"]["embedding"][BATCH["user"]]
    q, z = tower("query", np.concatenate([means, users], axis=1)), tower("item", flat)
    found = jax.jit(MODEL.apply)(variables, CATALOGUE, BATCH["user"], BATCH["history"])
    np.testing.assert_allclose(found, q @ z.T, atol=1e-5)

    # The retrieval loss: corrected, without accidental hits (targets 0 and 3).
    scores = q @ z[BATCH["target"]].T / CONFIG.temperature
    scores -= np.float64(LOG_Q)[BATCH["target"]]
    scores[0, 3] = scores[3, 0] = -np.inf
    expected = np.mean(np.log(np.exp(scores).sum(1)) - np.diag(scores))
    loss = losses(MODEL, variables, jax.random.key(0))["retrieval"]
    assert loss == pytest.approx(expected, rel=1e-4)


def test_views_show_complementary_features(variables, key):
    """With correlated masks, one for the batch, the views are those of two masks."""
    model = made(value_dropout=0.0)
    items = take_items(CATALOGUE, DRAWN)
    pair = views(model, variables, items, INFORMATION, ("id",), key=key)
    every = np.asarray([[bool(i >> j & 1) for j in range(5)] for i in range(32)])
    encode = jax.jit(
        jax.vmap(
            lambda mask: model.apply(
                variables,
                augmented(FEATURES, items, mask[None], key=key),
                method="item_vectors",
            )
        )
    )
    vectors = np.asarray(encode(every))
    matches = lambda z: {
        i for i, v in enumerate(vectors) if np.allclose(v, z, atol=1e-5)
    }
    first, second = matches(pair.first), matches(pair.second)
    assert any(31 - i in second for i in first)
    assert all(not every[i][2] for i in first)  # the id is hidden there
    other = views(model, variables, items, INFORMATION, ("id",), key=jax.random.key(9))
    assert not np.allclose(pair.first, other.first)


def test_gradients_of_the_contrast(variables, key):
    slopes = jax.jit(jax.grad(lambda v: losses(MODEL, v, key)["ssl"]))(variables)
    for name in ("query_hidden", "query_out", "users"):
        for leaf in jax.tree.leaves(slopes["params"][name]):
            np.testing.assert_array_equal(leaf, 0)
    assert np.abs(slopes["params"]["item_out"]["kernel"]).max() > 0


def steps_of(model, weights, variables, steps=3, rate=0.05):
    tx = optax.chain(mtjax.constant(weights), optax.adam(rate))

    def losses_fn(params, key):
        return losses(model, {"params": params}, key)

    def step(carry, key):
        params, state = carry
        found, grads = mtjax.value_and_task_grads(losses_fn)(params, key)
        updates, state = tx.update(grads, state, params, losses=found)
        return (optax.apply_updates(params, updates), state), found

    @jax.jit
    def run(params):
        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    return run(variables["params"])


def test_alpha_zero_is_the_plain_model(variables):
    without = steps_of(MODEL, {"retrieval": 1.0, "ssl": 0.0}, variables)
    plain = steps_of(made(regulariser="none"), {"retrieval": 1.0}, variables)
    for a, b in zip(jax.tree.leaves(without), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_uniform_frequencies_correct_nothing(variables, key):
    same = jnp.full(ROWS, -2.5)
    corrected = losses(MODEL, variables, key, log_q=same)
    plain = losses(MODEL, variables, key, log_q=None)
    assert corrected["retrieval"] == pytest.approx(float(plain["retrieval"]), rel=1e-5)
    off = losses(made(log_q=False), variables, key)
    assert off["retrieval"] == plain["retrieval"]
    assert losses(MODEL, variables, key)["ssl"] == plain["ssl"]


def test_corrected_batches_approach_the_full_softmax():
    """The mean gradient over many batches, for 50 items of very different frequency."""
    number, width, size = 50, 4, 256
    rng = np.random.default_rng(0)
    z = jnp.float32(rng.normal(size=(number, width)) * 0.5)
    q = jnp.float32(rng.normal(size=(number, width)) * 0.5)  # one query per item
    chances = np.float64(1 / np.arange(1, number + 1))
    chances /= chances.sum()

    def full(z):
        scores = q @ z.T
        errors = jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores)
        return jnp.sum(errors * jnp.float32(chances))

    def in_batch(z, rows, log_q):
        return in_batch_softmax_loss(q[rows], z[rows], log_q=log_q[rows])

    rows = jnp.asarray(rng.choice(number, (400, size), p=chances))
    mean = jax.jit(
        lambda log_q: jax.lax.map(lambda r: jax.grad(in_batch)(z, r, log_q), rows).mean(
            0
        )
    )
    goal = np.asarray(jax.grad(full)(z))
    error = lambda g: np.linalg.norm(g - goal) / np.linalg.norm(goal)
    corrected = error(np.asarray(mean(jnp.float32(np.log(chances)))))
    plain = error(np.asarray(mean(jnp.zeros(number))))
    assert corrected < 0.1
    assert corrected < plain / 3


def test_two_devices_are_one(variables, key):
    model = made(value_dropout=0.0)
    batch = {name: jnp.asarray(x) for name, x in BATCH.items()}
    mesh = data_mesh(jax.devices()[:2])

    def loss(variables, batch, drawn, axis_name=None):
        form = (CATALOGUE, batch, drawn, LOG_Q, INFORMATION, ("id",))
        found = ssl_item_losses(model, variables, *form, key=key, axis_name=axis_name)
        return found["retrieval"] + found["ssl"]

    sharded = jax.shard_map(
        partial(loss, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    one = jax.jit(jax.value_and_grad(loss))(variables, batch, DRAWN)
    two = jax.jit(jax.value_and_grad(sharded))(variables, batch, DRAWN)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_baselines_and_variants(variables, key):
    plain = losses(made(regulariser="none"), variables, key)
    assert set(plain) == {"retrieval"}
    dropped = losses(made(regulariser="feature_dropout"), variables, key)
    assert set(dropped) == {"retrieval"}
    assert dropped["retrieval"] != plain["retrieval"]
    apart = losses(made(regulariser="spread_out"), variables, key)
    vectors = MODEL.apply(
        variables, take_items(CATALOGUE, DRAWN), method="item_vectors"
    )
    assert apart["ssl"] == pytest.approx(float(spread_out(vectors)))
    assert apart["retrieval"] == plain["retrieval"]
    per_item = losses(made(masks_per="item"), variables, key)
    assert per_item["ssl"] != losses(MODEL, variables, key)["ssl"]


def test_a_learned_temperature(variables, key):
    model = made(temperature=None)
    params = {**variables["params"], "log_temperature": jnp.log(jnp.array([2.0]))}

    @jax.jit
    def run(params, key):
        retrieval = lambda p: losses(model, {"params": p}, key)["retrieval"]
        learned, slope = jax.value_and_grad(retrieval)(params)
        fixed = losses(made(temperature=0.2), {"params": params}, key)["retrieval"]
        return learned, fixed, slope["log_temperature"]

    learned, fixed, slope = run(params, key)
    assert learned == pytest.approx(float(fixed), rel=1e-5)
    assert slope[0] != 0
    start = jax.jit(model.init)(key, CATALOGUE, BATCH["user"], BATCH["history"])
    assert start["params"]["log_temperature"] == 0


def test_items_that_are_only_ids(key):
    features = ItemFeatures({"id": ROWS}, ("id",), width=8)
    config = replace(CONFIG, masking="none", embedding_dropout=0.3)
    model = TwoTower(features, 0, config)
    catalogue = {"categorical": np.arange(ROWS, dtype=np.int32)[:, None]}
    variables = model.init(key, catalogue, None, BATCH["history"])
    encode = lambda: views(model, variables, catalogue, np.eye(1), key=key)
    pair = encode()
    assert not np.allclose(pair.first, pair.second)
    again = encode()
    np.testing.assert_array_equal(pair.first, again.first)
    # Without the views nothing is dropped.
    exported = partial(model.apply, variables, catalogue, method="item_vectors")
    np.testing.assert_array_equal(exported(), exported())
    masked = TwoTower(features, 0, replace(CONFIG, masking="random"))
    with pytest.raises(ValueError, match="at least two to be hidden"):
        views(masked, variables, catalogue, np.eye(1), key=key)


def test_views_of_an_item_come_together(variables):
    trained = steps_of(MODEL, {"retrieval": 0.0, "ssl": 1.0}, variables, 300, 0.01)
    items = jax.tree.map(lambda x: x[2:], CATALOGUE)

    @jax.jit
    def look(params, key):
        pair = views(MODEL, {"params": params}, items, INFORMATION, ("id",), key=key)
        return alignment_and_uniformity(pair)

    mean = lambda params: jax.tree.map(
        lambda *x: float(np.mean(x)),
        *(look(params, jax.random.key(100 + i)) for i in range(8)),
    )
    before, after = mean(variables["params"]), mean(trained)
    gap = lambda found: found["alignment"] - found["uniformity"]
    assert gap(after) > gap(before) + 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_dropout": 1.0}, "`value_dropout` must be in"),
        ({"embedding_dropout": -0.1}, "`embedding_dropout` must be in"),
        ({"hidden": ()}, "`hidden` must name at least one layer"),
        ({"temperature": 0.0}, "`temperature` must be positive or None"),
        ({"ssl_temperature": -1.0}, "`ssl_temperature` positive"),
    ],
)
def test_configurations_that_are_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)
