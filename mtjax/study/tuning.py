"""The learning rate of every method, chosen on the validation part."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtjax.data import Task
from mtjax.study.setting import metric_of
from mtjax.study.summary import SINGLE
from mtjax.training import delta_m

Lane = Mapping[str, Any]


def tuned_lanes(
    tasks: Sequence[Task], sweeps: Mapping[str, Sequence[Lane]]
) -> dict[str, list[Lane]]:
    """Keeps the lanes of the best learning rate of each method.

    Tasks alone are judged by their metric, methods by Δm against the tasks alone; both
    by means over seeds on the validation part. Of equal learning rates the first wins.

    Args:
      tasks: the tasks.
      sweeps: per "single-task NAME", for all tasks, and per method, what
        `Sweep.results` returns.

    Returns:
      One lane per seed. Where no learning rate gives numbers, those of the first.
    """
    metrics = {t.name: metric_of(t) for t in tasks}
    directions = {t: {m.name: m.direction} for t, m in metrics.items()}
    baseline, kept = {}, {}
    for task, metric in metrics.items():
        name = f"{SINGLE} {task}"
        means = _means(sweeps[name], {task: metric})
        sign = 1.0 if metric.direction == "higher" else -1.0
        rate = _best({r: sign * m[task][metric.name] for r, m in means.items()})
        kept[name] = _at(sweeps[name], rate)
        baseline |= means[rate]
    for name, lanes in sweeps.items():
        if name not in kept:
            changes = {
                rate: delta_m(found, baseline, directions, baseline_name=SINGLE).value
                for rate, found in _means(lanes, metrics).items()
            }
            kept[name] = _at(lanes, _best(changes))
    return kept


def _means(lanes, metrics) -> dict[float, dict[str, dict[str, float]]]:
    """Per learning rate, what `delta_m` takes."""
    return {
        rate: {
            task: {
                metric.name: float(
                    np.mean(
                        [x["validation"][task][metric.name] for x in _at(lanes, rate)]
                    )
                )
            }
            for task, metric in metrics.items()
        }
        for rate in dict.fromkeys(lane["learning_rate"] for lane in lanes)
    }


def _at(lanes, rate: float) -> list[Lane]:
    return [lane for lane in lanes if lane["learning_rate"] == rate]


def _best(values: Mapping[float, float]) -> float:
    return max(values, key=lambda rate: np.nan_to_num(values[rate], nan=-np.inf))
