"""Auto-Lambda, MOML and FORUM: loss weights learnt on held-out data."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

import mtjax
from mtjax.balancing import bilevel
from mtjax.balancing.balancer import Step
from mtjax.balancing.forum import balanced
from mtjax.training import TrainState, data_mesh, make_train_step, shard_batch
from tests.balancing import matrices, model, references

NAMES, SIZE, RATE = model.NAMES, 4, 0.05


def quadratics(seed):
    """One quadratic per task: curvatures and minima, in float64."""
    rng = np.random.default_rng(seed)
    roots = rng.standard_normal((3, SIZE, SIZE))
    return roots @ np.swapaxes(roots, 1, 2) / SIZE, rng.standard_normal((3, SIZE))


TRAIN, HELD_OUT = quadratics(1), quadratics(2)
START = np.array([0.5, -1.0, 0.3, 0.8])


def values(problem, params):
    gaps = params - problem[1]
    return np.einsum("tj,tjk,tk->t", gaps, problem[0], gaps) / 2


def slopes(problem, params):
    return np.einsum("tjk,tk->tj", problem[0], params - problem[1])


def losses_on(problem):
    curvatures, minima = (jnp.asarray(x, jnp.float32) for x in problem)

    def losses_fn(params):
        gaps = params[None] - minima
        losses = jnp.einsum("tj,tjk,tk->t", gaps, curvatures, gaps) / 2
        return dict(zip(NAMES, losses, strict=True))

    return losses_fn


def run(tx, count=3, step_size=0.1):
    """Updates, states and parameters before each of some steps of SGD."""
    grad_fn = mtjax.value_and_task_grads(losses_on(TRAIN))

    @jax.jit
    def update(params, state):
        losses, grads = grad_fn(params)
        return tx.update(
            grads,
            state,
            params,
            losses=losses,
            losses_fn=losses_on(TRAIN),
            validation_losses_fn=losses_on(HELD_OUT),
        )

    params, results = jnp.asarray(START, jnp.float32), []
    state = tx.init(params)
    for _ in range(count):
        updates, state = update(params, state)
        results.append((np.asarray(updates), state, np.asarray(params, np.float64)))
        params = params - step_size * updates
    return results


def ahead(params, weights, num_steps):
    for _ in range(num_steps):
        params = params - RATE * weights @ slopes(TRAIN, params)
    return params


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def differences(function, point, width=1e-5):
    """Central differences in float64, one row for each entry of the point."""
    steps = width * np.eye(len(point))
    return np.stack([(function(point + s) - function(point - s)) for s in steps]) / (
        2 * width
    )


def test_auto_lambda_follows_the_slope_of_held_out_losses_after_a_virtual_step():
    tx = mtjax.auto_lambda(
        3, primary=["a", "c"], inner_learning_rate=RATE, optimizer=optax.adam(0.01)
    )
    weights, moments = np.full(3, 0.1), (np.zeros(3), np.zeros(3), 0)
    for updates, state, params in run(tx):
        grads = slopes(TRAIN, params)

        def held_out(weights, params=params):
            return values(HELD_OUT, ahead(params, weights, 1))[[0, 2]].sum()

        towards = slopes(HELD_OUT, ahead(params, weights, 1))[[0, 2]].sum(axis=0)
        slope = -RATE * grads @ towards
        np.testing.assert_allclose(slope, differences(held_out, weights), rtol=1e-6)
        change, moments = references.adam(slope, moments, 0.01)
        weights = weights + change
        np.testing.assert_allclose(state.weights, weights, rtol=1e-4)
        np.testing.assert_allclose(updates, weights @ grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("unrolled", [True, False])
def test_slopes_are_the_derivatives_through_the_steps(num_steps, unrolled, monkeypatch):
    monkeypatch.setattr(bilevel, "unroll_pullbacks", lambda num_tasks: unrolled)
    params, weights = model.params(), jnp.array([0.5, -0.2, 0.9])
    losses_fn = functools.partial(model.losses_fn, batch=model.batch(seed=1))
    held_out_fn = functools.partial(model.losses_fn, batch=model.batch(seed=2))
    vector = lambda losses: jnp.stack([losses[name] for name in NAMES])

    def by_hand(weights):
        now = params
        for _ in range(num_steps):
            slope = jax.grad(lambda p: jnp.sum(weights * vector(losses_fn(p))))(now)
            now = jax.tree.map(lambda p, g: p - RATE * g, now, slope)
        return vector(held_out_fn(now))

    @jax.jit
    def found(weights):
        _, grads = mtjax.value_and_task_grads(losses_fn)(params)
        step = Step(params, None, jnp.ones(3, bool), None, losses_fn, held_out_fn)
        return bilevel.held_out_slopes(
            grads, step, params, weights, jnp.eye(3), RATE, num_steps
        )

    expected = jax.jit(jax.jacrev(by_hand))(weights)
    np.testing.assert_allclose(found(weights), expected, rtol=1e-4, atol=1e-6)


def test_auto_lambda_takes_weight_from_a_task_that_opposes_the_primary_one():
    rows = jnp.array([[1.0, 0.0], [-0.9, 0.1], [0.0, 1.0]])
    tx = mtjax.auto_lambda(3, primary=["0"], optimizer=optax.sgd(1.0))
    held_out = lambda p: dict(zip("012", rows @ p, strict=True))
    _, state = tx.update(
        rows, tx.init(None), jnp.zeros(2), validation_losses_fn=held_out
    )
    np.testing.assert_allclose(state.weights, [0.2, 0.01, 0.1], rtol=1e-5)


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_moml_follows_the_shortest_combination_of_exact_derivatives(inner_steps):
    tx = mtjax.moml(
        3,
        inner_learning_rate=RATE,
        inner_steps=inner_steps,
        optimizer=optax.sgd(2.0),
    )
    logits = np.zeros(3)
    for updates, state, params in run(tx):

        def held_out(logits, params=params):
            return values(HELD_OUT, ahead(params, softmax(logits), inner_steps))

        rows = differences(held_out, logits).T
        logits = logits - 2.0 * references.shortest_in_hull(rows)
        np.testing.assert_allclose(state.logits, logits, rtol=1e-3, atol=1e-5)
        expected = softmax(logits) @ slopes(TRAIN, params)
        np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-5)


def steepest(gradients, constraint, phi):
    """FORUM's dual, by sequential programming: weights of the gradients and nu."""
    rows = np.vstack([gradients, constraint])
    matrix, square = rows @ rows.T, constraint @ constraint
    linear = np.append(np.zeros(len(gradients)), -phi * square)
    solution = minimize(
        lambda x: x @ matrix @ x / 2 + linear @ x,
        np.append(np.full(len(gradients), 1 / len(gradients)), 1.0),
        jac=lambda x: matrix @ x + linear,
        bounds=[(0, None)] * len(rows),
        constraints={"type": "eq", "fun": lambda x: x[:-1].sum() - 1.0},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    return solution.x[:-1], solution.x[-1]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("fall", [0.05, 1.0, 20.0])
@pytest.mark.parametrize(
    "kind", [matrices.normal, matrices.agreeing, matrices.strongly_stationary]
)
def test_forums_weights_are_the_optimum(kind, fall):
    solve = jax.jit(balanced)
    for seed in range(3):
        grads = unit(matrices.sample(kind, 5, seed))
        towards, rows = grads[-1], grads[:-1]
        weights = solve(
            jnp.asarray(rows @ rows.T, jnp.float32),
            jnp.asarray(rows @ towards, jnp.float32),
            jnp.asarray(fall, jnp.float32),
            jnp.ones(4, bool),
        )
        expected, _ = steepest(rows, towards, fall)
        np.testing.assert_allclose(weights, expected, atol=2e-3)


def test_forum_follows_the_paper():
    tx = mtjax.forum(
        3, inner_learning_rate=RATE, inner_steps=2, phi=0.5, optimizer=optax.sgd(2.0)
    )
    logits, average = np.zeros(3), np.zeros(3)
    for k, (updates, state, params) in enumerate(run(tx), 1):
        weights = softmax(logits)
        jacobian = np.diag(weights) - np.outer(weights, weights)
        gap = values(TRAIN, params) - values(TRAIN, ahead(params, weights, 2))
        constraint = np.append(jacobian @ gap, weights @ slopes(TRAIN, params))
        rows = np.hstack([np.zeros((3, 3)), unit(slopes(HELD_OUT, params))])
        best, nu = steepest(rows, constraint, 0.5)
        average = average + (best - average) / k**0.75
        pi = 0.5 - rows @ constraint / (constraint @ constraint)
        averaged_nu = max(average @ pi, 0.0)
        direction = average @ rows + averaged_nu * constraint
        logits = logits - 2.0 * direction[:3]
        np.testing.assert_allclose(state.weights, average, atol=2e-3)
        np.testing.assert_allclose(updates, direction[3:], atol=5e-3)
        np.testing.assert_allclose(state.logits, logits, rtol=1e-2, atol=1e-4)
        if k == 1:
            # The gap must fall, and no held-out loss rises faster than another falls.
            assert averaged_nu == pytest.approx(nu, abs=1e-4)
            fall = 0.5 * constraint @ constraint
            assert direction @ constraint >= fall - 1e-4
            assert np.min(rows @ direction) == pytest.approx(
                direction @ direction - nu * fall, abs=1e-3
            )


@pytest.mark.parametrize(
    "balancer",
    [
        mtjax.auto_lambda(3),
        mtjax.moml(3, inner_steps=2),
        mtjax.forum(3, inner_steps=1),
    ],
    ids=["auto_lambda", "moml", "forum"],
)
def test_eight_devices_learn_the_same_weights_as_one(balancer):
    tx = optax.chain(balancer, optax.sgd(0.1))
    batch, held_out = model.batch(16, seed=1), model.batch(16, seed=2)
    create = lambda: TrainState.create(model.params(), tx, key=jax.random.key(0))
    one, _ = make_train_step(model.losses_fn, tx)(create(), batch, validation=held_out)
    mesh, spec = data_mesh(), jax.sharding.PartitionSpec
    step = make_train_step(model.losses_fn, tx, axis_name="data")
    mapped = jax.shard_map(
        lambda state, batch, held_out: step(state, batch, validation=held_out),
        mesh=mesh,
        in_specs=(spec(), spec("data"), spec("data")),
        out_specs=spec(),
    )
    many, _ = jax.jit(mapped)(create(), *shard_batch((batch, held_out), mesh))
    chex.assert_trees_all_close(many.params, one.params, atol=1e-5)
    chex.assert_trees_all_close(many.opt_state, one.opt_state, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (
            lambda: mtjax.auto_lambda(2, inner_learning_rate=0.0),
            "`inner_learning_rate` must be positive, got 0",
        ),
        (lambda: mtjax.auto_lambda(2, primary=[]), "`primary` must name at least one"),
        (lambda: mtjax.auto_lambda(2, primary="ab"), "`primary` must name.*got 'ab'"),
        (lambda: mtjax.moml(2, inner_steps=0), "`inner_steps` must be at least 1"),
        (
            lambda: mtjax.moml(2, inner_learning_rate=-1.0),
            "`inner_learning_rate` must be positive, got -1",
        ),
        (lambda: mtjax.forum(2, phi=0.0), "`phi` must be positive, got 0"),
        (lambda: mtjax.forum(2, inner_steps=0), "`inner_steps` must be at least 1"),
    ],
)
def test_bad_hyperparameters(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (
            lambda: mtjax.auto_lambda(2),
            {},
            "needs the.*argument `validation_losses_fn`",
        ),
        (
            lambda: mtjax.moml(2, inner_steps=2),
            {"validation_losses_fn": lambda p: {"0": p[0], "1": p[1]}},
            "needs the extra argument `losses_fn`",
        ),
        (
            lambda: mtjax.moml(2),
            {"validation_losses_fn": lambda p: {"0": p[0], "1": p[1]}},
            "`moml` needs `params`, got None",
        ),
        (
            lambda: mtjax.auto_lambda(2, primary=["0", "depth"]),
            {
                "params": jnp.zeros(2),
                "validation_losses_fn": lambda p: {"0": p[0], "1": p[1]},
            },
            r"`primary` must name tasks among \('0', '1'\), got \('0', 'depth'\)",
        ),
    ],
)
def test_what_is_missing_is_named(make, arguments, message):
    tx = make()
    with pytest.raises(ValueError, match=message):
        tx.update(jnp.eye(2), tx.init(None), **arguments)
