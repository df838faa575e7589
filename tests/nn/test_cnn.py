"""The small convolutional network: its form, and that it looks everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn import CNN

MODEL = CNN(widths=(4, 6))


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), jnp.zeros((1, 9, 9, 1)))["params"]


def test_names_and_shapes(params):
    assert list(params) == ["conv_0", "norm_0", "conv_1", "norm_1"]
    assert params["conv_1"]["kernel"].shape == (3, 3, 4, 6)
    pictures = jnp.ones((2, 12, 9, 1))
    assert MODEL.apply({"params": params}, pictures).shape == (2, 6)


def test_every_pixel_counts_and_pictures_do_not_mix(params):
    pictures = jax.random.normal(jax.random.key(1), (2, 9, 9, 1))
    first = lambda x: MODEL.apply({"params": params}, x)[0].sum()
    slopes = np.asarray(jax.jit(jax.grad(first))(pictures))
    assert (slopes[0] != 0).all()
    np.testing.assert_array_equal(slopes[1], 0)
