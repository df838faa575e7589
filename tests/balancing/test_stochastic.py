"""MoCo, MoDo and SDMGrad: weights on the simplex from noisy gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.balancing import cross, simplex
from tests.balancing import matrices, model, references

EVERYONE = jnp.ones(4, bool)
project = jax.jit(simplex.project)


def projected(values):
    """The nearest point of the simplex, by bisection on the level it is cut at."""
    gaps, low, high = values - values.max(), -1.0, 0.0
    for _ in range(60):
        level = (low + high) / 2
        too_low = np.maximum(gaps - level, 0.0).sum() > 1.0
        low, high = (level, high) if too_low else (low, level)
    return np.maximum(gaps - high, 0.0)


def batches(count, size=4, noise=0.3):
    """Noisy copies of one matrix of unit gradients, in float64."""
    rng = np.random.default_rng(3)
    grads = rng.standard_normal((size, 6)) / 2.5
    noisy = grads + noise * rng.standard_normal((count, size, 6))
    return noisy.astype(np.float32).astype(np.float64)


def stacked(draws):
    return [
        mtjax.TaskGradients.from_stacked(g) for g in jnp.asarray(draws, jnp.float32)
    ]


def run(tx, draws):
    """Updates and states of steps on tuples of a batch and its further batches."""

    @jax.jit
    def update(state, draw):
        first, *others = stacked(draw)
        return tx.update(first, state, resampled=others)

    state, results = tx.init(jnp.zeros(6)), []
    for draw in draws:
        updates, state = update(state, draw.astype(np.float32))
        results.append((np.asarray(updates), state))
    return results


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e6, 1e30])
def test_projection_is_the_nearest_point(scale):
    for seed in range(5):
        values = np.random.default_rng(seed).standard_normal(4) * scale
        values = values.astype(np.float32).astype(np.float64)
        found = project(jnp.asarray(values, jnp.float32), EVERYONE)
        np.testing.assert_allclose(found, projected(values), atol=2e-6)


def test_projection_and_shares_look_at_those_present_alone():
    present = jnp.array([True, False, True, False])
    values = jnp.array([0.3, np.nan, 0.1, 1e30])
    found = project(values, present)
    np.testing.assert_allclose(found, [0.6, 0.0, 0.4, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(project(values, jnp.zeros(4, bool)), 0.0)
    weights = jnp.array([0.1, 0.4, 0.3, 0.2])
    np.testing.assert_allclose(
        simplex.shares(weights, present), [0.25, 0.0, 0.75, 0.0], rtol=1e-6
    )
    nothing = jnp.array([0.0, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(simplex.shares(nothing, present), [0.5, 0, 0.5, 0])
    after = simplex.redistribute(weights, found, present)
    np.testing.assert_allclose(after, [0.24, 0.4, 0.16, 0.2], rtol=1e-6)
    kept = simplex.redistribute(weights, found * jnp.nan, present)
    np.testing.assert_array_equal(kept, weights)


def test_products_of_two_batches_are_those_of_the_shared_parameters():
    params = model.params()

    @jax.jit
    def products(one, two, weights):
        left, right = (model.grad_fn(params, b)[1] for b in (one, two))
        return (
            cross.cross_gramian(left, right),
            cross.cross_product(left, right, weights),
            left.stack()["trunk"],
            right.stack()["trunk"],
        )

    weights = np.array([0.2, -1.0, 0.7], np.float32)
    matrix, product, *trunks = products(
        model.batch(seed=1), model.batch(seed=2), weights
    )
    left, right = (
        np.hstack([np.reshape(x, (3, -1)) for x in jax.tree.leaves(t)]).astype(float)
        for t in trunks
    )
    np.testing.assert_allclose(matrix, left @ right.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(product, left @ right.T @ weights, rtol=1e-4, atol=1e-5)
    assert np.abs(matrix - matrix.T).max() > 0.01


def test_products_of_many_tasks_are_batched(monkeypatch):
    one, two = stacked(batches(2))
    unrolled = cross.cross_gramian(one, two)
    monkeypatch.setattr(cross, "unroll_pullbacks", lambda num_tasks: False)
    np.testing.assert_allclose(cross.cross_gramian(one, two), unrolled, rtol=1e-6)


def test_moco_follows_the_paper():
    tx = mtjax.moco(4, beta=0.6, beta_sigma=0.4, gamma=0.3, gamma_sigma=0.2, rho=0.1)
    draws = batches(5)
    tracked, weights = np.zeros((4, 6)), np.full(4, 0.25)
    for k, (updates, state) in enumerate(run(tx, draws[:, None]), 1):
        tracked -= 0.6 / k**0.4 * (tracked - draws[k - 1])
        slope = (tracked @ tracked.T + 0.1 * np.eye(4)) @ weights
        weights = projected(weights - 0.3 / k**0.2 * slope)
        np.testing.assert_allclose(state.tracked, tracked, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.weights, weights, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(updates, weights @ tracked, rtol=1e-4, atol=1e-6)
        assert int(state.step) == k


def test_moco_with_beta_one_tracks_the_batch_itself():
    draws = batches(3)
    results = run(mtjax.moco(4, beta=1.0, beta_sigma=0.0), draws[:, None])
    for draw, (_, state) in zip(draws, results, strict=True):
        np.testing.assert_allclose(state.tracked, draw, rtol=1e-6, atol=1e-7)


def test_moco_leaves_heads_to_the_batch():
    params, batch, tx = model.params(), model.batch(), mtjax.moco(3)
    _, grads = model.grad_fn(params, batch)
    updates, state = model.update(tx, params, tx.init(params), batch)
    own = grads.combine()["heads"]
    for name in model.NAMES:
        np.testing.assert_allclose(updates["heads"][name], own[name], rtol=1e-5)
        np.testing.assert_array_equal(state.tracked["heads"][name], 0.0)


@pytest.mark.parametrize("further", [1, 2])
def test_modo_follows_the_paper(further):
    draws = batches(5 * (1 + further)).reshape(5, 1 + further, 4, 6)
    results = run(mtjax.modo(4, gamma=0.2, rho=0.1), draws)
    weights = np.full(4, 0.25)
    for draw, (updates, state) in zip(draws, results, strict=True):
        first, second = (draw[1], draw[2]) if further == 2 else (draw[1], draw[0])
        weights = projected(
            weights - 0.2 * (first @ second.T @ weights + 0.1 * weights)
        )
        np.testing.assert_allclose(state.weights, weights, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(updates, weights @ draw[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "tx",
    [
        mtjax.moco(4, gamma=0.5, gamma_sigma=0.0),
        mtjax.modo(4, gamma=0.5, rho=0.0),
        mtjax.sdmgrad(4, regularization=0.0, learning_rate=0.1),
    ],
    ids=["moco", "modo", "sdmgrad"],
)
def test_without_noise_the_direction_of_mgda_is_found(tx):
    (grads,) = batches(1, noise=0.0)
    updates, state = run(tx, np.broadcast_to(grads, (200, 3, 4, 6)))[-1]
    np.testing.assert_allclose(updates, references.shortest_in_hull(grads), atol=1e-3)
    assert float(jnp.sum(state.weights)) == pytest.approx(1.0, abs=1e-5)


def test_sdmgrad_follows_its_public_code():
    draws = batches(12).reshape(4, 3, 4, 6)
    results = run(mtjax.sdmgrad(4), draws)
    weights = np.full(4, 0.25)
    for (grads, one, two), (updates, state) in zip(draws, results, strict=True):
        matrix = one @ two.T
        scale = np.mean(np.sqrt(np.maximum(np.diag(matrix), 0)))
        matrix = matrix / scale**2
        velocity = np.zeros(4)
        for _ in range(20):
            velocity = 0.5 * velocity + matrix @ weights + 0.3 * matrix.mean(axis=1)
            weights = projected(weights - 5.0 * velocity)
        expected = (weights @ grads + 0.3 * grads.mean(axis=0)) / 1.3
        np.testing.assert_allclose(state.weights, weights, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-4)


def test_sdmgrad_with_much_regularization_gives_the_mean():
    (draw,) = batches(3).reshape(1, 3, 4, 6)
    ((updates, _),) = run(mtjax.sdmgrad(4, regularization=1e6), [draw])
    np.testing.assert_allclose(updates, draw[0].mean(axis=0), rtol=1e-4, atol=1e-5)


def test_sdmgrad_keeps_its_weights_where_the_batches_contradict_each_other():
    grads = matrices.sample(matrices.normal, 4)[:, :6]
    ((_, state),) = run(mtjax.sdmgrad(4), [np.stack([grads, grads, -grads])])
    np.testing.assert_array_equal(state.weights, 0.25)


def test_absent_task_keeps_its_weight_and_the_others_share_the_rest():
    tx = mtjax.modo(4, gamma=0.3)
    first, *others = stacked(batches(3))
    present = jnp.array([True, True, False, True])
    update = functools.partial(tx.update, resampled=others, present=present)
    _, state = update(first, tx.init(None))
    assert float(state.weights[2]) == 0.25
    assert float(jnp.sum(state.weights)) == pytest.approx(1.0, abs=1e-6)
    assert np.ptp(np.asarray(state.weights)) > 0.01


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: mtjax.moco(2, beta=0.0), r"`beta` must be in \(0, 1\], got 0"),
        (lambda: mtjax.moco(2, gamma=0.0), "`gamma` must be positive, got 0"),
        (lambda: mtjax.moco(2, rho=-1.0), "`rho` must not be negative, got -1"),
        (lambda: mtjax.modo(2, gamma=-1.0), "`gamma` must be positive, got -1"),
        (lambda: mtjax.modo(2, rho=-1.0), "`rho` must not be negative, got -1"),
        (lambda: mtjax.sdmgrad(2, regularization=-1.0), "`regularization` must not be"),
        (lambda: mtjax.sdmgrad(2, num_steps=0), "`num_steps` must be at least 1"),
        (lambda: mtjax.sdmgrad(2, learning_rate=0.0), "`learning_rate` must be posit"),
        (lambda: mtjax.sdmgrad(2, momentum=1.0), r"`momentum` must be in \[0, 1\)"),
    ],
)
def test_bad_hyperparameters(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()


def test_further_batches_are_asked_for():
    grads = jnp.eye(2)
    one = [mtjax.TaskGradients.from_stacked(grads)]
    with pytest.raises(ValueError, match="`modo` needs the extra argument `resampled`"):
        mtjax.modo(2).update(grads, mtjax.modo(2).init(None))
    with pytest.raises(ValueError, match=r"`resampled` of `sdmgrad` must hold.*got 1;"):
        mtjax.sdmgrad(2).update(grads, mtjax.sdmgrad(2).init(None), resampled=one)
