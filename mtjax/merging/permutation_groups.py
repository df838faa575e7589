"""The permutation symmetries of a model, found in the program that it is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from mtjax.merging.axes import factors_of, new_axis, pin
from mtjax.merging.axis_rules import infer, used_inputs
from mtjax.merging.match import Where, named_leaves, selected


class Member(NamedTuple):
    """One axis of one parameter, or a factor of it, that a group permutes."""

    path: str
    axis: int
    factors: tuple[int, ...]  # the axis as a grid, the major factor first
    place: int  # which of the factors is permuted

    def __str__(self):
        """The path and the axis, as a line of a report."""
        if len(self.factors) == 1:
            return f"{self.path}, axis {self.axis}"
        marked = [str(size) for size in self.factors]
        marked[self.place] = f"[{marked[self.place]}]"
        return f"{self.path}, axis {self.axis} as {' x '.join(marked)}"


class PermutationGroup(NamedTuple):
    """Units whose order is free, as long as it is the same in all members."""

    size: int
    members: tuple[Member, ...]


class FixedAxis(NamedTuple):
    """An axis of a parameter that has to stay in its order."""

    path: str
    axis: int
    reason: str

    def __str__(self):
        """The path, the axis and the reason, as a line of a report."""
        return f"{self.path}, axis {self.axis}: {self.reason}"


@dataclass(frozen=True)
class PermutationGroups:
    """What `permutation_groups` found; print it to see groups and reasons.

    Attributes:
      groups: in the order of their first members.
      fixed: axes that no group permutes.
      leaves: shape and dtype of every parameter by path.
    """

    groups: tuple[PermutationGroup, ...]
    fixed: tuple[FixedAxis, ...]
    leaves: dict[str, jax.ShapeDtypeStruct]

    def __len__(self) -> int:
        """The number of groups."""
        return len(self.groups)

    def __iter__(self) -> Iterator[PermutationGroup]:
        """The groups."""
        return iter(self.groups)

    def __getitem__(self, number: int) -> PermutationGroup:
        """One group."""
        return self.groups[number]

    def __str__(self) -> str:
        """All groups with their members, all fixed axes with their reasons."""
        lines = []
        for i, group in enumerate(self.groups):
            lines.append(f"group {i}, size {group.size}")
            lines += [f"  {member}" for member in group.members]
        fixed = [f"  {axis}" for axis in self.fixed]
        return "\n".join([*lines, *(["fixed"] if fixed else []), *fixed])

    def having(self, where: Where) -> "PermutationGroups":
        """The groups with at least one parameter that `where` chooses.

        Args:
          where: a regular expression searched in the path, or a predicate.

        Returns:
          The same without the other groups.
        """
        chosen = (g for g in self if any(selected(m.path, where) for m in g.members))
        return replace(self, groups=tuple(chosen))


def permutation_groups(
    apply_fn: Callable[..., Any], params: PyTree, *inputs: Any
) -> PermutationGroups:
    r"""Finds which units of a model may change places while it computes the same.

    A permutation $\pi_g$ per group, applied to all members of the group, gives

    $$f(\pi \cdot \theta, x) = f(\theta, x) \quad \text{for all } x.$$

    The program of `apply_fn` is traced, not run. Each operation ties axes of operands
    and results: elementwise operations and reductions pass them on, a matrix product
    ties those that it contracts, a convolution its channels, and so on through residual
    streams, layer norms, loops and nested functions. Axes of inputs and outputs stay in
    order, and so do axes that an operation treats in order (convolved, sliced or joined
    ones), all axes of an operation that is not known, and parameters that `apply_fn`
    does not use. A reshape makes factors of axes: features behind a flattened image
    move in blocks, attention heads as a whole and features within heads.

    Not found, so that less is permuted than could be: different permutations in
    different heads, in layers of a `scan` or in groups of a convolution (all of them
    share one), and parts of concatenated or split axes (such as the gates in one kernel
    of an LSTM, which are fixed).

    Args:
      apply_fn: `apply_fn(params, *inputs)`, any pytree of outputs; in evaluation mode:
        with dropout, units that are masked by their place are fixed.
      params: any pytree of arrays, or of `jax.ShapeDtypeStruct`; statistics of batch
        norms are parameters too, permuted with the rest.
      *inputs: any pytrees of arrays, of which only shapes and dtypes matter.

    Returns:
      The groups; none if all axes are fixed.

    Example:
      >>> import jax.numpy as jnp
      >>> def mlp(params, x):
      ...     return jnp.tanh(x @ params["a"] + params["bias"]) @ params["b"]
      >>> params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2)), "bias": jnp.ones(8)}
      >>> print(permutation_groups(mlp, params, jnp.ones(3)))
      group 0, size 8
        a, axis 1
        b, axis 0
        bias, axis 0
      fixed
        a, axis 0: axis 0 of input 0
        b, axis 1: axis 0 of the output

    References:
      Ainsworth et al., "Git Re-Basin: Merging Models modulo Permutation Symmetries",
      ICLR, 2023, where groups are written by hand for each architecture.
    """
    program, outputs = jax.make_jaxpr(apply_fn, return_shape=True)(params, *inputs)
    leaves = {
        path: jax.ShapeDtypeStruct(np.shape(leaf), jax.typeof(leaf).dtype)
        for path, leaf in named_leaves(params).items()
    }
    # The axes of what is not used here may well be tied where it is.
    reasons = [None if used else "not used" for used in used_inputs(program)]
    axes = {
        path: [new_axis(n, reason) for n in leaf.shape]
        for (path, leaf), reason in zip(leaves.items(), reasons)
    }
    given = [
        [new_axis(n, f"axis {i} of input {name}") for i, n in enumerate(np.shape(leaf))]
        for name, leaf in named_leaves(inputs).items()
    ]
    results = infer(program, [*axes.values(), *given])
    for name, result in zip(named_leaves(outputs), results):
        for i, axis in enumerate(result):
            pin(axis, f"axis {i} of the output {name}".rstrip())

    members: dict[Any, list[Member]] = {}
    fixed = []
    for path, of_leaf in axes.items():
        for i, axis in enumerate(of_leaf):
            factors = factors_of(axis)
            sizes = tuple(factor.size for factor in factors)
            for place, factor in enumerate(factors):
                if factor.reason is None:
                    members.setdefault(factor, []).append(Member(path, i, sizes, place))
            reasons = {f.reason: None for f in factors}
            if factors and None not in reasons:
                fixed.append(FixedAxis(path, i, ", ".join(map(str, reasons))))
    groups = (PermutationGroup(f.size, tuple(found)) for f, found in members.items())
    return PermutationGroups(tuple(groups), tuple(fixed), leaves)
