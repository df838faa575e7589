"""Rows of a table turned into one vector of numbers and one of category codes.

One feature per column would be more talkative, but TFDS then reads and writes about
five thousand rows a second instead of forty thousand.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mtjax.data.builders.spec import DataFormatError

MISSING = "?"


def table_features(
    numeric: int, categorical: int = 0
) -> dict[str, tfds.features.FeatureConnector]:
    """Returns the features ``numeric`` and ``categorical`` of the given widths."""
    features: dict[str, tfds.features.FeatureConnector] = {}
    if numeric:
        features["numeric"] = tfds.features.Tensor(shape=(numeric,), dtype=np.float32)
    if categorical:
        features["categorical"] = tfds.features.Tensor(
            shape=(categorical,), dtype=np.int32
        )
    return features


def table_metadata(
    numeric: Sequence[str], categories: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Returns the names of the columns and what the codes mean, for ``metadata``."""
    return {
        "numeric": list(numeric),
        "categorical": {name: list(values) for name, values in categories.items()},
    }


def encode_rows(
    rows: Iterable[Sequence[str]],
    *,
    path: Path,
    columns: Sequence[str],
    numeric: Sequence[str],
    categories: Mapping[str, Sequence[str]],
    others: Callable[[Mapping[str, str]], Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Turns rows of text into the features of :func:`table_features`.

    Args:
      rows: fields of every row.
      path: the file, for error messages.
      columns: names of the fields.
      numeric: columns that become float32, in this order; ``"?"`` becomes NaN.
      categories: columns that become codes, with their values; a code is the
        position of the value.
      others: makes the remaining features from ``{column: text}``.

    Yields:
      One example per row.

    Raises:
      DataFormatError: if a row has another number of fields, a number is not one or
        a category is unknown.
    """
    codes = {
        name: {value: code for code, value in enumerate(values)}
        for name, values in categories.items()
    }
    for line, fields in enumerate(rows, start=1):
        if len(fields) != len(columns):
            raise DataFormatError(
                f"{str(path)!r} must have {len(columns)} fields in every row, got "
                f"{len(fields)} in row {line}."
            )
        record = dict(zip(columns, fields, strict=True))
        row: dict[str, Any] = {}
        try:
            if numeric:
                row["numeric"] = np.array(
                    [
                        np.nan if record[name] == MISSING else float(record[name])
                        for name in numeric
                    ],
                    dtype=np.float32,
                )
            if codes:
                row["categorical"] = np.array(
                    [code[record[name]] for name, code in codes.items()],
                    dtype=np.int32,
                )
            row.update(others(record))
        except (KeyError, ValueError) as error:
            raise DataFormatError(
                f"{str(path)!r} has an unexpected value in row {line}: {error}."
            ) from error
        yield row


def read_c45_names(path: Path) -> dict[str, list[str] | None]:
    """Reads the columns of a ``.names`` file of the UCI repository.

    Args:
      path: lines such as ``sex: Female, Male.`` or ``age: continuous.`` among
        comments that start with a bar.

    Returns:
      The values of each column, the mark of a missing value first; None for numbers.
    """
    columns: dict[str, list[str] | None] = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        name, colon, text = line.partition(":")
        if not colon or line.startswith("|"):
            continue
        values = [value.strip() for value in text.strip().removesuffix(".").split(",")]
        columns[name.strip()] = None if values == ["continuous"] else [MISSING, *values]
    return columns
