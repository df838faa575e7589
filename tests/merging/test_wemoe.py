"""WEMoE: task arithmetic at the start, mixtures by hand, learning."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax import merging
from mtjax.merging.match import named_leaves
from mtjax.merging.wemoe import (
    WEMoEConfig,
    apply_routed,
    fit_routers,
    init_routers,
    router_weights,
    upscale,
    wemoe_loss,
)
from mtjax.nn import MLP, ViT

MODEL = ViT(patch=2, width=8, depth=2, heads=2, hidden=12)
TASKS = ("a", "b", "c")
BLOCKS = ["block_0", "block_1"]
KEY = jax.random.key(0)


def apply_fn(params, images):
    return MODEL.apply({"params": params}, images)


RUN = jax.jit(apply_routed, static_argnums=0)
ALONE = jax.jit(apply_fn)


def head_fn(task, outputs):
    return 4 * outputs[:, : 3 + TASKS.index(task)]


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (4, 4, 4, 1))


@pytest.fixture(scope="module")
def trees(images):
    """A base and models."""
    base = jax.device_get(jax.jit(MODEL.init)(KEY, images)["params"])
    rng = np.random.default_rng(0)
    draw = lambda x: (x + 0.2 * rng.normal(size=x.shape)).astype(np.float32)
    return base, {task: jax.tree.map(draw, base) for task in TASKS}


@pytest.fixture(scope="module")
def experts(trees):
    return upscale(*trees)


def routers_of(experts, images, std, key=KEY):
    return init_routers(apply_fn, experts, images, WEMoEConfig(std=std), key=key)


def test_only_mlps_are_kept_apart(trees, experts):
    base, models = trees
    names = ("mlp_in", "mlp_out")
    expected = [
        f"{b}/{n}/{x}" for b in BLOCKS for n in names for x in ("bias", "kernel")
    ]
    assert sorted(experts.paths) == sorted(expected)
    merged = named_leaves(merging.task_arithmetic(0.3)(base, models))
    start = named_leaves(base)
    for path, leaf in named_leaves(experts.shared).items():
        of = start if path in expected else merged
        np.testing.assert_array_equal(leaf, of[path])
    change = (
        named_leaves(models["b"])["block_1/mlp_in/bias"] - start["block_1/mlp_in/bias"]
    )
    np.testing.assert_allclose(experts.changes["b"]["block_1/mlp_in/bias"], change)


def test_is_task_arithmetic_at_the_start(trees, experts, images):
    expected = ALONE(merging.task_arithmetic(0.3)(*trees), images)
    found, weights = RUN(apply_fn, experts, routers_of(experts, images, 0.0), images)
    chex.assert_trees_all_close(found, expected, atol=1e-5)
    assert list(weights) == BLOCKS
    for rows in weights.values():
        np.testing.assert_allclose(rows, np.full((4, 3), 0.3))
    near, _ = RUN(apply_fn, experts, routers_of(experts, images, 0.01), images)
    assert 0 < jnp.abs(near - expected).max() < 0.05


def test_router_against_numpy():
    rng = np.random.default_rng(3)
    sizes = {"hidden": (5, 5), "hidden_bias": 5, "output": (5, 3), "output_bias": 3}
    router = {k: rng.normal(size=s).astype(np.float32) for k, s in sizes.items()}
    tokens = rng.normal(size=(1, 7, 5)).astype(np.float32)
    hidden = np.maximum(tokens[0] @ router["hidden"] + router["hidden_bias"], 0)
    expected = (hidden @ router["output"] + router["output_bias"]).mean(0)
    found = router_weights(jax.tree.map(jnp.asarray, router), jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_mixed_mlps_are_those_of_merged_parameters(experts, images):
    """With the weights of both blocks known, parameters are merged for an example."""
    routers = routers_of(experts, images, 0.5)
    found, weights = RUN(apply_fn, experts, routers, images)
    assert np.ptp(np.asarray(weights["block_0"]), axis=0).min() > 0.01
    merged = jax.jit(
        lambda first, second: jax.tree.map(
            lambda *parts: jnp.stack(parts),
            *(experts.mixed(w) for w in (first, second)),
        )
    )
    for i in range(2):
        both = merged(*(weights[b][i] for b in BLOCKS))
        params = {
            name: jax.tree.map(lambda x, k=int(name == "block_1"): x[k], part)
            for name, part in both.items()
        }
        expected = ALONE(params, images[i : i + 1])[0]
        np.testing.assert_allclose(found[i], expected, atol=1e-4)


def test_only_routers_learn_and_entropy_falls():
    model, config = MLP((6, 5)), WEMoEConfig(mlps="(?P<block>Dense)_0")
    apply = lambda params, x: model.apply({"params": params}, x)
    pool = {t: np.random.default_rng(i).normal(size=(8, 6)) for i, t in enumerate("ab")}
    pool = {task: x.astype(np.float32) for task, x in pool.items()}
    init = lambda i: model.init(jax.random.key(i), jnp.zeros((1, 6)))["params"]
    experts = upscale(init(0), {"a": init(1), "b": init(2)}, config)
    routers = init_routers(apply, experts, pool["a"], config, key=KEY)
    assert list(routers) == ["Dense"]
    found = fit_routers(
        apply,
        head_fn,
        experts,
        routers,
        (pool for _ in range(15)),
        config,
        steps=15,
        optimizer=optax.adam(0.05),
    )
    total = sum(found.entropies.values())
    assert total.shape == (15,)
    assert total[-1] < total[0] - 0.05
    batch = jax.tree.map(jnp.asarray, pool)
    loss_fn = jax.jit(lambda *args: wemoe_loss(*args, apply, head_fn, config))
    loss, entropies = loss_fn(routers, experts, batch)
    np.testing.assert_allclose(loss, total[0], rtol=1e-4)
    np.testing.assert_allclose(entropies["b"], found.entropies["b"][0], rtol=1e-4)
    moved = jax.tree.map(
        lambda x, y: float(jnp.abs(x - y).max()), found.routers, routers
    )
    assert min(jax.tree.leaves(moved)) > 0


def test_errors(trees, experts, images):
    with pytest.raises(ValueError, match=r"`mlps` must have a group .* got 'mlp'"):
        WEMoEConfig(mlps="mlp")
    config = WEMoEConfig(mlps=r"(?P<block>stage_\d)/")
    with pytest.raises(ValueError, match="`where` must choose at least one"):
        upscale(*trees, config)
    with pytest.raises(
        ValueError, match="`batches` must yield one batch for each of 2"
    ):
        fit_routers(apply_fn, head_fn, experts, {}, [], steps=2)
