import gzip

import numpy as np
import pytest

from mtjax.data import (
    ALI_CCP,
    ALIEXPRESS,
    CRITEO,
    DataFormatError,
    DataNotFoundError,
    encode_click_log,
    fit_click_log,
    read_click_log,
)

FILES = {
    "aliexpress": (ALIEXPRESS, "aliexpress/aliexpress_train_sample.csv", (100, 17, 63)),
    "ali_ccp": (ALI_CCP, "ali-ccp/ali_ccp_train_sample.csv", (100, 23, 8)),
    "criteo": (CRITEO, "criteo/criteo_sample.csv", (115, 26, 13)),
}


@pytest.fixture
def sample(originals):
    return lambda name: originals("recsys_samples") / FILES[name][1]


def stacked(path, form, encoder, **options):
    blocks = list(encode_click_log(path, form, encoder, **options))
    keys = ("categorical", "numeric")
    whole = {key: np.concatenate([block[key] for block in blocks]) for key in keys}
    whole |= {
        task: np.concatenate([block["labels"][task] for block in blocks])
        for task in form.tasks
    }
    return whole, len(blocks)


@pytest.mark.parametrize("name", FILES)
def test_blocks_give_what_the_whole_file_gives(name, sample):
    form, _, (rows, fields, numbers) = FILES[name]
    path = sample(name)
    whole, one = stacked(path, form, fit_click_log(path, form))
    small = {"block_size": 1 << 14}
    parts, many = stacked(path, form, fit_click_log(path, form, **small), **small)
    assert one == 1
    assert many > 1 or name == "ali_ccp"
    assert whole["categorical"].shape == (rows, fields)
    assert whole["numeric"].shape == (rows, numbers)
    np.testing.assert_array_equal(parts["categorical"], whole["categorical"])
    np.testing.assert_allclose(parts["numeric"], whole["numeric"], atol=1e-5)
    assert not (whole["categorical"] == 1).any()
    assert np.isfinite(whole["numeric"]).all()
    for task in form.tasks:
        assert 0.0 < whole[task].mean() < 1.0


def test_users_and_labels_are_those_of_the_file(sample):
    path = sample("ali_ccp")
    block = next(encode_click_log(path, ALI_CCP, fit_click_log(path, ALI_CCP)))
    assert block["labels"]["click"].sum() == 7
    assert block["labels"]["purchase"].sum() == 1
    lines = path.read_text().splitlines()
    position = lines[0].split(",").index("101")
    assert block["user"].tolist() == [
        int(line.split(",")[position]) for line in lines[1:]
    ]


def test_criteo_reads_the_original_form_without_names(sample, tmp_path):
    lines = sample("criteo").read_text().splitlines()
    path = tmp_path / "train.txt.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(line.replace(",", "\t") + "\n" for line in lines[1:])
    named, plain = (
        next(read_click_log(file, CRITEO)) for file in (sample("criteo"), path)
    )
    assert list(named) == list(plain)
    for column, values in named.items():
        np.testing.assert_array_equal(plain[column], values)
    missing = named["I12"]
    assert np.isnan(missing).any()
    encoder = fit_click_log(path, CRITEO, min_count=10)
    ids = next(encode_click_log(path, CRITEO, encoder))["categorical"]
    assert (ids == 0).any()
    assert (ids == 1).any()


def test_other_files_are_explained(sample, tmp_path):
    with pytest.raises(DataNotFoundError, match="`path` must be a file of criteo"):
        fit_click_log(tmp_path / "train.txt", CRITEO)
    with pytest.raises(DataNotFoundError, match="`path` must be a file of criteo"):
        next(read_click_log(tmp_path / "train.txt", CRITEO))
    with pytest.raises(DataFormatError, match="must have the columns click, purchase"):
        fit_click_log(sample("criteo"), ALI_CCP)
    path = tmp_path / "broken.csv"
    path.write_text("click,purchase,101,D1\n0,0,one,0.5\n")
    with pytest.raises(DataFormatError, match="is not a log of ali_ccp"):
        fit_click_log(path, ALI_CCP)
    path.write_text("click,purchase,101,D1\n0,2,1,0.5\n")
    encoder = fit_click_log(path, ALI_CCP)
    with pytest.raises(DataFormatError, match="must hold 0 or 1 in 'purchase'"):
        next(encode_click_log(path, ALI_CCP, encoder))
    train = sample("ali_ccp")
    path.write_text("click,purchase,101,D1\n0,1,1,0.5\n")
    with pytest.raises(ValueError, match="`table` must hold the column"):
        next(encode_click_log(path, ALI_CCP, fit_click_log(train, ALI_CCP)))
