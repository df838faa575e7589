"""The contract with a `losses_fn`, and what it costs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.losses import masked_mean


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def deep_losses(params, x):
    """Three wide shared layers, two thin heads: the trunk is nearly all of the cost."""
    z = x
    for kernel in params["trunk"]:
        z = jnp.tanh(z @ kernel)
    return {"a": jnp.mean((z @ params["a"]) ** 2), "b": jnp.mean(z @ params["b"])}


@pytest.fixture
def deep_params(key):
    trunk = list(jax.random.normal(key, (3, 64, 64)) / 8)
    return {"trunk": trunk, "a": jnp.ones(64), "b": jnp.ones(64)}


def test_losses_come_back_as_returned(problem):
    losses, grads = mtjax.value_and_task_grads(problem.losses_fn)(
        problem.params, problem.x
    )
    assert tuple(losses) == grads.tasks == ("a", "b", "c")
    chex.assert_trees_all_close(losses, problem.losses_fn(problem.params, problem.x))


def test_aux(problem):
    def with_aux(params, x):
        return problem.losses_fn(params, x), {"mean": x.mean(), "note": "any object"}

    grad_fn = mtjax.value_and_task_grads(with_aux, has_aux=True)
    (losses, aux), grads = grad_fn(problem.params, problem.x)
    assert aux["note"] == "any object"
    np.testing.assert_allclose(aux["mean"], problem.x.mean())
    chex.assert_trees_all_close(losses, problem.losses_fn(problem.params, problem.x))
    np.testing.assert_allclose(grads.gramian(), problem.gramian(), 1e-5, 1e-6)


def test_per_task_batches_and_keyword_arguments(problem):
    """One batch per task, of different sizes, and a flag."""

    def losses_fn(params, batches, *, squared):
        z = {task: x @ params["kernel"] for task, x in batches.items()}
        return {t: jnp.mean(z[t] ** 2 if squared else z[t]) for t in batches}

    params = {"kernel": problem.params["trunk"]["kernel"]}
    batches = {"small": problem.x[:3], "large": problem.x}
    losses, grads = mtjax.value_and_task_grads(losses_fn)(params, batches, squared=True)
    assert tuple(losses) == ("large", "small")
    rows = jax.jacrev(lambda p: losses_fn(p, batches, squared=True))(params)
    chex.assert_trees_all_close(
        grads.combine([1.0, -2.0]),
        jax.tree.map(lambda a, b: a - 2 * b, rows["large"], rows["small"]),
        rtol=1e-5,
    )


def test_losses_fn_is_traced_once_for_all_views(problem):
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(problem.losses_fn, n=1)
    grad_fn = mtjax.value_and_task_grads(counted)

    @jax.jit
    def step(params, x):
        losses, grads = grad_fn(params, x)
        weights = grads.gramian().sum(0)
        return losses, grads.combine(weights), grads.scale(weights).stack()

    chex.assert_tree_all_finite(step(problem.params, problem.x))
    chex.assert_tree_all_finite(step(problem.params, 2 * problem.x))


def test_pair_is_traced_once_each(problem):
    chex.clear_trace_counter()
    pair = tuple(chex.assert_max_traces(f, n=1) for f in problem.pair)
    grad_fn = mtjax.value_and_task_grads(pair)

    @jax.jit
    def step(params, x):
        _, grads = grad_fn(params, x)
        return grads.combine(grads.gramian().sum(0))

    chex.assert_tree_all_finite(step(problem.params, problem.x))


def test_combine_costs_one_backward_pass(deep_params):
    x = jnp.ones((32, 64))
    grad_fn = mtjax.value_and_task_grads(deep_losses)

    def loss_weighting(params, weights, x):
        losses, grads = grad_fn(params, x)
        return losses, grads.combine(weights)

    def plain_sum(params, weights, x):
        del weights
        return jax.value_and_grad(lambda p: sum(deep_losses(p, x).values()))(params)

    weights = jnp.array([0.3, 2.0])
    plain = flops(plain_sum, deep_params, weights, x)
    assert flops(loss_weighting, deep_params, weights, x) < 1.05 * plain


def test_views_that_are_not_asked_for_cost_nothing(deep_params):
    x = jnp.ones((32, 64))
    grad_fn = mtjax.value_and_task_grads(deep_losses)
    forward = flops(deep_losses, deep_params, x)
    assert flops(lambda p, x: grad_fn(p, x)[0], deep_params, x) == forward

    def scaled(params, x):
        _, grads = grad_fn(params, x)
        return grads.scale(jnp.ones(2)).tasks and grads.combine()

    def unscaled(params, x):
        return grad_fn(params, x)[1].combine()

    assert flops(scaled, deep_params, x) < 1.01 * flops(unscaled, deep_params, x)


@pytest.mark.parametrize(
    ("engine", "products"),
    [
        # In units of a layer's product: 3 forward, then 5 per backward pass.
        ("stacked", 3 + 5 * 3),
        # 2 per task backward, 3 for the update; products of the inputs of a layer take
        # half a product each here, with each task's cotangents another half.
        ("ghost", 3 + 2 * 2 + 3 + 3 * (0.5 + 2 * 0.5)),
    ],
)
def test_cost_of_gramian_and_combine(deep_params, engine, products):
    x = jnp.ones((32, 64))
    grad_fn = mtjax.value_and_task_grads(deep_losses, engine=engine)

    def on_gramian(params, x):
        _, grads = grad_fn(params, x)
        return grads.combine(grads.gramian().sum(0))

    product = 2 * 32 * 64 * 64
    found = flops(on_gramian, deep_params, x) / product
    assert products <= found < products * 1.1


def test_under_jit_equals_eager(problem):
    grad_fn = mtjax.value_and_task_grads(problem.losses_fn)

    def views(params, x):
        losses, grads = grad_fn(params, x)
        return losses, grads.gramian(), grads.combine(problem.weights), grads.stack()

    chex.assert_trees_all_close(
        jax.jit(views)(problem.params, problem.x),
        views(problem.params, problem.x),
        rtol=1e-5,
        atol=1e-6,
    )


def test_inside_vmap_over_seeds(problem, pullbacks):
    grad_fn = mtjax.value_and_task_grads(problem.losses_fn)

    def views(params, x):
        losses, grads = grad_fn(params, x)
        return losses, grads.gramian(), grads.combine(problem.weights), grads.stack()

    other = jax.tree.map(lambda p: 0.5 * p, problem.params)
    seeds = jax.tree.map(lambda *p: jnp.stack(p), problem.params, other)
    found = jax.jit(jax.vmap(views, in_axes=(0, None)))(seeds, problem.x)
    expected = [views(p, problem.x) for p in (problem.params, other)]
    expected = jax.tree.map(lambda *v: jnp.stack(v), *expected)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_inside_scan_over_steps(problem):
    grad_fn = mtjax.value_and_task_grads(problem.losses_fn)

    def step(params, _):
        losses, grads = grad_fn(params, problem.x)
        update = grads.combine(1 / (1 + jnp.diag(grads.gramian())))
        return jax.tree.map(lambda p, u: p - 0.1 * u, params, update), losses

    params, losses = jax.lax.scan(step, problem.params, length=3)
    expected = problem.params
    for _ in range(3):
        expected, _ = step(expected, None)
    chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-6)
    assert losses["a"][-1] < losses["a"][0]


def test_gradient_through_the_update(problem):
    """Learned weights differentiate through `combine`: dL(p - u)/dw = -<g(p'), g_k>."""
    grad_fn = mtjax.value_and_task_grads(lambda p: {"a": (p**2).sum(), "b": p[0]})
    params = jnp.array([1.0, 2.0])

    def after_a_step(weights):
        _, grads = grad_fn(params)
        return ((params - grads.combine(weights)) ** 2).sum()

    weights = jnp.array([0.1, 0.3])
    after = params - 0.1 * 2 * params - 0.3 * jnp.array([1.0, 0.0])
    expected = [-2 * after @ (2 * params), -2 * after[0]]
    np.testing.assert_allclose(jax.grad(after_a_step)(weights), expected, rtol=1e-6)


# Tasks without labels.


def two_masked_losses(mean):
    def losses_fn(params, x, labels, mask):
        error = (x @ params["trunk"] * params["head"] - labels) ** 2
        return {task: mean(error[:, i], mask[:, i]) for i, task in enumerate("ab")}

    return losses_fn


MASKED_BATCH = (
    jnp.ones((4, 3)),
    jnp.array([[1.0, 9.0]] * 4),
    jnp.array([[True, False]] * 4),
)
MASKED_PARAMS = {"trunk": jnp.ones((3, 2)), "head": jnp.ones((1, 2))}


def test_naive_masked_mean_gives_nan_that_no_weight_removes():
    """0/0 makes the absent task's gradient NaN, and 0 * NaN is NaN."""
    naive = two_masked_losses(lambda v, m: jnp.sum(v * m) / jnp.sum(m))
    losses, grads = mtjax.value_and_task_grads(naive)(MASKED_PARAMS, *MASKED_BATCH)
    assert jnp.isnan(losses["b"])
    assert jnp.isnan(grads.combine([1.0, 0.0])["trunk"]).any()
    assert jnp.isnan(grads.scale([1.0, 0.0]).combine()["trunk"]).any()


def test_masked_mean_gives_an_absent_task_exactly_zero():
    safe = two_masked_losses(masked_mean)
    losses, grads = mtjax.value_and_task_grads(safe)(MASKED_PARAMS, *MASKED_BATCH)
    assert losses["b"] == 0
    for leaf in jax.tree.leaves(grads.stack()):
        np.testing.assert_array_equal(leaf[1], jnp.zeros_like(leaf[1]))
    np.testing.assert_array_equal(grads.gramian()[1], [0.0, 0.0])
    chex.assert_tree_all_finite(grads.combine([0.5, 0.5]))


# Errors.

W = jnp.ones(2)
BAD_RESULTS = [
    (lambda p: p.sum(), TypeError, r"must return a dictionary .*got .*Tracer"),
    (lambda p: ({"a": p.sum()}, {}), TypeError, r"got tuple; pass `has_aux=True`"),
    (lambda p: {}, ValueError, r"at least one loss, got an empty dictionary"),
    (lambda p: {1: p.sum()}, TypeError, r"name tasks by strings, got the key 1 of"),
    (lambda p: {"a": p}, TypeError, r"one scalar per task, got shape \(2,\) for 'a'"),
    (lambda p: {"a": {"b": p.sum()}}, TypeError, r"one scalar per task, got dict for"),
    (lambda p: {"a": None}, TypeError, r"one scalar per task, got NoneType for 'a'"),
    (lambda p: {"a": jnp.argmax(p)}, TypeError, r"floating-point losses, got int32"),
    (lambda p: {"a": 3}, TypeError, r"floating-point losses, got int32 for 'a'"),
]


@pytest.mark.parametrize(("losses_fn", "error", "message"), BAD_RESULTS)
def test_result_that_is_not_a_dictionary_of_scalars(losses_fn, error, message):
    grad_fn = mtjax.value_and_task_grads(losses_fn)
    with pytest.raises(error, match="`losses_fn`.*" + message):
        grad_fn(W)
    with pytest.raises(error, match="`losses_fn`.*" + message):
        mtjax.parameter_split(losses_fn, W)


@pytest.mark.parametrize("result", [{"a": 1.0}, ({"a": 1.0},), 1.0])
def test_has_aux_without_aux(result):
    grad_fn = mtjax.value_and_task_grads(lambda p: result, has_aux=True)
    with pytest.raises(TypeError, match=r"`has_aux=True`, `losses_fn` must return"):
        grad_fn(W)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, ValueError, "at least one array, got an empty tree"),
        ({"w": W, "step": jnp.int32(3)}, TypeError, "got int32 at 'step'; pass count"),
        ({"w": W, "on": [jnp.array(True)]}, TypeError, "got bool at 'on/0'; pass"),
        ({"w": W + 1j}, TypeError, "got complex64 at 'w'; hold real and imaginary"),
    ],
)
def test_params_that_cannot_be_differentiated(params, error, message):
    def losses_fn(p):
        return {"a": jnp.sum(W)}

    with pytest.raises(error, match="`params` must hold .*" + message):
        mtjax.value_and_task_grads(losses_fn)(params)
    with pytest.raises(error, match="`params` must hold .*" + message):
        mtjax.parameter_split(losses_fn, params)


def test_unknown_engine():
    with pytest.raises(ValueError, match=r"`engine` must be .*'ghost'.*got 'sparse'"):
        mtjax.value_and_task_grads(lambda p: {"a": p.sum()}, engine="sparse")


def test_representation_engine_of_a_single_function():
    with pytest.raises(ValueError, match=r"`engine='representation'` needs.*single"):
        mtjax.value_and_task_grads(lambda p: {"a": p.sum()}, engine="representation")
