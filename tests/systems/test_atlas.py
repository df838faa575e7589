"""aTLAS: exact composition and gradients, partitions, penalty, what `fit` finds."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax import merging
from mtjax.merging.match import named_leaves
from mtjax.systems.atlas import (
    AtlasConfig,
    addition_judge,
    atlas_loss,
    atlas_optimizer,
    compose,
    cross_entropies,
    fit,
    negation_judge,
    partition,
    zero_coefficients,
)

TASKS = ("a", "b", "c")
LAYER, ISOTROPIC, PARTS = AtlasConfig(), AtlasConfig("task"), AtlasConfig(partitions=3)
WEIGHTS = AtlasConfig(weights_only=True)
SHAPES = {"z/w": (5, 6), "z/b": (6,), "out": (6, 4)}


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def tree(rng):
    return {
        "z": {"w": normal(rng, 5, 6), "b": normal(rng, 6)},
        "out": normal(rng, 6, 4),
    }


@pytest.fixture(scope="module")
def base():
    return jax.tree.map(jnp.asarray, tree(np.random.default_rng(0))) | {
        "count": jnp.array(3)
    }


@pytest.fixture(scope="module")
def models(base):
    floats = {name: base[name] for name in ("z", "out")}
    changed = lambda i: jax.tree.map(jnp.add, floats, tree(np.random.default_rng(i)))
    return {t: changed(i + 1) | {"count": jnp.array(9)} for i, t in enumerate(TASKS)}


@pytest.fixture(scope="module")
def vectors(base, models):
    return merging.task_vectors(base, models)


def logits_fn(params, task, x):
    shift = TASKS.index(task)
    hidden = jnp.tanh(x @ params["z"]["w"] + params["z"]["b"][None])
    return jnp.roll(hidden @ params["out"], shift, axis=1)


def batch_of(seed, size=8, tasks=TASKS):
    rng = np.random.default_rng(seed)
    part = lambda: {
        "inputs": normal(rng, size, 5),
        "labels": rng.integers(4, size=size).astype(np.int32),
    }
    return {task: part() for task in tasks}


objective = cross_entropies(logits_fn)


@functools.cache
def slopes_of(config):
    loss = lambda c, *args: atlas_loss(c, *args, objective, config)
    return jax.jit(jax.value_and_grad(loss))


def drawn(base, vectors, config, seed=4):
    rng = np.random.default_rng(seed)
    start = zero_coefficients(base, vectors, config)
    return {g: jnp.asarray(normal(rng, *x.shape)) for g, x in start.items()}


# --- Composition ----------------------------------------------------------------------


@pytest.mark.parametrize("config", [LAYER, ISOTROPIC, PARTS, WEIGHTS])
def test_zero_is_the_base_bit_by_bit(base, vectors, config):
    start = zero_coefficients(base, vectors, config)
    chex.assert_trees_all_equal(compose(base, vectors, start, config), base)


@pytest.mark.parametrize("config", [LAYER, ISOTROPIC, PARTS])
def test_equal_coefficients_are_task_arithmetic(base, models, vectors, config):
    start = zero_coefficients(base, vectors, config)
    equal = {group: jnp.full_like(x, 0.4) for group, x in start.items()}
    expected = merging.task_arithmetic(0.4)(base, models)
    found = compose(base, vectors, equal, config)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_dtypes(found, base)


@pytest.mark.parametrize("config", [LAYER, ISOTROPIC, PARTS])
def test_one_row_of_ones_is_a_fine_tuned_model(base, models, vectors, config):
    start = zero_coefficients(base, vectors, config)
    for i, task in enumerate(TASKS):
        row = {group: x.at[i].set(1.0) for group, x in start.items()}
        found = compose(base, vectors, row, config)
        expected = models[task] | {"count": base["count"]}
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "number"),
    [
        (LAYER, 3 * 3),
        (ISOTROPIC, 3),
        (PARTS, 3 * 3 * 3),
        (WEIGHTS, 3 * 2),
        (AtlasConfig(lambda path: path.split("/")[0], 2), 3 * 2 * 2),
    ],
)
def test_number_of_trainable_coefficients(base, vectors, config, number):
    start = zero_coefficients(base, vectors, config)
    assert sum(x.size for x in start.values()) == number


def test_every_element_follows_the_formula(base, vectors):
    coefficients = drawn(base, vectors, PARTS)
    found = named_leaves(compose(base, vectors, coefficients, PARTS))
    for path, rows in named_leaves(vectors).items():
        parts = np.asarray(partition(path, rows.shape[1:], PARTS))
        expected = np.float64(named_leaves(base)[path])
        for i in range(3):
            for k in range(3):
                factor = np.float64(coefficients[path][i, k])
                expected = expected + factor * (parts == k) * np.float64(rows[i])
        np.testing.assert_allclose(found[path], expected, rtol=1e-5, atol=1e-5)


def test_parts_cover_every_element_once():
    parts = np.asarray(partition("w", (40, 50), AtlasConfig(partitions=5)))
    masks = [parts == k for k in range(5)]
    np.testing.assert_array_equal(np.sum(masks, axis=0), np.ones((40, 50)))
    # Each has a fifth of 2000 elements; 5 standard deviations are 90.
    assert all(abs(mask.sum() - 400) < 90 for mask in masks)
    again = np.asarray(partition("w", (40, 50), AtlasConfig(partitions=5)))
    np.testing.assert_array_equal(parts, again)
    for path, seed in (("v", 0), ("w", 1)):
        config = AtlasConfig(partitions=5, seed=seed)
        other = np.asarray(partition(path, (40, 50), config))
        assert np.mean(parts == other) < 0.3


def test_parts_with_equal_coefficients_are_the_plain_block(base, vectors):
    plain = drawn(base, vectors, LAYER)
    equal = {path: jnp.tile(x[:, None], (1, 3)) for path, x in plain.items()}
    chex.assert_trees_all_close(
        compose(base, vectors, equal, PARTS),
        compose(base, vectors, plain, LAYER),
        rtol=1e-5,
        atol=1e-5,
    )
    coarse, slopes = slopes_of(LAYER)(plain, base, vectors, batch_of(0))
    fine, parts = slopes_of(PARTS)(equal, base, vectors, batch_of(0))
    assert fine == pytest.approx(float(coarse), rel=1e-5)
    for path, slope in slopes.items():
        np.testing.assert_allclose(parts[path].sum(1), slope, rtol=1e-4, atol=1e-5)


def test_frozen_leaves_stay(base, vectors):
    found = compose(base, vectors, drawn(base, vectors, LAYER), LAYER)
    assert found["count"] == 3
    coefficients = drawn(base, vectors, WEIGHTS)
    assert set(coefficients) == {"z/w", "out"}
    found = compose(base, vectors, coefficients, WEIGHTS)
    np.testing.assert_array_equal(found["z"]["b"], base["z"]["b"])
    assert np.abs(found["z"]["w"] - base["z"]["w"]).min() > 0
    # Sparse vectors, as of adapters: what they do not touch has no coefficient.
    sparse = vectors | {"out": None}
    coefficients = drawn(base, sparse, PARTS)
    assert set(coefficients) == {"z/w", "z/b"}
    found = compose(base, sparse, coefficients, PARTS)
    np.testing.assert_array_equal(found["out"], base["out"])


@pytest.mark.parametrize("config", [LAYER, PARTS])
def test_the_gradient_is_an_inner_product(base, vectors, config):
    coefficients = drawn(base, vectors, config, 5)
    batch = batch_of(1)
    _, slopes = slopes_of(config)(coefficients, base, vectors, batch)
    merged = compose(base, vectors, coefficients, config)
    floats = {name: merged[name] for name in ("z", "out")}
    gradient = named_leaves(jax.jit(jax.grad(objective))(floats, batch))
    for path, rows in named_leaves(vectors).items():
        products = np.float64(gradient[path])[None] * np.float64(rows)
        if config is LAYER:
            expected = products.reshape(3, -1).sum(1)
        else:
            parts = np.asarray(partition(path, rows.shape[1:], config))
            expected = np.stack([products[:, parts == k].sum(1) for k in range(3)], 1)
        np.testing.assert_allclose(slopes[path], expected, rtol=1e-3, atol=1e-4)


def test_half_precision_vectors_have_float32_slopes(base, models, vectors):
    half = merging.task_vectors(base, models, dtype=jnp.bfloat16)
    start = zero_coefficients(base, half)
    _, slopes = slopes_of(LAYER)(start, base, half, batch_of(2))
    _, exact = slopes_of(LAYER)(start, base, vectors, batch_of(2))
    chex.assert_trees_all_equal_dtypes(slopes, start)
    assert all(x.dtype == jnp.float32 for x in start.values())
    for path, slope in slopes.items():
        scale = np.abs(exact[path]).max()
        np.testing.assert_allclose(slope, exact[path], atol=0.02 * scale)


@pytest.mark.parametrize("config", [LAYER, PARTS])
def test_no_copy_of_all_scaled_vectors(config):
    base = {"w": jnp.ones((100, 100))}
    vectors = {"w": jnp.ones((30, 100, 100))}
    objective = lambda params, x: jnp.sum(params["w"] * x)
    loss = lambda c, *args: atlas_loss(c, *args, objective, config)
    x, start = jnp.ones((100, 100)), zero_coefficients(base, vectors, config)
    program = jax.jit(loss).lower(start, base, vectors, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < vectors["w"].nbytes / 2


# --- Objectives and penalty -----------------------------------------------------------


def cross_entropy(params, task, part):
    wide = {p: np.float64(x) for p, x in named_leaves(params).items()}
    hidden = np.tanh(np.float64(part["inputs"]) @ wide["z/w"] + wide["z/b"])
    logits = np.roll(hidden @ wide["out"], TASKS.index(task), axis=1)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_p[np.arange(len(logits)), part["labels"]].mean()


def test_objectives_against_numpy(base):
    batch = batch_of(3)
    losses = {task: cross_entropy(base, task, part) for task, part in batch.items()}
    found = objective(base, batch)
    assert found == pytest.approx(sum(losses.values()), rel=1e-5)
    forget = cross_entropies(logits_fn, ["b"])(base, batch)
    expected = losses["a"] - losses["b"] + losses["c"]
    assert forget == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
def test_penalty(base, vectors, order):
    config = AtlasConfig(penalty=0.5, order=order)
    coefficients = drawn(base, vectors, config, 6)
    rows = [np.float64(x) for x in coefficients.values()]
    norms = [(np.abs(x) ** order).sum() ** (1 / order) for x in rows]
    found, slopes = slopes_of(config)(coefficients, base, vectors, batch_of(4))
    plain, without = slopes_of(LAYER)(coefficients, base, vectors, batch_of(4))
    assert found - plain == pytest.approx(0.5 * np.mean(norms), rel=1e-4)
    for path, x, norm in zip(coefficients, rows, norms):
        own = np.sign(x) * (np.abs(x) / norm) ** (order - 1) * 0.5 / 3
        np.testing.assert_allclose(slopes[path] - without[path], own, atol=1e-4)
    # At the start, where norms have no slope, learning is not held back.
    start = zero_coefficients(base, vectors, config)
    _, slopes = slopes_of(config)(start, base, vectors, batch_of(4))
    _, without = slopes_of(LAYER)(start, base, vectors, batch_of(4))
    chex.assert_trees_all_close(slopes, without, rtol=1e-5)


# --- Learning -------------------------------------------------------------------------


def test_fit_learns_and_keeps_its_path(base, vectors):
    batch = batch_of(7, 32)
    found = fit(
        objective,
        base,
        vectors,
        [batch] * 40,
        steps=40,
        optimizer=atlas_optimizer(0.05),
    )
    assert found.losses.shape == (40,)
    assert found.losses[0] == pytest.approx(float(objective(base, batch)), rel=1e-5)
    assert found.losses[-1] < 0.8 * found.losses[0]
    assert found.step == 40
    assert found.scores == {}
    for path, x in found.trajectory.items():
        assert x.shape == (41, 3)
        np.testing.assert_array_equal(x[0], np.zeros(3))
        np.testing.assert_array_equal(found.coefficients[path], x[-1])
    # The same outside of `jit` up to rounding.
    expected = compose(base, vectors, found.coefficients)
    chex.assert_trees_all_close(found.params, expected, rtol=1e-6, atol=1e-6)
    assert found.params["count"] == 3


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_a_loop_of_ones_own_does_the_same(base, vectors, rho):
    rows = [batch_of(i) for i in range(3)]
    config = AtlasConfig("task", rho=rho)
    found = fit(
        objective, base, vectors, rows, config, steps=3, optimizer=optax.sgd(0.1)
    )
    values = zero_coefficients(base, vectors, config)
    slopes = lambda x, batch: slopes_of(config)(x, base, vectors, batch)[1]["all"]
    for batch in rows:
        g = slopes(values, batch)
        worst = values["all"] + rho * g / jnp.linalg.norm(g)
        values = {"all": values["all"] - 0.1 * slopes({"all": worst}, batch)}
    np.testing.assert_allclose(
        found.coefficients["all"], values["all"], rtol=1e-4, atol=1e-6
    )


def test_weight_decay_pulls_to_the_base_and_gradients_are_clipped():
    values = {"w": jnp.array([2.0, -1.0])}
    tx = atlas_optimizer(0.01)
    zero = jax.tree.map(jnp.zeros_like, values)
    updates, _ = tx.update(zero, tx.init(values), values)
    np.testing.assert_allclose(updates["w"], -0.01 * 0.1 * values["w"], rtol=1e-6)
    # Adam's second moment of a clipped gradient is that of norm 1.
    _, state = tx.update({"w": jnp.array([300.0, 400.0])}, tx.init(values), values)
    moments = optax.tree.get(state, "nu")["w"]
    np.testing.assert_allclose(moments, 1e-3 * np.array([0.36, 0.64]), rtol=1e-4)


def judged(answers, steps=6, every=2):
    """A fit whose judge answers from a list; and how far it had gone when asked."""
    base, vectors = {"w": jnp.zeros(2)}, {"w": jnp.ones((1, 2))}
    seen, told = [], iter(answers)

    def judge(params):
        seen.append(float(params["w"][0]))
        return next(told)

    found = fit(
        lambda params, batch: -jnp.sum(params["w"]) * batch,
        base,
        vectors,
        [0.5] * steps,
        steps=steps,
        optimizer=optax.sgd(1.0),
        judge=judge,
        every=every,
    )
    return found, seen


def test_the_judge_takes_the_last_of_the_best():
    found, seen = judged([1.0, 3.0, 3.0, 2.0])
    assert seen == [0.0, 2.0, 4.0, 6.0]
    assert found.scores == {0: 1.0, 2: 3.0, 4: 3.0, 6: 2.0}
    assert found.step == 4
    assert found.coefficients["w"] == 4.0
    np.testing.assert_array_equal(found.params["w"], [4.0, 4.0])
    np.testing.assert_array_equal(found.trajectory["w"][:, 0], np.arange(7.0))


def test_the_judge_stops_before_what_it_refuses():
    found, seen = judged([1.0, 2.0, None, 9.0])
    assert found.step == 2
    assert found.scores == {0: 1.0, 2: 2.0}
    assert seen == [0.0, 2.0, 4.0]
    found, _ = judged([None])
    np.testing.assert_array_equal(found.params["w"], [0.0, 0.0])
    found, seen = judged([1.0, 2.0, 3.0], steps=3)
    assert seen == [0.0, 2.0, 3.0]  # the last step too


def test_judges():
    table = {"base": {"a": 0.8, "b": 0.5}, "x": {"a": 0.2, "b": 0.48}}
    table["y"] = {"a": 0.1, "b": 0.47}
    accuracy = lambda params, task: table[params["name"]][task]
    of = lambda name: {"name": name}
    judge = negation_judge(accuracy, of("base"), "a", ["b"])
    assert judge(of("base")) == -0.8
    assert judge(of("x")) == -0.2
    assert judge(of("y")) is None  # 0.47 < 0.95 * 0.5
    score = addition_judge(accuracy, {"a": 0.4, "b": 0.96})
    assert score(of("x")) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def separate():
    """Two tasks that need one matrix each; vectors that each improve one of them."""
    rng = np.random.default_rng(3)
    eye = np.eye(4, dtype=np.float32)
    base = {"a": jnp.asarray(0.5 * eye), "b": jnp.asarray(0.5 * eye)}
    models = {t: base | {t: jnp.asarray(3 * eye)} for t in "ab"}
    logits = lambda params, task, x: x @ params[task]
    x = normal(rng, 64, 4)
    noisy = (x + 0.3 * normal(rng, 64, 4)).argmax(1).astype(np.int32)
    batch = {task: {"inputs": x, "labels": noisy} for task in "ab"}
    accuracy = lambda p, t: float(np.mean((x @ p[t]).argmax(1) == noisy))
    return base, merging.task_vectors(base, models), logits, batch, accuracy


def test_negation_forgets_the_target_and_keeps_the_control(separate):
    base, vectors, logits, batch, accuracy = separate
    found = fit(
        cross_entropies(logits, ["a"]),
        base,
        vectors,
        [batch] * 60,
        steps=60,
        optimizer=atlas_optimizer(0.05),
        judge=negation_judge(accuracy, base, "a", ["b"]),
        every=5,
    )
    assert accuracy(base, "a") > 0.8
    assert accuracy(found.params, "a") < 0.1
    assert accuracy(found.params, "b") >= 0.95 * accuracy(base, "b")
    # Only the block of the target turns, and only by its own vector.
    assert found.coefficients["a"][0] < -0.1
    assert abs(found.coefficients["a"][1]) < 1e-6


def test_blocks_are_scaled_apart_where_one_scale_cannot_do(separate):
    """One vector that improves one block and spoils the other."""
    base, vectors, logits, batch, _ = separate
    mixed = {"a": vectors["a"][:1], "b": -vectors["b"][1:]}
    run = functools.partial(
        fit,
        cross_entropies(logits),
        base,
        mixed,
        [batch] * 60,
        steps=60,
        optimizer=atlas_optimizer(0.05),
    )
    apart, one = run(), run(ISOTROPIC)
    assert apart.coefficients["a"][0] > 0.5
    assert apart.coefficients["b"][0] < -0.5
    assert apart.losses[-1] < 0.9 * one.losses[-1]


# --- Errors ---------------------------------------------------------------------------


def test_errors_name_the_argument(base, vectors):
    for name, value in {"partitions": 0, "penalty": -1.0, "order": 0.5}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be at least"):
            AtlasConfig(**{name: value})
    with pytest.raises(ValueError, match="`coefficients` must hold 3 numbers"):
        compose(base, vectors, {"all": jnp.zeros(3)})
    with pytest.raises(ValueError, match="`batches` must yield one batch for each of"):
        fit(objective, base, vectors, [], steps=3)
