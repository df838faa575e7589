from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtjax
from mtjax.data import (
    build_mnist_subset,
    compose,
    mnist_subset,
    multi_mnist,
    sample_batch,
)

PACKED = Path(mtjax.__file__).parent / "data" / "_mnist_subset.xz"


@pytest.mark.parametrize(
    ("split", "size"), [("train", 10_800), ("validation", 1_200), ("test", 2_500)]
)
def test_subset_is_balanced(split, size):
    digits = mnist_subset(split)
    assert digits["image"].shape == (size, 28, 28)
    assert digits["image"].dtype == np.uint8
    assert np.bincount(digits["label"]).tolist() == [size // 10] * 10


def test_splits_share_no_digit():
    seen = [{i.tobytes() for i in mnist_subset(s)["image"]} for s in ("train", "test")]
    seen.append({i.tobytes() for i in mnist_subset("validation")["image"]})
    assert [len(images) for images in seen] == [10_800, 2_500, 1_200]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_the_packed_file_is_small_and_its_licence_stated():
    assert PACKED.stat().st_size <= 2.5e6
    notice = Path(__file__).parents[2] / "NOTICE"
    assert "Share Alike 3.0" in notice.read_text()
    assert PACKED.name in notice.read_text()


@pytest.mark.slow
def test_the_packed_file_comes_from_the_originals(originals):
    assert build_mnist_subset(originals("mnist")) == PACKED.read_bytes()


def test_canvas_is_the_brighter_of_both_corners():
    digits = mnist_subset("test")["image"][:6]
    canvas = np.zeros((3, 36, 36), np.uint8)
    canvas[:, :28, :28] = digits[:3]
    canvas[:, 8:, 8:] = np.maximum(canvas[:, 8:, 8:], digits[3:])
    found = compose(digits[:3], digits[3:], image_size=36)
    np.testing.assert_allclose(found[..., 0], canvas / 255, atol=1e-6)


@pytest.mark.parametrize("image_size", [18, 28])
def test_resizing_keeps_range_and_brightness(image_size):
    digits = mnist_subset("test")["image"][:20]
    full = compose(digits[:10], digits[10:], image_size=36)
    small = compose(digits[:10], digits[10:], image_size=image_size)
    assert small.dtype == jnp.float32
    assert small.min() >= 0.0
    assert small.max() <= 1.0
    np.testing.assert_allclose(
        small.mean(axis=(1, 2, 3)), full.mean(axis=(1, 2, 3)), rtol=0.02
    )


def test_sampling_jits_once_and_matches_its_labels(key):
    digits = mnist_subset("validation")
    # Every image is its own label, so that the labels tell which pair was drawn.
    labels = np.arange(len(digits["label"]))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def draw(key):
        return sample_batch(digits["image"], labels, 16, image_size=18, key=key)

    batch, other = draw(key), draw(jax.random.key(7))
    expected = compose(
        digits["image"][batch["left"]], digits["image"][batch["right"]], image_size=18
    )
    np.testing.assert_allclose(batch["image"], expected, atol=1e-6)
    assert (batch["left"] != other["left"]).any()


def test_fixed_pairs_depend_on_the_seed_only():
    first = multi_mnist("test", 50, image_size=18)
    longer = multi_mnist("test", 60, image_size=18)
    other = multi_mnist("test", 50, image_size=18, seed=1)
    for name in ("image", "left", "right"):
        np.testing.assert_array_equal(first[name], longer[name][:50])
        assert (first[name] != other[name]).any()


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="`size`"):
        multi_mnist("test", 0)
    with pytest.raises(ValueError, match="`split`"):
        mnist_subset.__wrapped__("dev")
