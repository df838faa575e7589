"""Pictures of two overlaid small images, one task each, from any two sets of images.

Digits with digits give MultiMNIST, clothes with clothes MultiFashion, digits with
clothes the mixed composite that papers on Pareto fronts use.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from mtjax.data.sources import as_arrays, tfds_source
from mtjax.data.tables import split_rows

Images = dict[str, UInt8[np.ndarray, "..."]]

# Moves the second image to the lower right corner of a canvas of 36x36.
_SHIFT = 8


def load_images(
    name: str,
    split: Literal["train", "validation", "test"],
    *,
    data_dir: str | Path | None = None,
) -> Images:
    """Loads prepared grey images of 28x28 pixels, such as Fashion-MNIST.

    A tenth of the official training part is for validation; a set that has only one
    part is split 70/10/20. Always the same way.

    Args:
      name: of the prepared data, such as ``"mnist"``, ``"kmnist"``,
        ``"fashion_mnist/five_classes"`` or what TFDS itself prepares,
        ``"fashion_mnist"``.
      split: ``"train"``, ``"validation"`` or ``"test"``.
      data_dir: folder of the prepared data; `default_data_dir` if None.

    Returns:
      ``image``, uint8 of shape ``(n, 28, 28)`` in 0..255, and ``label``, uint8 of
      shape ``(n,)``, as `mnist_subset` gives them.

    Raises:
      DataNotFoundError: if the data are not prepared; the message says how to.
      ValueError: if `split` is unknown or the images have another shape.

    Example:
      >>> load_images("fashion_mnist/five_classes", "train", data_dir="nowhere")
      Traceback (most recent call last):
      ...
      mtjax.data.sources.DataNotFoundError: `fashion_mnist/five_classes` is not...
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(
            f"`split` must be 'train', 'validation' or 'test', got {split!r}."
        )
    there = tfds_source(name, "all", data_dir=data_dir).info.splits
    parts = [
        as_arrays(tfds_source(name, part, data_dir=data_dir))
        for part in ("train", "test")
        if part in there
    ]
    rows = split_rows([len(part["label"]) for part in parts], None, seed=0)[split]
    images = np.concatenate([part["image"] for part in parts])[rows]
    labels = np.concatenate([part["label"] for part in parts])[rows]
    if images.shape[1:] != (28, 28, 1):
        raise ValueError(
            "`name` must be a set of grey images of 28x28 pixels, got images of shape "
            f"{images.shape[1:]} in {name!r}."
        )
    return {"image": images[..., 0], "label": labels.astype(np.uint8)}


@partial(jax.jit, static_argnames="image_size")
def compose(
    left: UInt8[Array, "batch 28 28"] | UInt8[np.ndarray, "batch 28 28"],
    right: UInt8[Array, "batch 28 28"] | UInt8[np.ndarray, "batch 28 28"],
    *,
    image_size: int = 28,
) -> Float[Array, "batch {image_size} {image_size} 1"]:
    """Overlays pairs of images, one towards each corner.

    On a canvas of 36x36 the left image stands in the upper left corner and the right
    one in the lower right corner, so that they overlap in most of their area; the
    brighter pixel wins, and the canvas is resized with smoothing.

    Args:
      left: images in 0..255.
      right: as many images in 0..255; zeros leave the left one alone on its canvas.
      image_size: pixels per side of the result: 28 as in the reference, 36 for the
        canvas itself, 18 for small and fast.

    Returns:
      float32 pictures in [0, 1] with one channel.

    Example:
      >>> from mtjax.data import mnist_subset
      >>> digits = mnist_subset("test")["image"]
      >>> compose(digits[:2], digits[2:4], image_size=18).shape
      (2, 18, 18, 1)

    References:
      - Multi-task learning as multi-objective optimization, 2018, section 5.1 and its
        published code: canvas and corners. There the pairs are drawn once; here they
        can be drawn anew in each step.
    """
    room = ((0, 0), (0, _SHIFT), (0, _SHIFT))
    moved = ((0, 0), (_SHIFT, 0), (_SHIFT, 0))
    canvas = jnp.maximum(jnp.pad(left, room), jnp.pad(right, moved))
    shape = (canvas.shape[0], image_size, image_size)
    small = jax.image.resize(canvas.astype(jnp.float32) / 255.0, shape, "linear")
    return small[..., None]


def image_pairs(
    left: Images,
    right: Images,
    size: int,
    *,
    image_size: int = 28,
    clean: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Composes a fixed set of pairs from two sets of images.

    Args:
      left: ``image`` and ``label``, as `mnist_subset` and `load_images` give them.
      right: the same; may be the same set.
      size: number of pairs, at least one.
      image_size: see `compose`.
      clean: whether to add the left image alone on its canvas, the target of a dense
        task: to paint it without the other one.
      seed: decides the pairs; a larger `size` with the same seed starts the same.

    Returns:
      ``image``, float32 of shape ``(size, image_size, image_size, 1)`` in [0, 1], the
      classes ``left`` and ``right``, int32 of shape ``(size,)``, and if asked for
      ``left_image``, of the shape of ``image``.

    Raises:
      ValueError: if `size` is less than one.

    Example:
      >>> from mtjax.data import mnist_subset
      >>> digits = mnist_subset("test")
      >>> pictures = image_pairs(digits, digits, 10, image_size=36, clean=True)
      >>> bool((pictures["left_image"] <= pictures["image"]).all())
      True
    """
    if size < 1:
        raise ValueError(f"`size` must be at least one, got {size}.")
    numbers = (len(left["label"]), len(right["label"]))
    pairs = np.random.default_rng(seed).integers(numbers, size=(size, 2))
    first, second = pairs.T
    shape = (size, image_size, image_size, 1)
    names = ("image", "left_image") if clean else ("image",)
    pictures = {name: np.empty(shape, dtype=np.float32) for name in names}
    # In pieces: the canvases of 50,000 pairs would take a quarter of a gigabyte.
    for start in range(0, size, 4_096):
        piece = slice(start, start + 4_096)
        above, below = left["image"][first[piece]], right["image"][second[piece]]
        pictures["image"][piece] = compose(above, below, image_size=image_size)
        if clean:
            alone = compose(above, np.zeros_like(above), image_size=image_size)
            pictures["left_image"][piece] = alone
    return {
        **pictures,
        "left": left["label"][first].astype(np.int32),
        "right": right["label"][second].astype(np.int32),
    }
