r"""aTLAS: task vectors scaled per block for any objective.

Knowledge Composition using Task Vectors with Learned Anisotropic Scaling, NeurIPS 2024.
A frozen model plus a linear combination of task vectors, with one coefficient per
vector and parameter block, learns several tasks, forgets one, or learns a new one from
few labels or none; only the coefficients train.

New here: `compose`, with several parts per block (aTLAS x K), and its loss; `fit` for
any objective, with a judge who says where to stop; the objective of task addition and
negation, and their judges.

Uses: `mtjax.merging` (`merge`, coefficients by group, `learn`). Beside it, for other
uses of the paper: `mtjax.merging.bases` (budgets, random bases), `linearised`,
`disentanglement`; at test time `mtjax.losses` (`fixmatch_loss`, `simclr_loss`,
`reliable_entropy_loss`) and `mtjax.data.pseudo_labels`; `mtjax.nn.cache_adapter`.

Needs: fine-tunings of one base; any differentiable objective on its parameters
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from mtjax.losses.sharpness_aware import sharpness_aware
from mtjax.merging.coefficients import (
    Granularity,
    group_of,
    init_coefficients,
    merge_with_coefficients,
)
from mtjax.merging.learning import OnStep, learn
from mtjax.merging.match import named_leaves
from mtjax.merging.merger import add_up
from mtjax.merging.vectors import merge

LogitsFn = Callable[[PyTree, str, Any], Array]
"""`logits_fn(params, task, inputs)`, with the frozen head of the task."""

Objective = Callable[[PyTree, Any], Any]
"""`objective(params, batch)`, a scalar to be made small."""

Judge = Callable[[PyTree], float | None]
"""From parameters to a score, the larger the better, or None: stop before this."""

Coefficients = Mapping[str, Float[Array | np.ndarray, "models ..."]]
"""By group of leaves `(models,)`, or `(models, partitions)` if there are several."""


@dataclass(frozen=True)
class AtlasConfig:
    r"""What is learnt.

    Attributes:
      granularity: one coefficient per `"layer"` (every array) and vector, per `"task"`
        (isotropic), or a function from paths to names of groups of leaves.
      partitions: K. Every array is cut at random into so many parts of elements, each
        with its own coefficient.
      seed: of the parts.
      weights_only: only arrays of two and more axes take part; others stay as in the
        base. The official code does so for K > 1.
      penalty: :math:`\gamma` of the norm of the coefficients of a group, averaged over
        groups; 0.5 in the paper where it is used.
      order: p of that norm, at least 1.
      rho: radius of sharpness-aware minimisation in the coefficients, 0.05 for SAR.
    """

    granularity: Granularity = "layer"
    partitions: int = 1
    seed: int = 0
    weights_only: bool = False
    penalty: float = 0.0
    order: float = 1.0
    rho: float = 0.0

    def __post_init__(self):
        """Checks the ranges."""
        group_of(self.granularity)
        for name, least in {
            "partitions": 1,
            "penalty": 0,
            "order": 1,
            "rho": 0,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"`{name}` must be at least {least}, got {getattr(self, name)!r}."
                )


# --- Composition ----------------------------------------------------------------------


def zero_coefficients(
    base: PyTree, vectors: PyTree, config: AtlasConfig = AtlasConfig()
) -> dict[str, Float[Array, "models ..."]]:
    """Where learning starts: the base itself.

    Args:
      base: the model that all were fine-tuned from.
      vectors: what `mtjax.merging.task_vectors` returned, or `select`; of adapters too,
        with zeros (weights that were not trained) or None (leaves without a vector).
      config: what is learnt.

    Returns:
      Coefficients by group: models x groups x partitions numbers.

    Raises:
      ValueError: if the vectors do not fit to the base.

    Example:
      >>> base = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
      >>> vectors = jax.tree.map(lambda x: jnp.stack([x, -x, x]), base)
      >>> found = zero_coefficients(base, vectors, AtlasConfig(partitions=4))
      >>> {name: x.shape for name, x in found.items()}
      {'b': (3, 4), 'w': (3, 4)}
    """
    found = init_coefficients(base, _used(vectors, config), config.granularity, 0.0)
    if config.partitions == 1:
        return found
    return {g: jnp.tile(x[:, None], (1, config.partitions)) for g, x in found.items()}


def compose(
    base: PyTree,
    vectors: PyTree,
    coefficients: Coefficients,
    config: AtlasConfig = AtlasConfig(),
) -> PyTree:
    r"""The base plus scaled task vectors, differentiable in the coefficients.

    .. math:: \theta^j = \theta_0^j
              + \sum_i \sum_k \lambda_{ik}^j \, m_k^j \odot \tau_i^j

    Args:
      base: :math:`\theta_0`.
      vectors: :math:`\tau`; may be bfloat16, sums are float32.
      coefficients: :math:`\lambda`, as from `zero_coefficients`.
      config: what they were made with; :math:`m_k` are the masks of its parts.

    Returns:
      A tree like the base, in its dtypes.
    """
    vectors = _used(vectors, config)
    if config.partitions == 1:
        return merge_with_coefficients(base, vectors, coefficients, config.granularity)
    group = group_of(config.granularity)

    def change(path, rows):
        parts = partition(path, rows.shape[1:], config).ravel()
        wide = rows.reshape(len(rows), -1).astype(jnp.float32)
        # Combined for every part before elements choose: no copy of all vectors.
        each = jnp.asarray(coefficients[group(path)]).T @ wide
        own = parts[None] == jnp.arange(config.partitions)[:, None]
        return add_up(jnp.where(own, each, 0.0)).reshape(1, *rows.shape[1:])

    changes = [change(path, rows) for path, rows in named_leaves(vectors).items()]
    return merge(base, jax.tree.unflatten(jax.tree.structure(vectors), changes), 1.0)


def partition(
    path: str, shape: Sequence[int], config: AtlasConfig
) -> Int[Array, "..."]:
    """The part that every element of an array belongs to: the same in every call.

    Args:
      path: of the array.
      shape: of the array.
      config: how many parts, and their seed.

    Returns:
      Numbers from 0 to K - 1, drawn independently.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(path.encode()))
    return jax.random.randint(key, tuple(shape), 0, config.partitions)


# --- Objectives and judges ------------------------------------------------------------


def cross_entropies(logits_fn: LogitsFn, forget: Sequence[str] = ()) -> Objective:
    """The objective of task addition, and of negation if something is to be forgotten.

    Args:
      logits_fn: with the heads of all tasks.
      forget: tasks whose cross-entropy counts negatively. Then there is no lower bound:
        have controls in the batch, and stop by `negation_judge`.

    Returns:
      The sum over tasks, a function of parameters and of a batch of arrays
      `{task: {"inputs", "labels"}}`. In the paper the T tasks of addition share a
      batch: each has a T-th of it, and none may have nothing.
    """

    def objective(params, batch):
        losses = {}
        for task, part in batch.items():
            logits = logits_fn(params, task, part["inputs"]).astype(jnp.float32)
            entropy = optax.softmax_cross_entropy_with_integer_labels
            losses[task] = jnp.mean(entropy(logits, part["labels"]))
        return sum(-x if task in forget else x for task, x in losses.items())

    return objective


def addition_judge(
    accuracy: Callable[[PyTree, str], float], single: Mapping[str, float]
) -> Judge:
    """Mean accuracy relative to that of the fine-tuned models.

    Args:
      accuracy: of parameters at a task, on validation data.
      single: accuracies > 0 of the fine-tuned models on them, by task.

    Returns:
      The judge.
    """
    of = lambda params: [accuracy(params, task) / a for task, a in single.items()]
    return lambda params: float(np.mean(of(params)))


def negation_judge(
    accuracy: Callable[[PyTree, str], float],
    base: PyTree,
    target: str,
    controls: Sequence[str],
    keep: float = 0.95,
) -> Judge:
    """Prefers low accuracy of the target, and stops when a control has lost too much.

    Args:
      accuracy: of parameters at a task, on validation data.
      base: the model to compare with.
      target: the task to forget.
      controls: tasks to keep.
      keep: fraction of the base's accuracy that each of them must have.

    Returns:
      The judge.
    """
    least = {task: keep * accuracy(base, task) for task in controls}

    def judge(params):
        if any(accuracy(params, task) < limit for task, limit in least.items()):
            return None
        return -float(accuracy(params, target))

    return judge


# --- Learning -------------------------------------------------------------------------


def atlas_loss(
    coefficients: Coefficients,
    base: PyTree,
    vectors: PyTree,
    batch: Any,
    objective: Objective,
    config: AtlasConfig = AtlasConfig(),
) -> Float[Array, ""]:
    r"""The objective of the composed model, and the penalty.

    .. math:: L(\theta(\Lambda)) + \gamma \, \mathrm{mean}_j \|\lambda^j\|_p

    Args:
      coefficients: :math:`\Lambda`.
      base: see `compose`.
      vectors: see there.
      batch: what the objective takes.
      objective: :math:`L`.
      config: what is learnt.

    Returns:
      The loss; `jax.value_and_grad` of it is all that a loop of one's own needs.
    """
    loss = objective(compose(base, vectors, coefficients, config), batch)
    if config.penalty:
        norms = [_norm(jnp.ravel(x), config.order) for x in coefficients.values()]
        loss = loss + config.penalty * jnp.mean(jnp.stack(norms))
    return loss


def atlas_optimizer(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
) -> optax.GradientTransformation:
    """As published: clipped to norm 1, AdamW with a decay of 0.1, which is to the base.

    Args:
      learning_rate: 1e-3 for addition, test time and (times 2 to 10) negation; 1e-1
        with a cosine for few shots.

    Returns:
      The optimizer.
    """
    tx = optax.adamw(learning_rate, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


class Composed(NamedTuple):
    """What `fit` found.

    Attributes:
      params: the composed model.
      coefficients: its coefficients by group.
      step: after which they were taken.
      losses: `(steps,)`, each before its step.
      trajectory: `(steps + 1, models, ...)` by group, from zero to the end.
      scores: of the judge, by step.
    """

    params: PyTree
    coefficients: dict[str, np.ndarray]
    step: int
    losses: np.ndarray
    trajectory: dict[str, np.ndarray]
    scores: dict[int, float]


def fit(
    objective: Objective,
    base: PyTree,
    vectors: PyTree,
    batches: Iterable[Any],
    config: AtlasConfig = AtlasConfig(),
    *,
    steps: int,
    optimizer: optax.GradientTransformation | None = None,
    judge: Judge | None = None,
    every: int = 10,
    on_step: OnStep | None = None,
) -> Composed:
    """Learns coefficients for an objective; changes nothing in place.

    Args:
      objective: what is made small.
      base: see `compose`.
      vectors: see there. Never the vector of a task that is to be new.
      batches: trees of arrays, at least one per step.
      config: what is learnt.
      steps: at least one.
      optimizer: by default `atlas_optimizer()`.
      judge: chooses among the coefficients at the start and after every so many
        steps, up to the first that it refuses; the last of equally good ones. It looks
        when learning is over. By default the last ones are taken.
      every: how many steps.
      on_step: called with the number of the step and its loss.

    Returns:
      The composed model, its coefficients, and how they came about.

    Raises:
      ValueError: if there are fewer batches than steps, or none.
    """

    def loss_fn(values, frozen, batch):
        loss = atlas_loss(values, frozen[0], frozen[1], batch, objective, config)
        return loss, loss

    found = learn(
        sharpness_aware(loss_fn, config.rho) if config.rho else loss_fn,
        zero_coefficients(base, vectors, config),
        (base, vectors),
        batches,
        steps=steps,
        optimizer=atlas_optimizer() if optimizer is None else optimizer,
        on_step=on_step,
    )
    composed = jax.jit(partial(compose, config=config))
    at = lambda i: {group: x[i] for group, x in found.trajectory.items()}
    scores, chosen = {}, steps
    if judge is not None:
        chosen = 0
        for i in sorted({*range(0, steps + 1, every), steps}):
            score = judge(composed(base, vectors, at(i)))
            if score is None:
                break
            scores[i] = float(score)
            chosen = i if scores[i] >= scores[chosen] else chosen
    params = composed(base, vectors, at(chosen))
    return Composed(params, at(chosen), chosen, found.reports, found.trajectory, scores)


def _used(vectors: PyTree, config: AtlasConfig) -> PyTree:
    if not config.weights_only:
        return vectors
    return jax.tree.map(lambda rows: rows if rows.ndim > 2 else None, vectors)


def _norm(x: Float[Array, " numbers"], order: float) -> Float[Array, ""]:
    # Learning starts at zero, where the slope of a root would be NaN.
    total = jnp.sum(jnp.abs(x) ** order)
    return jnp.where(total > 0, jnp.where(total > 0, total, 1.0) ** (1 / order), 0.0)
