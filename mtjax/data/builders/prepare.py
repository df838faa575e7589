"""Preparing: original files in, TFDS data in array_record format out, once."""

import contextlib
import difflib
import gzip
import io
import lzma
import tarfile
import types
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from mtjax.data.builders.audio import AUDIO
from mtjax.data.builders.census import CENSUS
from mtjax.data.builders.definitions import DEFINITIONS
from mtjax.data.builders.images import IMAGES
from mtjax.data.builders.language import LANGUAGE
from mtjax.data.builders.logs import LOGS
from mtjax.data.builders.mulan import MULAN
from mtjax.data.builders.pairs import PAIRS
from mtjax.data.builders.photos import PHOTOS
from mtjax.data.builders.scenes import SCENES
from mtjax.data.builders.spec import DataFormatError, DatasetSpec
from mtjax.data.builders.tabular import TABULAR
from mtjax.data.builders.tagging import TAGGING
from mtjax.data.builders.text import TEXT
from mtjax.data.builders.tweets import TWEETS
from mtjax.data.sources import DataNotFoundError

SPECS: Mapping[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        *IMAGES,
        *TABULAR,
        *CENSUS,
        *MULAN,
        *TEXT,
        *TWEETS,
        *PAIRS,
        *LANGUAGE,
        *TAGGING,
        *DEFINITIONS,
        *PHOTOS,
        *AUDIO,
        *LOGS,
        *SCENES,
    )
}
# What the readers of damaged files raise; everything else is a defect of ours.
_DAMAGED = (
    EOFError,
    IndexError,
    KeyError,
    ValueError,
    OSError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class DatasetSummary:
    """One line of the table that :func:`available` returns.

    Attributes:
      name: what :func:`prepare` and :func:`mtjax.data.tfds_source` take.
      tasks: names of the features that can be predicted.
      splits: numbers of examples per split of the complete set.
      licence: as stated by the source.
      homepage: where the original files come from.
    """

    name: str
    tasks: tuple[str, ...]
    splits: Mapping[str, int]
    licence: str
    homepage: str


def available() -> list[DatasetSummary]:
    """Lists the data sets that :func:`prepare` can make.

    Returns:
      One summary per name, sorted by name.

    Example:
      >>> [row.splits for row in available() if row.name == "energy_efficiency"]
      [{'train': 768}]
    """
    return [
        DatasetSummary(
            name=spec.name,
            tasks=spec.tasks,
            splits={split: max(spec.accepted(split)) for split in spec.splits},
            licence=spec.licence,
            homepage=spec.homepage,
        )
        for _, spec in sorted(SPECS.items())
    ]


def prepare(
    name: str,
    source_folder: str | Path,
    data_dir: str | Path,
    *,
    progress: bool = True,
) -> Path:
    """Turns the original files of a data set into array_record, without TensorFlow.

    The examples are counted against the published numbers, and the result appears
    under its final name only when it is complete: a run that fails or is interrupted
    leaves nothing that could be mistaken for data. What is there already is kept.

    Args:
      name: one of :func:`available`, or the part before the slash for all of its
        configurations.
      source_folder: the folder of the original files, compressed as they came.
      data_dir: where to write, in TFDS layout (``data_dir/name/config/version``).
      progress: whether to show a progress bar.

    Returns:
      The folder of the prepared data (for a whole family, its common folder).

    Raises:
      ValueError: if `name` is unknown.
      DataNotFoundError: if the folder or a file in it is missing.
      DataFormatError: if a file is damaged or does not hold the published number of
        examples.

    Example:
      >>> prepare("energy", "nowhere", "data")
      Traceback (most recent call last):
      ...
      ValueError: `name` must be a data set ... Did you mean 'energy_efficiency'?...
    """
    source_folder = Path(source_folder).expanduser()
    data_dir = Path(data_dir).expanduser()
    specs = _select(name)
    if not source_folder.is_dir():
        raise DataNotFoundError(
            f"`source_folder` must be an existing folder, got {str(source_folder)!r}. "
            f"Give the folder of the original files of `{name}`."
        )
    with _progress_bar(progress) as advance:
        paths = [_prepare_one(spec, source_folder, data_dir, advance) for spec in specs]
    return paths[0] if len(paths) == 1 else data_dir / specs[0].family


class OriginalFilesBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes whatever a :class:`DatasetSpec` describes; subclassed once per set.

    Not registered with TFDS, where some of the names belong to builders that need
    TensorFlow or the internet.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Use mtjax.data.prepare."
    # TFDS would look for checksums of downloads next to the code, for which it needs
    # a package that it does not depend on; nothing is downloaded here.
    code_path: ClassVar = None
    spec: ClassVar[DatasetSpec]
    source_folder: ClassVar[Path]
    advance: ClassVar[Callable[[str, int], None]]

    def _info(self) -> tfds.core.DatasetInfo:
        # The order of the file is kept: the rows of one subject stay together, and
        # positions in the original stay meaningful. Readers shuffle anyway.
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.spec.description,
            features=tfds.features.FeaturesDict(dict(self.spec.features())),
            homepage=self.spec.homepage,
            citation=self.spec.citation,
            license=self.spec.licence,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(tasks=list(self.spec.tasks)),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        original = self.spec.read(self.source_folder)
        missing = set(self.spec.splits) - set(original.splits) - self.spec.optional
        if missing:
            raise DataFormatError(
                f"`{self.spec.name}` must have the splits {sorted(self.spec.splits)}, "
                f"{sorted(missing)} not found in {str(self.source_folder)!r}."
            )
        self.info.metadata.update(original.metadata)
        for feature, names in original.label_names.items():
            self.info.features[feature].names = names
        return {
            split: self._generate_examples(split, rows)
            for split, rows in original.splits.items()
        }

    def _generate_examples(
        self, split: str, rows: Iterable[Mapping[str, Any]]
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        accepted = self.spec.accepted(split)
        count = 0
        for row in rows:
            yield count, row
            count += 1
            type(self).advance(split, max(accepted))
        if count not in accepted:
            raise DataFormatError(
                f"`{self.spec.name}` split {split!r} must have "
                f"{' or '.join(map(str, accepted))} examples, got {count} in "
                f"{str(self.source_folder)!r}. The original file is cut short or "
                "altered; get it again."
            )


def _prepare_one(
    spec: DatasetSpec,
    source_folder: Path,
    data_dir: Path,
    advance: Callable[[str, str, int], None],
) -> Path:
    configs = [
        tfds.core.BuilderConfig(name=other.config, description=other.description)
        for other in SPECS.values()
        if other.family == spec.family and other.config
    ]
    members = {
        "name": spec.family,
        "BUILDER_CONFIGS": configs,
        "spec": spec,
        "source_folder": source_folder,
        "advance": staticmethod(lambda split, total: advance(spec.name, split, total)),
        "__module__": __name__,
    }
    builder_class = types.new_class(
        "".join(part.capitalize() for part in spec.family.split("_")),
        (OriginalFilesBuilder,),
        {"skip_registration": True},
        lambda namespace: namespace.update(members),
    )
    builder = builder_class(data_dir=data_dir, config=spec.config or None)
    try:
        with _quiet_tfds():
            builder.download_and_prepare(file_format="array_record")
    except (DataFormatError, DataNotFoundError):
        raise
    except _DAMAGED as error:
        raise DataFormatError(
            f"`{spec.name}` cannot be read from {str(source_folder)!r}: {error}. The "
            "original file is damaged or belongs to another set; get it again."
        ) from error
    return Path(builder.data_dir)


def _select(name: str) -> list[DatasetSpec]:
    specs = [spec for spec in SPECS.values() if name in (spec.name, spec.family)]
    if specs:
        return specs
    names = sorted({*SPECS, *(spec.family for spec in SPECS.values())})
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    families = sorted({spec.family for spec in SPECS.values()})
    raise ValueError(
        f"`name` must be a data set that can be prepared, got {name!r}.{hint} Known: "
        f"{', '.join(families)}."
    )


@contextlib.contextmanager
def _progress_bar(show: bool) -> Generator[Callable[[str, str, int], None], None, None]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bars: dict[tuple[str, str], Any] = {}
    with Progress(*columns, disable=not show) as bar:

        def advance(name: str, split: str, total: int) -> None:
            if (name, split) not in bars:
                bars[name, split] = bar.add_task(f"{name} {split}", total=total)
            bar.update(bars[name, split], advance=1)

        yield advance


@contextlib.contextmanager
def _quiet_tfds() -> Generator[None, None, None]:
    # TFDS announces a download that does not happen and draws bars of its own.
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
