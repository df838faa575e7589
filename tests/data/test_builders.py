import gzip
import re
import shutil

import numpy as np
import pytest

from mtjax.data import (
    DataFormatError,
    DataNotFoundError,
    available,
    prepare,
    tfds_source,
)
from tests.data.published import check_rows

# Published numbers of examples, from the table of the collected data.
ROWS = {
    "fashion_mnist/five_classes": {"test": 5_000},
    "kmnist": {"test": 10_000},
    "usps": {"train": 7_291, "test": 2_007},
    "pneumoniamnist": {"train": 3_882, "validation": 524, "test": 624},
    "school": {"train": 15_362},
    "wine_quality/red": {"train": 1_599},
    "wine_quality/white": {"train": 4_898},
    "mulan_mtr/enb": {"train": 768},
    "mulan_mtr/wq": {"train": 1_060},
    "clinc150": {
        "train": 15_000,
        "validation": 3_000,
        "test": 4_500,
        "oos_train": 100,
        "oos_validation": 100,
        "oos_test": 1_000,
    },
    "banking77": {"train": 10_003, "test": 3_080},
    "sick": {"train": 4_500, "validation": 500, "test": 4_927},
    "fdu_mtl/mr": {"train": 1_600, "test": 400},
    "fdu_mtl/dvd": {"train": 1_600, "test": 400},
    "sentence_classification/cr": {"train": 3_775},
    "sentence_classification/trec": {"train": 5_452, "test": 500},
    "tweeteval/irony": {"train": 2_862, "validation": 955, "test": 784},
    "tweeteval/sentiment": {"validation": 2_000, "test": 12_284},
}
LARGE = {
    "mnist": {"train": 60_000, "test": 10_000},
    "kannada_mnist": {"test": 10_000, "dig": 10_240},
    "goemotions": {"train": 43_410, "validation": 5_426, "test": 5_427},
    "census_income_kdd/original": {"test": 99_762},
    "census_income_kdd/nominal": {"train": 299_285},
    "tweeteval/emoji": {"train": 45_000, "validation": 5_000, "test": 50_000},
}


def _prepare_and_check(name, rows, originals, data_dir):
    path = prepare(name, originals(name), data_dir, progress=False)
    assert path.is_dir()
    check_rows(name, rows, data_dir)


@pytest.mark.parametrize("name", ROWS)
def test_published_numbers_of_examples(name, originals, tmp_path):
    _prepare_and_check(name, ROWS[name], originals, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_published_numbers_of_examples_of_large_sets(name, originals, tmp_path):
    _prepare_and_check(name, LARGE[name], originals, tmp_path)


def test_labels_match_the_original(originals, tmp_path):
    prepare("usps", originals("usps"), tmp_path, progress=False)
    source = tfds_source("usps", "test", data_dir=tmp_path)
    labels = [int(row["label"]) for row in source.__getitems__(range(len(source)))]
    with np.load(originals("usps") / "usps.npz") as original:
        np.testing.assert_array_equal(labels, original["test_labels"])
        image = source[3]["image"][..., 0].astype(float)
        error = np.abs(image / 255 - original["test_images"][3] / 2000)
    assert error.max() <= 0.5 / 255 + 1e-9


def test_a_family_prepares_all_configurations(originals, tmp_path):
    path = prepare("wine_quality", originals("wine_quality"), tmp_path, progress=False)
    assert path == tmp_path / "wine_quality"
    assert (path / "red" / "1.0.0").is_dir()
    assert (path / "white" / "1.0.0").is_dir()


def test_what_is_there_is_kept(prepared, originals):
    path = prepared / "energy_efficiency" / "1.0.0"
    before = (path / "dataset_info.json").stat().st_mtime_ns
    name = "energy_efficiency"
    assert prepare(name, originals(name), prepared, progress=False) == path
    assert (path / "dataset_info.json").stat().st_mtime_ns == before


def test_the_progress_bar_goes_to_the_number_of_examples(originals, tmp_path, capsys):
    name = "energy_efficiency"
    prepare(name, originals(name), tmp_path)
    printed = capsys.readouterr().out
    assert "energy_efficiency train" in printed
    assert "768/768" in printed
    assert "Downloading" not in printed


def test_available_lists_every_set_with_tasks_splits_and_licence():
    table = available()
    assert len(table) >= 60
    assert [row.name for row in table] == sorted(row.name for row in table)
    assert all(row.tasks and row.splits and row.licence for row in table)


def test_unknown_name_gets_a_suggestion(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'goemotions'"):
        prepare("go_emotion", tmp_path, tmp_path)


def test_missing_folder_and_missing_file_are_named(tmp_path):
    with pytest.raises(DataNotFoundError, match="nowhere"):
        prepare("adult", tmp_path / "nowhere", tmp_path)
    folder = tmp_path / "wrong"
    folder.mkdir()
    (folder / "wrong.txt").touch()
    with pytest.raises(DataNotFoundError, match=r"adult\.names.*with wrong\.txt"):
        prepare("adult", folder, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").rglob("*.json"))


def _leftovers(data_dir):
    return [path for path in data_dir.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("name", "file", "damage"),
    [
        ("parkinsons_telemonitoring", "parkinsons_updrs.data", lambda b: b[:500_000]),
        ("parkinsons_telemonitoring", "parkinsons_updrs.data", lambda b: b + b"1,2\n"),
        ("energy_efficiency", "ENB2012_data.xlsx", lambda b: b[:40_000]),
        (
            "wine_quality/red",
            "winequality-red.csv",
            lambda b: b.replace(b"7.4", b"x", 1),
        ),
        ("usps", "usps.npz", lambda b: b[: len(b) // 2]),
        (
            "fashion_mnist/five_classes",
            "fashion_test_5class.npy",
            lambda b: b[:1_000_000],
        ),
        ("school", "school.mat", lambda b: b[:20_000]),
        ("sick", "SICK_trial.txt", lambda b: b[:30_000]),
        ("goemotions", "goemotions.tar.xz", lambda b: b[:100_000]),
        ("notmnist", "t10k-images-idx3-ubyte.gz", lambda b: b[:100_000]),
        ("notmnist", "t10k-labels-idx1-ubyte.gz", lambda b: gzip.compress(b[:99])),
    ],
)
def test_damaged_files_leave_nothing_behind(name, file, damage, originals, tmp_path):
    folder = tmp_path / "originals"
    shutil.copytree(originals(name), folder, copy_function=shutil.copyfile)
    (folder / file).chmod(0o644)
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(DataFormatError, match=re.escape(str(folder))):
        prepare(name, folder, tmp_path / "out", progress=False)
    with pytest.raises(DataNotFoundError):
        tfds_source(name, "train", data_dir=tmp_path / "out")
    assert [p for p in _leftovers(tmp_path / "out") if ".config" not in p.parts] == []


def test_an_interruption_leaves_nothing_behind(originals, tmp_path, monkeypatch):
    from mtjax.data.builders.prepare import OriginalFilesBuilder

    generate = OriginalFilesBuilder._generate_examples

    def interrupted(self, split, rows):
        for count, example in enumerate(generate(self, split, rows)):
            if count == 100:
                raise KeyboardInterrupt
            yield example

    monkeypatch.setattr(OriginalFilesBuilder, "_generate_examples", interrupted)
    name = "energy_efficiency"
    with pytest.raises(KeyboardInterrupt):
        prepare(name, originals(name), tmp_path, progress=False)
    assert _leftovers(tmp_path) == []
    monkeypatch.undo()
    prepare(name, originals(name), tmp_path, progress=False)
    assert len(tfds_source(name, "train", data_dir=tmp_path)) == 768
