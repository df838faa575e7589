r"""Concrete Subspace: a learnt mask in which task vectors agree.

Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion,
2023. One soft mask over the parameters, shared by all tasks, scales the elements of
their task vectors; it is learnt on unlabelled inputs, as the one under which a merging
method, adapted to it by an inner step, makes the most certain model.

New here: `draw_mask` (rescaled per array), `masked_vectors` and `masked_merge`; the
bi-level `meta_step` and stage 1, `fit_mask`. Stage 2 is AdaMerging's `fit`, unchanged,
on `masked_vectors`.

Uses: `mtjax.nn.concrete` for the mask, `mtjax.merging` for coefficients by group,
`entropy_loss`, the settings of AdaMerging.

Needs: fine-tunings of one base with their heads; unlabelled inputs
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from mtjax.losses import summed_entropies
from mtjax.merging import merge_with_coefficients, repeat_step
from mtjax.merging.coefficients import Coefficients, init_coefficients
from mtjax.merging.learning import OnStep
from mtjax.merging.match import Where, named_leaves, selected
from mtjax.merging.merger import leaf_key
from mtjax.nn.concrete import binary_concrete
from mtjax.systems.adamerging import AdaMergingConfig, LogitsFn

MaskKind = Literal["expected", "sample", "hard"]

_INNER, _OUTER = optax.adam(1.0), optax.adam(1e-3)  # as published


@dataclass(frozen=True)
class ConcreteConfig:
    r"""What is learnt, and how.

    Attributes:
      merging: the coefficients under the mask: of tasks or layers, where they start,
        whether they are clamped.
      inner: optimizer of the inner step on them; `None` for Concrete Task Arithmetic,
        where they stay. Adam with 1, as published, moves all by 1 in the first step.
      outer: optimizer of the mask's logits. With Adam they move by at most its rate
        times the number of steps.
      temperature: :math:`T > 0` of the mask.
      sampling: learn with samples of the mask; False: with :math:`\sigma(x)`.
      resample: another sample for the outer step than for the inner one, as in the
        official code; False as in a second public implementation.
      rescale: divide the mask of every array by its mean.
      where: leaves under the mask; others are merged whole. Like `Merger`'s.
    """

    merging: AdaMergingConfig = field(default_factory=AdaMergingConfig)
    inner: optax.GradientTransformation | None = _INNER
    outer: optax.GradientTransformation = _OUTER
    temperature: float = 0.5
    sampling: bool = True
    resample: bool = False
    rescale: bool = True
    where: Where = None


class ConcreteState(NamedTuple):
    """All that `fit_mask` carries from step to step, to be saved as it is.

    Attributes:
      logits: of the mask, a tree like the base; `None` where there is no mask.
      outer: state of their optimizer.
      coefficients: by group, after the last inner step; not clamped.
      inner: state of their optimizer; empty without inner steps.
      key: of the run, never changed: masks are drawn from it and `step`.
      step: number of steps taken.
    """

    logits: PyTree
    outer: optax.OptState
    coefficients: dict[str, Float[Array, " models"]]
    inner: optax.OptState
    key: Key[Array, ""]
    step: Int[Array, ""]


# --- Mask -----------------------------------------------------------------------------


def rescaled(mask: PyTree, eps: float = 1e-6) -> PyTree:
    """Divides every leaf by its mean, so that task vectors keep their expected size.

    Args:
      mask: numbers of at least 0.
      eps: smallest mean to divide by: a leaf with all gates closed stays 0.

    Returns:
      A tree of leaves with a mean of 1. The division is part of the gradient.

    Example:
      >>> print(rescaled({"w": jnp.array([0.0, 0.5, 1.0])})["w"])
      [0. 1. 2.]
    """
    return jax.tree.map(lambda m: m / jnp.maximum(jnp.mean(m), eps), mask)


def draw_mask(
    logits: PyTree,
    config: ConcreteConfig = ConcreteConfig(),
    kind: MaskKind = "expected",
    *,
    key: Key[Array, ""] | None = None,
) -> PyTree:
    r"""The mask, the same for all tasks.

    .. math:: m'_\ell = m_\ell / mean(m_\ell)

    Args:
      logits: :math:`x`, of a `ConcreteState`.
      config: temperature, and whether to rescale.
      kind: `"expected"`: :math:`m = \sigma(x)`, always the same; `"sample"`: see
        `binary_concrete`; `"hard"`: a sample of zeros and ones.
      key: for the last two. The same key gives the same mask, on any number of devices;
        every array has its own draws.

    Returns:
      A tree like the logits.

    Raises:
      ValueError: if the kind is unknown or needs a key.

    Example:
      >>> logits = {"w": jnp.array([-1.0, 0.0, 1.0])}
      >>> print(f"{draw_mask(logits)['w'][0]:.3f}")  # of a mean of 1
      0.538
      >>> print(draw_mask(logits, kind="hard", key=jax.random.key(1))["w"])
      [0.  1.5 1.5]
    """
    if kind not in ("expected", "sample", "hard"):
        raise ValueError(
            f"`kind` must be 'expected', 'sample' or 'hard', got {kind!r}."
        )
    if kind != "expected" and key is None:
        raise ValueError(
            f"`key` must be given for a mask of kind {kind!r}, such as "
            "`jax.random.key(0)`; only 'expected' draws nothing."
        )

    def leaf(path, x):
        own = leaf_key(key, path)
        if kind == "expected" or own is None:
            return jax.nn.sigmoid(x)
        return binary_concrete(x, config.temperature, hard=kind == "hard", key=own)

    leaves = [leaf(path, x) for path, x in named_leaves(logits).items()]
    mask = jax.tree.unflatten(jax.tree.structure(logits), leaves)
    return rescaled(mask) if config.rescale else mask


def masked_vectors(vectors: PyTree, mask: PyTree) -> PyTree:
    r"""The task vectors under the mask: what any merging method may be given.

    Args:
      vectors: :math:`\tau`, from `mtjax.merging.task_vectors`.
      mask: :math:`m'`, from `draw_mask`.

    Returns:
      :math:`m' \odot \tau_k` for all models, a tree like the vectors in their dtypes.
      `mtjax.merging.merge` of it with 1 for one model and 0 for the others tells what
      the mask leaves of this task.
    """

    def leaf(rows, m):
        if rows is None or m is None:
            return rows
        return (rows * m[None]).astype(rows.dtype)

    return jax.tree.map(leaf, vectors, mask, is_leaf=lambda x: x is None)


def masked_merge(
    base: PyTree,
    vectors: PyTree,
    mask: PyTree,
    coefficients: Coefficients,
    config: ConcreteConfig = ConcreteConfig(),
) -> PyTree:
    r"""The merged model, an ordinary one, differentiable in mask and coefficients.

    .. math:: \theta^\ell = \theta_0^\ell
        + m'^\ell \odot \sum_k \lambda_k^\ell \tau_k^\ell

    Args:
      base: :math:`\theta_0`, any pytree of arrays.
      vectors: :math:`\tau`, from `mtjax.merging.task_vectors`; may be bfloat16.
      mask: :math:`m'`, from `draw_mask`.
      coefficients: :math:`\lambda` by group, before the clamp.
      config: see there for `merging`.

    Returns:
      A tree like the base, in its dtypes.

    Raises:
      ValueError: if the coefficients do not fit.

    Example:
      >>> base, mask = {"w": jnp.ones(2)}, {"w": jnp.array([0.5, 1.5])}
      >>> vectors = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
      >>> print(masked_merge(base, vectors, mask, {"w": jnp.array([1.0, 0.5])})["w"])
      [1.5 2.5]
    """
    how = config.merging
    zeros = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x)), base)
    # Tasks share the mask: their sum is masked, which needs no second set of vectors.
    changes = merge_with_coefficients(
        zeros, vectors, coefficients, how.granularity, clamp=how.clamp
    )

    def leaf(start, rows, change, m):
        if rows is None:
            return start
        start = jnp.asarray(start)
        moved = start.astype(jnp.float32) + (change if m is None else m * change)
        return moved.astype(start.dtype)

    return jax.tree.map(leaf, base, vectors, changes, mask)


# --- Losses ---------------------------------------------------------------------------


def concrete_loss(
    mask: PyTree,
    coefficients: Coefficients,
    base: PyTree,
    vectors: PyTree,
    batch: Mapping[str, Any],
    logits_fn: LogitsFn,
    config: ConcreteConfig = ConcreteConfig(),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """AdaMerging's loss under a mask: the sum of the entropies of all tasks.

    Args:
      mask: see `masked_merge`.
      coefficients: see there.
      base: see there.
      vectors: see there.
      batch: unlabelled inputs by task; they need not be all tasks that are merged.
      logits_fn: `logits_fn(params, task, inputs)`, with the frozen head of the task.
      config: see `masked_merge`.

    Returns:
      The loss, and the entropy by task.
    """
    params = masked_merge(base, vectors, mask, coefficients, config)
    logits = {task: logits_fn(params, task, x) for task, x in batch.items()}
    return summed_entropies(logits, normalise=config.merging.normalise)


# --- Stage 1: the mask ----------------------------------------------------------------


def init_state(
    base: PyTree,
    vectors: PyTree,
    config: ConcreteConfig = ConcreteConfig(),
    *,
    key: Key[Array, ""],
) -> ConcreteState:
    """The state before the first step: all logits 0.

    Args:
      base: the model that all were fine-tuned from.
      vectors: what `mtjax.merging.task_vectors` returned.
      config: what is learnt.
      key: of all masks of the run.

    Returns:
      The state; one like it is what a checkpoint is restored into.

    Raises:
      ValueError: if the vectors do not fit to the base, or nothing is masked.
    """
    how, rows = config.merging, named_leaves(vectors)
    coefficients = init_coefficients(base, vectors, how.granularity, how.value)
    chosen = [path for path in rows if selected(path, config.where)]
    if not chosen:
        raise ValueError(
            f"`where` must choose at least one leaf to mask, got {config.where!r}; "
            f"paths look like {next(iter(rows))!r}."
        )
    leaves = [jnp.zeros(x.shape[1:]) if p in chosen else None for p, x in rows.items()]
    logits = jax.tree.unflatten(jax.tree.structure(vectors), leaves)
    inner = () if config.inner is None else config.inner.init(coefficients)
    outer, step = config.outer.init(logits), jnp.int32(0)
    return ConcreteState(logits, outer, coefficients, inner, key, step)


def meta_step(
    state: ConcreteState,
    base: PyTree,
    vectors: PyTree,
    batches: tuple[Mapping[str, Any], Mapping[str, Any]],
    logits_fn: LogitsFn,
    config: ConcreteConfig = ConcreteConfig(),
) -> tuple[ConcreteState, dict[str, Any]]:
    """Adapts the coefficients to the mask, then the mask to the coefficients.

    The coefficients start anew and take one inner step under a sample of the mask, on
    the first batch. The logits take one step with these coefficients, on the second
    batch. First-order: no gradient goes through the inner step. Pure, to be jitted.

    Args:
      state: from `init_state` or an earlier step.
      base: see `concrete_loss`.
      vectors: see there.
      batches: for the inner and for the outer step, different ones; only the second is
        looked at without inner steps.
      logits_fn: see `concrete_loss`.
      config: what is learnt.

    Returns:
      The next state, and a report: `entropies` by task before the outer step, and
      `clamped`, the share of coefficients outside [0, 1].
    """
    how, (first, second) = config.merging, batches
    kind = "sample" if config.sampling else "expected"
    draw = jax.random.fold_in(state.key, state.step)
    draws = jax.random.split(draw) if config.resample else (draw, draw)
    mask_of = lambda logits, key: draw_mask(logits, config, kind, key=key)

    coefficients: Any = init_coefficients(base, vectors, how.granularity, how.value)
    inner = state.inner
    if config.inner is not None:
        fixed = mask_of(state.logits, draws[0])
        slopes, _ = jax.grad(concrete_loss, argnums=1, has_aux=True)(
            fixed, coefficients, base, vectors, first, logits_fn, config
        )
        updates, inner = config.inner.update(slopes, inner, coefficients)
        coefficients = optax.apply_updates(coefficients, updates)

    def outer_loss(logits):
        return concrete_loss(
            mask_of(logits, draws[1]),
            *(coefficients, base, vectors, second, logits_fn, config),
        )

    slopes, entropies = jax.grad(outer_loss, has_aux=True)(state.logits)
    updates, outer = config.outer.update(slopes, state.outer, state.logits)
    logits = optax.apply_updates(state.logits, updates)
    new = ConcreteState(logits, outer, coefficients, inner, state.key, state.step + 1)
    values = jnp.concatenate([*coefficients.values()])
    outside = jnp.mean((values < 0) | (values > 1))
    return new, {"entropies": entropies, "clamped": outside}


def fit_mask(
    logits_fn: LogitsFn,
    base: PyTree,
    vectors: PyTree,
    batches: Iterable[Mapping[str, Any]],
    state: ConcreteState,
    config: ConcreteConfig = ConcreteConfig(),
    *,
    steps: int = 1000,
    on_step: OnStep | None = None,
) -> tuple[ConcreteState, dict[str, Any]]:
    """Learns the mask from unlabelled inputs; changes nothing in place.

    Args:
      logits_fn: see `concrete_loss`, like the next two.
      base: see there.
      vectors: see there.
      batches: two per step, one without inner steps, with the same tasks in each.
      state: from `init_state`, or from an earlier call, to go on from there.
      config: the one of the state.
      steps: at least one.
      on_step: called with the number of the step in this call and its report.

    Returns:
      The state after the last step, and the reports of all, stacked: `(steps,)`.

    Raises:
      ValueError: if there are too few batches, or no steps.
    """
    rest = iter(batches)
    pairs = ((x, x) for x in rest) if config.inner is None else zip(rest, rest)
    return repeat_step(
        lambda now, f, pair: meta_step(now, f[0], f[1], pair, logits_fn, config),
        state,
        (base, vectors),
        pairs,
        steps=steps,
        on_step=on_step,
    )
