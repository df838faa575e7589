"""Chances of all steps of a chain so far, from those of each given the one before."""

import itertools
from collections.abc import Mapping, Sequence

from jaxtyping import Array, Float

from mtjax.losses.entire_space import product_of_chances


def chained_logits(
    logits: Mapping[str, Float[Array, " batch"]], chain: Sequence[str]
) -> dict[str, Float[Array, " batch"]]:
    r"""From the logits of each step given the one before to those of all steps so far.

    .. math:: P_t = \prod_{s \le t} \sigma(l_s)

    Args:
      logits: by task.
      chain: the tasks in order, at least one.

    Returns:
      The logits of :math:`P_t`, exact also where it is near 0 or 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> logits = {"click": jnp.zeros(1), "buy": jnp.zeros(1)}
      >>> print(jax.nn.sigmoid(chained_logits(logits, ("click", "buy"))["buy"]))
      [0.25]
    """
    found = {chain[0]: logits[chain[0]]}
    for before, task in itertools.pairwise(chain):
        chances = product_of_chances(found[before], logits[task])
        found[task] = chances.yes - chances.no
    return found
