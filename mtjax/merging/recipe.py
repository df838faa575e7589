"""Methods by name and recipes, for the command line."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from mtjax import merging
from mtjax.merging.merger import Merger, chain

METHODS: dict[str, Callable[..., Merger]] = {
    f.__name__: f
    for f in (
        merging.average,
        merging.task_arithmetic,
        merging.ties,
        merging.dare,
        merging.magprune,
        merging.della,
        merging.breadcrumbs,
        merging.pcb,
        merging.magmax,
        merging.consensus,
        merging.model_stock,
        merging.delta_guided,
        merging.slerp,
        merging.karcher,
        merging.lines,
        merging.knots,
        merging.tsv_m,
        merging.iso_c,
        merging.iso_cts,
        merging.wudi,
        merging.trim,
        merging.elect_sign,
        merging.disjoint_mean,
        merging.scale,
    )
}
Method = str | Mapping[str, Mapping[str, Any] | None]


@dataclass(frozen=True)
class Recipe:
    """What is merged, and how; the keys of a recipe file.

    Attributes:
      models: checkpoints to merge, in this order; a mapping gives them names.
      out: new `.safetensors` file or folder.
      method: name, or a list of steps such as `[{dare: {drop_rate: 0.9}}, ties]`; a
        method inside another is its parameter, `[{knots: {merger: ties}}]`.
      parameters: arguments of the method if it is a name.
      base: checkpoint that the models were fine-tuned from.
      include: regular expression of the arrays to merge; all by default.
      exclude: regular expression of arrays to leave as in the base.
      missing: `error`, or `unchanged` for arrays that a model lacks.
      dtype: of merged arrays, such as `bfloat16`; the base's by default.
      out_axis: axis of the output features for methods on matrices: 0 for PyTorch and
        Hugging Face, -1 for Flax.
      seed: of random numbers.
    """

    models: list[str] | dict[str, str]
    out: str
    method: str | list[Method]
    parameters: Mapping[str, Any] | None = None
    base: str | None = None
    include: str | None = None
    exclude: str | None = None
    missing: str = "error"
    dtype: str | None = None
    out_axis: int = 0
    seed: int = 0


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads a recipe file.

    Args:
      path: of a YAML file with the keys of `Recipe`.

    Returns:
      What it says.

    Raises:
      ValueError: if it is no mapping or has unknown keys.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a mapping, got {type(found).__name__}.")
    known = [field.name for field in fields(Recipe)]
    if unknown := sorted(set(found) - set(known)):
        raise ValueError(f"{path} has unknown keys {unknown}; known are {known}.")
    return found


def make_merger(recipe: Recipe) -> Merger:
    """The method of a recipe.

    Args:
      recipe: see there.

    Returns:
      The method.

    Raises:
      ValueError: if a method or parameter is unknown, or a value out of range.
    """
    if isinstance(recipe.method, str):
        return _step(recipe.method, recipe.parameters or {}, recipe.out_axis)
    if recipe.parameters:
        raise ValueError("`parameters` belong to each step when `method` is a list.")
    return _steps(recipe.method, recipe.out_axis)


def _steps(method: Method | list[Method], out_axis: int) -> Merger:
    steps = []
    for entry in method if isinstance(method, list) else [method]:
        name, parameters = entry, {}
        if isinstance(entry, Mapping):
            if len(entry) != 1:
                raise ValueError(
                    f"a step must be one name with parameters, got {entry}."
                )
            ((name, parameters),) = entry.items()
        steps.append(_step(str(name), parameters or {}, out_axis))
    if not steps:
        raise ValueError("`method` must name at least one step.")
    return chain(*steps)


def _step(name: str, parameters: Mapping[str, Any], out_axis: int) -> Merger:
    if name not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {name!r}.")
    takes = inspect.signature(METHODS[name]).parameters
    if unknown := sorted(set(parameters) - set(takes)):
        raise ValueError(
            f"{name!r} has no parameter {', '.join(unknown)}; it takes "
            f"{', '.join(takes) or 'none'}."
        )
    given = dict(parameters)
    if "out_axis" in takes:
        given.setdefault("out_axis", out_axis)
    if "merger" in given:  # of `knots`: a method inside a method
        given["merger"] = _steps(given["merger"], out_axis)
    try:
        return METHODS[name](**given)
    except TypeError as error:
        raise ValueError(f"{name!r}: {error}") from error
