"""Metrics of click models: per user, of calibration, with labels missing."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Real, Shaped
from scipy.stats import rankdata

from mtjax.training.metrics import LOG_LOSS, ROC_AUC

# Axes have no names here: unequal lengths get an error of ours.
Numbers = Real[np.ndarray, " _"]


class GroupedAuc(NamedTuple):
    """The result of :func:`gauc`.

    Attributes:
      value: the weighted mean over the users that count; NaN if none does.
      users: how many users count.
      skipped: how many have labels of one class only.
      impressions: share of the impressions that belong to users that count.
    """

    value: float
    users: int
    skipped: int
    impressions: float


def gauc(
    targets: Numbers, scores: Numbers, groups: Shaped[np.ndarray, " _"]
) -> GroupedAuc:
    r"""Area under the ROC curve per user, averaged with impressions as weights.

    .. math::
      \mathrm{GAUC} = \frac{\sum_u n_u \mathrm{AUC}_u}{\sum_u n_u}

    over the users :math:`u` with both labels, :math:`n_u` their impressions. A user
    with one class has no AUC; counting it as one half would pull the mean towards it.

    Args:
      targets: labels 0 or 1.
      scores: of any monotone scale; equal ones share the mean of their ranks.
      groups: user of every impression.

    Returns:
      The value, and how much of the data it speaks of.

    Raises:
      ValueError: if lengths differ, a score is NaN or a label is neither 0 nor 1.

    Example:
      >>> targets, groups = np.array([0, 1, 1, 1]), np.array([7, 7, 7, 8])
      >>> gauc(targets, np.array([0.1, 0.9, 0.0, 0.5]), groups)
      GroupedAuc(value=0.5, users=1, skipped=1, impressions=0.75)

    References:
      Deep Interest Network for Click-Through Rate Prediction, 2018, section 6.2.
    """
    _check_pairs(targets, scores)
    if len(groups) != len(targets):
        raise ValueError(
            "`groups` must have an entry per target, got "
            f"{len(groups)} and {len(targets)}."
        )
    _, group = np.unique(groups, return_inverse=True)
    count = np.bincount(group)
    positive = np.bincount(group, weights=targets)
    negative = count - positive
    counted = (positive > 0) & (negative > 0)
    # Dense codes of the scores sort exactly; one sort then ranks all users at once.
    _, code = np.unique(scores, return_inverse=True)
    width = int(code.max(initial=0)) + 1
    start = np.cumsum(count) - count
    rank = rankdata(group.astype(np.int64) * width + code) - start[group]
    sums = np.bincount(group, weights=rank * targets)
    pairs = np.where(counted, positive * negative, 1)
    areas = (sums - positive * (positive + 1) / 2) / pairs
    weight = count * counted
    used = int(counted.sum())
    return GroupedAuc(
        value=float(np.sum(weight * areas) / weight.sum()) if used else float("nan"),
        users=used,
        skipped=len(count) - used,
        impressions=float(weight.sum() / len(targets)) if len(targets) else 0.0,
    )


def calibration_ratio(targets: Numbers, probabilities: Numbers) -> float:
    """Sum of predicted probabilities over the number of positives; 1 is calibrated.

    Args:
      targets: labels 0 or 1.
      probabilities: of class 1.

    Returns:
      The ratio; NaN without positives.

    Raises:
      ValueError: if lengths differ, a probability is NaN or outside [0, 1], or a label
        is neither 0 nor 1.

    Example:
      >>> calibration_ratio(np.array([0, 1]), np.array([0.5, 1.0]))
      1.5
    """
    _check_pairs(targets, probabilities, probabilities=True)
    actual = float(np.sum(targets))
    return float(np.sum(probabilities, dtype=np.float64)) / actual if actual else np.nan


def click_calibration_error(
    targets: Numbers,
    probabilities: Numbers,
    *,
    bins: int = 15,
    strategy: str = "uniform",
) -> float:
    r"""Expected calibration error of the probability of class 1.

    .. math::
      \sum_b \frac{n_b}{n} \left| \bar y_b - \bar p_b \right|

    This looks at the probability itself, where
    :data:`mtjax.training.CALIBRATION_ERROR` looks at the confidence of the likelier
    class; the two differ for rare events.

    Args:
      targets: labels 0 or 1.
      probabilities: of class 1.
      bins: number of bins, at least 1.
      strategy: ``"uniform"`` for bins of equal width, ``"quantile"`` for bins of equal
        size, which tell more where all probabilities are small.

    Returns:
      The error, NaN without examples.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> p = np.array([0.2, 0.2, 0.9, 0.9])
      >>> click_calibration_error(np.array([0, 1, 1, 1]), p, bins=2)
      0.2

    References:
      On Calibration of Modern Neural Networks, 2017, equation 3.
    """
    _check_pairs(targets, probabilities, probabilities=True)
    if bins < 1 or strategy not in ("uniform", "quantile"):
        raise ValueError(
            "`bins` must be at least 1 and `strategy` 'uniform' or 'quantile', got "
            f"{bins} and {strategy!r}."
        )
    if not len(targets):
        return float("nan")
    if strategy == "uniform":
        inner = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    else:
        inner = np.quantile(probabilities, np.linspace(0.0, 1.0, bins + 1)[1:-1])
    places = np.searchsorted(inner, probabilities)
    gaps = np.bincount(places, weights=targets - probabilities.astype(np.float64))
    return float(np.sum(np.abs(gaps)) / len(targets))


def click_metrics(
    labels: Mapping[str, Numbers],
    probabilities: Mapping[str, Numbers],
    users: Shaped[np.ndarray, " _"] | None = None,
) -> dict[str, dict[str, float]]:
    """Computes what is usual for click models, for every task.

    Args:
      labels: 0, 1 or NaN where the task has no label; such rows do not count.
      probabilities: of class 1.
      users: user of every row, for GAUC.

    Returns:
      ``{task: {"roc_auc", "log_loss", "calibration_ratio", "ece", "labelled",
      "positives"}}`` and, with `users`, ``"gauc"``, ``"gauc_users"`` and
      ``"gauc_skipped"``. A metric without a value, such as AUC of one class, is NaN;
      ``positives`` against ``labelled`` tells why.

    Raises:
      ValueError: if a task has no probabilities, or they are out of range.

    Example:
      >>> labels = {"click": np.array([0.0, 1.0, np.nan]), "buy": np.zeros(3)}
      >>> p = np.array([0.2, 0.6, 0.1])
      >>> result = click_metrics(labels, {"click": p, "buy": p})
      >>> result["click"]["roc_auc"], result["buy"]["roc_auc"]
      (1.0, nan)
    """
    results = {}
    for task, values in labels.items():
        if task not in probabilities:
            raise ValueError(
                f"`probabilities` must hold the task {task!r}, got "
                f"{sorted(probabilities)}."
            )
        if len(values) != len(probabilities[task]):
            raise ValueError(
                f"`probabilities` must have a row per label of {task!r}, got "
                f"{len(probabilities[task])} and {len(values)}."
            )
        known = ~np.isnan(values)
        y, p = values[known].astype(np.int64), probabilities[task][known]
        results[task] = {
            "roc_auc": ROC_AUC(y, p),
            "log_loss": LOG_LOSS(y, p),
            "calibration_ratio": calibration_ratio(y, p),
            "ece": click_calibration_error(y, p),
            "labelled": float(known.sum()),
            "positives": float(y.sum()),
        }
        if users is not None:
            grouped = gauc(y, p, users[known])
            results[task] |= {
                "gauc": grouped.value,
                "gauc_users": float(grouped.users),
                "gauc_skipped": float(grouped.skipped),
            }
    return results


def _check_pairs(
    targets: Numbers, scores: Numbers, *, probabilities: bool = False
) -> None:
    name = "probabilities" if probabilities else "scores"
    if len(targets) != len(scores):
        raise ValueError(
            f"`targets` and `{name}` must be equally long, got {len(targets)} and "
            f"{len(scores)}."
        )
    strange = targets[(targets != 0) & (targets != 1)]
    if len(strange):
        raise ValueError(
            f"`targets` must be 0 or 1, got {strange[0]}. Leave out rows without a "
            "label."
        )
    if np.isnan(scores).any():
        raise ValueError(
            f"`{name}` must not be NaN, got {int(np.isnan(scores).sum())}."
        )
    if probabilities and len(scores) and (scores.min() < 0 or scores.max() > 1):
        raise ValueError(
            f"`probabilities` must be in [0, 1], got {scores.min()} to {scores.max()}. "
            "Apply the logistic function to logits."
        )
