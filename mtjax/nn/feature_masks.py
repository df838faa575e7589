"""Views of items: which features are hidden, and how."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from mtjax.nn.item_features import ItemFeatures, Items

Masking = Literal["correlated", "random", "random_complementary", "none"]


def correlated_masks(
    information: Float[Array | np.ndarray, "features features"],
    ranked: Bool[np.ndarray, " features"],
    *,
    key: Key[Array, ""],
) -> Bool[Array, "2 features"]:
    r"""Draws a feature and hides it and the half of all that tells most about it (CFM).

    Args:
      information: of `mutual_information`.
      ranked: features that take part. The others (an id, which tells everything) are
        always hidden from the first view.
      key: of the draw.

    Returns:
      What each view shows: the first all but the seed and the :math:`n = \lfloor k/2
      \rfloor` of the k ranked features with the largest information; the second just
      these. Every feature is visible in exactly one view.
    """
    places = np.flatnonzero(ranked)
    seed = jnp.asarray(places)[jax.random.randint(key, (), 0, len(places))]
    told = jnp.where(jnp.asarray(ranked), jnp.asarray(information)[seed], -jnp.inf)
    told = told.at[seed].set(jnp.inf)
    _, chosen = jax.lax.top_k(told, len(places) // 2 + 1)
    hidden = jnp.asarray(~ranked).at[chosen].set(True)
    return jnp.stack([~hidden, hidden])


def random_masks(
    number: int, *, complementary: bool, key: Key[Array, ""]
) -> Bool[Array, "2 features"]:
    """Hides a random half of the features, rounded down, from each view (RFM).

    Args:
      number: of features.
      complementary: whether the second view shows what the first hides; otherwise it
        has a half of its own.
      key: of the draws.

    Returns:
      What each view shows.
    """
    half = lambda key: jax.random.permutation(key, number) >= number // 2
    first, second = jax.vmap(half)(jax.random.split(key))
    return jnp.stack([first, ~first if complementary else second])


def draw_masks(
    features: ItemFeatures,
    masking: Masking,
    information: Float[Array | np.ndarray, "features features"] | None = None,
    unranked: Sequence[str] = (),
    *,
    rows: int = 1,
    key: Key[Array, ""],
) -> Bool[Array, "2 rows features"]:
    """What two views show, by any kind of masking.

    Args:
      features: which there are.
      masking: ``"correlated"`` is `correlated_masks`, ``"random"`` and
        ``"random_complementary"`` are `random_masks`; ``"none"`` hides nothing.
      information: of `mutual_information`; read by correlated masking only.
      unranked: features that correlated masking always hides from the first view: ids.
      rows: how many pairs of masks: one for a batch, or one for each item.
      key: of the draws.

    Returns:
      The masks.

    Raises:
      ValueError: if there are not two features of which one could be hidden, or
        information is missing.

    Example:
      >>> features = ItemFeatures({"a": 4, "b": 4}, ("a", "b"))
      >>> masks = draw_masks(features, "random_complementary", key=jax.random.key(0))
      >>> print(masks.sum(axis=0))
      [[1 1]]
    """
    names = features.names
    ranked = np.array([name not in unranked for name in names])
    if masking != "none" and (len(names) < 2 or not ranked.any()):
        raise ValueError(
            f"`features` must be at least two to be hidden, got {names} with "
            f"{tuple(unranked)} not ranked. With an id alone use masking='none' and "
            "drop from its vector."
        )
    if masking == "correlated" and information is None:
        raise ValueError(
            "`information` must be given for correlated masking, got None; compute it "
            "once with `mutual_information`."
        )

    def draw(key: Key[Array, ""]) -> Bool[Array, "2 features"]:
        if masking == "none":
            return jnp.ones((2, len(names)), bool)
        if masking == "correlated" and information is not None:
            return correlated_masks(information, ranked, key=key)
        complementary = masking == "random_complementary"
        return random_masks(len(names), complementary=complementary, key=key)

    return jax.vmap(draw, out_axes=1)(jax.random.split(key, rows))


def augmented(
    features: ItemFeatures,
    items: Items,
    visible: Bool[Array, "rows features"],
    *,
    value_dropout: float = 0.0,
    mask_numbers: bool = False,
    key: Key[Array, ""],
) -> dict[str, Any]:
    """A view: features that are not visible are missing, some flags and words dropped.

    Args:
      features: which there are.
      items: rows of the catalogue.
      visible: what is shown, in one row for all items or a row for each.
      value_dropout: rate at which flags and words are dropped.
      mask_numbers: whether numbers are hidden too: 0, which is the mean. Otherwise they
        are always shown.
      key: of the dropped values.

    Returns:
      Rows like `items`.
    """
    shown = lambda name: visible[:, features.names.index(name)][:, None]
    kept = lambda key, x: jax.random.bernoulli(key, 1 - value_dropout, x.shape)
    fields, found = len(features.fields), dict(items)
    ids = jnp.asarray(items["categorical"])
    found["categorical"] = jnp.where(visible[:, :fields], ids, 0)
    if features.numbers and mask_numbers:
        end = fields + len(features.numbers)
        found["numeric"] = jnp.where(visible[:, fields:end], items["numeric"], 0.0)
    for kind, names in (("multi_hot", features.multi_hot), ("tokens", features.texts)):
        values = dict(items[kind]) if names else {}
        for name in names:
            key, own = jax.random.split(key)
            x = jnp.asarray(values[name])
            values[name] = jnp.where(shown(name) & kept(own, x), x, 0)
        if names:
            found[kind] = values
    return found
