import itertools
import json

import grain
import numpy as np
import pytest

from mtjax.data import array_source, mixture

SIZES = {"a": 12, "b": 24, "c": 12}


def sources(sizes=SIZES):
    """Examples that say which task and row they are."""
    return {
        task: array_source({"row": np.arange(n), "x": np.full((n, 2), ord(task))})
        for task, n in sizes.items()
    }


def take(stream, n):
    return list(itertools.islice(stream, n))


def rows_by_task(batches):
    seen = {}
    for batch in batches:
        for task, part in batch.items():
            seen.setdefault(task, []).extend(part["row"].tolist())
    return seen


def assert_same(left, right):
    np.testing.assert_equal(left, right)


@pytest.mark.parametrize("batches", ["single_task", "mixed", "per_task"])
def test_same_seed_same_batches(batches):
    one = take(iter(mixture(sources(), batch_size=5, batches=batches, seed=3)), 20)
    two = take(iter(mixture(sources(), batch_size=5, batches=batches, seed=3)), 20)
    other = take(iter(mixture(sources(), batch_size=5, batches=batches, seed=4)), 20)
    assert_same(one, two)
    with pytest.raises(AssertionError):
        assert_same(one, other)


def test_the_name_decides_the_order_so_a_new_task_changes_no_other():
    few = iter(mixture(sources({"a": 12}), batch_size=12))
    many = iter(mixture(sources(), batch_size=12, batches="per_task"))
    assert_same(next(few)["a"], next(many)["a"])


def test_proportions_are_exact_in_every_block():
    stream = iter(mixture(sources(), batch_size=2, weights={"a": 1, "b": 2, "c": 1}))
    tasks = [next(iter(batch)) for batch in take(stream, 400)]
    for start in range(0, 400, 4):
        assert sorted(tasks[start : start + 4]) == ["a", "b", "b", "c"]
    assert stream.counts == {"a": 200, "b": 400, "c": 200}


def test_proportions_never_stray_by_a_draw_per_task():
    weights = {"a": 0.17, "b": 0.31, "c": 0.52}
    stream = iter(mixture(sources(), batch_size=1, weights=weights))
    for draws in range(1, 300):
        next(stream)
        for task, share in weights.items():
            assert abs(stream.counts[task] - share * draws) < 1.0


def test_mixed_batches_carry_task_ids_and_shares():
    stream = iter(
        mixture(
            sources(),
            batch_size=8,
            batches="mixed",
            weights={"a": 1, "b": 2, "c": 1},
        )
    )
    for batch in take(stream, 10):
        assert batch["task"].dtype == np.int32
        assert np.bincount(batch["task"]).tolist() == [2, 4, 2]
        letters = np.array([ord(task) for task in "abc"])[batch["task"]]
        np.testing.assert_array_equal(batch["x"][:, 0], letters)


def test_per_task_batches_of_own_sizes():
    sizes = {"a": 2, "b": 5, "c": 3}
    stream = iter(mixture(sources(), batch_size=sizes, batches="per_task"))
    for batch in take(stream, 10):
        assert {task: len(part["row"]) for task, part in batch.items()} == sizes
    assert stream.counts == {"a": 20, "b": 50, "c": 30}


def test_every_pass_is_a_new_complete_order():
    stream = iter(mixture(sources({"a": 12}), batch_size=4))
    passes = np.array(rows_by_task(take(stream, 9))["a"]).reshape(3, 12)
    for order in passes:
        assert sorted(order) == list(range(12))
    assert not (passes[0] == passes[1]).all()


def test_a_task_of_weight_zero_is_never_drawn():
    stream = mixture(
        sources(),
        batch_size=4,
        weights={"a": 0, "b": 1, "c": 1},
        exhaustion="stop_all",
    )
    assert set(rows_by_task(stream)) == {"b", "c"}


class TestExhaustion:
    def test_stop_first(self):
        stream = mixture(
            sources(), batch_size=4, weights="uniform", exhaustion="stop_first"
        )
        seen = rows_by_task(stream)
        assert sorted(seen["a"]) == list(range(12))
        assert len(seen["b"]) == 12

    def test_stop_all_repeats_the_short_ones(self):
        stream = mixture(
            sources(), batch_size=4, weights="uniform", exhaustion="stop_all"
        )
        seen = rows_by_task(stream)
        assert sorted(seen["b"]) == list(range(24))
        assert sorted(seen["a"]) == sorted([*range(12), *range(12)][: len(seen["a"])])

    @pytest.mark.parametrize("batches", ["single_task", "per_task"])
    def test_once_gives_every_example_once(self, batches):
        stream = mixture(
            sources({"a": 7, "b": 24, "c": 3}),
            batch_size=4,
            exhaustion="once",
            batches=batches,
            drop_remainder=False,
        )
        seen = rows_by_task(stream)
        assert {t: sorted(r) for t, r in seen.items()} == {
            "a": list(range(7)),
            "b": list(range(24)),
            "c": list(range(3)),
        }

    def test_once_mixed(self):
        stream = mixture(
            sources({"a": 7, "b": 24, "c": 3}),
            batch_size=4,
            exhaustion="once",
            batches="mixed",
            drop_remainder=False,
        )
        batches = list(stream)
        pairs = {
            (task, row)
            for batch in batches
            for task, row in zip(batch["task"].tolist(), batch["row"].tolist())
        }
        assert len(pairs) == 34
        assert [len(batch["row"]) for batch in batches] == [4] * 8 + [2]

    @pytest.mark.parametrize("batches", ["single_task", "mixed", "per_task"])
    @pytest.mark.parametrize("exhaustion", ["stop_first", "stop_all", "once"])
    def test_full_batches_only(self, batches, exhaustion):
        stream = mixture(
            sources({"a": 7, "b": 23, "c": 9}),
            batch_size=4,
            batches=batches,
            exhaustion=exhaustion,
        )
        found = list(stream)
        assert found
        for batch in found:
            parts = [batch] if batches == "mixed" else batch.values()
            assert all(len(part["row"]) == 4 for part in parts)

    def test_the_end_stays_the_end(self):
        stream = iter(mixture(sources(), batch_size=12, exhaustion="once"))
        assert len(list(stream)) == 4
        assert list(stream) == []


class TestResume:
    @pytest.mark.parametrize("batches", ["single_task", "mixed", "per_task"])
    @pytest.mark.parametrize("exhaustion", ["repeat", "stop_all", "once"])
    @pytest.mark.parametrize("steps", [0, 1, 4])
    def test_same_mixture_continues_exactly(self, batches, exhaustion, steps):
        def make():
            return mixture(
                sources({"a": 31, "b": 57, "c": 40}),
                batch_size=5,
                exponent=0.5,
                batches=batches,
                exhaustion=exhaustion,
            )

        stream = iter(make())
        take(stream, steps)
        state = json.loads(json.dumps(stream.get_state()))
        expected = take(stream, 12)
        resumed = iter(make())
        resumed.set_state(state)
        assert_same(take(resumed, 12), expected)
        assert resumed.counts == stream.counts

    def test_new_weights_continue_each_source_where_it_was(self):
        stream = iter(mixture(sources(), batch_size=2, weights="uniform"))
        before = rows_by_task(take(stream, 9))
        state = stream.get_state()
        weights = {"a": 1, "b": 3, "c": 0}
        resumed = iter(mixture(sources(), batch_size=2, weights=weights))
        resumed.set_state(state)
        tasks = [next(iter(batch)) for batch in take(resumed, 8)]
        assert sorted(tasks) == ["a"] * 2 + ["b"] * 6
        assert resumed.counts == {"a": 10, "b": 18, "c": 6}

        again = iter(mixture(sources(), batch_size=2, weights=weights))
        again.set_state(state)
        after = rows_by_task(take(again, 8))
        whole = rows_by_task(take(iter(mixture(sources({"b": 24}), batch_size=2)), 9))
        assert before["b"] + after["b"] == whole["b"]

    def test_new_and_removed_tasks(self):
        stream = iter(mixture(sources(), batch_size=2, weights="uniform"))
        take(stream, 6)
        changed = sources({"a": 12, "b": 24, "z": 6})
        resumed = iter(mixture(changed, batch_size=2, weights="uniform"))
        resumed.set_state(stream.get_state())
        assert resumed.counts == {"a": 4, "b": 4, "z": 0}
        take(resumed, 3)
        state = resumed.get_state()
        back = iter(mixture(sources(), batch_size=2, weights="uniform"))
        back.set_state(state)
        assert back.counts == {"a": 6, "b": 6, "c": 4}

    def test_states_that_mean_other_examples_are_refused(self):
        state = iter(mixture(sources(), batch_size=2)).get_state()
        with pytest.raises(ValueError, match="`state` must have the seed"):
            iter(mixture(sources(), batch_size=2, seed=1)).set_state(state)
        longer = sources(SIZES | {"a": 13})
        with pytest.raises(ValueError, match="`state` must have 13 examples"):
            iter(mixture(longer, batch_size=2)).set_state(state)

    def test_a_failed_read_does_not_move_the_stream(self):
        class Fragile:
            broken = True

            def __len__(self):
                return 4

            def __getitem__(self, index):
                if self.broken:
                    raise OSError("disk")
                return {"row": np.int64(index)}

        source = Fragile()
        stream = iter(mixture({"a": source}, batch_size=2))
        state = stream.get_state()
        with pytest.raises(OSError, match="disk"):
            next(stream)
        assert stream.get_state() == state
        source.broken = False
        assert len(next(stream)["a"]["row"]) == 2


def test_grain_pipelines_before_and_after():
    mapped = grain.MapDataset.source(sources()["a"]).map(
        lambda e: e | {"y": e["row"] * 2}
    )
    stream = mixture({"a": mapped}, batch_size=3).map(lambda batch: batch["a"])
    iterator = iter(stream)
    first = next(iterator)
    np.testing.assert_array_equal(first["y"], first["row"] * 2)
    state = iterator.get_state()
    expected = next(iterator)
    iterator.set_state(state)
    assert_same(next(iterator), expected)


def test_texts_of_unequal_lengths_stay_whole():
    texts = np.array([b"a", b"longer\x00", b""], dtype=object)
    stream = mixture({"t": array_source({"x": texts})}, batch_size=3, shuffle=False)
    assert next(iter(stream))["t"]["x"].tolist() == [b"a", b"longer\x00", b""]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"sources": {}}, "`sources` must hold"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"batch_size": {"a": 1}}, "`batch_size`"),
        ({"batch_size": dict.fromkeys("abc", 1), "batches": "mixed"}, "`batch_size`"),
        ({"batch_size": {"a": 1}, "batches": "per_task"}, "`batch_size`"),
        ({"batches": "per_task", "weights": {"a": 1, "b": 1, "c": 1}}, "`weights`"),
        (
            {"sources": {"a": grain.MapDataset.range(3).repeat()}},
            "`sources` must be finite",
        ),
        (
            {"sources": {"a": grain.MapDataset.range(3)}, "batches": "mixed"},
            "`sources` of mixed batches must give dicts",
        ),
    ],
)
def test_errors_name_the_argument(keywords, message):
    with pytest.raises(ValueError, match=message):
        mixture(**({"sources": sources(), "batch_size": 2} | keywords))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ({"row": np.arange(3)}, r"\['x'\] is int64\[2\].*absent for task 'z'"),
        ({"row": np.arange(3), "x": np.zeros((3, 2))}, r"\['x'\].*float64\[2\]"),
        (
            {"row": np.arange(3), "x": np.zeros((3, 5), np.int64)},
            r"\['x'\].*int64\[5\]",
        ),
    ],
)
def test_mixed_batches_name_the_field_that_differs(array, message):
    unlike = sources({"a": 4}) | {"z": array_source(array)}
    with pytest.raises(ValueError, match=message):
        mixture(unlike, batch_size=2, batches="mixed")
    mixture(unlike, batch_size=2)


def test_holes_are_named():
    holes = grain.MapDataset.source(sources()["a"]).filter(lambda e: e["row"] < 3)
    with pytest.raises(ValueError, match="task 'a' gave None"):
        take(iter(mixture({"a": holes}, batch_size=2)), 6)


def test_ragged_examples_are_named():
    ragged = [{"x": np.zeros(2)}, {"x": np.zeros(3)}]
    with pytest.raises(ValueError, match=r"equal shapes in a batch, a gave .*\['x'\]"):
        next(iter(mixture({"a": ragged}, batch_size=2)))
