"""Labels that are not final: what is masked, and that rates stay right."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.losses import binary_losses
from mtjax.losses.delayed_feedback import mature_labels

LABELS = {"click": jnp.array([1.0, 0, 1, 1]), "buy": jnp.array([1.0, 0, jnp.nan, 0])}
AGE = jnp.array([1.0, 6.9, 8.0, 7.0])


def test_young_examples_have_no_label():
    found = mature_labels(LABELS, AGE, {"buy": 7.0})
    assert found["click"] is LABELS["click"]
    np.testing.assert_array_equal(found["buy"], [np.nan, np.nan, np.nan, 0])


def test_loss_is_that_of_the_old_examples():
    logits = {"click": jnp.arange(4.0), "buy": jnp.arange(4.0) - 2}
    found = binary_losses(logits, mature_labels(LABELS, AGE, {"buy": 7.0}))
    np.testing.assert_allclose(found["buy"], np.log1p(np.exp(1)), rtol=1e-6)
    np.testing.assert_allclose(found["click"], binary_losses(logits, LABELS)["click"])


def test_rate_of_what_is_left_is_the_true_one():
    """Conversions come after a delay; ages are drawn apart from both."""
    rng = np.random.default_rng(0)
    n, window = 200_000, 7.0
    converts, age = rng.uniform(size=n) < 0.1, rng.uniform(0, 14, n)
    seen = converts & (rng.uniform(0, window, n) <= age)
    labels = {"buy": jnp.asarray(seen, jnp.float32)}
    found = mature_labels(labels, jnp.asarray(age, jnp.float32), {"buy": window})["buy"]
    found = np.asarray(found)
    spread = np.sqrt(0.1 * 0.9 / (n / 2))
    assert abs(np.nanmean(found) - 0.1) < 4 * spread
    assert seen.mean() < 0.1 - 20 * spread  # late ones taken for negatives
    young = age < window
    alone = np.where(young & ~seen, np.nan, seen)  # known positives kept
    assert np.nanmean(alone) > 0.1 + 20 * spread


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match=r"`windows` must name tasks .* got \['like'\]"
    ):
        mature_labels(LABELS, AGE, {"like": 1.0})
    with pytest.raises(ValueError, match="`windows` must not be negative"):
        mature_labels(LABELS, AGE, {"buy": -1.0})
