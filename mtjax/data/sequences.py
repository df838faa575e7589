"""Next-item problems: histories, targets and a catalogue that describes the items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int32, Integer, Real, Shaped

from mtjax.data.event_history import past_items, past_of
from mtjax.data.ranking import SPLITS, Split
from mtjax.data.table_encoder import fit_table_encoder

_FIRST_ITEM = 2


@dataclass(frozen=True)
class Catalogue:
    """What is known about the items; row `i` of every array is the item with id `i`.

    Row 0 is padding and row 1 an item without a row of its own: both are all missing.
    Ids from `num_warm` on belong to items that training does not have; a model with an
    embedding per item replaces them by 1, a model of metadata need not.

    Attributes:
      item_ids: original numbers, -1 in rows 0 and 1.
      num_warm: how many rows belong to padding, unknown and items of training.
      train_counts: how often the item is a target in training.
      fields: names of the columns of `categorical`.
      categorical: ids of the fields, 0 missing, 1 not in training.
      vocabulary_sizes: rows that an embedding of each field and text needs.
      levels: those fields that are category tasks, the coarsest first.
      multi_hot: float32 flags of several values at once.
      tokens: ids of the words of each text, from the left, 0 behind them.
    """

    item_ids: Int[np.ndarray, " items"]
    num_warm: int
    train_counts: Int[np.ndarray, " items"]
    fields: tuple[str, ...]
    categorical: Int32[np.ndarray, "items fields"]
    vocabulary_sizes: Mapping[str, int]
    levels: tuple[str, ...]
    multi_hot: Mapping[str, Float32[np.ndarray, "items values"]]
    tokens: Mapping[str, Int32[np.ndarray, "items words"]]


@dataclass(frozen=True)
class SequenceProblem:
    """Targets with what came strictly before them in their group.

    A split is a dict of arrays with one row per target: ``history`` (int32 ids of shape
    ``(n, length)``, oldest first, 0 behind them), ``target`` (int32 of shape ``(n,)``),
    ``group`` and ``time``, and what the loader adds.

    Attributes:
      name: of the data and their form.
      items: the catalogue.
      train: for fitting; holds no cold item.
      validation: for choosing hyperparameters.
      test: for the final number.
      description: what a group is, and the split.
      licence: of the data.
    """

    name: str
    items: Catalogue
    train: Split
    validation: Split
    test: Split
    description: str
    licence: str

    def split(self, name: str) -> Split:
        """Returns a split by name.

        Raises:
          ValueError: if `name` is none of ``"train"``, ``"validation"``, ``"test"``.
        """
        if name not in SPLITS:
            raise ValueError(f"`name` must be one of {SPLITS}, got {name!r}.")
        return getattr(self, name)


def sequence_problem(
    name: str,
    *,
    groups: Integer[np.ndarray, " n"],
    times: Real[np.ndarray, " n"],
    items: Integer[np.ndarray, " n"],
    parts: Integer[np.ndarray, " n"],
    length: int,
    min_history: int = 1,
    cold: Integer[np.ndarray, " cold"] | None = None,
    catalogue: Integer[np.ndarray, " known"] | None = None,
    fields: Mapping[str, Shaped[np.ndarray, " known"]] | None = None,
    levels: Sequence[str] = (),
    multi_hot: Mapping[str, Shaped[np.ndarray, "known values"]] | None = None,
    texts: Mapping[str, tuple[Sequence[Sequence[str]], int]] | None = None,
    extras: Mapping[str, Any] | None = None,
    description: str = "",
    licence: str = "",
) -> SequenceProblem:
    """Makes targets and histories of events, and encodes the catalogue.

    Args:
      name: of the problem.
      groups: session or user of every event.
      times: when it happened; events at the same time do not see each other.
      items: original number of the item, not negative.
      parts: 0 for training, 1 for validation, 2 for test.
      length: longest history.
      min_history: targets with fewer earlier events are left out; 0 or 1.
      cold: original numbers of items that are removed from all events of training.
      catalogue: original numbers of all items; those of the events if None.
      fields: categorical metadata of the items of `catalogue`.
      levels: which of `fields` are category tasks.
      multi_hot: flags of them.
      texts: their words, and how many are kept.
      extras: more arrays with a row per event, for the splits.
      description: what a group is and the split, in words.
      licence: of the data.

    Returns:
      The problem; vocabularies of the metadata are those of the items of training.

    Raises:
      ValueError: if `levels` names no field, an item is not in the catalogue, a number
        is out of range or training is empty.

    Example:
      >>> events = np.array([5, 6, 7])
      >>> problem = sequence_problem(
      ...     "views", groups=np.array([0, 0, 0]), times=np.arange(3), items=events,
      ...     parts=np.array([0, 0, 2]), length=2,
      ... )
      >>> problem.test["history"].tolist(), problem.test["target"].tolist()
      ([[2, 3]], [4])
    """
    fields, multi_hot, texts = fields or {}, multi_hot or {}, texts or {}
    if min_history not in (0, 1):
        raise ValueError(f"`min_history` must be 0 or 1, got {min_history}.")
    strange = sorted(set(levels) - set(fields))
    if strange:
        raise ValueError(f"`levels` must name `fields` {list(fields)}, got {strange}.")
    known = np.unique(items) if catalogue is None else catalogue
    lost = np.setdiff1d(items, known)
    if len(lost):
        raise ValueError(
            f"`catalogue` must hold every item of the events, {len(lost)} are missing, "
            f"such as {lost[0]}. Add them with missing metadata."
        )
    dropped = np.isin(items, np.array([] if cold is None else cold, known.dtype))
    kept = ~(dropped & (parts == 0))
    groups, times, items, parts = (x[kept] for x in (groups, times, items, parts))
    warm = np.isin(known, items[parts == 0])
    if not warm.any():
        raise ValueError("`parts` must leave events for training, got none.")
    # Items of training come first: their ids do not depend on the rest of the log.
    order = np.lexsort((known, ~warm))
    ids = np.empty(len(known), np.int32)
    ids[order] = np.arange(len(known)) + _FIRST_ITEM
    by_number = np.argsort(known)
    events = ids[by_number][np.searchsorted(known[by_number], items)]

    past = past_of(groups, times)
    rows = {
        "history": past_items(past, events, length),
        "target": events,
        "group": groups,
        "time": times,
        **{key: value[kept] for key, value in (extras or {}).items()},
    }
    targets = past.end - past.begin >= min_history
    splits = {
        split: {key: value[targets & (parts == part)] for key, value in rows.items()}
        for part, split in enumerate(SPLITS)
    }
    counts = np.bincount(splits["train"]["target"], minlength=len(known) + _FIRST_ITEM)

    def row_per_id(values: Shaped[np.ndarray, "known ..."]) -> np.ndarray:
        ahead = np.zeros((_FIRST_ITEM, *values.shape[1:]), values.dtype)
        return np.concatenate([ahead, values[order]])

    table = {**fields, "item": known}
    encoder = fit_table_encoder(
        [{key: values[warm] for key, values in table.items()}], fields=list(fields)
    )
    sizes = encoder.vocabulary_sizes
    tokens = {}
    for key, (words, width) in texts.items():
        tokens[key], sizes[key] = _token_ids(words, warm, width)
    return SequenceProblem(
        name=name,
        items=Catalogue(
            item_ids=np.concatenate([np.full(_FIRST_ITEM, -1), known[order]]),
            num_warm=int(warm.sum()) + _FIRST_ITEM,
            train_counts=counts,
            fields=tuple(fields),
            categorical=row_per_id(encoder.categorical(table)),
            vocabulary_sizes=sizes,
            levels=tuple(levels),
            multi_hot={
                key: row_per_id(value.astype(np.float32))
                for key, value in multi_hot.items()
            },
            tokens={key: row_per_id(value) for key, value in tokens.items()},
        ),
        **splits,
        description=description,
        licence=licence,
    )


def _token_ids(
    texts: Sequence[Sequence[str]], warm: Shaped[np.ndarray, " known"], width: int
) -> tuple[Int32[np.ndarray, "known width"], int]:
    if width < 1:
        raise ValueError(f"`texts` must keep at least one word, got {width}.")
    words = np.array([[*text[:width], *[""] * (width - len(text))] for text in texts])
    flat = fit_table_encoder([{"word": words[warm].ravel()}], fields=["word"])
    ids = flat.categorical({"word": words.ravel()}).reshape(words.shape)
    return ids, flat.vocabulary_sizes["word"]
