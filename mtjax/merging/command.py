"""`mtjax merge`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
import yaml
from rich.console import Console

from mtjax.merging.recipe import Recipe, make_merger, read_recipe
from mtjax.merging.stream import merge_checkpoints


def merge(
    method: str | None = None,
    models: tuple[str, ...] = (),
    out: str | None = None,
    base: str | None = None,
    recipe: Path | None = None,
    parameters: Annotated[
        tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE ...")
    ] = (),
    include: str | None = None,
    exclude: str | None = None,
    missing: str | None = None,
    dtype: str | None = None,
    out_axis: int | None = None,
    seed: int | None = None,
    dry_run: bool = False,
) -> None:
    """Merge fine-tuned checkpoints into one model.

    Checkpoints are safetensors files, folders of them as Hugging Face writes them, or
    orbax checkpoints of a tree of arrays. They are never in memory as a whole, and an
    interrupted merge goes on when the same command is given again.

      mtjax merge --method ties --base A --models B C D --out E --set density=0.3
      mtjax merge --recipe merge.yaml --dry-run

    A recipe file has the same keys as the options, and may have several steps:

      base: A
      models: [B, C, D]
      out: E
      method: [{dare: {drop_rate: 0.8}}, {ties: {density: 0.2}}]

    Options that are given win over the recipe.

    Args:
      method: what to do, such as average, task_arithmetic, ties, dare (`mtjax list`).
      models: checkpoints to merge.
      out: new `.safetensors` file or folder.
      base: checkpoint that all models were fine-tuned from.
      recipe: YAML file.
      parameters: of the method.
      include: merge arrays whose name this regular expression finds; default all.
      exclude: leave arrays whose name this finds as they are in the base.
      missing: error, or unchanged: what to do when a model lacks an array.
      dtype: type of merged arrays, such as bfloat16; default that of the base.
      out_axis: axis of output features: 0 PyTorch (default), -1 Flax.
      seed: of random numbers; default 0.
      dry_run: show the plan and write nothing.
    """
    given: dict[str, Any] = {
        "method": method,
        "models": list(models) or None,
        "out": out,
        "base": base,
        "parameters": _parsed(parameters) or None,
        "include": include,
        "exclude": exclude,
        "missing": missing,
        "dtype": dtype,
        "out_axis": out_axis,
        "seed": seed,
    }
    settings = read_recipe(recipe) if recipe is not None else {}
    settings |= {name: value for name, value in given.items() if value is not None}
    for name in ("method", "models", "out"):
        if name not in settings:
            raise ValueError(f"--{name} must be given, as an option or in the recipe.")
    run(Recipe(**settings), dry_run=dry_run)


def run(
    recipe: Recipe, *, dry_run: bool = False, console: Console | None = None
) -> None:
    """Merges what a recipe says.

    Args:
      recipe: see there.
      dry_run: show the plan only.
      console: where the plan is shown.

    Raises:
      ValueError: if the recipe or a checkpoint is wrong; nothing is written then.
    """
    if recipe.missing not in ("error", "unchanged"):
        raise ValueError(
            f"`missing` must be 'error' or 'unchanged', got {recipe.missing!r}."
        )
    try:
        dtype = None if recipe.dtype is None else jnp.dtype(recipe.dtype)
    except TypeError as error:
        raise ValueError(f"`dtype` is no type: {recipe.dtype!r}.") from error
    merger = make_merger(recipe)
    key = jax.random.key(recipe.seed) if merger.needs_key else None
    plan = merge_checkpoints(
        merger,
        recipe.models,
        recipe.out,
        base=recipe.base,
        where=_where(recipe),
        missing=recipe.missing,
        dtype=dtype,
        key=key,
        identity=str(replace(recipe, out="")),
        dry_run=dry_run,
        progress=True,
    )
    console = Console()
    console.print(plan.describe(), markup=False, highlight=False)
    console.print("Nothing was written." if dry_run else f"Wrote {recipe.out}")


def _where(recipe: Recipe):
    if recipe.exclude is None:
        return recipe.include
    from mtjax.merging.match import selected

    def chosen(path: str) -> bool:
        return selected(path, recipe.include) and not selected(path, recipe.exclude)

    return chosen


def _parsed(parameters: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for text in parameters:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {text!r}.")
        found[name] = yaml.safe_load(value)
    return found
