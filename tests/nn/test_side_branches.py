"""Additions on the side of dense layers say what merged kernels say."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.merging.experts import Experts
from mtjax.merging.low_rank import low_rank
from mtjax.merging.match import named_leaves
from mtjax.merging.sparse import sparse
from mtjax.nn import ViT
from mtjax.nn.side_branches import apply_mixed, dense_kernels, with_side_branches

MODEL = ViT(patch=2, width=8, depth=1, heads=2, hidden=12)
TASKS = ("a", "b", "c")


def apply_fn(params, images):
    return MODEL.apply({"params": params}, images)


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (5, 4, 4, 1))


@pytest.fixture(scope="module")
def shared(images):
    return jax.jit(MODEL.init)(jax.random.key(0), images)["params"]


def experts_of(shared, form):
    """Every leaf changes, in all tasks."""
    rng = np.random.default_rng(2)

    def change(leaf):
        drawn = jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
        return form(drawn) if leaf.ndim > 1 else drawn

    leaves = named_leaves(shared).items()
    return Experts(shared, {t: {p: change(x) for p, x in leaves} for t in TASKS})


def weights_of(number):
    return jax.nn.softmax(jax.random.normal(jax.random.key(3), (number, len(TASKS))))


def test_dense_kernels(shared, images):
    found = dense_kernels(lambda: apply_fn(shared, images))
    parts = ("attention/query", "attention/key", "attention/value", "attention/output")
    names = ["patches", *(f"block_0/{x}" for x in (*parts, "mlp_in", "mlp_out"))]
    assert list(found) == [f"{name}/kernel" for name in names]


FORMS = {
    "products": lambda x: low_rank(x, 2),
    "sparse": lambda x: sparse(jnp.where(jnp.abs(x) > 0.3, x, 0)),
    "arrays": lambda x: x,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_mixed_batch_equals_merged_models_one_by_one(shared, images, form):
    experts, weights = experts_of(shared, form), weights_of(len(images))
    found = jax.jit(apply_mixed, static_argnums=0)(apply_fn, experts, weights, images)
    alone = jax.jit(lambda w, x: apply_fn(experts.mixed(w), x[None])[0])
    expected = jnp.stack([alone(w, x) for w, x in zip(weights, images)])
    chex.assert_trees_all_close(found, expected, atol=1e-5)
    assert jnp.abs(found - apply_fn(shared, images)).max() > 0.1


def test_an_example_does_not_depend_on_its_batch(shared, images):
    experts, weights = (
        experts_of(shared, FORMS["products"]),
        jnp.eye(3)[jnp.array([0, 1, 2, 1, 0])],
    )
    run = jax.jit(apply_mixed, static_argnums=0)
    found = run(apply_fn, experts, weights, images)
    turned = run(apply_fn, experts, weights[::-1], images[::-1])
    chex.assert_trees_all_close(found, turned[::-1], atol=1e-6)


def test_no_kernel_is_formed_per_example(shared):
    """The largest array in the program has no axes of batch, inputs and outputs."""
    model = nn.Dense(40, use_bias=False)
    kernel = jnp.zeros((50, 40))
    experts = Experts(
        {"kernel": kernel}, {t: {"kernel": low_rank(kernel, 2)} for t in TASKS}
    )
    apply = lambda p, x: model.apply({"params": p}, x)
    jaxpr = jax.make_jaxpr(lambda w, x: apply_mixed(apply, experts, w, x))
    program = jaxpr(weights_of(30), jnp.ones((30, 50)))
    sizes = [v.aval.size for eqn in program.eqns for v in eqn.outvars]
    assert max(sizes) <= 50 * 40


def test_kernels_elsewhere_are_merged_for_each_example(images):
    """Parameters of a larger tree, convolutions: slower, with the same result."""

    class Small(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(3, (2, 2))(x))
            return nn.Dense(2)(x.mean((1, 2)))

    params = {"encoder": Small().init(jax.random.key(0), images)["params"]}
    apply = lambda p, x: Small().apply({"params": p["encoder"]}, x)
    experts, weights = experts_of(params, FORMS["products"]), weights_of(len(images))
    found = apply_mixed(apply, experts, weights, images)
    one = lambda w, x: apply(experts.mixed(w), x[None])[0]
    chex.assert_trees_all_close(found, jax.vmap(one)(weights, images), atol=1e-5)


def test_inputs_and_outputs_may_be_trees():
    model = nn.Dense(2)
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    experts = Experts(params, {"a": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}})

    def apply(params, batch):
        return {"y": model.apply({"params": params}, batch["x"]), "n": batch["n"]}

    batch = {"x": jnp.ones((4, 3)), "n": jnp.arange(4)}
    found = apply_mixed(apply, experts, jnp.full((4, 1), 0.5), batch)
    np.testing.assert_allclose(found["y"], np.full((4, 2), 3 + 0.5 * 4))
    np.testing.assert_array_equal(found["n"], np.arange(4))


def test_weights_may_come_from_what_a_layer_sees():
    model = nn.Sequential([nn.Dense(2, use_bias=False), nn.Dense(2, use_bias=False)])
    params = {"params": {f"layers_{i}": {"kernel": jnp.eye(2)} for i in range(2)}}
    branches = {f"layers_{i}/kernel": jnp.ones((1, 2, 2)) for i in range(2)}
    seen = {}

    def weights(path, x):
        seen[path] = x
        return jnp.array([1.0]) * x[0, 0]

    x = jnp.array([[2.0, 1.0]])
    run = lambda: model.apply(params, x)
    found = with_side_branches(run, branches, weights)
    first = np.array([[2.0, 1.0]]) + 2 * 3
    np.testing.assert_array_equal(seen["layers_1/kernel"], first)
    np.testing.assert_array_equal(found, first + first[0, 0] * first.sum())


def test_biases():
    model, x = nn.Dense(2), jnp.array([[[1.0, 2.0]]])
    params = {"params": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
    kernels = jnp.stack([jnp.ones((2, 2)), jnp.zeros((2, 2))])
    biases = jnp.array([[1.0, 2.0], [10.0, 20.0]])
    weights, run = jnp.array([2.0, 0.5]), lambda: model.apply(params, x)
    alone = with_side_branches(run, {"bias": biases}, weights)
    np.testing.assert_array_equal(alone, [[[1 + 2 + 5, 2 + 4 + 10]]])
    both = with_side_branches(run, {"bias": biases, "kernel": kernels}, weights)
    np.testing.assert_array_equal(both, alone + 2 * 3)


def test_the_output_keeps_its_dtype():
    model, x = nn.Dense(2, dtype=jnp.bfloat16), jnp.ones((1, 2))
    params = model.init(jax.random.key(0), x)
    branches = {"kernel": jnp.ones((1, 2, 2))}
    found = with_side_branches(lambda: model.apply(params, x), branches, jnp.ones(1))
    assert found.dtype == jnp.bfloat16


def test_errors(shared, images):
    with pytest.raises(ValueError, match=r"`branches` must name kernels .*'kernal'"):
        with_side_branches(
            lambda: apply_fn(shared, images),
            {"kernal": jnp.ones((1, 2, 2))},
            jnp.ones(1),
        )
    experts = experts_of(shared, FORMS["arrays"])
    with pytest.raises(ValueError, match=r"one column for each of \('a', 'b', 'c'\)"):
        apply_mixed(apply_fn, experts, jnp.ones((5, 2)), images)
