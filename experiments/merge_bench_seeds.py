"""Experiments on the models of the merge-bench, seed by seed.

What is measured on the models of a seed stays in the run folder, so that a second start
measures only what is missing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import merge_bench_models as merge_bench
from experiments.kept import kept
from mtjax.training import seed_table
from mtjax.training.run_config import open_run_folder

Results = list[dict[str, Any]]  # one per seed


def per_seed(
    config: Any,
    out: Path,
    models: Path,
    run: Callable[[Any, Any, int], dict],
    prepare: Callable[[Any, int, Path], Any] | None = None,
) -> Results:
    """Runs an experiment for every seed that is not finished.

    Args:
      config: of the experiment; its `bench` is that of the models, `seeds` their
        number.
      out: run folder of the experiment.
      models: run folder of the models.
      run: from models, configuration and seed to results in JSON types.
      prepare: from the configuration of the models, seed and `models` to the bench; by
        default that of the merge-bench.

    Returns:
      The results.
    """
    open_run_folder(out, config)
    make, results = prepare or merge_bench.prepare, []
    for seed in range(config.seeds):
        bench = lambda seed=seed: make(config.bench, seed, models)
        measure = lambda seed=seed, bench=bench: run(bench(), config, seed)
        results.append(kept(out / f"seed_{seed}.json", measure))
    return results


def table(results: Results, part: str) -> str:
    """One part of the results, a line per method, in Markdown."""
    names = results[0][part]
    return seed_table({name: [r[part][name] for r in results] for name in names})
