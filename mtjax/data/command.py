"""`mtjax data`."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table


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
