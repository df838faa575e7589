"""Do models fit together? Said for all leaves at once, before any arithmetic."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

Where = str | Callable[[str], bool] | None
"""Which leaves: a regular expression searched in the path, a predicate, or all."""

_MOST = 20  # differences that an error lists


class Mismatch(NamedTuple):
    """One way in which a model differs from the reference."""

    model: str  # its name, or its place in the sequence
    path: str
    kind: str  # "missing", "extra", "shape", "type" or "precision"
    detail: str

    def __str__(self):
        """One line of a report."""
        return f"{self.model}: {self.path}: {self.kind}, {self.detail}"


def by_name(models: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """Models by name, in the order of the names; a sequence is numbered.

    Args:
      models: at least one.

    Returns:
      The same models.

    Raises:
      ValueError: if there are none.
    """
    if isinstance(models, Mapping):
        named = {str(name): models[name] for name in sorted(models)}
    else:
        named = {str(i): model for i, model in enumerate(models)}
    if not named:
        raise ValueError("`models` must hold at least one model, got none.")
    return named


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path.

    Args:
      tree: any pytree.

    Returns:
      The leaves in their order, by paths such as `"encoder/layers_0/kernel"`.

    Example:
      >>> named_leaves({"a": {"b": 1, "c": 2}})
      {'a/b': 1, 'a/c': 2}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Dictionaries in dictionaries, from leaves by path.

    Args:
      leaves: by paths such as `"encoder/layers_0/kernel"`.

    Returns:
      The tree of dictionaries that `named_leaves` gives these leaves for.

    Example:
      >>> nested({"a/b": 1, "a/c": 2})
      {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def selected(path: str, where: Where) -> bool:
    """Whether `where` chooses the path."""
    if where is None:
        return True
    return bool(re.search(where, path)) if isinstance(where, str) else where(path)


def is_float(leaf: Any) -> bool:
    """Whether a leaf is merged at all: counters, keys and masks are not."""
    return jnp.issubdtype(_dtype(leaf), jnp.floating)


def mismatches(
    reference: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]], where: Where
) -> list[Mismatch]:
    """All differences between the reference and the models.

    Args:
      reference: the base model's leaves (or anything with a shape and a dtype) by path.
      models: the same of every model.
      where: only the chosen leaves are compared.

    Returns:
      The differences. Only `"precision"` (float16 here, float32 there) stops no merge:
      all arithmetic is in float32.
    """
    found = []
    for name, leaves in models.items():
        for path in sorted(reference.keys() | leaves.keys()):
            if not selected(path, where):
                continue
            if path not in leaves:
                found.append(Mismatch(name, path, "missing", _form(reference[path])))
            elif path not in reference:
                found.append(Mismatch(name, path, "extra", _form(leaves[path])))
            elif (difference := _difference(reference[path], leaves[path])) is not None:
                found.append(Mismatch(name, path, *difference))
    return found


def check_match(
    reference: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]], where: Where
) -> list[str]:
    """Which leaves are merged; raises if models cannot be.

    Args:
      reference: the base model's leaves by path.
      models: the leaves of every model.
      where: only the chosen leaves must match.

    Returns:
      The paths of the chosen leaves that are floating point, in their order.

    Raises:
      ValueError: with the differences by path, and if nothing is chosen.
    """
    found = [m for m in mismatches(reference, models, where) if m.kind != "precision"]
    if found:
        lines = [f"  {mismatch}" for mismatch in found[:_MOST]]
        if len(found) > _MOST:
            lines.append(f"  and {len(found) - _MOST} more")
        raise ValueError(
            "`models` must match the base in every leaf that is merged; these differ "
            "(leave leaves out with `where`):\n" + "\n".join(lines)
        )
    leaves = reference.items()
    paths = [path for path, x in leaves if is_float(x) and selected(path, where)]
    if not paths:
        raise ValueError(
            f"`where` must choose at least one floating-point leaf, got {where!r}; "
            f"paths look like {next(iter(reference), '')!r}."
        )
    return paths


def _difference(reference, leaf) -> tuple[str, str] | None:
    detail = f"{_form(leaf)} in place of {_form(reference)}"
    if np.shape(leaf) != np.shape(reference):
        return "shape", detail
    if _dtype(leaf) != _dtype(reference):
        both = is_float(leaf) and is_float(reference)
        return ("precision" if both else "type"), detail
    return None


def _dtype(leaf):
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype


def _form(leaf) -> str:
    return f"{_dtype(leaf).name}{list(np.shape(leaf))}"
