"""Diginetica: the next item of an anonymous session in a web shop."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from mtjax.data.builders.prepare import SPECS
from mtjax.data.builders.spec import DataFormatError, require
from mtjax.data.sequences import SequenceProblem, sequence_problem
from mtjax.data.sources import DataNotFoundError, tfds_source

_NAME = "diginetica_sample"
# Numbers of prices are logarithms to the base 2 in the original, one bin each.
_PRICE = "pricelog2"


def diginetica_sequences(
    *,
    data_dir: str | Path | None = None,
    products: str | Path | None = None,
    length: int = 20,
    min_views: int = 1,
    test_days: int = 7,
    validation_days: int = 7,
    max_words: int = 12,
) -> SequenceProblem:
    """Loads sessions of viewed items; every view with an earlier one is a target.

    Sessions of the last `test_days` days are for the test, those of the
    `validation_days` before for validation.

    Args:
      data_dir: folder of the prepared data; :func:`mtjax.data.default_data_dir` if
        None.
      products: folder with the original ``product-categories.csv`` and
        ``products.csv``, for the fields ``category`` (the category level) and ``price``
        and the words of the ``name``; without it the catalogue has no metadata.
      length: longest history.
      min_views: items that training views less often are removed from all sessions;
        5 in the literature, 1 for all items of training, 0 to keep items that only the
        test has.
      test_days: days of the test, at least 1.
      validation_days: days of validation, at least 1.
      max_words: how many words of a name are kept.

    Returns:
      The problem.

    Raises:
      ValueError: if a number is out of range.
      DataNotFoundError: if the data are not prepared or a file is missing.
      DataFormatError: if a file of `products` has other columns.
    """
    if min(test_days, validation_days) < 1 or min_views < 0:
        raise ValueError(
            "`test_days` and `validation_days` must be at least 1 and `min_views` at "
            f"least 0, got {test_days}, {validation_days} and {min_views}."
        )
    source = tfds_source(_NAME, "train", data_dir=data_dir)
    rows = source.__getitems__(range(len(source)))
    if "day" not in rows[0]:
        raise DataNotFoundError(
            f"`data_dir` holds {_NAME!r} without the days of sessions: an earlier "
            "version of mtjax prepared it. Remove the folder and prepare it again."
        )
    views = [len(row["items"]) for row in rows]
    groups, days = (
        np.repeat([int(row[key]) for row in rows], views) for key in ("session", "day")
    )
    items = np.concatenate([row["items"] for row in rows])
    times = np.concatenate([row["timeframes"] for row in rows])
    test = days.max() - test_days + 1
    parts = np.searchsorted([test - validation_days, test], days, side="right")
    if min_views:
        known, counts = np.unique(items[parts == 0], return_counts=True)
        kept = np.isin(items, known[counts >= min_views])
        groups, times, items, parts = (x[kept] for x in (groups, times, items, parts))
    catalogue = np.unique(items)
    metadata = _metadata(Path(products), catalogue, max_words) if products else {}
    return sequence_problem(
        _NAME,
        groups=groups,
        times=times,
        items=items,
        parts=parts,
        length=length,
        catalogue=catalogue,
        **metadata,
        description=f"Sessions of views; the last {test_days} days are for the test, "
        f"{validation_days} before for validation; items with {min_views} views or "
        "more in training.",
        licence=SPECS[_NAME].licence,
    )


def _metadata(
    folder: Path, items: Int[np.ndarray, " items"], max_words: int
) -> dict[str, Any]:
    wanted = set(items.tolist())
    category: dict[int, str] = {}
    for row in _lines(require(folder, "product-categories.csv"), "categoryid"):
        if int(row["itemid"]) in wanted:
            category[int(row["itemid"])] = row["categoryid"]
    price: dict[int, str] = {}
    words: dict[int, list[str]] = {}
    path = require(folder, "products.csv")
    for row in _lines(path, _PRICE, "product.name.tokens"):
        if int(row["itemid"]) in wanted:
            price[int(row["itemid"])] = row[_PRICE]
            words[int(row["itemid"])] = row["product.name.tokens"].split(",")
    order = items.tolist()
    return {
        "fields": {
            "category": np.array([category.get(item, "") for item in order]),
            "price": np.array([price.get(item, "") for item in order]),
        },
        "levels": ("category",),
        "texts": {"name": ([words.get(item, []) for item in order], max_words)},
    }


def _lines(path: Path, *columns: str) -> Iterator[Mapping[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter=";")
        # Two spellings of the columns are about: item_id and itemId.
        header = [name.lower().replace("_", "") for name in next(rows, [])]
        absent = {"itemid", *columns} - set(header)
        if absent:
            raise DataFormatError(
                f"{str(path)!r} must have the columns {['itemid', *columns]}, got "
                f"{header}."
            )
        for fields in rows:
            yield dict(zip(header, fields, strict=True))
