"""Random-access sources: prepared TFDS data, folders of it, arrays in memory.

Everything here has ``__len__`` and ``__getitem__`` (a dict of NumPy values), so that
it goes straight into ``grain.MapDataset.source`` and :func:`mtjax.data.mixture`.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Shaped


class DataNotFoundError(FileNotFoundError):
    """A data set, or an original file of one, is not where it was looked for.

    The message says which command makes it.
    """


@runtime_checkable
class Source(Protocol):
    """What this package calls a source: examples by index, as dicts of arrays."""

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Returns the example at ``index``."""
        ...


class ArraySource:
    """Examples read from equally long arrays; see :func:`array_source`."""

    def __init__(self, arrays: Mapping[str, Shaped[np.ndarray, "..."]]):
        """Keeps references to ``arrays``, without copying them."""
        self.arrays = dict(arrays)

    def __len__(self) -> int:
        """Returns the common length of the arrays."""
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns row ``index`` of every array."""
        return {name: array[index] for name, array in self.arrays.items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the rows at ``indices``, one dict each."""
        return [self[index] for index in indices]

    def __repr__(self) -> str:
        """Returns the length and the names, which grain prints in its logs."""
        return f"ArraySource({len(self)} examples of {', '.join(self.arrays)})"


class TfdsSource:
    """Examples read from prepared TFDS data; see :func:`tfds_source`.

    Attributes:
      info: what TFDS stores with the data: ``features``, ``splits``, ``metadata``
        and the licence.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        """Opens the files of `split`."""
        self.info = builder.info
        self._source = builder.as_data_source(split=split)
        # TFDS hands out scalars as Python numbers, which batches would widen.
        self._scalars = {
            name: feature.np_dtype
            for name, feature in builder.info.features.items()
            if feature.shape == () and np.dtype(feature.np_dtype).kind in "biuf"
        }

    def __len__(self) -> int:
        """Returns the number of examples of the split."""
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the example at `index`, counted from the end if negative."""
        # Loops over a source end with an IndexError; TFDS raises a ValueError.
        return self._typed(self._source[range(len(self))[index]])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the examples at `indices`, which is faster than one by one."""
        return [self._typed(row) for row in self._source.__getitems__(indices)]

    def __repr__(self) -> str:
        """Returns the name and the length, which grain prints in its logs."""
        return f"TfdsSource({len(self)} examples of {self.info.full_name})"

    def _typed(self, row: dict[str, Any]) -> dict[str, Any]:
        for name, dtype in self._scalars.items():
            row[name] = np.asarray(row[name], dtype=dtype)
        return row


def array_source(arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> ArraySource:
    """Makes a source from arrays in memory.

    Args:
      arrays: arrays of shape ``(n, ...)``, all with the same ``n`` of at least one.

    Returns:
      A source whose example ``i`` is ``{name: array[i]}``.

    Raises:
      ValueError: if `arrays` is empty, holds a scalar or holds unequal lengths.

    Example:
      >>> source = array_source({"x": np.zeros((3, 2)), "y": np.arange(3)})
      >>> len(source), source[1]["y"].item()
      (3, 1)
    """
    if not arrays:
        raise ValueError("`arrays` must hold at least one array, got none.")
    scalars = [name for name, array in arrays.items() if array.ndim == 0]
    if scalars:
        raise ValueError(
            f"`arrays` must have a leading example axis, got scalars for {scalars}."
        )
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(
            "`arrays` must be equally long and not empty, got lengths "
            f"{lengths}. Cut them to the examples that all of them have."
        )
    return ArraySource(arrays)


def default_data_dir() -> Path:
    """Returns the folder of prepared data that is used when none is given.

    The same as in TFDS: the environment variable ``TFDS_DATA_DIR``, or
    ``tensorflow_datasets`` in the home folder.
    """
    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(folder).expanduser()


def tfds_source(
    name: str, split: str, *, data_dir: str | Path | None = None
) -> TfdsSource:
    """Opens a split of a data set that was prepared by name.

    Reading needs no TensorFlow, whoever prepared the data; neither does
    :func:`mtjax.data.prepare`. Two traps of TFDS are turned into errors here: its
    default file format (tfrecord) cannot be read without TensorFlow, so array_record
    has to be asked for; and data that were never prepared are not downloaded on
    the side.

    Args:
      name: ``"name"`` or ``"name/config"``, optionally followed by ``":version"``;
        without a version the highest one on disk is read.
      split: the split, such as ``"train"`` or the slice ``"train[:10%]"``.
      data_dir: the folder of prepared data; :func:`default_data_dir` if None.

    Returns:
      A source of the examples as dicts of NumPy values (texts are ``bytes``).

    Raises:
      DataNotFoundError: if the data are not there; the message says how to get them.
      ValueError: if the format needs TensorFlow or the split does not exist.

    Example:
      >>> tfds_source("energy_efficiency", "train", data_dir="nowhere")
      Traceback (most recent call last):
      ...
      mtjax.data.sources.DataNotFoundError: `energy_efficiency` is not prepared...
    """
    folder = Path(data_dir).expanduser() if data_dir else default_data_dir()
    path, _, version = name.partition(":")
    root = folder / path
    if version:
        found = [root / version] if _is_prepared(root / version) else []
    else:
        found = [child for child in _versions(root) if _is_prepared(child)]
    if not found:
        raise DataNotFoundError(_how_to_get(name, root, folder))
    newest = max(found, key=lambda child: tfds.core.Version(child.name))
    return folder_source(newest, split)


def folder_source(path: str | Path, split: str) -> TfdsSource:
    """Opens a split of the prepared TFDS data in one folder.

    Args:
      path: the folder that holds ``dataset_info.json`` and ``features.json``
        (``DIR/name/config/version``); it may have been copied from elsewhere.
      split: the split, such as ``"train"`` or the slice ``"train[:10%]"``.

    Returns:
      A source of the examples as dicts of NumPy values (texts are ``bytes``).

    Raises:
      DataNotFoundError: if the folder holds no prepared data.
      ValueError: if the format needs TensorFlow or the split does not exist.

    Example:
      >>> folder_source("nowhere", "train")
      Traceback (most recent call last):
      ...
      mtjax.data.sources.DataNotFoundError: `path` must hold dataset_info.json...
    """
    path = Path(path).expanduser()
    if not _is_prepared(path):
        raise DataNotFoundError(
            "`path` must hold dataset_info.json and features.json of prepared TFDS "
            f"data, got {str(path)!r}. Give the innermost folder, the one named like "
            "a version (1.0.0)."
        )
    written = json.loads((path / "dataset_info.json").read_text()).get("fileFormat")
    if written != "array_record":
        raise ValueError(
            f"`path` must hold array_record files, got {written or 'tfrecord'} in "
            f"{str(path)!r}, which only TensorFlow can read. Prepare it again with "
            "`tfds build NAME --file_format=array_record` on a machine that has "
            "TensorFlow."
        )
    builder = tfds.builder_from_directory(path)
    plain = split.partition("[")[0]
    if plain not in builder.info.splits and plain != "all" and "+" not in split:
        raise ValueError(
            f"`split` must be one of {sorted(builder.info.splits)} or a slice of one, "
            f"got {split!r}."
        )
    return TfdsSource(builder, split)


def as_arrays(source: Source) -> dict[str, np.ndarray]:
    """Reads a whole source into memory.

    Args:
      source: any source with at least one example, all examples of equal shapes.

    Returns:
      ``{name: array}`` with the examples stacked on the first axis.

    Example:
      >>> source = array_source({"x": np.eye(3)})
      >>> as_arrays(source)["x"].shape
      (3, 3)
    """
    if isinstance(source, ArraySource):
        return dict(source.arrays)
    indices = range(len(source))
    get_many = getattr(source, "__getitems__", None)
    rows = get_many(list(indices)) if get_many else [source[i] for i in indices]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _is_prepared(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() and (path / "features.json").is_file()


def _versions(root: Path) -> list[Path]:
    # TFDS names a folder that it has not finished "incomplete.<letters>_1.0.0".
    return [
        child for child in root.glob("*") if re.fullmatch(r"\d+\.\d+\.\d+", child.name)
    ]


def _how_to_get(name: str, root: Path, data_dir: Path) -> str:
    message = f"`{name}` is not prepared in {str(data_dir)!r}."
    configs = sorted(child.name for child in root.glob("*") if _versions(child))
    if configs:
        return f"{message} Add the configuration: one of {configs} is there."
    plain = name.partition(":")[0]
    return (
        f"{message} Either turn its original files into TFDS data with `mtjax data "
        f"prepare {plain} --from FOLDER --data-dir {data_dir}` (`mtjax data list` "
        "shows which sets that works for), or run `tfds build "
        f"{plain} --file_format=array_record --data_dir {data_dir}` on a machine with "
        "internet and TensorFlow and copy the folder."
    )
