"""A model of three tasks, small enough to compile in no time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import mtjax

NAMES = ("a", "b", "c")


def params(dtype=jnp.float32, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    tree = {
        "trunk": {"kernel": draw((4, 3)), "bias": 0.1 * draw(3)},
        "heads": {name: draw(3) for name in NAMES},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def batch(size=8, dtype=jnp.float32, seed=1):
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype), {"x": draw((size, 4)), "y": draw((size, 3))}
    )


def losses_fn(params, batch):
    trunk = params["trunk"]
    z = jnp.tanh(batch["x"] @ trunk["kernel"] + trunk["bias"][None, :])
    return {
        name: jnp.mean((z @ params["heads"][name] - batch["y"][:, i]) ** 2)
        for i, name in enumerate(NAMES)
    }


grad_fn = mtjax.value_and_task_grads(losses_fn)


def update(tx, params, state, batch, grad_fn=grad_fn, **extra_args):
    """One update of a chain or a balancer; returns updates and state."""
    losses, grads = grad_fn(params, batch)
    return tx.update(
        grads,
        state,
        params,
        losses=losses,
        losses_fn=functools.partial(losses_fn, batch=batch),
        validation_losses_fn=functools.partial(losses_fn, batch=batch),
        resampled=[grads, grads],
        **extra_args,
    )


def raw(tree):
    """Random keys as plain arrays, so that trees compare bit for bit."""

    def data(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(data, tree)
