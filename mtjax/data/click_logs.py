"""AliExpress, Ali-CCP and Criteo: logs of clicks and purchases, read in chunks.

The files are too large for memory, so they are read by Arrow in blocks: once to fit
vocabularies and statistics on training, then to encode.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from jaxtyping import Shaped

from mtjax.data.builders.spec import DataFormatError
from mtjax.data.sources import DataNotFoundError
from mtjax.data.table_encoder import TableEncoder, fit_table_encoder

Table = dict[str, Shaped[np.ndarray, " n"]]


@dataclass(frozen=True)
class ClickLogFormat:
    """How the rows of a log are written.

    Attributes:
      name: of the data.
      tasks: columns of the labels, in the order of the funnel.
      numeric: whether the column of that name is a number.
      categories: whether the other columns are integers or texts.
      user: column by which metrics per user are grouped, or None.
      log1p: whether numbers have a heavy tail.
      header: names of the columns of a file without a first line of names.
    """

    name: str
    tasks: tuple[str, ...]
    numeric: Callable[[str], bool]
    categories: Literal["int64", "string"]
    user: str | None = None
    log1p: bool = False
    header: tuple[str, ...] = ()


ALIEXPRESS = ClickLogFormat(
    name="aliexpress",
    tasks=("click", "conversion"),
    numeric=lambda name: name.startswith("numerical_"),
    categories="int64",
    user="search_id",
)
"""One country of AliExpress: 16 categories, 63 numbers, the search as user."""

ALI_CCP = ClickLogFormat(
    name="ali_ccp",
    tasks=("click", "purchase"),
    numeric=lambda name: name.startswith("D"),
    categories="int64",
    user="101",
)
"""Ali-CCP as prepared by public libraries: 23 categories, 8 numbers, 101 the user."""

CRITEO = ClickLogFormat(
    name="criteo",
    tasks=("label",),
    numeric=lambda name: name.startswith("I"),
    categories="string",
    log1p=True,
    header=(
        "label",
        *(f"I{i}" for i in range(1, 14)),
        *(f"C{i}" for i in range(1, 27)),
    ),
)
"""Criteo display advertising: 13 numbers, 26 hashed categories, one label."""


def read_click_log(
    path: str | Path, form: ClickLogFormat, *, block_size: int = 16 << 20
) -> Iterator[Table]:
    """Reads a log block by block.

    Args:
      path: a file, possibly compressed (``.gz``), with commas or tabs between columns.
      form: how it is written.
      block_size: bytes of text per block; a row has to fit.

    Yields:
      ``{column: array}``: float32 numbers and labels with NaN for missing ones,
      integers with -1, texts with ``""``.

    Raises:
      DataNotFoundError: if the file does not exist.
      DataFormatError: if a column is missing or a value is not what it should be.
    """
    path = Path(path)
    if not path.is_file():
        raise DataNotFoundError(f"`path` must be a file of {form.name}, got {path}.")
    names, delimiter, has_header = _columns(path, form)
    types = {name: _type(name, form) for name in names}
    try:
        reader = pyarrow.csv.open_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(
                block_size=block_size,
                column_names=names,
                skip_rows=int(has_header),
            ),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=types, strings_can_be_null=True, null_values=[""]
            ),
        )
        for batch in reader:
            yield {name: _numpy(batch[name]) for name in names}
    except pa.ArrowInvalid as error:
        raise DataFormatError(
            f"{str(path)!r} is not a log of {form.name}: {error}"
        ) from error


def click_log_columns(
    path: str | Path, form: ClickLogFormat
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the categorical and of the numeric columns of a log."""
    names, _, _ = _columns(Path(path), form)
    inputs = [name for name in names if name not in form.tasks]
    numbers = tuple(name for name in inputs if form.numeric(name))
    return tuple(name for name in inputs if name not in numbers), numbers


def fit_click_log(
    path: str | Path,
    form: ClickLogFormat,
    *,
    min_count: int = 1,
    block_size: int = 16 << 20,
) -> TableEncoder:
    """Fits vocabularies and statistics on the training file, in one pass.

    Args:
      path: the training file.
      form: how it is written.
      min_count: values that occur less often get the id 1; 10 is usual for Criteo.
      block_size: bytes of text per block.

    Returns:
      The encoder for this and the other files.

    Raises:
      DataNotFoundError: if the file does not exist.
      DataFormatError: as for :func:`read_click_log`.
    """
    if not Path(path).is_file():
        raise DataNotFoundError(f"`path` must be a file of {form.name}, got {path}.")
    fields, numbers = click_log_columns(path, form)
    return fit_table_encoder(
        read_click_log(path, form, block_size=block_size),
        fields=fields,
        numbers=numbers,
        log1p=numbers if form.log1p else (),
        min_count=min_count,
    )


def encode_click_log(
    path: str | Path,
    form: ClickLogFormat,
    encoder: TableEncoder,
    *,
    block_size: int = 16 << 20,
) -> Iterator[dict[str, Any]]:
    """Reads a log block by block as splits of :class:`mtjax.data.RankingProblem`.

    Args:
      path: the file.
      form: how it is written.
      encoder: from :func:`fit_click_log`.
      block_size: bytes of text per block.

    Yields:
      ``categorical``, ``numeric``, ``labels`` and, where the log has one, ``user``.

    Raises:
      DataNotFoundError: if the file does not exist.
      DataFormatError: if it is damaged or a label is neither 0, 1 nor missing.
    """
    for table in read_click_log(path, form, block_size=block_size):
        labels = {task: table[task].astype(np.float32) for task in form.tasks}
        for task, values in labels.items():
            if not np.isin(values[~np.isnan(values)], (0.0, 1.0)).all():
                raise DataFormatError(
                    f"{str(path)!r} must hold 0 or 1 in {task!r}, got "
                    f"{np.unique(values)[:5].tolist()}."
                )
        yield {
            "categorical": encoder.categorical(table),
            "numeric": encoder.numeric(table),
            "labels": labels,
            **({"user": table[form.user]} if form.user else {}),
        }


def _columns(path: Path, form: ClickLogFormat) -> tuple[list[str], str, bool]:
    with pa.input_stream(path, compression="detect") as stream:
        line = _first_line(stream)
    delimiter = "\t" if "\t" in line else ","
    names = line.split(delimiter)
    if set(form.tasks) <= set(names):
        return names, delimiter, True
    if form.header and len(form.header) == len(names):
        return list(form.header), delimiter, False
    raise DataFormatError(
        f"{str(path)!r} must have the columns {', '.join(form.tasks)} of {form.name} "
        f"in its first line, got {', '.join(names[:8])}..."
    )


def _first_line(stream: pa.NativeFile) -> str:
    text = b""
    while b"\n" not in text:
        part = stream.read(1 << 14)
        if not part:
            break
        text += part
    return text.partition(b"\n")[0].decode("utf-8").rstrip("\r")


def _type(name: str, form: ClickLogFormat) -> pa.DataType:
    if name in form.tasks or form.numeric(name):
        return pa.float32()
    return pa.int64() if form.categories == "int64" else pa.string()


def _numpy(column: pa.Array) -> Shaped[np.ndarray, " n"]:
    fill: Mapping[pa.DataType, Any] = {
        pa.float32(): np.nan,
        pa.int64(): -1,
        pa.string(): "",
    }
    values = pc.fill_null(column, pa.scalar(fill[column.type], column.type))
    array = values.to_numpy(zero_copy_only=False)
    return array.astype(str) if column.type == pa.string() else array
