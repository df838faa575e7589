"""What every prepared data set must hold."""

from mtjax.data import tfds_source


def check_rows(name, rows, data_dir):
    """Asserts the splits, their numbers of examples, and that tasks are features."""
    for split, count in rows.items():
        source = tfds_source(name, split, data_dir=data_dir)
        assert len(source) == count
        assert set(source.info.splits) == set(rows)
        assert set(source.info.metadata["tasks"]) <= set(source[count - 1])
