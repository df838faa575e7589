"""Classifiers on top of frozen features and a few labelled examples.

Tip-Adapter remembers the examples; LP++ blends a linear probe with the classifier that
is there. Both leave the encoder alone, so that they add to whatever adapts it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class Cache(NamedTuple):
    """Labelled examples that a Tip-Adapter looks up.

    Attributes:
      keys: their features; may be trained.
      values: their labels, one-hot.
    """

    keys: Float[Array, "shots features"]
    values: Float[Array, "shots classes"]


def cache_of(
    features: Float[Array, "shots features"],
    labels: Int[Array, " shots"],
    num_classes: int,
) -> Cache:
    """The cache of a Tip-Adapter before it is trained.

    Args:
      features: of the labelled examples.
      labels: of them.
      num_classes: C.

    Returns:
      The cache.
    """
    return Cache(features, jax.nn.one_hot(labels, num_classes))


def cache_logits(
    features: Float[Array, "examples features"],
    cache: Cache,
    *,
    alpha: float = 1.0,
    beta: float = 5.5,
) -> Float[Array, "examples classes"]:
    r"""What a Tip-Adapter adds to the logits of the classifier.

    .. math:: \alpha \, e^{-\beta (1 - \cos(f, K))} \, V

    Args:
      features: :math:`f` of the inputs, from the encoder that made the keys.
      cache: keys :math:`K` and values :math:`V`.
      alpha: :math:`\alpha \ge 0`, how much the cache counts, in units of logits.
      beta: :math:`\beta > 0`, how near a key must be to count.

    Returns:
      Logits to be added.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> cache = cache_of(jnp.eye(2), jnp.array([0, 1]), 2)
      >>> print(cache_logits(jnp.array([[3.0, 0.0]]), cache, beta=jnp.log(2.0).item()))
      [[1.  0.5]]

    References:
      Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification, ECCV
      2022, equations 4 to 6; training `keys` alone is Tip-Adapter-F.
    """
    if alpha < 0 or beta <= 0:
        raise ValueError(
            "`alpha` must not be negative and `beta` must be positive, got "
            f"{alpha!r} and {beta!r}."
        )
    cosines = _unit(features) @ _unit(cache.keys).T
    return alpha * jnp.exp(-beta * (1 - cosines)) @ cache.values


class BlendedProbe(NamedTuple):
    """A linear probe blended with a classifier that is there.

    Attributes:
      kernel: of the classifier that both make together.
      probe: what was learnt.
      blend: the factor of every class of the classifier that was there.
      losses: on the labelled examples before every step, and at the end.
    """

    kernel: Float[Array, "features classes"]
    probe: Float[Array, "features classes"]
    blend: Float[Array, " classes"]
    losses: Float[Array, " steps"]


def blended_probe(
    features: Float[Array, "shots features"],
    labels: Int[Array, " shots"],
    kernel: Float[Array, "features classes"],
    *,
    steps: int = 300,
) -> BlendedProbe:
    r"""LP++: learns a probe and a factor per class with step sizes from the data.

    .. math:: z_k = f^T (w_k + \alpha_k t_k)

    The Hessian of the cross-entropy in the logits is at most one half, so that steps of
    one over :math:`\lambda_{max}(F^T F) / 2n` for :math:`w` and
    :math:`\sum_i (f_i^T t_k)^2 / 2n` for :math:`\alpha_k`, one after the other, never
    make the loss larger: there is no learning rate to tune.

    Args:
      features: :math:`F` of the labelled examples, frozen. For a classifier with
        biases append a column of ones, and the biases to the kernel.
      labels: of them.
      kernel: :math:`t`, the classifier that is there (of texts, or of class means),
        scaled as its logits are.
      steps: at least one, each over all examples.

    Returns:
      The probe. It starts at the classifier, :math:`w = 0` and :math:`\alpha = 1`.

    Raises:
      ValueError: if there is no step.

    Example:
      >>> x, y = jnp.eye(2), jnp.array([1, 0])
      >>> found = blended_probe(x, y, jnp.eye(2), steps=100)
      >>> print((x @ found.kernel).argmax(-1))
      [1 0]

    References:
      LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP, CVPR 2024. The bound
      on the Hessian is ours, and valid for any features; the published start, class
      means and a constant for CLIP, is left out.
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps!r}.")
    features, kernel = features.astype(jnp.float32), kernel.astype(jnp.float32)
    similar = features @ kernel
    # `tiny` lets features of zero, which have no slope, stay where they are.
    tiny = jnp.finfo(jnp.float32).tiny
    largest = jnp.linalg.norm(features, 2) ** 2 / (2 * len(labels))
    step_of_probe = 1 / jnp.maximum(largest, tiny)
    step_of_blend = 1 / jnp.maximum(jnp.mean(similar**2, axis=0) / 2, tiny)

    def loss(probe, blend):
        logits = features @ probe + similar * blend[None]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def step(now, _):
        probe, blend = now
        before, slopes = jax.value_and_grad(loss)(probe, blend)
        probe = probe - step_of_probe * slopes
        blend = blend - step_of_blend * jax.grad(loss, argnums=1)(probe, blend)
        return (probe, blend), before

    start = jnp.zeros_like(kernel), jnp.ones(kernel.shape[1])
    (probe, blend), losses = jax.lax.scan(step, start, length=steps)
    losses = jnp.append(losses, loss(probe, blend))
    return BlendedProbe(probe + kernel * blend[None], probe, blend, losses)


def _unit(x: Float[Array, "rows features"]) -> Float[Array, "rows features"]:
    return x / jnp.sqrt(jnp.sum(x**2, axis=1, keepdims=True) + 1e-12)
