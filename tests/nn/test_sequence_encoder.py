"""The transformer over sequences, against NumPy and against padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.sequence_encoder import SequenceEncoder
from tests.nn.plain import float64, relu, softmax

ENCODER = SequenceEncoder(layers=2, heads=2, hidden=6, dropout=0.0, max_length=7)


def drawn(key, batch, length, width=4):
    return jax.random.normal(key, (batch, length, width))


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def norm(params, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * params["scale"] + params["bias"]


def one(params, x):
    """A single sequence without padding."""
    x = x + params["positions"][: len(x)]
    for i in range(2):
        p = params[f"attention_{i}"]
        q, k, v = (dense(p[name], x) for name in ("query", "key", "value"))
        heads = []
        for h in (slice(0, 2), slice(2, 4)):
            heads.append(softmax(q[:, h] @ k[:, h].T / np.sqrt(2)) @ v[:, h])
        attended = dense(p["output"], np.concatenate(heads, axis=1))
        x = norm(params[f"attention_norm_{i}"], x + attended)
        hidden = relu(dense(params[f"mlp_in_{i}"], x))
        x = norm(params[f"mlp_norm_{i}"], x + dense(params[f"mlp_out_{i}"], hidden))
    return x.mean(axis=0)


def test_against_numpy_with_padding_on_any_side(key):
    x = drawn(key, 3, 6)
    mask = jnp.array([[1] * 6, [1] * 4 + [0] * 2, [0] * 3 + [1] * 3], bool)
    variables = jax.jit(ENCODER.init)(key, x, mask)
    # What stands in padding is not read.
    x = jnp.where(mask[..., None], x, jnp.nan)
    found = jax.jit(ENCODER.apply)(variables, x, mask)
    params = float64(variables["params"])
    rows = zip(np.float64(x), np.asarray(mask))
    expected = [one(params, row[there]) for row, there in rows]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)


def test_length_of_padding_and_empty_sequences(key):
    x = drawn(key, 2, 3)
    mask = jnp.array([[True] * 3, [False] * 3])
    variables = jax.jit(ENCODER.init)(key, x, mask)

    @jax.jit
    def value_and_slopes(x, mask):
        pooled = lambda v: ENCODER.apply(v, x, mask)
        total = lambda v: jnp.sum(pooled(v)[0] ** 3) + jnp.sum(pooled(v)[1])
        return pooled(variables), jax.grad(total)(variables)

    found, slopes = value_and_slopes(x, mask)
    wider = lambda a: jnp.pad(a, [(0, 0), (0, 2)] + [(0, 0)] * (a.ndim - 2))
    again, slopes_again = value_and_slopes(wider(x), wider(mask))
    np.testing.assert_allclose(found, again, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[1], 0)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(slopes_again)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_dropout_is_for_training(key):
    encoder = SequenceEncoder(layers=1, heads=1, hidden=3, dropout=0.5, max_length=3)
    x, mask = drawn(key, 2, 3), jnp.ones((2, 3), bool)
    variables = jax.jit(encoder.init)(key, x, mask)
    rngs = {"dropout": jax.random.key(1)}
    apply = jax.jit(encoder.apply, static_argnames="train")
    kept = apply(variables, x, mask)
    dropped = apply(variables, x, mask, train=True, rngs=rngs)
    assert not np.allclose(kept, dropped)


def test_errors(key):
    with pytest.raises(ValueError, match="`max_length` = 7 entries, got 8"):
        jax.eval_shape(ENCODER.init, key, drawn(key, 1, 8), jnp.ones((1, 8), bool))
    narrow = drawn(key, 1, 2, width=3)
    with pytest.raises(ValueError, match="`heads` must divide the width, got 2 and 3"):
        jax.eval_shape(ENCODER.init, key, narrow, jnp.ones((1, 2), bool))
