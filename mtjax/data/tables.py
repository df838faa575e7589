"""From prepared tables to float32 arrays, with statistics of the training rows only."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Shaped
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler


def encode_inputs(
    columns: Mapping[str, Shaped[np.ndarray, "n ..."]],
    metadata: Mapping[str, Any],
    *,
    drop: Sequence[str],
    train_rows: Int[np.ndarray, " train"],
) -> Float32[np.ndarray, "n features"]:
    """Standardises the numbers and encodes the categories of a prepared table.

    Args:
      columns: what the builders of tables write: ``numeric`` of shape ``(n, a)``,
        ``categorical`` of shape ``(n, b)`` or both.
      metadata: what they store beside it: the names of these columns.
      drop: names of columns that are not inputs.
      train_rows: the rows whose statistics and categories count.

    Returns:
      The inputs, finite; a category that is not among the training rows is all zeros.

    Raises:
      ValueError: if a name in `drop` is not a column.
    """
    names = [*metadata["numeric"], *metadata["categorical"]]
    unknown = sorted(set(drop) - set(names))
    if unknown:
        raise ValueError(f"`drop` must name columns among {names}, got {unknown}.")
    table = np.concatenate(
        [
            np.asarray(columns[kind], dtype=np.float32)
            for kind in ("numeric", "categorical")
            if kind in columns
        ],
        axis=1,
    )
    kept = [place for place, name in enumerate(names) if name not in drop]
    boundary = len(metadata["numeric"])
    numbers = make_pipeline(
        SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True),
        StandardScaler(),
    )
    categories = OneHotEncoder(
        handle_unknown="ignore", sparse_output=False, dtype=np.float32
    )
    encoder = ColumnTransformer(
        [
            ("numbers", numbers, [place for place in kept if place < boundary]),
            ("categories", categories, [p for p in kept if p >= boundary]),
        ],
        sparse_threshold=0.0,
    )
    encoder.fit(table[train_rows])
    return np.asarray(encoder.transform(table), dtype=np.float32)


def scale_targets(
    values: Float32[np.ndarray, " n"], train_rows: Int[np.ndarray, " train"]
) -> tuple[Float32[np.ndarray, " n"], float, float]:
    """Standardises a target; missing ones stay NaN.

    Args:
      values: the original numbers.
      train_rows: the rows whose mean and standard deviation count.

    Returns:
      The scaled target, the mean and the standard deviation.

    Example:
      >>> scale_targets(np.array([1, 3, 5], np.float32), np.array([0, 1]))
      (array([-1.,  1.,  3.], dtype=float32), 2.0, 1.0)
    """
    mean = float(np.nanmean(values[train_rows], dtype=np.float64))
    std = float(np.nanstd(values[train_rows], dtype=np.float64))
    # A target that is the same in every training row has no scale of its own.
    std = std if std > 0.0 else 1.0
    return ((values - mean) / std).astype(np.float32), mean, std


def split_rows(
    sizes: Sequence[int], groups: Shaped[np.ndarray, " n"] | None, *, seed: int
) -> dict[str, Int[np.ndarray, " rows"]]:
    """Splits rows into training, validation and test part, always the same way.

    Args:
      sizes: the rows of the official training and test part, or of the only part.
      groups: what must stay together, such as a person; only with one part.
      seed: decides the random parts.

    Returns:
      Sorted row numbers by split. With two official parts a tenth of the first is for
      validation; with one it is split 70/10/20.

    Example:
      >>> rows = split_rows([80, 20], None, seed=0)
      >>> {split: len(chosen) for split, chosen in rows.items()}
      {'train': 72, 'validation': 8, 'test': 20}
    """
    places = np.arange(sum(sizes))
    if len(sizes) == 2:
        rest, test = places[: sizes[0]], places[sizes[0] :]
        share = 0.1
    else:
        rest, test = _cut(places, groups, 0.2, seed)
        share = 0.1 / 0.8
    train, validation = _cut(
        rest, None if groups is None else groups[rest], share, seed
    )
    return {"train": train, "validation": validation, "test": test}


def _cut(
    rows: Int[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"] | None,
    share: float,
    seed: int,
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " taken"]]:
    kind = ShuffleSplit if groups is None else GroupShuffleSplit
    splitter = kind(n_splits=1, test_size=share, random_state=seed)
    kept, taken = next(splitter.split(rows, groups=groups))
    return np.sort(rows[kept]), np.sort(rows[taken])
