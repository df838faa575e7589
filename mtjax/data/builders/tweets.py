"""TweetEval: one configuration per task, five of them for stance."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from mtjax.data.builders.archives import read_lines
from mtjax.data.builders.spec import DataFormatError, DatasetSpec, Original

_ARCHIVE = "tweeteval.tar.xz"
# folder: classes, then training, validation and test tweets.
_TASKS = {
    "emoji": (20, 45_000, 5_000, 50_000),
    "emotion": (4, 3_257, 374, 1_421),
    "hate": (2, 9_000, 1_000, 2_970),
    "irony": (2, 2_862, 955, 784),
    "offensive": (2, 11_916, 1_324, 860),
    "sentiment": (3, 45_615, 2_000, 12_284),
    "stance/abortion": (3, 587, 66, 280),
    "stance/atheism": (3, 461, 52, 220),
    "stance/climate": (3, 355, 40, 169),
    "stance/feminist": (3, 597, 67, 285),
    "stance/hillary": (3, 620, 69, 295),
}
_FILES = {"train": "train", "validation": "val", "test": "test"}


def _read(folder: Path, *, task: str, optional: frozenset[str]) -> Original:
    def lines(file: str) -> list[str]:
        return read_lines(folder, file, archive=_ARCHIVE)

    def rows(texts: list[str], labels: list[str]) -> Iterator[dict[str, Any]]:
        if len(texts) != len(labels):
            raise DataFormatError(
                f"{task!r} must have as many texts as labels, got {len(texts)} and "
                f"{len(labels)}."
            )
        for text, label in zip(texts, labels, strict=True):
            yield {"text": text, "label": int(label)}

    splits = {}
    for split, file in _FILES.items():
        try:
            texts = lines(f"{task}/{file}_text.txt")
        except DataFormatError:
            if split not in optional:
                raise
            continue
        splits[split] = rows(texts, lines(f"{task}/{file}_labels.txt"))
    mapping = lines(f"{task.partition('/')[0]}/mapping.txt")
    names = [fields[-1] for line in mapping if (fields := line.strip().split("\t"))[0]]
    return Original(splits, label_names={"label": names})


def _features(num_classes: int) -> Mapping[str, tfds.features.FeatureConnector]:
    return {
        "text": tfds.features.Text(),
        "label": tfds.features.ClassLabel(num_classes=num_classes),
    }


def _spec(task: str, classes: int, train: int, validation: int, test: int):
    optional = frozenset({"train"}) if task == "sentiment" else frozenset()
    return DatasetSpec(
        name=f"tweeteval/{task.replace('/', '_')}",
        description=f"Tweets of the task {task}; some are offensive. Official splits.",
        licence="unclear (benchmark unrestricted; tasks and Twitter may restrict)",
        homepage="https://github.com/cardiffnlp/tweeteval",
        citation="TweetEval: Unified benchmark and comparative evaluation for tweet "
        "classification, 2020.",
        tasks=("label",),
        splits={"train": train, "validation": validation, "test": test},
        optional=optional,
        features=partial(_features, classes),
        read=partial(_read, task=task, optional=optional),
    )


TWEETS: tuple[DatasetSpec, ...] = tuple(
    _spec(task, *sizes) for task, sizes in _TASKS.items()
)
