"""What happened strictly before an event: past items and past means, without leaks."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Real


class Past(NamedTuple):
    """Where the past of every event lies in the order of group and time.

    Attributes:
      order: rows sorted by group and time, shape ``(n,)``.
      begin: place in `order` of the first event of the row's group, shape ``(n,)``.
      end: place in `order` behind the last event that is strictly earlier than the
        row, shape ``(n,)``: its past is ``order[begin:end]``.
    """

    order: Int[np.ndarray, " n"]
    begin: Int[np.ndarray, " n"]
    end: Int[np.ndarray, " n"]


def past_of(groups: Int[np.ndarray, " n"], times: Real[np.ndarray, " n"]) -> Past:
    """Finds the strictly earlier events of the same group.

    Events at the same time are no past of each other: their order is arbitrary, and a
    history that holds one of them would tell the other what comes next.

    Args:
      groups: user or session of every event.
      times: when it happened, in any unit.

    Returns:
      The places, in the order of the rows that were given.

    Example:
      >>> past = past_of(np.array([7, 7, 7, 8]), np.array([5, 1, 5, 9]))
      >>> (past.end - past.begin).tolist()
      [1, 0, 1, 0]
    """
    order = np.lexsort((times, groups))
    group, time = groups[order], times[order]
    new_group = np.r_[True, group[1:] != group[:-1]][: len(order)]
    new_time = new_group | np.r_[True, time[1:] != time[:-1]][: len(order)]
    places = np.arange(len(order))
    begin, end = np.empty_like(places), np.empty_like(places)
    begin[order] = np.maximum.accumulate(np.where(new_group, places, 0))
    end[order] = np.maximum.accumulate(np.where(new_time, places, 0))
    return Past(order, begin, end)


def past_items(
    past: Past,
    items: Int[np.ndarray, " n"],
    length: int,
    *,
    chosen: Bool[np.ndarray, " n"] | None = None,
) -> Int[np.ndarray, "n length"]:
    """Returns the last `length` items of every event's past, oldest first.

    Args:
      past: from :func:`past_of`.
      items: item of every event, positive ids.
      length: how many at most; at least 1.
      chosen: which events may stand in a history, such as the liked ones; all if None.

    Returns:
      Ids from the left, 0 where the past is shorter: the mask is ``history > 0``.

    Raises:
      ValueError: if `length` is below 1.

    Example:
      >>> past = past_of(np.array([7, 7, 7]), np.array([1, 2, 3]))
      >>> past_items(past, np.array([4, 5, 6]), 2).tolist()
      [[0, 0], [4, 0], [4, 5]]
    """
    if length < 1:
        raise ValueError(f"`length` must be at least 1, got {length}.")
    kept = np.ones(len(items), bool) if chosen is None else chosen
    listed = past.order[kept[past.order]]
    # How many chosen events stand before each place of the order.
    before = np.r_[0, np.cumsum(kept[past.order])]
    first = np.maximum(before[past.begin], before[past.end] - length)
    places = first[:, None] + np.arange(length)
    inside = places < before[past.end][:, None]
    ids = (
        items[listed][np.minimum(places, max(len(listed) - 1, 0))] if len(listed) else 0
    )
    return np.where(inside, ids, 0).astype(np.int32)


def past_mean(
    past: Past, values: Real[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Returns the number of past events and the mean of their values.

    Args:
      past: from :func:`past_of`.
      values: a number of every event, such as its rating.

    Returns:
      The numbers, and the means, NaN where there is no past.

    Example:
      >>> past = past_of(np.array([7, 7, 7]), np.array([1, 2, 3]))
      >>> past_mean(past, np.array([4.0, 2.0, 5.0]))[1].tolist()
      [nan, 4.0, 3.0]
    """
    sums = np.r_[0.0, np.cumsum(values[past.order], dtype=np.float64)]
    number = past.end - past.begin
    total = sums[past.end] - sums[past.begin]
    return number, np.where(number > 0, total / np.maximum(number, 1), np.nan)
