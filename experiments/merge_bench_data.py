"""The images of the merge-bench: six real sets, or one turned four ways.

Real sets are prepared once, `mtjax data prepare NAME --from FOLDER --data-dir DATA`,
for each value of `SETS`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtjax.data import as_arrays, mnist_subset, tfds_source

Splits = dict[str, dict[str, np.ndarray]]

# Prepared data by task.
SETS = {
    "mnist": "mnist",
    "fashion": "fashion_mnist/five_classes",
    "kmnist": "kmnist",
    "kannada": "kannada_mnist",
    "notmnist": "notmnist",
    "usps": "usps",
}
# The MNIST subset that ships with mtjax, turned by so many degrees.
TURNED = ("digits_0", "digits_90", "digits_180", "digits_270")
# Of a task's images; `stream` is for methods that learn from unlabelled images.
FRACTIONS = {"train": 0.6, "validation": 0.1, "stream": 0.1, "test": 0.2}


def load_data(
    tasks: Sequence[str], most: int, data_dir: Path | None
) -> dict[str, Splits]:
    """All splits of all tasks, always the same.

    Args:
      tasks: names in `SETS` or `TURNED`.
      most: images per task, all splits together.
      data_dir: folder of prepared data; `mtjax.data.default_data_dir` if None.

    Returns:
      By task and split the `images`, uint8 of shape `(n, 28, 28)`, and the `labels`,
      int32 of shape `(n,)`.

    Raises:
      ValueError: if a task is unknown.
      DataNotFoundError: if data are not prepared; the message says how to.
    """
    data = {}
    for task in tasks:
        images, labels = load_images(task, most, data_dir)
        order = np.random.default_rng(0).permutation(len(labels))[:most]
        # The official parts are not kept apart: some sets come as a test part only.
        ends = np.round(np.cumsum([0, *FRACTIONS.values()]) * len(order)).astype(int)
        data[task] = {
            split: {"images": images[order[a:b]], "labels": labels[order[a:b]]}
            for split, a, b in zip(FRACTIONS, ends, ends[1:])
        }
    return data


def load_images(
    task: str, most: int, data_dir: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Images of a task and their labels, about as many as are needed."""
    if task in TURNED:
        digits = mnist_subset("train")
        turned = np.rot90(digits["image"], TURNED.index(task), axes=(1, 2))
        return turned, digits["label"].astype(np.int32)
    if task not in SETS:
        raise ValueError(f"`tasks` must be among {[*SETS, *TURNED]}, got {task!r}.")
    test = tfds_source(SETS[task], "test", data_dir=data_dir)
    parts = [as_arrays(test)]
    missing = most - len(test)
    if missing > 0 and "train" in test.info.splits:
        missing = min(missing, test.info.splits["train"].num_examples)
        train = tfds_source(SETS[task], f"train[:{missing}]", data_dir=data_dir)
        parts.append(as_arrays(train))
    images = np.concatenate([part["image"] for part in parts])[..., 0]
    labels = np.concatenate([part["label"] for part in parts]).astype(np.int32)
    if images.shape[1:] != (28, 28):
        shape = len(images), 28, 28
        wide = jax.image.resize(images.astype(np.float32), shape, "linear")
        images = np.asarray(wide).round().astype(np.uint8)
    return images, labels


def small_slice(data: dict[str, Splits], number: int) -> Splits:
    """At most so many training images of each class, with their labels, by task."""
    few = {}
    for task, splits in data.items():
        labels = splits["train"]["labels"]
        rows = [np.flatnonzero(labels == c)[:number] for c in range(labels.max() + 1)]
        few[task] = {k: x[np.concatenate(rows)] for k, x in splits["train"].items()}
    return few


def number_of(inputs: Any) -> int:
    """How many images or sentences there are."""
    return len(jax.tree.leaves(inputs)[0])


def taken(arrays: Any, rows: Any) -> Any:
    """Some rows, given by an index, of an array or of all arrays."""
    return jax.tree.map(lambda x: x[rows], arrays)


def parts(arrays: Any, size: int = 500) -> list[Any]:
    """All rows, in batches."""
    starts = range(0, number_of(arrays), size)
    return [taken(arrays, slice(i, i + size)) for i in starts]
