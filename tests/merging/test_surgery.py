"""Representation surgery: nothing at first, then nearer to the tasks' own features."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax.merging.surgery import fit_surgery, init_surgery, operate, surgery_loss

RNG = np.random.default_rng(0)
MERGED = {"w": RNG.normal(size=(5, 6)).astype(np.float32)}
MODELS = {
    t: {"w": (MERGED["w"] + 0.5 * RNG.normal(size=(5, 6))).astype(np.float32)}
    for t in "ba"
}


def features(params, x):
    return jax.nn.relu(x @ params["w"])


def batch(seed):
    rng = np.random.default_rng(seed)
    return {task: rng.normal(size=(32, 5)).astype(np.float32) for task in MODELS}


def test_nothing_changes_at_the_start():
    start = init_surgery(["b", "a"], width=6, rank=2, key=jax.random.key(0))
    assert start["a"]["down"].shape == (6, 2)
    z = jnp.asarray(RNG.normal(size=(3, 6)), jnp.float32)
    np.testing.assert_array_equal(operate(start["a"], z), z)
    assert not np.array_equal(start["a"]["down"], start["b"]["down"])


def test_against_numpy():
    down, up = RNG.normal(size=(6, 3)), RNG.normal(size=(3, 6))
    z, own = RNG.normal(size=(4, 6)), RNG.normal(size=(4, 6))
    expected = z - np.maximum(z @ down, 0) @ up
    down, up, z, own = (jnp.asarray(x, jnp.float32) for x in (down, up, z, own))
    bottleneck = {"down": down, "up": up}
    np.testing.assert_allclose(operate(bottleneck, z), expected, atol=1e-5)
    parts = {"a": z, "b": z}
    loss, gaps = surgery_loss(
        {"a": bottleneck, "b": bottleneck}, parts, {"a": own, "b": z}
    )
    expected_gap = np.abs(expected - np.asarray(own)).mean()
    np.testing.assert_allclose(gaps["a"], expected_gap, rtol=1e-4)
    np.testing.assert_allclose(loss, gaps["a"] + gaps["b"], rtol=1e-5)


def test_features_come_nearer_to_those_of_the_own_model():
    start = init_surgery([*MODELS], width=6, rank=4, key=jax.random.key(0))
    stream = (batch(i) for i in range(150))
    found = fit_surgery(
        features, MERGED, MODELS, start, stream, steps=150, optimizer=optax.adam(0.01)
    )
    new = batch(1000)  # not seen
    for task, x in new.items():
        z, own = features(MERGED, x), features(MODELS[task], x)
        before = jnp.abs(z - own).mean()
        after = jnp.abs(operate(found.bottlenecks[task], z) - own).mean()
        assert after < 0.9 * before
        first = batch(0)[task]
        gap = jnp.abs(features(MERGED, first) - features(MODELS[task], first)).mean()
        np.testing.assert_allclose(found.gaps[task][0], gap, rtol=1e-4)
        assert found.gaps[task].shape == (150,)


def test_errors():
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        init_surgery(["a"], 4, 0, key=jax.random.key(0))
    with pytest.raises(
        ValueError, match="`batches` must yield one batch for each of 9"
    ):
        fit_surgery(features, MERGED, MODELS, {}, [], steps=9)
