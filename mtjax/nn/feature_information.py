"""How much the features of items tell of each other."""

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array

from mtjax.nn.item_features import ItemFeatures, Items


def mutual_information(
    features: ItemFeatures, items: Items, *, corrected: bool = False
) -> Float[np.ndarray, "features features"]:
    r"""How much two features of an item tell of each other, in nats.

    .. math:: MI(V, W) = \sum_{a,b} P(a, b) \log \frac{P(a, b)}{P(a) P(b)}

    over the items, each once, not over the log. Of several flags or words one is drawn;
    a missing feature is a value of its own. Numbers count as constant: bucketise them
    into a field to have them ranked. The diagonal holds entropies.

    Args:
      features: which there are.
      items: rows of the catalogue, without those of padding and unknown.
      corrected: whether the bias of few items is taken off (Miller and Madow).

    Returns:
      A symmetric matrix in the order of `features.names`, not negative.

    Example:
      >>> features = ItemFeatures({"a": 4, "b": 4}, ("a", "b"))
      >>> items = {"categorical": np.array([[2, 2], [2, 3], [3, 2], [3, 3]])}
      >>> print(mutual_information(features, items).round(2))
      [[0.69 0.  ]
       [0.   0.69]]

    References:
      Note on the Bias of Information Estimates, Miller, 1955.
    """
    parts = [_shares(features, items, name) for name in features.names]
    number = len(items["categorical"])

    def entropy(p: np.ndarray) -> float:
        p = p[p > 0]
        bias = (len(p) - 1) / (2 * number) if corrected else 0.0
        return float(bias - np.sum(p * np.log(p)))

    own = [entropy(np.asarray(part.sum(axis=0)).ravel() / number) for part in parts]
    found = np.diag(own)
    for i, first in enumerate(parts):
        for j in range(i):
            joint = (first.T @ parts[j]).tocoo().data / number
            told = max(0.0, own[i] + own[j] - entropy(joint))
            found[i, j] = found[j, i] = told
    return found


def _shares(features: ItemFeatures, items: Items, name: str) -> csr_array:
    """How much of each value an item has: rows that sum to 1."""
    number = len(items["categorical"])
    rows = np.arange(number)
    if name in features.fields:
        columns = np.asarray(items["categorical"])[:, features.fields.index(name)]
        weights = np.ones(number)
    elif name in features.numbers:
        columns, weights = np.zeros(number, int), np.ones(number)
    else:
        if name in features.texts:
            words = np.asarray(items["tokens"][name])
            places, at = np.nonzero(words)
            values = words[places, at]
        else:
            places, values = np.nonzero(items["multi_hot"][name])
            values = values + 1
        count = np.bincount(places, minlength=number)
        empty = np.flatnonzero(count == 0)
        rows = np.r_[places, empty]
        columns = np.r_[values, 0 * empty]
        weights = 1.0 / np.maximum(count, 1)[rows]
    return csr_array((weights, (rows, columns)))
