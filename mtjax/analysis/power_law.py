"""Power-law exponents of weight matrices: how heavy-tailed their spectra are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Shaped


class PowerLaw(NamedTuple):
    r"""A power law fitted to the largest of some values.

    Attributes:
      alpha: exponent of the density :math:`x^{-\alpha}`, above 1.
      smallest: where the tail begins.
      distance: largest difference of the cumulative distributions, in [0, 1].
      count: number of values in the tail.
    """

    alpha: float
    smallest: float
    distance: float
    count: int


def power_law_fit(values: Float[np.ndarray, " n"]) -> PowerLaw:
    r"""Fits a power law to the tail that looks most like one.

    For every value as the beginning :math:`x_{min}` of a tail of :math:`n` values,
    :math:`\hat\alpha = 1 + n / \sum_i \ln(x_i / x_{min})`, and among these the tail
    with the smallest Kolmogorov-Smirnov distance.

    Args:
      values: at least two different positive numbers; zeros do not count.

    Returns:
      The fit. With few values it is noisy: 10 values give no more than an impression.

    Raises:
      ValueError: if there are fewer than two different positive numbers.

    Example:
      >>> quantiles = (np.arange(1000) + 0.5) / 1000
      >>> fit = power_law_fit(quantiles ** (-1 / 1.5))
      >>> round(fit.alpha, 2), fit.count > 900
      (2.5, True)

    References:
      Power-Law Distributions in Empirical Data, 2009, sections 3.1 and 3.3.
    """
    x = np.sort(np.asarray(values, np.float64))
    x = x[x > 0]
    # The largest value alone has no exponent.
    tails = [x[i:] for i in range(len(x)) if x[i] < x[-1]]
    if not tails:
        raise ValueError(
            "`values` must hold at least two different positive numbers, got "
            f"{len(x)} positive of {np.size(values)}."
        )
    return min(map(_fit, tails), key=lambda fit: fit.distance)


def _fit(tail: np.ndarray) -> PowerLaw:
    logs = np.log(tail / tail[0])
    alpha = 1.0 + len(tail) / logs.sum()
    fitted = 1.0 - np.exp((1.0 - alpha) * logs)
    steps = np.arange(len(tail) + 1) / len(tail)
    distance = max((fitted - steps[:-1]).max(), (steps[1:] - fitted).max())
    return PowerLaw(float(alpha), float(tail[0]), float(distance), len(tail))


def power_law_alpha(kernel: Shaped[np.ndarray, "*inputs outputs"] | jax.Array) -> float:
    r"""Exponent of the spectrum of :math:`W^T W`, the squared singular values.

    Args:
      kernel: weights of a layer, outputs last as in Flax; the other axes, such as those
        of a convolution, count as its inputs.

    Returns:
      :math:`\alpha` of `power_law_fit`. Rules of thumb from large networks: 2 to 4 is
      well trained, far above 6 poorly trained, below 2 suspicious.

    Raises:
      ValueError: if the kernel has fewer than two axes or a rank below two.

    Example:
      >>> kernel = np.random.default_rng(0).standard_cauchy((3, 3, 16, 64))
      >>> 1.0 < power_law_alpha(kernel) < 3.0
      True

    References:
      Predicting trends in the quality of state-of-the-art neural networks without
      access to training or testing data, 2021.
    """
    if np.ndim(kernel) < 2:
        raise ValueError(
            f"`kernel` must have at least two axes, got shape {np.shape(kernel)}."
        )
    matrix = np.asarray(kernel, np.float64)
    matrix = matrix.reshape(-1, matrix.shape[-1])
    singular = np.linalg.svd(matrix, compute_uv=False)
    # Rounding leaves something in place of the zeros of a matrix of lower rank.
    rounding = singular[0] * max(matrix.shape) * np.finfo(np.float32).eps
    return power_law_fit(singular[singular > rounding] ** 2).alpha


def mean_power_law_alpha(
    params: Any, group: Callable[[str], str | None]
) -> dict[str, float]:
    """Exponents averaged over the layers of each group.

    Args:
      params: parameters; leaves with one axis (biases, scales) are left out.
      group: from the path of a leaf, such as ``"encoder/dense_0/kernel"``, to the name
        of its group, or None to leave it out.

    Returns:
      The mean `power_law_alpha` per group. Low and alike over heads: little negative
      transfer.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> params = {"a": {"w": rng.normal(size=(9, 9)), "b": np.ones(9)}}
      >>> sorted(mean_power_law_alpha(params, lambda path: path.partition("/")[0]))
      ['a']

    References:
      Rep-MTL, 2025, figure 4: backbone and heads.
    """
    found: dict[str, list[float]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = group(jax.tree_util.keystr(path, simple=True, separator="/"))
        if name is not None and np.ndim(leaf) >= 2:
            found.setdefault(name, []).append(power_law_alpha(np.asarray(leaf)))
    return {name: float(np.mean(alphas)) for name, alphas in found.items()}
