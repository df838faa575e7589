"""The arrays of a training run, as one pytree."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that one training step reads and writes.

    All fields are arrays or pytrees of arrays, so that the whole state can be donated,
    sharded and saved, and nothing that decides the next step lives elsewhere. The
    fields are not type-checked at run time: the same class also carries the shardings
    and the shapes of a state.

    Attributes:
      params: parameters, any pytree.
      opt_state: state of the optax transform, balancers included.
      model_state: what the model carries besides its parameters, such as batch
        statistics; ``None`` if it carries nothing.
      key: typed key of the run, shape ``()``. It never changes: the keys of a step are
        folded from it and ``step``.
      step: number of steps taken, int32 of shape ``()``; skipped steps count.
      skipped: number of steps whose update was thrown away because it was not finite,
        int32 of shape ``()``.
    """

    params: Any
    opt_state: Any
    model_state: Any
    key: Any
    step: Any
    skipped: Any

    @classmethod
    def create(
        cls,
        params: Any,
        tx: optax.GradientTransformation,
        *,
        model_state: Any = None,
        key: Any,
    ) -> "TrainState":
        """Builds the state before the first step.

        Args:
          params: parameters, any pytree of arrays.
          tx: the transform that the run uses, the same as in `make_train_step`.
          model_state: initial model state, or ``None``.
          key: typed key, shape ``()``, as made by ``jax.random.key``.

        Returns:
          A state with ``step`` and ``skipped`` at zero. Its arrays are copies: the
          training step donates its state, and must not take the caller's ``params``
          and ``key`` with it.

        Raises:
          TypeError: if ``key`` is not a typed key.

        Example:
          >>> import jax, jax.numpy as jnp, optax
          >>> params = {"w": jnp.ones(2)}
          >>> state = TrainState.create(params, optax.sgd(0.1), key=jax.random.key(0))
          >>> int(state.step), int(state.skipped)
          (0, 0)
        """
        if not jax.dtypes.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
            raise TypeError(
                f"`key` must be a typed key, got {key!r}; make it with "
                "`jax.random.key(seed)` instead of `jax.random.PRNGKey(seed)`."
            )
        state = cls(
            params=params,
            opt_state=tx.init(params),
            model_state=model_state,
            key=key,
            step=jnp.int32(0),
            skipped=jnp.int32(0),
        )
        # Two fields may share one buffer (a transform that keeps the initial
        # parameters in its state), and a buffer can be donated only once.
        return jax.tree.map(jnp.copy, state)
