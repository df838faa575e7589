import numpy as np
import pytest

from mtjax.data import (
    compose,
    image_pairs,
    load_images,
    mnist_subset,
    prepare,
    tfds_source,
)

CLOTHES = "fashion_mnist/five_classes"


@pytest.fixture(scope="module")
def clothes(prepared):
    return {
        split: load_images(CLOTHES, split, data_dir=prepared)
        for split in ("train", "validation", "test")
    }


def test_splits_of_one_part_share_no_row(clothes, prepared):
    assert [len(part["label"]) for part in clothes.values()] == [3_500, 500, 1_000]
    found = sorted(
        (image.tobytes(), int(label))
        for part in clothes.values()
        for image, label in zip(part["image"], part["label"])
    )
    source = tfds_source(CLOTHES, "test", data_dir=prepared)
    rows = source.__getitems__(range(len(source)))
    assert found == sorted((r["image"].tobytes(), int(r["label"])) for r in rows)
    for part in clothes.values():
        assert set(part["label"]) == set(range(5))
        # Clothes fill more of the picture than digits do.
        assert part["image"].mean() > 50


def test_labels_belong_to_their_images(clothes):
    # Nearest class mean: far above the 20 % of labels that were mixed up.
    train, test = clothes["train"], clothes["test"]
    flat = lambda part: part["image"].reshape(len(part["image"]), -1).astype(float)
    means = np.stack([flat(train)[train["label"] == c].mean(0) for c in range(5)])
    distances = ((flat(test)[:, None] - means) ** 2).sum(-1)
    assert (distances.argmin(1) == test["label"]).mean() > 0.65


def test_pairs_of_two_sets(clothes):
    digits = mnist_subset("validation")
    # Every image is its own label, so that the labels tell which pair was drawn.
    left = {"image": digits["image"][:200], "label": np.arange(200, dtype=np.uint8)}
    right = {
        "image": clothes["test"]["image"][:100],
        "label": np.arange(100, dtype=np.uint8),
    }
    pairs = image_pairs(left, right, 300, image_size=36, clean=True, seed=3)
    first, second = left["image"][pairs["left"]], right["image"][pairs["right"]]
    np.testing.assert_array_equal(pairs["image"], compose(first, second, image_size=36))
    np.testing.assert_allclose(
        pairs["left_image"][:, :28, :28, 0], first / 255, atol=1e-6
    )
    assert not pairs["left_image"][:, 28:].any()
    assert not pairs["left_image"][:, :, 28:].any()
    assert pairs["left"].max() > 150
    assert pairs["left"].dtype == np.int32
    plain = image_pairs(left, right, 20, image_size=36, seed=3)
    assert sorted(plain) == ["image", "left", "right"]
    np.testing.assert_array_equal(plain["image"], pairs["image"][:20])


def test_errors_name_the_argument(prepared, originals, tmp_path):
    with pytest.raises(ValueError, match="`split`"):
        load_images.__wrapped__(CLOTHES, "dev", data_dir=prepared)
    prepare("usps", originals("usps"), tmp_path, progress=False)
    with pytest.raises(ValueError, match="grey images of 28x28"):
        load_images("usps", "train", data_dir=tmp_path)
