"""From the results of all runs to the numbers of a table."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from mtjax.data import Task
from mtjax.study.setting import metric_of
from mtjax.training import delta_m, mean_rank

SINGLE = "single-task"


class Spread(NamedTuple):
    """Mean and standard deviation over seeds (zero for one seed), and the values."""

    mean: float
    std: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values) -> "Spread":
        """Over a list with one value per seed."""
        values = np.asarray(values, float)
        std = values.std(ddof=1) if len(values) > 1 else 0.0
        return cls(float(values.mean()), float(std), tuple(values.tolist()))


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
      method: its name.
      metrics: per task the test metric.
      delta_m: mean relative change against single-task models in per cent, positive is
        better; None without that baseline.
      mean_rank: over tasks, 1 is best; None for the baseline.
      step_ratio: time of a training step over that of the first method in the table;
        None for the baseline.
      conflict_rate: share of conflicting pairs of tasks, over training; None for the
        baseline.
    """

    method: str
    metrics: dict[str, Spread]
    delta_m: Spread | None = None
    mean_rank: float | None = None
    step_ratio: float | None = None
    conflict_rate: Spread | None = None


@dataclass(frozen=True)
class Curves:
    """What one method did over training.

    Attributes:
      steps: `(evaluations,)` training steps.
      metrics: per task `(seeds, evaluations)` validation metric.
      losses: per task `(seeds, evaluations)` validation loss.
      cosine: `(seeds, evaluations)` mean cosine between task gradients, or None.
    """

    steps: np.ndarray
    metrics: dict[str, np.ndarray]
    losses: dict[str, np.ndarray]
    cosine: np.ndarray | None


@dataclass(frozen=True)
class Summary:
    """A finished study: one row per method, and its curves.

    Attributes:
      tasks: the tasks.
      rows: the single-task baseline first, if there is one.
      curves: per method.
      step_reference: the method that step times are relative to.
    """

    tasks: tuple[Task, ...]
    rows: tuple[Row, ...]
    curves: dict[str, Curves]
    step_reference: str

    def as_json(self) -> dict[str, Any]:
        """The numbers of the table."""
        return {
            "tasks": {t.name: metric_of(t).name for t in self.tasks},
            "rows": [asdict(row) for row in self.rows],
            "step_reference": self.step_reference,
        }

    def headers(self) -> list[str]:
        """Column titles, the same as `cells` fills."""
        names = []
        for task in self.tasks:
            metric = metric_of(task)
            arrow = "↑" if metric.direction == "higher" else "↓"
            unit = " %" if _in_percent(task) else ""
            names.append(f"{task.name}\n{metric.name}{unit} {arrow}")
        time = f"step time\n/ {self.step_reference}"
        return ["method", *names, "Δm\n% ↑", "mean\nrank ↓", time, "conflict\n%"]

    def cells(self, row: Row) -> list[str]:
        """One row as text."""
        metrics = []
        for task in self.tasks:
            scale, digits = (100.0, 2) if _in_percent(task) else (1.0, 3)
            metrics.append(_plus_minus(row.metrics[task.name], scale, digits))
        if row.method == SINGLE:
            return [row.method, *metrics, "", "", "", ""]
        conflict = row.conflict_rate
        return [
            row.method,
            *metrics,
            "" if row.delta_m is None else _plus_minus(row.delta_m, 1.0, 2, "+"),
            f"{row.mean_rank:.2f}",
            f"{row.step_ratio:.2f}",
            "" if conflict is None else f"{100 * conflict.mean:.0f}",
        ]

    def table(self) -> Table:
        """The table for a terminal."""
        title = "Test set: mean ± standard deviation over seeds"
        table = Table(
            *self.headers(),
            title=title,
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for i, column in enumerate(table.columns):
            column.no_wrap, column.justify = True, "right" if i else "left"
        for row in self.rows:
            table.add_row(*self.cells(row))
        return table


def summarise(
    tasks: tuple[Task, ...],
    methods: tuple[str, ...],
    results: dict[str, list[dict[str, Any]]],
    milliseconds: dict[str, float],
) -> Summary:
    """Computes the table and the curves.

    Args:
      tasks: the tasks.
      methods: the balancers, in order.
      results: per method, and per "single-task NAME" if trained, one result per seed.
      milliseconds: per balancer, of a training step.

    Returns:
      The summary.
    """
    tasks = tuple(tasks)
    reference = "equal" if "equal" in methods else methods[0]
    scores = {name: _test_scores(tasks, results[name]) for name in methods}
    directions = _by_metric(tasks, lambda t: metric_of(t).direction)
    means = {
        name: _by_metric(tasks, lambda t, own=own: own[t.name].mean())
        for name, own in scores.items()
    }
    ranks = mean_rank(means, directions)
    rows, baseline = [], None
    if f"{SINGLE} {tasks[0].name}" in results:
        single = {
            t.name: _test_scores((t,), results[f"{SINGLE} {t.name}"])[t.name]
            for t in tasks
        }
        rows.append(Row(SINGLE, {n: Spread.of(v) for n, v in single.items()}))
        baseline = _by_metric(tasks, lambda t: single[t.name].mean())

    def change(own, seed, baseline):
        found = _by_metric(tasks, lambda t: own[t.name][seed])
        return delta_m(found, baseline, directions, baseline_name=SINGLE).value

    for name in methods:
        deltas = None
        if baseline is not None:
            seeds = range(len(results[name]))
            deltas = [change(scores[name], seed, baseline) for seed in seeds]
        rates = [
            np.mean([row["conflict_rate"] for row in run["history"]])
            for run in results[name]
            if "conflict_rate" in run["history"][0]
        ]
        rows.append(
            Row(
                method=name,
                metrics={t: Spread.of(v) for t, v in scores[name].items()},
                delta_m=None if deltas is None else Spread.of(deltas),
                mean_rank=ranks[name],
                step_ratio=milliseconds[name] / milliseconds[reference],
                conflict_rate=Spread.of(rates) if rates else None,
            )
        )
    curves = {name: _curves(tasks, results[name]) for name in methods}
    return Summary(tasks, tuple(rows), curves, reference)


def _by_metric(tasks, value) -> dict[str, dict[str, Any]]:
    """What `delta_m` and `mean_rank` take, from a function of the task."""
    return {t.name: {metric_of(t).name: value(t)} for t in tasks}


def _test_scores(tasks, runs) -> dict[str, np.ndarray]:
    return {
        t.name: np.array([run["test"][t.name][metric_of(t).name] for run in runs])
        for t in tasks
    }


def _curves(tasks, runs) -> Curves:
    def gather(key):
        return np.array([[row[key] for row in run["history"]] for run in runs])

    has_cosine = "cosine" in runs[0]["history"][0]
    return Curves(
        steps=np.array([row["step"] for row in runs[0]["history"]]),
        metrics={t.name: gather(f"{t.name}/{metric_of(t).name}") for t in tasks},
        losses={t.name: gather(f"{t.name}/loss") for t in tasks},
        cosine=gather("cosine") if has_cosine else None,
    )


def _in_percent(task: Task) -> bool:
    return metric_of(task).name == "accuracy"


def _plus_minus(spread: Spread, scale: float, digits: int, sign: str = "") -> str:
    mean = f"{scale * spread.mean:{sign}.{digits}f}"
    if len(spread.values) == 1:  # one seed tells nothing about the spread
        return mean
    return f"{mean}±{scale * spread.std:.{digits}f}"
