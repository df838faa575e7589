"""Spoken words as single wav files in an archive: digits and keywords."""

import io
import re
import wave
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int16

from mtjax.data.builders.members import read_members
from mtjax.data.builders.spec import DataFormatError, DatasetSpec, Original, require

_SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
# Recordings 0 to 4 of every digit and speaker are the official test set.
_TEST_RECORDINGS = 5
_KEYWORDS = (
    *("_silence_", "_unknown_", "down", "go", "left", "no"),
    *("off", "on", "right", "stop", "up", "yes"),
)
_KEYWORD_RATE = 16_000


def decode_wav(
    content: bytes, name: PurePosixPath, *, rate: int
) -> Int16[np.ndarray, " samples"]:
    """Decodes a wav file of one channel with 16 bits per sample.

    Args:
      content: the file.
      name: what to call it in the error message.
      rate: the samples per second that it must have.

    Returns:
      The samples.

    Raises:
      DataFormatError: if the file cannot be decoded, has another format or holds
        fewer samples than it announces.
    """
    try:
        with wave.open(io.BytesIO(content)) as file:
            kind = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            announced = file.getnframes()
            samples = file.readframes(announced)
    except (wave.Error, EOFError) as error:
        raise DataFormatError(f"{str(name)!r} cannot be decoded: {error}.") from error
    if kind != (1, 2, rate) or len(samples) != 2 * announced:
        raise DataFormatError(
            f"{str(name)!r} must have one channel, 2 bytes per sample and {rate} "
            f"samples per second, got {kind} with {len(samples)} of {2 * announced} "
            "bytes."
        )
    return np.frombuffer(samples, dtype="<i2").astype(np.int16)


def _read_fsdd(folder: Path) -> Original:
    path = require(folder, "fsdd.tar.xz")

    def rows(*, test: bool) -> Iterator[dict[str, Any]]:
        for name, content in read_members(path, ".wav"):
            digit, speaker, recording = name.stem.split("_")
            if (int(recording) < _TEST_RECORDINGS) == test:
                yield {
                    "audio": decode_wav(content, name, rate=8_000),
                    "digit": digit,
                    "speaker": speaker,
                    "recording": int(recording),
                }

    return Original({"train": rows(test=False), "test": rows(test=True)})


def _read_keywords(folder: Path) -> Original:
    path = require(
        folder,
        "speech_commands_test_set_v0.02.tar.gz",
        "speech_commands_test_480.tar.xz",
    )

    def rows() -> Iterator[dict[str, Any]]:
        for name, content in read_members(path, ".wav"):
            samples = decode_wav(content, name, rate=_KEYWORD_RATE)
            # Never cuts: a longer recording does not fit and is an error.
            missing = max(0, _KEYWORD_RATE - len(samples))
            speaker = re.search(r"([0-9a-f]{8})_nohash", name.name)
            yield {
                "audio": np.pad(samples, (0, missing)),
                "label": name.parent.name,
                "speaker": speaker[1] if speaker else "",
            }

    return Original({"test": rows()})


def _samples(count: int | None) -> tfds.features.FeatureConnector:
    # As bytes, because TFDS otherwise stores every value as an integer of its own.
    return tfds.features.Tensor(shape=(count,), dtype=np.int16, encoding="bytes")


AUDIO: tuple[DatasetSpec, ...] = (
    DatasetSpec(
        name="fsdd",
        description="Spoken digits of six speakers, 8,000 samples per second and of "
        "different lengths. Official splits: recordings 0 to 4 of every digit and "
        "speaker are the test set.",
        licence="CC BY-SA 4.0",
        homepage="https://github.com/Jakobovski/free-spoken-digit-dataset",
        citation="Free Spoken Digit Dataset (FSDD).",
        tasks=("digit", "speaker"),
        splits={"train": 2_700, "test": 300},
        features=lambda: {
            "audio": _samples(None),
            "digit": tfds.features.ClassLabel(names=list("0123456789")),
            "speaker": tfds.features.ClassLabel(names=list(_SPEAKERS)),
            "recording": tfds.features.Scalar(np.int32),
        },
        read=_read_fsdd,
    ),
    DatasetSpec(
        name="speech_commands",
        description="The official test set of the twelve-class keyword task, one "
        "second of 16,000 samples each; shorter recordings are filled up with zeros. "
        "`speaker` is a code, empty for silence. Also accepted with 40 per class.",
        licence="CC BY 4.0",
        homepage="https://www.tensorflow.org/datasets/catalog/speech_commands",
        citation="Speech Commands: A dataset for limited-vocabulary speech "
        "recognition, 2018.",
        tasks=("label",),
        splits={"test": (4_890, 480)},
        features=lambda: {
            "audio": _samples(_KEYWORD_RATE),
            "label": tfds.features.ClassLabel(names=list(_KEYWORDS)),
            "speaker": tfds.features.Text(),
        },
        read=_read_keywords,
    ),
)
