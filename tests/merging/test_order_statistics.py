"""The k-th largest without sorting, against sorting."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.merging.merger import Source, step
from mtjax.merging.order_statistics import number_kept, threshold

SIZE = 999


def kth(rows, rank, cuts=(0, SIZE)):
    """What the totals find when the rows come in pieces."""
    merger = step(
        lambda leaf, *_: leaf.vectors[0],
        *threshold(lambda leaf, *_: leaf.vectors, rank),
    )
    pieces = [
        Source(None, jnp.asarray(rows[:, a:b]), None, np.float32(0))
        for a, b in pairwise(cuts)
    ]
    return np.asarray(merger.totals(lambda: [[piece] for piece in pieces])[0][1])


def rows_of(kind):
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((2, SIZE))
    if kind == "scaled":
        rows *= 10.0 ** rng.integers(-30, 30, rows.shape)
    if kind == "repeated":
        rows = np.round(rows, 1)
    if kind == "close":
        rows = 1 + 1e-7 * rng.integers(0, 20, rows.shape)
    if kind == "zero":
        rows *= rng.random(rows.shape) < 0.3
    return rows.astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "scaled", "repeated", "close", "zero"])
def test_finds_what_sorting_finds(kind):
    rows = rows_of(kind)
    ordered = -np.sort(-rows, axis=1)
    for fraction in (0.0, 0.003, 0.5, 0.97, 1.0):
        expected = ordered[:, number_kept(fraction, SIZE) - 1]
        np.testing.assert_array_equal(kth(rows, fraction), expected)


def test_pieces_do_not_matter():
    rows = rows_of("normal")
    whole = kth(rows, 0.2)
    np.testing.assert_array_equal(kth(rows, 0.2, (0, 1, 500, SIZE)), whole)


def test_a_function_can_say_the_rank():
    rows = rows_of("normal")
    expected = -np.sort(-rows, axis=1)[:, SIZE // 2]
    np.testing.assert_array_equal(kth(rows, lambda size: size // 2 + 1), expected)


def test_works_inside_jit():
    rows = rows_of("normal")

    @jax.jit
    def found(rows):
        source = Source(None, rows, None, np.float32(0))
        merger = step(
            lambda leaf, *_: leaf.vectors[0],
            *threshold(lambda leaf, *_: leaf.vectors, 0.25),
        )
        return merger.totals(lambda: [[source]])[0][1]

    expected = -np.sort(-rows, axis=1)[:, number_kept(0.25, SIZE) - 1]
    np.testing.assert_array_equal(found(jnp.asarray(rows)), expected)
