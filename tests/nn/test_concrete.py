"""Binary Concrete: its distribution in closed form, its gradient, its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from mtjax.nn.concrete import binary_concrete

MANY = 200_000


def draws(x, temperature, seed=0, **options):
    logits = jnp.full(MANY, x, jnp.float32)
    found = binary_concrete(logits, temperature, key=jax.random.key(seed), **options)
    return np.asarray(found, np.float64)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("x", [-1.5, 0.0, 0.7])
def test_distribution(x, temperature):
    m = draws(x, temperature)
    cdf = lambda y: expit(temperature * logit(y) - x)
    # Float32 rounds what is very near to 1, at the lowest temperature a good part.
    inside = np.linspace(0.001, 0.999, 200)
    found = np.searchsorted(np.sort(m), inside, side="right") / MANY
    limit = stats.kstwo.ppf(1 - 1e-6, MANY)
    assert np.abs(found - cdf(inside)).max() < limit
    # Open with the probability that the logit says, at every temperature.
    opened = np.count_nonzero(m > 0.5)
    low, high = stats.binom.interval(1 - 1e-6, MANY, expit(x))
    assert low <= opened <= high


def test_symmetric_at_zero():
    m = draws(0.0, 0.5)
    assert m.mean() == pytest.approx(0.5, abs=5 * m.std() / np.sqrt(MANY))
    counts, _ = np.histogram(m, bins=20, range=(0, 1))
    spread = np.sqrt(counts + counts[::-1])
    assert (np.abs(counts - counts[::-1]) < 5 * spread).all()
    # Two modes, at 0 and 1.
    assert counts[0] > 1.5 * counts[9]


def test_low_temperatures_flip_coins():
    between = [
        np.mean((m > 0.01) & (m < 0.99)) for m in (draws(0.3, 0.1), draws(0.3, 1e-3))
    ]
    assert between[0] > 0.1 > 0.005 > between[1]


def test_hard_draws_are_the_rounded_ones():
    soft, hard = draws(0.4, 0.5, seed=3), draws(0.4, 0.5, seed=3, hard=True)
    np.testing.assert_array_equal(hard, soft > 0.5)
    key = jax.random.key(0)
    gates = lambda x: jnp.sum(binary_concrete(x, hard=True, key=key))
    assert not jax.grad(gates)(jnp.zeros(5)).any()


@pytest.mark.parametrize("temperature", [0.3, 0.5, 2.0])
def test_gradient(temperature):
    x = jnp.linspace(-2, 2, 50)
    key = jax.random.key(1)
    f = lambda x: binary_concrete(x, temperature, key=key)
    m = np.float64(f(x))
    slopes = jax.grad(lambda x: jnp.sum(f(x)))(x)
    np.testing.assert_allclose(slopes, m * (1 - m) / temperature, rtol=2e-4, atol=1e-7)
    # The same noise, so the same curve, in float64.
    noise = logit(m) * temperature - np.float64(x)
    curve = lambda x: expit((x + noise) / temperature)
    differences = (curve(np.float64(x) + 1e-5) - curve(np.float64(x) - 1e-5)) / 2e-5
    np.testing.assert_allclose(slopes, differences, rtol=1e-3, atol=1e-6)


def test_always_finite():
    def total(x):
        m = binary_concrete(x, 0.5, key=jax.random.key(7))
        return jnp.sum(m) / x.size, (jnp.min(m), jnp.max(m))

    x = jnp.zeros(10_000_000)
    (mean, (low, high)), slopes = jax.jit(jax.value_and_grad(total, has_aux=True))(x)
    assert mean == pytest.approx(0.5, abs=1e-3)
    # Ten million draws reach the ends; none is beyond them, or NaN.
    assert 0 <= low < 1e-9
    assert 1 - 1e-6 < high <= 1
    assert jnp.isfinite(slopes).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_draws_in_float32(dtype):
    x = jnp.full(1000, 0.5, dtype)
    found = binary_concrete(x, key=jax.random.key(2))
    wide = binary_concrete(x.astype(jnp.float32), key=jax.random.key(2))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wide.astype(dtype))


def test_temperature_may_be_traced_and_must_be_positive():
    x, key = jnp.zeros((3, 4)), jax.random.key(0)
    lowered = jax.jit(lambda t: binary_concrete(x, t, key=key))(jnp.float32(0.1))
    np.testing.assert_allclose(lowered, binary_concrete(x, 0.1, key=key), rtol=1e-5)
    with pytest.raises(ValueError, match=r"`temperature` must be positive, got 0\.0"):
        binary_concrete(x, 0.0, key=key)
