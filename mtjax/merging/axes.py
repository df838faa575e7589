"""Axes of arrays that are tied to each other, or pinned to their order.

An axis is a row of factors, the major one first: a reshape splits axes into factors and
joins them again.
"""

from collections.abc import Iterable


class Factor:
    """A factor of an axis, free until there is a reason against permuting it."""

    def __init__(self, size: int, reason: str | None = None):
        """Tied to nothing yet; with a reason it is pinned."""
        self.size, self.reason = size, reason
        self.same: Factor | None = None  # what it was tied to
        self.parts: Axis | None = None  # what it was split into

    def split(self, size: int) -> "Axis":
        """Into a major factor of this size and the rest."""
        self.parts = [Factor(n, self.reason) for n in (size, self.size // size)]
        return self.parts


Axis = list[Factor]
Axes = list[Axis]


def new_axis(size: int, reason: str | None = None) -> Axis:
    """An axis that is tied to nothing; one of size 1 has no factors."""
    return [] if size == 1 else [Factor(size, reason)]


def factors_of(axis: Iterable[Factor]) -> Axis:
    """The factors that an axis has by now."""
    found = []
    for factor in axis:
        while factor.same is not None:
            factor = factor.same
        found += [factor] if factor.parts is None else factors_of(factor.parts)
    return found


def pin(axis: Iterable[Factor], reason: str) -> None:
    """Keeps an axis in its order; the first reason is the one that is kept."""
    for factor in factors_of(axis):
        factor.reason = factor.reason or reason


def tie(first: Axis, second: Axis, reason: str) -> None:
    """Gives two axes of one size the same permutation.

    Args:
      first: the one.
      second: the other; factors are split until both have the same.
      reason: pins factors that cannot be split so, such as 2 x 3 and 3 x 2.
    """
    left, right = first[::-1], second[::-1]  # the next factor last
    while left and right:
        a, b = _next(left), _next(right)
        if a is b:
            continue
        if a.size == b.size:
            a.same, b.reason = b, b.reason or a.reason
        elif b.size and a.size % b.size == 0:
            left.extend(a.split(b.size)[::-1])
            right.append(b)
        elif a.size and b.size % a.size == 0:
            right.extend(b.split(a.size)[::-1])
            left.append(a)
        else:
            pin([a, b], reason)
            sizes = [a.size, b.size]
            while sizes[0] != sizes[1] and (short := (left, right)[_less(sizes)]):
                factor = _next(short)
                pin([factor], reason)
                sizes[_less(sizes)] *= factor.size
    pin(left + right, reason)


def _next(stack: Axis) -> Factor:
    # Splitting one factor splits all that are tied to it, those in the stack too.
    stack.extend(factors_of([stack.pop()])[::-1])
    return stack.pop()


def _less(sizes: list[int]) -> int:
    return int(sizes[1] < sizes[0])
