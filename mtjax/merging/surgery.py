"""Representation surgery: a merged model's features, corrected for every task."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from mtjax.merging.learning import OnStep, repeat_step

Bottleneck = dict[str, Array]
"""`down`, `(width, rank)`, and `up`, `(rank, width)`."""

FeaturesFn = Callable[[PyTree, Any], Array]
"""From parameters of an encoder and inputs to features, `(batch, width)`."""


def init_surgery(
    tasks: Sequence[str], width: int, rank: int = 16, *, key: Key[Array, ""]
) -> dict[str, Bottleneck]:
    """Corrections that change nothing yet.

    Args:
      tasks: their names.
      width: of the features.
      rank: of every correction, at least 1.
      key: of the projections down; those up are zero.

    Returns:
      A bottleneck per task.

    Raises:
      ValueError: if the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank!r}.")
    down = jax.nn.initializers.lecun_normal()
    keys = dict(zip(sorted(tasks), jax.random.split(key, len(tasks))))
    return {
        task: {"down": down(keys[task], (width, rank)), "up": jnp.zeros((rank, width))}
        for task in keys
    }


def operate(
    bottleneck: Bottleneck, features: Float[Array, "*batch width"]
) -> Float[Array, "*batch width"]:
    r"""Takes away what merging did to the features of one task.

    $$z' = z - W_{up} \max(0, W_{down} z)$$

    Args:
      bottleneck: of the task, which must be known.
      features: $z$, of the merged model.

    Returns:
      Features for the task's head.

    Example:
      >>> bottleneck = {"down": jnp.eye(2), "up": 0.5 * jnp.eye(2)}
      >>> print(operate(bottleneck, jnp.array([4.0, -2.0])))
      [ 2. -2.]
    """
    return features - jax.nn.relu(features @ bottleneck["down"]) @ bottleneck["up"]


def surgery_loss(
    bottlenecks: Mapping[str, Bottleneck],
    merged: Mapping[str, Float[Array, "_ width"]],
    own: Mapping[str, Float[Array, "_ width"]],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """How far corrected features are from those of the tasks' own models.

    Args:
      bottlenecks: by task.
      merged: features of the merged model, by task.
      own: of the fine-tuned models, of the same inputs.

    Returns:
      The sum over tasks of the mean absolute difference, and the terms of it.
    """
    gaps = {
        task: jnp.mean(jnp.abs(operate(bottlenecks[task], z) - own[task]))
        for task, z in merged.items()
    }
    return jnp.sum(jnp.stack([*gaps.values()])), gaps


class Operated(NamedTuple):
    """What `fit_surgery` found.

    Attributes:
      bottlenecks: by task, for `operate`.
      gaps: `(steps,)` by task, the terms of the loss, each before its step.
    """

    bottlenecks: dict[str, Bottleneck]
    gaps: dict[str, np.ndarray]


def fit_surgery(
    features_fn: FeaturesFn,
    merged: PyTree,
    models: Mapping[str, PyTree],
    bottlenecks: Mapping[str, Bottleneck],
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int = 1000,
    optimizer: optax.GradientTransformation | None = None,
    on_step: OnStep | None = None,
) -> Operated:
    """Learns corrections from inputs without labels; encoders stay as they are.

    Args:
      features_fn: runs an encoder.
      merged: parameters of the merged encoder.
      models: those of the fine-tuned encoders, by task; not needed afterwards.
      bottlenecks: from `init_surgery`.
      batches: inputs by task, at least one batch per step.
      steps: at least one.
      optimizer: by default Adam with a learning rate of 1e-3, as published.
      on_step: see `mtjax.merging.learning.repeat_step`.

    Returns:
      The corrections, and the gaps on the way.

    Raises:
      ValueError: if there are fewer batches than steps.

    References:
      Yang et al., "Representation Surgery for Multi-Task Model Merging", ICML, 2024.
    """
    tx = optax.adam(1e-3) if optimizer is None else optimizer

    def step(state, encoders, batch):
        (now, opt_state), (merged, models) = state, encoders
        seen = {task: features_fn(merged, x) for task, x in batch.items()}
        own = {task: features_fn(models[task], x) for task, x in batch.items()}
        slopes, gaps = jax.grad(surgery_loss, has_aux=True)(now, seen, own)
        updates, opt_state = tx.update(slopes, opt_state, now)
        return (optax.apply_updates(now, updates), opt_state), gaps

    start = dict(bottlenecks)
    (found, _), gaps = repeat_step(
        step,
        (start, tx.init(start)),
        (merged, dict(models)),
        map(dict, batches),
        steps=steps,
        on_step=on_step,
    )
    return Operated(found, dict(gaps))
