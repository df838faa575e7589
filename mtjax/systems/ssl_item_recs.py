r"""SSL item recommendation: two towers, whose item tower contrasts views.

Self-supervised Learning for Large-scale Item Recommendations, CIKM 2021. A log says
little about most items. Beside the retrieval loss, two views of an item, each with
correlated features hidden from it, must find each other among views of other items that
are drawn uniformly from the catalogue, not from the log.

New here: the model `TwoTower`, `views` of items, `ssl_item_losses` by task with the
paper's baselines, and `alignment_and_uniformity`.

Uses: `mtjax.nn` (`ItemFeatures`; `mutual_information` of its features, `draw_masks`
made of it and `augmented` views; `MLP`, `mean_pool`), `in_batch_softmax_loss`, any
balancer; `mtjax.constant` has alpha.

Needs: pairs of query and item; features of the items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from mtjax.losses.sampled_softmax import in_batch_softmax_loss
from mtjax.losses.unit_vectors import unit_vectors
from mtjax.nn.feature_masks import Masking, augmented, draw_masks
from mtjax.nn.item_features import ItemFeatures, Items, take_items
from mtjax.nn.mlp import MLP
from mtjax.nn.pooling import mean_pool

RETRIEVAL, SSL = "retrieval", "ssl"
Regulariser = Literal["ssl", "feature_dropout", "spread_out", "none"]


@dataclass(frozen=True)
class SSLItemRecsConfig:
    """Towers, views and the second loss.

    Attributes:
      hidden: widths of both towers' layers; the last is that of the vectors.
      temperature: of the retrieval loss, by which cosines are divided; None learns it.
      ssl_temperature: of the contrast of views.
      regulariser: the second loss: ``"ssl"``; ``"spread_out"``, which pushes items
        apart; ``"feature_dropout"``, which hides features in the retrieval loss and
        adds nothing; or ``"none"``.
      masking: ``"correlated"`` (CFM) hides a feature with those that tell it, and shows
        the other view just these; ``"random"`` (RFM) hides half the features of both
        views independently, ``"random_complementary"`` the other half from the second.
      masks_per: one mask for the ``"batch"``, as in public code, or each ``"item"``.
      value_dropout: rate at which flags and words are dropped from the views.
      embedding_dropout: rate of dropout on the views' feature vectors: for items that
        are nothing but an id, with ``masking="none"``.
      mask_numbers: whether numbers are hidden too (0, the mean); kept as published.
      symmetric: whether the second view looks for the first one as well.
      log_q: whether the retrieval loss is corrected for popular items being negatives
        more often. The contrast never is: its items are uniform.
    """

    hidden: tuple[int, ...] = (1024, 128)
    temperature: float | None = 0.07
    ssl_temperature: float = 0.07
    regulariser: Regulariser = "ssl"
    masking: Masking = "correlated"
    masks_per: Literal["batch", "item"] = "batch"
    value_dropout: float = 0.1
    embedding_dropout: float = 0.0
    mask_numbers: bool = False
    symmetric: bool = False
    log_q: bool = True

    def __post_init__(self):
        """Checks choices and ranges."""
        choices = {
            "regulariser": get_args(Regulariser),
            "masking": get_args(Masking),
            "masks_per": ("batch", "item"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}."
                )
        for name in ("value_dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be in [0, 1), got {getattr(self, name)!r}."
                )
        if not self.hidden:
            raise ValueError("`hidden` must name at least one layer, got ().")
        given = (self.temperature or 1.0, self.ssl_temperature)
        if min(given) <= 0 or self.temperature == 0:
            raise ValueError(
                "`temperature` must be positive or None and `ssl_temperature` positive,"
                f" got {self.temperature!r} and {self.ssl_temperature!r}."
            )


class TwoTower(nn.Module):
    """Unit vectors of queries and of items, from shared tables.

    A query is its user and the mean of the features of what the user had before.

    Attributes:
      features: of the items; an id may be one of them.
      num_users: rows of the table of users, of which 0 is for unknown ones; 0 leaves
        users out.
      config: see `SSLItemRecsConfig`.

    Example:
      >>> features = ItemFeatures({"genre": 6}, ("genre",), width=4)
      >>> model = TwoTower(features, 3, SSLItemRecsConfig(hidden=(8, 5)))
      >>> items = {"categorical": jnp.array([[0], [1], [2], [5]])}
      >>> user, history = jnp.array([2]), jnp.array([[3, 0]])
      >>> variables = model.init(jax.random.key(0), items, user, history)
      >>> model.apply(variables, items, user, history).shape  # cosines with all items
      (1, 4)
    """

    features: ItemFeatures
    num_users: int = 0
    config: SSLItemRecsConfig = SSLItemRecsConfig()

    def setup(self) -> None:
        """Makes the towers."""
        init = nn.initializers.normal(self.features.std)
        *inner, width = self.config.hidden
        self.item_hidden, self.query_hidden = MLP(inner), MLP(inner)
        self.item_out, self.query_out = nn.Dense(width), nn.Dense(width)
        self.drop = nn.Dropout(self.config.embedding_dropout)
        if self.num_users:
            width = self.features.width
            self.users = nn.Embed(self.num_users, width, embedding_init=init)
        if self.config.temperature is None:
            zeros = nn.initializers.zeros
            self.log_temperature = self.param("log_temperature", zeros, (1,))

    def __call__(
        self,
        items: Items,
        users: Int[Array | np.ndarray, " batch"] | None,
        history: Int[Array | np.ndarray, "batch length"],
    ) -> Float[Array, "batch items"]:
        """The cosines of queries with all items, which rank them.

        Args:
          items: rows of the catalogue, with nothing hidden; row 0 is padding.
          users: rows of their table; None without one.
          history: rows of earlier items, 0 elsewhere.

        Returns:
          Numbers from -1 to 1.
        """
        q = self.query_vectors(items, users, history)
        return q @ self.item_vectors(items).T

    def item_vectors(
        self, items: Items, *, drop: bool = False
    ) -> Float[Array, "items width"]:
        """The vectors of items.

        Args:
          items: rows of a catalogue.
          drop: whether `embedding_dropout` applies; needs `rngs={"dropout": key}`.

        Returns:
          Vectors of length 1.
        """
        x = self.drop(self._flat(items), deterministic=not drop)
        return unit_vectors(self.item_out(self.item_hidden(x)))

    def query_vectors(
        self,
        items: Items,
        users: Int[Array | np.ndarray, " batch"] | None,
        history: Int[Array | np.ndarray, "batch length"],
    ) -> Float[Array, "batch width"]:
        """The vectors of queries, of length 1; arguments as in `__call__`."""
        history = jnp.asarray(history)
        known = self._flat(take_items(items, history.ravel()))
        x = mean_pool(known.reshape(*history.shape, -1), history > 0)
        if self.num_users:
            x = jnp.concatenate([x, self.users(jnp.asarray(users))], axis=-1)
        return unit_vectors(self.query_out(self.query_hidden(x)))

    def temperature(self) -> float | Float[Array, ""]:
        """That of the retrieval loss; a learned one starts at 0.1."""
        if self.config.temperature is None:
            return 0.1 * jnp.exp(self.log_temperature[0])
        return self.config.temperature

    def _flat(self, items: Items) -> Float[Array, "items features"]:
        vectors = self.features(items)
        return vectors.reshape(len(vectors), -1)


class Views(NamedTuple):
    """The vectors of two views of the same items.

    Attributes:
      first: of the first view.
      second: of the second.
    """

    first: Float[Array, "items width"]
    second: Float[Array, "items width"]


def views(
    model: TwoTower,
    variables: PyTree,
    items: Items,
    information: Float[Array | np.ndarray, "features features"],
    unranked: Sequence[str] = (),
    *,
    key: Key[Array, ""],
) -> Views:
    """Encodes two views of items, with one item tower.

    Args:
      model: with the configuration of the views.
      variables: its parameters.
      items: rows of the catalogue.
      information: see `draw_masks`.
      unranked: see there.
      key: of masks and dropped values.

    Returns:
      The vectors.
    """
    number = len(items["categorical"])
    of_masks, *of_views = jax.random.split(key, 3)
    masks = draw_masks(
        model.features,
        model.config.masking,
        information,
        unranked,
        rows=number if model.config.masks_per == "item" else 1,
        key=of_masks,
    )

    def encode(visible: Array, key: Key[Array, ""]) -> Any:
        of_values, of_vectors = jax.random.split(key)
        view = _hidden(model, items, visible, of_values)
        rngs = {"dropout": of_vectors}
        return model.apply(variables, view, drop=True, method="item_vectors", rngs=rngs)

    return Views(*(encode(mask, key) for mask, key in zip(masks, of_views)))


def contrast(
    pair: Views,
    *,
    temperature: float = 0.07,
    symmetric: bool = False,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""Each first view finds its second one among those of all items.

    .. math::
      L_{ssl} = -\frac1N \sum_i \log
        \frac{e^{\cos(z_i, z'_i) / \tau}}{\sum_j e^{\cos(z_i, z'_j) / \tau}}

    Args:
      pair: unit vectors; items are all different.
      temperature: :math:`\tau > 0`.
      symmetric: whether to take the mean with second views that find the first.
      axis_name: inside `jax.shard_map`, the axis over which items are split: views of
        all devices are negatives.

    Returns:
      The mean over items, in nats.
    """
    form = {"temperature": temperature, "axis_name": axis_name}
    loss = in_batch_softmax_loss(pair.first, pair.second, **form)
    if symmetric:
        loss = (loss + in_batch_softmax_loss(pair.second, pair.first, **form)) / 2
    return loss


def spread_out(z: Float[Array, "items width"]) -> Float[Array, ""]:
    """The mean square of the cosines between different items, a baseline."""
    gram = z @ z.T
    off = 1.0 - jnp.eye(len(z))
    return jnp.sum(off * gram**2) / jnp.sum(off)


def ssl_item_losses(
    model: TwoTower,
    variables: PyTree,
    catalogue: Items,
    batch: Mapping[str, Any],
    drawn: Int[Array, " items"],
    log_q: Float[Array, " catalogue"] | None,
    information: Float[Array | np.ndarray, "features features"],
    unranked: Sequence[str] = (),
    *,
    key: Key[Array, ""],
    axis_name: str | None = None,
) -> dict[str, Float[Array, ""]]:
    r"""The losses of one step, by task.

    .. math:: L = L_{retrieval} + \alpha L_{ssl}

    is what `mtjax.constant({"retrieval": 1.0, "ssl": alpha})` minimises.

    Args:
      model: with its configuration.
      variables: its parameters.
      catalogue: the rows of all items, for `batch` and `drawn`.
      batch: `history` and `target` rows of the catalogue, and `user`.
      drawn: different items, drawn uniformly from those of training. Drawn like
        targets, they are popular ones, and the paper's effect is lost.
      log_q: by row of the catalogue, `mtjax.losses.log_frequencies` of the log; None
        corrects nothing.
      information: see `draw_masks`.
      unranked: see there.
      key: of masks and dropped values; the retrieval loss has no part in it, but for
        feature dropout.
      axis_name: inside `jax.shard_map`, the axis over which batch and draws are split:
        the items of all devices are negatives, in spread-out those of its own. Masks
        are the same on all devices if the key is.

    Returns:
      ``"retrieval"``, and ``"ssl"`` if the configuration has a second loss.
    """
    config, targets = model.config, jnp.asarray(batch["target"])
    users = batch["user"] if model.num_users else None
    apply: Any = partial(model.apply, variables)
    q = apply(catalogue, users, batch["history"], method="query_vectors")
    items = take_items(catalogue, targets)
    if config.regulariser == "feature_dropout":
        of_masks, of_values = jax.random.split(key)
        masks = draw_masks(model.features, "random", key=of_masks)[0]
        items = _hidden(model, items, masks, of_values)
    z = apply(items, method="item_vectors")
    found = {
        RETRIEVAL: in_batch_softmax_loss(
            q,
            z,
            log_q=None if log_q is None or not config.log_q else log_q[targets],
            item_ids=targets,
            temperature=apply(method="temperature"),
            axis_name=axis_name,
        )
    }
    corpus = take_items(catalogue, drawn)
    if config.regulariser == "ssl":
        pair = views(model, variables, corpus, information, unranked, key=key)
        found[SSL] = contrast(
            pair,
            temperature=config.ssl_temperature,
            symmetric=config.symmetric,
            axis_name=axis_name,
        )
    elif config.regulariser == "spread_out":
        loss = spread_out(apply(corpus, method="item_vectors"))
        found[SSL] = loss if axis_name is None else jax.lax.pmean(loss, axis_name)
    return found


def alignment_and_uniformity(pair: Views) -> dict[str, Float[Array, ""]]:
    """Whether views of one item are near and items far apart.

    Args:
      pair: unit vectors.

    Returns:
      The mean cosine of an item's views (``"alignment"``; at 1 from the first steps on
      a feature tells the hidden ones), and of different items (``"uniformity"``).
    """
    cosines = pair.first @ pair.second.T
    number = len(cosines)
    own = jnp.trace(cosines)
    return {
        "alignment": own / number,
        "uniformity": (jnp.sum(cosines) - own) / (number * (number - 1)),
    }


def _hidden(model: TwoTower, items: Items, visible: Array, key: Array) -> Items:
    config = model.config
    return augmented(
        model.features,
        items,
        visible,
        value_dropout=config.value_dropout,
        mask_numbers=config.mask_numbers,
        key=key,
    )
