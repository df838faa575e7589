"""EMR: elect one vector for all tasks, mask and rescale it for each."""

from collections.abc import Mapping, Sequence
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from mtjax.merging.compressed import CompressedTasks, task_vector
from mtjax.merging.masks import masked, pack_mask
from mtjax.merging.match import Where, by_name
from mtjax.merging.merger import Leaf, Merger, add_up, step


def emr(
    base: PyTree,
    models: Mapping[str, PyTree] | Sequence[PyTree],
    *,
    where: Where = None,
) -> CompressedTasks:
    r"""One unified task vector, and a mask and a factor per task, without any data.

    $$
    \tau = \gamma \max_{t: \gamma \tau_t > 0} |\tau_t|, \quad
    m_t = 1[\tau_t \tau > 0], \quad s_t = \|\tau_t\|_1 / \|m_t \odot \tau\|_1
    $$

    with $\gamma = \mathrm{sign}(\sum_t \tau_t)$ for every element, -1 where the sum
    is 0. What `restore` adds to the base has the 1-norm of the task vector. The task
    must be known at inference, as with TALL-masks.

    Args:
      base: $\theta_0$, the model that all were fine-tuned from.
      models: $\theta_t$ by name, or in a sequence (then `"0"`, `"1"`…).
      where: which leaves; see `Merger`.

    Returns:
      The tasks in compressed form. A task whose elements all lost the election gets the
      base, with factor 1.

    Raises:
      ValueError: if models do not match the base.

    Example:
      >>> base = {"w": jnp.zeros(3)}
      >>> models = {
      ...     "a": {"w": jnp.array([1.0, 2.0, -1.0])},
      ...     "b": {"w": jnp.array([3.0, -1.0, -1.0])},
      ... }
      >>> tasks = emr(base, models)
      >>> print(tasks.vector["w"], tasks.restore("b")["w"])
      [ 3.  2. -1.] [ 3.75  0.   -1.25]

    References:
      Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging", NeurIPS
      2024.
    """
    vector = _UNIFIED.vector(base, models, where=where)
    masks, scales = {}, {}
    for task, model in by_name(models).items():
        own = task_vector(base, model, where=where)
        mask = _same_sign(own, vector)
        norm = _one_norm(masked(vector, mask))
        masks[task] = pack_mask(mask)
        scales[task] = _one_norm(own) / norm if norm > 0 else 1.0
    return CompressedTasks(base, vector, masks, scales)


def unified() -> Merger:
    """The elected sign of every element, with the largest size among those that agree.

    Returns:
      The method; also a step for `chain`.
    """

    def apply(leaf: Leaf):
        sign = jnp.where(add_up(leaf.vectors) > 0, 1.0, -1.0)
        agreeing = jnp.maximum(leaf.vectors * sign[None], 0)
        return sign * reduce(jnp.maximum, jnp.unstack(agreeing))

    return step(apply)


# One object: programs are compiled per object.
_UNIFIED = unified()


@jax.jit
def _same_sign(own: PyTree, vector: PyTree) -> PyTree:
    # A product of two small numbers would underflow to 0.
    return jax.tree.map(lambda x, y: jnp.sign(x) * jnp.sign(y) > 0, own, vector)


def _one_norm(tree: PyTree) -> float:
    """In float64 on the host: float32 loses digits over many elements."""
    sums = [np.abs(np.asarray(x)).sum(dtype=np.float64) for x in jax.tree.leaves(tree)]
    return float(sum(sums))
