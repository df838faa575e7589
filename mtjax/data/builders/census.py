"""Census-Income (KDD): the two-task benchmark of the mixture-of-experts papers."""

import csv
import gzip
import io
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mtjax.data.builders.rows import (
    MISSING,
    encode_rows,
    read_c45_names,
    table_features,
    table_metadata,
)
from mtjax.data.builders.spec import DataFormatError, DatasetSpec, Original, require

_MARITAL = "marital stat"
_WEIGHT = "instance weight"


def _fields(path: Path) -> Iterator[list[str]]:
    with (
        gzip.open(path, "rt", encoding="latin-1")
        if path.suffix == ".gz"
        else (path.open(encoding="latin-1")) as file
    ):
        for fields in csv.reader(file, quoting=csv.QUOTE_NONE):
            yield [field.strip() for field in fields]


def _read_original(folder: Path) -> Original:
    names = read_c45_names(require(folder, "census-income.names"))
    columns = [*names, "income"]
    numeric = [name for name, v in names.items() if v is None and name != _WEIGHT]
    categories = {name: values for name, values in names.items() if values}

    def others(record: Mapping[str, str]) -> dict[str, Any]:
        return {
            "income": {"- 50000.": 0, "50000+.": 1}[record["income"]],
            "never_married": int(record[_MARITAL] == "Never married"),
            "weight": float(record[_WEIGHT]),
        }

    splits = {}
    for split, file in (
        ("train", "census-income.data"),
        ("test", "census-income.test"),
    ):
        if split == "train" and not list(folder.glob(f"{file}*")):
            continue
        path = require(folder, f"{file}.gz", file)
        splits[split] = encode_rows(
            _fields(path),
            path=path,
            columns=columns,
            numeric=numeric,
            categories=categories,
            others=others,
        )
    return Original(splits, table_metadata(numeric, categories))


# The nominal file calls its columns by their position in the original, from one.
_NOMINAL = {
    "att2": "class of worker",
    "att3": "detailed industry recode",
    "att4": "detailed occupation recode",
    "att5": "education",
    "att7": "enroll in edu inst last wk",
    "att8": _MARITAL,
    "att9": "major industry code",
    "att10": "major occupation code",
    "att11": "race",
    "att12": "hispanic origin",
    "att13": "sex",
    "att14": "member of a labor union",
    "att15": "reason for unemployment",
    "att16": "full or part time employment stat",
    "att20": "tax filer stat",
    "att21": "region of previous residence",
    "att22": "state of previous residence",
    "att23": "detailed household and family stat",
    "att24": "detailed household summary in household",
    "att26": "migration code-change in msa",
    "att27": "migration code-change in reg",
    "att28": "migration code-move within reg",
    "att29": "live in this house 1 year ago",
    "att30": "migration prev res in sunbelt",
    "att32": "family members under 18",
    "att33": "country of birth father",
    "att34": "country of birth mother",
    "att35": "country of birth self",
    "att36": "citizenship",
    "att37": "own business or self employed",
    "att38": "fill inc questionnaire for veteran's admin",
    "att39": "veterans benefits",
    "att41": "year",
}


def _arff_lines(path: Path) -> Iterator[str]:
    # Line by line: the file has 137 MB once unpacked.
    with tarfile.open(path, mode="r:xz") as tar:
        info = tar.next()
        file = tar.extractfile(info) if info else None
        if file is None:
            raise DataFormatError(f"{str(path)!r} must hold one file, got none.")
        yield from io.TextIOWrapper(file, encoding="latin-1")


def _read_nominal(folder: Path) -> Original:
    path = require(folder, "census-income-full-nominal.tar.xz")
    header: dict[str, list[str]] = {}
    for line in _arff_lines(path):
        if line.startswith("@attribute"):
            _, name, values = line.split(maxsplit=2)
            listed = values.strip().strip("{}").split(",")
            # One value is listed twice; its first position is its code.
            header[name] = list(dict.fromkeys([MISSING, *listed]))
        if line.startswith("@data"):
            break
    if list(header) != [*_NOMINAL, "class"]:
        raise DataFormatError(
            f"{str(path)!r} must have the columns {[*_NOMINAL, 'class']}, got "
            f"{list(header)}."
        )
    categories = {_NOMINAL[name]: header[name] for name in _NOMINAL}

    def rows() -> Iterator[list[str]]:
        lines = iter(_arff_lines(path))
        for line in lines:
            if line.startswith("@data"):
                break
        for line in lines:
            if line.strip():
                yield line.strip().split(",")

    def others(record: Mapping[str, str]) -> dict[str, Any]:
        return {
            "income": {"--50000.": 0, "50000+.": 1}[record["income"]],
            "never_married": int(record[_MARITAL] == "Never-married"),
        }

    encoded = encode_rows(
        rows(),
        path=path,
        columns=[*categories, "income"],
        numeric=[],
        categories=categories,
        others=others,
    )
    return Original({"train": encoded}, table_metadata([], categories))


def _targets() -> dict[str, tfds.features.FeatureConnector]:
    return {
        "income": tfds.features.ClassLabel(names=["- 50000", "50000+"]),
        "never_married": tfds.features.ClassLabel(names=["no", "yes"]),
    }


_COMMON = {
    "licence": "CC BY 4.0 (UCI record, second-hand statement)",
    "homepage": "https://archive.ics.uci.edu/dataset/117/census+income+kdd",
    "citation": "Census-Income (KDD), UCI Machine Learning Repository, 2000.",
    "tasks": ("income", "never_married"),
}

CENSUS: tuple[DatasetSpec, ...] = (
    DatasetSpec(
        name="census_income_kdd/original",
        description="Persons of the US surveys of 1994 and 1995: 7 numbers, 33 "
        "categories (`metadata` names them; code 0 is a missing value) and the survey "
        "weight, which is no input. Official splits; the folder may lack `train`. The "
        "category `marital stat` is the source of `never_married`.",
        splits={"train": 199_523, "test": 99_762},
        optional=frozenset({"train"}),
        features=lambda: {
            **table_features(7, 33),
            **_targets(),
            "weight": tfds.features.Scalar(np.float32),
        },
        read=_read_original,
        **_COMMON,
    ),
    DatasetSpec(
        name="census_income_kdd/nominal",
        description="All 299,285 persons with the 33 categories only, shuffled by the "
        "repository ADRepository, which lost the official splits.",
        splits={"train": 299_285},
        features=lambda: {**table_features(0, 33), **_targets()},
        read=_read_nominal,
        **_COMMON,
    ),
)
