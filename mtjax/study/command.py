"""`mtjax quickstart`, `mtjax train` and `mtjax list`."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from mtjax.data.command import data_list
from mtjax.study.config import Config
from mtjax.study.methods import METHODS

Out = Annotated[Path, tyro.conf.arg(help="run folder for results, plots, the report")]


def quickstart(
    out: Out = Path("runs/quickstart"),
    seeds: int = Config.seeds,
    steps: int = Config.steps,
    methods: tuple[str, ...] = Config.methods,
) -> None:
    """Compare balancers on two overlaid digits: no download, about two minutes.

    Trains a small shared encoder with two heads on the embedded multi_mnist set with
    every method, and single-task models as the baseline. Prints a table; writes plots
    and a self-contained report.html.

    Args:
      out: run folder.
      seeds: seeds per method; the table shows their spread.
      steps: training steps per run.
      methods: balancers to compare (`mtjax list`).
    """
    _run(Config(seeds=seeds, steps=steps, methods=methods), out)


def train(config: tyro.conf.OmitArgPrefixes[Config], out: Out) -> None:
    """Compare any methods on any data.

    Trains every method with every seed on the same model, and single-task models as
    the baseline. Prints a table; writes plots and a self-contained report.html.

    Args:
      config: what to compare.
      out: run folder.
    """
    _run(config, out)


def list_all() -> None:
    """Show the methods, the ways to merge and the data there are."""
    from mtjax.data import problem_names
    from mtjax.merging.recipe import METHODS as MERGERS

    console = Console()
    columns = ("method", "looks at", "needs", "idea")
    table = Table(*columns, title="Methods (--methods)")
    for name, method in METHODS.items():
        table.add_row(name, method.kind, method.needs, method.idea)
    console.print(table)
    table = Table("method", "idea", title="mtjax merge --method")
    for name, factory in MERGERS.items():
        table.add_row(name, str(factory.__doc__).partition("\n")[0])
    console.print(table)
    console.print(f"Problems (--data): {', '.join(problem_names())}")
    data_list()


def _run(config: Config, out: Path) -> None:
    from mtjax.study import run_study, write_report

    if config.data_dir is not None:
        config = replace(config, data_dir=config.data_dir.expanduser().resolve())
    start = time.monotonic()
    summary = run_study(config, out)
    paths = write_report(config, summary, out)
    # A pipe has no width of its own: do not cut the table for it.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(summary.table())
    console.print(f"Done in {time.monotonic() - start:.0f} s. Look at {paths[0]}")
