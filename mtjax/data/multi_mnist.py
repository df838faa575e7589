"""MultiMNIST: two digits in one picture, one task each; ships with the package.

A balanced subset of the real MNIST images (12,000 training and 2,500 test digits) is
part of the package, and pairs are composed from it, all at once or inside a training
step. The subset is made by :func:`build_mnist_subset`; see NOTICE for its licence.
"""

import lzma
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Integer, Key, UInt8

from mtjax.data.builders.images import read_idx
from mtjax.data.image_pairs import Images, compose, image_pairs

_FILE = "_mnist_subset.xz"
_SIDE = 28
_PER_CLASS = {"train": 1_200, "test": 250}
# The last tenth of each class of the training digits.
_VALIDATION_PER_CLASS = 120


def mnist_subset(split: Literal["train", "validation", "test"]) -> Images:
    """Loads the MNIST digits that ship with the package.

    Args:
      split: ``"train"`` (10,800 digits), ``"validation"`` (1,200 other digits of the
        official training part) or ``"test"`` (2,500 of the official test part).

    Returns:
      ``image``, uint8 of shape ``(n, 28, 28)`` in 0..255, and ``label``, uint8 of
      shape ``(n,)``; every class has equally many.

    Raises:
      ValueError: if `split` is unknown.

    Example:
      >>> digits = mnist_subset("test")
      >>> digits["image"].shape, np.bincount(digits["label"]).tolist()
      ((2500, 28, 28), [250, 250, 250, 250, 250, 250, 250, 250, 250, 250])
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(
            f"`split` must be 'train', 'validation' or 'test', got {split!r}."
        )
    images, labels = _unpack()["test" if split == "test" else "train"]
    if split != "test":
        held_out = _last_of_each_class(labels, _VALIDATION_PER_CLASS)
        chosen = held_out if split == "validation" else ~held_out
        images, labels = images[chosen], labels[chosen]
    return {"image": images.copy(), "label": labels.copy()}


def sample_batch(
    images: UInt8[Array, "n 28 28"] | UInt8[np.ndarray, "n 28 28"],
    labels: Integer[Array, " n"] | Integer[np.ndarray, " n"],
    batch_size: int,
    *,
    image_size: int = 28,
    key: Key[Array, ""],
) -> dict[str, Float[Array, "batch h w 1"] | Int32[Array, " batch"]]:
    """Draws pairs of digits and composes them; can be part of a jitted step.

    Args:
      images: digits to draw from, best on the device already.
      labels: their classes.
      batch_size: number of pairs (static under `jit`).
      image_size: see `compose` (static under `jit`).
      key: decides the pairs.

    Returns:
      ``image``, float32 of shape ``(batch, image_size, image_size, 1)``, and the
      classes ``left`` and ``right``, int32 of shape ``(batch,)``.

    Example:
      >>> digits = mnist_subset("train")
      >>> key = jax.random.key(0)
      >>> batch = sample_batch(digits["image"], digits["label"], 4, key=key)
      >>> sorted(batch), batch["left"].shape
      (['image', 'left', 'right'], (4,))
    """
    pairs = jax.random.randint(key, (2, batch_size), 0, len(images))
    images, labels = jnp.asarray(images), jnp.asarray(labels).astype(jnp.int32)
    left, right = pairs
    return {
        "image": compose(images[left], images[right], image_size=image_size),
        "left": labels[left],
        "right": labels[right],
    }


def multi_mnist(
    split: Literal["train", "validation", "test"],
    size: int,
    *,
    image_size: int = 28,
    seed: int = 0,
) -> dict[str, Float[np.ndarray, "size h w 1"] | Int32[np.ndarray, " size"]]:
    """Composes a fixed set of pairs.

    Args:
      split: the digits to draw from, see :func:`mnist_subset`; no digit stands in
        pictures of two splits.
      size: number of pairs, at least one.
      image_size: see `compose`.
      seed: decides the pairs; a larger `size` with the same seed starts the same.

    Returns:
      ``image``, float32 of shape ``(size, image_size, image_size, 1)``, and the
      classes ``left`` and ``right``, int32 of shape ``(size,)``.

    Raises:
      ValueError: if an argument breaks its rule.

    Example:
      >>> pictures = multi_mnist("test", 100, image_size=18)
      >>> pictures["image"].shape, pictures["left"].shape
      ((100, 18, 18, 1), (100,))
    """
    digits = mnist_subset(split)
    return image_pairs(digits, digits, size, image_size=image_size, seed=seed)


def build_mnist_subset(folder: str | Path) -> bytes:
    """Makes the file of the package from the original MNIST files.

    From every class it takes images at equal distances in the original order (the two
    halves of the test part differ in difficulty), and packs them unchanged.

    Args:
      folder: where the four original ``.gz`` files are.

    Returns:
      What ``_mnist_subset.xz`` holds: for the training and the test part the images
      of all classes in original order, then their labels, as bytes, xz-compressed.

    Raises:
      FileNotFoundError: if a file is missing.
    """
    content = b""
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(Path(folder) / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(Path(folder) / f"{prefix}-labels-idx1-ubyte.gz")
        chosen = []
        for digit in range(10):
            places = np.flatnonzero(labels == digit)
            steps = np.linspace(0, len(places) - 1, _PER_CLASS[split])
            chosen.append(places[steps.round().astype(int)])
        chosen = np.sort(np.concatenate(chosen))
        content += images[chosen].tobytes() + labels[chosen].tobytes()
    filters = [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 9 | lzma.PRESET_EXTREME,
            "lc": 4,
            "lp": 0,
            "pb": 0,
        }
    ]
    return lzma.compress(content, format=lzma.FORMAT_XZ, filters=filters)


@lru_cache(maxsize=1)
def _unpack() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    packed = resources.files("mtjax.data").joinpath(_FILE).read_bytes()
    content = np.frombuffer(lzma.decompress(packed), dtype=np.uint8)
    parts = {}
    for split, per_class in _PER_CLASS.items():
        n = 10 * per_class
        images, labels, content = np.split(content, [n * _SIDE**2, n * (_SIDE**2 + 1)])
        parts[split] = images.reshape(n, _SIDE, _SIDE), labels
    return parts


def _last_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    chosen = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        chosen[np.flatnonzero(labels == digit)[-count:]] = True
    return chosen
