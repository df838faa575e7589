"""Behaviour sequences of several kinds, in one array."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def stacked_histories(
    sequences: Mapping[str, tuple[Array, Array | np.ndarray]], kinds: Sequence[str]
) -> tuple[Float[Array, "batch kinds length width"], Bool[Array, "batch kinds length"]]:
    """Puts the sequences of all behaviours in one array.

    Args:
      sequences: items `(batch, length, width)` and mask `(batch, length)` by behaviour,
        each with a length of its own; a behaviour that is missing is empty for all.
      kinds: all behaviours, in the order of the model.

    Returns:
      Items and mask, padded behind to the longest.

    Raises:
      ValueError: if there is no sequence, or one of an unknown behaviour.

    Example:
      >>> liked = jnp.ones((2, 3, 4)), jnp.ones((2, 3), bool)
      >>> items, mask = stacked_histories({"liked": liked}, ("liked", "bought"))
      >>> items.shape, mask.any((0, 2)).tolist()
      ((2, 2, 3, 4), [True, False])
    """
    if not sequences or not set(sequences) <= set(kinds):
        raise ValueError(
            f"`sequences` must name at least one of the `kinds` {tuple(kinds)} and no "
            f"other, got {sorted(sequences)}."
        )
    longest = max(mask.shape[1] for _, mask in sequences.values())
    some, _ = next(iter(sequences.values()))
    empty = some[:, :0], jnp.zeros((len(some), 0), bool)
    items, masks = [], []
    for kind in kinds:
        x, mask = sequences.get(kind, empty)
        behind = (0, longest - mask.shape[1])
        items.append(jnp.pad(x, ((0, 0), behind, (0, 0))))
        masks.append(jnp.pad(jnp.asarray(mask), ((0, 0), behind)))
    return jnp.stack(items, axis=1), jnp.stack(masks, axis=1)
