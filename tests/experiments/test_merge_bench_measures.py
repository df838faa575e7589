"""What experiments on the merge-bench share: corrupted images, accuracy, streams."""

import numpy as np
import pytest

from experiments.merge_bench_measures import batches, corrupted, with_mean


def test_corruptions():
    images = {"a": np.full((2, 28, 28), 128, np.uint8)}
    images["a"][:, 10:20, 10:20] = 250
    of = lambda kind, amount: corrupted(images, kind, amount, 0)["a"]
    np.testing.assert_array_equal(of("clean", 0.0), images["a"])
    flat = (slice(None), slice(0, 10))  # far from 0 and 255
    assert of("noise", 8.0)[flat].std() == pytest.approx(8.0, rel=0.2)
    assert of("blur", 1.0).std() < images["a"].std()
    assert all(of(kind, 1.0).dtype == np.uint8 for kind in ("noise", "blur"))


def test_streams_repeat_by_seed():
    images = {"a": np.arange(9), "b": np.arange(5)}
    first = [next(batches(images, 4, 0)) for _ in range(2)]
    np.testing.assert_array_equal(first[0]["a"], first[1]["a"])
    assert set(first[0]) == {"a", "b"}
    assert first[0]["b"].shape == (4,)
    assert with_mean({"a": 0.5, "b": 1.0}) == {"a": 50.0, "b": 100.0, "mean": 75.0}
