"""COCO scenes with a class per pixel and boxes of things: tasks of unlike shape."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float32, Int32

from mtjax.data.builders.members import read_members
from mtjax.data.builders.photos import decode_image
from mtjax.data.builders.spec import DataFormatError, DatasetSpec, Original, require

_THINGS = 80
_FOLDERS = {"train": "train2017", "validation": "val2017"}


def read_boxes(
    text: str,
) -> tuple[Float32[np.ndarray, "boxes 4"], Int32[np.ndarray, " boxes"]]:
    """Reads a label file of the YOLO format.

    Args:
      text: a line per box: class, centre x, centre y, width and height, as parts of
        the width and height of the image.

    Returns:
      The boxes as TFDS orders them, ``(ymin, xmin, ymax, xmax)`` in 0..1, and their
      classes.

    Example:
      >>> boxes, labels = read_boxes("58 0.5 0.25 0.5 0.5")
      >>> boxes.tolist(), labels.tolist()
      ([[0.0, 0.25, 0.5, 0.75]], [58])
    """
    rows = np.array([line.split() for line in text.splitlines()], np.float64)
    labels, x, y, width, height = rows.reshape(-1, 5).T
    corners = (y - height / 2, x - width / 2, y + height / 2, x + width / 2)
    boxes = np.clip(np.stack(corners, axis=-1), 0, 1).astype(np.float32)
    return boxes, labels.astype(np.int32)


def _names(config: str) -> dict[int, str]:
    return {
        int(number): name.strip()
        for number, name in re.findall(r"^  (\d+): (.+)$", config, flags=re.MULTILINE)
    }


def _rows(
    files: Mapping[PurePosixPath, bytes], folder: str
) -> Iterator[dict[str, Any]]:
    for path in sorted(files):
        if path.parent != PurePosixPath("images", folder):
            continue
        mask = PurePosixPath("semantic_segmentation/masks", folder, f"{path.stem}.png")
        labels = PurePosixPath("object_detection/labels", folder, f"{path.stem}.txt")
        image = decode_image(files[path], path, mode="RGB")
        semantic = decode_image(files[mask], mask, mode="L")
        if image.shape[:2] != semantic.shape[:2]:
            raise DataFormatError(
                f"{str(mask)!r} must have the size of its image, got shapes "
                f"{semantic.shape} and {image.shape}."
            )
        # An image without things has no file of boxes.
        boxes, things = read_boxes(files.get(labels, b"").decode())
        present = np.zeros(_THINGS, np.uint8)
        present[things] = 1
        yield {
            "image": image,
            "semantic": semantic,
            "boxes": boxes,
            "box_labels": things,
            "present": present,
            "image_id": int(path.stem),
        }


def _read(folder: Path) -> Original:
    path = require(folder, "coco_multitask_ccby.tar.xz")
    files = dict(read_members(path, ""))
    pixels = _names(files[PurePosixPath("semantic_segmentation/config.yaml")].decode())
    things = _names(files[PurePosixPath("object_detection/config.yaml")].decode())
    return Original(
        {split: _rows(files, folder) for split, folder in _FOLDERS.items()},
        {
            "semantic": {str(number): name for number, name in pixels.items()},
            "box_labels": [things[number] for number in range(_THINGS)],
        },
    )


def _map(channels: int) -> tfds.features.FeatureConnector:
    return tfds.features.Tensor(
        shape=(None, None, channels), dtype=np.uint8, encoding="zlib"
    )


SCENES: tuple[DatasetSpec, ...] = (
    DatasetSpec(
        name="coco_multitask_ccby",
        description="Photos of COCO 2017 under free licences, of different sizes: a "
        "class per pixel (`semantic`, 0 is unlabelled), boxes of things as (ymin, "
        "xmin, ymax, xmax) in 0..1 with `box_labels`, and which of the 80 things are "
        "`present`; `metadata` names the classes. Parts of the official splits.",
        licence="images CC BY 2.0, CC BY-SA 2.0, no known restriction or US "
        "Government; annotations CC BY 4.0 (second-hand statement)",
        homepage="https://cocodataset.org",
        citation="Microsoft COCO: Common objects in context, 2014.",
        tasks=("semantic", "boxes", "box_labels", "present"),
        splits={"train": 26, "validation": 27},
        features=lambda: {
            "image": _map(3),
            "semantic": _map(1),
            "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
            "box_labels": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "present": tfds.features.Tensor(shape=(_THINGS,), dtype=np.uint8),
            "image_id": tfds.features.Scalar(np.int32),
        },
        read=_read,
    ),
)
