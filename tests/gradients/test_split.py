"""Which task reaches which parameter: inferred through everything that JAX has."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtjax

PARAMS = {"x": jnp.array([0.5, -1.5, 2.5]), "y": jnp.array([1.0, 2.0, -3.0])} | {
    "z": jnp.array([-0.3, 0.7, 1.1])
}


def two_outputs(x, y, z):
    return x * y, y * z


def through_jit(p):
    a, b = jax.jit(two_outputs)(p["x"], p["y"], p["z"])
    return {"a": a.sum(), "b": b.sum()}


def through_remat(p):
    a, b = jax.checkpoint(two_outputs)(p["x"], jnp.sin(p["y"]), p["z"])
    return {"a": jnp.exp(a).sum(), "b": b.sum()}


def through_nested_calls(p):
    @jax.jit
    @jax.checkpoint
    def layer(carry, t):
        a, b = jax.jit(two_outputs)(carry[0], t, carry[1])
        return (jnp.sin(a), jnp.sin(b)), a

    (a, b), _ = jax.lax.scan(layer, (p["x"], p["z"]), jnp.stack([p["y"], p["y"]]))
    return {"a": a.sum(), "b": b.sum()}


def carry_mixes_over_iterations(p):
    def body(carry, _):
        h, g, i = carry
        return (h + g, g * p["x"], i + 1), None

    (h, g, _), _ = jax.lax.scan(body, (p["y"], p["z"], 0), length=3)
    return {"a": h.sum(), "b": g.sum()}


def carry_that_needs_many_rounds(p):
    """What starts in the last slot arrives in the first after three iterations."""

    def body(carry, _):
        first, second, third, last = carry
        return (first + second, second + third, third + last, last), None

    carry, _ = jax.lax.scan(body, (p["x"], p["x"], p["y"], p["z"]), length=4)
    return {"a": carry[0].sum(), "b": carry[2].sum()}


def scanned_and_closed_over(p):
    def body(h, t):
        return h + t, t * p["y"]

    h, ys = jax.lax.scan(body, jnp.zeros(()), p["x"])
    return {"a": h, "b": ys.sum() + p["z"].sum()}


def fori_loop(p):
    total = jax.lax.fori_loop(0, 3, lambda i, c: c * p["x"] + p["y"][i], p["z"])
    return {"a": total.sum(), "b": p["z"].sum()}


def while_loop_without_gradient(p):
    start = jax.lax.stop_gradient(p["y"])
    grown = jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1.0, start)
    return {"a": (grown * p["x"]).sum(), "b": p["z"].sum()}


def cond(p):
    either = jax.lax.cond(p["z"][0] > 0, lambda: p["x"], lambda: p["y"] ** 2)
    return {"a": either.sum(), "b": (p["y"] * p["z"]).sum()}


def switch_with_two_outputs(p):
    branches = [lambda x, z: (x, z), lambda x, z: (2 * x, jnp.sin(z))]
    x, z = jax.lax.switch(jnp.argmax(p["y"]), branches, p["x"], p["z"])
    return {"a": x.sum(), "b": z.sum()}


@jax.custom_jvp
def forgets_second(x, y):
    return x * y


forgets_second.defjvps(lambda t, ans, x, y: t * y, None)


def custom_jvp(p):
    return {"a": forgets_second(p["x"], p["y"]).sum(), "b": (p["z"] ** 2).sum()}


@jax.custom_vjp
def serves_two_tasks(x, y, z):
    return x * y, y * z


serves_two_tasks.defvjp(
    lambda x, y, z: (serves_two_tasks(x, y, z), (x, y, z)),
    lambda r, g: (g[0] * r[1], g[0] * r[0] + g[1] * r[2], g[1] * r[1]),
)


def custom_vjp(p):
    a, b = jax.jit(serves_two_tasks)(p["x"], p["y"], p["z"])
    return {"a": a.sum(), "b": b.sum()}


@jax.custom_vjp
def crosses_over(x, y):
    return x, y


crosses_over.defvjp(lambda x, y: ((x, y), None), lambda _, g: (g[1], g[0]))


def custom_vjp_against_the_data_flow(p):
    """The gradient of each output goes to the input that it does not depend on."""
    a, b = crosses_over(p["x"], p["y"])
    return {"a": a.sum(), "b": b.sum()}


@jax.custom_vjp
def loops_backward(x, z):
    return x, z


def _loop_as_often_as_x_says(x, cotangents):
    times = x.shape[0] + (x[0] > 0).astype(jnp.int32)  # not static: a while loop
    return jax.lax.fori_loop(0, times, lambda _, c: (c[0] / 2, c[1] * 3), cotangents)


loops_backward.defvjp(lambda x, z: ((x, z), x), _loop_as_often_as_x_says)


def while_loop_in_custom_vjp(p):
    x, z = loops_backward(p["x"], p["z"])
    return {"a": x.sum(), "b": z.sum()}


def stop_gradient(p):
    return {
        "a": (p["x"] * jax.lax.stop_gradient(p["y"])).sum(),
        "b": (p["z"] * jax.jit(jax.lax.stop_gradient)(p["x"])).sum(),
    }


def straight_through(p):
    quantized = jnp.round(p["x"] * p["y"])
    through = p["x"] + jax.lax.stop_gradient(quantized - p["x"])
    return {"a": (through * p["z"]).sum(), "b": (p["z"] ** 2).sum()}


def through_integers(p):
    index = jnp.argmax(p["x"])
    scale = p["y"].astype(jnp.int32).astype(jnp.float32)
    return {"a": p["z"][index] * scale.sum(), "b": (p["y"] > 0) @ p["y"]}


def rows_of_one_table(p):
    return {"a": p["x"][0], "b": p["x"][2]}


def linear_solve(p):
    solution = jnp.linalg.solve(jnp.diag(p["x"]), p["y"])
    return {"a": solution.sum(), "b": p["z"].sum()}


def constant(p):
    return {"a": (p["x"] * p["z"]).sum(), "b": 0.0}


CASES = [
    (through_jit, "xy", "yz"),
    (through_remat, "xy", "yz"),
    (through_nested_calls, "xy", "yz"),
    (carry_mixes_over_iterations, "xyz", "xz"),
    (carry_that_needs_many_rounds, "xyz", "yz"),
    (scanned_and_closed_over, "x", "xyz"),
    (fori_loop, "xyz", "z"),
    (while_loop_without_gradient, "x", "z"),
    (cond, "xy", "yz"),
    (switch_with_two_outputs, "x", "z"),
    (custom_jvp, "x", "z"),
    (custom_vjp, "xy", "yz"),
    (custom_vjp_against_the_data_flow, "y", "x"),
    (while_loop_in_custom_vjp, "x", "z"),
    (stop_gradient, "x", "z"),
    (straight_through, "xz", "z"),
    (through_integers, "z", "y"),
    (rows_of_one_table, "x", "x"),
    (linear_solve, "xy", "z"),
    (constant, "xz", ""),
]
every_case = pytest.mark.parametrize(
    ("losses_fn", "of_a", "of_b"), CASES, ids=[c[0].__name__ for c in CASES]
)


def owners_of(of_a, of_b):
    return {
        leaf: tuple(t for t, own in (("a", of_a), ("b", of_b)) if leaf in own)
        for leaf in PARAMS
    }


@every_case
def test_owners_are_exact(losses_fn, of_a, of_b):
    split = mtjax.parameter_split(losses_fn, PARAMS)
    assert split.owners == owners_of(of_a, of_b)
    assert split.shared == {leaf: leaf in of_a and leaf in of_b for leaf in PARAMS}


@every_case
def test_combine_follows_the_split_under_jit(losses_fn, of_a, of_b):
    grad_fn = mtjax.value_and_task_grads(losses_fn)
    weights = jnp.array([3.0, 0.5])
    splits = []

    @jax.jit
    def update(params):
        _, grads = grad_fn(params)
        splits.append(grads.split)
        return grads.combine(weights)

    found = update(PARAMS)
    assert splits[0].owners == owners_of(of_a, of_b)
    rows = jax.jit(jax.jacrev(lambda p: jax.tree.map(jnp.asarray, losses_fn(p))))(
        PARAMS
    )
    for leaf in PARAMS:
        w = weights if leaf in of_a and leaf in of_b else jnp.ones(2)
        expected = w[0] * rows["a"][leaf] + w[1] * rows["b"][leaf]
        np.testing.assert_allclose(found[leaf], expected, rtol=1e-5, atol=1e-6)


@every_case
def test_split_is_the_same_inside_vmap(losses_fn, of_a, of_b):
    splits = []

    def gramian(params):
        _, grads = mtjax.value_and_task_grads(losses_fn)(params)
        splits.append(grads.split)
        return grads.gramian()

    seeds = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
    found = jax.jit(jax.vmap(gramian))(seeds)
    assert splits[0].owners == owners_of(of_a, of_b)
    np.testing.assert_allclose(found[1], jax.jit(gramian)(PARAMS), rtol=1e-5)


def test_shapes_do_as_well_as_arrays(problem):
    shapes = jax.eval_shape(lambda p: p, (problem.params, problem.x))
    assert mtjax.parameter_split(problem.losses_fn, *shapes) == mtjax.parameter_split(
        problem.losses_fn, problem.params, problem.x
    )


def test_flags_stay_python_values_beside_shapes():
    def losses_fn(p, scale, *, both):
        return {"a": p["x"] @ scale, "b": (p["x"] if both else p["y"]).sum()}

    scale = jax.ShapeDtypeStruct((3,), jnp.float32)
    split = mtjax.parameter_split(losses_fn, PARAMS, scale, both=False)
    assert split.owners == {"x": ("a",), "y": ("b",), "z": ()}


def test_describe(problem):
    split = mtjax.parameter_split(problem.losses_fn, problem.params, problem.x)
    assert split.describe(problem.params).splitlines() == [
        "parameter     shape   belongs to",
        "heads/a       (8,)    a",
        "heads/b       (8,)    b",
        "heads/c       (8,)    c",
        "of_b_and_c    (2,)    shared by b, c",
        "trunk/bias    (8,)    shared",
        "trunk/kernel  (6, 8)  shared",
        "unused        (3,)    no task (zero update)",
        "shared: 58 parameters in 3 leaves; task-specific: 24 in 3; unused: 3 in 1",
    ]
    shapes = jax.eval_shape(lambda p: p, problem.params)
    assert split.describe(shapes) == split.describe(problem.params)


def test_describe_a_single_array():
    split = mtjax.parameter_split(lambda p: {"a": p.sum(), "b": p[0]}, jnp.ones(2))
    assert split.describe(jnp.ones(2)).splitlines()[1].split() == ["(2,)", "shared"]


def test_labels_choose_optimizers(problem):
    split = mtjax.parameter_split(problem.losses_fn, problem.params, problem.x)
    labels = split.labels()
    assert labels == {
        "trunk": {"kernel": "shared", "bias": "shared"},
        "heads": {"a": "a", "b": "b", "c": "c"},
        "of_b_and_c": "shared",
        "unused": "unused",
    }
    rates = {"shared": 0.0, "a": 1.0, "b": 2.0, "c": 3.0, "unused": 4.0}
    tx = optax.multi_transform({k: optax.scale(r) for k, r in rates.items()}, labels)
    ones = jax.tree.map(jnp.ones_like, problem.params)
    updates, _ = tx.update(ones, tx.init(problem.params))
    expected = jax.tree.map(lambda g, label: g * rates[label], ones, labels)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_label_of_a_leaf_declared_not_shared_that_two_tasks_reach(problem):
    split = mtjax.parameter_split(
        problem.losses_fn, problem.params, problem.x, shared=lambda p: "trunk" in p
    )
    assert not split.shared["of_b_and_c"]
    assert split.labels()["of_b_and_c"] == "shared"


def test_predicate_is_asked_about_paths(problem):
    asked = []

    def shared(path):
        asked.append(path)
        return path.startswith("trunk")

    mtjax.parameter_split(problem.losses_fn, problem.params, problem.x, shared=shared)
    heads = ["heads/a", "heads/b", "heads/c"]
    assert asked == [*heads, "of_b_and_c", "trunk/bias", "trunk/kernel", "unused"]


def test_predicate_restricts_gramian_and_leaves_follow_the_plain_sum(problem):
    grad_fn = mtjax.value_and_task_grads(
        problem.losses_fn, shared=lambda path: path == "trunk/kernel"
    )
    _, grads = grad_fn(problem.params, problem.x)
    per_task = problem.per_task()
    rows = np.stack([np.ravel(g["trunk"]["kernel"]) for g in per_task])
    np.testing.assert_allclose(grads.gramian(), rows @ rows.T, rtol=1e-5)
    update = grads.combine(problem.weights)
    plain = jax.tree.map(lambda *g: sum(g), *per_task)
    np.testing.assert_allclose(update["trunk"]["bias"], plain["trunk"]["bias"], 1e-5)
    np.testing.assert_allclose(update["of_b_and_c"], plain["of_b_and_c"], 1e-5)
    np.testing.assert_allclose(
        update["trunk"]["kernel"].ravel(), problem.weights @ rows, 1e-4, 1e-6
    )


def test_predicate_can_declare_a_head_shared_but_not_an_unused_leaf(problem):
    split = mtjax.parameter_split(
        problem.losses_fn, problem.params, problem.x, shared=lambda path: True
    )
    assert split.shared["heads"] == {"a": True, "b": True, "c": True}
    assert not split.shared["unused"]


def test_predicate_that_selects_nothing_is_an_error(problem):
    with pytest.raises(ValueError, match=r"`shared` declared none.*'heads/a'.* …"):
        mtjax.parameter_split(
            problem.losses_fn, problem.params, problem.x, shared=lambda path: False
        )


def test_single_task_shares_nothing(problem):
    def losses_fn(p, x):
        return {"a": problem.losses_fn(p, x)["a"]}

    _, grads = mtjax.value_and_task_grads(losses_fn, shared=lambda path: False)(
        problem.params, problem.x
    )
    assert not any(jax.tree.leaves(grads.shared))
    np.testing.assert_array_equal(grads.gramian(), [[0.0]])
    update = grads.combine(jnp.array([7.0]))
    jax.tree.map(
        lambda u, g: np.testing.assert_allclose(u, g, rtol=1e-5),
        update,
        problem.per_task()[0],
    )
