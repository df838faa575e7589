"""Tip-Adapter by hand; the blended probe never climbs and finds what it can."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax.nn.cache_adapter import blended_probe, cache_logits, cache_of

RNG = np.random.default_rng(0)
SHOTS = RNG.normal(size=(12, 6)).astype(np.float32)
LABELS = np.arange(12, dtype=np.int32) % 3
KERNEL = jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)


def test_cache_logits_against_numpy():
    x = RNG.normal(size=(5, 6)).astype(np.float32)
    cache = cache_of(jnp.array(SHOTS), jnp.array(LABELS), 3)
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)
    cosines = unit(np.float64(x)) @ unit(np.float64(SHOTS)).T
    expected = 2.0 * np.exp(-4.0 * (1 - cosines)) @ np.eye(3)[LABELS]
    found = cache_logits(jnp.array(x), cache, alpha=2.0, beta=4.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # A shot itself counts most for its label.
    own = cache_logits(jnp.array(SHOTS), cache, beta=50.0)
    np.testing.assert_array_equal(own.argmax(1), LABELS)


def test_keys_can_be_trained():
    cache = cache_of(jnp.array(SHOTS), jnp.array(LABELS), 3)
    x = jnp.array(RNG.normal(size=(30, 6)).astype(np.float32))
    y = jnp.array(RNG.integers(3, size=30))

    def loss(keys):
        logits = cache_logits(x, cache._replace(keys=keys), alpha=5.0)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    step = jax.jit(jax.value_and_grad(loss))
    keys, first = cache.keys, loss(cache.keys)
    for _ in range(50):
        _, slopes = step(keys)
        keys = keys - 0.5 * slopes
    assert loss(keys) < 0.9 * first


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e-3])
def test_the_probe_never_climbs(scale):
    found = blended_probe(jnp.array(scale * SHOTS), jnp.array(LABELS), KERNEL)
    losses = np.asarray(found.losses, np.float64)
    assert losses.shape == (301,)
    assert (np.diff(losses) <= 1e-6 * losses[:-1] + 1e-7).all()
    assert losses[-1] < 0.5 * losses[0]


def test_the_probe_starts_at_the_classifier():
    one = blended_probe(jnp.array(SHOTS), jnp.array(LABELS), KERNEL, steps=1)
    logits = np.float64(SHOTS) @ np.float64(KERNEL)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    start = -log_p[np.arange(12), LABELS].mean()
    assert one.losses[0] == pytest.approx(start, rel=1e-5)
    # One step of each block, with step sizes from the data.
    p, f = np.exp(log_p), np.float64(SHOTS)
    slope = f.T @ (p - np.eye(3)[LABELS]) / 12
    step = 1 / (np.linalg.eigvalsh(f.T @ f / 12).max() / 2)
    np.testing.assert_allclose(one.probe, -step * slope, rtol=1e-3, atol=1e-5)
    logits = logits + f @ (-step * slope)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    similar = f @ np.float64(KERNEL)
    slope = (similar * (p - np.eye(3)[LABELS])).mean(0)
    expected = 1 - slope / ((similar**2).mean(0) / 2)
    np.testing.assert_allclose(one.blend, expected, rtol=1e-3)
    whole = one.probe + KERNEL * one.blend[None]
    np.testing.assert_allclose(one.kernel, whole, rtol=1e-6)


def test_features_of_zero_stay():
    found = blended_probe(jnp.zeros((3, 6)), jnp.array([0, 1, 2]), KERNEL, steps=2)
    np.testing.assert_array_equal(found.kernel, KERNEL)


def test_errors():
    cache = cache_of(jnp.array(SHOTS), jnp.array(LABELS), 3)
    with pytest.raises(ValueError, match="`alpha` must not be negative and `beta`"):
        cache_logits(jnp.array(SHOTS), cache, beta=0.0)
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        blended_probe(jnp.array(SHOTS), jnp.array(LABELS), KERNEL, steps=0)
