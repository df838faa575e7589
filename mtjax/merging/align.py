"""Models trained apart, brought into one order of units before they are merged."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from mtjax.merging.match import (
    Where,
    by_name,
    is_float,
    mismatches,
    named_leaves,
    selected,
)
from mtjax.merging.permutation_groups import Member, PermutationGroups

_TOLERANCE = 1e-6  # relative gain below which a new order is noise of the sums

Permutations = tuple[Int[np.ndarray, " _"], ...]


class Aligned(NamedTuple):
    """A model in the order of another one.

    Attributes:
      params: computes the same as the model did.
      permutations: per group; unit `i` was unit `permutation[i]` of the model.
    """

    params: PyTree
    permutations: Permutations


def permute(
    params: PyTree,
    groups: PermutationGroups,
    permutations: Sequence[Int[np.ndarray, " _"] | Int[Array, " _"]],
) -> PyTree:
    """Reorders the units of a model, which changes nothing that it computes.

    Args:
      params: a model of the kind that `groups` were derived from.
      groups: from `permutation_groups`.
      permutations: one per group, each of `0` to `size - 1` in some order; unit `i` of
        the result is unit `permutation[i]` of the model.

    Returns:
      A tree like `params`, in its dtypes.

    Raises:
      ValueError: if the model does not fit the groups, or the permutations do not.

    Example:
      >>> from mtjax.merging.permutation_groups import permutation_groups
      >>> params = {"a": jnp.ones((1, 3)), "b": jnp.array([[1.0], [2.0], [3.0]])}
      >>> mlp = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> groups = permutation_groups(mlp, params, jnp.ones(1))
      >>> permute(params, groups, [np.array([2, 0, 1])])["b"].ravel().tolist()
      [3.0, 1.0, 2.0]
    """
    _check(groups, {"params": params})
    given = [np.asarray(p) for p in permutations]
    sizes = [group.size for group in groups]
    if [sorted(p.tolist()) for p in given] != [list(range(n)) for n in sizes]:
        raise ValueError(
            f"`permutations` must be one per group, of sizes {sizes}, with every unit "
            f"once, got shapes {[p.shape for p in given]}."
        )
    leaves = named_leaves(params)
    for path, places in _places(groups).items():
        leaves[path] = _reordered(jnp.asarray(leaves[path]), places, given)
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def align(
    reference: PyTree,
    model: PyTree,
    groups: PermutationGroups,
    *,
    where: Where = None,
    max_iterations: int = 100,
    key: Key[Array, ""],
) -> Aligned:
    r"""Weight matching: the order of units in which a model is closest to another one.

    $$\max_{\pi} \sum_\ell \langle \theta_A^\ell, (\pi \cdot \theta_B)^\ell \rangle$$

    by coordinate descent: the best permutation of one group given those of all others
    is a linear assignment, which is solved exactly, for groups in random order, until
    none can be bettered. The result is a local optimum, the better one of two starts:
    the model as it is, which suits models with a common ancestor, and every group
    matched once by those parameters whose other axes are settled, from inputs and
    outputs inwards.

    Where a parameter has a group on two axes (a recurrent kernel), the objective is
    quadratic: the assignment is solved with the other axis as it is, and taken if the
    objective itself rises.

    Args:
      reference: $\theta_A$.
      model: $\theta_B$, a tree like the reference.
      groups: from `permutation_groups`; `groups.having("mlp")` aligns some only.
      where: which parameters count in the objective; all are permuted.
      max_iterations: passes over all groups, at most.
      key: decides the order of the groups.

    Returns:
      The permuted model and the permutations.

    Raises:
      ValueError: if there are no groups, `max_iterations` is below 1, or a model is not
        finite or does not fit the groups; all differences are listed.

    Example:
      >>> from mtjax.merging.permutation_groups import permutation_groups
      >>> mlp = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> model = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [4.0]])}
      >>> other = {"a": jnp.array([[2.1, 0.9]]), "b": jnp.array([[4.0], [3.0]])}
      >>> groups = permutation_groups(mlp, model, jnp.ones(1))
      >>> aligned = align(model, other, groups, key=jax.random.key(0))
      >>> aligned.params["b"].ravel().tolist()
      [3.0, 4.0]

    References:
      Ainsworth et al., "Git Re-Basin: Merging Models modulo Permutation Symmetries",
      ICLR, 2023, Algorithm 1, which has the first start only.
    """
    _check_groups(groups, max_iterations)
    named = {"reference": reference, "model": model}
    _check(groups, named)
    counted = _counted(groups, where)
    sides = [_arrays(name, params, counted) for name, params in named.items()]
    found = []
    for matched_first in (False, True):
        matcher = _Matcher(groups, *sides)
        if matched_first:
            matcher.start()
        for i in range(max_iterations):
            order = jax.random.permutation(jax.random.fold_in(key, i), len(groups))
            better = [matcher.improve(int(number)) for number in order]
            if not any(better):
                break
        found.append(matcher)
    permutations = tuple(max(found, key=_Matcher.value).permutations)
    return Aligned(permute(model, groups, permutations), permutations)


def align_many(
    models: Mapping[str, PyTree] | Sequence[PyTree],
    groups: PermutationGroups,
    *,
    where: Where = None,
    max_iterations: int = 100,
    key: Key[Array, ""],
) -> dict[str, PyTree]:
    r"""Brings several models into one order, each closest to the mean of the others.

    Models are taken in random order, `align` moves each towards the mean of the others,
    until none moves. No model is the reference: the sum of all pairs' inner products
    rises with every move.

    Args:
      models: at least two trees, by name (taken in the order of the names) or in a
        sequence.
      groups: as for `align`.
      where: as for `align`.
      max_iterations: passes over all models, at most, and over all groups for each.
      key: decides the orders.

    Returns:
      The permuted models, by name; those of a sequence are numbered ("0", "1", …).

    Raises:
      ValueError: as for `align`, and for a single model.

    References:
      Ainsworth et al., "Git Re-Basin: Merging Models modulo Permutation Symmetries",
      ICLR, 2023, Algorithm 3 (MergeMany), without its last step, the average.
    """
    _check_groups(groups, max_iterations)
    aligned = by_name(models)
    if len(aligned) < 2:
        raise ValueError(f"`models` must be at least two, got {len(aligned)}.")
    _check(groups, aligned)
    names = list(aligned)
    for i in range(max_iterations):
        moved = False
        order_key, *keys = jax.random.split(jax.random.fold_in(key, i), len(names) + 1)
        for n in jax.random.permutation(order_key, len(names)):
            name = names[int(n)]
            others = [aligned[other] for other in names if other != name]
            mean = jax.tree.map(lambda *leaves: _mean(leaves), *others)
            found = align(
                mean,
                aligned[name],
                groups,
                where=where,
                max_iterations=max_iterations,
                key=keys[int(n)],
            )
            aligned[name] = found.params
            moved |= any(np.any(np.diff(p) != 1) for p in found.permutations)
        if not moved:
            break
    return aligned


# Where a parameter is permuted, and by which group.
_Places = list[tuple[Member, int]]


class _Matcher:
    """The state of a coordinate descent."""

    def __init__(self, groups, reference, model):
        self.groups, self.reference, self.model = groups, reference, model
        self.places = _places(groups)
        self.permutations = [np.arange(group.size) for group in groups]

    def start(self) -> None:
        """Matches every group once, those first of which most is known."""
        known: set[int] = set()
        rest = list(range(len(self.groups)))
        size = lambda members: sum(self.model[m.path].size for m in members)
        while rest:
            sizes = [size(self._anchored(number, known)) for number in rest]
            number = rest.pop(int(np.argmax(sizes)))
            members = self._anchored(number, known) or self._members(number)
            if members:
                self.permutations[number] = _assigned(self._products(members))
            known.add(number)

    def improve(self, number: int) -> bool:
        """Finds the best order of one group; whether it is better than what was."""
        if not (members := self._members(number)):
            return False
        products = self._products(members)
        old, new = self.permutations[number], _assigned(products)
        rows = np.arange(len(new))
        gain = float(np.sum(products[rows, new] - products[rows, old]))
        paths = {member.path for member in members}
        if len(paths) < len(members):  # quadratic: the sums of products are no gain
            before = self.value(paths)
            self.permutations[number] = new
            gain = self.value(paths) - before
        better = gain > _TOLERANCE * float(np.sum(np.abs(products[rows, old])))
        self.permutations[number] = new if better else old
        return better

    def value(self, paths=None) -> float:
        """The objective, of some parameters or of all."""
        total = 0.0
        for path in paths or self.model:
            places = self.places[path]
            model = _reordered(self.model[path], places, self.permutations)
            total += float(np.vdot(self.reference[path].astype(np.float64), model))
        return total

    def _members(self, number: int) -> list[Member]:
        members = self.groups[number].members
        return [member for member in members if member.path in self.model]

    def _anchored(self, number: int, known: set[int]) -> list[Member]:
        """Members in parameters of which all the rest is in order already."""
        others = lambda m: {g for o, g in self.places[m.path] if o != m}
        return [m for m in self._members(number) if others(m) <= known]

    def _products(self, members: list[Member]) -> Float[np.ndarray, "units units"]:
        """Inner products of all units of one with all units of the other."""
        total = np.zeros(())
        for member in members:
            places = [(m, g) for m, g in self.places[member.path] if m != member]
            model = _reordered(self.model[member.path], places, self.permutations)
            sides = [_rows(x, member) for x in (self.reference[member.path], model)]
            total = total + (sides[0] @ sides[1].T).astype(np.float64)
        return total


def _assigned(products) -> Int[np.ndarray, " units"]:
    from scipy.optimize import linear_sum_assignment  # slow to import

    return linear_sum_assignment(products, maximize=True)[1]


def _places(groups: PermutationGroups) -> dict[str, _Places]:
    places: dict[str, _Places] = {}
    for number, group in enumerate(groups):
        for member in group.members:
            places.setdefault(member.path, []).append((member, number))
    return places


def _reordered(leaf, places: _Places, permutations):
    for member, number in places:
        axis = member.axis + member.place
        grid = _grid(leaf, member).take(permutations[number], axis)
        leaf = grid.reshape(leaf.shape)
    return leaf


def _grid(leaf, member: Member):
    before, after = leaf.shape[: member.axis], leaf.shape[member.axis + 1 :]
    return leaf.reshape(*before, *member.factors, *after)


def _rows(leaf, member: Member):
    """The leaf as units by everything else."""
    rows = np.moveaxis(_grid(leaf, member), member.axis + member.place, 0)
    return rows.reshape(len(rows), -1)


def _counted(groups: PermutationGroups, where: Where) -> list[str]:
    leaves = groups.leaves
    paths = [p for p in _places(groups) if is_float(leaves[p]) and selected(p, where)]
    if not paths:
        raise ValueError(
            "`where` must choose at least one floating-point parameter that a group "
            f"permutes, got {where!r}; these are {list(_places(groups))}."
        )
    return paths


def _arrays(name: str, params, paths):
    leaves = named_leaves(params)
    arrays = {path: np.asarray(leaves[path]).astype(np.float32) for path in paths}
    for path, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"`{name}` must be finite where it is compared, got NaN or infinity in "
                f"{path!r}; leave it out with `where` or take an earlier checkpoint."
            )
    return arrays


def _mean(leaves):
    if not is_float(leaves[0]):
        return leaves[0]
    return sum(jnp.asarray(x, jnp.float32) for x in leaves) / len(leaves)


def _check_groups(groups: PermutationGroups, max_iterations: int) -> None:
    if not len(groups):
        raise ValueError(
            "`groups` must hold at least one group, got none: all axes are fixed, see "
            "`print(groups)` for the reasons. A unit can be permuted if it is neither "
            "an input nor an output of the traced function; trace the whole model, in "
            "evaluation mode, with operations that `permutation_groups` knows."
        )
    if max_iterations < 1:
        raise ValueError(f"`max_iterations` must be at least 1, got {max_iterations}.")


def _check(groups: PermutationGroups, models: Mapping[str, PyTree]) -> None:
    named = {name: named_leaves(model) for name, model in models.items()}
    found = [m for m in mismatches(groups.leaves, named, None) if m.kind != "precision"]
    if found:
        raise ValueError(
            "`groups` must come from a model with the parameters of those to align; "
            "these differ:\n" + "\n".join(f"  {mismatch}" for mismatch in found)
        )
