"""The views of `TaskGradients` against their definitions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax


@pytest.fixture
def grads(problem):
    return mtjax.value_and_task_grads(problem.losses_fn)(problem.params, problem.x)[1]


@pytest.fixture
def all_shared(problem):
    grad_fn = mtjax.value_and_task_grads(problem.losses_fn, shared=lambda path: True)
    return grad_fn(problem.params, problem.x)[1]


def test_gramian(grads, problem):
    gramian = grads.gramian()
    assert gramian.dtype == jnp.float32
    np.testing.assert_allclose(gramian, problem.gramian(), rtol=1e-5, atol=1e-6)


def test_stack(grads, problem):
    chex.assert_trees_all_close(grads.stack(), problem.stacked(), rtol=1e-5, atol=1e-6)


def test_combine(grads, problem):
    found = grads.combine(problem.weights)
    expected = problem.combined(problem.weights)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, problem.params)


def test_combine_without_weights_is_the_gradient_of_the_sum(grads, problem):
    expected = jax.grad(
        lambda p: sum(problem.losses_fn(p, problem.x).values()),
    )(problem.params)
    chex.assert_trees_all_close(grads.combine(), expected, rtol=1e-5, atol=1e-6)


def test_weights_may_be_a_list_or_integers(grads, problem):
    as_array = grads.combine(jnp.array([1.0, 0.0, 2.0]))
    chex.assert_trees_all_equal(grads.combine([1, 0, 2]), as_array)
    chex.assert_trees_all_equal(grads.combine(np.array([1, 0, 2])), as_array)


def test_leaf_that_no_loss_reaches_gets_zeros_everywhere(grads):
    np.testing.assert_array_equal(grads.combine([1, 2, 3])["unused"], jnp.zeros(3))
    np.testing.assert_array_equal(grads.combine()["unused"], jnp.zeros(3))
    np.testing.assert_array_equal(grads.stack()["unused"], jnp.zeros((3, 3)))


def test_zero_weights_leave_task_specific_leaves_alone(grads, problem):
    update = grads.combine(jnp.zeros(3))
    np.testing.assert_array_equal(update["trunk"]["kernel"], jnp.zeros((6, 8)))
    np.testing.assert_allclose(
        update["heads"]["b"], problem.per_task()[1]["heads"]["b"], rtol=1e-5
    )


def test_scale_scales_every_view(grads, problem):
    factors = jnp.array([2.0, -0.5, 3.0])
    scaled = grads.scale(factors)
    rows = jax.tree.map(lambda g: jnp.einsum("k,k...->k...", factors, g), grads.stack())
    chex.assert_trees_all_close(scaled.stack(), rows, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        scaled.gramian(), grads.gramian() * jnp.outer(factors, factors), rtol=1e-5
    )
    update = scaled.combine(problem.weights)
    expected = jax.tree.map(
        lambda shared, g: jnp.einsum(
            "k,k...->...", problem.weights if shared else jnp.ones(3), g
        ),
        problem.shared,
        rows,
    )
    chex.assert_trees_all_close(update, expected, rtol=1e-5, atol=1e-5)


def test_inner_is_the_slope_of_each_loss_along_a_direction(grads, problem):
    direction = jax.tree.map(jnp.cos, problem.params)
    _, slopes = jax.jvp(
        lambda p: problem.losses_fn(p, problem.x), (problem.params,), (direction,)
    )
    expected = jnp.stack([slopes[task] for task in problem.tasks])
    np.testing.assert_allclose(grads.inner(direction), expected, rtol=1e-5)
    np.testing.assert_allclose(
        grads.scale([2.0, 1.0, -1.0]).inner(direction),
        expected * np.array([2.0, 1.0, -1.0]),
        rtol=1e-5,
    )
    stacked = mtjax.TaskGradients.from_stacked(grads.stack())
    np.testing.assert_allclose(stacked.inner(direction), expected, rtol=1e-5)


def test_inner_with_bfloat16_parameters():
    params = jnp.array([1.0, 2.0], jnp.bfloat16)
    grad_fn = mtjax.value_and_task_grads(lambda p: {"a": p @ p, "b": p.sum()})
    products = grad_fn(params)[1].inner(jnp.array([0.5, -1.0]))
    assert products.dtype == jnp.float32
    np.testing.assert_array_equal(products, [-3.0, -0.5])


def test_scale_composes(grads, problem):
    twice = grads.scale([1.0, 2.0, 3.0]).scale([4.0, 0.5, -1.0])
    once = grads.scale([4.0, 1.0, -3.0])
    chex.assert_trees_all_close(twice.stack(), once.stack(), rtol=1e-6)
    chex.assert_trees_all_close(twice.gramian(), once.gramian(), rtol=1e-6)
    chex.assert_trees_all_close(
        twice.combine(problem.weights), once.combine(problem.weights), rtol=1e-6
    )
    assert twice.tasks == grads.tasks
    assert twice.shared == grads.shared


def test_from_stacked_equals_lazy(all_shared, problem):
    given = mtjax.TaskGradients.from_stacked(all_shared.stack(), problem.tasks)
    assert given.tasks == all_shared.tasks

    def assert_close(x, y):
        chex.assert_trees_all_close(x, y, rtol=1e-5, atol=1e-5)

    assert_close(given.gramian(), all_shared.gramian())
    for make in (lambda g: g, lambda g: g.scale([2.0, 0.5, -1.0])):
        one, other = make(given), make(all_shared)
        assert_close(one.combine(problem.weights), other.combine(problem.weights))
        assert_close(one.combine(), other.combine())
        assert_close(one.stack(), other.stack())


def test_from_stacked_names_tasks_by_number():
    grads = mtjax.TaskGradients.from_stacked({"w": jnp.ones((2, 3)), "b": jnp.ones(2)})
    assert grads.tasks == ("0", "1")
    assert grads.shared == {"w": True, "b": True}
    np.testing.assert_array_equal(grads.gramian(), jnp.full((2, 2), 4.0))


def test_from_stacked_of_several_layouts_is_an_error():
    with pytest.raises(ValueError, match=r"one leading task axis.*'w': \(3,\)"):
        mtjax.TaskGradients.from_stacked({"w": jnp.ones((3, 2)), "b": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="one leading task axis"):
        mtjax.TaskGradients.from_stacked({"b": jnp.ones(())})
    with pytest.raises(ValueError, match=r"`tasks` must name the 2 tasks.*\('a',\)"):
        mtjax.TaskGradients.from_stacked(jnp.ones((2, 2)), ["a"])


@pytest.mark.parametrize("view", ["combine", "scale"])
@pytest.mark.parametrize("weights", [jnp.ones(2), jnp.ones((3, 1)), 1.0])
def test_weights_of_wrong_shape_are_an_error(grads, view, weights):
    with pytest.raises(ValueError, match=r"`weights` must have shape \(tasks,\).*got"):
        getattr(grads, view)(weights)


def test_repr_names_tasks_and_engine(grads):
    assert repr(grads) == "TaskGradients(tasks=('a', 'b', 'c'), engine='auto')"


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.1), optax.adam(0.1), optax.scale(2.0), optax.lion(0.1)]
)
def test_optimizer_without_a_balancer_says_what_is_missing(grads, problem, tx):
    with pytest.raises(TypeError, match="Put a balancer"):
        tx.update(grads, tx.init(problem.params), problem.params)


def test_asking_for_an_array_says_what_is_missing(grads):
    with pytest.raises(TypeError, match=r"Put a balancer such as `mtjax\.pcgrad\(\)`"):
        jnp.asarray(grads)


def test_bfloat16_parameters(problem):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), problem.params)
    grad_fn = mtjax.value_and_task_grads(problem.losses_fn)

    @jax.jit
    def views(params, x):
        losses, grads = grad_fn(params, x)
        scaled = grads.scale(problem.weights).stack()
        return losses, grads.gramian(), grads.combine(problem.weights), scaled

    losses, gramian, update, stack = views(params, problem.x.astype(jnp.bfloat16))
    assert losses["a"].dtype == jnp.bfloat16
    assert gramian.dtype == jnp.float32
    np.testing.assert_allclose(gramian, problem.gramian(), rtol=0.1, atol=0.05)
    chex.assert_trees_all_equal_dtypes(update, params)
    chex.assert_trees_all_equal_dtypes(stack, params)
    given = mtjax.TaskGradients.from_stacked(stack)
    assert given.gramian().dtype == jnp.float32
    chex.assert_trees_all_equal_dtypes(given.combine(problem.weights), params)


def test_gramian_of_bfloat16_accumulates_in_float32():
    """4096 ones and 2048 halves: a sum in bfloat16 would stop growing at 256."""
    grads = mtjax.TaskGradients.from_stacked(
        jnp.stack([jnp.ones(4096), jnp.ones(4096) / 2]).astype(jnp.bfloat16)
    )
    np.testing.assert_array_equal(grads.gramian(), [[4096, 2048], [2048, 1024]])


def test_mixed_types_of_parameters_and_losses(problem):
    params = problem.params | {"of_b_and_c": jnp.ones(2, jnp.float16)}

    def losses_fn(p, x):
        losses = problem.losses_fn(p, x)
        return losses | {"a": losses["a"].astype(jnp.bfloat16)}

    _, grads = mtjax.value_and_task_grads(losses_fn)(params, problem.x)
    assert grads.gramian().dtype == jnp.float32
    chex.assert_trees_all_equal_dtypes(grads.combine(problem.weights), params)


def test_double_precision():
    with jax.enable_x64(True):
        params = jnp.array([1.0, 2.0])
        grad_fn = mtjax.value_and_task_grads(
            lambda p: {"a": (p**2).sum(), "b": p.sum()}
        )
        losses, grads = grad_fn(params)
        assert losses["a"].dtype == jnp.float64
        assert grads.gramian().dtype == jnp.float32
        np.testing.assert_array_equal(grads.gramian(), [[20.0, 6.0], [6.0, 2.0]])
        update = grads.combine([1.0, 0.5])
        assert update.dtype == jnp.float64
        np.testing.assert_array_equal(update, [2.5, 4.5])


def test_gradients_of_very_different_scales_stay_finite():
    params = jnp.array([1.0, 1.0])
    _, grads = mtjax.value_and_task_grads(
        lambda p: {"huge": 1e15 * p[0], "tiny": 1e-10 * p.sum()}
    )(params)
    np.testing.assert_allclose(grads.gramian(), [[1e30, 1e5], [1e5, 2e-20]], rtol=1e-6)
