"""Concrete Subspace: rescaled masks, exact merges, the two levels of a meta step."""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from scipy.special import expit, logit

from mtjax import merging
from mtjax.losses import entropy_loss
from mtjax.merging.coefficients import init_coefficients, merge_with_coefficients
from mtjax.merging.match import named_leaves
from mtjax.systems import adamerging
from mtjax.systems.adamerging import AdaMergingConfig
from mtjax.systems.concrete_subspace import (
    ConcreteConfig,
    draw_mask,
    fit_mask,
    init_state,
    masked_merge,
    masked_vectors,
    meta_step,
    rescaled,
)

CLASSES = {"a": 2, "b": 3, "c": 4}  # by task
SIZE = 8  # of a batch
FLOATS = ("z/w", "z/b", "out")


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def tree(seed):
    """Leaves of a flat order (`z`, `out`) that differs from that of their names."""
    rng = np.random.default_rng(seed)
    z = {"w": jnp.asarray(normal(rng, 5, 6)), "b": jnp.asarray(normal(rng, 6))}
    return {"z": z, "out": jnp.asarray(normal(rng, 6, 4))}


BASE = tree(0) | {"count": jnp.array(3)}
MODELS = {
    task: jax.tree.map(jnp.add, {name: BASE[name] for name in ("z", "out")}, tree(i))
    | {"count": jnp.array(9)}
    for i, task in enumerate(CLASSES, 1)
}
VECTORS = merging.task_vectors(BASE, MODELS)
HEADS = {
    t: normal(np.random.default_rng(i + 9), 4, c)
    for i, (t, c) in enumerate(CLASSES.items())
}


def logits_fn(params, task, x):
    hidden = jnp.tanh(x @ params["z"]["w"] + params["z"]["b"][None])
    return jnp.tanh(hidden @ params["out"]) @ HEADS[task]


def batches(seed=0):
    rng = np.random.default_rng(seed)
    while True:
        yield {task: normal(rng, SIZE, 5) for task in CLASSES}


def pair(seed):
    stream = batches(seed)
    return next(stream), next(stream)


# Plain descent, with rates in the state: one program for all of them.
descent = optax.inject_hyperparams(optax.sgd)
TASK = ConcreteConfig(AdaMergingConfig("task"), descent(0.1), descent(1.0))
ADAM = ConcreteConfig(inner=optax.adam(0.1), outer=optax.adam(1e-2))
FILTERED = replace(ADAM, where="w")
ARITHMETIC = ConcreteConfig(inner=None, outer=optax.adam(5e-2))


@functools.cache
def compiled(config, logits_fn=logits_fn):
    return jax.jit(
        lambda state, pair: meta_step(state, BASE, VECTORS, pair, logits_fn, config)
    )


def start(config, seed=0, logits=None):
    """The first state, or one with logits that differ."""
    state = init_state(BASE, VECTORS, config, key=jax.random.key(seed))
    if logits is None:
        return state
    rng = np.random.default_rng(logits)
    drawn = jax.tree.map(lambda x: jnp.asarray(normal(rng, *x.shape)), state.logits)
    return state._replace(logits=drawn)


OPEN = jax.tree.map(lambda x: x + 40, start(ARITHMETIC).logits)
SOME = start(ARITHMETIC, logits=1).logits
KEY = jax.random.key(5)


SMALL = {"w": jnp.asarray(normal(np.random.default_rng(0), 3, 2)), "b": jnp.zeros(2)}
CHANGES = jax.tree.map(lambda x: jnp.stack([0.5 + x, 1 - x]), SMALL)


def small_logits(params, task, x):
    return x @ params["w"] + params["b"][None]


def small_start(config, seed=1):
    state = init_state(SMALL, CHANGES, config, key=jax.random.key(seed))
    return state._replace(logits=jax.tree.map(lambda x: x + 0.2, state.logits))


def small_batches(seed=5):
    rng = np.random.default_rng(seed)
    while True:
        yield {"a": normal(rng, SIZE, 3)}


@functools.cache
def small_step(config):
    step = lambda state, batches: meta_step(
        state, SMALL, CHANGES, batches, small_logits, config
    )
    return jax.jit(step)


def small_pair(seed):
    stream = small_batches(seed)
    return next(stream), next(stream)


# --- Masks ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["expected", "sample", "hard"])
def test_rescaled_masks_have_a_mean_of_1(kind):
    mask = draw_mask(SOME, kind=kind, key=KEY)
    for path, m in named_leaves(mask).items():
        assert np.float64(m).sum() == pytest.approx(m.size, rel=1e-6), path
        assert m.min() >= 0
        assert m.std() > 0.1
    assert {path: m.shape for path, m in named_leaves(mask).items()} == {
        path: x.shape for path, x in named_leaves(BASE).items() if path in FLOATS
    }


def test_kinds_by_hand():
    plain = replace(ARITHMETIC, rescale=False)
    expected = draw_mask(SOME, plain)
    sample = draw_mask(SOME, plain, "sample", key=KEY)
    hard = draw_mask(SOME, plain, "hard", key=KEY)
    for path, x in named_leaves(SOME).items():
        of = lambda mask, path=path: np.asarray(named_leaves(mask)[path])
        np.testing.assert_allclose(of(expected), expit(np.float64(x)), rtol=1e-5)
        np.testing.assert_array_equal(of(hard), of(sample) > 0.5)
    scaled = draw_mask(SOME, kind="sample", key=KEY)
    by_hand = jax.tree.map(lambda m: m / np.float64(m).mean(), sample)
    chex.assert_trees_all_close(scaled, by_hand, rtol=1e-5)
    # Every array has its own draws, also where shapes are the same.
    twins = {"a": jnp.zeros(50), "b": jnp.zeros(50)}
    drawn = draw_mask(twins, kind="sample", key=KEY)
    assert abs(np.corrcoef(drawn["a"], drawn["b"])[0, 1]) < 0.5


def test_a_leaf_that_is_closed_stays_0():
    closed = {"w": jnp.full(9, -40.0), "v": jnp.zeros(9)}
    mask = draw_mask(closed, kind="hard", key=KEY)
    assert not mask["w"].any()
    slopes = jax.grad(lambda x: jnp.sum(draw_mask(x)["w"] ** 2))(closed)
    assert jnp.isfinite(slopes["w"]).all()
    chex.assert_trees_all_equal(rescaled({"w": jnp.zeros(3)}), {"w": jnp.zeros(3)})


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_the_gradient_of_a_rescaled_mask_includes_the_mean(temperature):
    config = ConcreteConfig(temperature=temperature)
    x = {"w": jnp.asarray(normal(np.random.default_rng(3), 4, 3))}
    of = lambda x: draw_mask(x, config, "sample", key=KEY)["w"]
    # Row j, column i: the slope of mask j in logit i.
    found = np.float64(jax.jacobian(of)(x)["w"]).reshape(12, 12)
    np.testing.assert_allclose(found.sum(0), 0, atol=1e-5)
    m = np.float64(
        draw_mask(x, replace(config, rescale=False), "sample", key=KEY)["w"]
    ).ravel()
    slope, mean = m * (1 - m) / temperature, m.mean()
    by_hand = np.diag(slope) / mean - np.outer(m, slope) / (12 * mean**2)
    np.testing.assert_allclose(found, by_hand, rtol=1e-3, atol=1e-5)
    assert np.abs(np.diag(slope) / mean - found).max() > 0.01


def test_the_same_mask_wherever_it_is_drawn():
    draw = lambda key: draw_mask(SOME, kind="sample", key=key)
    mask = draw(KEY)
    chex.assert_trees_all_close(jax.jit(draw)(KEY), mask, rtol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec
    )
    def on_all(key, batch):
        # Replicas see other batches and the same key.
        return jax.tree.map(lambda m: m[None] + 0 * batch.sum(), draw(key))

    for path, rows in named_leaves(on_all(KEY, jnp.arange(16.0))).items():
        assert len(rows) == 8
        np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1], rows.shape))
        np.testing.assert_allclose(rows[0], named_leaves(mask)[path], rtol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="`kind` must be 'expected', 'sample' or"):
        draw_mask.__wrapped__(SOME, kind="continuous")
    with pytest.raises(ValueError, match="`key` must be given for a mask of kind"):
        draw_mask(SOME, kind="hard")
    with pytest.raises(ValueError, match=r"`where` must choose .* 'head'; paths look"):
        start(ConcreteConfig(where="head"))
    with pytest.raises(ValueError, match="`temperature` must be positive, got -1"):
        draw_mask(SOME, ConcreteConfig(temperature=-1.0), "sample", key=KEY)
    with pytest.raises(ValueError, match=r"`vectors` must be like the base .* 'out'"):
        init_state(BASE | {"out": jnp.ones((2, 2))}, VECTORS, key=KEY)


# --- Merging under a mask -------------------------------------------------------------


def test_all_tasks_share_the_mask():
    mask = draw_mask(SOME, kind="sample", key=KEY)
    found, rows = named_leaves(masked_vectors(VECTORS, mask)), named_leaves(VECTORS)
    assert set(found) == set(FLOATS)
    for path, m in named_leaves(mask).items():
        ratio = np.asarray(found[path]) / np.asarray(rows[path])
        np.testing.assert_allclose(ratio, np.stack([m, m, m]), rtol=1e-5)
    # What is left of one task by itself.
    alone = merging.merge(BASE, masked_vectors(VECTORS, mask), jnp.eye(3)[1])
    by_hand = {
        p: named_leaves(BASE)[p] + named_leaves(mask)[p] * rows[p][1] for p in rows
    }
    for path, value in by_hand.items():
        np.testing.assert_allclose(named_leaves(alone)[path], value, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_the_merged_model(granularity):
    config = replace(TASK, merging=AdaMergingConfig(granularity))
    rng = np.random.default_rng(2)
    names = init_coefficients(BASE, VECTORS, granularity)
    # Some of them outside of [0, 1], where they are clamped.
    rows = {n: rng.uniform(-0.5, 1.5, 3).astype(np.float32) for n in names}
    mask = draw_mask(SOME, kind="hard", key=KEY)
    found = masked_merge(BASE, VECTORS, mask, rows, config)
    for path, m in named_leaves(mask).items():
        weights = np.clip(np.float64(rows.get(path, rows.get("all"))), 0, 1)
        change = np.tensordot(weights, np.float64(named_leaves(VECTORS)[path]), 1)
        value = np.float64(named_leaves(BASE)[path]) + np.float64(m) * change
        np.testing.assert_allclose(
            named_leaves(found)[path], value, rtol=1e-5, atol=1e-6
        )
    assert found["count"] == 3
    chex.assert_trees_all_equal_dtypes(found, BASE)
    # The same as merging what is masked.
    again = merge_with_coefficients(
        BASE, masked_vectors(VECTORS, mask), rows, granularity, clamp=True
    )
    chex.assert_trees_all_close(found, again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["expected", "sample", "hard"])
def test_an_open_mask_is_task_arithmetic(kind):
    mask = draw_mask(OPEN, kind=kind, key=KEY)
    for m in jax.tree.leaves(mask):
        np.testing.assert_allclose(m, 1, rtol=1e-6)
    rows = init_coefficients(BASE, VECTORS, "layer", 0.3)
    found = masked_merge(BASE, VECTORS, mask, rows)
    expected = merging.task_arithmetic(0.3)(BASE, MODELS)
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [-3.0, 0.0, 2.0])
def test_a_constant_mask_is_no_mask(value):
    logits = jax.tree.map(lambda x: jnp.full_like(x, value), SOME)
    for m in jax.tree.leaves(draw_mask(logits)):
        np.testing.assert_allclose(m, 1, rtol=1e-6)


def test_one_model_alone_comes_back():
    vectors = merging.task_vectors(BASE, {"b": MODELS["b"]})
    found = masked_merge(
        BASE, vectors, draw_mask(OPEN), {p: jnp.ones(1) for p in FLOATS}
    )
    chex.assert_trees_all_close(
        found, MODELS["b"] | {"count": BASE["count"]}, rtol=1e-6, atol=1e-6
    )


def test_leaves_without_a_mask_are_merged_whole():
    config = replace(ADAM, where="z/w|out")
    state = start(config)
    assert set(named_leaves(state.logits)) == {"z/w", "out"}
    mask = draw_mask(state.logits, config, "sample", key=KEY)
    rows = init_coefficients(BASE, VECTORS, "layer", 0.3)
    found = masked_merge(BASE, VECTORS, mask, rows, config)
    whole = merging.task_arithmetic(0.3)(BASE, MODELS)
    np.testing.assert_allclose(found["z"]["b"], whole["z"]["b"], rtol=1e-6)
    assert np.abs(found["out"] - whole["out"]).max() > 0.01
    untouched = masked_vectors(VECTORS, mask)["z"]["b"]
    np.testing.assert_array_equal(untouched, VECTORS["z"]["b"])


def test_bfloat16_vectors():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), VECTORS)
    mask = draw_mask(SOME)
    rows = init_coefficients(BASE, VECTORS, "layer", 0.3)
    found = masked_merge(BASE, half, mask, rows)
    chex.assert_trees_all_close(
        found, masked_merge(BASE, VECTORS, mask, rows), atol=0.02
    )
    chex.assert_trees_all_equal_dtypes(found, BASE)
    assert masked_vectors(half, mask)["out"].dtype == jnp.bfloat16


# --- The two levels -------------------------------------------------------------------


def loss_in_numpy(logits, coefficients, noise, batch, temperature=0.5):
    """Sum of entropies of the model merged under a rescaled sample, in float64."""
    p = {}
    for path, x in logits.items():
        m = expit((x + noise[path]) / temperature)
        rows = np.float64(named_leaves(VECTORS)[path])
        change = np.tensordot(coefficients, rows, 1)
        p[path] = np.float64(named_leaves(BASE)[path]) + m / m.mean() * change
    total = 0.0
    for task, x in batch.items():
        hidden = np.tanh(np.float64(x) @ p["z/w"] + p["z/b"])
        z = np.tanh(hidden @ p["out"]) @ np.float64(HEADS[task])
        share = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        total -= (share * np.log(share)).sum(-1).mean()
    return total


def slope(f, x, index, h=1e-5):
    shift = np.zeros_like(x)
    shift[index] = h
    return (f(x + shift) - f(x - shift)) / (2 * h)


def test_both_steps_against_numpy():
    """Plain gradient descent on both levels, with one sample of the mask."""
    state, (first, second) = start(TASK, logits=4), pair(3)
    found, report = compiled(TASK)(state, (first, second))
    x = {path: np.float64(v) for path, v in named_leaves(state.logits).items()}
    drawn = draw_mask(
        state.logits,
        replace(TASK, rescale=False),
        "sample",
        key=jax.random.fold_in(state.key, 0),
    )
    noise = {
        p: 0.5 * logit(np.float64(m)) - x[p] for p, m in named_leaves(drawn).items()
    }

    def adapted(logits):
        f = lambda rows: loss_in_numpy(logits, rows, noise, first)
        rows = np.full(3, 0.3)
        return rows - 0.1 * np.array([slope(f, rows, k) for k in range(3)])

    rows = adapted(x)
    np.testing.assert_allclose(found.coefficients["all"], rows, rtol=1e-4)
    assert np.abs(rows - 0.3).max() > 0.01

    total = sum(report["entropies"].values())
    assert total == pytest.approx(loss_in_numpy(x, rows, noise, second), rel=1e-5)

    def slopes_at(path, index):
        """First-order slope of one logit, and the whole one."""
        shifted = lambda v: {**x, path: v}
        first_order = lambda v: loss_in_numpy(shifted(v), rows, noise, second)
        whole = lambda v: loss_in_numpy(shifted(v), adapted(shifted(v)), noise, second)
        return slope(first_order, x[path], index), slope(whole, x[path], index, 1e-4)

    gaps = []
    for path, index in (
        ("z/w", (1, 2)),
        ("z/b", (3,)),
        ("out", (0, 1)),
        ("out", (5, 3)),
    ):
        moved = x[path][index] - named_leaves(found.logits)[path][index]
        by_hand, whole = slopes_at(path, index)
        assert moved == pytest.approx(by_hand, rel=5e-3, abs=2e-5)
        gaps.append(abs(whole - by_hand))
    # Second-order terms are there to be seen, and are left out.
    assert max(gaps) > 1e-3


def with_rate(opt_state, rate):
    return opt_state._replace(hyperparams={"learning_rate": jnp.float32(rate)})


def test_an_open_mask_takes_the_step_of_adamerging():
    state = start(TASK)._replace(logits=OPEN)
    found, _ = compiled(TASK)(state, pair(8))
    rows = init_coefficients(BASE, VECTORS)
    loss = lambda rows: adamerging.adamerging_loss(
        rows, BASE, VECTORS, pair(8)[0], logits_fn, TASK.merging
    )[0]
    slopes = jax.jit(jax.grad(loss))(rows)
    expected = jax.tree.map(lambda x, g: x - 0.1 * g, rows, slopes)
    chex.assert_trees_all_close(found.coefficients, expected, atol=1e-6)


def test_inner_and_outer_steps_leave_each_other_alone():
    state, step = small_start(TASK), small_step(TASK)
    found, _ = step(state, small_pair(1))
    unmoved, _ = step(state._replace(outer=with_rate(state.outer, 0)), small_pair(1))
    chex.assert_trees_all_equal(unmoved.logits, state.logits)
    chex.assert_trees_all_equal(unmoved.coefficients, found.coefficients)
    chex.assert_trees_all_equal(unmoved.inner, found.inner)
    for path, x in named_leaves(found.logits).items():
        assert np.abs(x - named_leaves(state.logits)[path]).max() > 1e-3
    # Without an inner step the logits move from the coefficients as they start.
    none, _ = step(state._replace(inner=with_rate(state.inner, 0)), small_pair(1))
    bare = replace(TASK, inner=None)
    free, report = small_step(bare)(small_start(bare), small_pair(1))
    chex.assert_trees_all_close(free.logits, none.logits, rtol=1e-5, atol=1e-7)
    assert (free.coefficients["all"] == np.float32(0.3)).all()
    assert (free.inner, report["clamped"]) == ((), 0)
    assert np.abs(found.logits["w"] - free.logits["w"]).max() > 1e-4


def test_every_step_starts_anew():
    one, _ = small_step(ADAM)(small_start(ADAM), small_pair(1))
    two, report = small_step(ADAM)(one, small_pair(2))
    first, second = (
        np.concatenate([*state.coefficients.values()]) - 0.3 for state in (one, two)
    )
    # Adam's first step is its rate, whatever the slope, and no later one longer by far.
    np.testing.assert_allclose(np.abs(first), 0.1, rtol=1e-3)
    assert np.abs(second).max() < 0.11
    assert report["clamped"] == 0
    # With plain descent nothing but the logits and the key tells steps apart.
    one, _ = small_step(TASK)(small_start(TASK), small_pair(1))
    two, _ = small_step(TASK)(one, small_pair(2))
    fresh = small_start(TASK)._replace(logits=one.logits, step=one.step)
    again, _ = small_step(TASK)(fresh, small_pair(2))
    chex.assert_trees_all_equal(two.coefficients, again.coefficients)
    other, _ = small_step(TASK)(fresh._replace(step=jnp.int32(0)), small_pair(2))
    assert np.abs(other.coefficients["all"] - two.coefficients["all"]).max() > 1e-4


def test_resampling_and_no_sampling():
    step = lambda config: small_step(config)(small_start(TASK), small_pair(4))[0]
    once = step(TASK)
    fresh = step(replace(TASK, resample=True))
    gap = lambda a, b: np.abs(a["w"] - b["w"]).max()
    assert gap(once.logits, fresh.logits) > 1e-4
    # Without samples keys do not matter.
    expected = replace(TASK, sampling=False)
    by_key = [
        small_step(expected)(small_start(TASK, seed), small_pair(4))[0]
        for seed in (0, 1)
    ]
    chex.assert_trees_all_equal(by_key[0].logits, by_key[1].logits)
    assert gap(by_key[0].logits, once.logits) > 1e-4


def test_one_device_and_eight_take_the_same_step():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda tree, *axes: jax.device_put(
        tree, NamedSharding(mesh, PartitionSpec(*axes))
    )
    state = small_start(TASK)
    expected, report = small_step(TASK)(state, small_pair(5))
    found, shared = small_step(TASK)(place(state), place(small_pair(5), "data"))
    chex.assert_trees_all_close(found.logits, expected.logits, atol=1e-5)
    chex.assert_trees_all_close(found.coefficients, expected.coefficients, atol=1e-5)
    chex.assert_trees_all_close(shared, report, rtol=1e-5)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(found.logits))


# --- Fitting --------------------------------------------------------------------------


def test_entropy_falls_under_a_learnt_mask():
    before = jax.tree.map(np.array, (BASE, VECTORS))
    rng, seen = np.random.default_rng(0), []
    endless = ({t: normal(rng, 32, 5) for t in CLASSES} for _ in iter(int, 1))
    state, reports = fit_mask(
        *(logits_fn, BASE, VECTORS, endless, start(ARITHMETIC), ARITHMETIC),
        steps=120,
        on_step=lambda i, report: seen.append((i, report["entropies"]["b"])),
    )
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, (BASE, VECTORS)))
    assert [i for i, _ in seen] == list(range(120))
    assert state.step == 120
    np.testing.assert_array_equal([x for _, x in seen], reports["entropies"]["b"])
    total = sum(reports["entropies"].values())
    assert total[-10:].mean() < 0.9 * total[:10].mean()
    assert (total.shape, reports["clamped"].sum()) == ((120,), 0)
    # On inputs that were not learnt from, without samples.
    unseen = next(endless)
    rows = init_coefficients(BASE, VECTORS, "layer", 0.3)

    def entropy(mask):
        params = masked_merge(BASE, VECTORS, mask, rows)
        return sum(entropy_loss(logits_fn(params, t, x)) for t, x in unseen.items())

    learnt = draw_mask(state.logits)
    shuffled = jax.tree.map(lambda m: jax.random.permutation(KEY, m.ravel()), learnt)
    shuffled = jax.tree.map(lambda m, x: m.reshape(x.shape), shuffled, learnt)
    assert entropy(learnt) < entropy(draw_mask(OPEN)) - 0.05
    assert entropy(learnt) < entropy(shuffled) - 0.05


def small_fit(stream, state, config, steps, logits_fn=small_logits):
    return fit_mask(logits_fn, SMALL, CHANGES, stream, state, config, steps=steps)


def test_batches_that_are_taken():
    taken = []

    def counted(most):
        for i, batch in zip(range(most), small_batches()):
            taken.append(i)
            yield batch

    small_fit(counted(9), small_start(ARITHMETIC), ARITHMETIC, 3)
    assert taken == [0, 1, 2]
    with pytest.raises(ValueError, match="for each of 3 steps, at least one, got 2"):
        small_fit(counted(5), small_start(ADAM), ADAM, 3)
    assert taken == [0, 1, 2, 0, 1, 2, 3, 4]


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    """Typed key, both optimizers and `None` leaves pass through orbax."""
    whole, reports = small_fit(small_batches(), small_start(FILTERED), FILTERED, 5)
    assert set(named_leaves(whole.logits)) == {"w"}
    stream = small_batches()
    half, _ = small_fit(stream, small_start(FILTERED), FILTERED, 2)
    ocp.save(tmp_path / "state", half)
    restored = ocp.load(tmp_path / "state", small_start(FILTERED))
    chex.assert_trees_all_equal(restored, half)
    assert (type(restored), int(restored.step)) == (type(half), 2)
    found, rest = small_fit(stream, restored, FILTERED, 3)
    chex.assert_trees_all_equal(found, whole)
    np.testing.assert_array_equal(rest["entropies"]["a"], reports["entropies"]["a"][2:])


def test_labels_are_never_touched():
    """Labels that would poison everything change not one bit."""
    plain, _ = small_fit(small_batches(), small_start(ADAM), ADAM, 3)
    poisoned, _ = small_fit(
        (
            {"a": {"x": b["a"], "labels": np.full(SIZE, np.nan)}}
            for b in small_batches()
        ),
        *(small_start(ADAM), ADAM, 3),
        logits_fn=lambda params, task, batch: small_logits(params, task, batch["x"]),
    )
    chex.assert_trees_all_equal(poisoned, plain)


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_adamerging_under_an_open_mask_is_adamerging(granularity):
    opened = jax.tree.map(lambda x: x + 40, small_start(ADAM).logits)
    mask = draw_mask(opened, kind="sample", key=KEY)
    config, tx = AdaMergingConfig(granularity), optax.adam(1e-2)
    fit = lambda vectors: adamerging.fit(
        *(small_logits, SMALL, vectors, small_batches(), config), steps=5, optimizer=tx
    )
    masked, plain = fit(masked_vectors(CHANGES, mask)), fit(CHANGES)
    chex.assert_trees_all_close(masked.trajectory, plain.trajectory, atol=1e-6)
    chex.assert_trees_all_close(masked.params, plain.params, rtol=1e-6, atol=1e-6)
    start, end = plain.trajectory.popitem()[1][[0, -1]]
    assert np.abs(end - start).max() > 0.01
