r"""AdaMerging: merging coefficients learnt from unlabelled inputs.

AdaMerging: Adaptive Model Merging for Multi-Task Learning, ICLR 2024. Task arithmetic
needs one coefficient per task; AdaMerging learns it, per task or per layer and task, as
what makes the merged model most certain (lowest entropy) on inputs without labels.

New here: `fit` and its loss, `ties_vectors` for the "++" variants, and `collapsed`,
which says whether to trust the result.

Uses: `mtjax.merging` (`task_vectors`, coefficients by group, `learn`, `trim`,
`elect_sign`), `mtjax.losses.entropy_loss`, any optimizer.

Needs: fine-tunings of one base with their heads; unlabelled inputs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from mtjax import merging
from mtjax.losses import summed_entropies
from mtjax.merging.coefficients import (
    Coefficients,
    Granularity,
    effective_coefficients,
    group_of,
    init_coefficients,
    merge_with_coefficients,
)
from mtjax.merging.learning import OnStep, learn

LogitsFn = Callable[[PyTree, str, Any], Array]
"""`logits_fn(params, task, inputs)`, with the frozen head of the task."""


@dataclass(frozen=True)
class AdaMergingConfig:
    """What is learnt.

    Attributes:
      granularity: one coefficient per `"task"`, or per `"layer"` (every array of the
        base) and task; or a function from paths like `"block_0/mlp/kernel"` to names of
        groups of leaves, which share their coefficients.
      value: of every coefficient at the start, in [0, 1] if clamped.
      clamp: use coefficients clipped to [0, 1], which do not learn while outside. True
        as in the official code; a second public implementation does not clamp.
      normalise: see `entropy_loss`; False as published.
    """

    granularity: Granularity = "layer"
    value: float = 0.3
    clamp: bool = True
    normalise: bool = False

    def __post_init__(self):
        """Checks the ranges."""
        group_of(self.granularity)
        if self.clamp and not 0 <= self.value <= 1:
            raise ValueError(
                "`value` must be in [0, 1] where coefficients are clamped, got "
                f"{self.value!r}: nothing outside ever learns."
            )


def ties_vectors(vectors: PyTree, density: float = 0.2) -> PyTree:
    """Task vectors that do not contradict each other, for the "++" variants.

    TIES without its last step: the largest elements of every task vector stay, and of
    those the ones that agree with the sign of their sum over tasks.

    Args:
      vectors: what `mtjax.merging.task_vectors` returned.
      density: fraction of the whole vector that the first step keeps, in (0, 1].

    Returns:
      Vectors like these, still one per task.

    Example:
      >>> import jax.numpy as jnp
      >>> vectors = {"w": jnp.array([[4.0, 2.0, 0.1, 0.2], [-3.0, 1.0, 0.3, 0.1]])}
      >>> print(ties_vectors(vectors, density=0.5)["w"])
      [[4. 2. 0. 0.]
       [0. 1. 0. 0.]]
    """
    merger = merging.chain(merging.trim(density), merging.elect_sign())
    return merger.changed(vectors)


def adamerging_loss(
    coefficients: Coefficients,
    base: PyTree,
    vectors: PyTree,
    batch: Mapping[str, Any],
    logits_fn: LogitsFn,
    config: AdaMergingConfig = AdaMergingConfig(),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    r"""The sum of the entropies of all tasks: one merge, one forward pass per task.

    .. math:: \sum_k \mathrm{mean}_{x \in B_k} H(softmax(h_k(f_{\theta(\lambda)}(x))))

    Args:
      coefficients: :math:`\lambda` by group, before the clamp.
      base: see `merge_with_coefficients`.
      vectors: see there.
      batch: :math:`B`, inputs by task; they need not be all tasks that are merged.
      logits_fn: `logits_fn(params, task, inputs)`, with the frozen head of the task.
      config: what is learnt.

    Returns:
      The loss, and the entropy by task. `jax.value_and_grad` of it is all that a loop
      of one's own needs.
    """
    params = merge_with_coefficients(
        base, vectors, coefficients, config.granularity, clamp=config.clamp
    )
    logits = {task: logits_fn(params, task, x) for task, x in batch.items()}
    return summed_entropies(logits, normalise=config.normalise)


class Adapted(NamedTuple):
    """What `fit` found.

    Attributes:
      params: the merged model.
      effective: its coefficients by path, to be saved; see `effective_coefficients`.
      entropies: `(steps,)` by task, each before its step.
      trajectory: `(steps + 1, models)` by group, coefficients before the clamp from the
        start to the end.
    """

    params: PyTree
    effective: dict[str, Array]
    entropies: dict[str, np.ndarray]
    trajectory: dict[str, np.ndarray]


def fit(
    logits_fn: LogitsFn,
    base: PyTree,
    vectors: PyTree,
    batches: Iterable[Mapping[str, Any]],
    config: AdaMergingConfig = AdaMergingConfig(),
    *,
    steps: int = 500,
    optimizer: optax.GradientTransformation | None = None,
    on_step: OnStep | None = None,
) -> Adapted:
    """Learns merging coefficients from unlabelled inputs; changes nothing in place.

    Args:
      logits_fn: see `adamerging_loss`, like the next two.
      base: see there.
      vectors: see there.
      batches: at least one per step, with the same tasks in each.
      config: what is learnt.
      steps: at least one.
      optimizer: by default Adam with a learning rate of 1e-3, as published. Weight
        decay would pull the merged model to the base.
      on_step: called with the number of the step and its entropies by task.

    Returns:
      The merged model, its coefficients, and how they came about.

    Raises:
      ValueError: if there are fewer batches than steps, or none.
    """
    found = learn(
        lambda values, frozen, batch: adamerging_loss(
            values, frozen[0], frozen[1], batch, logits_fn, config
        ),
        init_coefficients(base, vectors, config.granularity, config.value),
        (base, vectors),
        batches,
        steps=steps,
        optimizer=optax.adam(1e-3) if optimizer is None else optimizer,
        on_step=on_step,
    )
    by_path = effective_coefficients(
        found.variables, vectors, config.granularity, clamp=config.clamp
    )
    params = merge_with_coefficients(base, vectors, by_path)
    return Adapted(params, by_path, found.reports, found.trajectory)


def collapsed(
    logits: Float[Array | np.ndarray, "examples classes"], limit: float = 0.9
) -> bool:
    """Whether a task names one class nearly always, which has a low entropy as well.

    Args:
      logits: of one task, for many inputs.
      limit: the largest share of predictions that a single class may have.

    Returns:
      The verdict; it means nothing if most inputs are of one class.
    """
    counts = np.bincount(np.argmax(np.asarray(logits), axis=-1))
    return bool(counts.max() > limit * counts.sum())
