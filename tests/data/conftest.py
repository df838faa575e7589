"""Original files beside the repository, and a few sets prepared from them once."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from mtjax.data import prepare
from mtjax.data.builders.prepare import SPECS

FOLDERS = {"banking77": "polyai_banking77_nlupp"}


@pytest.fixture(scope="session")
def originals():
    """Finds the folder of the original files of a data set."""
    root = Path(__file__).parents[3] / "shared" / "data"
    if not root.is_dir():
        pytest.skip(f"the original files are not in {root.name}/ beside the repository")

    def folder(name: str) -> Path:
        family = name.partition("/")[0]
        return root / FOLDERS.get(family, family)

    return folder


@pytest.fixture(scope="session")
def prepared(originals, tmp_path_factory):
    """A data folder with the sets that more than one test reads."""
    data_dir = tmp_path_factory.mktemp("prepared")
    for name in (
        "adult",
        "energy_efficiency",
        "fashion_mnist/five_classes",
        "parkinsons_telemonitoring",
        "mulan_mtr/sf1",
        "mulan_mtr/osales",
    ):
        prepare(name, originals(name), data_dir, progress=False)
    return data_dir


class _Rows(list):
    info: SimpleNamespace


@pytest.fixture(scope="session")
def first_rows(originals):
    """Reads the first rows of an original file, to stand for prepared data."""

    def read(name: str, split: str, number: int) -> _Rows:
        original = SPECS[name].read(originals(name))
        rows = _Rows(itertools.islice(original.splits[split], number))
        rows.info = SimpleNamespace(metadata=original.metadata)
        return rows

    return read
