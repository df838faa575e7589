"""AdaMerging: exact merges and gradients, entropy, TIES vectors, what `fit` changes."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax import merging
from mtjax.losses import entropy_loss
from mtjax.merging.coefficients import (
    clamped_share,
    effective_coefficients,
    init_coefficients,
    merge_with_coefficients,
)
from mtjax.merging.match import named_leaves
from mtjax.systems.adamerging import (
    AdaMergingConfig,
    adamerging_loss,
    collapsed,
    fit,
    ties_vectors,
)

CLASSES = {"a": 2, "b": 3, "c": 4}  # by task
SIZE = 7  # of a batch


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def tree(rng, scale=1.0):
    """Leaves of a flat order (`z`, `out`) that differs from that of their names."""
    return {
        "z": {"w": scale * normal(rng, 5, 6), "b": scale * normal(rng, 6)},
        "out": scale * normal(rng, 6, 4),
    }


@pytest.fixture(scope="module")
def base():
    return jax.tree.map(jnp.asarray, tree(np.random.default_rng(0))) | {
        "count": jnp.array(3)
    }


@pytest.fixture(scope="module")
def models(base):
    changes = {t: tree(np.random.default_rng(i + 1)) for i, t in enumerate(CLASSES)}
    float_part = {name: base[name] for name in ("z", "out")}
    return {
        task: jax.tree.map(jnp.add, float_part, change) | {"count": jnp.array(9)}
        for task, change in changes.items()
    }


@pytest.fixture(scope="module")
def vectors(base, models):
    return merging.task_vectors(base, models)


HEADS = {
    t: normal(np.random.default_rng(i + 9), 4, c)
    for i, (t, c) in enumerate(CLASSES.items())
}
BATCH = {
    t: normal(np.random.default_rng(i + 20), SIZE, 5) for i, t in enumerate(CLASSES)
}


def logits_fn(params, task, x):
    hidden = jnp.tanh(x @ params["z"]["w"] + params["z"]["b"][None])
    return jnp.tanh(hidden @ params["out"]) @ HEADS[task]


@functools.cache
def slopes_of(config):
    """The loss with its gradient, compiled once per configuration."""
    total = lambda *args: adamerging_loss(*args, logits_fn, config)
    return jax.jit(jax.value_and_grad(total, has_aux=True))


LAYER = AdaMergingConfig()
TASK = AdaMergingConfig("task")
blocks = lambda path: path.split("/")[0]
BLOCK = AdaMergingConfig(blocks)


def start(base, vectors, config, seed=None):
    found = init_coefficients(base, vectors, config.granularity)
    if seed is None:
        return found
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.uniform(0.1, 0.9, 3), jnp.float32) for n in found}


# --- Coefficients and merging ---------------------------------------------------------


@pytest.mark.parametrize("granularity", ["task", "layer", blocks])
def test_the_start_is_task_arithmetic(base, models, vectors, granularity):
    coefficients = init_coefficients(base, vectors, granularity)
    found = merge_with_coefficients(base, vectors, coefficients, granularity)
    expected = merging.task_arithmetic(0.3)(base, models)
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal_dtypes(found, base)
    assert found["count"] == 3  # neither merged nor learnt


def test_names_of_groups(base, vectors):
    names = lambda granularity: set(init_coefficients(base, vectors, granularity))
    assert names("task") == {"all"}
    assert names("layer") == {"z/w", "z/b", "out"}
    assert names(blocks) == {"z", "out"}


def test_every_leaf_gets_its_own_coefficients(base, vectors):
    rows = {n: np.float32(x) for n, x in start(base, vectors, LAYER, 3).items()}
    expected = {
        path: np.float64(x)
        + np.tensordot(rows[path].astype(np.float64), named_leaves(vectors)[path], 1)
        for path, x in named_leaves(base).items()
        if path != "count"
    }
    # The order of the mapping means nothing: names do.
    for order in (sorted(rows), sorted(rows, reverse=True)):
        found = merge_with_coefficients(base, vectors, {n: rows[n] for n in order})
        for path, value in expected.items():
            np.testing.assert_allclose(
                named_leaves(found)[path], value, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("config", [TASK, BLOCK])
def test_layers_tied_are_tasks_or_blocks(base, vectors, config):
    tied = start(base, vectors, config, 4)
    layers = effective_coefficients(tied, vectors, config.granularity)
    coarse, slopes = slopes_of(config)(tied, base, vectors, BATCH)
    fine, parts = slopes_of(LAYER)(layers, base, vectors, BATCH)
    np.testing.assert_allclose(coarse[0], fine[0], rtol=1e-6)
    group = (lambda path: "all") if config is TASK else blocks
    for name, slope in slopes.items():
        total = sum(part for path, part in parts.items() if group(path) == name)
        np.testing.assert_allclose(slope, total, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_an_inner_product_with_task_vectors(base, vectors):
    coefficients = start(base, vectors, LAYER, 5)
    _, slopes = slopes_of(LAYER)(coefficients, base, vectors, BATCH)
    merged = merge_with_coefficients(base, vectors, coefficients)
    floats = {name: merged[name] for name in ("z", "out")}

    @jax.jit
    @jax.grad
    def at(params):
        return sum(entropy_loss(logits_fn(params, t, BATCH[t])) for t in CLASSES)

    gradient, rows = named_leaves(at(floats)), named_leaves(vectors)
    for path, slope in slopes.items():
        expected = [np.vdot(gradient[path], rows[path][k]) for k in range(3)]
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


def test_loss_and_gradient_against_numpy(base, vectors):
    wide = {p: np.float64(x) for p, x in named_leaves(base).items()}
    rows = {p: np.float64(x) for p, x in named_leaves(vectors).items()}
    coefficients = start(base, vectors, LAYER, 6)

    def loss(values):
        p = {n: wide[n] + np.tensordot(values[n], rows[n], 1) for n in rows}
        total = 0.0
        for task, x in BATCH.items():
            hidden = np.tanh(np.float64(x) @ p["z/w"] + p["z/b"])
            logits = np.tanh(hidden @ p["out"]) @ np.float64(HEADS[task])
            share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            total += -(share * np.log(share)).sum(-1).mean()
        return total

    values = {n: np.float64(x) for n, x in coefficients.items()}
    (found, entropies), slopes = slopes_of(LAYER)(coefficients, base, vectors, BATCH)
    assert found == pytest.approx(loss(values), rel=1e-5)
    np.testing.assert_allclose(found, sum(entropies.values()), rtol=1e-6)
    for name, k in (("z/w", 0), ("z/b", 1), ("out", 2)):
        shift = lambda h, n=name, k=k: {**values, n: values[n] + h * np.eye(3)[k]}
        expected = (loss(shift(1e-5)) - loss(shift(-1e-5))) / 2e-5
        assert slopes[name][k] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_clamp(base, vectors):
    raw = {"all": jnp.array([-0.2, 1.0, 1.3])}
    found = effective_coefficients(raw, vectors, "task", clamp=True)
    assert all(np.array_equal(row, [0.0, 1.0, 1.0]) for row in found.values())
    _, slopes = slopes_of(TASK)(raw, base, vectors, BATCH)
    # At a limit itself learning goes on, with the whole slope.
    free = AdaMergingConfig("task", clamp=False)
    _, unclamped = slopes_of(free)(
        {"all": jnp.array([0.0, 1.0, 1.0])}, base, vectors, BATCH
    )
    assert (slopes["all"][0], slopes["all"][2]) == (0, 0)
    np.testing.assert_allclose(slopes["all"][1], unclamped["all"][1], rtol=1e-5)
    assert slopes["all"][1] != 0
    assert clamped_share(raw | {"b": np.ones(3)}) == pytest.approx(2 / 6)


def test_bfloat16_vectors(base, vectors):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), vectors)
    coefficients = start(base, vectors, LAYER, 7)
    found = merge_with_coefficients(base, half, coefficients)
    chex.assert_trees_all_close(
        found, merge_with_coefficients(base, vectors, coefficients), atol=0.02
    )
    chex.assert_trees_all_equal_dtypes(found, base)
    # Also traced, as inside `jax.jit`.
    assert jax.eval_shape(ties_vectors, half)["out"].dtype == jnp.bfloat16


def test_errors_name_the_path(base, vectors):
    layers = start(base, vectors, LAYER)
    without = {n: x for n, x in layers.items() if n != "z/b"}
    with pytest.raises(
        ValueError, match=re.escape("none for ['z/b'], unknown groups []")
    ):
        merge_with_coefficients(base, vectors, without)
    with pytest.raises(ValueError, match=re.escape("unknown groups ['zz']")):
        merge_with_coefficients(base, vectors, layers | {"zz": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"unknown groups .*'all'"):
        merge_with_coefficients(base, vectors, start(base, vectors, TASK))
    two = {n: x[:2] for n, x in layers.items()}
    with pytest.raises(ValueError, match=r"must hold 3 numbers .* shapes \[\(2,\)\]"):
        merge_with_coefficients(base, vectors, two)
    with pytest.raises(ValueError, match=r"`vectors` must be like the base .* 'out'"):
        init_coefficients(base | {"out": jnp.ones((2, 2))}, vectors)
    with pytest.raises(ValueError, match="'out', where the base has nothing"):
        init_coefficients({"z": base["z"]}, vectors)
    # The annotation would stop it earlier, in tests alone.
    with pytest.raises(ValueError, match="`value` must be in"):
        AdaMergingConfig(value=1.5)
    assert AdaMergingConfig(value=1.5, clamp=False).value == 1.5


# --- Whether to trust the result -----------------------------------------------------


def test_collapse():
    even = np.eye(4)[np.arange(40) % 4]
    one = np.eye(4)[np.where(np.arange(40) < 38, 2, 1)]
    assert not collapsed(even)
    assert collapsed(one)
    assert not collapsed(one, limit=0.95)


# --- TIES vectors ---------------------------------------------------------------------


def test_ties_vectors_by_hand(vectors):
    found = ties_vectors(vectors)
    rows = {p: np.asarray(x) for p, x in named_leaves(vectors).items()}
    flat = np.concatenate([x.reshape(3, -1) for x in rows.values()], axis=1)
    kept = np.ceil(0.2 * flat.shape[1]).astype(int)  # of the whole vector
    limit = np.sort(np.abs(flat), axis=1)[:, -kept]
    trimmed = np.where(np.abs(flat) >= limit[:, None], flat, 0)
    agreeing = trimmed * np.sign(trimmed.sum(0)) > 0
    flat_found = np.concatenate(
        [np.asarray(named_leaves(found)[p]).reshape(3, -1) for p in rows], axis=1
    )
    np.testing.assert_array_equal(flat_found, np.where(agreeing, flat, 0))
    assert found["count"] is None


def test_ties_of_agreeing_vectors_is_nothing(vectors):
    positive = jax.tree.map(jnp.abs, vectors)
    chex.assert_trees_all_equal(ties_vectors(positive, density=1.0), positive)
    with pytest.raises(ValueError, match="`density` must be in"):
        ties_vectors(vectors, density=0.0)


# --- Fitting --------------------------------------------------------------------------


def batches(seed=0):
    rng = np.random.default_rng(seed)
    while True:
        yield {task: normal(rng, SIZE, 5) for task in CLASSES}


@pytest.fixture(scope="module")
def fitted(base, vectors):
    before = jax.tree.map(np.array, (base, vectors))
    seen = []
    found = fit(
        logits_fn,
        base,
        vectors,
        batches(),
        steps=40,
        optimizer=optax.adam(3e-2),
        on_step=lambda i, entropies: seen.append((i, float(entropies["b"]))),
    )
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, (base, vectors)))
    return found, seen


def test_entropy_falls(base, vectors, fitted):
    found, seen = fitted
    assert [i for i, _ in seen] == list(range(40))
    np.testing.assert_array_equal([value for _, value in seen], found.entropies["b"])
    assert {task: x.shape for task, x in found.entropies.items()} == dict.fromkeys(
        CLASSES, (40,)
    )
    total = sum(found.entropies.values())
    assert total[-5:].mean() < 0.9 * total[:5].mean()
    assert {name: x.shape for name, x in found.trajectory.items()} == dict.fromkeys(
        ("z/w", "z/b", "out"), (41, 3)
    )
    for path, row in found.effective.items():
        np.testing.assert_array_equal(found.trajectory[path][0], np.float32([0.3] * 3))
        np.testing.assert_array_equal(row, np.clip(found.trajectory[path][-1], 0, 1))
    assert np.std(list(found.effective.values()), axis=0).max() > 0.01


def test_saved_coefficients_restore_every_bit(base, vectors, fitted, tmp_path):
    found, _ = fitted
    np.savez(tmp_path / "coefficients.npz", **found.effective)
    with np.load(tmp_path / "coefficients.npz") as saved:
        again = merge_with_coefficients(base, vectors, dict(saved))
    chex.assert_trees_all_equal(again, found.params)


def test_labels_are_never_touched(base, vectors, fitted):
    """Labels that would poison everything change not one bit."""
    found = fit(
        lambda params, task, batch: logits_fn(params, task, batch["images"]),
        base,
        vectors,
        (
            {
                t: {"images": x, "labels": np.full(SIZE, np.nan)}
                for t, x in batch.items()
            }
            for batch in batches()
        ),
        steps=3,
        optimizer=optax.adam(3e-2),
    )
    expected = {name: x[:4] for name, x in fitted[0].trajectory.items()}
    chex.assert_trees_all_equal(found.trajectory, expected)


def test_a_loop_of_ones_own_does_the_same(base, vectors):
    """Plain gradient descent in `lax.scan`, on two of three tasks."""
    rows = [{t: b[t] for t in "ab"} for _, b in zip(range(3), batches(2))]
    found = fit(logits_fn, base, vectors, rows, TASK, steps=3, optimizer=optax.sgd(0.1))

    def descend(values, batch):
        slopes, _ = jax.grad(adamerging_loss, has_aux=True)(
            values, base, vectors, batch, logits_fn, TASK
        )
        values = jax.tree.map(lambda x, g: x - 0.1 * g, values, slopes)
        return values, values

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    initial = start(base, vectors, TASK)
    _, path = jax.jit(lambda v, b: jax.lax.scan(descend, v, b))(initial, stacked)
    np.testing.assert_allclose(found.trajectory["all"][1:], path["all"], rtol=1e-5)
    assert set(found.entropies) == {"a", "b"}


def test_a_more_certain_model_gets_more_weight():
    base = {"w": jnp.array([[0.5, -0.5], [-0.5, 0.5]])}
    vectors = {"w": base["w"][None] * 8}
    logits = lambda params, task, x: x @ params["w"]
    stream = ({"a": normal(np.random.default_rng(i), 8, 2)} for i in range(30))
    traced = []

    def counted(*args):
        traced.append(1)
        return logits(*args)

    found = fit(counted, base, vectors, stream, steps=30, optimizer=optax.adam(0.01))
    assert (np.diff(found.trajectory["w"][:, 0]) > 0).all()
    assert len(traced) == 1


def test_clamped_coefficients_stay_inside():
    # Certain at once: the coefficient would grow without end.
    base, vectors = {"w": jnp.eye(2)}, {"w": jnp.eye(2)[None]}
    logits = lambda params, task, x: x @ params["w"]
    stream = lambda: ({"a": normal(np.random.default_rng(i), 8, 2)} for i in range(20))
    run = functools.partial(fit, logits, base, vectors, optimizer=optax.adam(0.2))
    assert run(stream(), steps=20).effective["w"] == 1
    free = run(stream(), AdaMergingConfig(clamp=False), steps=20)
    assert free.effective["w"] > 1.5
    np.testing.assert_array_equal(free.effective["w"], free.trajectory["w"][-1])


def test_too_few_batches(base, vectors):
    with pytest.raises(ValueError, match="each of 3 steps, at least one, got 0"):
        fit(logits_fn, base, vectors, [], TASK, steps=3)
    with pytest.raises(ValueError, match="each of 0 steps, at least one, got 0"):
        fit(logits_fn, base, vectors, [BATCH], TASK, steps=0)
