"""Vectors of sequences; padding and empty sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn import (
    SelfAttentionPooling,
    TargetAttention,
    TargetMultiHeadAttention,
    mean_pool,
)
from tests.nn import plain

HISTORY = jax.random.normal(jax.random.key(1), (4, 5, 6))
TARGET = jax.random.normal(jax.random.key(2), (4, 6))
# Padding on the right, on the left, none, and nothing but padding.
MASK = jnp.array(
    [
        [True, True, True, False, False],
        [False, False, True, True, True],
        [True] * 5,
        [False] * 5,
    ]
)
POOLS = {
    "mean": None,
    "din": TargetAttention(hidden=(7, 3)),
    "din_softmax": TargetAttention(softmax=True),
    "target_heads": TargetMultiHeadAttention(3),
    "self": SelfAttentionPooling(2),
    "self_wider": SelfAttentionPooling(2, width=8),
}


@functools.cache
def variables_of(name):
    """Random parameters, biases too."""
    pool = POOLS[name]
    if pool is None:
        return {"params": {}}
    variables = jax.jit(pool.init)(jax.random.key(0), *arguments(name))
    noise = lambda p: p + 0.3 * np.random.default_rng(0).normal(size=p.shape)
    return jax.tree.map(lambda p: jnp.asarray(noise(p), p.dtype), variables)


def arguments(name, history=HISTORY, mask=MASK):
    if name.startswith(("din", "target")):
        return history, TARGET, mask
    return history, mask


def run(name, variables, *args):
    pool = POOLS[name]
    return mean_pool(*args) if pool is None else pool.apply(variables, *args)


@functools.cache
def pooled(name):
    return jax.jit(functools.partial(run, name))


def attend(params, queries, entries, heads):
    """Multi-head attention of one example, head by head."""
    out = 0
    for i in range(heads):
        q, k, v = (
            x @ params[part]["kernel"][:, i]
            for part, x in (("query", queries), ("key", entries), ("value", entries))
        )
        weights = plain.softmax(q @ k.T / np.sqrt(q.shape[1]))
        out += weights @ v @ params["out"]["kernel"][i]
    return out


def expected(name, params, entries, target):
    if name == "mean":
        return entries.mean(0)
    if name.startswith("din"):
        q = np.broadcast_to(target, entries.shape)
        x = np.concatenate([q, entries, q - entries, q * entries], axis=1)
        weights = plain.tower(params, x)
        return (plain.softmax(weights) if "softmax" in name else weights) @ entries
    attention = params["attention"]
    if name == "target_heads":
        return attend(attention, target[None], entries, 3)[0]
    y = attend(attention, entries, entries, 2)
    return (y if name == "self_wider" else y + entries).mean(0)


@pytest.mark.parametrize("name", POOLS)
def test_only_entries_count(name):
    variables = variables_of(name)
    found = pooled(name)(variables, *arguments(name))
    params = plain.float64(variables["params"])
    for i in range(3):
        entries = np.float64(HISTORY[i])[np.asarray(MASK[i])]
        np.testing.assert_allclose(
            found[i],
            expected(name, params, entries, np.float64(TARGET[i])),
            rtol=1e-4,
            atol=1e-5,
        )
    np.testing.assert_array_equal(found[3], 0.0)
    # Whatever padding holds, also what is no number.
    for filled in (1e30, jnp.nan, jnp.inf):
        history = jnp.where(MASK[..., None], HISTORY, filled)
        other = pooled(name)(variables, *arguments(name, history))
        np.testing.assert_array_equal(other, found)


@pytest.mark.parametrize("name", POOLS)
def test_gradients_are_finite_and_none_goes_to_padding(name):
    def loss(variables, history):
        return jnp.sum(run(name, variables, *arguments(name, history)) ** 2)

    for filled in (0.0, jnp.inf):
        history = jnp.where(MASK[..., None], HISTORY, filled)
        grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables_of(name), history)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        moved = np.abs(grads[1]).max(-1) > 0
        np.testing.assert_array_equal(moved, MASK)


@pytest.mark.parametrize("name", POOLS)
def test_more_padding_changes_nothing(name):
    found = pooled(name)(variables_of(name), *arguments(name))
    history = jnp.pad(HISTORY, [(0, 0), (2, 3), (0, 0)], constant_values=5.0)
    mask = jnp.pad(MASK, [(0, 0), (2, 3)])
    longer = run(name, variables_of(name), *arguments(name, history, mask))
    np.testing.assert_allclose(longer, found, rtol=1e-5, atol=1e-6)


def test_softmax_weights_of_equal_entries_are_equal():
    """With softmax the pool of equal entries is the entry, without it a multiple."""
    history = jnp.broadcast_to(TARGET[:, None], HISTORY.shape)
    found = pooled("din_softmax")(
        variables_of("din_softmax"), *arguments("din_softmax", history)
    )
    np.testing.assert_allclose(found[:3], TARGET[:3], rtol=1e-5)
    found = pooled("din")(variables_of("din"), *arguments("din", history))
    ratio = np.asarray(found[:3] / TARGET[:3])
    np.testing.assert_allclose(ratio, ratio[:, :1] * np.ones((1, 6)), rtol=1e-4)
    assert (np.abs(ratio - 1) > 0.01).all()


@pytest.mark.parametrize("heads", [0, 4])
def test_heads_divide_the_width(heads):
    with pytest.raises(ValueError, match="`width` must be a multiple of `num_heads`"):
        SelfAttentionPooling(heads).init(jax.random.key(0), HISTORY, MASK)
