"""From columns of a log to ids and standardised numbers, with statistics of training.

The ids of every field are 0 for a missing value, 1 for a value that training did not
have, and 2, 3, ... for the values that it had, in sorted order.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int32, Shaped

MISSING_ID = 0
UNKNOWN_ID = 1
_FIRST_ID = 2
_MISSING_TEXTS = ("", "?")

Column = Shaped[np.ndarray, " n"]


@dataclass(frozen=True)
class TableEncoder:
    """What training rows say about columns; made by :func:`fit_table_encoder`.

    Attributes:
      fields: names of the categorical columns.
      values: the sorted values of each field; the id of ``values[i]`` is ``i + 2``.
      numbers: names of the numeric columns.
      log1p: those of `numbers` whose logarithm is standardised.
      means: mean of each number, after the logarithm.
      stds: standard deviation of each, 1 where it is constant.
    """

    fields: tuple[str, ...]
    values: Mapping[str, Shaped[np.ndarray, " values"]]
    numbers: tuple[str, ...]
    log1p: frozenset[str]
    means: Mapping[str, float]
    stds: Mapping[str, float]

    @property
    def vocabulary_sizes(self) -> dict[str, int]:
        """Rows that an embedding table of each field needs, ids 0 and 1 included."""
        return {name: len(known) + _FIRST_ID for name, known in self.values.items()}

    def categorical(self, table: Mapping[str, Column]) -> Int32[np.ndarray, "n fields"]:
        """Returns the ids of all fields.

        Args:
          table: columns of equal length; unknown values become 1. Missing are negative
            integers, NaN, and the texts ``""`` and ``"?"``: they become 0.

        Returns:
          One column per field.

        Raises:
          ValueError: if a column is missing, or holds texts where training had numbers.
        """
        columns = [
            _ids(name, _column(table, name), self.values[name]) for name in self.fields
        ]
        return _side_by_side(table, columns, np.int32)

    def numeric(self, table: Mapping[str, Column]) -> Float32[np.ndarray, "n numbers"]:
        """Returns the standardised numbers; a missing one becomes 0, the mean.

        Args:
          table: columns of equal length, NaN where a value is missing.

        Returns:
          One column per number.

        Raises:
          ValueError: if a column is missing.
        """
        columns = []
        for name in self.numbers:
            values = _scaled(_column(table, name), name in self.log1p)
            scaled = (values - self.means[name]) / self.stds[name]
            columns.append(np.nan_to_num(scaled, nan=0.0))
        return _side_by_side(table, columns, np.float32)


def fit_table_encoder(
    chunks: Iterable[Mapping[str, Shaped[np.ndarray, " _"]]],
    *,
    fields: Sequence[str],
    numbers: Sequence[str] = (),
    log1p: Sequence[str] = (),
    min_count: int = 1,
) -> TableEncoder:
    r"""Collects the values of the fields and the moments of the numbers, in one pass.

    Numbers in `log1p` are replaced by :math:`\operatorname{sign}(x) \log(1 + |x|)`.

    Args:
      chunks: parts of the training rows, each a table of columns of equal length; they
        may be read lazily. Memory grows with the number of values, not of rows.
      fields: names of the categorical columns: integers, numbers or texts.
      numbers: names of the numeric columns.
      log1p: which of `numbers` have a heavy tail.
      min_count: values that occur less often get the id 1; at least 1.

    Returns:
      The encoder.

    Raises:
      ValueError: if there are no rows, a column is missing, `log1p` names no number
        or `min_count` is below 1.

    Example:
      >>> train = {"shop": np.array(["b", "a", "b"]), "price": np.array([1.0, 2, 3])}
      >>> encoder = fit_table_encoder([train], fields=["shop"], numbers=["price"])
      >>> encoder.categorical({"shop": np.array(["a", "b", "c", ""])}).tolist()
      [[2], [3], [1], [0]]
    """
    if min_count < 1:
        raise ValueError(f"`min_count` must be at least 1, got {min_count}.")
    strange = sorted(set(log1p) - set(numbers))
    if strange:
        raise ValueError(
            f"`log1p` must name columns of `numbers` {list(numbers)}, got {strange}."
        )
    counts: dict[str, Counter] = {name: Counter() for name in fields}
    dtypes: dict[str, np.dtype] = {}
    moments = dict.fromkeys(numbers, (0, 0.0, 0.0))
    rows = 0
    for table in chunks:
        rows += max(map(len, table.values()), default=0)
        for name in fields:
            values = _column(table, name)
            present, times = np.unique(values[~_missing(values)], return_counts=True)
            dtypes.setdefault(name, present.dtype)
            counts[name].update(
                dict(zip(present.tolist(), times.tolist(), strict=True))
            )
        for name in numbers:
            values = _scaled(_column(table, name), name in log1p)
            moments[name] = _merge(moments[name], values[~np.isnan(values)])
    if not rows:
        raise ValueError("`chunks` must hold at least one training row, got none.")
    known = {}
    for name, times in counts.items():
        kept = sorted(value for value, number in times.items() if number >= min_count)
        # Texts get the width that the longest needs; the first chunk may lack it.
        texts = kept and dtypes[name].kind in "US"
        known[name] = np.array(kept, dtype=None if texts else dtypes[name])
    stds = {
        name: float(np.sqrt(squares / number)) if number else 0.0
        for name, (number, _, squares) in moments.items()
    }
    return TableEncoder(
        fields=tuple(fields),
        values=known,
        numbers=tuple(numbers),
        log1p=frozenset(log1p),
        means={name: mean for name, (_, mean, _) in moments.items()},
        stds={name: std if std > 0.0 else 1.0 for name, std in stds.items()},
    )


def _column(table: Mapping[str, Column], name: str) -> Column:
    if name not in table:
        raise ValueError(
            f"`table` must hold the column {name!r}, got {sorted(table)}. Add it, "
            "filled with missing values if nothing is known."
        )
    return np.asarray(table[name])


def _missing(values: Column) -> Shaped[np.ndarray, " n"]:
    if values.dtype.kind == "f":
        return np.isnan(values)
    if values.dtype.kind in "US":
        return np.isin(values, np.array(_MISSING_TEXTS, dtype=values.dtype))
    return values < 0


def _ids(name: str, values: Column, known: Shaped[np.ndarray, " values"]) -> Column:
    texts = values.dtype.kind in "US"
    if len(known) and texts != (known.dtype.kind in "US"):
        raise ValueError(
            f"`table` must hold in {name!r} what training had, got {values.dtype} "
            f"instead of {known.dtype}. Convert the column."
        )
    ids = np.full(len(values), UNKNOWN_ID, np.int32)
    if len(known):
        places = np.minimum(np.searchsorted(known, values), len(known) - 1)
        same = known[places] == values
        ids[same] = places[same] + _FIRST_ID
    ids[_missing(values)] = MISSING_ID
    return ids


def _scaled(values: Column, logarithm: bool) -> Float[np.ndarray, " n"]:
    values = values.astype(np.float64)
    return np.sign(values) * np.log1p(np.abs(values)) if logarithm else values


def _merge(
    moments: tuple[int, float, float], values: Float[np.ndarray, " n"]
) -> tuple[int, float, float]:
    # Sums of squares of large numbers would lose the small differences; this does not
    # (Chan, Golub and LeVeque, 1979).
    number, mean, squares = moments
    if not len(values):
        return moments
    total = number + len(values)
    gap = float(values.mean()) - mean
    squares += float(((values - values.mean()) ** 2).sum())
    squares += gap**2 * number * len(values) / total
    return total, mean + gap * len(values) / total, squares


def _side_by_side(
    table: Mapping[str, Column], columns: Sequence[Column], dtype: type
) -> Shaped[np.ndarray, "n columns"]:
    if columns:
        return np.stack(columns, axis=1).astype(dtype)
    return np.zeros((len(next(iter(table.values()))), 0), dtype)
