"""Mixtures that draw one task per batch at random: unmixed sampling."""

import itertools
import json

import numpy as np
import pytest

from mtjax.data import array_source, mixture

WEIGHTS = {"a": 0.6, "b": 0.3, "c": 0.1}
SIZES = {"a": 4, "b": 2, "c": 1}


def stream(weights=WEIGHTS, batches="single_task", seed=0, **kwargs):
    sources = {t: array_source({"row": np.arange(50)}) for t in weights}
    arguments = {"batch_size": 1, "order": "random", **kwargs}
    return iter(
        mixture(sources, weights=weights, batches=batches, seed=seed, **arguments)
    )


def ids(iterator, n):
    return [next(iter(batch)) for batch in itertools.islice(iterator, n)]


def test_frequencies_are_the_weights_and_draws_independent():
    n = 4000
    drawn = ids(stream(), n)
    for task, share in WEIGHTS.items():
        error = np.sqrt(share * (1 - share) / n)
        assert abs(drawn.count(task) / n - share) < 4 * error
    # A schedule never repeats a rare task; independent draws do.
    pairs = sum(one == two == "c" for one, two in itertools.pairwise(drawn))
    assert abs(pairs / n - 0.01) < 4 * np.sqrt(0.01 / n)


def test_every_process_draws_the_same_and_other_seeds_others():
    assert ids(stream(), 100) == ids(stream(), 100) != ids(stream(seed=1), 100)


@pytest.mark.parametrize(
    ("batches", "size"), [("single_task", SIZES), ("single_task", 3), ("mixed", 7)]
)
def test_resume_goes_on_with_the_same_ids_and_examples(batches, size):
    make = lambda: stream(batches=batches, batch_size=size)
    iterator = make()
    list(itertools.islice(iterator, 9))
    state = json.loads(json.dumps(iterator.get_state()))
    expected = list(itertools.islice(iterator, 30))
    again = make()
    again.set_state(state)
    np.testing.assert_equal(list(itertools.islice(again, 30)), expected)


def test_only_the_task_that_was_drawn_advances():
    iterator = stream(batch_size=SIZES, shuffle=False)
    rows = dict.fromkeys(WEIGHTS, 0)
    for _ in range(200):
        before = iterator.counts
        ((task, batch),) = next(iterator).items()
        moved = {t: n - before[t] for t, n in iterator.counts.items()}
        assert moved == dict.fromkeys(WEIGHTS, 0) | {task: SIZES[task]}
        expected = (rows[task] + np.arange(SIZES[task])) % 50
        np.testing.assert_array_equal(batch["row"], expected)
        rows[task] += SIZES[task]


def test_a_task_that_is_used_up_leaves_the_draw():
    drawn = ids(stream(exhaustion="once", batch_size=10), 1000)
    assert sorted(drawn) == ["a"] * 5 + ["b"] * 5 + ["c"] * 5
