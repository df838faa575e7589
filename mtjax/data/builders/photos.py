"""Images as single files in an archive: EuroSAT, sign language digits, Omniglot."""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from mtjax.data.builders.members import read_members
from mtjax.data.builders.spec import DataFormatError, DatasetSpec, Original, require

_LAND = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)
# Alphabet: number of characters.
_ALPHABETS = {
    "Balinese": 24,
    "Early_Aramaic": 22,
    "Greek": 24,
    "Japanese_(katakana)": 47,
    "Korean": 40,
    "Latin": 26,
    "Sanskrit": 42,
    "Tagalog": 17,
}
_CHARACTERS = [
    f"{alphabet}/character{number + 1:02}"
    for alphabet, count in _ALPHABETS.items()
    for number in range(count)
]


def decode_image(
    content: bytes, name: PurePosixPath, *, mode: str, side: int | None = None
) -> UInt8[np.ndarray, "height width channels"]:
    """Decodes an image file.

    Args:
      content: the file, in any format that Pillow knows.
      name: what to call it in the error message.
      mode: the mode of Pillow to convert to, ``"RGB"`` or ``"L"``.
      side: the height and width that it must have; None for any.

    Returns:
      Values in 0..255 with the channels last.

    Raises:
      DataFormatError: if the file cannot be decoded or has another size.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert(mode))
    except (OSError, SyntaxError) as error:
        raise DataFormatError(f"{str(name)!r} cannot be decoded: {error}.") from error
    if side is not None and pixels.shape[:2] != (side, side):
        raise DataFormatError(
            f"{str(name)!r} must have {side}x{side} pixels, got shape {pixels.shape}."
        )
    return pixels.reshape(*pixels.shape[:2], -1)


def _read_folders(folder: Path, *, files: tuple[str, ...], side: int) -> Original:
    path = require(folder, *files)

    def rows() -> Iterator[dict[str, Any]]:
        for name, content in read_members(path, ".jpg"):
            image = decode_image(content, name, side=side, mode="RGB")
            yield {"image": image, "label": name.parent.name}

    return Original({"train": rows()})


def _read_omniglot(folder: Path) -> Original:
    def rows(path: Path) -> Iterator[dict[str, Any]]:
        for name, content in read_members(path, ".png"):
            alphabet, character = name.parts[-3:-1]
            yield {
                "image": decode_image(content, name, side=105, mode="L"),
                "alphabet": alphabet,
                "character": f"{alphabet}/{character}",
                "alphabet_char_id": int(character.removeprefix("character")) - 1,
                "drawer": int(name.stem.rpartition("_")[2]) - 1,
            }

    return Original(
        {
            split: rows(require(folder, f"images_background_{split}.zip"))
            for split in ("small1", "small2")
        }
    )


def _image(side: int, channels: int) -> tfds.features.FeatureConnector:
    # Decoded here, so that a damaged file shows while preparing. As bytes, because
    # TFDS otherwise stores every value as an integer of its own.
    return tfds.features.Tensor(
        shape=(side, side, channels), dtype=np.uint8, encoding="zlib"
    )


def _features(side: int, names: tuple[str, ...]):
    return {
        "image": _image(side, 3),
        "label": tfds.features.ClassLabel(names=list(names)),
    }


PHOTOS: tuple[DatasetSpec, ...] = (
    DatasetSpec(
        name="eurosat/rgb",
        description="Satellite images of ten kinds of land, 64x64 RGB values in "
        "0..255, ordered by class. Also accepted with the first 500 images per class. "
        "No official split.",
        licence="MIT (terms of Copernicus on use)",
        homepage="https://github.com/phelber/EuroSAT",
        citation="EuroSAT: A novel dataset and deep learning benchmark for land use "
        "and land cover classification, 2019.",
        tasks=("label",),
        splits={"train": (27_000, 5_000)},
        features=partial(_features, 64, _LAND),
        read=partial(
            _read_folders,
            files=("EuroSAT.zip", "EuroSAT_RGB.zip", "eurosat_rgb_5000.tar.xz"),
            side=64,
        ),
    ),
    DatasetSpec(
        name="sign_language_digits",
        description="Photos of hands that show a digit, 100x100 RGB values in 0..255, "
        "ordered by class. No official split.",
        licence="Apache-2.0",
        homepage="https://github.com/ardamavi/Sign-Language-Digits-Dataset",
        citation="Sign Language Digits Dataset, 2017.",
        tasks=("label",),
        splits={"train": 2_059},
        features=partial(_features, 100, tuple("0123456789")),
        read=partial(_read_folders, files=("sign_language_digits.tar.xz",), side=100),
    ),
    DatasetSpec(
        name="omniglot",
        description="Handwritten characters of eight alphabets, 105x105 with ink 0 on "
        "paper 255; 20 drawers per character. `alphabet_char_id` counts within the "
        "alphabet: every alphabet is a task. The splits are the two small background "
        "sets; both hold the same images of Greek and Latin.",
        licence="MIT",
        homepage="https://github.com/brendenlake/omniglot",
        citation="Human-level concept learning through probabilistic program "
        "induction, 2015.",
        tasks=("alphabet", "character", "alphabet_char_id"),
        splits={"small1": 2_720, "small2": 3_120},
        features=lambda: {
            "image": _image(105, 1),
            "alphabet": tfds.features.ClassLabel(names=list(_ALPHABETS)),
            "character": tfds.features.ClassLabel(names=_CHARACTERS),
            "alphabet_char_id": tfds.features.ClassLabel(
                num_classes=max(_ALPHABETS.values())
            ),
            "drawer": tfds.features.Scalar(np.int32),
        },
        read=_read_omniglot,
    ),
)
