r"""One number for many tasks: relative change against a baseline, and mean rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import rankdata

Results = Mapping[str, Mapping[str, float | int | np.number]]
Directions = Mapping[str, Mapping[str, Literal["higher", "lower"]]]


@dataclass(frozen=True)
class DeltaM:
    """The result of `delta_m`; all values in per cent.

    Attributes:
      value: the overall relative change.
      per_task: mean relative change of each task.
      per_metric: relative change of each metric of each task.
      baseline_name: what the results were compared with.
      convention: whether a positive value is good (``"higher_is_better"``).
    """

    value: float
    per_task: dict[str, float]
    per_metric: dict[str, dict[str, float]]
    baseline_name: str
    convention: str

    def __str__(self) -> str:
        """Writes the value with its sign, its baseline and its convention."""
        good = self.convention.replace("_", " ")
        return f"Δm = {self.value:+.2f} % against {self.baseline_name} ({good})"


def delta_m(
    results: Results,
    baseline: Results,
    directions: Directions,
    *,
    baseline_name: str,
    convention: Literal["higher_is_better", "lower_is_better"] = "higher_is_better",
    averaging: Literal["tasks", "metrics"] = "tasks",
) -> DeltaM:
    r"""Averages the signed relative change against a baseline over tasks.

    .. math::
      \Delta m = \frac{100}{T} \sum_t \frac{1}{|M_t|} \sum_{i \in M_t}
        s_{ti} \frac{M_{ti} - B_{ti}}{|B_{ti}|}

    with ``results`` :math:`M`, ``baseline`` :math:`B` and :math:`s = 1` where higher
    values are better, else :math:`-1`.

    Papers differ in two ways, and a table is only comparable if both are the same.
    Sign: the formula above is positive for an improvement (``"higher_is_better"``); a
    newer lineage flips it (``"lower_is_better"``), as a drop to be kept small.
    Mean: over the metrics of each task and then over the tasks (``"tasks"``), or over
    all metrics alike, so that tasks with many metrics weigh more (``"metrics"``).

    Args:
      results: ``{task: {metric: value}}`` of the method.
      baseline: the same of the baseline, usually one model per task.
      directions: ``{task: {metric: "higher" or "lower"}}``, what is better. Its tasks
        and metrics are the ones that count; others in ``results`` are ignored.
      baseline_name: name of the baseline, for tables.
      convention: the sign, see above.
      averaging: the mean, see above.

    Returns:
      The overall value and its parts, in per cent.

    Raises:
      ValueError: if a value is missing, a baseline is zero (its relative change does
        not exist), a direction is unknown, or there is no metric at all.

    Example:
      >>> single = {"seg": {"miou": 40.0, "acc": 80.0}, "depth": {"abs": 0.5}}
      >>> multi = {"seg": {"miou": 42.0, "acc": 80.0}, "depth": {"abs": 0.6}}
      >>> better = {
      ...     "seg": {"miou": "higher", "acc": "higher"}, "depth": {"abs": "lower"}
      ... }
      >>> print(delta_m(multi, single, better, baseline_name="single-task"))
      Δm = -8.75 % against single-task (higher is better)

    References:
      Attentive Single-Tasking of Multiple Tasks (2019), equation 4: mean over tasks,
      positive is better. Multi-Task Learning as a Bargaining Game (2022), section 6:
      mean over all metrics, negative is better. Deviation: we divide by the absolute
      value of the baseline, so that a negative one (such as :math:`R^2 < 0`) does not
      turn the sign round.
    """
    if convention not in ("higher_is_better", "lower_is_better"):
        raise ValueError(
            "`convention` must be 'higher_is_better' or 'lower_is_better', got "
            f"{convention!r}."
        )
    if averaging not in ("tasks", "metrics"):
        raise ValueError(
            f"`averaging` must be 'tasks' or 'metrics', got {averaging!r}."
        )
    if not directions or not all(directions.values()):
        raise ValueError(
            f"`directions` must name at least one metric per task, got {directions!r}."
        )
    good = 1.0 if convention == "higher_is_better" else -1.0
    changes = {}
    for task, metrics in directions.items():
        changes[task] = {}
        for metric, direction in metrics.items():
            value = _look_up(results, "results", task, metric)
            base = _look_up(baseline, "baseline", task, metric)
            if base == 0.0:
                raise ValueError(
                    f"`baseline` must not be zero, got 0 for {metric!r} of {task!r}; "
                    "report this metric as a difference, or leave it out of "
                    "`directions`."
                )
            sign = good * _sign(direction, task, metric)
            changes[task][metric] = 100.0 * sign * (value - base) / abs(base)
    per_task = {t: float(np.mean(list(c.values()))) for t, c in changes.items()}
    parts = (
        list(per_task.values())
        if averaging == "tasks"
        else [change for c in changes.values() for change in c.values()]
    )
    return DeltaM(float(np.mean(parts)), per_task, changes, baseline_name, convention)


def mtl_gain(
    results: Results, single: Results, directions: Directions
) -> dict[str, dict[str, float]]:
    r"""Difference to the single-task models, positive where several tasks help.

    .. math:: s_{ti} (M_{ti} - S_{ti})

    with ``results`` :math:`M`, ``single`` :math:`S` and :math:`s = 1` where higher
    values are better, else :math:`-1`. :func:`delta_m` is its relative form.

    Args:
      results: ``{task: {metric: value}}`` of the multi-task model.
      single: the same of one model per task with the same architecture and samples.
      directions: ``{task: {metric: "higher" or "lower"}}``, what is better.

    Returns:
      ``{task: {metric: gain}}``, in the units of the metric.

    Raises:
      ValueError: if a value is missing or a direction is unknown.

    Example:
      >>> mtl_gain({"a": {"mae": 1.0}}, {"a": {"mae": 1.5}}, {"a": {"mae": "lower"}})
      {'a': {'mae': 0.5}}

    References:
      Progressive Layered Extraction, 2020, section 5.1.3.
    """
    return {
        task: {
            metric: _sign(direction, task, metric)
            * (
                _look_up(results, "results", task, metric)
                - _look_up(single, "single", task, metric)
            )
            for metric, direction in metrics.items()
        }
        for task, metrics in directions.items()
    }


def mean_rank(table: Mapping[str, Results], directions: Directions) -> dict[str, float]:
    """Ranks the methods on every metric of every task and averages the ranks.

    Args:
      table: ``{method: {task: {metric: value}}}``.
      directions: ``{task: {metric: "higher" or "lower"}}``, what is better.

    Returns:
      The mean rank of each method, from 1 (best everywhere) to the number of methods.
      Equal values share the mean of their ranks; ``nan`` ranks last.

    Raises:
      ValueError: if a value is missing, a direction is unknown, or ``table`` or
        ``directions`` is empty.

    Example:
      >>> table = {
      ...     "sum": {"a": {"acc": 0.8}, "b": {"mae": 2.0}},
      ...     "pcgrad": {"a": {"acc": 0.9}, "b": {"mae": 2.0}},
      ... }
      >>> mean_rank(table, {"a": {"acc": "higher"}, "b": {"mae": "lower"}})
      {'sum': 1.75, 'pcgrad': 1.25}

    References:
      Multi-Task Learning as a Bargaining Game (2022), section 6.
    """
    columns = [
        (t, m, d) for t, metrics in directions.items() for m, d in metrics.items()
    ]
    if not table or not columns:
        raise ValueError(
            "`table` and `directions` must not be empty, got "
            f"{len(table)} methods and {len(columns)} metrics."
        )
    ranks = []
    for task, metric, direction in columns:
        sign = _sign(direction, task, metric)
        values = np.array(
            [
                _look_up(row, f"table[{name!r}]", task, metric)
                for name, row in table.items()
            ]
        )
        ranks.append(rankdata(np.where(np.isnan(values), np.inf, -sign * values)))
    return dict(zip(table, np.mean(ranks, axis=0).tolist(), strict=True))


def seed_table(runs: Mapping[str, Sequence[Mapping[str, float | int]]]) -> str:
    """Writes numbers of several runs per method as a Markdown table.

    Args:
      runs: ``{method: [numbers of one seed, ...]}``; a method may lack columns.

    Returns:
      One line per method and one column per name, in the order of their appearance:
      the mean over seeds, with the standard deviation (of the sample) if there is more
      than one.

    Raises:
      ValueError: if there is no method, or a method without runs.

    Example:
      >>> runs = {"sum": [{"acc": 90.0}, {"acc": 92.0}], "pcgrad": [{"time": 2.0}]}
      >>> print(seed_table(runs))
      | method | acc | time |
      |---|---|---|
      | sum | 91 ± 1.4 |  |
      | pcgrad |  | 2 |
    """
    if not runs or not all(runs.values()):
        raise ValueError(
            "`runs` must hold at least one run of every method, got "
            f"{ {name: len(seeds) for name, seeds in runs.items()} }."
        )
    columns = list(dict.fromkeys(c for seeds in runs.values() for c in seeds[0]))
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in runs.items():
        cells = [_spread([x[c] for x in seeds if c in x]) for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float | int]) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):.4g}"
    # One seed tells nothing about the spread.
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2g}"


def _sign(direction: str, task: str, metric: str) -> float:
    if direction not in ("higher", "lower"):
        raise ValueError(
            f"`directions` must say 'higher' or 'lower', got {direction!r} for "
            f"{metric!r} of {task!r}."
        )
    return 1.0 if direction == "higher" else -1.0


def _look_up(results: Results, name: str, task: str, metric: str) -> float:
    if task not in results or metric not in results[task]:
        raise ValueError(
            f"`{name}` must hold every metric of `directions`, got nothing for "
            f"{metric!r} of {task!r}."
        )
    return float(results[task][metric])
