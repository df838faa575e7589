"""Figures of a comparison of methods: curves, cosines, trade-offs, groups."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Paul Tol's "muted" scheme: told apart with any colour vision, in this order.
_COLORS = (
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#117733",
    "#999933",
    "#DDCC77",
    "#CC6677",
    "#882255",
    "#AA4499",
    "#888888",
)


def method_colors(methods: Sequence[str]) -> dict[str, str]:
    """One colour per method, the same in every figure."""
    return {m: _COLORS[i % len(_COLORS)] for i, m in enumerate(methods)}


def plot_curves(
    steps: np.ndarray,
    curves: Mapping[str, Mapping[str, np.ndarray]],
    *,
    ylabels: Mapping[str, str],
    title: str = "",
) -> Figure:
    """Draws curves over training, one panel per task, mean and range over seeds.

    Args:
      steps: `(evaluations,)` training steps.
      curves: per task, per method, `(seeds, evaluations)` values.
      ylabels: per task.
      title: of the figure.

    Returns:
      The figure; save it with `figure.savefig`.
    """
    figure = Figure(figsize=(5.2 * len(curves), 3.9), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (task, per_method) in zip(axes, curves.items()):
        colors = method_colors(list(per_method))
        for method, values in per_method.items():
            _line_with_range(ax, steps, values, colors[method], method)
        ax.set(title=task, xlabel="training step", ylabel=ylabels[task])
        _tidy(ax)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(title)
    return figure


def plot_cosines(
    steps: np.ndarray, cosines: Mapping[str, np.ndarray], *, title: str = ""
) -> Figure:
    """Draws the mean cosine between task gradients over training.

    Args:
      steps: `(evaluations,)` training steps.
      cosines: per method `(seeds, evaluations)`; below zero the tasks conflict.
      title: of the figure.

    Returns:
      The figure.
    """
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    ax = figure.subplots()
    ax.axhline(0.0, color="0.6", linewidth=1)
    colors = method_colors(list(cosines))
    for method, values in cosines.items():
        _line_with_range(ax, steps, values, colors[method], method)
    ax.set(
        xlabel="training step",
        ylabel="mean cosine of task gradients",
        title=title,
    )
    ax.text(0.01, 0.01, "conflict", transform=ax.transAxes, color="0.4", va="bottom")
    _tidy(ax)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def plot_tradeoff(
    points: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    xlabel: str,
    ylabel: str,
    baseline: tuple[float, float] | None = None,
    title: str = "",
) -> Figure:
    """Draws what each method reaches on two tasks, seeds faint and means solid.

    Args:
      points: per method, two arrays of shape `(seeds,)`.
      xlabel: metric of the first task.
      ylabel: metric of the second task.
      baseline: the single-task models' values, drawn as cross hairs.
      title: of the figure.

    Returns:
      The figure.
    """
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    ax = figure.subplots()
    if baseline is not None:
        style = {"color": "0.5", "linestyle": "--", "linewidth": 1}
        ax.axvline(baseline[0], **style)
        ax.axhline(baseline[1], **style, label="single-task models")
    colors = method_colors(list(points))
    for method, (x, y) in points.items():
        ax.scatter(x, y, color=colors[method], alpha=0.3, s=18, linewidths=0)
        ax.scatter(
            np.mean(x), np.mean(y), color=colors[method], s=64, label=method, zorder=3
        )
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    _tidy(ax)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def plot_groups(
    panels: Mapping[str, Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]],
) -> Figure:
    """Draws values side by side in groups, seeds faint and means solid.

    Args:
      panels: per quantity (a row of panels), per column of panels, per group, per
        method, the values of the seeds; a group may lack a method.

    Returns:
      The figure.
    """
    columns = list(next(iter(panels.values())))
    size = (3.8 * len(columns) + 1.0, 2.3 * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), len(columns), squeeze=False)
    methods = dict.fromkeys(
        m for r in panels.values() for c in r.values() for g in c.values() for m in g
    )
    colors = method_colors(list(methods))
    for ax, column in zip(axes[0], columns):
        ax.set_title(column)
    for line, (quantity, row) in zip(axes, panels.items()):
        line[0].set_ylabel(quantity)
        for ax, groups in zip(line, row.values()):
            for i, values in enumerate(groups.values()):
                for j, method in enumerate(methods):
                    y, x = values.get(method, ()), i + 0.6 * (j + 0.5) / len(methods)
                    style = {"color": colors[method], "linewidths": 0}
                    ax.scatter([x] * len(y), y, alpha=0.3, s=14, **style)
                    if len(y):
                        ax.scatter(x, np.mean(y), s=44, **style)
            ax.set_xticks(np.arange(len(groups)) + 0.3, list(groups))
            _tidy(ax)
    for method in methods:
        axes[0, 0].scatter([], [], color=colors[method], s=44, label=method)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def plot_effects(
    panels: Mapping[str, Mapping[str, tuple[np.ndarray, float]]],
    *,
    order: Sequence[str],
    reference: str,
    xlabel: str,
) -> Figure:
    """Draws an effect of many methods as lines of dots, seeds faint and means solid.

    Args:
      panels: per column, per method, the values of the seeds and half the width of the
        interval around their mean; a column may lack a method.
      order: the methods from top to bottom.
      reference: the method whose mean is drawn as a line through its column.
      xlabel: what the values are.

    Returns:
      The figure. A column shows the better nine tenths of its methods; those far off to
      the left are named at the edge, with their mean.
    """
    size = (3.4 * len(panels) + 1.6, 0.21 * len(order) + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, effects) in zip(axes, panels.items()):
        means = np.array([np.mean(values) for values, _ in effects.values()])
        shown = [
            m for m in effects if effects[m][0].mean() >= np.nanquantile(means, 0.1)
        ]
        ends = np.concatenate([effects[m][0] for m in shown])
        margin = 0.05 * np.ptp(ends) + 1e-9
        left, right = ends.min() - margin, ends.max() + margin
        ax.axvline(effects[reference][0].mean(), color=_COLORS[6], linewidth=1)
        for i, method in enumerate(order):
            values, half = effects.get(method, (np.array([np.nan]), np.nan))
            mean = values.mean()
            if np.isnan(mean) or mean < left:
                text = "failed" if np.isnan(mean) else f"← {mean:.3g}"
                ax.text(left, i, f" {text}", va="center", fontsize=8, color=_COLORS[7])
                continue
            color = _COLORS[6] if method == reference else _COLORS[0]
            style = {"color": color, "linewidths": 0}
            ax.scatter(values, [i] * len(values), alpha=0.25, s=12, **style)
            ax.plot([mean - half, mean + half], [i, i], color=color, linewidth=1.4)
            ax.scatter(mean, i, s=28, zorder=3, **style)
        ax.set(title=title, xlabel=xlabel, xlim=(left, right))
        ax.set_yticks(range(len(order)), order, fontsize=8)
        _tidy(ax)
    axes[0].set_ylim(len(order) - 0.4, -0.6)
    return figure


def plot_gates(
    panels: Mapping[str, np.ndarray], *, gates: Sequence[str], title: str = ""
) -> Figure:
    """Draws mean gate weights as heat maps, one row per task and a column per expert.

    Args:
      panels: per panel (a level, or a model), `(gates, experts)` mean weights, such as
        `mtjax.analysis.expert_utilisation(...).weights`.
      gates: names of the rows; those of panels with more rows are numbered.
      title: of the figure.

    Returns:
      The figure. All panels share one scale from 0 to 1.
    """
    widths = [np.shape(weights)[1] for weights in panels.values()]
    rows = max(len(weights) for weights in panels.values())
    size = (0.62 * sum(widths) + 1.4 * len(panels) + 0.8, 0.5 * rows + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    image = None
    for ax, (name, weights) in zip(axes, panels.items()):
        image = ax.imshow(weights, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
        for (i, j), weight in np.ndenumerate(weights):
            color = "white" if weight > 0.6 else "0.2"
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": color}
            ax.text(j, i, f"{weight:.2f}", **style)
        named = gates if len(gates) == len(weights) else range(len(weights))
        ax.set_yticks(range(len(weights)), list(map(str, named)))
        ax.set_xticks(range(np.shape(weights)[1]))
        ax.set(title=name, xlabel="expert")
    if image is not None:
        figure.colorbar(image, ax=axes, label="mean gate weight")
    figure.suptitle(title)
    return figure


def _line_with_range(ax: Axes, steps, values, color: str, label: str) -> None:
    ax.plot(steps, values.mean(0), color=color, linewidth=1.8, label=label)
    if len(values) > 1:
        low, high = values.min(0), values.max(0)
        ax.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
