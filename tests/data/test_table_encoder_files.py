"""Table encoders survive a file."""

import numpy as np
import pytest

from mtjax.data.table_encoder import fit_table_encoder
from mtjax.data.table_encoder_files import load_table_encoder, save_table_encoder

TABLE = {
    "text": np.array(["ü", 'a "b"', "c", "c"]),
    "bytes": np.array([b"\xff", b"a", b"", b"a"]),
    "whole": np.array([2**53 + 1, 7, 7, -1]),
    "real": np.array([0.1, 1 / 3, np.nan, 0.1]),
    "flag": np.array([True, False, True, True]),
    "rare": np.array(["x", "y", "z", "w"]),
    "price": np.array([0.1, 1e9, 2.0, np.nan]),
}


@pytest.mark.parametrize("min_count", [1, 2])
def test_the_same_ids_and_numbers_from_a_file(tmp_path, min_count):
    fields = [name for name in TABLE if name not in ("price", "bytes")]
    encoder = fit_table_encoder(
        [TABLE],
        fields=fields,
        numbers=["price"],
        log1p=["price"],
        min_count=min_count,
    )
    save_table_encoder(encoder, tmp_path / "encoder.json")
    again = load_table_encoder(tmp_path / "encoder.json")
    np.testing.assert_array_equal(again.categorical(TABLE), encoder.categorical(TABLE))
    np.testing.assert_array_equal(again.numeric(TABLE), encoder.numeric(TABLE))
    assert again.vocabulary_sizes == encoder.vocabulary_sizes
    assert again.log1p == encoder.log1p
    for name in fields:
        assert again.values[name].dtype == encoder.values[name].dtype


def test_bytes_survive(tmp_path):
    encoder = fit_table_encoder([TABLE], fields=["whole"])
    object.__setattr__(encoder, "values", {"whole": np.array([b"\xff\n", b"a"])})
    save_table_encoder(encoder, tmp_path / "encoder.json")
    found = load_table_encoder(tmp_path / "encoder.json").values["whole"]
    assert found.tolist() == [b"\xff\n", b"a"]


@pytest.mark.parametrize("text", ["not json", "[]", '{"format": "other"}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"`path` must be a file from .*x\.json"):
        load_table_encoder(tmp_path / "x.json")


def test_objects_are_refused(tmp_path):
    encoder = fit_table_encoder([TABLE], fields=["whole"])
    object.__setattr__(encoder, "values", {"whole": np.array([1, "a"], object)})
    with pytest.raises(ValueError, match="numbers or flags in 'whole', got object"):
        save_table_encoder(encoder, tmp_path / "x.json")
