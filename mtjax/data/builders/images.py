"""Small images in one array per split: idx files (MNIST and its kin) and npz files."""

import gzip
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from mtjax.data.builders.spec import DataFormatError, DatasetSpec, Original, require


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """Reads an idx file of unsigned bytes, the format of MNIST.

    Args:
      path: the file, gzip-compressed if it ends in ``.gz``.

    Returns:
      The array that the header announces.

    Raises:
      DataFormatError: if the header is another one or the length does not fit it.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataFormatError(f"{str(path)!r} is not an idx file of unsigned bytes.")
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist())
    if len(content) - start != np.prod(shape):
        raise DataFormatError(
            f"{str(path)!r} announces shape {shape} but holds {len(content) - start} "
            "bytes. It is cut short; get it again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _rows(
    load: Callable[[], tuple[np.ndarray, np.ndarray]], path: Path, side: int
) -> Iterator[dict[str, Any]]:
    images, labels = load()
    if images.shape[1:] != (side, side) or len(images) != labels.size:
        raise DataFormatError(
            f"{str(path)!r} must hold {side}x{side} images and as many labels, got "
            f"shapes {images.shape} and {labels.shape}."
        )
    for image, label in zip(images, labels.reshape(-1), strict=True):
        yield {"image": image[..., None], "label": int(label)}


def _read_idx_pairs(
    folder: Path, *, files: Mapping[str, tuple[str, str]], optional: frozenset[str]
) -> Original:
    splits = {}
    for split, (image_file, label_file) in files.items():
        if split in optional and not (folder / f"{image_file}.gz").exists():
            continue
        images = require(folder, f"{image_file}.gz", image_file)
        labels = require(folder, f"{label_file}.gz", label_file)
        splits[split] = _rows(
            lambda i=images, t=labels: (read_idx(i), read_idx(t)), images, 28
        )
    return Original(splits)


def _only_array(path: Path) -> np.ndarray:
    with path.open("rb") as file, np.load(file) as arrays:
        return arrays["arr_0"]


def _read_kmnist(folder: Path) -> Original:
    splits = {}
    for split in ("train", "test"):
        if split == "train" and not (folder / "kmnist-train-imgs.npz").exists():
            continue
        images = require(folder, f"kmnist-{split}-imgs.npz")
        labels = require(folder, f"kmnist-{split}-labels.npz")
        splits[split] = _rows(
            lambda i=images, t=labels: (_only_array(i), _only_array(t)),
            images,
            28,
        )
    return Original(splits)


def _read_npz(
    folder: Path, *, file: str, splits: Mapping[str, str], side: int
) -> Original:
    path = require(folder, file)

    def load(key: str) -> tuple[np.ndarray, np.ndarray]:
        # A damaged archive would leave a file open that NumPy opened.
        with path.open("rb") as file, np.load(file) as arrays:
            images, labels = arrays[f"{key}_images"], arrays[f"{key}_labels"]
        if images.dtype == np.uint16:
            # The USPS archive holds (v + 1) * 1000 of grey values v in [-1, 1].
            images = np.round(images * (255 / 2000)).astype(np.uint8)
        return images, labels

    return Original(
        {split: _rows(partial(load, key), path, side) for split, key in splits.items()}
    )


def _read_five_classes(folder: Path) -> Original:
    path = require(folder, "fashion_test_5class.npy")

    def load() -> tuple[np.ndarray, np.ndarray]:
        table = np.load(path)
        return table[:, :-1].reshape(-1, 28, 28), table[:, -1]

    return Original({"test": _rows(load, path, 28)})


def _features(side: int, names: list[str]) -> dict[str, tfds.features.FeatureConnector]:
    # A tensor of bytes, not an image feature: TFDS compresses images that come as
    # arrays with TensorFlow.
    return {
        "image": tfds.features.Tensor(shape=(side, side, 1), dtype=np.uint8),
        "label": tfds.features.ClassLabel(names=names),
    }


def _idx_spec(
    name: str,
    files: Mapping[str, tuple[str, str]],
    *,
    names: list[str],
    optional: frozenset[str] = frozenset(),
    **fields: Any,
) -> DatasetSpec:
    return DatasetSpec(
        name=name,
        tasks=("label",),
        features=partial(_features, 28, names),
        read=partial(_read_idx_pairs, files=files, optional=optional),
        optional=optional,
        **fields,
    )


_DIGITS = [str(digit) for digit in range(10)]
# Inferred from the nearest neighbours among the official pictures, not published.
_CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Shirt"]
_KANA = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]

IMAGES: tuple[DatasetSpec, ...] = (
    _idx_spec(
        "mnist",
        {
            "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
            "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        },
        names=_DIGITS,
        splits={"train": 60_000, "test": 10_000},
        description="Handwritten digits, 28x28 grey values in 0..255; official splits.",
        licence="CC BY-SA 3.0 (second-hand statement)",
        homepage="http://yann.lecun.com/exdb/mnist/",
        citation="Gradient-based learning applied to document recognition, 1998.",
    ),
    _idx_spec(
        "notmnist",
        {"test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")},
        names=list("ABCDEFGHIJ"),
        splits={"test": 10_000},
        description="Letters A to J in many fonts, 28x28 grey values; 1,000 per class.",
        licence="unclear for the glyphs (repository code: MIT)",
        homepage="https://github.com/davidflanagan/notMNIST-to-MNIST",
        citation="notMNIST dataset, 2011.",
    ),
    _idx_spec(
        "kannada_mnist",
        {
            "train": (
                "X_kannada_MNIST_train-idx3-ubyte",
                "y_kannada_MNIST_train-idx1-ubyte",
            ),
            "test": (
                "X_kannada_MNIST_test-idx3-ubyte",
                "y_kannada_MNIST_test-idx1-ubyte",
            ),
            "dig": ("X_dig_MNIST-idx3-ubyte", "y_dig_MNIST-idx1-ubyte"),
        },
        names=_DIGITS,
        optional=frozenset({"train"}),
        splits={"train": 60_000, "test": 10_000, "dig": 10_240},
        description="Handwritten Kannada digits, 28x28 grey values; `dig` comes from "
        "other writers and another sampling (Dig-MNIST).",
        licence="unclear (the repository states none)",
        homepage="https://github.com/vinayprabhu/Kannada_MNIST",
        citation="Kannada-MNIST: A new handwritten digits dataset for the Kannada "
        "language, 2019.",
    ),
    DatasetSpec(
        name="fashion_mnist/five_classes",
        tasks=("label",),
        features=partial(_features, 28, _CLOTHES),
        read=_read_five_classes,
        splits={"test": 5_000},
        description="Five of the ten classes of clothes of Fashion-MNIST, 28x28 grey "
        "values, 1,000 images each, presumably of the official test part. The numbers "
        "of the classes are the source's own; their names are inferred. All of "
        "Fashion-MNIST comes from TFDS under the name fashion_mnist.",
        licence="MIT",
        homepage="https://github.com/zalandoresearch/fashion-mnist",
        citation="Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine "
        "Learning Algorithms, 2017.",
    ),
    DatasetSpec(
        name="kmnist",
        tasks=("label",),
        features=partial(_features, 28, _KANA),
        read=_read_kmnist,
        optional=frozenset({"train"}),
        splits={"train": 60_000, "test": 10_000},
        description="Cursive Japanese characters, 28x28 grey values; official splits.",
        licence="CC BY-SA 4.0",
        homepage="https://github.com/rois-codh/kmnist",
        citation="Deep Learning for Classical Japanese Literature, 2018.",
    ),
    DatasetSpec(
        name="usps",
        tasks=("label",),
        features=partial(_features, 16, _DIGITS),
        read=partial(
            _read_npz,
            file="usps.npz",
            splits={"train": "train", "test": "test"},
            side=16,
        ),
        splits={"train": 7_291, "test": 2_007},
        description="Digits scanned from envelopes, 16x16 grey values in 0..255.",
        licence="unclear (the source states none)",
        homepage="https://hastie.su.domains/ElemStatLearn/",
        citation="The Elements of Statistical Learning, 2001.",
    ),
    DatasetSpec(
        name="pneumoniamnist",
        tasks=("label",),
        features=partial(_features, 28, ["normal", "pneumonia"]),
        read=partial(
            _read_npz,
            file="pneumoniamnist.npz",
            splits={"train": "train", "validation": "val", "test": "test"},
            side=28,
        ),
        splits={"train": (4_708, 3_882), "validation": 524, "test": 624},
        description="Chest X-rays, 28x28 grey values; official splits, also accepted "
        "with the reduced training part of 3,882 images.",
        licence="CC BY 4.0",
        homepage="https://medmnist.com",
        citation="MedMNIST v2: A large-scale lightweight benchmark for 2D and 3D "
        "biomedical image classification, 2023.",
    ),
)
