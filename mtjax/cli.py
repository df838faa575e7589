"""The `mtjax` command."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from mtjax.study.config import Config
from mtjax.study.methods import METHODS

_ABOUT = """Train, balance and merge multi-task models in JAX.

Start with `mtjax quickstart`: a real comparison in about two minutes, no download.
Then `mtjax list` shows methods and data, and `mtjax train` compares any of them:

  mtjax train --data multi_mnist --methods equal pcgrad --seeds 5 --out runs/mine
  mtjax data prepare energy_efficiency --from FOLDER --data-dir DATA
  mtjax train --data energy_efficiency --data-dir DATA --out runs/energy

An interrupted run goes on when the same command is given again.
Errors exit with status 2 and change nothing; MTJAX_DEBUG=1 shows their traceback.
"""

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
    """Show the methods and the data there are."""
    from mtjax.data import problem_names

    console = Console()
    columns = ("method", "looks at", "needs", "idea")
    table = Table(*columns, title="Methods (--methods)")
    for name, method in METHODS.items():
        table.add_row(name, method.kind, method.needs, method.idea)
    console.print(table)
    console.print(f"Problems (--data): {', '.join(problem_names())}")
    data_list()


def data() -> None:
    """Prepare data sets: `mtjax data prepare`, `mtjax data list`."""


def data_prepare(
    name: tyro.conf.Positional[str],
    source: Annotated[
        Path, tyro.conf.arg(name="from", help="folder with the original files")
    ],
    data_dir: Annotated[Path, tyro.conf.arg(help="where prepared data are kept")],
) -> None:
    """Turn the original files of a data set into array_record files, once.

    Args:
      name: data set, as `mtjax data list` names it.
      source: folder with the original files.
      data_dir: where prepared data are kept.
    """
    from mtjax.data import prepare

    folder = prepare(name, source, data_dir)
    Console().print(f"Prepared {name} in {folder}")


def data_list() -> None:
    """Show the data sets that can be prepared."""
    from mtjax.data import available

    table = Table("name", "tasks", "licence", title="Data (mtjax data prepare NAME)")
    for row in available():
        table.add_row(row.name, ", ".join(row.tasks), row.licence)
    Console().print(table)


def main(args: list[str] | None = None) -> None:
    """Runs the command; exits with status 2 on errors that the user can mend."""
    args = sys.argv[1:] if args is None else args
    try:
        if args[:1] == ["data"]:
            commands = {"prepare": data_prepare, "list": data_list}
            _dispatch(commands, data.__doc__, "mtjax data", args[1:])
        else:
            commands = {
                "quickstart": quickstart,
                "train": train,
                "list": list_all,
                "data": data,
            }
            _dispatch(commands, _ABOUT, "mtjax", args)
    except KeyboardInterrupt:
        print("Stopped; give the same command again to go on.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("MTJAX_DEBUG"):
            raise
        print(f"mtjax: error: {error}", file=sys.stderr)
        sys.exit(2)


def _dispatch(commands, description, prog, args) -> None:
    tyro.extras.subcommand_cli_from_dict(
        commands, description=description, prog=prog, args=args
    )


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
