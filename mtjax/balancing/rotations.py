"""Rotations of a shared representation, one per task, that align its gradients."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PyTree = Any


def init_rotations(tasks: Sequence[str], size: int) -> dict[str, Array]:
    r"""Parameters of the rotation that leaves a representation as it is, for each task.

    A rotation is :math:`R = \exp(A - A^\top)`, so any :math:`A` is one.

    Args:
      tasks: names of the tasks.
      size: features that are rotated, all or the first of those of the representation.

    Returns:
      Per task :math:`A`, `(size, size)` float32, zero.

    Raises:
      ValueError: if `size` is less than two.

    Example:
      >>> {task: a.shape for task, a in init_rotations(["depth", "normal"], 3).items()}
      {'depth': (3, 3), 'normal': (3, 3)}
    """
    if size < 2:
        raise ValueError(f"`size` must be at least 2 for a rotation, got {size}.")
    return {task: jnp.zeros((size, size), jnp.float32) for task in tasks}


def rotated(
    encode: Callable[..., Float[Array, "*batch features"]],
    losses_from_representation: Callable[..., Mapping[str, Array]],
) -> tuple[Callable[..., Array], Callable[..., dict[str, Array]]]:
    r"""Shows each task the representation through a rotation of its own.

    The loss of task :math:`k` is that of :math:`R_k z`. The rotations do not learn from
    it, but minimise :math:`-\sum_n \langle R_k^\top \tilde g_{nk}, v_n \rangle`, where
    :math:`\tilde g_{nk}` is the gradient at :math:`R_k z_n` and :math:`v_n` the mean
    over the tasks of the gradients at :math:`z_n`, each task's divided by its norm on
    the batch: they turn all gradients towards the same direction.

    Args:
      encode: `encode(params, *args) -> z`; the last axis of `z` is rotated.
      losses_from_representation: `losses_from_representation(params, z, *args) ->
        {task: scalar loss}`.

    Returns:
      The same pair, for `mtjax.value_and_task_grads`, of parameters `{"model": params,
      "rotations": init_rotations(tasks, size)}`. Each task's rotation is a parameter of
      its own, whose gradient is that of the alignment. Give the rotations a slower
      optimizer than the model, with `optax.partition`.

    Raises:
      ValueError: at call time, if the rotations are not those of the losses' tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> encode = lambda params, x: x @ params
      >>> losses = lambda params, z, x: {"a": jnp.sum(z), "b": jnp.sum(z**2)}
      >>> encode, losses = rotated(encode, losses)
      >>> params = {"model": jnp.eye(2), "rotations": init_rotations("ab", 2)}
      >>> x = jnp.array([[1.0, 2.0]])
      >>> {t: float(loss) for t, loss in losses(params, encode(params, x), x).items()}
      {'a': 3.0, 'b': 5.0}

    References:
      RotoGrad: Gradient Homogenization in Multitask Learning, 2022, section 3.2, with
      the exponential map. The alignment adds nothing to the value of a loss, only its
      gradient.
    """

    def rotated_encode(params, *args, **kwargs):
        return encode(params["model"], *args, **kwargs)

    def rotated_losses(params, z, *args, **kwargs):
        def loss_of(task, model, z):
            return losses_from_representation(model, z, *args, **kwargs)[task]

        turns = {t: _rotation(a) for t, a in sorted(params["rotations"].items())}
        found = jax.eval_shape(
            lambda: losses_from_representation(params["model"], z, *args, **kwargs)
        )
        if set(found) != set(turns):
            raise ValueError(
                f"`rotations` must be those of the tasks {tuple(sorted(found))}, got "
                f"{tuple(turns)}; make them with `mtjax.init_rotations`."
            )
        model, at, fixed = jax.lax.stop_gradient((params["model"], z, turns))
        slopes = {
            t: jax.grad(functools.partial(loss_of, t, model))(_turn(at, fixed[t]))
            for t in turns
        }
        aim = sum(_unit(_turn(slopes[t], fixed[t].T)) for t in turns) / len(turns)
        losses = {}
        for task, turn in turns.items():
            against = -jnp.sum(_turn(slopes[task], turn.T) * aim).astype(jnp.float32)
            loss = loss_of(task, params["model"], _turn(z, fixed[task]))
            losses[task] = loss + (against - jax.lax.stop_gradient(against))
        return losses

    return rotated_encode, rotated_losses


def _rotation(a: Float[Array, "size size"]) -> Float[Array, "size size"]:
    return jax.scipy.linalg.expm(a - a.T)


def _turn(
    z: Float[Array, "*batch features"], rotation: Float[Array, "size size"]
) -> Float[Array, "*batch features"]:
    size = len(rotation)
    first = jnp.einsum(
        "...j,ij->...i",
        z[..., :size],
        rotation.astype(z.dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.concatenate([first, z[..., size:]], axis=-1)


def _unit(slopes: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
    # A task without labels in this batch has no direction.
    norm = jnp.linalg.norm(slopes.astype(jnp.float32))
    usable = jnp.isfinite(norm) & (norm > 0)
    return jnp.where(usable, slopes / jnp.where(usable, norm, 1.0), 0.0)
