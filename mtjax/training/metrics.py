"""Metrics per task, computed on the host by scikit-learn.

scikit-learn, because its definitions are the ones that papers report, it is exact (an
area under the curve cannot be averaged over batches), it handles ties and weights, and
it is maintained by a large group. The price is that predictions are collected on the
host first; for evaluation sets that fit in memory this costs less than it is worth.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.special
import sklearn.metrics as sk
from jaxtyping import Bool, Shaped

Direction = Literal["higher", "lower"]
ArrayLike = Shaped[np.ndarray, "..."]

# Of the calibration error, as usual in the literature.
_BINS = 15


@dataclass(frozen=True)
class Metric:
    """A number that says how well one task is solved.

    Attributes:
      name: short name, such as ``"rmse"``.
      fn: ``fn(targets, predictions) -> float`` on NumPy arrays with a leading axis of
        examples.
      direction: ``"higher"`` if larger values are better, else ``"lower"``.
      defined: ``defined(targets) -> bool``, whether the metric has a value on these
        targets.

    Example:
      >>> ACCURACY(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]))
      0.75
      >>> ROC_AUC(np.array([1, 1]), np.array([0.2, 0.9]))
      nan
    """

    name: str
    fn: Callable[[np.ndarray, np.ndarray], float]
    direction: Direction
    defined: Callable[[np.ndarray], bool] = lambda targets: True

    def __call__(self, targets: ArrayLike, predictions: ArrayLike) -> float:
        """Computes the metric.

        Args:
          targets: true values, shape ``(examples, ...)``.
          predictions: predicted values, shape ``(examples, ...)``.

        Returns:
          The value, or ``nan`` where there is none: without examples, and for an area
          under a curve when only one class occurs, for :math:`R^2` with fewer than two
          examples, for a correlation of constants.

        Raises:
          ValueError: if the numbers of examples differ.
        """
        if len(targets) != len(predictions):
            raise ValueError(
                "`targets` and `predictions` must have the same number of examples, "
                f"got {len(targets)} and {len(predictions)}."
            )
        if len(targets) == 0 or not self.defined(targets):
            return float("nan")
        return float(self.fn(targets, predictions))


def _both_classes(targets: np.ndarray) -> bool:
    return bool(np.all(targets.min(axis=0) < targets.max(axis=0)))


def _two_examples(targets: np.ndarray) -> bool:
    return len(targets) >= 2


def _log_loss(targets: np.ndarray, probabilities: np.ndarray) -> float:
    classes = 2 if probabilities.ndim == 1 else probabilities.shape[-1]
    return sk.log_loss(targets, probabilities, labels=np.arange(classes))


def _brier(targets: np.ndarray, probabilities: np.ndarray) -> float:
    if probabilities.ndim == 1:
        return float(sk.brier_score_loss(targets, probabilities))
    one_hot = np.eye(probabilities.shape[-1])[targets]
    return float(np.mean(np.sum((probabilities - one_hot) ** 2, axis=-1)))


def _calibration_error(targets: np.ndarray, probabilities: np.ndarray) -> float:
    if probabilities.ndim == 1:
        probabilities = np.stack([1.0 - probabilities, probabilities], axis=-1)
    confidence = probabilities.max(axis=-1)
    correct = probabilities.argmax(axis=-1) == targets
    bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=_BINS)
    return float(np.sum(np.abs(gaps)) / len(targets))


def predictive_entropy(probabilities: ArrayLike) -> float:
    r"""Mean entropy :math:`-\sum_c p_c \log p_c` of predictions: their uncertainty.

    Args:
      probabilities: of all classes, shape ``(examples, classes)``.

    Returns:
      The mean over examples, in nats.

    Example:
      >>> predictive_entropy(np.array([[1.0, 0.0], [0.5, 0.5]]))
      0.346...
    """
    return float(np.mean(np.sum(scipy.special.entr(probabilities), axis=-1)))


def _f1_macro(targets: np.ndarray, predictions: np.ndarray) -> float:
    return float(sk.f1_score(targets, predictions, average="macro", zero_division=0))


def _f1(targets: np.ndarray, predictions: np.ndarray) -> float:
    return float(sk.f1_score(targets, predictions, zero_division=0))


def _pearson(targets: np.ndarray, predictions: np.ndarray) -> float:
    if np.ptp(targets) == 0 or np.ptp(predictions) == 0:
        return float("nan")
    return np.corrcoef(targets, predictions)[0, 1]


ACCURACY = Metric("accuracy", sk.accuracy_score, "higher")
"""Share of equal labels; integer labels of shape ``(examples,)``."""

F1 = Metric("f1", _f1, "higher")
"""F1 of class 1; labels 0 or 1. Zero if class 1 neither occurs nor is predicted."""

F1_MACRO = Metric("f1_macro", _f1_macro, "higher")
"""Mean of the F1 of every class that occurs or is predicted; integer labels."""

ROC_AUC = Metric("roc_auc", sk.roc_auc_score, "higher", _both_classes)
"""Area under the ROC curve; labels 0 or 1, scores of any monotone scale."""

AVERAGE_PRECISION = Metric(
    "average_precision", sk.average_precision_score, "higher", _both_classes
)
"""Area under the precision-recall curve as a sum of steps; labels 0 or 1, scores."""

LOG_LOSS = Metric("log_loss", _log_loss, "lower")
"""Cross entropy in nats; integer labels, probabilities of class 1 or of all classes."""

BRIER = Metric("brier", _brier, "lower")
"""Squared error of probabilities, of class 1 or summed over all classes."""

CALIBRATION_ERROR = Metric("ece", _calibration_error, "lower")
"""Expected calibration error: the gap between confidence and accuracy, in 15 bins.

Integer labels, probabilities of class 1 or of all classes. The bins are as wide as each
other (On Calibration of Modern Neural Networks, 2017, equation 3).
"""

RMSE = Metric("rmse", sk.root_mean_squared_error, "lower")
"""Root of the mean squared error, in the unit of the targets."""

MAE = Metric("mae", sk.mean_absolute_error, "lower")
"""Mean absolute error, in the unit of the targets."""

R2 = Metric("r2", sk.r2_score, "higher", _two_examples)
"""Explained share of the variance; 1 is perfect, a constant mean prediction gives 0."""

PEARSON = Metric("pearson", _pearson, "higher", _two_examples)
"""Pearson's correlation coefficient of values of shape ``(examples,)``."""


def score(
    metrics: Mapping[str, Sequence[Metric]],
    targets: Mapping[str, ArrayLike],
    predictions: Mapping[str, ArrayLike],
    labelled: Mapping[str, Bool[np.ndarray, " examples"]] | None = None,
) -> dict[str, dict[str, float]]:
    """Computes the metrics of every task.

    Args:
      metrics: the metrics of each task.
      targets: true values of each task, shape ``(examples, ...)``.
      predictions: predicted values of each task, shape ``(examples, ...)``.
      labelled: for tasks with missing labels, which examples to use.

    Returns:
      ``{task: {metric name: value}}``, what `delta_m` and `mean_rank` take.

    Raises:
      ValueError: if a task of ``metrics`` has no targets or predictions.

    Example:
      >>> y, p = {"age": np.array([1.0, 3.0])}, {"age": np.array([2.0, 3.0])}
      >>> score({"age": [MAE, RMSE]}, y, p)
      {'age': {'mae': 0.5, 'rmse': 0.707...}}
    """
    results = {}
    for task, chosen in metrics.items():
        if task not in targets or task not in predictions:
            raise ValueError(
                f"`targets` and `predictions` must hold every task of `metrics`, got "
                f"{sorted(targets)} and {sorted(predictions)} without {task!r}."
            )
        y, p = np.asarray(targets[task]), np.asarray(predictions[task])
        if labelled is not None and task in labelled:
            y, p = y[labelled[task]], p[labelled[task]]
        results[task] = {metric.name: metric(y, p) for metric in chosen}
    return results
