"""What describes a data set to the one builder class that prepares all of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from mtjax.data.sources import DataNotFoundError

Feature = tfds.features.FeatureConnector


class DataFormatError(ValueError):
    """An original file is not what it should be: cut short, altered or another set."""


@dataclass(frozen=True)
class Original:
    """What a reader finds in the original files.

    Attributes:
      splits: lazily read examples of each split that the folder has.
      metadata: facts for the reader of prepared data, such as column names; has to
        be JSON, is stored next to the data and read back as ``info.metadata``.
      label_names: names of the classes of features that only the files can tell.
    """

    splits: Mapping[str, Iterable[Mapping[str, Any]]]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    label_names: Mapping[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetSpec:
    """A data set that can be prepared from its original files.

    Attributes:
      name: ``"name"`` or ``"name/config"``, as TFDS writes it.
      description: what an example is and where the splits come from.
      licence: as stated by the source; where that is second-hand, the text says so.
      homepage: the official page, or where the files came from.
      citation: title and year of the publication.
      tasks: names of the features that can be predicted.
      splits: the numbers of examples that are accepted, per split.
      optional: splits that may be missing from the folder.
      features: makes the TFDS features; only kinds that need no TensorFlow to write.
      read: maps a folder of original files to the examples.
    """

    name: str
    description: str
    licence: str
    homepage: str
    citation: str
    tasks: tuple[str, ...]
    splits: Mapping[str, int | tuple[int, ...]]
    features: Callable[[], Mapping[str, Feature]]
    read: Callable[[Path], Original]
    optional: frozenset[str] = frozenset()

    @property
    def family(self) -> str:
        """The part of the name before the slash: the TFDS data set."""
        return self.name.partition("/")[0]

    @property
    def config(self) -> str:
        """The part of the name after the slash, or an empty string."""
        return self.name.partition("/")[2]

    def accepted(self, split: str) -> tuple[int, ...]:
        """Returns the numbers of examples that `split` may have."""
        rows = self.splits[split]
        return (rows,) if isinstance(rows, int) else tuple(rows)


def require(folder: Path, *names: str) -> Path:
    """Finds an original file.

    Args:
      folder: where the original files are.
      *names: acceptable file names, best first.

    Returns:
      The path of the first that exists.

    Raises:
      DataNotFoundError: if there is none; the message names file and folder.

    Example:
      >>> require(Path("nowhere"), "adult.data")
      Traceback (most recent call last):
      ...
      mtjax.data.sources.DataNotFoundError: `source_folder` must hold adult.data...
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = sorted(child.name for child in folder.glob("*"))[:8]
    raise DataNotFoundError(
        f"`source_folder` must hold {' or '.join(names)}, got {str(folder)!r} with "
        f"{', '.join(found) if found else 'no files'}. Give the folder of the original "
        "files of this data set."
    )
