"""Every engine against its definition."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax


@pytest.fixture
def at_z(problem):
    """Each task's gradient at the representation, by hand: (tasks, examples, units)."""
    encode, losses_from_z = problem.pair
    z = encode(problem.params, problem.x)
    rows = jax.jacrev(lambda z: losses_from_z(problem.params, z, problem.x))(z)
    return jnp.stack([rows[task] for task in problem.tasks])


def test_stacked_engine_both_ways_equals_one_gradient_per_task(problem, pullbacks):
    grad_fn = mtjax.value_and_task_grads(problem.losses_fn)

    @jax.jit
    def views(params, x):
        _, grads = grad_fn(params, x)
        return grads.stack(), grads.combine(problem.weights), grads.gramian()

    stack, update, gramian = views(problem.params, problem.x)
    chex.assert_trees_all_close(stack, problem.stacked(), rtol=1e-6, atol=1e-6)
    expected = problem.combined(problem.weights)
    chex.assert_trees_all_close(update, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gramian, problem.gramian(), rtol=1e-6, atol=1e-6)


def test_the_rule_decides_between_the_two_ways(problem, pullbacks):
    def stack(params):
        return mtjax.value_and_task_grads(problem.losses_fn)(params, problem.x)[
            1
        ].stack()

    products = str(jax.make_jaxpr(stack)(problem.params)).count("= dot_general[")
    forward, backward = 4, 7  # two per product, but none for the batch
    assert products == forward + backward * (3 if pullbacks == "unrolled" else 1)


def test_representation_gramian_is_that_of_gradients_at_z(problem, at_z, pullbacks):
    _, grads = mtjax.value_and_task_grads(problem.pair)(problem.params, problem.x)
    rows = at_z.reshape(3, -1)
    np.testing.assert_allclose(grads.gramian(), rows @ rows.T, rtol=1e-5, atol=1e-7)
    assert grads.gramian().dtype == jnp.float32
    assert repr(grads).endswith("engine='representation')")


def test_representation_engine_combines_and_stacks_as_the_stacked_one(problem):
    losses, grads = mtjax.value_and_task_grads(problem.pair)(problem.params, problem.x)
    expected = problem.combined(problem.weights)
    chex.assert_trees_all_close(
        grads.combine(problem.weights), expected, rtol=1e-5, atol=1e-6
    )
    chex.assert_trees_all_close(grads.stack(), problem.stacked(), rtol=1e-5, atol=1e-6)
    assert grads.shared == problem.shared
    chex.assert_trees_all_close(losses, problem.losses_fn(problem.params, problem.x))


def test_pair_with_the_stacked_engine_has_the_gramian_of_parameters(problem):
    grad_fn = mtjax.value_and_task_grads(problem.pair, engine="stacked")
    _, grads = grad_fn(problem.params, problem.x)
    np.testing.assert_allclose(grads.gramian(), problem.gramian(), 1e-5, 1e-6)


def test_representation_gramian_scales(problem):
    _, grads = mtjax.value_and_task_grads(problem.pair)(problem.params, problem.x)
    np.testing.assert_allclose(
        grads.scale([2.0, 1.0, -1.0]).gramian(),
        grads.gramian() * np.outer([2, 1, -1], [2, 1, -1]),
        rtol=1e-6,
    )


def test_representation_as_a_pytree_with_aux(problem):
    encode, losses_from_z = problem.pair

    def encode_tree(params, x):
        return {"z": encode(params, x), "norm": (jnp.sum(params["trunk"]["bias"]),)}

    def heads(params, z, x):
        losses = losses_from_z(params, z["z"], x)
        (norm,) = z["norm"]
        return losses | {"a": losses["a"] + 3 * norm, "b": losses["b"] + 2 * norm}, x

    grad_fn = mtjax.value_and_task_grads((encode_tree, heads), has_aux=True)
    (_, aux), grads = grad_fn(problem.params, problem.x)
    plain = mtjax.value_and_task_grads(problem.pair)(problem.params, problem.x)[1]
    of_norm = np.outer([3, 2, 0], [3, 2, 0])
    np.testing.assert_allclose(grads.gramian(), plain.gramian() + of_norm, rtol=1e-5)
    np.testing.assert_array_equal(aux, problem.x)


def test_representation_per_task(problem):
    """One batch per task: the gradients at z live on disjoint entries."""
    encode, _ = problem.pair

    def encode_each(params, batches):
        return {task: encode(params, x) for task, x in batches.items()}

    def heads(params, z, batches):
        return {t: jnp.mean((z[t] @ params["heads"][t]) ** 2) for t in batches}

    batches = {"a": problem.x[:4], "b": problem.x}
    grad_fn = mtjax.value_and_task_grads((encode_each, heads))
    _, grads = grad_fn(problem.params, batches)
    z = encode_each(problem.params, batches)
    rows = jax.jacrev(lambda z: heads(problem.params, z, batches))(z)
    squares = [jnp.sum(rows[task][task] ** 2) for task in batches]
    np.testing.assert_allclose(grads.gramian(), np.diag(squares), rtol=1e-5)


def test_representation_gramian_needs_no_backward_pass_of_the_encoder():
    def encode(params, x):
        for kernel in params["trunk"]:
            x = jnp.tanh(x @ kernel)
        return x

    def heads(params, z, x):
        return {task: jnp.mean((z @ params[task]) ** 2) for task in "ab"}

    def gramian(params, x):
        return mtjax.value_and_task_grads((encode, heads))(params, x)[1].gramian()

    def flops(function):
        return jax.jit(function).lower(params, x).compile().cost_analysis()["flops"]

    params = {"trunk": [jnp.ones((64, 64))] * 3, "a": jnp.ones(64), "b": jnp.ones(64)}
    x = jnp.ones((32, 64))
    assert flops(gramian) < 1.2 * flops(encode)


def test_representation_must_be_floating_point(problem):
    def encode(params, x):
        return {"z": x @ params["trunk"]["kernel"], "mask": jnp.arange(3)}

    grad_fn = mtjax.value_and_task_grads((encode, lambda p, z, x: {"a": z["z"].sum()}))
    with pytest.raises(
        TypeError, match=r"`encode` must return.*int32 at 'mask'; return"
    ):
        grad_fn(problem.params, problem.x)


def test_nothing_shared_gives_a_zero_gramian(pullbacks):
    def losses_fn(params):
        return {"a": (params["a"] ** 2).sum(), "b": params["b"].sum()}

    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, grads = mtjax.value_and_task_grads(losses_fn)(params)
    np.testing.assert_array_equal(grads.gramian(), jnp.zeros((2, 2)))
    np.testing.assert_array_equal(grads.combine([0.0, 0.0])["a"], [2.0, 2.0])
