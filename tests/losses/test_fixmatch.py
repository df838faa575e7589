"""FixMatch: by hand, known labels, adaptive threshold, where gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.losses.fixmatch import fixmatch_loss

RNG = np.random.default_rng(0)
WEAK = (3 * RNG.normal(size=(40, 5))).astype(np.float32)
STRONG = RNG.normal(size=(40, 5)).astype(np.float32)
LABELS = np.where(np.arange(40) % 4 == 0, np.arange(40) % 5, -1).astype(np.int32)


def expected(threshold, labels=None, over="batch"):
    p = np.exp(np.float64(WEAK))
    p /= p.sum(1, keepdims=True)
    confidence, guesses = p.max(1), p.argmax(1)
    used = confidence >= (confidence.mean() if threshold is None else threshold)
    if labels is not None:
        guesses = np.where(labels >= 0, labels, guesses)
        used = used | (labels >= 0)
    log_p = np.float64(STRONG) - np.log(np.exp(np.float64(STRONG)).sum(1))[:, None]
    losses = -log_p[np.arange(40), guesses]
    assert 0 < used.sum() < 40 or threshold in (0.0, 1.0)
    return (used * losses).sum() / (40 if over == "batch" else max(used.sum(), 1))


@pytest.mark.parametrize("over", ["batch", "used"])
@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("threshold", [0.0, 0.8, 1.0, None])
def test_against_numpy(threshold, labels, over):
    known = None if labels is None else jnp.array(labels)
    weak, strong = jnp.array(WEAK), jnp.array(STRONG)
    found = fixmatch_loss(weak, strong, known, threshold=threshold, over=over)
    assert found == pytest.approx(expected(threshold, labels, over), rel=1e-5)


def test_no_gradient_through_the_weak_view():
    known = jnp.array(LABELS)
    loss = lambda weak, strong: fixmatch_loss(weak, strong, known, threshold=0.8)
    weak, strong = jax.grad(loss, argnums=(0, 1))(jnp.array(WEAK), jnp.array(STRONG))
    np.testing.assert_array_equal(weak, 0)
    # Rows that are not used learn nothing.
    p = jax.nn.softmax(WEAK).max(1)
    used = (p >= 0.8) | (LABELS >= 0)
    np.testing.assert_array_equal(np.abs(strong).sum(1) > 0, used)


def test_nothing_is_used():
    loss = lambda strong: fixmatch_loss(jnp.zeros((3, 4)), strong, over="used")
    value, slopes = jax.value_and_grad(loss)(jnp.ones((3, 4)))
    assert value == 0
    np.testing.assert_array_equal(slopes, 0)


def test_half_precision_is_float32():
    low = lambda x: jnp.asarray(x, jnp.bfloat16)
    found = fixmatch_loss(low(WEAK), low(STRONG), threshold=0.0)
    assert found.dtype == jnp.float32
    assert found == pytest.approx(expected(0.0), rel=0.03)


def test_errors():
    with pytest.raises(ValueError, match=r"`threshold` must be in \[0, 1\] or None"):
        fixmatch_loss(jnp.array(WEAK), jnp.array(STRONG), threshold=1.5)
