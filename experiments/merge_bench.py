"""The merge-bench: fine-tuned encoders of six image sets, merged without data.

Every method merges the encoders of `merge_bench_models`; the factor of its merged task
vector is chosen on validation images, accuracy is measured on test images, each task
with its own frozen head. More methods, such as those that need images, build on the
same models: they import `Bench` and `prepare`.

Commands: mtjax data prepare NAME --from FOLDER --data-dir DATA (for mnist, kmnist,
          fashion_mnist/five_classes, kannada_mnist, notmnist, usps), then
          python -m experiments.merge_bench full --data-dir DATA
          (`quick` takes a minute and needs no data; a second start takes models and
          numbers from the run folder, `--methods ties --again` measures one anew)
Machine:  two CPU cores.    Minutes: 25.
Expect:   of the individual models' accuracy the base has 83 %, the average 89, task
          arithmetic 90, TSV-M 92. See docs/studies/merge_bench.md.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import track

from experiments import merge_bench_report as report
from experiments.kept import kept
from experiments.merge_bench_models import QUICK, Bench, Config, Params, prepare
from mtjax import merging
from mtjax.merging import Merger, chain, task_arithmetic
from mtjax.training.commit import write_atomically
from mtjax.training.run_config import open_run_folder

# Merged task vectors are multiplied by one of these, whatever the scale of the method.
FACTORS = (0.1, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5, 2.2)
TUNING_IMAGES = 300  # per task, of the validation images
# They say themselves how far to go.
UNTUNED: dict[str, Merger] = {
    "average": merging.average(),
    "karcher": merging.karcher(),
    "model_stock": merging.model_stock(),
}
TUNED: dict[str, Merger] = {
    "task_arithmetic": task_arithmetic(1.0),
    "lines": chain(task_arithmetic(1.0), merging.lines(beta=0.5)),
    "ties": merging.ties(density=0.2),
    "knots_ties": merging.knots(merging.ties(density=0.2)),
    "dare": chain(merging.dare(drop_rate=0.5), task_arithmetic(1.0)),
    "della": merging.della(drop_rate=0.5),
    "breadcrumbs": merging.breadcrumbs(scale=1.0),
    "pcb": merging.pcb(scale=1.0),
    "magmax": merging.magmax(),
    "tsv_m": merging.tsv_m(),
    "iso_c": merging.iso_c(),
    "iso_cts": merging.iso_cts(),
    "wudi": merging.wudi(),
}
METHODS = (*UNTUNED, *TUNED)
# Also measured on the first two tasks, the first three, and so on.
OVER_TASKS = ("average", "task_arithmetic", "ties", "tsv_m")

FULL = Config()
Options = tyro.conf.OmitArgPrefixes[Config]


@dataclass(frozen=True)
class Merged:
    """The encoders of one method."""

    models: dict[str, Params]  # by task; all the same, but for the references
    count: int  # of different encoders, which is what has to be stored
    factor: float | None = None
    seconds: float | None = None  # of merging, after compilation


def main(
    config: Config,
    out: Path,
    methods: Sequence[str] = METHODS,
    again: bool = False,
) -> list[dict[str, Any]]:
    """Merges with all methods; writes a table, its numbers and figures.

    Args:
      config: of the models.
      out: run folder.
      methods: which ones.
      again: measure them even if the folder has their numbers.

    Returns:
      One row per seed, method and number of tasks.
    """
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"`methods` must be among {METHODS}, got {sorted(unknown)}.")
    open_run_folder(out, config)
    rows, cosines, total = [], [], len(config.tasks)
    for seed in range(config.seeds):
        bench = cache(partial(prepare, config, seed, out))  # if needed
        folder, title = out / f"seed_{seed}", f"seed {seed}"
        given = bench, config.tasks, folder, methods, again, title, OVER_TASKS
        found, matrix = of_one_seed(*given)
        rows += [{"seed": seed, **row} for row in found]
        cosines.append(matrix)
    matrix = np.mean(cosines, axis=0)
    summary = {"rows": rows, "tasks": config.tasks, "cosines": matrix.tolist()}
    write_atomically(out / "results.json", json.dumps(summary, indent=1))
    write_atomically(out / "table.md", report.table(rows, total))
    print((out / "table.md").read_text())
    figures = {
        "merge_bench": report.bars(rows, total, untuned=tuple(UNTUNED)),
        "merge_bench_tasks": report.curves(rows, total),
        "merge_bench_cosines": report.heatmap(matrix, config.tasks),
    }
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=120)
    return rows


def of_one_seed(
    bench: Callable[[], Any],
    tasks: Sequence[str],
    folder: Path,
    methods: Sequence[str],
    again: bool,
    title: str,
    over_tasks: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """Measures what the folder does not have yet.

    Args:
      bench: makes or loads the models; called if something is missing.
      tasks: of the bench.
      folder: of the seed.
      methods: beside the references.
      again: measure them even if the folder has their numbers.
      title: of the progress bar.
      over_tasks: methods that are also measured on the first two tasks, three, ….

    Returns:
      Rows, and the cosines between task vectors.
    """
    rows = []
    for method in track((*report.REFERENCES, *methods), title):
        counts = [*(range(2, len(tasks)) if method in over_tasks else ()), len(tasks)]
        measured = lambda method=method, counts=counts: [
            measure(bench(), method, tasks[:n]) for n in counts
        ]
        rows += kept(folder / f"{method}.json", measured, again=again)
    matrix = lambda: cosine_matrix(bench()).tolist()
    return rows, kept(folder / "cosines.json", matrix)


def measure(bench: Bench, method: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Accuracy of a method on the test images of the tasks that it merges."""
    found = encoders(bench, method, tasks)
    one = sum(x.nbytes for x in jax.tree.leaves(bench.base))
    return {
        "method": method,
        "number": len(tasks),
        "accuracy": {t: bench.accuracy(found.models[t], t) for t in tasks},
        "factor": found.factor,
        "seconds": found.seconds,
        "bytes": found.count * one,
    }


def encoders(bench: Bench, method: str, tasks: Sequence[str]) -> Merged:
    """The encoders that a method has for the tasks."""
    if method == "base":
        return Merged(dict.fromkeys(tasks, bench.base), 1)
    models = {task: bench.models[task] for task in tasks}
    if method == "individual":
        return Merged(models, len(tasks))
    merger = UNTUNED[method] if method in UNTUNED else TUNED[method]
    for _ in range(2):  # the first time compiles
        start = time.perf_counter()
        vector = merger.vector(bench.base, models, key=jax.random.key(0))
        jax.block_until_ready(vector)
        seconds = time.perf_counter() - start
    at = lambda f: merging.apply_vector(bench.base, vector, f)
    factor = 1.0
    if method in TUNED:
        factor = max(FACTORS, key=lambda f: validation_accuracy(bench, at(f), tasks))
    return Merged(dict.fromkeys(tasks, at(factor)), 1, factor, seconds)


def validation_accuracy(bench: Bench, params: Params, tasks: Sequence[str]) -> float:
    """Mean over tasks, on a part of the validation images."""
    few = [bench.accuracy(params, t, "validation", most=TUNING_IMAGES) for t in tasks]
    return float(np.mean(few))


def cosine_matrix(bench: Bench) -> np.ndarray:
    """Cosines between the task vectors, all parameters together."""
    vectors = merging.task_vectors(bench.base, [bench.models[t] for t in bench.tasks])
    rows = [x.reshape(len(x), -1) for x in jax.tree.leaves(vectors)]
    flat = jnp.concatenate(rows, axis=1)
    flat = flat / jnp.linalg.norm(flat, axis=1, keepdims=True)
    return np.asarray(flat @ flat.T)


def quick(
    config: Options = QUICK,
    out: Path = Path("runs/merge_bench_quick"),
    methods: tuple[str, ...] = ("average", "task_arithmetic", "ties"),
    again: bool = False,
) -> None:
    """A minute: digits turned four ways, a tiny encoder."""
    main(config, out, methods, again)


def full(
    config: Options = FULL,
    out: Path = Path("runs/merge_bench"),
    methods: tuple[str, ...] = METHODS,
    again: bool = False,
) -> None:
    """The comparison of the documentation."""
    main(config, out, methods, again)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"quick": quick, "full": full})
