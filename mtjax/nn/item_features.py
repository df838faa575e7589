"""Vectors of what is known about items: categories, flags and words."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

from mtjax.nn.fields import FieldEmbeddings
from mtjax.nn.pooling import mean_pool

Items = Mapping[str, Any]
"""Rows of a catalogue: `categorical`, `multi_hot` and `tokens` as `Catalogue` says, and
`numeric` if there are numbers, standardised, of shape `(items, numbers)`."""


def take_items(items: Items, rows: Int[Array | np.ndarray, " n"]) -> dict[str, Any]:
    """Some rows of a catalogue."""
    return jax.tree.map(lambda x: jnp.asarray(x)[rows], dict(items))


class ItemFeatures(nn.Module):
    """One vector per feature of an item, all of one width.

    A field has a table. Flags and texts are the mean of the vectors of their values. A
    feature without a value (id 0, no flag, no word) has a vector of its own.

    Attributes:
      vocabulary_sizes: rows of each field and text, as in `mtjax.data.Catalogue`.
      fields: the columns of `categorical`, in their order.
      numbers: the columns of `numeric`; each is multiplied by a learned vector.
      multi_hot: number of values, by name of the flags.
      texts: names of the texts.
      width: of every vector.
      zero_missing: whether a missing feature has the zero vector, not a learned one.
      std: standard deviation of the first vectors.

    Raises:
      ValueError: if there is no field, or inputs lack a feature.

    Example:
      >>> import jax
      >>> sizes = {"brand": 9, "name": 50}
      >>> features = ItemFeatures(
      ...     sizes, ("brand",), multi_hot={"tags": 4}, texts=("name",), width=8
      ... )
      >>> items = {
      ...     "categorical": jnp.array([[3], [0]]),
      ...     "multi_hot": {"tags": jnp.array([[1.0, 0.0, 1.0, 0.0], [0.0] * 4])},
      ...     "tokens": {"name": jnp.array([[7, 8, 0], [0, 0, 0]])},
      ... }
      >>> variables = features.init(jax.random.key(0), items)
      >>> features.apply(variables, items).shape, features.names
      ((2, 3, 8), ('brand', 'tags', 'name'))
    """

    vocabulary_sizes: Mapping[str, int]
    fields: tuple[str, ...]
    numbers: tuple[str, ...] = ()
    multi_hot: Mapping[str, int] = FrozenDict()
    texts: tuple[str, ...] = ()
    width: int = 32
    zero_missing: bool = False
    std: float = 0.05

    @property
    def names(self) -> tuple[str, ...]:
        """The features, in the order of the vectors."""
        return (*self.fields, *self.numbers, *self.multi_hot, *self.texts)

    @nn.compact
    def __call__(self, items: Items) -> Float[Array, "items features width"]:
        """The vectors of some items.

        Args:
          items: rows of a catalogue; what the model does not name is not read.

        Returns:
          For each item the fields, then numbers, flags and texts.
        """
        self._check(items)
        init = nn.initializers.normal(self.std)
        sizes = {name: self.vocabulary_sizes[name] for name in self.fields + self.texts}
        embeddings = FieldEmbeddings(
            sizes,
            self.width,
            columns=self.fields,
            numbers=len(self.numbers),
            number_width=self.width if self.numbers else 0,
            zero_missing=self.zero_missing,
            embedding_init=init,
            name="embeddings",
        )
        numeric = items["numeric"] if self.numbers else None
        vectors = [embeddings.stack(items["categorical"], numeric)]
        for name, values in self.multi_hot.items():
            table = self.param(f"flags_{name}", init, (values, self.width))
            flags = jnp.asarray(items["multi_hot"][name])
            count = jnp.sum(flags, axis=1, keepdims=True)
            pooled = flags @ table / jnp.maximum(count, 1.0)
            if not self.zero_missing:
                missing = self.param(f"missing_{name}", init, (1, self.width))
                pooled = jnp.where(count > 0, pooled, missing)
            vectors.append(pooled[:, None])
        for name in self.texts:
            words = jnp.asarray(items["tokens"][name])
            there = words > 0
            every = embeddings.embed(name, words)
            pooled = mean_pool(every, there)
            # Without words all places hold id 0: its vector is that of a missing text.
            pooled = jnp.where(there.any(axis=1, keepdims=True), pooled, every[:, 0])
            vectors.append(pooled[:, None])
        return jnp.concatenate(vectors, axis=1)

    def _check(self, items: Items) -> None:
        for kind, names in (("multi_hot", self.multi_hot), ("tokens", self.texts)):
            if lacking := sorted(set(names) - set(items.get(kind, {}))):
                raise ValueError(
                    f"`items` must hold the features {list(self.names)}, {lacking} are "
                    f"missing in {kind!r}; fill them with 0 if nothing is known."
                )
