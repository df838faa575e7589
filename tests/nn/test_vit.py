"""The vision transformer: shapes, patches, attention as Flax computes it, errors."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.nn import ViT
from mtjax.nn.vit import SelfAttention

SMALL = ViT(patch=2, width=8, depth=2, heads=2, hidden=16)


def test_parameters_are_matrices_and_vectors_in_numbered_blocks():
    params = jax.eval_shape(ViT().init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    leaves = jax.tree.leaves(params)
    assert max(leaf.ndim for leaf in leaves) == 2
    assert 100_000 < sum(leaf.size for leaf in leaves) < 300_000
    assert {"block_0", "block_3"} <= set(params["params"])


def test_an_image_is_encoded_by_itself(key):
    images = jax.random.uniform(key, (3, 4, 6, 1))
    params = SMALL.init(key, images)
    together = SMALL.apply(params, images)
    assert together.shape == (3, 8)
    alone = jnp.concatenate([SMALL.apply(params, images[i : i + 1]) for i in range(3)])
    chex.assert_trees_all_close(together, alone, atol=1e-5)


def test_patches_are_squares_of_the_image(key):
    # Without positions the mean over tokens does not see two patches change places.
    images = jax.random.uniform(key, (1, 4, 4, 1))
    params = SMALL.init(key, images)
    params["params"]["positions"] = jnp.zeros_like(params["params"]["positions"])
    swapped = np.array(images)
    swapped[:, :2, :2], swapped[:, 2:, 2:] = images[:, 2:, 2:], images[:, :2, :2]
    moved = jnp.roll(images, 1, axis=2)
    found = SMALL.apply(params, images)
    chex.assert_trees_all_close(
        SMALL.apply(params, jnp.asarray(swapped)), found, atol=1e-5
    )
    assert jnp.max(jnp.abs(SMALL.apply(params, moved) - found)) > 1e-3


def test_attention_is_that_of_flax(key):
    x = jax.random.normal(key, (2, 5, 8))
    ours = SelfAttention(heads=2)
    params = ours.init(key, x)["params"]
    theirs = {
        name: {
            "kernel": params[name]["kernel"].reshape(8, 2, 4),
            "bias": params[name]["bias"].reshape(2, 4),
        }
        for name in ("query", "key", "value")
    }
    theirs["out"] = {
        "kernel": params["output"]["kernel"].reshape(2, 4, 8),
        "bias": params["output"]["bias"],
    }
    flax = nn.MultiHeadDotProductAttention(num_heads=2)
    chex.assert_trees_all_close(
        ours.apply({"params": params}, x),
        flax.apply({"params": theirs}, x, x),
        atol=1e-5,
    )


def test_sizes_must_fit(key):
    with pytest.raises(ValueError, match=r"`patch` must divide .*28 and 28, got 5"):
        ViT(patch=5).init(key, jnp.zeros((1, 28, 28, 1)))
    with pytest.raises(ValueError, match="`heads` must divide `width`, got 3 and 64"):
        ViT(heads=3).init(key, jnp.zeros((1, 28, 28, 1)))
