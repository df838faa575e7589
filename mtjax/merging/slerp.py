"""Spherical interpolation between two models, over all parameters at once."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtjax.merging.merger import Leaf, Merger, Total, combined, step

_STRAIGHT = 0.9995  # |cos| above which a line is as good and an arc ill-defined
_TINY = 1e-37  # square root of zero has no derivative


def slerp(
    fraction: float = 0.5, *, on: Literal["weights", "task_vectors"] = "weights"
) -> Merger:
    r"""Goes along the great circle from the first model to the second.

    With the angle $\Omega$ between the two over all merged parameters,

    $$v(f) = \frac{\sin((1 - f) \Omega)}{\sin \Omega} v_0
      + \frac{\sin(f \Omega)}{\sin \Omega} v_1$$

    and a straight line where $|\cos \Omega| > 0.9995$ or one is zero.

    Args:
      fraction: $f$; 0 is the first model (names sorted), 1 the second.
      on: interpolate `"weights"`, for which no base is needed, or `"task_vectors"`.

    Returns:
      The method; takes exactly two models.

    Raises:
      ValueError: if `on` is unknown; when merging, for other than two models.

    References:
      Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH, 1985.
    """
    if on not in ("weights", "task_vectors"):
        raise ValueError(f"`on` must be 'weights' or 'task_vectors', got {on!r}.")

    def points(leaf: Leaf):
        return leaf.vectors + leaf.base[None] if on == "weights" else leaf.vectors

    def products(leaf: Leaf):
        if len(leaf.vectors) != 2:
            raise ValueError(f"`slerp` takes two models, got {len(leaf.vectors)}.")
        return inner_products(points(leaf))

    def shares(products, size):
        return arc(jnp.asarray(products, jnp.float32), fraction)

    def apply(leaf: Leaf, weights):
        merged = combined(weights, points(leaf))
        return merged - leaf.base if on == "weights" else merged

    return step(apply, Total(products, shares), needs_base=on == "task_vectors")


def gramian(vectors: PyTree) -> Float[Array, "models models"]:
    """Inner products of task vectors over all parameters at once.

    Args:
      vectors: what `mtjax.merging.task_vectors` returned; may be bfloat16.

    Returns:
      The products, added up in float32; norms are the roots of the diagonal.

    Example:
      >>> print(gramian({"w": jnp.array([[3.0], [1.0]]), "b": jnp.array([4.0, 1.0])}))
      [[25.  7.]
       [ 7.  2.]]
    """
    rows = [jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(vectors)]
    return jnp.sum(jnp.stack([inner_products(x) for x in rows]), axis=0)


def inner_products(rows: Float[Array, "rows ..."]) -> Float[Array, "rows rows"]:
    """Inner products of one parameter's rows."""
    flat = rows.reshape(len(rows), -1)
    return jnp.matmul(flat, flat.T, precision="highest")


def arc(
    products: Float[Array, "2 2"], fraction: float | Float[Array, ""]
) -> Float[Array, "2"]:
    """Weights of two points for a place on the arc between them.

    Args:
      products: inner products of the two.
      fraction: 0 is the first, 1 the second; may be traced.

    Returns:
      The weights, with finite gradients also where the two are parallel or zero.
    """
    lengths = jnp.sqrt(jnp.diagonal(products) + _TINY)
    cosine = products[0, 1] / lengths[0] / lengths[1]
    zero = jnp.any(jnp.diagonal(products) <= _TINY)
    straight = (jnp.abs(cosine) > _STRAIGHT) | zero
    angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
    parts = jnp.stack([1 - fraction, jnp.asarray(fraction)])
    return jnp.where(straight, parts, jnp.sin(parts * angle) / jnp.sin(angle))


def arc_chain(
    products: Float[Array, "points points"],
    weights: Float[Array, " points"],
    rule: Literal["mean", "sum"] = "mean",
) -> Float[Array, " points"]:
    r"""Weights of many points for a place reached by one arc after the other.

    $$v_{(1)} = v_1, \quad v_{(1..n)} = \mathrm{slerp}\Bigl(v_{(1..n-1)}, v_n;\;
      \frac{a_n}{\bar a_{1..n-1} + a_n}\Bigr)$$

    All places lie in the span of the points, so that their inner products are enough.
    The order counts: with the mean and equal weights the last point gets half of the
    way, whatever their number.

    Args:
      products: inner products of the points.
      weights: $a$, positive; only their ratios count. May be traced.
      rule: whether $\bar a$ is the `"mean"` or the `"sum"` of the weights before.

    Returns:
      The coefficient of every point, differentiable in the weights.

    Raises:
      ValueError: if `rule` is unknown.

    Example:
      >>> print(arc_chain(jnp.eye(3), jnp.ones(3)).round(4))
      [0.5    0.5    0.7071]
    """
    if rule not in ("mean", "sum"):
        raise ValueError(f"`rule` must be 'mean' or 'sum', got {rule!r}.")
    place = jnp.zeros(len(products)).at[0].set(1.0)
    for n in range(1, len(products)):
        before = weights[:n].mean() if rule == "mean" else weights[:n].sum()
        new = jnp.zeros(len(products)).at[n].set(1.0)
        ends = jnp.stack([place, new])
        shares = arc(ends @ products @ ends.T, weights[n] / (before + weights[n]))
        place = shares @ ends
    return place
