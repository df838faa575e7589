"""Twin-Merging: what comes back exactly, compression, routing, storage."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mtjax import merging
from mtjax.merging.experts import Experts
from mtjax.merging.low_rank import LowRank
from mtjax.merging.sparse import Sparse
from mtjax.nn import MLP
from mtjax.systems.twin_merging import (
    Router,
    RouterConfig,
    TaskRouter,
    TwinMergingConfig,
    exclusive_vector,
    fit_router,
    infer,
    route,
    routed_classes,
    twin_merge,
)

TASKS = ("a", "b", "c")
METHODS = ("svd", "magnitude", "bernoulli")
SHAPES = {"bias": (12,), "head": (12, 3), "kernel": (10, 12)}
KEY = jax.random.key(0)


def trees(draw):
    """A base and models, in float32."""
    tree = lambda: {p: jnp.asarray(draw(s), jnp.float32) for p, s in SHAPES.items()}
    return tree(), {task: tree() for task in TASKS}


RNG = np.random.default_rng(0)
BASE, MODELS = trees(lambda shape: RNG.normal(size=shape))
# Sums and differences of these are exact in float32.
WHOLE_BASE, WHOLE = trees(lambda shape: RNG.integers(-8, 9, shape))


def nothing_left_out(method):
    return TwinMergingConfig(rho=0.0, method=method)


# --- What comes back ------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_single_weight_brings_a_model_back(method):
    """Nothing is left out and the weight is that of one task: its model, exactly."""
    twin = twin_merge(
        WHOLE_BASE,
        WHOLE,
        nothing_left_out(method),
        shared=merging.task_arithmetic(0.5),
        where="bias|kernel",
        key=KEY,
    )
    for i, task in enumerate(TASKS):
        found = twin.mixed(jnp.eye(3)[i])
        expected = WHOLE[task] | {"head": WHOLE_BASE["head"]}  # as in the base
        chex.assert_trees_all_equal(found, expected)
    assert set(twin.paths) == {"bias", "kernel"}


def test_equal_weights_on_the_average_bring_the_average_back():
    twin = twin_merge(
        BASE, MODELS, nothing_left_out("svd"), shared=merging.task_arithmetic(1 / 3)
    )
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *MODELS.values())
    chex.assert_trees_all_close(twin.shared, mean, atol=1e-6)
    chex.assert_trees_all_close(twin.mixed(jnp.full(3, 1 / 3)), mean, atol=1e-6)


def test_exclusive_vectors_are_differences_to_the_shared_expert():
    config = nothing_left_out("svd")
    shared = merging.ties(0.3)(BASE, MODELS)
    twin = twin_merge(BASE, MODELS, config, shared=shared)  # from outside
    chex.assert_trees_all_equal(twin.shared, shared)
    of_base = twin_merge(BASE, MODELS, config, shared=merging.task_arithmetic(0.0))
    for task, model in MODELS.items():
        gap = jax.tree.map(lambda x, y: x - y, model, shared)
        chex.assert_trees_all_close(twin.changes[task], gap)
        task_vector = jax.tree.map(lambda x, y: x - y, model, BASE)
        chex.assert_trees_all_close(of_base.changes[task], task_vector)


# --- Compression ----------------------------------------------------------------------


def test_singular_vectors_of_each_leaf():
    twin = twin_merge(BASE, MODELS, TwinMergingConfig(rho=0.7))
    shared = jax.tree.map(
        lambda b, *x: b + 0.3 * sum(m - b for m in x), BASE, *MODELS.values()
    )
    for task, change in twin.changes.items():
        assert isinstance(change["kernel"], LowRank)
        gap = np.asarray(MODELS[task]["kernel"] - shared["kernel"], np.float64)
        found = np.asarray(change["kernel"].dense(), np.float64)
        assert np.linalg.matrix_rank(found, tol=1e-4) == 3  # 30 % of 10
        sizes = np.linalg.svd(gap, compute_uv=False)
        error = np.linalg.norm(found - gap)
        np.testing.assert_allclose(error, np.linalg.norm(sizes[3:]), rtol=1e-5)
        assert change["head"].right.shape == (1, 3)  # never none
        np.testing.assert_allclose(
            change["bias"], MODELS[task]["bias"] - shared["bias"], atol=1e-6
        )
    fixed = exclusive_vector(BASE, MODELS["a"], TwinMergingConfig(rank=2))
    assert fixed["kernel"].right.shape == (2, 12)


def test_the_largest_elements_of_each_leaf():
    change = exclusive_vector(BASE, MODELS["a"], TwinMergingConfig(0.9, "magnitude"))
    gap = np.asarray(MODELS["a"]["kernel"] - BASE["kernel"])
    assert isinstance(change["kernel"], Sparse)
    assert len(change["kernel"].values) == 12  # of 120
    expected = np.where(np.abs(gap) >= np.sort(np.abs(gap), axis=None)[-12], gap, 0)
    np.testing.assert_array_equal(change["kernel"].dense(), expected)
    np.testing.assert_allclose(change["bias"], MODELS["a"]["bias"] - BASE["bias"])


def test_random_elements_are_right_on_average():
    base = {"w": jnp.zeros((8, 8))}
    model = {"w": jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32)}
    config = TwinMergingConfig(0.9, "bernoulli")
    draw = lambda i: exclusive_vector(
        base, model, config, key=jax.random.fold_in(KEY, i)
    )["w"].dense()
    number = 300
    drawn = np.stack([draw(i) for i in range(number)]).astype(np.float64)
    expected = np.asarray(model["w"], np.float64)
    kept = drawn != 0
    np.testing.assert_allclose(
        drawn[kept], np.broadcast_to(10 * expected, drawn.shape)[kept], rtol=1e-3
    )
    # The standard deviation of a mean of `number` draws, five times.
    bound = 5 * np.abs(expected) * np.sqrt(0.9 / 0.1 / number)
    assert (np.abs(drawn.mean(0) - expected) < bound).all()


def test_every_task_draws_its_own_elements_whatever_others_there_are():
    config = TwinMergingConfig(0.5, "bernoulli")
    same = dict.fromkeys(TASKS, MODELS["a"])
    of = lambda models: twin_merge(BASE, models, config, shared=BASE, key=KEY)
    every, one = of(same), of({"b": same["b"]})
    chex.assert_trees_all_equal(every.changes["b"], one.changes["b"])
    zeros = np.asarray(every.rows("kernel")) == 0
    assert (zeros[0] != zeros[1]).mean() > 0.3
    with pytest.raises(ValueError, match="`key` must be given"):
        exclusive_vector(BASE, MODELS["a"], config)


def test_storage():
    size = sum(x.nbytes for x in BASE.values())
    twin = twin_merge(BASE, MODELS, TwinMergingConfig(0.8))
    # Ranks 2 and 1 (never none), a plain bias, for each of three tasks.
    assert twin.nbytes == size + 3 * 4 * (2 * (10 + 12) + (12 + 3) + 12)
    # The rank of a half takes as much as the leaf itself, or more: kept as an array.
    half = exclusive_vector(BASE, MODELS["a"], TwinMergingConfig(rank=7))
    assert half["kernel"].shape == (10, 12)
    assert np.linalg.matrix_rank(np.asarray(half["kernel"]), tol=1e-4) == 7


# --- Router ---------------------------------------------------------------------------


def clusters(seed, number=40, spread=0.3):
    """Features of tasks around points that are far from each other."""
    rng = np.random.default_rng(seed)
    return {
        task: (2 * np.eye(3, 6)[i] + spread * rng.normal(size=(number, 6))).astype(
            np.float32
        )
        for i, task in enumerate(TASKS)
    }


@pytest.fixture(scope="module")
def router():
    config = RouterConfig(epochs=20, batch_size=30, learning_rate=3e-3)
    return fit_router(clusters(0), clusters(1), config, key=KEY)


def test_router_finds_the_task(router):
    assert router.tasks == TASKS
    assert router.accuracies.shape == (20,)
    assert router.accuracies.max() > 0.95
    for i, task in enumerate(TASKS):
        weights = route(router, jnp.asarray(clusters(2)[task]))
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
        assert (weights.argmax(axis=1) == i).mean() > 0.9


def test_weights_are_the_softmax_of_the_logits_once(router):
    x = jnp.asarray(clusters(2)["a"])
    logits = np.asarray(Router(3).apply(router.variables, x), np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(route(router, x), expected, rtol=1e-4)


def test_an_input_is_routed_by_itself(router):
    x = jnp.asarray(clusters(3)["b"])
    alone = jnp.concatenate([route(router, x[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(alone, route(router, x)[:3], rtol=1e-5)


def test_the_best_epoch_is_kept(router):
    held_out = clusters(1)
    right = [
        route(router, jnp.asarray(held_out[t])).argmax(axis=1) == i
        for i, t in enumerate(TASKS)
    ]
    np.testing.assert_allclose(np.mean(right), router.accuracies.max(), rtol=1e-6)


def test_only_the_first_examples_are_looked_at():
    config = RouterConfig(epochs=2, batch_size=30, most=20)
    few = {task: x[:20] for task, x in clusters(0).items()}
    found = [fit_router(x, clusters(1), config, key=KEY) for x in (few, clusters(0))]
    chex.assert_trees_all_equal(*found)


# --- Inference ------------------------------------------------------------------------

MODEL = MLP((6, 5))


def apply_fn(params, x):
    return MODEL.apply({"params": params}, x)


@pytest.fixture(scope="module")
def twin():
    init = lambda i: MODEL.init(jax.random.key(i), jnp.zeros((1, 6)))["params"]
    models = {task: init(i + 1) for i, task in enumerate(TASKS)}
    return twin_merge(init(0), models, TwinMergingConfig(0.5))


def test_tasks_mixed_in_a_batch_come_out_as_one_by_one(twin, router):
    inputs = jnp.asarray(np.concatenate([x[:2] for x in clusters(4).values()]))
    # The router sees the inputs themselves.
    run = jax.jit(lambda x: infer(apply_fn, twin, router, x, lambda _, x: x))
    outputs, weights = run(inputs)
    np.testing.assert_allclose(weights, route(router, inputs), rtol=1e-5)
    for x, w, y in zip(inputs, weights, outputs):
        expected = apply_fn(twin.mixed(w), x[None])[0]
        np.testing.assert_allclose(y, expected, atol=1e-5)


def test_by_default_the_router_sees_what_the_shared_expert_says(twin):
    inputs = jax.tree.map(jnp.asarray, clusters(0))
    seen = {task: apply_fn(twin.shared, x) for task, x in inputs.items()}
    config = RouterConfig(epochs=2, batch_size=30)
    router = fit_router(seen, seen, config, key=KEY)
    _, weights = infer(apply_fn, twin, router, inputs["b"])
    np.testing.assert_allclose(weights, route(router, seen["b"]), rtol=1e-4)


def test_a_single_expert_needs_no_router(twin):
    x = jnp.asarray(clusters(5)["a"])
    outputs, weights = infer(apply_fn, twin.subset(["b"]), None, x)
    np.testing.assert_array_equal(weights, np.ones((len(x), 1)))
    expected = apply_fn(twin.mixed(jnp.array([0.0, 1.0, 0.0])), x)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_heads_are_chosen_by_the_largest_weight():
    logits = {"b": jnp.array([[0.0, 3.0], [1.0, 0.0]]), "a": jnp.eye(2, 3)}
    weights = jnp.array([[0.9, 0.1], [0.4, 0.6]])
    chosen, classes = routed_classes(logits, weights)
    np.testing.assert_array_equal(chosen, [0, 1])
    np.testing.assert_array_equal(classes, [0, 0])


# --- Storage and errors ---------------------------------------------------------------


def test_experts_and_router_survive_orbax(twin, router, tmp_path):
    folder = tmp_path / "twin"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, {"arrays": twin.arrays(), "router": router.variables})
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.restore(folder)
    again = Experts.from_arrays(stored["arrays"])
    chex.assert_trees_all_equal(again, twin)
    whole = TaskRouter(stored["router"], router.accuracies, again.tasks)
    x = jnp.asarray(clusters(6)["c"])
    np.testing.assert_array_equal(route(whole, x), route(router, x))


def test_errors(twin, router):
    with pytest.raises(ValueError, match=r"`rho` must be in \[0, 1\), got 1.0"):
        TwinMergingConfig(1.0)
    with pytest.raises(ValueError, match=r"`rank` must be at least 1 .* got 2"):
        TwinMergingConfig(method="magnitude", rank=2)
    with pytest.raises(ValueError, match=r"`epochs`, .* must be at least 1, got"):
        RouterConfig(epochs=0)
    with pytest.raises(ValueError, match=r"the same tasks, at least two, got \['a'\]"):
        fit_router({"a": clusters(0)["a"]}, {"a": clusters(0)["a"]}, key=KEY)
    some = twin.subset("ac")
    with pytest.raises(ValueError, match=r"trained for \('a', 'c'\), got \('a', 'b'"):
        infer(apply_fn, some, router, jnp.ones((2, 6)))
    with pytest.raises(ValueError, match=r"trained for \('a', 'c'\), got None"):
        infer(apply_fn, some, None, jnp.ones((2, 6)))
    other = MODELS | {"b": {"bias": jnp.zeros(12)}}
    with pytest.raises(ValueError, match="`models` must match the base"):
        twin_merge(BASE, other)
