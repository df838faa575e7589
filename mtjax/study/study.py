"""A comparison of methods on one problem: train, measure, tabulate."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mtjax.data import Problem, load_problem
from mtjax.study.config import Config
from mtjax.study.runs import Runs
from mtjax.study.setting import Setting
from mtjax.study.summary import SINGLE, Summary, summarise
from mtjax.training.commit import write_atomically
from mtjax.training.run_config import open_run_folder
from mtjax.training.timing import step_milliseconds


def run_study(config: Config, out: Path, *, progress: bool = True) -> Summary:
    """Trains every method with every seed and summarises the results.

    A second call with the same configuration and folder goes on where the first one
    stopped; runs that are finished are not trained again.

    Args:
      config: what to compare.
      out: the run folder: `config.json`, `results.json`, `runs/`.
      progress: show a progress bar, if the output is a terminal.

    Returns:
      The summary; its numbers are also in `results.json`.

    Raises:
      ConfigMismatchError: if the folder holds another configuration.
      DataNotFoundError: if the problem's data are not prepared; nothing is written.
      ValueError: if the folder holds something else.
    """
    problem = _load(config)
    open_run_folder(out, config)
    all_runs = _all_runs(problem, config)
    total = config.steps * config.seeds * len(all_runs)
    results: dict[str, list[dict[str, Any]]] = {}
    with _progress_bar(progress) as bar:
        row = bar.add_task("", total=total)
        for name, runs in all_runs.items():
            bar.update(row, description=f"[bold]{name:<14}")
            results[name] = runs.results(
                out / "runs" / name, lambda steps: bar.advance(row, steps)
            )
        bar.update(row, description="[bold]step times    ")
        milliseconds = _step_times(all_runs, config, out / "runs" / "step_times.json")
    summary = summarise(problem.tasks, config.methods, results, milliseconds)
    write_atomically(out / "results.json", json.dumps(summary.as_json(), indent=1))
    return summary


def _load(config: Config) -> Problem:
    problem = load_problem(config.data, config.data_dir)
    if config.examples is not None:
        train = jax.tree.map(lambda x: x[: config.examples], problem.train)
        problem = dataclasses.replace(problem, train=train)
    return problem


def _all_runs(problem: Problem, config: Config) -> dict[str, Runs]:
    runs = {}
    if config.single_task:
        for task in problem.tasks:
            alone = Setting(problem, (task,), config.batch_size)
            runs[f"{SINGLE} {task.name}"] = Runs(alone, "equal", config)
    together = Setting(problem, tuple(problem.tasks), config.batch_size)
    for method in config.methods:
        runs[method] = Runs(together, method, config)
    return runs


def _step_times(all_runs, config, path: Path) -> dict[str, float]:
    """Milliseconds of a step of each method, measured in turns in one go."""
    if path.exists():
        return json.loads(path.read_text())
    methods = {name: all_runs[name] for name in config.methods}
    milliseconds = step_milliseconds(
        {name: (runs.step, runs.fresh_state()) for name, runs in methods.items()}
    )
    write_atomically(path, json.dumps(milliseconds))
    return milliseconds


def _progress_bar(wanted: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (wanted and (console.is_terminal or console.is_jupyter)),
    )
