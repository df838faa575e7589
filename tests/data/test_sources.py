import subprocess
import sys

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from mtjax.data import (
    DataNotFoundError,
    array_source,
    as_arrays,
    folder_source,
    tfds_source,
)


def test_array_source_feeds_grain():
    source = array_source({"x": np.arange(6).reshape(3, 2), "y": np.arange(3)})
    batch = grain.MapDataset.source(source).batch(2)[0]
    np.testing.assert_array_equal(batch["x"], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(as_arrays(source)["y"], [0, 1, 2])


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"x": np.zeros(2), "y": np.zeros(3)},
        {"x": np.zeros(0)},
        {"x": np.array(1.0)},
    ],
)
def test_array_source_rejects_arrays_without_a_common_length(arrays):
    with pytest.raises(ValueError, match="`arrays` must"):
        array_source(arrays)


def test_prepared_examples_are_typed_arrays_in_file_order(prepared):
    source = tfds_source("adult", "train", data_dir=prepared)
    columns = source.info.metadata["categorical"]
    row = source[0]
    assert row["income"].dtype == np.int64
    # The first line of the original: 39, State-gov, 77516, Bachelors, 13, ...
    np.testing.assert_array_equal(row["numeric"], [39, 77516, 13, 2174, 0, 40])
    values = [
        listed[code] for listed, code in zip(columns.values(), row["categorical"])
    ]
    assert values[:3] == ["State-gov", "Bachelors", "Never-married"]
    batch = grain.MapDataset.source(source).shuffle(seed=0).batch(4)[0]
    assert batch["numeric"].shape == (4, 6)
    assert batch["income"].dtype == np.int64


def test_a_loop_over_a_source_ends(prepared):
    for source in (
        tfds_source("energy_efficiency", "train[:7]", data_dir=prepared),
        array_source({"x": np.arange(7)}),
    ):
        rows = list(source)
        assert len(rows) == 7
        for name, column in as_arrays(source).items():
            np.testing.assert_array_equal([row[name] for row in rows], column)
            np.testing.assert_array_equal(source[-7][name], column[0])
        for index in (7, -8):
            with pytest.raises(IndexError):
                source[index]


def test_folder_and_slices(prepared):
    path = prepared / "energy_efficiency" / "1.0.0"
    assert len(folder_source(path, "train[:10%]")) == 77
    assert len(folder_source(path, "train[700:]")) == 68
    assert (
        len(tfds_source("energy_efficiency:1.0.0", "train", data_dir=prepared)) == 768
    )


def test_reading_does_not_import_tensorflow(prepared):
    code = (
        "import sys; from mtjax.data import tfds_source;"
        f"source = tfds_source('adult', 'train', data_dir={str(prepared)!r});"
        "source[0]; assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code])
    assert done.returncode == 0


def test_missing_data_say_how_to_get_them(tmp_path):
    expected = f"mtjax data prepare adult --from FOLDER --data-dir {tmp_path}"
    with pytest.raises(DataNotFoundError, match=expected):
        tfds_source("adult", "train", data_dir=tmp_path)
    with pytest.raises(DataNotFoundError, match="file_format=array_record"):
        tfds_source("adult", "train", data_dir=tmp_path)


def test_missing_configuration_is_named(prepared):
    with pytest.raises(DataNotFoundError, match=r"one of \['osales', 'sf1'\]"):
        tfds_source("mulan_mtr", "train", data_dir=prepared)


def test_unknown_split_and_version(prepared):
    with pytest.raises(ValueError, match=r"`split` must be one of \['test', 'train'\]"):
        tfds_source("adult", "validation", data_dir=prepared)
    with pytest.raises(DataNotFoundError):
        tfds_source("adult:9.0.0", "train", data_dir=prepared)


def test_an_unfinished_folder_is_not_data(prepared, tmp_path):
    root = tmp_path / "energy_efficiency"
    root.mkdir()
    finished = prepared / "energy_efficiency" / "1.0.0"
    (root / "incomplete.ABC_1.0.0").symlink_to(finished)
    with pytest.raises(DataNotFoundError):
        tfds_source("energy_efficiency", "train", data_dir=tmp_path)


def test_tfrecord_is_refused_with_the_remedy(prepared, tmp_path):
    path = tmp_path / "1.0.0"
    path.mkdir()
    for file in (prepared / "energy_efficiency" / "1.0.0").glob("*.json"):
        text = file.read_text().replace("array_record", "tfrecord")
        (path / file.name).write_text(text)
    with pytest.raises(ValueError, match="only TensorFlow can read"):
        folder_source(path, "train")


def test_our_builders_do_not_shadow_those_of_tfds():
    assert "mnist" not in tfds.core.registered._DATASET_REGISTRY
