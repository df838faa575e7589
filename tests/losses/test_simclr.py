"""NT-Xent of two views: by hand, symmetries, and features without a direction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.losses.simclr import simclr_loss

RNG = np.random.default_rng(0)
FIRST, SECOND = jnp.asarray(RNG.normal(size=(2, 6, 4)), jnp.float32)


def test_against_numpy():
    z = np.concatenate([FIRST, SECOND]).astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    terms = np.exp(z @ z.T / 0.3)
    losses = []
    for i in range(12):
        positive = terms[i, (i + 6) % 12]
        losses.append(-np.log(positive / (terms[i].sum() - terms[i, i])))
    found = simclr_loss(FIRST, SECOND, temperature=0.3)
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


def test_neither_order_nor_lengths_matter():
    value = simclr_loss(FIRST, SECOND)
    assert simclr_loss(SECOND, FIRST) == pytest.approx(float(value), rel=1e-5)
    scales = jnp.arange(1.0, 7.0)[:, None]
    assert simclr_loss(scales * FIRST, SECOND) == pytest.approx(float(value), rel=1e-5)
    order = np.array([3, 1, 5, 0, 2, 4])
    shuffled = simclr_loss(FIRST[order], SECOND[order])
    assert shuffled == pytest.approx(float(value), rel=1e-5)
    assert simclr_loss(FIRST, SECOND[order]) > simclr_loss(FIRST, FIRST)


def test_zero_features_have_finite_slopes():
    z = jnp.zeros((3, 4))
    value, slopes = jax.value_and_grad(simclr_loss)(z, z)
    assert value == pytest.approx(np.log(5), rel=1e-5)  # 1 positive, 4 negatives
    assert jnp.isfinite(slopes).all()


def test_errors():
    with pytest.raises(ValueError, match="`first` must hold at least two inputs, got"):
        simclr_loss(FIRST[:1], SECOND[:1])
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        simclr_loss(FIRST, SECOND, temperature=0.0)
