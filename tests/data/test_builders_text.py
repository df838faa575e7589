import shutil
from collections import Counter

import numpy as np
import pytest

from mtjax.data import DataFormatError, available, prepare, tfds_source
from tests.data.published import check_rows

# Published numbers of examples, from the table of the collected data.
ROWS = {
    "glue_rte": {"train": 2_490, "validation": 277, "test": 3_000},
    "sentiment_labelled_sentences/yelp": {"train": 1_000},
    "big_bench_hard/snarks": {"test": 178},
    "big_bench_hard/navigate": {"test": 250},
    "hh_rlhf": {"test": 2_312},
    "tiny_shakespeare": {"train": 1, "validation": 1, "test": 1},
    "slotgated_atis_snips/atis": {"train": 4_478, "validation": 500, "test": 893},
    "w00": {"train": 2_184},
}
LARGE = {
    "cola": {"train": 8_551, "validation": 527, "validation_out_of_domain": 516},
    "mrpc": {"train": 3_576, "validation": 500, "test": 1_725},
    "stsbenchmark": {"train": 5_749, "validation": 1_500, "test": 1_379},
    "glue_qnli_dev": {"validation": 5_463},
    "sentiment_labelled_sentences/amazon": {"train": 1_000},
    "sentiment_labelled_sentences/imdb": {"train": 1_000},
    "gsm8k": {"train": 7_473, "test": 1_319},
    "nq_open": {
        "validation": 3_610,
        "efficientqa_validation": 1_800,
        "efficientqa_test": 1_769,
    },
    "wikitext2": {"validation": 3_760, "test": 4_358},
    "review_polarity": {"train": 2_000},
    "snips": {"train": 13_784, "validation": 700},
    "slotgated_atis_snips/snips": {"train": 13_084, "validation": 700, "test": 700},
    "deft_corpus": {"train": 80, "validation": 68},
    "ud_english_ewt": {"validation": 2_001, "test": 2_077},
}


def _prepare_and_check(name, rows, originals, data_dir):
    prepare(name, originals(name), data_dir, progress=False)
    check_rows(name, rows, data_dir)


@pytest.mark.parametrize("name", ROWS)
def test_published_numbers_of_examples(name, originals, tmp_path):
    _prepare_and_check(name, ROWS[name], originals, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_published_numbers_of_examples_of_large_sets(name, originals, tmp_path):
    _prepare_and_check(name, LARGE[name], originals, tmp_path)


def _rows(name, split, data_dir):
    source = tfds_source(name, split, data_dir=data_dir)
    return source.__getitems__(range(len(source)))


def _counts(name, split, data_dir, feature="label"):
    return Counter(int(row[feature]) for row in _rows(name, split, data_dir))


def test_entailment_labels_are_as_published(originals, tmp_path):
    prepare("glue_rte", originals("glue_rte"), tmp_path, progress=False)
    assert _counts("glue_rte", "train", tmp_path) == {0: 1_249, 1: 1_241}
    assert _counts("glue_rte", "validation", tmp_path) == {0: 146, 1: 131}
    assert _counts("glue_rte", "test", tmp_path) == {-1: 3_000}


@pytest.mark.slow
def test_labels_of_pairs_are_as_published(originals, tmp_path):
    for name in ("glue_qnli_dev", "mrpc", "sentiment_labelled_sentences"):
        prepare(name, originals(name), tmp_path, progress=False)
    qnli = _counts("glue_qnli_dev", "validation", tmp_path)
    assert sorted(qnli.values()) == [2_702, 2_761]
    # Paraphrases in the official training part (4,076 pairs) and the test part.
    train = _counts("mrpc", "train", tmp_path) + _counts("mrpc", "validation", tmp_path)
    assert train == {0: 1_323, 1: 2_753}
    assert _counts("mrpc", "test", tmp_path) == {0: 578, 1: 1_147}
    for domain in ("amazon", "imdb", "yelp"):
        name = f"sentiment_labelled_sentences/{domain}"
        assert _counts(name, "train", tmp_path) == {0: 500, 1: 500}


def test_reasoning_tasks_have_the_published_total():
    sizes = {
        row.name: row.splits["test"]
        for row in available()
        if row.name.startswith("big_bench_hard/")
    }
    assert len(sizes) == 27
    assert sum(sizes.values()) == 6_511


def test_the_pieces_of_a_text_are_the_text(originals, tmp_path):
    name = "tiny_shakespeare"
    prepare(name, originals(name), tmp_path, progress=False)
    pieces = [
        tfds_source(name, split, data_dir=tmp_path)[0]["text"]
        for split in ("train", "validation", "test")
    ]
    assert [len(piece) for piece in pieces] == [1_003_854, 55_770, 55_770]
    original = (originals(name) / "input.txt").read_bytes()
    assert b"".join(pieces) == original


@pytest.mark.parametrize(
    ("name", "file"), [("tiny_shakespeare", "input.txt"), ("wikitext2", "test.txt")]
)
def test_texts_that_are_cut_short_are_refused(name, file, originals, tmp_path):
    folder = tmp_path / "originals"
    shutil.copytree(originals(name), folder, copy_function=shutil.copyfile)
    (folder / file).chmod(0o644)
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    with pytest.raises(DataFormatError, match=f"{file}.*cut short"):
        prepare(name, folder, tmp_path / "out", progress=False)


@pytest.mark.slow
def test_contents_of_language_sets_are_as_published(originals, tmp_path):
    for name in ("gsm8k", "nq_open", "review_polarity"):
        prepare(name, originals(name), tmp_path, progress=False)
    assert _counts("review_polarity", "train", tmp_path) == {0: 1_000, 1: 1_000}
    folds = _counts("review_polarity", "train", tmp_path, "fold")
    assert folds == dict.fromkeys(range(10), 200)
    assert int(_rows("gsm8k", "train", tmp_path)[0]["result"]) == 72
    answers = _rows("nq_open", "validation", tmp_path)[0]["answer"]
    assert list(answers) == [b"14 December 1972 UTC", b"December 1972"]


def test_training_has_the_smaller_codes_of_intents_and_slots(originals, tmp_path):
    name = "slotgated_atis_snips/atis"
    prepare(name, originals(name), tmp_path, progress=False)
    assert set(_counts(name, "train", tmp_path, "intent")) == set(range(21))
    assert max(_counts(name, "test", tmp_path, "intent")) == 25
    source = tfds_source(name, "train", data_dir=tmp_path)
    names = source.info.metadata["slots"]
    tags = " ".join(names[code] for code in source[0]["slots"])
    assert tags.startswith("O O O O O B-fromloc.city_name O B-toloc.city_name")
    assert len(source[0]["tokens"]) == len(source[0]["slots"])


def test_definitions_are_as_published(originals, tmp_path):
    prepare("w00", originals("w00"), tmp_path, progress=False)
    assert _counts("w00", "train", tmp_path) == {0: 1_454, 1: 730}


@pytest.mark.slow
def test_segments_are_the_text_of_the_query(originals, tmp_path):
    prepare("snips", originals("snips"), tmp_path, progress=False)
    assert set(_counts("snips", "validation", tmp_path, "intent").values()) == {100}
    train = _counts("snips", "train", tmp_path, "intent")
    assert (min(train.values()), max(train.values())) == (1_942, 2_000)
    for row in _rows("snips", "train", tmp_path):
        assert b"".join(row["segments"]) == row["text"]
        assert len(row["segments"]) == len(row["slots"])


@pytest.mark.slow
def test_dependencies_form_one_tree_per_sentence(originals, tmp_path):
    name = "ud_english_ewt"
    prepare(name, originals(name), tmp_path, progress=False)
    metadata = tfds_source(name, "test", data_dir=tmp_path).info.metadata
    for row in _rows(name, "test", tmp_path):
        head, length = row["head"], len(row["tokens"])
        assert (head == 0).sum() == 1
        assert 0 <= head.min() <= head.max() <= length
        assert metadata["deprel"][row["deprel"][head.argmin()]] == "root"
        assert len(row["lemmas"]) == len(row["upos"]) == len(row["xpos"]) == length


@pytest.mark.slow
def test_every_tagged_token_belongs_to_a_span(originals, tmp_path):
    name = "deft_corpus"
    prepare(name, originals(name), tmp_path, progress=False)
    metadata = tfds_source(name, "train", data_dir=tmp_path).info.metadata
    assert (metadata["tags"][0], len(metadata["tags"])) == ("O", 24)
    assert (metadata["relations"][0], len(metadata["relations"])) == ("0", 7)
    tokens = 0
    for split in ("train", "validation"):
        for row in _rows(name, split, tmp_path):
            untagged = [identifier == b"-1" for identifier in row["tag_id"]]
            assert untagged == (row["tags"] == 0).tolist()
            assert set(np.diff(row["sentence"])) <= {0, 1}
            tokens += len(row["tokens"])
    assert tokens == 490_802
