"""WUDI: interference that the task vectors themselves reveal, minimised."""

import jax
import jax.numpy as jnp
import optax

from mtjax.merging.matrices import on_matrices
from mtjax.merging.merger import Merger, add_up


def wudi(
    steps: int | None = None, *, learning_rate: float = 1e-5, out_axis: int = -1
) -> Merger:
    r"""Finds the task vector that disturbs no task on the inputs it was trained on.

    The rows of $\tau_t$ span the inputs of its layer, so without data

    $$\min_\tau \sum_t \|(\tau - \tau_t) \tau_t^\top\|_F^2 / \|\tau_t\|_F^2$$

    for every matrix (rows: outputs). It is quadratic: from the start $\sum_t \tau_t$,
    with $A_t = \tau_t^\top \tau_t / \|\tau_t\|^2$, gradient descent ends at
    $\sum_t \tau_t A_t \, (\sum_t A_t)^+$, which is computed directly. Other parameters
    are averaged.

    Args:
      steps: `None` for the exact minimum; otherwise so many steps of Adam from
        $\sum_t \tau_t$, as published (300 to 400).
      learning_rate: of Adam.
      out_axis: see `on_matrices`. It matters: inputs are the other axes.

    Returns:
      The method.

    Raises:
      ValueError: if `steps` is negative.

    References:
      Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free
      Model Merging via Task Vectors", ICML, 2025.
    """
    if steps is not None and steps < 0:
        raise ValueError(f"`steps` must not be negative, got {steps!r}.")

    def exact(vectors):
        grams = _grams(vectors)
        aimed = add_up(vectors @ grams)
        return aimed @ jnp.linalg.pinv(add_up(grams), hermitian=True)

    def descended(vectors):
        grams, start = _grams(vectors), add_up(vectors)
        total, aimed = add_up(grams), add_up(vectors @ grams)
        optimizer = optax.adam(learning_rate)

        def update(carry, _):
            merged, state = carry
            slope = 2 * (merged @ total - aimed)
            updates, state = optimizer.update(slope, state)
            return (optax.apply_updates(merged, updates), state), None

        (merged, _), _ = jax.lax.scan(
            update, (start, optimizer.init(start)), length=steps
        )
        return merged

    return on_matrices(exact if steps is None else descended, out_axis)


def _grams(vectors):
    squares = jnp.sum(jnp.square(vectors), axis=(1, 2), keepdims=True)
    grams = jnp.swapaxes(vectors, 1, 2) @ vectors
    return grams / jnp.where(squares > 0, squares, 1)
