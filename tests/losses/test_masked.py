import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.losses import masked_mean

VALUES = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
MASK = jnp.array([[True, False, True], [False, False, False]])


@pytest.mark.parametrize("kind", [bool, jnp.int32, jnp.float32])
def test_mean_over_set_entries(kind):
    mask = MASK.astype(kind)
    assert masked_mean(VALUES, mask) == 2.0
    np.testing.assert_array_equal(masked_mean(VALUES, mask, axis=1), [2.0, 0.0])
    np.testing.assert_array_equal(masked_mean(VALUES, mask, axis=0), [1.0, 0.0, 3.0])
    assert masked_mean(VALUES, mask, axis=(0, 1)) == 2.0


def test_full_mask_is_the_mean():
    np.testing.assert_allclose(masked_mean(VALUES, jnp.ones((2, 3))), VALUES.mean())


def test_mask_with_axes_of_size_one_counts_every_entry():
    per_row = jnp.array([[False], [True]])
    assert masked_mean(VALUES, per_row) == 5.0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_masked_out_values_matter_neither_forward_nor_backward(bad):
    values = jnp.where(MASK, VALUES, bad)
    mean, grad = jax.value_and_grad(masked_mean)(values, MASK)
    assert mean == 2.0
    np.testing.assert_array_equal(grad, MASK * 0.5)


def test_empty_mask_gives_exact_zeros():
    values = jnp.full((2, 3), jnp.nan)
    mean, grad = jax.value_and_grad(masked_mean)(values, jnp.zeros((2, 3)))
    assert mean == 0.0
    np.testing.assert_array_equal(grad, jnp.zeros((2, 3)))


@pytest.mark.parametrize(
    ("loss", "bad", "harmless"),
    [(jnp.sqrt, 0.0, 1.0), (jnp.log, 0.0, 1.0), (jnp.square, jnp.nan, 0.0)],
)
def test_bad_derivative_before_the_mask_is_not_stopped(loss, bad, harmless):
    """The documented limit, and its remedy: harmless inputs before the function."""
    x, mask = jnp.array([bad, 1.0]), jnp.array([False, True])
    after = jax.grad(lambda x: masked_mean(loss(x), mask))(x)
    assert jnp.isnan(after[0])
    before = jax.grad(
        lambda x: masked_mean(loss(jnp.where(mask, x, harmless)), mask),
    )(x)
    np.testing.assert_array_equal(before, [0.0, jax.grad(loss)(1.0)])


def test_many_bfloat16_entries_are_counted_exactly():
    values = jnp.ones(5000, jnp.bfloat16)
    mean = masked_mean(values, jnp.ones(5000, jnp.bfloat16))
    assert mean.dtype == jnp.bfloat16
    assert mean == 1.0


@pytest.mark.parametrize("shape", [(3,), (2,), (3, 2), (2, 3, 1)])
def test_mask_that_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `values`"):
        masked_mean(VALUES, jnp.ones(shape))
