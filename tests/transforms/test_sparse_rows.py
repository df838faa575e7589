"""Row-wise updates against dense optimizers and a lazy Adam in NumPy float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax.nn import row_sharding, take_sharded
from mtjax.training import data_mesh
from mtjax.transforms.sparse_rows import on_shards, sparse_rows, take_rows, unique_rows

ROWS, WIDTH = 24, 3
TABLE = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
# Batches with duplicates, with rows that come late, once only and again and again, and
# ids that are no rows.
BATCHES = np.array(
    [
        [[0, 5, 5], [5, 23, 0]],
        [[7, 5, 5], [7, 7, 7]],
        [[0, 1, 2], [-1, 24, 3]],
        [[5, 0, 0], [1, 1, 9]],
    ]
)
COEFFICIENTS = np.random.default_rng(1).normal(size=(4, 2, 3, WIDTH))


def loss_fn(vectors, coefficients):
    return jnp.sum(coefficients * (vectors + vectors**2))


def train(optimizer, table, take=take_rows, batches=BATCHES):
    """What a user writes: one step per batch."""
    state = optimizer.init(table)
    num_rows = len(table)

    def step(table, state, ids, coefficients):
        rows, places = unique_rows(ids, num_rows)
        grads = jax.grad(lambda v: loss_fn(v[places], coefficients))(take(table, rows))
        return optimizer.update(table, state, rows, grads)

    step = jax.jit(step, donate_argnums=(0, 1))
    for ids, coefficients in zip(batches, np.float32(COEFFICIENTS)):
        table, state = step(table, state, ids, coefficients)
    return table, state


def lazy_adam(steps, batches=BATCHES, rate=0.1, b1=0.9, b2=0.999, eps=1e-8):
    """Row by row; a row that is not read is not looked at."""
    table = np.float64(TABLE)
    mu, nu = np.zeros_like(table), np.zeros_like(table)
    read = np.zeros(ROWS, int)
    for t, (ids, coefficients) in enumerate(zip(batches, COEFFICIENTS), start=1):
        grads = {}
        for i, c in zip(ids.ravel(), coefficients.reshape(-1, WIDTH), strict=True):
            if 0 <= i < ROWS:
                grads[i] = grads.get(i, 0) + c * (1 + 2 * table[i])
        for i, g in grads.items():
            read[i] += 1
            n = t if steps == "global" else read[i]
            mu[i] = b1 * mu[i] + (1 - b1) * g
            nu[i] = b2 * nu[i] + (1 - b2) * g**2
            root = np.sqrt(nu[i] / (1 - b2**n)) + eps
            table[i] -= rate * mu[i] / (1 - b1**n) / root
    return table, mu, nu, read


@pytest.mark.parametrize("steps", ["global", "row"])
def test_lazy_adam(steps):
    optimizer = sparse_rows(optax.adam(0.1), steps=steps)
    table, state = train(optimizer, jnp.array(TABLE))
    expected, mu, nu, read = lazy_adam(steps)
    np.testing.assert_allclose(table, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state[0].mu, mu, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state[0].nu, nu, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(state[0].count, 4 if steps == "global" else read)
    # Rows that no batch reads are the same to the bit.
    np.testing.assert_array_equal(table[read == 0], TABLE[read == 0])
    assert (np.asarray(table)[read > 0] != TABLE[read > 0]).all()


def test_the_two_counts_differ_for_rows_that_come_late():
    """First step of a row at step t: as derived in the docstring."""
    late = np.array([[[0, 0, 0], [0, 0, 0]]] * 3 + [[[9, 0, 0], [0, 0, 0]]])
    moves = {}
    for steps in ("global", "row"):
        optimizer = sparse_rows(optax.adam(0.1), steps=steps)
        table, _ = train(optimizer, jnp.array(TABLE), batches=late)
        moves[steps] = np.abs(np.asarray(table)[9] - TABLE[9])
    factor = (0.1 / (1 - 0.9**4)) / np.sqrt(0.001 / (1 - 0.999**4))
    np.testing.assert_allclose(moves["row"], 0.1, rtol=1e-4)
    np.testing.assert_allclose(moves["global"], 0.1 * factor, rtol=1e-4)


@pytest.mark.parametrize("steps", ["global", "row"])
@pytest.mark.parametrize("name", ["adam", "adamw", "adagrad", "sgd"])
def test_with_all_rows_in_every_batch_it_is_the_dense_optimizer(name, steps):
    dense = {
        "adam": optax.adam(0.1),
        "adamw": optax.adamw(0.1, weight_decay=0.3),
        "adagrad": optax.adagrad(0.1),
        "sgd": optax.sgd(optax.exponential_decay(0.1, 1, 0.5), momentum=0.9),
    }[name]
    num_rows = 6
    batches = np.random.default_rng(2).permuted([[np.arange(6)] * 1] * 4, axis=2)
    batches = batches.reshape(4, 2, 3)
    start = jnp.array(TABLE[:num_rows])
    found, _ = train(sparse_rows(dense, steps=steps), start + 0, batches=batches)

    table, state = start, dense.init(start)
    for ids, coefficients in zip(batches, np.float32(COEFFICIENTS)):
        grads = jax.grad(lambda t, *args: loss_fn(t[args[0]], args[1]))(
            table, ids, coefficients
        )
        updates, state = dense.update(grads, state, table)
        table = optax.apply_updates(table, updates)
    np.testing.assert_allclose(found, table, rtol=1e-4, atol=1e-6)


def test_unique_rows():
    found = unique_rows(jnp.array([[7, 2, 7], [-1, 9, 8]]), 9)
    assert found.rows[:3].tolist() == [2, 7, 8]
    assert (found.rows[3:] >= 9).all()
    assert len(set(found.rows.tolist())) == 6
    rows = np.asarray(found.rows)[np.asarray(found.places)]
    np.testing.assert_array_equal(
        np.where(rows < 9, rows, -1), [[7, 2, 7], [-1, -1, 8]]
    )
    # Not more rows than the table can give, and one for what is no row.
    small = unique_rows(jnp.array([0, 1, 0, 1, 5, 1]), 2)
    assert small.rows.tolist()[:2] == [0, 1]
    assert small.places.tolist() == [0, 1, 0, 1, 2, 1]
    np.testing.assert_array_equal(
        take_rows(jnp.ones((9, 2)), found.rows), [[1, 1]] * 3 + [[0, 0]] * 3
    )


@pytest.mark.parametrize("steps", ["global", "row"])
def test_a_step_copies_no_table(steps):
    """Table and moments are changed in place; the rest is as large as the batch."""
    num_rows, ids = 50_000, jnp.arange(6)
    table = jnp.zeros((num_rows, 8))
    optimizer = sparse_rows(optax.adam(0.1), steps=steps)
    state = optimizer.init(table)

    def step(table, state):
        rows, places = unique_rows(ids, num_rows)
        grads = jax.grad(lambda v: jnp.sum(v[places] ** 2))(take_rows(table, rows))
        return optimizer.update(table, state, rows, grads)

    memory = (
        jax.jit(step, donate_argnums=(0, 1)).lower(table, state).compile()
    ).memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves((table, state)))
    assert memory.alias_size_in_bytes == held
    assert memory.temp_size_in_bytes < table.nbytes / 50


@pytest.mark.parametrize("steps", ["global", "row"])
def test_eight_devices_give_the_same_as_one(steps):
    optimizer = sparse_rows(optax.adam(0.1), steps=steps)
    expected = train(optimizer, jnp.array(TABLE))
    mesh = data_mesh()
    table = jax.device_put(TABLE, row_sharding(mesh))
    take = lambda table, rows: take_sharded(table, rows, mesh=mesh)
    found = train(on_shards(optimizer, mesh), table, take)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        if a.ndim:
            assert a.sharding.shard_shape(a.shape)[0] == ROWS // 8


def test_no_part_of_a_split_table_travels():
    mesh = data_mesh()
    num_rows = 4096
    table = jax.device_put(jnp.ones((num_rows, 8)), row_sharding(mesh))
    optimizer = on_shards(sparse_rows(optax.adam(0.1)), mesh)
    state = optimizer.init(table)

    def step(table, state, ids):
        rows, places = unique_rows(ids, num_rows)
        vectors = take_sharded(table, rows, mesh=mesh)
        grads = jax.grad(lambda v: jnp.sum(v[places] ** 2))(vectors)
        return optimizer.update(table, state, rows, grads)

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(table, state, jnp.arange(16))
    text = compiled.compile().as_text()
    moved = re.findall(
        r"\w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|reduce-scatter)", text
    )
    sizes = [np.prod([int(d) for d in shape.split(",") if d]) for shape in moved]
    assert sizes
    assert max(sizes) <= 16 * 8


def test_unknown_steps():
    with pytest.raises(ValueError, match=r"`steps` must be one of .*, got 'none'"):
        sparse_rows.__wrapped__(optax.sgd(1.0), steps="none")
