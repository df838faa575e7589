"""Leaves of task vectors as the elements that are not zero."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sparse:
    """A parameter of which few elements are not zero: eight bytes for each of these.

    Attributes:
      values: `(elements,)`, those that are not zero.
      places: `(elements,)`, int32, where they stand when the parameter is read row by
        row.
      shape: of the parameter.
    """

    values: Array
    places: Array
    shape: tuple[int, ...] = field(metadata={"static": True})

    def dense(self) -> Float[Array, "..."]:
        """The parameter."""
        flat = jnp.zeros(math.prod(self.shape), self.values.dtype)
        return flat.at[self.places].set(self.values).reshape(self.shape)


def sparse(leaf: Float[Array, "..."]) -> Sparse:
    """The elements that are not zero, and where they are. Not inside `jax.jit`.

    Args:
      leaf: any array, such as one that `trim` or `dare` have been at.

    Returns:
      The same numbers.

    Example:
      >>> found = sparse(jnp.array([[0.0, 2.0], [0.0, 3.0]]))
      >>> print(found.values, found.places)
      [2. 3.] [1 3]
    """
    # On the host: elsewhere every number of elements would be compiled anew.
    flat = np.ravel(np.asarray(leaf))
    places = np.flatnonzero(flat)
    kept, where = jnp.asarray(flat[places]), jnp.asarray(places, jnp.int32)
    return Sparse(kept, where, np.shape(leaf))
