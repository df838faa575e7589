r"""TALL-masks and Consensus: which merged elements a task needs.

Localizing Task Information for Improved Model Merging and Compression, ICML 2024. The
knowledge of a fine-tuned model survives in the sum of all task vectors: one bit per
element and task, which says whether the sum helps this task, brings its model back.
Elements that at most one task wants are left out of the merged vector, which makes a
better merged model (Consensus Merging).

New here: `tall_mask`, the counts of `agreement` and the `consensus` of masks; the
stages `tall_masks`, which compresses models, and `consensus_merging`, which merges
them.

Uses: `mtjax.merging`: any `Merger` for the merged vector, `CompressedTasks` for the
result, `select_coefficient`.

Needs: fine-tuned models of one base, and a validation accuracy of each task
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from mtjax.merging import Merger, task_arithmetic
from mtjax.merging.compressed import CompressedTasks, apply_vector, task_vector
from mtjax.merging.consensus import wanted
from mtjax.merging.masks import masked, pack_mask
from mtjax.merging.match import Where, by_name, named_leaves, selected
from mtjax.merging.selection import GRID, Accuracy, MergedModel, select_coefficient

# One object: programs are compiled per object.
_SUM = task_arithmetic(1.0)


@dataclass(frozen=True)
class TallMasksConfig:
    r"""What is searched on validation data.

    Attributes:
      thresholds: :math:`\lambda_t \ge 0`, chosen per task. A single one needs no
        validation data.
      min_agreement: :math:`k \ge 0`, how many tasks must want an element that the
        consensus keeps: 1 drops what no task wants, 2 also what a single one wants.
      coefficients: :math:`\alpha` of the merged vector, chosen once for all tasks.
    """

    thresholds: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6)
    min_agreement: int = 2
    coefficients: tuple[float, ...] = GRID

    def __post_init__(self):
        """Checks the ranges."""
        if not self.thresholds or min(self.thresholds) < 0:
            raise ValueError(
                "`thresholds` must hold at least one number, none negative, got "
                f"{self.thresholds!r}."
            )
        if self.min_agreement < 0:
            raise ValueError(
                f"`min_agreement` must not be negative, got {self.min_agreement!r}."
            )


class TallMasks(NamedTuple):
    """What `tall_masks` finds.

    Attributes:
      compressed: base, merged vector and masks.
      thresholds: the one of every task.
      accuracies: on validation data, per task and threshold; empty without a search.
    """

    compressed: CompressedTasks
    thresholds: dict[str, float]
    accuracies: dict[str, dict[float, float]]


# --- Masks ----------------------------------------------------------------------------


@jax.jit
def tall_mask(
    vector: PyTree, merged: PyTree, threshold: float | Float[Array, ""]
) -> PyTree:
    r"""Where the merged vector is nearer to a task's own vector than zero is.

    .. math:: m_t = 1[\, |\tau_t| > \lambda_t |\tau - \tau_t| \,]

    strictly, in float32. With :math:`\lambda = 1` no other mask has a smaller error
    :math:`\|\theta_0 + m \odot \tau - \theta_t\|_1`; smaller ones keep more elements.

    Args:
      vector: :math:`\tau_t`, all of it; see `mtjax.merging.compressed.task_vector`.
      merged: :math:`\tau`, a tree alike: the sum of the task vectors, or of what a
        method leaves of them, without a coefficient.
      threshold: :math:`\lambda_t`, at least 0.

    Returns:
      A tree of booleans.

    Example:
      >>> vector, merged = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([2.0, 2.0])}
      >>> print(tall_mask(vector, merged, 0.4)["w"])
      [ True False]
    """

    def leaf(own: Float[Array, "..."], total: Float[Array, "..."]):
        return wanted(own.astype(jnp.float32), total.astype(jnp.float32), threshold)

    return jax.tree.map(leaf, vector, merged)


def agreement(masks: Sequence[PyTree]) -> PyTree:
    """How many tasks want every element.

    Args:
      masks: one tree of booleans per task.

    Returns:
      A tree of whole numbers: 0 if no task wants the element, though it is in the
      merged vector, 1 if it serves a single task, up to the number of tasks.
    """
    counts = [jax.tree.map(lambda x: x.astype(jnp.int32), mask) for mask in masks]
    return reduce(lambda a, b: jax.tree.map(jnp.add, a, b), counts)


def agreement_histogram(
    counts: PyTree, merged: PyTree, num_tasks: int, where: Where = None
) -> Float[np.ndarray, " counts"]:
    """Which fraction of elements is wanted by how many tasks.

    Args:
      counts: what `agreement` returned.
      merged: the merged vector. Elements where it is zero carry nothing, whatever the
        masks say (TIES leaves many of them), and do not count.
      num_tasks: T.
      where: leaves to look at, for a type of layers; see `Merger`.

    Returns:
      T + 1 fractions of the elements that are not zero, all 0 if there are none.
    """
    found = np.zeros(num_tasks + 1)
    carried = named_leaves(merged)
    for path, leaf in named_leaves(counts).items():
        if selected(path, where):
            values = np.asarray(leaf)[np.asarray(carried[path]) != 0]
            found += np.bincount(values, minlength=num_tasks + 1)
    return found / max(1, found.sum())


def consensus(counts: PyTree, min_agreement: int) -> PyTree:
    """Where at least so many tasks want an element.

    Args:
      counts: what `agreement` returned.
      min_agreement: 0 keeps everything, more than the number of tasks nothing.

    Returns:
      A tree of booleans.
    """
    return jax.tree.map(lambda count: count >= min_agreement, counts)


# --- Stages ---------------------------------------------------------------------------


def tall_masks(
    base: PyTree,
    models: Mapping[str, PyTree],
    accuracy: Accuracy | None = None,
    config: TallMasksConfig = TallMasksConfig(),
    *,
    merger: Merger | None = None,
    where: Where = None,
) -> TallMasks:
    r"""Compresses fine-tuned models: one merged vector, one bit per element and task.

    Every task gets the threshold with the best accuracy of its restored model on
    validation data, the first of equally good ones.

    A further model changes the merged vector and with it all masks: call this again
    with all models.

    Args:
      base: :math:`\theta_0`, the model that all were fine-tuned from.
      models: :math:`\theta_t` by task, trees like the base.
      accuracy: of parameters at a task, on validation data; never on test data.
      config: thresholds to try.
      merger: how to merge; by default the plain sum, `task_arithmetic(1.0)`. As
        published too: `ties(0.2, reduction="sum")`, and
        `chain(trim(0.1), task_arithmetic(1.0))`, where masks still compare with the
        whole :math:`\tau_t`. No coefficient belongs into it: it would change the masks.
      where: which leaves to merge: leave out heads, embeddings, statistics. They, and
        leaves that are not floating point, are restored from the base.

    Returns:
      The compressed tasks, the thresholds and what they were chosen by.

    Raises:
      ValueError: if models do not match, or there are several thresholds and no
        `accuracy`.

    Example:
      >>> base = {"w": jnp.zeros(3)}
      >>> models = {"a": {"w": jnp.array([1.0, 2.0, 0.0])},
      ...           "b": {"w": jnp.array([0.0, 2.0, 3.0])}}
      >>> found = tall_masks(base, models, config=TallMasksConfig(thresholds=(0.4,)))
      >>> print(found.compressed.restore("a")["w"])
      [1. 4. 0.]
    """
    if accuracy is None and len(config.thresholds) > 1:
        raise ValueError(
            "`accuracy` must be given to choose among several thresholds, got None and "
            f"{config.thresholds}; or fix one: `TallMasksConfig(thresholds=(0.4,))`."
        )
    how = _SUM if merger is None else merger
    merged = how.vector(base, models, where=where)
    masks, thresholds, accuracies = {}, {}, {}
    for task, model in by_name(models).items():
        vector = task_vector(base, model, where=where)
        scores = {}
        if accuracy is not None:
            for threshold in config.thresholds:
                taken = masked(merged, tall_mask(vector, merged, threshold))
                scores[threshold] = float(accuracy(apply_vector(base, taken), task))
        # `max` takes the first of equals.
        best = max(scores, key=scores.__getitem__, default=config.thresholds[0])
        masks[task] = pack_mask(tall_mask(vector, merged, best))
        thresholds[task], accuracies[task] = best, scores
    found = accuracies if accuracy is not None else {}
    return TallMasks(CompressedTasks(base, merged, masks), thresholds, found)


def consensus_vector(compressed: CompressedTasks, min_agreement: int = 2) -> PyTree:
    r"""The merged vector where enough tasks want it, 0 elsewhere.

    Args:
      compressed: from `tall_masks`, or loaded.
      min_agreement: :math:`k`; see `consensus`.

    Returns:
      :math:`1[c \ge k] \odot \tau`, a tree like the merged vector.
    """
    counts = agreement([compressed.mask(task) for task in compressed.tasks])
    return masked(compressed.vector, consensus(counts, min_agreement))


def consensus_merging(
    compressed: CompressedTasks,
    accuracy: Accuracy,
    single: Mapping[str, float],
    config: TallMasksConfig = TallMasksConfig(),
) -> MergedModel:
    r"""Merges into one ordinary model, without elements that too few tasks want.

    :math:`\theta_0 + \alpha \, 1[c \ge k] \odot \tau`, where :math:`c` counts the masks
    that take an element. Neither the task nor masks are needed at inference.

    Args:
      compressed: from `tall_masks`, or loaded.
      accuracy: of parameters at a task, on validation data.
      single: accuracies of the fine-tuned models, by task, on the same data.
      config: :math:`k` and the coefficients to try.

    Returns:
      The model, its coefficient and the scores of all.

    Raises:
      ValueError: as `select_coefficient`.
    """
    vector = consensus_vector(compressed, config.min_agreement)
    return select_coefficient(
        compressed.base, vector, accuracy, single, config.coefficients
    )
