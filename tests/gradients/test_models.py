"""Any pytree of parameters will do: Linen, NNX, dataclasses, dicts."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mtjax


@pytest.fixture
def x(key):
    return jax.random.normal(key, (8, 4))


def losses_of(z, labels):
    return {"mean": jnp.mean((z[0] - labels) ** 2), "max": jnp.mean(jnp.abs(z[1]))}


def check(losses_fn, params, x):
    """The views equal those of `jax.grad`, and a jitted optax step runs."""
    grad_fn = mtjax.value_and_task_grads(losses_fn)
    tx = optax.adam(0.1)

    @jax.jit
    def step(params, opt_state, x):
        losses, grads = grad_fn(params, x)
        update = grads.combine([2.0, 0.5])
        updates, opt_state = tx.update(update, opt_state, params)
        return losses, optax.apply_updates(params, updates), update, grads.stack()

    losses, new_params, update, stack = step(params, tx.init(params), x)
    chex.assert_trees_all_equal_structs(new_params, params)
    split = mtjax.parameter_split(losses_fn, params, x)
    expected = jax.jit(jax.jacrev(losses_fn))(params, x)
    assert tuple(losses) == tuple(sorted(expected)) == split.tasks
    rows = jax.tree.map(lambda *g: jnp.stack(g), *expected.values())
    chex.assert_trees_all_close(stack, rows, rtol=1e-5, atol=1e-6)
    combined = jax.tree.map(
        lambda s, a, b: 2 * a + 0.5 * b if s else a + b,
        split.shared,
        *expected.values(),
    )
    chex.assert_trees_all_close(update, combined, rtol=1e-5, atol=1e-6)
    return split


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        z = nn.LayerNorm()(nn.relu(nn.Dense(5, name="trunk")(x)))
        return nn.Dense(1, name="left")(z), nn.remat(nn.Dense)(2, name="right")(z)


def test_linen(key, x):
    net = LinenNet()
    params = jax.jit(net.init)(key, x)["params"]

    def losses_fn(params, x):
        return losses_of(net.apply({"params": params}, x), x[:, :1])

    split = check(losses_fn, params, x)
    labels = split.labels()
    assert set(jax.tree.leaves(labels["trunk"])) == {"shared"}
    assert set(jax.tree.leaves(labels["LayerNorm_0"])) == {"shared"}
    assert set(jax.tree.leaves(labels["left"])) == {"mean"}
    assert set(jax.tree.leaves(labels["right"])) == {"max"}
    assert "right/kernel" in split.describe(params)


class LinenNetWithStatistics(nn.Module):
    @nn.compact
    def __call__(self, x):
        z = nn.BatchNorm(use_running_average=False)(nn.Dense(5)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(z)), nn.Dense(1)(z)


def test_linen_with_batch_statistics_and_dropout(key, x):
    net = LinenNetWithStatistics()
    variables = jax.jit(net.init)({"params": key, "dropout": key}, x)

    def losses_fn(params, batch_stats, x, dropout_key):
        z, mutated = net.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        return losses_of(z, x[:, :1]), mutated["batch_stats"]

    grad_fn = mtjax.value_and_task_grads(losses_fn, has_aux=True)

    @jax.jit
    def step(params, stats, x, key):
        (losses, stats), grads = grad_fn(params, stats, x, key)
        return losses, stats, grads.combine(jnp.ones(2))

    stats = variables["batch_stats"]
    losses, new_stats, update = step(variables["params"], stats, x, key)
    chex.assert_trees_all_equal_structs(new_stats, stats)
    expected = jax.jit(
        jax.grad(lambda p: sum(losses_fn(p, stats, x, key)[0].values()))
    )(variables["params"])
    chex.assert_trees_all_close(update, expected, rtol=1e-4, atol=1e-5)
    assert set(losses) == {"mean", "max"}


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.trunk = nnx.Linear(4, 5, rngs=rngs)
        self.left = nnx.Linear(5, 1, rngs=rngs)
        self.right = nnx.Linear(5, 2, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        z = jnp.tanh(self.trunk(x))
        return self.left(z), self.right(z)


def test_nnx_split(x):
    graph, params, rest = nnx.split(NNXNet(nnx.Rngs(0)), nnx.Param, ...)

    def losses_fn(params, x):
        return losses_of(nnx.merge(graph, params, rest)(x), x[:, :1])

    split = check(losses_fn, params, x)
    table = split.describe(params)
    rows = {line.split()[0]: line.split()[-1] for line in table.splitlines()}
    assert rows["trunk/kernel/value"] == "shared", table
    assert rows["left/kernel/value"] == "mean", table
    assert rows["right/bias/value"] == "max", table
    labels = split.labels()
    tx = optax.multi_transform(
        {"shared": optax.scale(1.0), "mean": optax.scale(2.0), "max": optax.scale(3.0)},
        labels,
    )
    updates, _ = tx.update(params, tx.init(params))
    chex.assert_trees_all_close(
        updates["left"], jax.tree.map(lambda p: 2 * p, params["left"])
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Affine:
    kernel: jax.Array
    bias: jax.Array | None
    name: str = dataclasses.field(metadata={"static": True})

    def __call__(self, x):
        y = x @ self.kernel
        return y if self.bias is None else y + self.bias[None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Net:
    """As Equinox modules are: the model is its own tree of parameters."""

    trunk: list[Affine]
    left: Affine
    right: Affine

    def __call__(self, x):
        for layer in self.trunk:
            x = jnp.tanh(layer(x))
        return self.left(x), self.right(x)


def test_model_that_is_a_pytree(x):
    net = Net(
        trunk=[Affine(jnp.ones((4, 4)) / 2, jnp.ones(4), "first")],
        left=Affine(jnp.ones((4, 1)), None, "left"),
        right=Affine(jnp.ones((4, 2)), jnp.zeros(2), "right"),
    )
    split = check(lambda net, x: losses_of(net(x), x[:, :1]), net, x)
    assert split.owners.trunk[0].kernel == ("max", "mean")
    assert split.shared.trunk[0].bias
    assert split.owners.left.kernel == ("mean",)
    assert split.labels().right.bias == "max"
    assert "trunk/0/kernel" in split.describe(net)


def test_rnn_by_scan(key, x):
    """One task reads the last state, the other every output; remat inside."""
    params = {
        "in": jax.random.normal(key, (4, 3)),
        "hidden": jax.random.normal(key, (3, 3)) / 2,
        "emit": jnp.ones(3),
        "last": jnp.ones(3),
    }

    def losses_fn(params, x):
        @jax.checkpoint
        def cell(h, x):
            h = jnp.tanh(h @ params["hidden"] + x @ params["in"])
            return h, h @ params["emit"]

        h, outputs = jax.lax.scan(cell, jnp.zeros(3), x)
        return {"every": jnp.mean(outputs**2), "last": (h @ params["last"]) ** 2}

    split = check(losses_fn, params, x)
    assert split.labels() == {
        "in": "shared",
        "hidden": "shared",
        "emit": "every",
        "last": "last",
    }


def test_convolutions(key, pullbacks):
    params = {
        "kernel": jax.random.normal(key, (3, 3, 2, 4)),
        "a": jnp.ones(4),
        "b": jnp.ones(4),
    }
    images = jax.random.normal(key, (2, 6, 6, 2))

    def losses_fn(params, x):
        z = jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        z = jax.nn.relu(z).mean((1, 2))
        return {task: jnp.mean((z @ params[task]) ** 2) for task in "ab"}

    split = check(losses_fn, params, images)
    assert split.labels() == {"kernel": "shared", "a": "a", "b": "b"}


def test_tied_weights_are_shared(x):
    """An embedding that is also one task's output layer."""
    params = {"embed": jnp.ones((4, 3)), "own": jnp.ones(3)}

    def losses_fn(params, x):
        z = x @ params["embed"]
        return {
            "language": jnp.mean((z @ params["embed"].T - x) ** 2),
            "label": jnp.mean(z @ params["own"]),
        }

    split = mtjax.parameter_split(losses_fn, params, x)
    assert split.owners == {"embed": ("label", "language"), "own": ("label",)}
    np.testing.assert_array_equal(split.shared["embed"], True)
