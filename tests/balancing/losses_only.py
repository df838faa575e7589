"""Balancers of the losses alone: with an identity Jacobian, updates are weights."""

import jax
import jax.numpy as jnp
import numpy as np

LOSSES = np.array([0.5, 1.0, 4.0])


def weights_of(tx):
    """A compiled `(losses, state, after) -> weights, state` for three tasks."""
    names = ("a", "b", "c")

    @jax.jit
    def update(losses, state, after):
        return tx.update(
            jnp.eye(3),
            state,
            jnp.zeros(3),
            losses=losses,
            losses_fn=lambda params: dict(zip(names, after, strict=True)),
        )

    def call(losses, state, after=LOSSES):
        # Losses by name, so that what `losses_fn` returns has the same tasks.
        losses = dict(zip(names, jnp.asarray(losses, jnp.float32), strict=True))
        return update(losses, state, jnp.asarray(after, jnp.float32))

    return call
