"""Single sentences and pairs of sentences, most of them part of GLUE.

Features and classes are named and ordered as in the TFDS data set `glue`; the class
-1 means that the label is not published.
"""

import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mtjax.data.builders.archives import read_lines
from mtjax.data.builders.spec import DataFormatError, DatasetSpec, Original, require

_ENTAILMENT = ("entailment", "not_entailment")
# Domain: the file with its 1,000 sentences.
_DOMAINS = {
    "amazon": "amazon_cells_labelled.txt",
    "imdb": "imdb_labelled.txt",
    "yelp": "yelp_labelled.txt",
}


def _split_lines(
    lines: Sequence[str], columns: int, name: str, *, more: bool = False
) -> Iterator[list[str]]:
    # Quotation marks are ordinary characters in all of these files.
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) < columns or (len(fields) > columns and not more):
            raise DataFormatError(
                f"{name!r} must have {columns} fields in every row, got "
                f"{len(fields)} in line {number}."
            )
        yield fields[:columns]


def _read_fields(
    folder: Path, file: str, columns: int, *, more: bool = False
) -> Iterator[list[str]]:
    path = require(folder, file)
    # Some files start with a byte order mark.
    lines = read_lines(folder, file, archive=file, encoding="utf-8-sig")
    return _split_lines(lines, columns, str(path), more=more)


def _read_records(folder: Path, file: str, columns: int) -> Iterator[dict[str, str]]:
    rows = _read_fields(folder, file, columns)
    header = next(rows)
    for row in rows:
        yield dict(zip(header, row, strict=True))


def _read_cola(folder: Path) -> Original:
    path = require(folder, "cola_public.zip")

    def rows(file: str) -> Iterator[dict[str, Any]]:
        member = f"cola_public/raw/{file}.tsv"
        with zipfile.ZipFile(path) as archive:
            content = archive.read(member).decode()
        lines = content.removesuffix("\n").split("\n")
        for source, label, _, sentence in _split_lines(lines, 4, member):
            yield {"sentence": sentence, "label": int(label), "source": source}

    files = {
        "train": "in_domain_train",
        "validation": "in_domain_dev",
        "validation_out_of_domain": "out_of_domain_dev",
    }
    return Original({split: rows(file) for split, file in files.items()})


def _read_rte(folder: Path) -> Original:
    def rows(file: str, columns: int) -> Iterator[dict[str, Any]]:
        for row in _read_records(folder, file, columns):
            yield {
                "sentence1": row["sentence1"],
                "sentence2": row["sentence2"],
                "label": row.get("label", -1),
            }

    return Original(
        {
            "train": rows("train.tsv", 4),
            "validation": rows("dev.tsv", 4),
            "test": rows("test.tsv", 3),
        }
    )


def _read_mrpc(folder: Path) -> Original:
    def rows(file: str) -> Iterator[dict[str, Any]]:
        for row in _read_records(folder, f"msr-para-{file}.tsv", 5):
            yield {
                "sentence1": row["#1 String"],
                "sentence2": row["#2 String"],
                "label": int(row["Quality"]),
            }

    files = {"train": "train", "validation": "val", "test": "test"}
    return Original({split: rows(file) for split, file in files.items()})


def _read_stsbenchmark(folder: Path) -> Original:
    def rows(file: str) -> Iterator[dict[str, Any]]:
        # Some rows go on with fields about the licence.
        for row in _read_fields(folder, f"sts-{file}.csv", 7, more=True):
            genre, source, _, _, score, sentence1, sentence2 = row
            yield {
                "sentence1": sentence1,
                "sentence2": sentence2,
                "label": float(score),
                "genre": genre,
                "source": source,
            }

    files = {"train": "train", "validation": "dev", "test": "test"}
    return Original({split: rows(file) for split, file in files.items()})


def _read_qnli(folder: Path) -> Original:
    def rows() -> Iterator[dict[str, Any]]:
        for row in _read_records(folder, "dev.tsv", 4):
            yield {name: row[name] for name in ("question", "sentence", "label")}

    return Original({"validation": rows()})


def _read_sentences(folder: Path, *, file: str) -> Original:
    def rows() -> Iterator[dict[str, Any]]:
        for text, label in _read_fields(folder, file, 2):
            yield {"text": text.strip(), "label": int(label)}

    return Original({"train": rows()})


def _labelled(
    texts: Sequence[str], classes: Sequence[str]
) -> dict[str, tfds.features.FeatureConnector]:
    features = {name: tfds.features.Text() for name in texts}
    return {**features, "label": tfds.features.ClassLabel(names=list(classes))}


PAIRS: tuple[DatasetSpec, ...] = (
    DatasetSpec(
        name="cola",
        description="Sentences of the linguistics literature, acceptable or not, with "
        "the code of their source. Official public splits: the sources of "
        "`validation_out_of_domain` are not in `train`.",
        licence="unclear (linguistics literature; the corpus names no licence)",
        homepage="https://nyu-mll.github.io/CoLA",
        citation="Corpus of Linguistic Acceptability, 2018.",
        tasks=("label",),
        splits={"train": 8_551, "validation": 527, "validation_out_of_domain": 516},
        features=lambda: {
            **_labelled(("sentence",), ("unacceptable", "acceptable")),
            "source": tfds.features.Text(),
        },
        read=_read_cola,
    ),
    DatasetSpec(
        name="glue_rte",
        description="Pairs of texts, and whether the first entails the second. GLUE "
        "splits; the labels of `test` are not published, they are -1.",
        licence="unclear",
        homepage="https://gluebenchmark.com",
        citation="GLUE: A multi-task benchmark and analysis platform for natural "
        "language understanding, 2018.",
        tasks=("label",),
        splits={"train": 2_490, "validation": 277, "test": 3_000},
        features=partial(_labelled, ("sentence1", "sentence2"), _ENTAILMENT),
        read=_read_rte,
    ),
    DatasetSpec(
        name="mrpc",
        description="Pairs of sentences of news, paraphrases or not. Official test "
        "split; `validation` is the last 500 pairs of the official training split.",
        licence="MSR Shared Source Licence (non-commercial use and distribution)",
        homepage="https://github.com/brmson/dataset-sts",
        citation="Automatically constructing a corpus of sentential paraphrases, 2005.",
        tasks=("label",),
        splits={"train": 3_576, "validation": 500, "test": 1_725},
        features=partial(
            _labelled, ("sentence1", "sentence2"), ("not_equivalent", "equivalent")
        ),
        read=_read_mrpc,
    ),
    DatasetSpec(
        name="stsbenchmark",
        description="Pairs of sentences of captions, news and forums with a score of "
        "similarity, 0 to 5. Official splits.",
        licence="scores CC BY-SA 4.0; texts under several licences (LICENSE.txt)",
        homepage="https://ixa2.si.ehu.eus/stswiki",
        citation="SemEval-2017 task 1: Semantic textual similarity multilingual and "
        "crosslingual focused evaluation, 2017.",
        tasks=("label",),
        splits={"train": 5_749, "validation": 1_500, "test": 1_379},
        features=lambda: {
            "sentence1": tfds.features.Text(),
            "sentence2": tfds.features.Text(),
            "label": tfds.features.Scalar(np.float32),
            "genre": tfds.features.Text(),
            "source": tfds.features.Text(),
        },
        read=_read_stsbenchmark,
    ),
    DatasetSpec(
        name="glue_qnli_dev",
        description="Questions and sentences, and whether the sentence holds the "
        "answer. Official validation split, the only one here.",
        licence="unclear in the copy (CC BY-SA 4.0 of SQuAD, second-hand statement)",
        homepage="https://gluebenchmark.com",
        citation="GLUE: A multi-task benchmark and analysis platform for natural "
        "language understanding, 2018.",
        tasks=("label",),
        splits={"validation": 5_463},
        features=partial(_labelled, ("question", "sentence"), _ENTAILMENT),
        read=_read_qnli,
    ),
    *(
        DatasetSpec(
            name=f"sentiment_labelled_sentences/{domain}",
            description=f"Sentences of reviews ({domain}) with their polarity, one of "
            "three domains. No official split.",
            licence="CC BY 4.0 according to the UCI record (second-hand statement)",
            homepage="https://archive.ics.uci.edu/dataset/331/sentiment+labelled+sentences",
            citation="From group to individual labels using deep features, 2015.",
            tasks=("label",),
            splits={"train": 1_000},
            features=partial(_labelled, ("text",), ("negative", "positive")),
            read=partial(_read_sentences, file=file),
        )
        for domain, file in _DOMAINS.items()
    ),
)
