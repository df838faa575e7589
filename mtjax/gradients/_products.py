"""Gradients of weights as products that are not carried out.

A weight gradient is a sum over examples and positions of outer products: of what went
into the layer, which all tasks share, with what comes back, which each task has of its
own. Kept in this form, its inner products need no gradient.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from mtjax.gradients._axis import zeros_beside
from mtjax.gradients._rows import Rows, add, lift

Sizes = tuple[int, int, int, int]
Gather = Callable[[Array], Array]


@dataclass(frozen=True)
class Term:
    r"""A product of a shared array with the tasks' rows, contracted over `n`.

    In matrices :math:`\sum_n a_{bnp}\, \delta_{bnq}`, for every batch index `b`.

    Attributes:
      carry_out: computes the product from the shared array and one task's.
      shared: the array that all tasks share.
      rows: the tasks' arrays.
      known: turns the shared array into `(b, n, *known axes)`; for a look-up, where it
        stands for one-hot vectors of size `p`, into their indices `(1, n, 1)`.
      delta: turns a task's array into `(b, n, *row axes)`.
      known_axes: axes of the product that come from the shared array.
      row_axes: axes that come from the tasks' arrays; all others are batch axes.
      sizes: `(b, n, p, q)`.
      is_lookup: whether the shared array holds indices.
    """

    carry_out: Callable[[Array, Array], Array]
    shared: Array
    rows: Rows
    known: Callable[[Array], Array]
    delta: Callable[[Array], Array]
    known_axes: tuple[int, ...]
    row_axes: tuple[int, ...]
    sizes: Sizes
    is_lookup: bool = False

    def deltas(self) -> Rows:
        """The tasks' arrays as `(b, n, q)`."""
        return self.rows.map(lambda x: _matrix(self.delta(x), self.row_axes))

    def knowns(self) -> Array:
        """The shared array as `(b, n, p)`, or as indices `(1, n, 1)`."""
        return _matrix(self.known(self.shared), self.known_axes)

    def transposed(self, permutation: Sequence[int]) -> "Term":
        """Permutes the axes of the product."""
        to = {int(old): new for new, old in enumerate(permutation)}
        return dataclasses.replace(
            self,
            carry_out=lambda a, d: self.carry_out(a, d).transpose(permutation),
            known_axes=tuple(to[axis] for axis in self.known_axes),
            row_axes=tuple(to[axis] for axis in self.row_axes),
        )


@dataclass(frozen=True)
class Product:
    """A sum of terms, and what is done to it afterwards.

    Attributes:
      terms: what is added; none of them has its known axes where only a part of
        another's are.
      moves: functions to apply in turn; none changes an inner product.
      batch: as for `lift`.
    """

    terms: tuple[Term, ...]
    batch: int | None
    moves: tuple[Callable[[Array], Array], ...] = ()
    _carried_out: list[Rows] = field(default_factory=list)

    def carry_out(self) -> Rows:
        """The gradients themselves, one for each task."""
        if not self._carried_out:
            parts = [
                lift(
                    lambda a, d, t=t: [t.carry_out(a, d)],
                    (t.shared, t.rows),
                    self.batch,
                )
                for t in self.terms
            ]
            self._carried_out.append(self._finish([part for (part,) in parts]))
        return self._carried_out[0]

    def combine(self, weights: Float[Array, " tasks"]) -> Array:
        """Their weighted sum, at the cost of one."""
        parts = [t.carry_out(t.shared, t.rows.combine(weights)) for t in self.terms]
        return self._finish([Rows((0,), [part]) for part in parts]).of(0)

    def moved(self, move: Callable[[Array], Array]) -> "Product":
        """Applies a function that keeps inner products."""
        return Product(self.terms, self.batch, (*self.moves, move))

    def transposed(self, permutation: Sequence[int]) -> "Product":
        """Permutes the axes."""
        if self.moves:
            return self.moved(lambda x: x.transpose(permutation))
        return Product(tuple(t.transposed(permutation) for t in self.terms), self.batch)

    def plus(self, other: "Product") -> "Product | None":
        """The sum, or None if its inner products would need the gradients."""
        terms = self.terms + other.terms
        pairs = {
            frozenset((frozenset(t.known_axes), frozenset(t.row_axes))) for t in terms
        }
        if self.moves or other.moves or len(pairs) > 1:
            return None
        return Product(terms, self.batch)

    def _finish(self, parts: list[Rows]) -> Rows:
        total = parts[0]
        for part in parts[1:]:
            total = add(total, part)
        for move in self.moves:
            total = total.map(move)
        return total

    def operations(self, num_tasks: int, devices: int = 1) -> tuple[int, int]:
        """Multiplications that inner products take, by the gradients and in this form.

        Args:
          num_tasks: number of tasks.
          devices: number of devices that hold as many examples each.
        """
        # Gradients on a GPU are products of rounded numbers, a third of the exact work.
        exact = 3 if jax.default_backend() == "gpu" else 1
        pairs = num_tasks * (num_tasks + 1) // 2
        b, _, p, q = self.terms[0].sizes
        direct, kept = pairs * b * p * q, 0
        for i, term in enumerate(self.terms):
            b, n, p, q = term.sizes
            direct += num_tasks * (n * q if term.is_lookup else b * n * p * q)
            kept += pairs * b * n * q
            for j, other in enumerate(self.terms[: i + 1]):
                both = b * n * other.sizes[1] * devices
                if i == j and devices == 1 and _is_compacted(term):
                    kept += num_tasks * n * q
                elif _same_side(term, other):
                    once = both * (1 if term.is_lookup or other.is_lookup else p)
                    kept += once + num_tasks * both * q * (1 if i == j else 2)
                else:
                    kept += num_tasks * both * (p + q) + 2 * pairs * both
        return direct, exact * kept

    def factors(self, gather: Gather | None) -> list[tuple[Rows, Rows]]:
        """Rows whose inner products, added up, are those of the gradients.

        Args:
          gather: collects `(b, n, …)` from all devices, if there are several: the sum
            over devices of the inner products is meant then.
        """
        collect = gather or (lambda x: x)
        deltas = [term.deltas() for term in self.terms]
        everywhere = [
            (collect(t.knowns()), d.map(collect)) for t, d in zip(self.terms, deltas)
        ]
        pairs = []
        for i, (term, mine) in enumerate(zip(self.terms, deltas)):
            sums = None
            for j, (other, (known, rows)) in enumerate(zip(self.terms, everywhere)):
                if i == j and gather is None and _is_compacted(term):
                    compact = _compact(term)
                    pairs.append((compact, compact))
                elif _same_side(term, other):
                    overlap = _overlap(term, other, known)
                    part = rows.map(lambda x, m=overlap: _dot(m, x, "bnm,bmq->bnq"))
                    sums = part if sums is None else add(sums, part)
                else:
                    across = mine.map(lambda x, t=other, k=known: _meet(t, k, x))
                    back = rows.map(lambda x, t=term: _meet(t, t.knowns(), x).mT)
                    pairs.append((across, back))
            if sums is not None:
                pairs.append((mine, sums))
        return pairs


def carried_out(value: Any) -> Any:
    """The value itself, or the gradients that a product stands for."""
    return value.carry_out() if isinstance(value, Product) else value


def _matrix(array: Array, axes: tuple[int, ...]) -> Array:
    # In the order of the product's axes, which terms that are added have in common.
    order = sorted(range(len(axes)), key=axes.__getitem__)
    array = array.transpose(0, 1, *(2 + i for i in order))
    return array.reshape(*array.shape[:2], math.prod(array.shape[2:]))


def _same_side(term: Term, other: Term) -> bool:
    return set(term.known_axes) == set(other.known_axes)


def _is_compacted(term: Term) -> bool:
    return term.is_lookup and term.sizes[1] < term.sizes[2]


def _overlap(term: Term, other: Term, known: Array) -> Float[Array, "b n m"]:
    """Inner products of what a term shares with what another one, given, shares."""
    if not term.is_lookup:
        return _meet(other, known, term.knowns())
    if not other.is_lookup:
        return _meet(term, term.knowns(), known).mT
    same = term.knowns() == known.mT
    return (same & _is_inside(term, term.knowns())).astype(jnp.float32)


def _meet(term: Term, known: Array, x: Array) -> Float[Array, "b m n"]:
    """Products of `x (b, m, p)` with what a term shares, given as its `knowns`."""
    if not term.is_lookup:
        return _dot(x, known, "bmp,bnp->bmn")
    found = jnp.take(x, known[0, :, 0], axis=2, mode="clip").astype(jnp.float32)
    return jnp.where(_is_inside(term, known).mT, found, 0.0)


def _is_inside(term: Term, indices: Array) -> Array:
    return (indices >= 0) & (indices < term.sizes[2])


def _compact(term: Term) -> Rows:
    """The rows of the gradient that are not zero, in `n` places."""
    n = term.sizes[1]
    indices = term.knowns().reshape(n)
    place = jnp.unique(indices, size=n, return_inverse=True)[1].reshape(n)
    # Rows at indices that are not in the table are dropped.
    place = jnp.where(_is_inside(term, indices), place, n)

    def add_up(delta):
        zeros = zeros_beside(delta, delta.shape[1:], jnp.float32)
        return zeros.at[place].add(delta[0].astype(jnp.float32), mode="drop")

    return term.deltas().map(add_up)


def _dot(a: Array, b: Array, spec: str) -> Array:
    dot = functools.partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
    exact = functools.partial(dot, precision=jax.lax.Precision.HIGHEST)
    if jax.default_backend() != "gpu" or not a.dtype == b.dtype == jnp.float32:
        return exact(a, b)
    # As exact as products of float32, which leave the tensor cores of a GPU idle.
    preset = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    threefold = functools.partial(dot, precision=preset)
    return jax.lax.platform_dependent(a, b, cuda=threefold, default=exact)
