"""Optimizer steps that touch only those rows of a table which the batch reads."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Int32, Shaped

Steps = Literal["global", "row"]


class UniqueRows(NamedTuple):
    """The rows that a batch reads, each once.

    Attributes:
      rows: `(capacity,)`: the distinct row numbers, ascending; behind them numbers that
        are no rows, all different.
      places: of the shape of the ids: where in `rows` each of them stands.
    """

    rows: Int32[Array, " capacity"]
    places: Int32[Array, "*shape"]


class RowOptimizer(NamedTuple):
    """An optimizer of a table that is given gradients of some rows.

    Attributes:
      init: from a table to a state.
      update: from a table, a state, the rows and their gradients to the new table and
        state. Inside `jit`, donate both: only then are they changed in place.
    """

    init: Callable[[Array], Any]
    update: Callable[[Array, Any, Array, Array], tuple[Array, Any]]


def unique_rows(ids: Int[Array, "*shape"], num_rows: int) -> UniqueRows:
    """Finds the distinct rows among the ids of a batch.

    The gradient of `vectors[places]` with respect to `vectors` adds up what several
    occurrences of an id say.

    Args:
      ids: row numbers, such as those of `FieldEmbeddings.row_numbers`. What is not in
        [0, num_rows) reads zeros and changes nothing.
      num_rows: rows of the table.

    Returns:
      As many rows as there are ids, or one more than the table has if that is less.

    Example:
      >>> found = unique_rows(jnp.array([[7, 2], [2, 7]]), 9)
      >>> print(found.rows, found.places.tolist())
      [ 2  7 11 12] [[1, 0], [0, 1]]
    """
    valid = (ids >= 0) & (ids < num_rows)
    ids = jnp.where(valid, ids, num_rows).astype(jnp.int32)
    capacity = min(ids.size, num_rows + 1)
    rows, places = jnp.unique(
        ids, size=capacity, fill_value=num_rows, return_inverse=True
    )
    fill = num_rows + jnp.arange(capacity, dtype=jnp.int32)
    return UniqueRows(jnp.where(rows < num_rows, rows, fill), places.astype(jnp.int32))


def take_rows(
    table: Shaped[Array, "rows ..."], rows: Int[Array, " n"]
) -> Shaped[Array, "n ..."]:
    """The rows of a table, zeros for numbers beyond it.

    Args:
      table: any array with an axis of rows.
      rows: `UniqueRows.rows`.

    Returns:
      What to differentiate with respect to, instead of the table.

    Example:
      >>> print(take_rows(jnp.array([1.0, 2.0]), jnp.array([1, 5])))
      [2. 0.]
    """
    return table.at[rows].get(mode="fill", fill_value=0, unique_indices=True)


def sparse_rows(
    optimizer: optax.GradientTransformation, *, steps: Steps = "global"
) -> RowOptimizer:
    r"""Makes an optimizer of a table touch only the rows that a batch reads.

    The rows and their part of the optimizer's state are gathered, updated as if they
    were all there is, and written back: a step costs the same whatever the table's
    size. With `optax.adam` this is lazy Adam. A row that a batch does not read stays as
    it is, and so do its moments: they do not decay, and momentum does not move it. With
    all rows in every batch it is the optimizer itself.

    Args:
      optimizer: one that works on each number for itself, such as `optax.adam`,
        `optax.adagrad`, or `optax.adamw`, whose decay then is of the rows read. What it
        takes over all of a tree, such as a norm to clip by, is over the rows read.
      steps: what a schedule and Adam's bias correction :math:`1 - \beta^t` count.
        `"global"`: all steps. Rows that first appear late are hardly corrected, as in
        most implementations of lazy Adam: their first step is up to
        :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}` learning rates long, 3.2 with Adam's
        defaults. `"row"`: those in which the row was read; takes a number more per row,
        and treats each row as a parameter of its own.

    Returns:
      The optimizer. With `"global"`, parts of its state whose first axis is as long as
      the table are taken to be of its rows.

    Raises:
      ValueError: if `steps` is unknown.

    Example:
      >>> table, ids = jnp.ones((1000, 2)), jnp.array([3, 3, 8])
      >>> optimizer = sparse_rows(optax.adam(0.1))
      >>> state = optimizer.init(table)
      >>> rows, places = unique_rows(ids, len(table))
      >>> loss_fn = lambda vectors: jnp.sum(vectors[places])
      >>> grads = jax.grad(loss_fn)(take_rows(table, rows))
      >>> print(grads[:, 0])
      [2. 1. 0.]
      >>> step = jax.jit(optimizer.update, donate_argnums=(0, 1))
      >>> table, state = step(table, state, rows, grads)
      >>> print(table[jnp.array([3, 8, 9]), 0].round(2))
      [0.9 0.9 1. ]

    References:
      Adam: A Method for Stochastic Optimization, ICLR 2015; its lazy form is that of
      TensorFlow's LazyAdamOptimizer and PyTorch's SparseAdam (both `"global"`).
    """
    if steps not in get_args(Steps):
        raise ValueError(f"`steps` must be one of {get_args(Steps)}, got {steps!r}.")
    apply = optimizer.update
    init = optimizer.init
    if steps == "row":
        init, apply = jax.vmap(init), jax.vmap(apply)

    def update(table, state, rows, grads):
        of_rows = jax.tree.map(lambda leaf: _has_rows(leaf, table), state)
        gathered = jax.tree.map(
            lambda leaf, own: take_rows(leaf, rows) if own else leaf, state, of_rows
        )
        values = take_rows(table, rows)
        updates, gathered = apply(grads, gathered, values)
        state = jax.tree.map(
            lambda leaf, new, own: _put(leaf, rows, new) if own else new,
            state,
            gathered,
            of_rows,
        )
        values = jnp.asarray(optax.apply_updates(values, updates))
        return _put(table, rows, values), state

    return RowOptimizer(init, update)


def on_shards(optimizer: RowOptimizer, mesh: Mesh, axis: str = "data") -> RowOptimizer:
    """Runs a `RowOptimizer` on a table whose rows are split along an axis of a mesh.

    Every device updates the rows that it holds; no part of the table travels. Adam's
    and other optimizers that look at each number for itself give the same as on one
    device; a norm over the rows read would be each device's own.

    Args:
      optimizer: from `sparse_rows`.
      mesh: the devices.
      axis: along which `mtjax.nn.row_sharding` splits the table.

    Returns:
      The optimizer; its `update` takes all rows and gradients on every device.

    Example:
      >>> from mtjax.training import data_mesh
      >>> mesh = data_mesh(jax.devices()[:1])
      >>> optimizer = on_shards(sparse_rows(optax.sgd(1.0)), mesh)
      >>> table, rows = jnp.ones((4, 1)), jnp.array([2])
      >>> state = optimizer.init(table)
      >>> table, state = optimizer.update(table, state, rows, jnp.ones((1, 1)))
      >>> print(table[:, 0])
      [1. 1. 0. 1.]
    """

    def specs(state, table):
        return jax.tree.map(
            lambda leaf: (
                PartitionSpec(axis) if _has_rows(leaf, table) else PartitionSpec()
            ),
            state,
        )

    def init(table):
        spec = specs(jax.eval_shape(optimizer.init, table), table)
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), spec)
        return jax.jit(optimizer.init, out_shardings=shardings)(table)

    def update(table, state, rows, grads):
        def local(part, state, rows, grads):
            held = len(part)
            here = rows - jax.lax.axis_index(axis) * held
            inside = (here >= 0) & (here < held)
            # All different, and beyond the table.
            here = jnp.where(inside, here, len(table) + rows)
            return optimizer.update(part, state, here, grads)

        spec = (PartitionSpec(axis), specs(state, table))
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(*spec, PartitionSpec(), PartitionSpec()),
            out_specs=spec,
        )(table, state, rows, grads)

    return RowOptimizer(init, update)


def _has_rows(leaf: Any, table: Any) -> bool:
    return leaf.shape[:1] == table.shape[:1]


def _put(leaf: Array, rows: Array, values: Array) -> Array:
    values = values.astype(leaf.dtype)
    return leaf.at[rows].set(values, mode="drop", unique_indices=True)
