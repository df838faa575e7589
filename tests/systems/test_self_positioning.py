"""Self Positioning: arcs by hand, gradients, the price of the scale, the diagnoses."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax import merging
from mtjax.losses import in_batch_contrastive_loss
from mtjax.merging.slerp import arc_chain, gramian
from mtjax.systems.self_positioning import (
    Pairs,
    SelfPositioningConfig,
    angles,
    coefficients_of,
    direction,
    fit,
    init_position,
    norm_growth,
    self_positioning_loss,
)

RULES = ("slerp-mean", "slerp-sum", "average")


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def tree(seed):
    rng = np.random.default_rng(seed)
    return {"w": normal(rng, 5, 6), "deep": {"b": normal(rng, 6)}}


def flat(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]).astype(float)


BASE = jax.tree.map(jnp.asarray, tree(0))
MODELS = [jax.tree.map(lambda x, y: x + y, BASE, tree(i)) for i in (1, 2, 3)]
VECTORS = merging.task_vectors(BASE, MODELS)
ROWS = np.stack([flat(model) - flat(BASE) for model in MODELS])
PRODUCTS = gramian(VECTORS)


def slerp(first, second, fraction):
    """The formula of the paper, in float64."""
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    angle = np.arccos(cosine)
    parts = np.sin((1 - fraction) * angle) * first + np.sin(fraction * angle) * second
    return parts / np.sin(angle)


def chained(rows, weights, rule):
    """Every arc on whole vectors, one after the other."""
    place = rows[0]
    for n in range(1, len(rows)):
        if rule == "average":
            continue
        before = np.mean(weights[:n]) if rule == "slerp-mean" else np.sum(weights[:n])
        place = slerp(place, rows[n], weights[n] / (before + weights[n]))
    return np.average(rows, 0, weights) if rule == "average" else place


def embed_fn(params, x):
    return jnp.tanh(x @ params["w"] + params["deep"]["b"][None])


def batch(seed, tasks="ab", size=4):
    """Pairs of two tasks, one with hard negatives and a candidate masked."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for task in tasks:
        queries = normal(rng, size, 5)
        positives = queries + 0.5 * normal(rng, size, 5)
        mask = np.ones((size, 2 * size), bool)
        mask[0, 1] = mask[1, 0] = False
        pairs[task] = Pairs(queries, positives, normal(rng, size, 5), mask)
    return pairs | {"a": Pairs(*pairs["a"][:2])} if "a" in tasks else pairs


@functools.cache
def loss_of(config):
    """The loss with its gradient, compiled once per configuration."""
    total = lambda *args: self_positioning_loss(*args, embed_fn, config)
    return jax.jit(jax.value_and_grad(total, has_aux=True))


# --- The place between the vectors ----------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_places_are_arcs_over_whole_vectors(rule):
    weights = np.array([0.7, 2.0, 1.1])
    found = direction(PRODUCTS, jnp.asarray(weights, jnp.float32), rule)
    expected = chained(ROWS, weights, rule)
    np.testing.assert_allclose(np.asarray(found) @ ROWS, expected, rtol=1e-4, atol=1e-5)
    again = direction(PRODUCTS, jnp.asarray(5 * weights, jnp.float32), rule)
    np.testing.assert_allclose(again, found, rtol=1e-5)  # ratios alone count


def test_the_angle_is_that_of_the_whole_vector_not_of_leaves():
    weights = jnp.array([1.0, 2.0])
    two = jax.tree.map(lambda x: x[:2], VECTORS)
    whole = direction(gramian(two), weights)
    leaf = direction(gramian(two["deep"]), weights)
    assert np.abs(np.asarray(whole) - np.asarray(leaf)).max() > 1e-3
    np.testing.assert_allclose(
        np.asarray(whole) @ ROWS[:2], slerp(*ROWS[:2], 2 / 3), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("rule", RULES)
def test_a_weight_that_vanishes_leaves_the_other_vector(rule):
    two = PRODUCTS[:2, :2]
    only = lambda *weights: direction(two, jnp.array(weights), rule)
    np.testing.assert_allclose(only(1.0, 1e-9), [1, 0], atol=1e-6)
    np.testing.assert_allclose(only(1e-9, 1.0), [0, 1], atol=1e-6)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_equal_norms_stay_and_the_angle_is_split(fraction):
    units = ROWS[:2] / np.linalg.norm(ROWS[:2], axis=1, keepdims=True)
    rows = jnp.asarray(3 * units, jnp.float32)
    weights = jnp.array([1 - fraction, fraction])
    place = np.asarray(direction(rows @ rows.T, weights) @ rows, float)
    assert np.linalg.norm(place) == pytest.approx(3, rel=1e-5)
    to = lambda unit: np.arccos(place @ unit / np.linalg.norm(place))
    between = np.arccos(units[0] @ units[1])
    assert to(units[0]) == pytest.approx(fraction * between, rel=1e-3)
    assert to(units[1]) == pytest.approx((1 - fraction) * between, rel=1e-3)


def test_half_way_between_orthogonal_unit_vectors():
    found = direction(jnp.eye(2), jnp.ones(2))
    np.testing.assert_allclose(found, [2**-0.5, 2**-0.5], rtol=1e-6)


@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 2.0], [2.0, 4.0]],
        [[1.0, 2.0], [1.0, 2.0]],
        [[1.0, 2.0], [-2.0, -4.0]],
        [[0.0, 0.0], [1.0, 3.0]],
        [[0.0, 0.0], [0.0, 0.0]],
    ],
)
def test_parallel_or_zero_vectors_give_a_line_and_finite_gradients(rows):
    rows = jnp.array(rows)

    @jax.jit
    def found(rows, weights):
        return direction(rows @ rows.T, weights)

    weights = jnp.array([1.0, 3.0])
    np.testing.assert_allclose(found(rows, weights), [0.25, 0.75], rtol=1e-6)
    by_rows, by_weights = jax.jacrev(found, (0, 1))(rows, weights)
    assert np.isfinite(by_rows).all()
    expected = np.array([[3, -1], [-3, 1]]) / 16  # of a_i / (a_1 + a_2)
    np.testing.assert_allclose(by_weights, expected, atol=1e-6)


def test_the_order_counts_and_the_first_are_diluted():
    weights = jnp.ones(3)
    forward = np.asarray(direction(PRODUCTS, weights))
    backward = np.asarray(direction(PRODUCTS[::-1, ::-1], weights))[::-1]
    assert np.abs(forward - backward).max() > 0.1
    for coefficients, order in ((forward, ROWS), (backward[::-1], ROWS[::-1])):
        np.testing.assert_allclose(
            coefficients @ order,
            chained(order, np.ones(3), "slerp-mean"),
            rtol=1e-4,
            atol=1e-5,
        )
    # Of vectors at right angles the last takes half of the way, others a quarter.
    square = np.square(direction(jnp.eye(3), weights))
    np.testing.assert_allclose(square, [0.25, 0.25, 0.5], rtol=1e-5)
    thirds = np.square(direction(jnp.eye(3), weights, "slerp-sum"))
    expected = np.sin(np.pi / 6) ** 2, np.cos(np.pi / 6) ** 2
    np.testing.assert_allclose(thirds[2], expected[0], rtol=1e-5)
    np.testing.assert_allclose(thirds[:2], [expected[1] / 2] * 2, rtol=1e-5)


def test_the_start_is_exactly_one():
    start = init_position(3)
    for read in (jax.nn.softplus, jax.jit(jax.nn.softplus)):
        assert (np.asarray(read(start["weights"])) == 1).all()
        assert float(read(start["scale"])) == 1
    other = init_position(2, weights=[1e-3, 200.0], scale=0.4)
    np.testing.assert_allclose(
        jax.nn.softplus(other["weights"]), [1e-3, 200.0], rtol=1e-5
    )
    assert float(jax.nn.softplus(other["scale"])) == pytest.approx(0.4, rel=1e-6)


def test_simple_positions():
    one = coefficients_of(init_position(1, scale=0.7), PRODUCTS[:1, :1], "slerp-mean")
    merged = merging.merge(BASE, jax.tree.map(lambda x: x[:1], VECTORS), one)
    np.testing.assert_allclose(
        flat(merged), flat(BASE) + 0.7 * ROWS[0], rtol=1e-5, atol=1e-5
    )
    two = coefficients_of(init_position(2), PRODUCTS[:2, :2], "slerp-mean")
    expected = merging.slerp(0.5, on="task_vectors").vector(BASE, MODELS[:2])
    np.testing.assert_allclose(
        np.asarray(two) @ ROWS[:2], flat(expected), rtol=1e-5, atol=1e-5
    )


def test_half_precision_vectors_are_multiplied_in_float32():
    rng = np.random.default_rng(7)
    # In bfloat16 a sum of so many squares would stop growing at 256.
    rows = jnp.asarray(1 + 0.1 * rng.normal(size=(2, 4_096)), jnp.bfloat16)
    exact = np.asarray(rows, np.float64)
    found = gramian({"w": rows, "none": None})
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact @ exact.T, rtol=1e-5)


# --- The loss -------------------------------------------------------------------------


def contrastive(params, pairs, temperature):
    """InfoNCE in float64, one query after the other."""
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    embed = lambda x: unit(np.tanh(np.float64(x) @ params["w"] + params["b"]))
    candidates = embed(pairs.positives)
    if pairs.negatives is not None:
        candidates = np.concatenate([candidates, embed(pairs.negatives)])
    losses = []
    for i, query in enumerate(embed(pairs.queries)):
        terms = np.exp(candidates @ query / temperature)
        counts = np.ones(len(terms), bool) if pairs.mask is None else pairs.mask[i]
        rivals = sum(terms[j] for j in np.flatnonzero(counts) if j != i)
        losses.append(-np.log(terms[i] / (terms[i] + rivals)))
    return np.mean(losses)


def value(weights, scale, config, pairs):
    place = flat(BASE) + scale * chained(ROWS, weights, config.rule)
    split = {"b": place[:6], "w": place[6:].reshape(5, 6)}
    losses = {t: contrastive(split, p, config.temperature) for t, p in pairs.items()}
    return np.mean([*losses.values()]) + config.mu * scale, losses


@pytest.mark.parametrize("rule", RULES)
def test_loss_and_gradient_against_numpy(rule):
    config = SelfPositioningConfig(rule, mu=0.3, temperature=0.2)
    weights, scale = np.array([0.6, 1.7, 1.0]), 0.8
    position = init_position(3, weights=[*weights], scale=scale)
    pairs = batch(3)
    arguments = (position, BASE, VECTORS, PRODUCTS, pairs)
    (total, losses), slopes = loss_of(config)(*arguments)
    expected, parts = value(weights, scale, config, pairs)
    assert float(total) == pytest.approx(expected, rel=1e-4)
    for task, part in parts.items():
        assert float(losses[task]) == pytest.approx(part, rel=1e-4)
    # Finite differences in a and lambda, and the derivative of the softplus.
    h = 1e-5
    of = lambda w, s: value(w, s, config, pairs)[0]
    for i, shift in enumerate(h * np.eye(3)):
        slope = (of(weights + shift, scale) - of(weights - shift, scale)) / (2 * h)
        slope *= 1 - np.exp(-weights[i])
        assert float(slopes["weights"][i]) == pytest.approx(slope, rel=2e-3, abs=2e-5)
    slope = (of(weights, scale + h) - of(weights, scale - h)) / (2 * h)
    slope *= 1 - np.exp(-scale)
    assert float(slopes["scale"]) == pytest.approx(slope, rel=2e-3)


def test_tasks_count_the_same_whatever_their_number_of_pairs():
    pairs = {"a": batch(1)["a"], "b": batch(2, size=9)["b"]}
    config = SelfPositioningConfig(mu=0.0, temperature=0.2)
    of = jax.jit(
        lambda pairs: self_positioning_loss(
            init_position(3), BASE, VECTORS, PRODUCTS, pairs, embed_fn, config
        )
    )
    total, losses = of(pairs)
    alone = {task: of({task: p})[0] for task, p in pairs.items()}
    # No negative comes from the other task.
    chex.assert_trees_all_close(losses, alone, rtol=1e-6)
    assert float(total) == pytest.approx(np.mean([*alone.values()]), rel=1e-6)


def test_masked_candidates_are_no_negatives():
    pairs = batch(4)["b"]
    embedded = [np.asarray(embed_fn(BASE, x)) for x in pairs[:3]]
    embedded = [jnp.asarray(x) for x in embedded]
    mask = np.ones((4, 8), bool)
    mask[:, 2] = mask[:, 6] = False
    mask[2, 3] = True
    moved = [embedded[0], embedded[1], embedded[2].at[2].set(9.0)]
    losses = [
        float(in_batch_contrastive_loss(*x, mask=jnp.asarray(mask), temperature=0.2))
        for x in (embedded, moved)
    ]
    assert losses[0] == losses[1]
    assert losses[0] < float(in_batch_contrastive_loss(*embedded, temperature=0.2))


# --- The search -----------------------------------------------------------------------


def search(mu=0.0, steps=60, vectors=VECTORS, rule="slerp-mean", rate=0.05, **more):
    return fit(
        embed_fn,
        BASE,
        vectors,
        itertools.cycle([batch(11, size=8), batch(12, size=8)]),
        SelfPositioningConfig(rule, mu, temperature=0.2),
        steps=steps,
        optimizer=optax.adam(rate),
        **more,
    )


@pytest.fixture(scope="module")
def found():
    before = jax.tree.map(np.array, (BASE, VECTORS))
    seen = []
    result = search(on_step=lambda i, losses: seen.append((i, float(losses["a"]))))
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, (BASE, VECTORS)))
    return result, seen


def test_search_lowers_the_loss_of_the_probe(found):
    found, seen = found
    np.testing.assert_array_equal(np.arange(60), [i for i, _ in seen])
    np.testing.assert_array_equal(found.losses["a"], [x for _, x in seen])
    total = found.losses["a"] + found.losses["b"]
    assert total[-2:].mean() < total[:2].mean() - 0.05


def test_what_is_found_is_where_the_way_ends(found):
    found, _ = found
    shapes = {name: x.shape for name, x in found.trajectory.items()}
    assert shapes == {"weights": (61, 3), "scale": (61,), "coefficients": (61, 3)}
    assert (found.trajectory["weights"][0] == 1).all()
    assert found.trajectory["scale"][0] == 1
    assert (found.trajectory["weights"] > 0).all()
    np.testing.assert_array_equal(found.weights, found.trajectory["weights"][-1])
    np.testing.assert_array_equal(
        found.coefficients, found.trajectory["coefficients"][-1]
    )
    place = found.scale * chained(ROWS, found.weights.astype(float), "slerp-mean")
    np.testing.assert_allclose(found.coefficients @ ROWS, place, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(flat(found.params), flat(BASE) + place, atol=1e-4)
    chex.assert_trees_all_equal_shapes_and_dtypes(found.params, BASE)


def test_a_higher_price_never_gives_a_larger_scale():
    """At the end of the descent, with one vector: the scale is all that there is."""
    one, products = jax.tree.map(lambda x: x[:1], VECTORS), PRODUCTS[:1, :1]
    pairs = {"a": batch(11, size=8)["a"]}

    @jax.jit
    @jax.vmap
    def descend(mu):
        def loss(position):
            config = SelfPositioningConfig(mu=0.0, temperature=0.2)
            value, _ = self_positioning_loss(
                position, BASE, one, products, pairs, embed_fn, config
            )
            return value + mu * jax.nn.softplus(position["scale"])

        def step(position, _):
            slopes = jax.grad(loss)(position)
            return jax.tree.map(lambda x, g: x - 0.5 * g, position, slopes), None

        position, _ = jax.lax.scan(step, init_position(1), length=400)
        return jax.nn.softplus(position["scale"]), optax.tree.norm(
            jax.grad(loss)(position)
        )

    scales, slopes = descend(jnp.array([0.0, 0.02, 0.05, 0.1]))
    assert slopes.max() < 1e-3
    assert (np.diff(scales) < 0).all()


def test_a_useless_vector_loses_its_weight():
    """One small vector goes downhill, the other neither up nor down."""
    pairs = {"a": batch(1, size=8)["a"]}
    still = jax.tree.map(jnp.zeros_like, jax.tree.map(lambda x: x[:1], VECTORS))

    def loss(position, params, vectors, rule):
        config = SelfPositioningConfig(rule, 0.0, temperature=0.2)
        return self_positioning_loss(
            position, params, vectors, gramian(vectors), pairs, embed_fn, config
        )[0]

    at = jax.jit(jax.grad(lambda p: loss(init_position(1), p, still, "average")))
    downhill = -flat(at(BASE))
    along = np.random.default_rng(9).normal(size=downhill.size)
    along -= along @ downhill / (downhill @ downhill) * downhill
    rows = np.stack([x / np.linalg.norm(x) for x in (downhill, along)]) * 0.01
    vectors = {"deep": {"b": rows[:, :6]}, "w": rows[:, 6:].reshape(2, 5, 6)}
    vectors = jax.tree.map(jnp.float32, vectors)
    slopes = jax.jit(jax.grad(loss), static_argnums=3)
    for rule in RULES:
        slope = slopes(init_position(2), BASE, vectors, rule)["weights"]
        assert slope[0] < 0 < slope[1]
        # Ratios alone count: what one gains the other loses.
        np.testing.assert_allclose(slope[0], -slope[1], rtol=1e-3)


def test_the_start_can_be_chosen():
    start = init_position(3, weights=[1.0, 2.0, 3.0], scale=0.5)
    found = search(steps=1, start=start, rule="average")
    np.testing.assert_allclose(found.trajectory["weights"][0], [1, 2, 3], rtol=1e-6)
    assert found.trajectory["scale"][0] == pytest.approx(0.5, rel=1e-6)


# --- Diagnoses ------------------------------------------------------------------------


def test_growth_of_norms():
    amounts = [100, 200, 400, 800]
    rng = np.random.default_rng(5)
    rows = normal(rng, 4, 30)
    norms = np.linalg.norm(rows.astype(float), axis=1)
    found = norm_growth({"w": jnp.asarray(rows[:, :10]), "v": rows[:, 10:]}, amounts)
    slope, intercept = np.polyfit(amounts, norms, 1)
    fitted = slope * np.array(amounts) + intercept
    explained = 1 - np.sum((norms - fitted) ** 2) / np.sum((norms - norms.mean()) ** 2)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-6)
    assert found.slope == pytest.approx(slope, rel=1e-4)
    assert found.intercept == pytest.approx(intercept, rel=1e-5)
    assert found.r_squared == pytest.approx(explained, rel=1e-4)


def test_angles():
    found = angles(VECTORS)
    for i, j in itertools.combinations(range(3), 2):
        cosine = ROWS[i] @ ROWS[j] / np.linalg.norm(ROWS[i]) / np.linalg.norm(ROWS[j])
        expected = np.degrees(np.arccos(cosine))
        np.testing.assert_allclose([found[i, j], found[j, i]], expected, rtol=1e-4)
    assert (np.diagonal(found) == 0).all()
    zero = angles({"w": jnp.array([[0.0, 0.0], [1.0, 0.0]])})
    np.testing.assert_allclose(zero, [[0, 90], [90, 0]])


def test_a_joint_vector_leans_to_the_task_with_more_data():
    """Least squares on two tasks at once, of which one has eight times the rows."""
    rng = np.random.default_rng(6)
    inputs, targets = normal(rng, 90, 4), normal(rng, 2, 4)
    labels = np.concatenate([inputs[:80] @ targets[0], inputs[80:] @ targets[1]])
    solve = lambda rows: np.linalg.lstsq(inputs[rows], labels[rows])[0]
    large, small, joint = solve(slice(80)), solve(slice(80, 90)), solve(slice(90))
    found = angles({"w": jnp.asarray(np.stack([large, small, joint]), jnp.float32)})
    assert found[2, 0] < found[2, 1]


# --- Errors ---------------------------------------------------------------------------


def test_errors():
    with pytest.raises(ValueError, match=r"`rule` must be one of .* got 'linear'"):
        SelfPositioningConfig.__init__.__wrapped__(
            object.__new__(SelfPositioningConfig), rule="linear"
        )
    with pytest.raises(ValueError, match=r"`mu` must be at least 0, got -0\.1"):
        SelfPositioningConfig(mu=-0.1)
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        SelfPositioningConfig(temperature=0.0)
    with pytest.raises(ValueError, match=r"each of 2 models, got \[1\.0, 0\.0\] and 1"):
        init_position(2, weights=[1.0, 0.0])
    with pytest.raises(ValueError, match="`weights` and `scale` must be positive"):
        init_position(2, scale=0.0)
    with pytest.raises(ValueError, match="one weight for each of 3 models"):
        init_position(3, weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="three vectors, got 2 for 3"):
        norm_growth(VECTORS, [1, 2])
    with pytest.raises(ValueError, match="`rule` must be 'mean' or 'sum', got 'max'"):
        arc_chain.__wrapped__(jnp.eye(2), jnp.ones(2), "max")
    with pytest.raises(ValueError, match="each of 3 steps, at least one, got 1"):
        fit(embed_fn, BASE, VECTORS, [batch(1)], steps=3)
