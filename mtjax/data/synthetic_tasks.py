"""Two regressions whose conflict is a number: tasks made of sines of projections."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32


class SinusoidTasks(NamedTuple):
    """A sample of two related regressions.

    Attributes:
      inputs: standard normal.
      targets: of both tasks, the second axis.
      weights: the tasks' directions, in rows of norm `scale`.
    """

    inputs: Float32[np.ndarray, "n features"]
    targets: Float32[np.ndarray, "n 2"]
    weights: Float[np.ndarray, "2 features"]


def sinusoid_tasks(
    n: int,
    cosine: float,
    *,
    features: int = 100,
    scale: float = 1.0,
    alphas: tuple[float, ...] = (1.0, 2.0, 3.0),
    betas: tuple[float, ...] = (0.0, 1.0, 2.0),
    noise: float = 0.1,
    seed: int = 0,
) -> SinusoidTasks:
    r"""Draws the generator that MMoE was studied with.

    .. math::
      y_t = w_t^T x + \sum_k \sin(\alpha_k w_t^T x + \beta_k) + \epsilon_t, \quad
      w_1 = c u_1, \; w_2 = c \left(p u_1 + \sqrt{1 - p^2} u_2\right)

    with random orthogonal unit vectors :math:`u_1, u_2` and standard normal x. At
    :math:`p = 1` the tasks differ by noise only.

    Args:
      n: number of examples, at least 1.
      cosine: p in [-1, 1], of the tasks' directions.
      features: at least 2.
      scale: c, positive.
      alphas: :math:`\alpha_k`; none leaves linear tasks.
      betas: :math:`\beta_k`, as many.
      noise: standard deviation of :math:`\epsilon`; the paper's variance is 0.01.
      seed: of directions and examples. The directions do not depend on `n`, nor on
        `cosine` but by the formula.

    Returns:
      The sample.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> tasks = sinusoid_tasks(100, 0.5, features=10)
      >>> w = tasks.weights
      >>> print(tasks.inputs.shape, tasks.targets.shape, (w[0] @ w[1]).round(6))
      (100, 10) (100, 2) 0.5

    References:
      Modeling Task Relationships in Multi-task Learning with Multi-gate
      Mixture-of-Experts, KDD 2018, section 3.2.
    """
    if n < 1 or features < 2 or scale <= 0 or noise < 0:
        raise ValueError(
            "`n` must be at least 1, `features` at least 2, `scale` positive and "
            f"`noise` not negative, got {n!r}, {features!r}, {scale!r} and {noise!r}."
        )
    if not -1 <= cosine <= 1:
        raise ValueError(f"`cosine` must be in [-1, 1], got {cosine!r}.")
    if len(alphas) != len(betas):
        raise ValueError(
            f"`betas` must be as many as `alphas`, got {len(betas)} and {len(alphas)}."
        )
    of_weights, of_inputs, of_noise = np.random.default_rng(seed).spawn(3)
    u, _ = np.linalg.qr(of_weights.standard_normal((features, 2)))
    mixing = np.array([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]])
    weights = scale * mixing @ u.T
    x = of_inputs.standard_normal((n, features))
    s = x @ weights.T
    y = s + sum(np.sin(a * s + b) for a, b in zip(alphas, betas))
    y += noise * of_noise.standard_normal(s.shape)
    return SinusoidTasks(x.astype(np.float32), y.astype(np.float32), weights)
