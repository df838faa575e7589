"""One training step: task gradients, balancer, optimizer, all in one jitted call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtjax.gradients import value_and_task_grads
from mtjax.gradients.value_and_task_grads import EngineName
from mtjax.training.accumulation import accumulated, unpack
from mtjax.training.state import TrainState
from mtjax.transforms import freeze_absent

StepFn = Callable[..., tuple[TrainState, dict[str, Any]]]


def make_train_step(
    losses_fn: Any,
    tx: optax.GradientTransformation,
    *,
    with_model_state: bool = False,
    with_key: bool = False,
    has_aux: bool = False,
    accumulate: int = 1,
    skip_not_finite: bool = True,
    shared: Callable[[str], bool] | None = None,
    engine: EngineName = "auto",
    donate: bool = True,
    state_sharding: Any = None,
    axis_name: str | None = None,
) -> StepFn:
    """Builds ``step(state, batch, ...) -> (state, metrics)``.

    Besides the state and the batch the step takes, in this order or by name:
    ``present``, a bool array of shape ``(tasks,)`` in the order of the sorted task
    names; ``resampled``, a sequence of further batches, drawn independently of the
    first, for balancers such as `mtjax.modo`; and ``validation``, a batch of held-out
    data for balancers such as `mtjax.auto_lambda`. Only ``batch`` changes the model
    state, and only its losses are reported.

    The step passes ``losses``, ``present``, ``key``, ``losses_fn``, ``resampled`` (task
    gradients) and ``validation_losses_fn`` on to every transform of ``tx``. Tasks that
    are not ``present`` leave their own parameters and those parameters' moments
    bit-identical (`mtjax.transforms.freeze_absent`).

    Args:
      losses_fn: ``losses_fn(params, batch) -> {task: scalar loss}``, or the pair that
        `mtjax.value_and_task_grads` takes. With the flags below it gets the keyword
        arguments ``model_state`` and ``key`` and returns more.
      tx: a balancer followed by an optimizer, such as
        ``optax.chain(mtjax.pcgrad(), optax.adam(1e-3))``.
      with_model_state: ``losses_fn(..., model_state=...)`` returns
        ``(losses, model_state)``.
      with_key: ``losses_fn(..., key=...)`` gets a key of its own in every step; the
        balancer gets another one. Both are folded from ``state.key`` and
        ``state.step``, so that a resumed run draws the same numbers.
      has_aux: ``losses_fn`` returns ``(losses, aux)``, or
        ``(losses, (model_state, aux))``; ``aux`` appears in the metrics.
      accumulate: number of micro-batches, at least 1. The leading axis of every array
        in the batch is divided, and each loss is averaged over the micro-batches before
        anything looks at it: a balancer sees per-task gradients of the whole batch.
        Memory of activations shrinks; model state passes from one micro-batch to the
        next; ``aux`` gets a leading micro-batch axis. Losses that are means over a
        varying number of labelled examples weigh micro-batches, not examples, alike.
        Further batches and held-out data are divided in the same way.
      skip_not_finite: if the loss of a present task or any update is not finite, keep
        ``params``, ``opt_state`` and ``model_state`` and count the step in ``skipped``.
      shared: see `mtjax.value_and_task_grads`.
      engine: see `mtjax.value_and_task_grads`.
      donate: reuse the memory of the given state, which cannot be used afterwards.
      state_sharding: a `TrainState` of shardings that the new state keeps, such as
        `fully_sharded` gives; by default the compiler decides.
      axis_name: call the step inside ``jax.shard_map`` over this axis, with the state
        replicated and all batches split. Per-task gradients, losses and the floating
        parts of the model state are averaged over devices, ``key`` differs between
        devices, ``aux`` stays what each device computed. The step is then not jitted:
        jit the mapped function.

    Returns:
      The step. ``metrics`` holds ``losses`` (per task, before the update),
      ``update_norm`` (global norm of what was added to the parameters, 0 if skipped),
      ``skipped`` (the count so far) and, with ``has_aux``, ``aux``.

    Raises:
      ValueError: if ``accumulate`` is less than 1, if a batch cannot be divided by it,
        or if it is combined with a pair of functions.
      TypeError: if ``resampled`` is one batch instead of a sequence of batches.

    Example:
      >>> import mtjax
      >>> def losses_fn(params, batch):
      ...     return {
      ...         "a": jnp.mean((batch - params["w"]) ** 2),
      ...         "b": jnp.mean((params["w"] + 1.0) ** 2),
      ...     }
      >>> tx = optax.chain(mtjax.pcgrad(), optax.sgd(0.1))
      >>> params, key = {"w": jnp.zeros(())}, jax.random.key(0)
      >>> state = TrainState.create(params, tx, key=key)
      >>> step = make_train_step(losses_fn, tx)
      >>> state, metrics = step(state, jnp.ones(4))
      >>> {task: float(loss) for task, loss in metrics["losses"].items()}
      {'a': 1.0, 'b': 1.0}
    """
    if accumulate < 1:
        raise ValueError(f"`accumulate` must be at least 1, got {accumulate}.")
    if accumulate > 1 and isinstance(losses_fn, tuple):
        raise ValueError(
            "`accumulate` needs `losses_fn` to be one function, got a pair: the "
            "representations of different micro-batches have no common gradient. "
            "Pass one function, or `accumulate=1`."
        )
    returns = {"with_model_state": with_model_state, "has_aux": has_aux}
    objective = accumulated(losses_fn, accumulate, with_key=with_key, **returns)
    grad_fn = value_and_task_grads(
        objective,
        shared=shared,
        engine=engine,
        has_aux=with_model_state or has_aux,
        axis_name=axis_name,
    )
    # optax types gradients as trees of arrays, which `TaskGradients` is not.
    update: Any = freeze_absent(optax.with_extra_args_support(tx)).update

    def step(state, batch, present=None, resampled=(), validation=None):
        if not isinstance(resampled, tuple | list):
            raise TypeError(
                "`resampled` must be a sequence of batches, got "
                f"{type(resampled).__name__}; pass `[batch]` for a single one."
            )
        loss_key, balancer_key = jax.random.split(
            jax.random.fold_in(state.key, state.step)
        )
        if axis_name is not None:
            loss_key = jax.random.fold_in(loss_key, jax.lax.axis_index(axis_name))
        inputs = {}
        if with_model_state:
            inputs["model_state"] = state.model_state
        if with_key:
            inputs["key"] = loss_key

        def redrawn(use):
            if not with_key:
                return inputs
            return inputs | {"key": jax.random.fold_in(loss_key, use)}

        def losses_on(batch, inputs):
            def losses_of(params):
                found = _evaluate(objective, params, batch, inputs)
                losses = unpack(found, **returns)[0]
                return losses if axis_name is None else jax.lax.pmean(losses, axis_name)

            return losses_of

        found, grads = grad_fn(state.params, batch, **inputs)
        losses, model_state, aux = unpack(found, **returns)
        if not with_model_state:
            model_state = state.model_state
        elif axis_name is not None:
            model_state = _mean_over_devices(model_state, axis_name)
        updates, opt_state = update(
            grads,
            state.opt_state,
            state.params,
            losses=losses,
            present=present,
            key=balancer_key,
            losses_fn=losses_on(batch, inputs),
            validation_losses_fn=(
                None if validation is None else losses_on(validation, redrawn(0))
            ),
            resampled=[
                grad_fn(state.params, other, **redrawn(use))[1]
                for use, other in enumerate(resampled, 1)
            ],
        )
        params = optax.apply_updates(state.params, updates)
        norm, skipped = optax.tree.norm(updates), state.skipped
        if skip_not_finite:
            ok = _losses_finite(losses, present) & _all_finite(updates)
            params, opt_state, model_state = jax.tree.map(
                lambda new, old: jnp.where(ok, new, old),
                (params, opt_state, model_state),
                (state.params, state.opt_state, state.model_state),
            )
            norm, skipped = jnp.where(ok, norm, 0.0), skipped + jnp.int32(~ok)
        metrics = {"losses": losses, "update_norm": norm, "skipped": skipped}
        if has_aux:
            metrics["aux"] = aux
        new_state = TrainState(
            params=params,
            opt_state=opt_state,
            model_state=model_state,
            key=state.key,
            step=state.step + 1,
            skipped=skipped,
        )
        return new_state, metrics

    if axis_name is not None:
        return step
    return jax.jit(
        step,
        donate_argnums=0 if donate else (),
        out_shardings=None if state_sharding is None else (state_sharding, None),
    )


def _evaluate(objective, params, batch, inputs):
    if not isinstance(objective, tuple):
        return objective(params, batch, **inputs)
    encode, losses_from_representation = objective
    z = encode(params, batch, **inputs)
    return losses_from_representation(params, z, batch, **inputs)


def _mean_over_devices(tree, axis_name):
    def mean(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return jax.lax.pmean(leaf, axis_name) if floating else leaf

    return jax.tree.map(mean, tree)


def _losses_finite(losses, present):
    finite = jnp.stack([jnp.isfinite(losses[task]) for task in sorted(losses)])
    return jnp.all(finite if present is None else finite | ~present)


def _all_finite(tree):
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))
