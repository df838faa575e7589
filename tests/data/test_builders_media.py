import io
import re
import tarfile
from collections import Counter

import numpy as np
import pytest

from mtjax.data import DataFormatError, prepare, tfds_source
from tests.data.published import check_rows

# Published numbers of examples, from the table of the collected data.
ROWS = {
    "coco_multitask_ccby": {"train": 26, "validation": 27},
    "diginetica_sample": {"train": 2_986},
    "fsdd": {"train": 2_700, "test": 300},
    "omniglot": {"small1": 2_720, "small2": 3_120},
    "recsys_samples/ali_ccp": {"train": 100, "validation": 50, "test": 50},
    "recsys_samples/aliexpress": {"train": 100, "test": 20},
    "speech_commands": {"test": 480},
}
LARGE = {
    "eurosat/rgb": {"train": 5_000},
    "movielens_latest_small": {"train": 100_836},
    "sign_language_digits": {"train": 2_059},
}
FOLDERS = {"speech_commands": "speech_commands_test_480"}


@pytest.fixture(scope="module")
def media(originals, tmp_path_factory):
    """Prepares a set at its first use; returns the folder of the prepared data."""
    data_dir = tmp_path_factory.mktemp("media")

    def made(name):
        folder = originals(FOLDERS.get(name, name))
        assert prepare(name, folder, data_dir, progress=False).is_dir()
        return data_dir

    return made


def _all(name, split, data_dir):
    source = tfds_source(name, split, data_dir=data_dir)
    return source, source.__getitems__(range(len(source)))


@pytest.mark.parametrize("name", ROWS)
def test_published_numbers_of_examples(name, media):
    check_rows(name, ROWS[name], media(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_published_numbers_of_examples_of_large_sets(name, media):
    check_rows(name, LARGE[name], media(name))


def test_every_digit_and_every_speaker_of_fsdd(media):
    data_dir = media("fsdd")
    digits, speakers = Counter(), Counter()
    for split, recordings in (("train", range(5, 50)), ("test", range(5))):
        _, rows = _all("fsdd", split, data_dir)
        assert {int(row["recording"]) for row in rows} == set(recordings)
        digits.update(int(row["digit"]) for row in rows)
        speakers.update(int(row["speaker"]) for row in rows)
        assert {row["audio"].dtype for row in rows} == {np.dtype(np.int16)}
        assert len({row["audio"].size for row in rows}) > 200
    assert digits == dict.fromkeys(range(10), 300)
    assert speakers == dict.fromkeys(range(6), 500)


def test_fsdd_holds_the_samples_of_the_original(media, originals):
    source, rows = _all("fsdd", "test", media("fsdd"))
    speaker = source.info.features["speaker"].str2int("theo")
    [row] = [
        row
        for row in rows
        if (row["digit"], row["speaker"], row["recording"]) == (7, speaker, 3)
    ]
    with tarfile.open(originals("fsdd") / "fsdd.tar.xz") as archive:
        content = archive.extractfile("./recordings/7_theo_3.wav").read()
    np.testing.assert_array_equal(row["audio"], np.frombuffer(content[44:], "<i2"))


def test_keywords_are_balanced_and_only_silence_has_no_speaker(media):
    source, rows = _all("speech_commands", "test", media("speech_commands"))
    labels = source.info.features["label"]
    assert Counter(int(row["label"]) for row in rows) == dict.fromkeys(range(12), 40)
    silence = labels.str2int("_silence_")
    assert all((not row["speaker"]) == (row["label"] == silence) for row in rows)
    assert {row["audio"].shape for row in rows} == {(16_000,)}


def test_omniglot_has_twenty_drawers_of_every_character(media):
    data_dir = media("omniglot")
    found = {}
    for split, alphabets in (("small1", 5), ("small2", 5)):
        source, rows = _all("omniglot", split, data_dir)
        assert len({int(row["alphabet"]) for row in rows}) == alphabets
        assert set(Counter(int(row["character"]) for row in rows).values()) == {20}
        assert {int(row["drawer"]) for row in rows} == set(range(20))
        image = rows[0]["image"]
        assert image.shape == (105, 105, 1)
        # Little ink on much paper.
        assert set(np.unique(image)) == {0, 255}
        assert np.mean(image == 0) < 0.2
        found[split] = {int(row["character"]): row for row in rows}
    assert len({**found["small1"], **found["small2"]}) == 242
    names = source.info.features["character"]
    alphabets = source.info.features["alphabet"]
    for character, row in found["small2"].items():
        expected = f"{alphabets.int2str(int(row['alphabet']))}/character"
        expected += f"{int(row['alphabet_char_id']) + 1:02}"
        assert names.int2str(character) == expected


def test_clicks_keep_the_columns_of_the_original(media):
    source, rows = _all(
        "recsys_samples/ali_ccp", "train", media("recsys_samples/ali_ccp")
    )
    assert sum(int(row["click"]) for row in rows) == 7
    assert sum(int(row["purchase"]) for row in rows) == 1
    columns = source.info.metadata["numeric"]
    assert columns[:2] == ["d109_14", "d110_14"]
    np.testing.assert_allclose(rows[0]["numeric"][:2], [0.4734, 0.562])
    assert rows[0]["categorical"].shape == (23,)


def test_scenes_have_maps_of_their_size_and_boxes_around_their_things(media):
    source, rows = _all("coco_multitask_ccby", "train", media("coco_multitask_ccby"))
    names = source.info.metadata["box_labels"]
    classes = source.info.metadata["semantic"]
    ids = {name: int(number) for number, name in classes.items()}
    assert len(names) == 80
    shares = []
    for row in rows:
        assert row["image"].shape[:2] == row["semantic"].shape[:2]
        assert {str(value) for value in np.unique(row["semantic"])} <= set(classes)
        assert row["boxes"].shape == (row["box_labels"].size, 4)
        assert set(np.flatnonzero(row["present"])) == set(row["box_labels"])
        height, width = row["semantic"].shape[:2]
        scale = np.array([height, width, height, width])
        for box, label in zip(row["boxes"], row["box_labels"], strict=True):
            top, left, bottom, right = np.round(box * scale).astype(int)
            inside = row["semantic"][top : bottom + 1, left : right + 1]
            shares.append(np.mean(inside == ids.get(names[label], -1)))
    # A box is mostly on pixels of its class: neither axes nor classes are mixed up.
    assert np.median(shares) > 0.4
    assert np.mean(np.array(shares) > 0) > 0.9


@pytest.mark.slow
def test_photos_are_balanced(media):
    source, rows = _all("eurosat/rgb", "train", media("eurosat/rgb"))
    assert Counter(int(row["label"]) for row in rows) == dict.fromkeys(range(10), 500)
    assert source[0]["image"].shape == (64, 64, 3)
    _, rows = _all("sign_language_digits", "train", media("sign_language_digits"))
    counts = Counter(int(row["label"]) for row in rows)
    assert set(counts) == set(range(10))
    assert 203 <= min(counts.values()) <= max(counts.values()) <= 208


@pytest.mark.slow
def test_ratings_have_the_published_users_films_and_mean(media):
    _, rows = _all("movielens_latest_small", "train", media("movielens_latest_small"))
    ratings = np.array([row["rating"] for row in rows])
    np.testing.assert_allclose(ratings.mean(dtype=np.float64), 3.501557, atol=1e-6)
    assert len({int(row["user"]) for row in rows}) == 610
    assert len({int(row["movie"]) for row in rows}) == 9_724
    assert all(bool(row["liked"]) == (row["rating"] >= 4) for row in rows)
    assert sum(int(row["tagged"]) for row in rows) > 1_000


def test_sessions_are_in_order_and_hold_every_item(media):
    _, rows = _all("diginetica_sample", "train", media("diginetica_sample"))
    assert len({int(row["session"]) for row in rows}) == 2_986
    assert len(np.unique(np.concatenate([row["items"] for row in rows]))) == 7_139
    for row in rows:
        assert row["items"].shape == row["timeframes"].shape
        assert (np.diff(row["timeframes"]) >= 0).all()


def _archive(path, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    with tarfile.open(path, "w:xz") as archive:
        archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("name", "file", "member", "message"),
    [
        ("fsdd", "fsdd.tar.xz", "recordings/1_theo_9.wav", "decoded"),
        ("eurosat/rgb", "eurosat_rgb_5000.tar.xz", "River/River_1.jpg", "decoded"),
    ],
)
def test_damaged_members_are_named(name, file, member, message, tmp_path):
    _archive(tmp_path / file, member, b"not what the name says")
    with pytest.raises(DataFormatError, match=f"{re.escape(member)}.*{message}"):
        prepare(name, tmp_path, tmp_path / "out", progress=False)
