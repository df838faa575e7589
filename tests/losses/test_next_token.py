"""The loss of language models on answers only, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from mtjax.losses.next_token import next_token_loss


def test_by_hand():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 5))
    tokens = rng.integers(5, size=(2, 4))
    mask = np.array([[True, False, True, True], [False, False, False, True]])
    # Position 0 is never predicted, whatever the mask says.
    places = [(0, 2), (0, 3), (1, 3)]
    log_p = log_softmax(logits, axis=-1)
    expected = -np.mean([log_p[i, j - 1, tokens[i, j]] for i, j in places])
    given = jnp.asarray(logits, jnp.float32), jnp.asarray(tokens, jnp.int32)
    loss = next_token_loss(*given, jnp.asarray(mask))
    assert loss == pytest.approx(expected, rel=1e-5)

    slope = jax.grad(next_token_loss)(*given, jnp.asarray(mask))
    moved = np.abs(slope).max(axis=-1) > 0
    np.testing.assert_array_equal(np.argwhere(moved), [(i, j - 1) for i, j in places])
    assert next_token_loss(*given, jnp.zeros((2, 4), bool)) == 0
