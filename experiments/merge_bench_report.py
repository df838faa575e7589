"""Table and figures of the merge-bench, from its rows of results."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mtjax import training
from mtjax.analysis.plots import method_colors

REFERENCES = ("base", "individual")


def chosen(rows, method: str, number: int) -> list[dict[str, Any]]:
    """The rows of a method on so many tasks, one per seed."""
    return [r for r in rows if (r["method"], r["number"]) == (method, number)]


def normalised(rows, method: str, number: int) -> np.ndarray:
    """Mean accuracy relative to the individual models in percent, per seed."""
    best = {r["seed"]: r["accuracy"] for r in rows if r["method"] == "individual"}
    return np.array(
        [
            np.mean([100 * x / best[r["seed"]][t] for t, x in r["accuracy"].items()])
            for r in chosen(rows, method, number)
        ]
    )


def table(rows, number: int) -> str:
    """Means over seeds on all tasks, in Markdown."""
    runs = {}
    for method in dict.fromkeys(r["method"] for r in rows):
        runs[method] = []
        shares = normalised(rows, method, number)
        for row, share in zip(chosen(rows, method, number), shares):
            percent = {t: 100 * x for t, x in row["accuracy"].items()}
            mean = float(np.mean([*percent.values()]))
            cells = {"normalised, %": float(share), "accuracy, %": mean, **percent}
            cells["MB"] = row["bytes"] / 1e6
            if row["seconds"] is not None:
                cells |= {"factor": row["factor"], "merging, ms": 1e3 * row["seconds"]}
            runs[method].append(cells)
    return training.seed_table(runs) + "\n"


def bars(rows, number: int, untuned: Sequence[str]) -> Figure:
    """Normalised accuracy of every method, seeds as dots."""
    methods = dict.fromkeys(r["method"] for r in rows)
    found = {m: normalised(rows, m, number) for m in methods}
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    ax = figure.subplots()
    palette = method_colors(["reference", "without a factor", "tuned factor"])
    kinds = dict.fromkeys(REFERENCES, "reference")
    kinds |= dict.fromkeys(untuned, "without a factor")
    for m in sorted(found, key=lambda m: found[m].mean()):
        color = palette[kinds.get(m, "tuned factor")]
        ax.barh(m, found[m].mean(), color=color, alpha=0.8)
        ax.scatter(found[m], [m] * len(found[m]), color="black", s=8, zorder=3)
    for kind, color in palette.items():
        ax.scatter([], [], marker="s", color=color, alpha=0.8, label=kind)
    ax.set(xlabel="accuracy relative to the individual models, %")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def curves(rows, total: int) -> Figure:
    """Normalised accuracy over the number of merged tasks, mean and range of seeds."""
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    ax, numbers = figure.subplots(), range(2, total + 1)
    small = dict.fromkeys(r["method"] for r in rows if r["number"] < total)
    colors = method_colors(list(small))
    for m in small:
        values = np.array([normalised(rows, m, n) for n in numbers])
        ax.plot(numbers, values.mean(1), "o-", color=colors[m], label=m)
        low, high = values.min(1), values.max(1)
        ax.fill_between(numbers, low, high, color=colors[m], alpha=0.12, linewidth=0)
    ax.set(xlabel="merged tasks", ylabel="relative to the individual models, %")
    ax.set_xticks(numbers)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def heatmap(cosines: np.ndarray, tasks: Sequence[str]) -> Figure:
    """Cosines of task vectors, with their values."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    ax = figure.subplots()
    ax.imshow(cosines, cmap="Blues", vmin=0, vmax=1)
    for (i, j), value in np.ndenumerate(cosines):
        color = "white" if value > 0.6 else "black"
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
    ax.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right")
    ax.set_yticks(range(len(tasks)), tasks)
    return figure
