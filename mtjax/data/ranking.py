"""Ranking problems: ids, numbers and labels of several tasks per impression."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Shaped

from mtjax.data.table_encoder import TableEncoder, fit_table_encoder

Split = dict[str, Any]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class RankingProblem:
    """Impressions with labels of several binary tasks, split and encoded.

    A split is a dict of arrays that have one row per impression:

    - ``categorical``: int32 ids of shape ``(n, fields)``, 0 missing, 1 not in training;
    - ``numeric``: float32 of shape ``(n, numbers)``, standardised with training;
    - ``labels``: ``{task: float32 of shape (n,)}`` of 0, 1 and NaN for no label;
    - ``user``: ids of shape ``(n,)`` for metrics per user, in logs only;
    - what the loader adds, such as ``history``: ``{name: int32 of shape (n, length)}``.

    Attributes:
      name: of the data and the group of tasks.
      tasks: names of the tasks, in the order of the literature.
      encoder: field names, vocabularies and statistics; encodes new rows as well.
      train: for fitting.
      validation: for choosing hyperparameters.
      test: for the final number.
      description: the inputs, what was removed from them, and the split.
      licence: of the data.
      facts: what else the loader tells, such as the names of flags.
    """

    name: str
    tasks: tuple[str, ...]
    encoder: TableEncoder
    train: Split
    validation: Split
    test: Split
    description: str
    licence: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the columns of ``categorical``."""
        return self.encoder.fields

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the columns of ``numeric``."""
        return self.encoder.numbers

    @property
    def vocabulary_sizes(self) -> dict[str, int]:
        """Rows that an embedding table of each field needs, ids 0 and 1 included."""
        return self.encoder.vocabulary_sizes

    def split(self, name: str) -> Split:
        """Returns a split by name.

        Raises:
          ValueError: if `name` is none of ``"train"``, ``"validation"``, ``"test"``.
        """
        if name not in SPLITS:
            raise ValueError(f"`name` must be one of {SPLITS}, got {name!r}.")
        return getattr(self, name)


def ranking_problem(
    name: str,
    table: Mapping[str, Shaped[np.ndarray, " n"]],
    rows: Mapping[str, Int[np.ndarray, " rows"]],
    *,
    tasks: Sequence[str],
    fields: Sequence[str],
    numbers: Sequence[str] = (),
    log1p: Sequence[str] = (),
    min_count: int = 1,
    extras: Mapping[str, Any] | None = None,
    description: str = "",
    licence: str = "",
    facts: Mapping[str, Any] | None = None,
) -> RankingProblem:
    """Encodes a table of impressions; vocabularies and statistics come from training.

    Args:
      name: of the problem.
      table: columns of equal length; see :meth:`TableEncoder.categorical` for what
        counts as missing.
      rows: row numbers of ``"train"``, ``"validation"`` and ``"test"``.
      tasks: columns with the labels 0, 1 and NaN for no label.
      fields: categorical columns.
      numbers: numeric columns.
      log1p: which of `numbers` have a heavy tail; see :func:`fit_table_encoder`.
      min_count: values of fields that training has less often get the id 1.
      extras: more for the splits: arrays with `n` rows, or dicts of such.
      description: the inputs and the split, in words.
      licence: of the data.
      facts: passed on.

    Returns:
      The problem.

    Raises:
      ValueError: if a column or a split is missing, a task is also an input, or a
        label is none of 0, 1 and NaN.

    Example:
      >>> table = {"shop": np.array(["a", "b", "c"]), "click": np.array([0, 1, 1])}
      >>> rows = {"train": np.array([0, 1]), "validation": np.array([2])}
      >>> problem = ranking_problem(
      ...     "clicks", table, {**rows, "test": np.array([2])}, tasks=["click"],
      ...     fields=["shop"],
      ... )
      >>> problem.test["categorical"].tolist(), problem.vocabulary_sizes
      ([[1]], {'shop': 4})
    """
    leaks = sorted(set(tasks) & {*fields, *numbers})
    if leaks:
        raise ValueError(
            f"`fields` and `numbers` must not hold a task, got {leaks}: the model "
            "would read its labels. Remove them."
        )
    labels = {task: _labels(table, task) for task in tasks}
    absent = [split for split in SPLITS if split not in rows]
    if absent:
        raise ValueError(
            f"`rows` must hold the splits {SPLITS}, got {sorted(rows)}. Give an empty "
            "array for a split that is not needed."
        )
    used = [*fields, *numbers]
    parts = {
        split: {
            key: np.asarray(table[key])[rows[split]] for key in used if key in table
        }
        for split in SPLITS
    }
    encoder = fit_table_encoder(
        [parts["train"]],
        fields=fields,
        numbers=numbers,
        log1p=log1p,
        min_count=min_count,
    )
    splits = {
        split: {
            "categorical": encoder.categorical(parts[split]),
            "numeric": encoder.numeric(parts[split]),
            "labels": {task: values[rows[split]] for task, values in labels.items()},
            **_rows_of(extras or {}, rows[split]),
        }
        for split in SPLITS
    }
    return RankingProblem(
        name=name,
        tasks=tuple(tasks),
        encoder=encoder,
        **splits,
        description=description,
        licence=licence,
        facts=facts or {},
    )


def time_cuts(
    times: Shaped[np.ndarray, " n"], shares: tuple[float, float] = (0.8, 0.1)
) -> tuple[Any, Any]:
    """Finds the two moments that cut a log into training, validation and test.

    Args:
      times: moment of every event.
      shares: of training and validation, positive, with a sum below 1.

    Returns:
      The first moment of validation and the first of test. Training is all before the
      first, so that no moment stands in two splits; shares are therefore approximate.

    Raises:
      ValueError: if a share is not positive or nothing is left for the test.

    Example:
      >>> time_cuts(np.arange(10))
      (8, 9)
    """
    if min(shares) <= 0.0 or sum(shares) >= 1.0:
        raise ValueError(
            f"`shares` must be positive with a sum below 1, got {shares}; the rest is "
            "for the test."
        )
    ordered = np.sort(times)
    # Rounded up: 0.8 + 0.1 is a little less than 0.9 in floating point.
    first = int(np.ceil(len(ordered) * shares[0] - 1e-9))
    second = int(np.ceil(len(ordered) * (shares[0] + shares[1]) - 1e-9))
    return ordered[first].item(), ordered[second].item()


def rows_by_time(
    times: Shaped[np.ndarray, " n"], shares: tuple[float, float] = (0.8, 0.1)
) -> dict[str, Int[np.ndarray, " rows"]]:
    """Splits rows at two moments that are the same for all users.

    Args:
      times: moment of every event.
      shares: of training and validation; see :func:`time_cuts`.

    Returns:
      Row numbers of every split, in the order of time.
    """
    first, second = time_cuts(times, shares)
    order = np.argsort(times, kind="stable")
    ordered = times[order]
    return {
        "train": order[ordered < first],
        "validation": order[(ordered >= first) & (ordered < second)],
        "test": order[ordered >= second],
    }


def _labels(
    table: Mapping[str, Shaped[np.ndarray, " n"]], task: str
) -> Float32[np.ndarray, " n"]:
    if task not in table:
        raise ValueError(f"`table` must hold the task {task!r}, got {sorted(table)}.")
    values = np.asarray(table[task]).astype(np.float32)
    strange = values[~(np.isnan(values) | (values == 0.0) | (values == 1.0))]
    if len(strange):
        raise ValueError(
            f"`table` must hold 0, 1 or NaN in the task {task!r}, got {strange[0]} and "
            f"{len(strange) - 1} more. Make a binary label of it."
        )
    return values


def _rows_of(extras: Mapping[str, Any], rows: Int[np.ndarray, " rows"]) -> Split:
    return {
        key: _rows_of(value, rows) if isinstance(value, Mapping) else value[rows]
        for key, value in extras.items()
    }
