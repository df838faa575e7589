"""Auto-Lambda: loss weights by a look at held-out data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtjax.balancing.balancer import balancer
from mtjax.balancing.bilevel import for_optimizer, held_out_slopes, params_of
from mtjax.balancing.learnt import train_per_task


class AutoLambdaState(NamedTuple):
    """State of `auto_lambda`.

    Attributes:
      weights: `(tasks,)` float32, the loss weights.
      opt_state: state of their optimizer.
    """

    weights: Array
    opt_state: Any


def auto_lambda(
    num_tasks: int,
    *,
    primary: Sequence[str] | None = None,
    inner_learning_rate: float = 0.1,
    optimizer: optax.GradientTransformation | None = None,
    start: float = 0.1,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs tasks by how much a step on each helps held-out data of primary tasks.

    The weights :math:`\lambda` minimise :math:`\sum_{s \in P} L_s^{\text{val}}
    (\theta')` after a virtual step :math:`\theta' = \theta - \alpha \sum_t \lambda_t
    g_t` on all parameters, by their exact slope
    :math:`-\alpha \langle g_t, \sum_{s \in P} \nabla L_s^{\text{val}}(\theta')
    \rangle`: a task whose gradient opposes that of the held-out losses loses weight.
    The new weights scale the losses, on shared and on task-specific parameters alike.

    Args:
      num_tasks: number of tasks.
      primary: names of the tasks :math:`P` that matter; all of them if not given.
      inner_learning_rate: :math:`\alpha`, positive; of the model's optimizer in the
        paper.
      optimizer: of :math:`\lambda`; Adam with learning rate 1e-4 if not given.
      start: the first weights.

    Returns:
      A balancer with state. Needs `validation_losses_fn` and `params`. Costs two
      backward passes and one forward pass on the batch, and one of each on held-out
      data, whatever the number of tasks. Weights are not normalised and may become
      negative.

    Raises:
      ValueError: if an argument is out of its range, or what is needed is not passed to
        the update.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = auto_lambda(2, optimizer=optax.sgd(1.0), inner_learning_rate=1.0)
      >>> grads = jnp.array([[1.0, 0.0], [0.0, -1.0]])
      >>> held_out = lambda params: {"0": params[0], "1": params[1]}
      >>> updates, state = tx.update(
      ...     grads, tx.init(None), jnp.zeros(2), validation_losses_fn=held_out
      ... )
      >>> print(state.weights)
      [ 1.1 -0.9]

    References:
      Auto-Lambda: Disentangling Dynamic Task Relationships, 2022, equations 3 to 6. The
      public code takes a finite difference of the mixed derivative, which is exact
      here, and adds momentum and weight decay to the virtual step. An absent task
      counts neither in the batch nor on held-out data.
    """
    if inner_learning_rate <= 0:
        raise ValueError(
            f"`inner_learning_rate` must be positive, got {inner_learning_rate}."
        )
    if primary is not None and (isinstance(primary, str) or not primary):
        raise ValueError(
            f"`primary` must name at least one task in a sequence, got {primary!r}; "
            "pass None for all tasks."
        )
    optimizer = optax.adam(1e-4) if optimizer is None else optimizer

    def init(params):
        del params
        weights = jnp.full(num_tasks, start, jnp.float32)
        return AutoLambdaState(weights, optimizer.init(weights))

    def chosen(tasks):
        names = tasks if primary is None else primary
        if not set(names) <= set(tasks):
            raise ValueError(
                f"`primary` must name tasks among {tasks}, got {tuple(names)}."
            )
        return jnp.array([float(task in names) for task in tasks])

    def update(grads, state, step):
        (slopes,) = held_out_slopes(
            grads,
            step,
            params_of(step, "auto_lambda"),
            state.weights,
            chosen(grads.tasks)[None],
            inner_learning_rate,
        )
        slopes = for_optimizer(slopes)
        moves = step.present & jnp.isfinite(slopes)
        new = AutoLambdaState(
            *train_per_task(optimizer, slopes, state.weights, state.opt_state, moves)
        )
        return grads.scale(new.weights).combine(), new

    return balancer(
        "auto_lambda",
        init,
        update,
        num_tasks=num_tasks,
        needs=("validation_losses_fn",),
    )
