"""Which task vectors to build on, the first-order model, and disentanglement."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax import merging
from mtjax.merging.bases import feature_scores, random_vectors, select, sensitivities
from mtjax.merging.disentanglement import disentanglement_error
from mtjax.merging.linearised import linearised

RNG = np.random.default_rng(0)
SHAPES = {"w": (4, 3), "b": (3,)}


def drawn(*leading):
    draw = lambda shape: jnp.asarray(RNG.normal(size=(*leading, *shape)), jnp.float32)
    return {name: draw(shape) for name, shape in SHAPES.items()}


BASE = drawn() | {"count": jnp.array(2)}
VECTORS = drawn(5) | {"count": None}
X = RNG.normal(size=(9, 4)).astype(np.float32)


def model(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


# --- Selection ------------------------------------------------------------------------


@pytest.mark.parametrize("blockwise", [True, False])
def test_the_whole_budget_is_the_identity(blockwise):
    scores = {name: RNG.normal(size=5) for name in SHAPES}
    found = select(VECTORS, scores, 5, blockwise=blockwise)
    chex.assert_trees_all_equal(found, VECTORS)
    chex.assert_trees_all_equal(select(VECTORS, RNG.normal(size=5), 5), VECTORS)


def test_blocks_choose_for_themselves():
    scores = {"w": np.array([5, 0, 4, 1, 2.0]), "b": np.array([0, 7, 1, 6, 2.0])}
    found = select(VECTORS, scores, 2)
    np.testing.assert_array_equal(found["w"], VECTORS["w"][np.array([0, 2])])
    np.testing.assert_array_equal(found["b"], VECTORS["b"][np.array([1, 3])])
    assert found["count"] is None
    # Sums: 5, 7, 5, 7, 4.
    whole = select(VECTORS, scores, 2, blockwise=False)
    chosen = np.array([1, 3])
    expected = {n: VECTORS[n][chosen] for n in SHAPES} | {"count": None}
    chex.assert_trees_all_equal(whole, expected)
    given = select(VECTORS, np.array([0, 9, 1, 8, 2.0]), 2)
    chex.assert_trees_all_equal(given, expected)


def test_sensitivities_are_mean_inner_products():
    objective = lambda params, batch: jnp.mean(model(params, batch) ** 2)
    batches = [X, 2 * X]
    found = sensitivities(objective, BASE, VECTORS, batches)
    floats = {name: BASE[name] for name in SHAPES}
    slopes = [jax.grad(objective)(floats, batch) for batch in batches]
    assert set(found) == set(SHAPES)
    for name, rows in found.items():
        mean = np.mean([np.float64(s[name]) for s in slopes], axis=0)
        products = np.tensordot(np.float64(VECTORS[name]), mean, mean.ndim)
        np.testing.assert_allclose(rows, np.abs(products), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        sensitivities(objective, BASE, VECTORS, [])


def test_the_nearest_features_score_best():
    at = lambda center: RNG.normal(size=(50, 2)) * 0.01 + np.array(center)
    known = {"far": at([9, 0]), "near": at([1, 0]), "a": at([0, 3])}
    # In the order of the names: a, far, near.
    np.testing.assert_allclose(
        feature_scores(at([0, 0]), known), [-3, -9, -1], atol=0.02
    )


@pytest.mark.parametrize("budget", [0, 6])
def test_a_budget_out_of_range(budget):
    with pytest.raises(ValueError, match=f"`budget` must be in 1 to 5, got {budget}"):
        select(VECTORS, np.arange(5.0), budget)


def test_random_vectors_have_the_moments_of_the_base(key):
    wide = {
        "w": 3 + 2 * jax.random.normal(key, (100, 80)),
        "scale": jnp.ones(7),
        "count": jnp.array(1),
    }
    found = random_vectors(wide, 4, key=key)
    assert found["w"].shape == (4, 100, 80)
    np.testing.assert_allclose(found["w"].mean((1, 2)), 3, atol=0.1)
    np.testing.assert_allclose(found["w"].std((1, 2)), 2, atol=0.1)
    rows = np.reshape(found["w"], (4, -1))
    assert np.abs(np.corrcoef(rows) - np.eye(4)).max() < 0.06
    np.testing.assert_array_equal(found["scale"], np.ones((4, 7)))
    assert found["count"] is None
    merging.merge(wide, found, 0.1)


# --- The first-order model ------------------------------------------------------------


def test_first_order_is_a_finite_difference():
    first_order = linearised(model, BASE)
    np.testing.assert_allclose(first_order(BASE, X), model(BASE, X), rtol=1e-6)
    step = {name: VECTORS[name][0] for name in SHAPES}
    near = BASE | {name: BASE[name] + step[name] for name in SHAPES}
    found = np.asarray(first_order(near, X) - model(BASE, X))
    wide = {name: np.float64(BASE[name]) for name in SHAPES}

    def at(h):
        p = {name: wide[name] + h * np.float64(step[name]) for name in SHAPES}
        return np.tanh(np.float64(X) @ p["w"] + p["b"])

    expected = (at(1e-5) - at(-1e-5)) / 2e-5
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_first_order_is_exact_for_a_linear_model():
    linear = lambda params, x: x @ params["w"] + params["b"][None]
    moved = merging.merge(BASE, VECTORS, jnp.arange(5.0))
    np.testing.assert_allclose(
        linearised(linear, BASE)(moved, X), linear(moved, X), rtol=1e-4, atol=1e-4
    )


def test_first_order_changes_add_up():
    first_order = jax.jit(linearised(model, BASE))
    change = lambda c: first_order(merging.merge(BASE, VECTORS, c), X) - model(BASE, X)
    rows = [change(3.0 * row) for row in jnp.eye(5)[:2]]
    both = change(jnp.array([3.0, 3.0, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(both, rows[0] + rows[1], rtol=1e-4, atol=1e-4)
    # The model itself is far from that.
    exact = lambda c: model(merging.merge(BASE, VECTORS, c), X) - model(BASE, X)
    apart = exact(3.0 * jnp.eye(5)[0]) + exact(3.0 * jnp.eye(5)[1])
    together = exact(jnp.array([3.0, 3.0, 0.0, 0.0, 0.0]))
    assert np.abs(apart - together).max() > 0.5


# --- Disentanglement ------------------------------------------------------------------


def test_disentanglement_error():
    logits_fn = lambda params, task, x: x @ params[task]
    turned = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    own = {"a": jnp.eye(2), "b": jnp.eye(2)}
    inputs = {"a": jnp.eye(2), "b": jnp.array([[1.0, 0.0]] * 3 + [[1.0, 1.0]])}
    alone = {"a": own, "b": own}
    assert disentanglement_error(logits_fn, alone, own, inputs) == 0
    # All of a turn round; of b three in four, the last is a tie.
    both = {"a": turned, "b": turned}
    found = disentanglement_error(logits_fn, alone, both, inputs)
    assert found == pytest.approx((1 + 0.75) / 2)
    with pytest.raises(ValueError, match="`inputs` must be of the tasks of `alone`"):
        disentanglement_error(logits_fn, {"a": own}, both, inputs)
