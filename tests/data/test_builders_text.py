from collections import Counter

import pytest

from mtjax.data import prepare, tfds_source

# Published numbers of examples, from the table of the collected data.
ROWS = {
    "glue_rte": {"train": 2_490, "validation": 277, "test": 3_000},
    "sentiment_labelled_sentences/yelp": {"train": 1_000},
}
LARGE = {
    "cola": {"train": 8_551, "validation": 527, "validation_out_of_domain": 516},
    "mrpc": {"train": 3_576, "validation": 500, "test": 1_725},
    "stsbenchmark": {"train": 5_749, "validation": 1_500, "test": 1_379},
    "glue_qnli_dev": {"validation": 5_463},
    "sentiment_labelled_sentences/amazon": {"train": 1_000},
    "sentiment_labelled_sentences/imdb": {"train": 1_000},
}


def _check_rows(name, rows, originals, data_dir):
    prepare(name, originals(name), data_dir, progress=False)
    for split, count in rows.items():
        source = tfds_source(name, split, data_dir=data_dir)
        assert len(source) == count
        assert set(source.info.splits) == set(rows)
        assert set(source.info.metadata["tasks"]) <= set(source[count - 1])


@pytest.mark.parametrize("name", ROWS)
def test_published_numbers_of_examples(name, originals, tmp_path):
    _check_rows(name, ROWS[name], originals, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_published_numbers_of_examples_of_large_sets(name, originals, tmp_path):
    _check_rows(name, LARGE[name], originals, tmp_path)


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
