"""Documents in which terms and their definitions are marked token by token."""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mtjax.data.builders.spec import DataFormatError, DatasetSpec, Original, require

_FOLDERS = {"train": "train", "validation": "dev"}
_COLUMNS = ("token", "file", "start", "end", "tag", "tag_id", "root_id", "relation")
_NO_RELATION = "0"
_NO_TAG = "O"


def _parse(name: str, content: str) -> dict[str, Any]:
    """Returns the columns of a document, and for each token its sentence."""
    words: list[list[str]] = []
    sentences: list[int] = []
    sentence, ended = 0, False
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            ended = bool(words)
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != len(_COLUMNS):
            raise DataFormatError(
                f"{name!r} must have {len(_COLUMNS)} fields in every row, got "
                f"{len(fields)} in line {number}."
            )
        sentence, ended = sentence + ended, False
        words.append(fields)
        sentences.append(sentence)
    columns = dict(zip(_COLUMNS, zip(*words, strict=True), strict=True))
    return {**columns, "name": name, "sentence": sentences}


def _read_deft(folder: Path) -> Original:
    path = require(folder, "deft_corpus.tar.xz")
    documents: dict[str, list[dict[str, Any]]] = {split: [] for split in _FOLDERS}
    splits = {file: split for split, file in _FOLDERS.items()}
    with tarfile.open(path) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            *_, part, name = ("", *member.name.split("/"))
            file = tar.extractfile(member)
            if file is not None and name.endswith(".deft"):
                content = file.read().decode()
                name = name.removesuffix(".deft")
                documents[splits[part]].append(_parse(name, content))
    names = {
        column: sorted(
            {value for rows in documents.values() for row in rows for value in row[key]}
            - {nothing}
        )
        for column, key, nothing in (
            ("tags", "tag", _NO_TAG),
            ("relations", "relation", _NO_RELATION),
        )
    }
    names["tags"].insert(0, _NO_TAG)
    names["relations"].insert(0, _NO_RELATION)
    codes = {
        column: {value: code for code, value in enumerate(values)}
        for column, values in names.items()
    }

    def encode(column: str, values: Sequence[str]) -> np.ndarray:
        return np.array([codes[column][value] for value in values], dtype=np.int32)

    def rows(documents: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in documents:
            yield {
                "name": row["name"],
                "tokens": list(row["token"]),
                "sentence": np.array(row["sentence"], dtype=np.int32),
                "tags": encode("tags", row["tag"]),
                "relations": encode("relations", row["relation"]),
                "tag_id": list(row["tag_id"]),
                "root_id": list(row["root_id"]),
            }

    return Original({split: rows(found) for split, found in documents.items()}, names)


def _features() -> dict[str, tfds.features.FeatureConnector]:
    lists = {
        name: tfds.features.Sequence(tfds.features.Text())
        for name in ("tokens", "tag_id", "root_id")
    }
    codes = {
        name: tfds.features.Tensor(shape=(None,), dtype=np.int32)
        for name in ("sentence", "tags", "relations")
    }
    return {"name": tfds.features.Text(), **lists, **codes}


DEFINITIONS: tuple[DatasetSpec, ...] = (
    DatasetSpec(
        name="deft_corpus",
        description="Parts of textbooks, one example per file. Each token has the "
        "number of its sentence, a tag (terms, definitions and more, B and I), the "
        "identifier of the tagged span, and the relation of that span to the span "
        "`root_id`. `metadata` names tags and relations; code 0 is none. Official "
        "splits without the test part.",
        licence="CC BY-NC-SA 4.0",
        homepage="https://github.com/adobe-research/deft_corpus",
        citation="DEFT: A corpus for definition extraction in free- and "
        "semi-structured text, 2019.",
        tasks=("tags", "relations"),
        splits={"train": 80, "validation": 68},
        features=_features,
        read=_read_deft,
    ),
)
