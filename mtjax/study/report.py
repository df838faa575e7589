"""Plots and a self-contained HTML page of a finished study."""

import base64
import html
import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mtjax.analysis.plots import plot_cosines, plot_curves, plot_tradeoff
from mtjax.study.config import Config
from mtjax.study.setting import metric_of
from mtjax.study.summary import SINGLE, Summary
from mtjax.training.commit import write_atomically

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem;
  padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-size: .92rem }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; margin: .5rem 0 1.5rem }
.note { color: #555; max-width: 50rem } dt { font-weight: 600 } dd { margin: 0 0 .4rem }
"""


def write_report(config: Config, summary: Summary, out: Path) -> list[Path]:
    """Writes the plots as PNG files and everything as one `report.html`.

    Args:
      config: what was compared.
      summary: its results.
      out: the run folder.

    Returns:
      The files, the page first.
    """
    figures = _figures(config, summary)
    paths = []
    images = []
    for name, (figure, caption) in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        path = out / f"{name}.png"
        path.write_bytes(buffer.getvalue())
        paths.append(path)
        data = base64.b64encode(buffer.getvalue()).decode()
        images.append(
            f"<h2>{html.escape(caption)}</h2>"
            f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        )
    page = out / "report.html"
    write_atomically(page, _page(config, summary, images))
    return [page, *paths]


def _figures(config: Config, summary: Summary) -> dict[str, tuple[Figure, str]]:
    curves = summary.curves
    steps = next(iter(curves.values())).steps
    labels = {t.name: f"validation {metric_of(t).name}" for t in summary.tasks}
    per_task = {
        t.name: {m: c.metrics[t.name] for m, c in curves.items()} for t in summary.tasks
    }
    figures = {
        "training_curves": (
            plot_curves(steps, per_task, ylabels=labels),
            "Training curves (mean and range over seeds)",
        )
    }
    cosines = {m: c.cosine for m, c in curves.items() if c.cosine is not None}
    if cosines:
        figures["gradient_cosines"] = (
            plot_cosines(steps, cosines),
            "Agreement of the tasks' gradients",
        )
    if len(summary.tasks) >= 2:
        first, second = summary.tasks[:2]
        points = {
            row.method: (
                np.array(row.metrics[first.name].values),
                np.array(row.metrics[second.name].values),
            )
            for row in summary.rows
        }
        single = points.pop(SINGLE, None)
        baseline = None if single is None else (single[0].mean(), single[1].mean())
        figures["tradeoff"] = (
            plot_tradeoff(
                points,
                xlabel=f"{first.name}: test {metric_of(first).name}",
                ylabel=f"{second.name}: test {metric_of(second).name}",
                baseline=baseline,
            ),
            f"Trade-off between {first.name} and {second.name}",
        )
    return figures


def _page(config: Config, summary: Summary, images: list[str]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in summary.headers())
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(c)}</td>" for c in summary.cells(row))
        + "</tr>"
        for row in summary.rows
    )
    settings = "; ".join(
        f"{name.replace('_', ' ')}: {html.escape(str(getattr(config, name)))}"
        for name in ("steps", "seeds", "batch_size", "learning_rate")
    )
    baseline = (
        f"Δm is the mean relative change of the tasks' metrics against {SINGLE} models "
        "of the same encoder and budget, in per cent; positive is better. "
        if summary.rows[0].method == SINGLE
        else ""
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>mtjax: {html.escape(config.data)}</title>"
        f"<style>{_STYLE}</style></head>"
        f"<body><h1>Multi-task training on {html.escape(config.data)}</h1>"
        f"<p class='note'>{settings}. All methods use Adam with the same learning "
        "rate, which was not tuned for any of them: read differences that are not "
        "larger than the spread over seeds as none.</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p class='note'>{baseline}Mean rank is over tasks. Step time is the median "
        f"over steps taken in turns, relative to {summary.step_reference}. "
        "Conflict rate is the share of pairs of tasks whose gradients have a negative "
        "cosine, over training, on the same probe batches for every method.</p>"
        f"{''.join(images)}</body></html>"
    )
