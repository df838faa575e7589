"""The decoder: its formula, caches, padding, causality, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn.decoder import Decoder, rotate

MODEL = Decoder(vocab=11, width=8, depth=2, heads=2, hidden=12)


@jax.jit
def read(params, tokens, mask=None):
    return MODEL.apply({"params": params}, tokens, mask)


advance = jax.jit(MODEL.advance)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(11, size=(3, 7)), jnp.int32)


@pytest.fixture(scope="module")
def params(tokens):
    params = jax.jit(MODEL.init)(jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(1)
    # Biases and scales are not left at 0 and 1, so that none can be forgotten.
    noise = lambda x: x + 0.1 * jnp.asarray(rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(noise, params)


@pytest.fixture(scope="module")
def whole(params, tokens):
    return read(params, tokens)


def in_float64(params, row, heads=2):
    """One sequence, position by position, without a cache and without JAX."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    dense = lambda q, x: x @ q["kernel"] + q["bias"]

    def norm(q, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * q["scale"] + q["bias"]

    def gelu(x):
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def turned(x, position):
        pairs = x.reshape(2, -1)
        speeds = 10_000.0 ** (-np.arange(pairs.shape[1]) / pairs.shape[1])
        numbers = (pairs[0] + 1j * pairs[1]) * np.exp(1j * position * speeds)
        return np.concatenate([numbers.real, numbers.imag])

    x = p["embed"]["embedding"][row]
    size = x.shape[1] // heads
    for i in range(2):
        q = p[f"block_{i}"]
        h = norm(q["norm_attention"], x)
        query, key, value = (dense(q[name], h) for name in ("query", "key", "value"))
        mixed = np.zeros_like(x)
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            for m in range(len(row)):
                at = turned(query[m, own], m)
                scores = [at @ turned(key[n, own], n) for n in range(m + 1)]
                weights = np.exp(np.array(scores) / np.sqrt(size))
                mixed[m, own] = weights / weights.sum() @ value[: m + 1, own]
        x = x + dense(q["output"], mixed)
        x = x + dense(q["mlp_out"], gelu(dense(q["mlp_in"], norm(q["norm_mlp"], x))))
    return norm(p["norm"], x) @ p["output"]["kernel"]


def test_logits_by_hand(params, tokens, whole):
    expected = np.stack([in_float64(params, np.asarray(row)) for row in tokens])
    np.testing.assert_allclose(whole, expected, atol=1e-5)


@pytest.mark.parametrize("pieces", [[1] * 7, [4, 3], [6, 1]])
def test_reading_piece_by_piece(params, tokens, whole, pieces):
    cache, found, begin = MODEL.start(3, 9), [], 0
    for piece in pieces:
        part = tokens[:, begin : begin + piece]
        logits, cache = advance(params, cache, part)
        found.append(logits)
        begin += piece
    chex.assert_trees_all_close(jnp.concatenate(found, axis=1), whole, atol=1e-5)
    assert int(cache.used) == 7
    np.testing.assert_array_equal(cache.valid.sum(axis=1), 7)


def test_padding_changes_nothing_wherever_it_stands(params, tokens, whole):
    # Padding before, between and behind the tokens of three sequences.
    places = np.array([[3, 4, 5, 6, 7, 8, 9], [0, 1, 3, 4, 6, 7, 9], range(7)])
    rows = np.arange(3)[:, None]
    padded = np.full((3, 10), 5, np.int32)
    mask = np.zeros((3, 10), bool)
    padded[rows, places], mask[rows, places] = tokens, True
    logits = read(params, jnp.asarray(padded), jnp.asarray(mask))
    np.testing.assert_allclose(logits[rows, places], whole, atol=1e-5)
    padded[~mask] = 2
    again = read(params, jnp.asarray(padded), jnp.asarray(mask))
    np.testing.assert_array_equal(again[rows, places], logits[rows, places])
    # And piece by piece.
    first, cache = advance(
        params, MODEL.start(3, 10), jnp.asarray(padded[:, :4]), jnp.asarray(mask[:, :4])
    )
    last, _ = advance(
        params, cache, jnp.asarray(padded[:, 4:]), jnp.asarray(mask[:, 4:])
    )
    again = jnp.concatenate([first, last], axis=1)
    np.testing.assert_allclose(again[rows, places], whole, atol=1e-5)


def test_the_future_is_not_seen(params, tokens, whole):
    other = tokens.at[:, 4].add(1) % 11
    found = read(params, other)
    np.testing.assert_array_equal(found[:, :4], whole[:, :4])
    assert (jnp.abs(found[:, 4:] - whole[:, 4:]).max(axis=(0, 2)) > 1e-4).all()


def test_products_depend_on_the_distance(key):
    query, key_ = jax.random.normal(key, (2, 1, 1, 1, 6))
    at = lambda m, n: jnp.sum(
        rotate(query, jnp.array([[m]])) * rotate(key_, jnp.array([[n]]))
    )
    np.testing.assert_allclose(at(9, 5), at(104, 100), atol=1e-4)
    assert abs(at(9, 5) - at(9, 6)) > 1e-3


def test_kernels_are_matrices_in_numbered_blocks(params):
    assert {"block_0", "block_1", "embed", "norm", "output"} == set(params)
    assert max(leaf.ndim for leaf in jax.tree.leaves(params)) == 2
    assert params["block_1"]["mlp_in"]["kernel"].shape == (8, 12)


def test_heads_must_fit():
    for heads in (3, 8):  # 8 / 8 is not an even number
        with pytest.raises(ValueError, match=f"`heads` must divide .* got {heads} and"):
            Decoder(width=8, heads=heads).init(
                jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
            )
