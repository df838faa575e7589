"""Embeddings of categorical fields and numbers: what stands before a ranker."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int, Int32

MISSING, UNKNOWN, FIRST_KNOWN = 0, 1, 2

Initializer = Callable[..., Array]
Take = Callable[[Array, Array], Array]
"""From a table `(rows, width)` and row numbers of any shape to vectors."""


def embedding_width(size: int) -> int:
    r"""A width that grows with the vocabulary.

    .. math:: \max(4, \min(64, \lfloor 6 V^{1/4} \rfloor))

    Args:
      size: V, number of values, at least 1.

    Returns:
      The width.

    Example:
      >>> [embedding_width(size) for size in (1, 50, 10_000, 10_000_000)]
      [6, 15, 60, 64]
    """
    return max(4, min(64, int(6 * size**0.25)))


def hash_ids(
    ids: Int[Array | np.ndarray, "*shape"], buckets: int
) -> Int32[Array, "*shape"]:
    """Spreads integers over buckets, the same in every process and on every device.

    The low 32 bits go through the finaliser of MurmurHash3, then modulo `buckets`. No
    two of them share what comes out before the modulo.

    Args:
      ids: any integers, also negative ones. Without 64-bit mode, JAX keeps the low 32
        bits only.
      buckets: number of buckets, at least 1.

    Returns:
      Numbers from 0 to `buckets - 1`.

    Raises:
      ValueError: if there is no bucket.

    Example:
      >>> print(hash_ids(jnp.array([7, 8, -1]), 100))
      [60 87 13]

    References:
      MurmurHash3, Austin Appleby, 2011, `fmix32`.
    """
    if buckets < 1:
        raise ValueError(f"`buckets` must be at least 1, got {buckets!r}.")
    x = jnp.asarray(ids).astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return ((x ^ (x >> 16)) % jnp.uint32(buckets)).astype(jnp.int32)


def take_rows_of(
    table: Float[Array, "rows width"], rows: Int[Array, "*shape"]
) -> Float[Array, "*shape width"]:
    """The rows of a table that lies on one device or in full on every one."""
    return jnp.take(table, rows, axis=0, mode="clip")


class FieldEmbeddings(nn.Module):
    """Vectors of categorical fields and of numbers.

    Id 0 is a missing value or padding, 1 a value that training did not have; known
    values begin at 2, as `mtjax.data.TableEncoder` numbers them. An id outside the
    vocabulary, negative or too large, counts as 1.

    Fields of one width lie in one array, `table_<width>` of the shape `(rows, width)`,
    field after field: a batch needs one gather for each width, not for each field.

    Attributes:
      vocabulary_sizes: number of rows of each field, ids 0 and 1 included, at least 2.
      width: of the vectors: one for all fields, or by field (mixed dimensions); None
        takes `embedding_width` of the vocabulary's size.
      columns: the fields that make up the columns of `categorical`, in their order; all
        of `vocabulary_sizes` if None. The others are for `embed`.
      shared: fields that have no table of their own, and the field whose they use.
      hashed: fields with an open vocabulary: every integer but 0 and 1 is a value, and
        `hash_ids` puts it into one of the rows from 2 on.
      numbers: how many numbers are read, 0 or more.
      number_width: 0 passes numbers through; otherwise each is multiplied by a learned
        vector of that width, and so becomes a field.
      zero_missing: whether id 0 has the zero vector, and not a learned one.
      embedding_init: of the tables and of the vectors of numbers.
      take: looks rows up; `mtjax.nn.take_sharded` for a table on several devices.
      row_multiple: tables get unused rows until this divides their number.

    Raises:
      ValueError: if attributes contradict each other or inputs have another number of
        columns.

    Example:
      >>> import jax
      >>> sizes = {"shop": 30, "brand": 6}
      >>> embeddings = FieldEmbeddings(sizes, width={"shop": 8, "brand": 4}, numbers=1)
      >>> ids, price = jnp.array([[3, 0], [29, -5]]), jnp.ones((2, 1))
      >>> variables = embeddings.init(jax.random.key(0), ids, price)
      >>> embeddings.apply(variables, ids, price).shape
      (2, 13)
      >>> history = jnp.array([[3, 4, 0], [7, 0, 0]])
      >>> embeddings.apply(variables, "shop", history, method="embed").shape
      (2, 3, 8)
    """

    vocabulary_sizes: Mapping[str, int]
    width: int | Mapping[str, int] | None = 16
    columns: tuple[str, ...] | None = None
    shared: Mapping[str, str] = FrozenDict()
    hashed: tuple[str, ...] = ()
    numbers: int = 0
    number_width: int = 0
    zero_missing: bool = False
    embedding_init: Initializer = nn.initializers.normal(0.05)
    take: Take = take_rows_of
    row_multiple: int = 1

    def setup(self) -> None:
        """Lays the fields out in tables."""
        self._check()
        self._widths = {name: self._width_of(name) for name in self.vocabulary_sizes}
        starts, rows = {}, {}
        for name, size in self.vocabulary_sizes.items():
            if name not in self.shared:
                table = f"table_{self._widths[name]}"
                starts[name] = rows.get(table, 0)
                rows[table] = starts[name] + size
        # Set at once: Linen freezes dictionaries that are attributes.
        self._starts = starts | {n: starts[owner] for n, owner in self.shared.items()}
        self.tables = {
            table: self.param(table, self.embedding_init, self._shape_of(table, number))
            for table, number in rows.items()
        }
        if self.numbers and self.number_width:
            shape = (self.numbers, self.number_width)
            self.number_vectors = self.param(
                "number_vectors", self.embedding_init, shape
            )

    def __call__(
        self,
        categorical: Int[Array | np.ndarray, "batch columns"],
        numeric: Float[Array | np.ndarray, "batch numbers"] | None = None,
    ) -> Float[Array, "batch features"]:
        """All vectors of an example side by side.

        Args:
          categorical: ids.
          numeric: finite numbers, best standardised; missing ones 0.

        Returns:
          The vectors of the columns in their order, then numbers or their vectors.
        """
        parts = self._fields(categorical)
        batch = categorical.shape[0]
        if len(set(map(self._widths.get, self._column_names))) == 1:
            parts = [parts[0].reshape(batch, -1)]
        else:
            parts = [part.reshape(batch, -1) for part in parts]
        numeric = self._checked_numbers(numeric)
        if self.numbers:
            vectors = self._number_fields(numeric) if self.number_width else numeric
            parts.append(vectors.reshape(batch, -1))
        return jnp.concatenate(parts, axis=-1)

    def stack(
        self,
        categorical: Int[Array | np.ndarray, "batch columns"],
        numeric: Float[Array | np.ndarray, "batch numbers"] | None = None,
    ) -> Float[Array, "batch fields width"]:
        """One vector per column and number, all of one width.

        Args:
          categorical: ids.
          numeric: as in `__call__`.

        Returns:
          The columns, then the numbers.

        Raises:
          ValueError: if widths differ, or numbers are passed through.
        """
        widths = {self._widths[name] for name in self._column_names}
        if self.numbers:
            widths.add(self.number_width)
        if len(widths) > 1:
            raise ValueError(
                "`width` and `number_width` must be the same for all fields to be "
                f"stacked, got {sorted(widths)}; 0 passes numbers through."
            )
        fields = self._fields(categorical)[0]
        numeric = self._checked_numbers(numeric)
        if not self.numbers:
            return fields
        return jnp.concatenate([fields, self._number_fields(numeric)], axis=1)

    def embed(
        self, field: str, ids: Int[Array | np.ndarray, "*shape"]
    ) -> Float[Array, "*shape width"]:
        """Vectors of one field: of histories, of several values, of all items.

        Args:
          field: its name.
          ids: of any shape.

        Returns:
          One vector per id.

        Raises:
          ValueError: if there is no such field.
        """
        if field not in self.vocabulary_sizes:
            raise ValueError(
                f"`field` must be one of {list(self.vocabulary_sizes)}, got {field!r}."
            )
        ids = jnp.asarray(ids)
        found = self._look_up((field,), ids[..., None])
        return found[..., 0, :]

    def row_numbers(
        self, categorical: Int[Array | np.ndarray, "batch columns"]
    ) -> dict[str, Int32[Array, "batch _"]]:
        """The rows of each table that a batch reads, for updates of these rows only.

        Args:
          categorical: ids.

        Returns:
          By name of a table, the row of every column of its width.
        """
        ids = self._checked_ids(categorical)
        return {
            f"table_{width}": self._rows(
                tuple(names),
                ids[:, np.array([self._column_names.index(n) for n in names])],
            )
            for width, names in self._groups().items()
        }

    @property
    def _column_names(self) -> tuple[str, ...]:
        return tuple(self.vocabulary_sizes if self.columns is None else self.columns)

    def _groups(self) -> dict[int, list[str]]:
        groups: dict[int, list[str]] = {}
        for name in self._column_names:
            groups.setdefault(self._widths[name], []).append(name)
        return groups

    def _fields(self, categorical: Array | np.ndarray) -> list[Array]:
        """One stack if all widths are the same; otherwise each column for itself."""
        ids = self._checked_ids(categorical)
        names = self._column_names
        groups = self._groups()
        if len(groups) == 1:
            return [self._look_up(names, ids)]
        vectors = {}
        for group in groups.values():
            places = np.array([names.index(name) for name in group])
            found = self._look_up(tuple(group), ids[:, places])
            vectors.update({name: found[:, i] for i, name in enumerate(group)})
        return [vectors[name] for name in names]

    def _look_up(self, names: tuple[str, ...], ids: Array) -> Array:
        """Vectors of fields of one width; `ids` have an entry per field at the end."""
        table = self.tables[f"table_{self._widths[names[0]]}"]
        vectors = self.take(table, self._rows(names, ids))
        if self.zero_missing:
            vectors = jnp.where(ids[..., None] == MISSING, 0.0, vectors)
        return vectors

    def _rows(self, names: tuple[str, ...], ids: Array) -> Array:
        lead = (1,) * (ids.ndim - 1)

        def per_field(values: list) -> Array:
            return jnp.asarray(np.array(values).reshape(*lead, -1))

        ids = ids.astype(jnp.int32)
        sizes = per_field([np.int32(self.vocabulary_sizes[n]) for n in names])
        rows = jnp.where((ids >= 0) & (ids < sizes), ids, UNKNOWN)
        if set(names) & set(self.hashed):
            one = [
                FIRST_KNOWN
                + hash_ids(
                    ids[..., i],
                    max(1, self.vocabulary_sizes[name] - FIRST_KNOWN),
                )
                if name in self.hashed
                else rows[..., i]
                for i, name in enumerate(names)
            ]
            reserved = (ids == MISSING) | (ids == UNKNOWN)
            rows = jnp.where(reserved, ids, jnp.stack(one, axis=-1))
        return rows + per_field([np.int32(self._starts[name]) for name in names])

    def _number_fields(self, numeric: Array) -> Array:
        return numeric[:, :, None] * self.number_vectors[None]

    def _checked_ids(self, categorical: Array | np.ndarray) -> Array:
        names = self._column_names
        if categorical.ndim != 2 or categorical.shape[1] != len(names):
            raise ValueError(
                f"`categorical` must have one column per field {list(names)}, got the "
                f"shape {categorical.shape}."
            )
        return jnp.asarray(categorical)

    def _checked_numbers(self, numeric: Array | np.ndarray | None) -> Array:
        found = 0 if numeric is None else numeric.shape[1]
        if found != self.numbers:
            raise ValueError(
                f"`numeric` must have `numbers` = {self.numbers} columns, got {found}."
            )
        return jnp.zeros((0, 0)) if numeric is None else jnp.asarray(numeric)

    def _shape_of(self, table: str, rows: int) -> tuple[int, int]:
        blocks = -(-rows // self.row_multiple)
        return blocks * self.row_multiple, int(table.removeprefix("table_"))

    def _width_of(self, name: str) -> int:
        if self.width is None:
            return embedding_width(self.vocabulary_sizes[name])
        return self.width if isinstance(self.width, int) else self.width[name]

    def _check(self) -> None:
        sizes = dict(self.vocabulary_sizes)
        named = {
            "columns": self._column_names,
            "shared": (*self.shared, *self.shared.values()),
            "hashed": self.hashed,
        }
        for argument, names in named.items():
            if strange := sorted(set(names) - set(sizes)):
                raise ValueError(
                    f"`{argument}` must name fields of `vocabulary_sizes` "
                    f"{list(sizes)}, got {strange}."
                )
        if not self._column_names or len(set(self._column_names)) < len(
            self._column_names
        ):
            raise ValueError(
                "`columns` must name at least one field, each once, got "
                f"{self._column_names!r}."
            )
        for name, size in sizes.items():
            least = FIRST_KNOWN + (name in self.hashed)
            if size < least:
                raise ValueError(
                    f"`vocabulary_sizes` must be at least {least} for {name!r}, got "
                    f"{size!r}: ids 0 and 1 have rows as well."
                )
        given = sizes if isinstance(self.width, int | None) else self.width
        if lacking := sorted(set(sizes) - set(given)):
            raise ValueError(f"`width` must be given for all fields, not {lacking}.")
        if min(self._width_of(name) for name in sizes) < 1:
            raise ValueError(f"`width` must be at least 1, got {self.width!r}.")
        if self.row_multiple < 1 or min(self.numbers, self.number_width) < 0:
            raise ValueError(
                "`row_multiple` must be at least 1, `numbers` and `number_width` not "
                f"negative, got {self.row_multiple!r}, {self.numbers!r} and "
                f"{self.number_width!r}."
            )
        for name, owner in self.shared.items():
            same = sizes[name] == sizes[owner]
            same &= self._width_of(name) == self._width_of(owner)
            if owner in self.shared or not same:
                raise ValueError(
                    f"`shared` must point to a field with a table of its own, of the "
                    f"same size and width; {name!r} to {owner!r} does not."
                )
