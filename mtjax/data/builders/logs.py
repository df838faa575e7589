"""Logs of what people rated, viewed, clicked and bought."""

import csv
import datetime
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mtjax.data.builders.rows import table_features
from mtjax.data.builders.spec import DataFormatError, DatasetSpec, Original, require

_GENRES = (
    *("(no genres listed)", "Action", "Adventure", "Animation", "Children"),
    *("Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir", "Horror"),
    *("IMAX", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_LIKED = 4.0
_NO_YES = ["no", "yes"]
# Configuration: folder, tasks, numbers of numeric and integer columns, examples.
_CLICKS = {
    "ali_ccp": ("ali-ccp", ("click", "purchase"), (8, 23), (100, 50, 50)),
    "aliexpress": ("aliexpress", ("click", "conversion"), (63, 17), (100, 0, 20)),
}
_FILES = {"train": "train", "validation": "val", "test": "test"}


def _records(
    path: Path,
    example: Callable[[Mapping[str, str]], Mapping[str, Any]],
    delimiter: str = ",",
) -> Iterator[dict[str, Any]]:
    """Makes examples of ``{column in lower case: text}``."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter)
        columns = [name.lower() for name in next(rows, [])]
        for line, fields in enumerate(rows, start=2):
            try:
                record = dict(zip(columns, fields, strict=True))
                yield dict(example(record))
            except (KeyError, ValueError) as error:
                raise DataFormatError(
                    f"{str(path)!r} has an unexpected value in line {line}: {error}."
                ) from error


def _read_movielens(folder: Path) -> Original:
    ratings = require(folder, "ratings.csv")
    movies = require(folder, "movies.csv")
    tags = require(folder, "tags.csv")
    codes = {genre: code for code, genre in enumerate(_GENRES)}

    def genres(record: Mapping[str, str]) -> dict[str, Any]:
        flags = np.zeros(len(_GENRES), np.uint8)
        flags[[codes[genre] for genre in record["genres"].split("|")]] = 1
        return {"id": int(record["movieid"]), "genres": flags}

    def title(record: Mapping[str, str]) -> dict[str, Any]:
        return {record["movieid"]: record["title"].strip()}

    def pair(record: Mapping[str, str]) -> dict[str, Any]:
        return {"user": int(record["userid"]), "movie": int(record["movieid"])}

    def rows() -> Iterator[dict[str, Any]]:
        genres_of = {row["id"]: row["genres"] for row in _records(movies, genres)}
        tagged = {(row["user"], row["movie"]) for row in _records(tags, pair)}

        def rating(record: Mapping[str, str]) -> dict[str, Any]:
            seen = pair(record)
            value = float(record["rating"])
            return {
                **seen,
                "genres": genres_of[seen["movie"]],
                "timestamp": int(record["timestamp"]),
                "rating": value,
                "liked": int(value >= _LIKED),
                "tagged": int((seen["user"], seen["movie"]) in tagged),
            }

        yield from _records(ratings, rating)

    # Here and not in the rows, where reading them would take most of the time.
    titles = {key: text for row in _records(movies, title) for key, text in row.items()}
    return Original({"train": rows()}, {"genres": list(_GENRES), "titles": titles})


def _read_diginetica(folder: Path) -> Original:
    path = require(folder, "sample_train-item-views.csv")

    def view(record: Mapping[str, str]) -> dict[str, Any]:
        return {
            "session": int(record["session_id"]),
            "item": int(record["item_id"]),
            "timeframe": int(record["timeframe"]),
            "day": datetime.date.fromisoformat(record["eventdate"]).toordinal(),
        }

    def rows() -> Iterator[dict[str, Any]]:
        views = _records(path, view, ";")
        for session, group in itertools.groupby(views, lambda row: row["session"]):
            # Within a session the file is in no order.
            ordered = sorted(group, key=lambda row: row["timeframe"])
            yield {
                "session": session,
                "day": max(row["day"] for row in ordered),
                **{
                    f"{name}s": np.array([row[name] for row in ordered], np.int32)
                    for name in ("item", "timeframe")
                },
            }

    return Original({"train": rows()})


def _read_clicks(
    folder: Path, *, subfolder: str, tasks: tuple[str, str], splits: Mapping[str, int]
) -> Original:
    numeric: list[str] = []
    integers: list[str] = []

    def rows(path: Path) -> Iterator[dict[str, Any]]:
        def click(record: Mapping[str, str]) -> dict[str, Any]:
            return {
                "numeric": np.array([record[name] for name in numeric], np.float32),
                "categorical": np.array([record[name] for name in integers], np.int32),
                **{task: int(record[task]) for task in tasks},
            }

        return _records(path, click)

    paths = {
        split: require(
            folder / subfolder,
            f"{subfolder.replace('-', '_')}_{_FILES[split]}_sample.csv",
        )
        for split in splits
    }
    with paths["train"].open(encoding="utf-8") as file:
        for name in file.readline().strip().lower().split(","):
            if name.startswith(("numerical", "d")):
                numeric.append(name)
            elif name not in tasks:
                integers.append(name)
    return Original(
        {split: rows(path) for split, path in paths.items()},
        {"numeric": numeric, "categorical": integers},
    )


def _clicks_spec(
    config: str,
    subfolder: str,
    tasks: tuple[str, str],
    widths: tuple[int, int],
    sizes: tuple[int, int, int],
) -> DatasetSpec:
    splits = {split: size for split, size in zip(_FILES, sizes, strict=True) if size}
    return DatasetSpec(
        name=f"recsys_samples/{config}",
        description="A few rows of a log of a web shop, for tests of formats: numbers, "
        "codes (`metadata` names both), whether the item was clicked and bought.",
        licence="MIT for the repository; the data under their own terms",
        homepage="https://github.com/datawhalechina/torch-rechub",
        citation="Torch-RecHub, 2022.",
        tasks=tasks,
        splits=splits,
        features=lambda: {**table_features(*widths), **_flags(*tasks)},
        read=partial(_read_clicks, subfolder=subfolder, tasks=tasks, splits=splits),
    )


def _integers(*names: str) -> dict[str, tfds.features.FeatureConnector]:
    return {name: tfds.features.Scalar(np.int32) for name in names}


def _flags(*names: str) -> dict[str, tfds.features.FeatureConnector]:
    return {name: tfds.features.ClassLabel(names=_NO_YES) for name in names}


LOGS: tuple[DatasetSpec, ...] = (
    DatasetSpec(
        name="movielens_latest_small",
        description="Ratings of films, 0.5 to 5 stars, by 610 users. `genres` are "
        "flags (`metadata` names them and has the `titles`), `liked` means four stars "
        "or more, `tagged` that the user also gave the film a tag. No official split.",
        licence="GroupLens terms: redistribution under the same terms, no commercial "
        "use",
        homepage="https://grouplens.org/datasets/movielens/",
        citation="The MovieLens datasets: History and context, 2015.",
        tasks=("rating", "liked", "tagged"),
        splits={"train": 100_836},
        features=lambda: {
            **_integers("user", "movie"),
            "genres": tfds.features.Tensor(shape=(len(_GENRES),), dtype=np.uint8),
            "timestamp": tfds.features.Scalar(np.int64),
            "rating": tfds.features.Scalar(np.float32),
            **_flags("liked", "tagged"),
        },
        read=_read_movielens,
    ),
    DatasetSpec(
        name="diginetica_sample",
        description="Sessions of visitors of a web shop: the viewed items in the order "
        "of `timeframes`, at least one, and the `day` of the last (ordinal, as in "
        "Python's datetime). Task: the next of `items`. No official split.",
        licence="unclear (the source states none)",
        homepage="https://github.com/CRIPAC-DIG/SR-GNN",
        citation="CIKM Cup 2016 Track 2: Personalized E-Commerce Search Challenge.",
        tasks=("items",),
        splits={"train": 2_986},
        features=lambda: {
            **_integers("session", "day"),
            "items": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "timeframes": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        },
        read=_read_diginetica,
    ),
    *(_clicks_spec(config, *fields) for config, fields in _CLICKS.items()),
)
