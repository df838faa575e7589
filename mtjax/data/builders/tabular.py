"""Tables with several targets: adult, parkinsons, energy, school, wine."""

import csv
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import scipy.io
import tensorflow_datasets as tfds

from mtjax.data.builders.rows import (
    encode_rows,
    read_c45_names,
    table_features,
    table_metadata,
)
from mtjax.data.builders.spec import DatasetSpec, Original, require

_UCI = "CC BY 4.0 (UCI record, second-hand statement)"
_WITH_SPOUSE = ("Married-civ-spouse", "Married-AF-spouse")
_VOICE = (
    *("Jitter(%)", "Jitter(Abs)", "Jitter:RAP", "Jitter:PPQ5", "Jitter:DDP"),
    *("Shimmer", "Shimmer(dB)", "Shimmer:APQ3", "Shimmer:APQ5", "Shimmer:APQ11"),
    *("Shimmer:DDA", "NHR", "HNR", "RPDE", "DFA", "PPE"),
)
_WINE = (
    *("fixed acidity", "volatile acidity", "citric acid", "residual sugar"),
    *("chlorides", "free sulfur dioxide", "total sulfur dioxide", "density"),
    *("pH", "sulphates", "alcohol"),
)
_BUILDING = (
    *("relative_compactness", "surface_area", "wall_area", "roof_area"),
    *("overall_height", "orientation", "glazing_area", "glazing_area_distribution"),
)


def _fields(path: Path, delimiter: str = ",") -> Iterator[list[str]]:
    with path.open(encoding="latin-1", newline="") as file:
        for fields in csv.reader(file, delimiter=delimiter):
            if fields:
                yield [field.strip() for field in fields]


def _read_adult(folder: Path) -> Original:
    names = read_c45_names(require(folder, "adult.names"))
    numeric = [name for name, values in names.items() if values is None]
    categories = {name: values for name, values in names.items() if values}

    def others(record: Mapping[str, str]) -> dict[str, Any]:
        return {
            "income": {"<=50K": 0, ">50K": 1}[record["income"].removesuffix(".")],
            "married": int(record["marital-status"] in _WITH_SPOUSE),
        }

    splits = {}
    for split, file in (("train", "adult.data"), ("test", "adult.test")):
        path = require(folder, file)
        # The test file opens with a line that is no example.
        rows = (row for row in _fields(path) if not row[0].startswith("|"))
        splits[split] = encode_rows(
            rows,
            path=path,
            columns=[*names, "income"],
            numeric=numeric,
            categories=categories,
            others=others,
        )
    return Original(splits, table_metadata(numeric, categories))


def _read_parkinsons(folder: Path) -> Original:
    path = require(folder, "parkinsons_updrs.data")
    rows = _fields(path)
    columns = next(rows)
    numeric = ["age", "sex", "test_time", *_VOICE]

    def others(record: Mapping[str, str]) -> dict[str, Any]:
        return {
            "motor_updrs": float(record["motor_UPDRS"]),
            "total_updrs": float(record["total_UPDRS"]),
            "subject": int(record["subject#"]),
        }

    encoded = encode_rows(
        rows, path=path, columns=columns, numeric=numeric, categories={}, others=others
    )
    return Original({"train": encoded}, table_metadata(numeric, {}))


def _sheet_rows(path: Path) -> Iterator[list[str]]:
    """Reads the filled rows of the first sheet of a workbook, without the header."""
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    with zipfile.ZipFile(path) as book:
        sheet = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
    for row in list(sheet.iter(f"{space}row"))[1:]:
        values = [cell.text or "" for cell in row.iter(f"{space}v")]
        # The sheet goes on with formatted but empty rows.
        if values:
            yield values


def _read_energy(folder: Path) -> Original:
    path = require(folder, "ENB2012_data.xlsx")

    def others(record: Mapping[str, str]) -> dict[str, Any]:
        return {name: float(record[name]) for name in ("heating_load", "cooling_load")}

    encoded = encode_rows(
        _sheet_rows(path),
        path=path,
        columns=[*_BUILDING, "heating_load", "cooling_load"],
        numeric=_BUILDING,
        categories={},
        others=others,
    )
    return Original({"train": encoded}, table_metadata(_BUILDING, {}))


def _read_school(folder: Path) -> Original:
    path = require(folder, "school.mat")

    def rows() -> Iterator[dict[str, Any]]:
        content = scipy.io.loadmat(path)
        pairs = zip(content["X"].ravel(), content["Y"].ravel(), strict=True)
        for school, (inputs, scores) in enumerate(pairs):
            for pupil, score in zip(inputs, scores.ravel(), strict=True):
                yield {
                    "numeric": pupil.astype(np.float32),
                    "score": float(score),
                    "school": school,
                }

    return Original({"train": rows()})


def _read_wine(folder: Path, *, colour: str) -> Original:
    path = require(folder, f"winequality-{colour}.csv")
    with path.open() as file:
        delimiter = ";" if ";" in file.readline() else ","
    rows = (row for row in _fields(path, delimiter) if row[0] != _WINE[0])

    encoded = encode_rows(
        rows,
        path=path,
        columns=[*_WINE, "quality"],
        numeric=_WINE,
        categories={},
        others=lambda record: {"quality": float(record["quality"])},
    )
    return Original({"train": encoded}, table_metadata(_WINE, {}))


def _scalars(*names: str) -> dict[str, tfds.features.FeatureConnector]:
    return {name: tfds.features.Scalar(np.float32) for name in names}


TABULAR: tuple[DatasetSpec, ...] = (
    DatasetSpec(
        name="adult",
        description="Persons of the US census of 1994: 6 numbers and 8 categories "
        "(`metadata` names them; code 0 is a missing value). Official splits. "
        "`married` means living with a spouse and is made from `marital-status`.",
        licence=_UCI,
        homepage="https://archive.ics.uci.edu/dataset/2/adult",
        citation="Scaling up the accuracy of naive-Bayes classifiers, 1996.",
        tasks=("income", "married"),
        splits={"train": 32_561, "test": 16_281},
        features=lambda: {
            **table_features(6, 8),
            "income": tfds.features.ClassLabel(names=["<=50K", ">50K"]),
            "married": tfds.features.ClassLabel(names=["no", "yes"]),
        },
        read=_read_adult,
    ),
    DatasetSpec(
        name="parkinsons_telemonitoring",
        description="Voice recordings of 42 persons with Parkinson's disease: age, "
        "sex, day and 16 voice measures; two scores of the disease. No official "
        "split: keep the recordings of one `subject` on one side.",
        licence=_UCI,
        homepage="https://archive.ics.uci.edu/dataset/189/parkinsons+telemonitoring",
        citation="Accurate telemonitoring of Parkinson's disease progression by "
        "noninvasive speech tests, 2010.",
        tasks=("motor_updrs", "total_updrs"),
        splits={"train": 5_875},
        features=lambda: {
            **table_features(19),
            **_scalars("motor_updrs", "total_updrs"),
            "subject": tfds.features.Scalar(np.int32),
        },
        read=_read_parkinsons,
    ),
    DatasetSpec(
        name="energy_efficiency",
        description="Simulated buildings: 8 measures, heating and cooling load in "
        "kWh per square metre. No official split.",
        licence=_UCI,
        homepage="https://archive.ics.uci.edu/dataset/242/energy+efficiency",
        citation="Accurate quantitative estimation of energy performance of "
        "residential buildings using statistical machine learning tools, 2012.",
        tasks=("heating_load", "cooling_load"),
        splits={"train": 768},
        features=lambda: {
            **table_features(8),
            **_scalars("heating_load", "cooling_load"),
        },
        read=_read_energy,
    ),
    DatasetSpec(
        name="school",
        description="Examination scores of pupils of 139 London schools (ILEA): 27 "
        "inputs and a constant; every school is a task. No official split.",
        licence="unclear (none stated for the data; shipped in a GPL-3 toolbox)",
        homepage="https://github.com/jiayuzhou/MALSAR",
        citation="Convex multi-task feature learning, 2008.",
        tasks=("score",),
        splits={"train": 15_362},
        features=lambda: {
            **table_features(28),
            **_scalars("score"),
            "school": tfds.features.Scalar(np.int32),
        },
        read=_read_school,
    ),
    *(
        DatasetSpec(
            name=f"wine_quality/{colour}",
            description=f"Physical and chemical measures of {colour} wines and the "
            "quality that tasters gave, 0 to 10. No official split.",
            licence=_UCI,
            homepage="https://archive.ics.uci.edu/dataset/186/wine+quality",
            citation="Modeling wine preferences by data mining from physicochemical "
            "properties, 2009.",
            tasks=("quality",),
            splits={"train": rows},
            features=lambda: {**table_features(11), **_scalars("quality")},
            read=partial(_read_wine, colour=colour),
        )
        for colour, rows in (("red", 1_599), ("white", 4_898))
    ),
)
