"""A table on eight devices reads like one on a single device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mtjax.nn import FieldEmbeddings, row_sharding, take_sharded
from mtjax.training import data_mesh

TABLE = jax.random.normal(jax.random.key(0), (64, 5))
ROWS = jax.random.randint(jax.random.key(1), (16, 3), 0, 64)
WEIGHTS = jax.random.normal(jax.random.key(2), (16, 3, 5))


def of_square_mesh():
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=axes)


LAYOUTS = {
    "rows everywhere": (data_mesh, "data", None),
    "rows split like the table": (data_mesh, "data", "data"),
    "batch and table on two axes": (of_square_mesh, "model", "data"),
    "table on one of two axes": (of_square_mesh, "model", None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_and_gradients(layout):
    make_mesh, axis, rows_axis = LAYOUTS[layout]
    mesh = make_mesh()
    sharding = row_sharding(mesh, axis)
    table = jax.device_put(TABLE, sharding)
    rows = jax.device_put(ROWS, NamedSharding(mesh, P(rows_axis)))

    def loss(table, rows):
        vectors = take_sharded(table, rows, mesh=mesh, axis=axis, rows_axis=rows_axis)
        return jnp.sum(WEIGHTS * vectors**2), vectors

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, vectors), grads = step(table, rows)
    np.testing.assert_array_equal(vectors, TABLE[ROWS])
    expected = np.zeros((64, 5))
    np.add.at(expected, ROWS, np.float64(2 * WEIGHTS * TABLE[ROWS]))
    np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=1e-5)
    assert grads.sharding.is_equivalent_to(sharding, 2)
    assert vectors.sharding.is_equivalent_to(rows.sharding, 3)
    # The table, also its gradient, stays where it is.
    text = step.lower(table, rows).compile().as_text()
    gathered = re.findall(r"\w+\[([\d,]*)\]\S* all-gather", text)
    sizes = [np.prod([int(d) for d in shape.split(",") if d]) for shape in gathered]
    assert max(sizes, default=0) < TABLE.size


def test_numbers_that_are_no_rows_give_zeros():
    mesh = data_mesh()
    table = jax.device_put(TABLE, row_sharding(mesh))
    found = take_sharded(table, jnp.array([-1, 64, 63]), mesh=mesh)
    np.testing.assert_array_equal(found, jnp.stack([*[jnp.zeros(5)] * 2, TABLE[63]]))


def test_fields_read_a_split_table():
    mesh = data_mesh()
    sizes = {"shop": 30, "brand": 9}
    ids = jnp.array([[29, 3], [40, 0], [7, 8]])
    make = functools.partial(FieldEmbeddings, sizes, width=4, row_multiple=8)
    variables = make().init(jax.random.key(0), ids)
    expected = make().apply(variables, ids)
    split = jax.device_put(variables, row_sharding(mesh))
    assert split["params"]["table_4"].sharding.shard_shape((40, 4)) == (5, 4)
    module = make(take=functools.partial(take_sharded, mesh=mesh))
    np.testing.assert_array_equal(jax.jit(module.apply)(split, ids), expected)


def test_errors():
    mesh = data_mesh()
    with pytest.raises(ValueError, match=r"`axis` must be one of .*, got 'model'"):
        row_sharding(mesh, "model")
    with pytest.raises(ValueError, match="that 8 devices divide, got 63"):
        take_sharded(TABLE[:63], ROWS, mesh=mesh)
    with pytest.raises(ValueError, match="`rows_axis` must be one of"):
        take_sharded(TABLE, ROWS, mesh=mesh, rows_axis="model")
