import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.losses import contrastive_loss

RNG = np.random.default_rng(0)
POSITIVES = RNG.uniform(-1, 1, (5, 3)).astype(np.float32)
NEGATIVES = RNG.uniform(-1, 1, (5, 4)).astype(np.float32)
MASK = np.array([[True, False, True, True]] * 4 + [[False, False, True, False]])


def by_hand(reduction, include, tau):
    """The definition, term by term, in float64."""
    p = np.exp(POSITIVES.astype(float) / tau)
    n = (np.exp(NEGATIVES.astype(float) / tau) * MASK).sum(1)
    if reduction == "sum_inside_log":
        p = p.sum(1, keepdims=True)
    denominator = n[:, None] + (p if include else 0.0)
    return np.mean(-np.log(p / denominator))


@pytest.mark.parametrize("reduction", ["mean", "sum_inside_log"])
@pytest.mark.parametrize("include", [True, False])
def test_definition(reduction, include):
    found = contrastive_loss(
        jnp.asarray(POSITIVES),
        jnp.asarray(NEGATIVES),
        mask=jnp.asarray(MASK),
        temperature=0.3,
        positive_reduction=reduction,
        include_positive_in_denominator=include,
    )
    np.testing.assert_allclose(found, by_hand(reduction, include, 0.3), rtol=1e-5)


def test_masked_negatives_change_nothing():
    mask = jnp.asarray(MASK)
    other = jnp.where(mask, NEGATIVES, 50.0)
    value, slope = jax.value_and_grad(
        lambda n: contrastive_loss(jnp.asarray(POSITIVES), n, mask=mask)
    )(other)
    same = contrastive_loss(jnp.asarray(POSITIVES), jnp.asarray(NEGATIVES), mask=mask)
    np.testing.assert_allclose(value, same, rtol=1e-6)
    assert not np.asarray(slope)[~MASK].any()
    assert (np.asarray(slope)[MASK] > 0).all()


def test_small_temperatures_stay_finite():
    slopes = jax.grad(lambda p: contrastive_loss(p, -p, temperature=1e-4))(
        jnp.array([[1.0], [-1.0]])
    )
    assert jnp.isfinite(slopes).all()


def test_bad_arguments():
    one = jnp.ones((1, 1))
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        contrastive_loss(one, one, temperature=0.0)
    with pytest.raises(ValueError, match="`positive_reduction` must be one of"):
        contrastive_loss.__wrapped__(one, one, positive_reduction="max")
