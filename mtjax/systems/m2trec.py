r"""M2TRec: next items from metadata alone, categories beside.

M2TRec: Metadata-aware Multi-task Transformer for Large-scale and Cold-start free
Session-based Recommendations, RecSys 2022. An item is nothing but its metadata, at the
input and at the output, so that memory does not grow with the catalogue and an item is
recommended on the day it arrives. The session also predicts the next item's categories.

New here: the model `M2TRec` with its tied output, `m2trec_losses` by task (and
`sampled_losses` for large catalogues), `recommend`, `equal_metadata`.

Uses: `mtjax.nn` (`ItemFeatures`, `SequenceEncoder`), `mtjax.losses` (`masked_mean`,
`sampled_softmax_loss`), any balancer; `mtjax.constant` has the lambdas.

Needs: sessions of items; a catalogue with categories, flags or words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from mtjax.losses.masked import masked_mean
from mtjax.losses.sampled_softmax import sampled_softmax_loss
from mtjax.losses.unit_vectors import unit_vectors
from mtjax.nn.fields import FIRST_KNOWN
from mtjax.nn.item_features import ItemFeatures, Items, take_items
from mtjax.nn.sequence_encoder import SequenceEncoder

ITEM = "item"
History = Int[Array | np.ndarray, "batch length"]


@dataclass(frozen=True)
class M2TRecConfig:
    """Sizes, and what the next item is read from.

    Attributes:
      width: of items and sessions.
      layers: of the transformer, 1 to 4 in the literature.
      heads: of its attention, a divisor of `width`.
      hidden: width of the layers' MLP.
      dropout: rate in the transformer, in [0, 1).
      max_length: longest session; of longer ones, give the last items.
      output: ``"tied"`` scores an item by its metadata; ``"linear"`` has a row per item
        of training, as re-implementations do: it can never recommend another.
      temperature: None scores by inner products, as above; a number > 0 by cosines
        divided by it.
      category_bias: whether a learned number per category value is added to the score
        of its items. Metadata alone cannot favour a popular item over its twins.
    """

    width: int = 128
    layers: int = 2
    heads: int = 2
    hidden: int = 512
    dropout: float = 0.1
    max_length: int = 100
    output: Literal["tied", "linear"] = "tied"
    temperature: float | None = None
    category_bias: bool = False

    def __post_init__(self):
        """Checks the ranges that nothing else checks."""
        if min(self.width, self.layers, self.heads, self.hidden, self.max_length) < 1:
            raise ValueError(f"sizes of `M2TRecConfig` must be at least 1, got {self}.")
        if self.width % self.heads:
            raise ValueError(
                f"`heads` must divide `width`, got {self.heads} and {self.width}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout!r}.")
        if self.output not in ("tied", "linear"):
            raise ValueError(
                f"`output` must be 'tied' or 'linear', got {self.output!r}."
            )
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(
                f"`temperature` must be positive or None, got {self.temperature!r}."
            )


class Scores(NamedTuple):
    """What `M2TRec` says of a session.

    Attributes:
      items: `(batch, items)` logits of the rows that were given.
      levels: `(batch, values)` logits by category level; value i has the id i + 2.
    """

    items: Float[Array, "batch items"]
    levels: dict[str, Float[Array, "batch values"]]


class M2TRec(nn.Module):
    r"""The model: items from metadata, a session from its items, heads.

    .. math::
      v_i = W [e_1; \dots; e_K] + b, \quad s = mean(Transformer(v_{i_l} + p_l)), \quad
      logit_j = \langle W_s s, v_j \rangle

    Attributes:
      features: of the items. A field with the item's own number would break what the
        method promises.
      levels: category fields that are predicted, the coarsest first.
      config: see `M2TRecConfig`.
      num_items: rows of the catalogue that training has, for a linear output only;
        rows behind them get the lowest score there is.

    Raises:
      ValueError: if a level is no field, or `num_items` does not go with the output.

    Example:
      >>> features = ItemFeatures({"genre": 6}, ("genre",), width=4)
      >>> model = M2TRec(features, ("genre",), M2TRecConfig(width=8, max_length=5))
      >>> items = {"categorical": jnp.array([[0], [1], [2], [5], [5]])}
      >>> history = jnp.array([[2, 3, 0]])
      >>> variables = model.init(jax.random.key(0), items, history)
      >>> scores = model.apply(variables, items, history)
      >>> scores.items.shape, scores.levels["genre"].shape
      ((1, 5), (1, 4))

    References:
      M2TRec, RecSys 2022. The output layer is not described there beyond doubt; tied to
      the metadata it keeps the promise at the output as well.
    """

    features: ItemFeatures
    levels: tuple[str, ...] = ()
    config: M2TRecConfig = M2TRecConfig()
    num_items: int | None = None

    def setup(self) -> None:
        """Makes the encoders and the heads."""
        config, sizes = self.config, self.features.vocabulary_sizes
        if strange := sorted(set(self.levels) - set(self.features.fields)):
            raise ValueError(
                f"`levels` must name `fields` {self.features.fields}, got {strange}."
            )
        if config.category_bias and not self.levels:
            raise ValueError("`category_bias` needs `levels`, got none.")
        if (config.output == "linear") != (self.num_items is not None):
            raise ValueError(
                "`num_items` must be given for the linear output and only there, got "
                f"{self.num_items!r} with output={config.output!r}."
            )
        self.item = nn.Dense(config.width)
        self.session = SequenceEncoder(
            config.layers,
            config.heads,
            config.hidden,
            config.dropout,
            config.max_length,
        )
        self.query = nn.Dense(config.width, use_bias=False)
        if self.num_items is not None:
            self.rows = nn.Dense(self.num_items)
        self.level = {x: nn.Dense(sizes[x] - FIRST_KNOWN) for x in self.levels}
        zeros = nn.initializers.zeros
        if config.category_bias:
            self.bias = {
                x: self.param(f"bias_{x}", zeros, (sizes[x],)) for x in self.levels
            }

    def __call__(
        self, items: Items, history: History, *, train: bool = False
    ) -> Scores:
        """Scores all items after every session.

        Args:
          items: rows of the catalogue; row 0 is padding.
          history: rows of the items of each session, the oldest first, 0 elsewhere.
          train: whether to drop.

        Returns:
          The logits. Rows 0 and 1 have some as well, which mean nothing.
        """
        vectors = self.item_vectors(items)
        history = jnp.asarray(history)
        s = self.session(vectors[history], history > 0, train=train)
        if self.num_items is None:
            logits = self.queries(s) @ self.keys(items, vectors).T
        else:
            lowest = float(jnp.finfo(s.dtype).min)
            logits = self.rows(s)[:, : len(vectors)]
            beyond = ((0, 0), (0, len(vectors) - logits.shape[1]))
            logits = jnp.pad(logits, beyond, constant_values=lowest)
        return Scores(logits, self.level_logits(s))

    def item_vectors(self, items: Items) -> Float[Array, "items width"]:
        """The vectors of items, each from its metadata alone."""
        features = self.features(items)
        return self.item(features.reshape(len(features), -1))

    def queries(self, s: Float[Array, "batch width"]) -> Float[Array, "batch key"]:
        """What a session is compared with items by."""
        q = self.query(s)
        if self.config.temperature is not None:
            q = unit_vectors(q) / self.config.temperature
        if not self.config.category_bias:
            return q
        return jnp.concatenate([q, jnp.ones_like(q[:, :1])], axis=1)

    def keys(
        self, items: Items, vectors: Float[Array, "items width"]
    ) -> Float[Array, "items key"]:
        """What items are compared with sessions by: vectors, and the bias beside."""
        z = vectors if self.config.temperature is None else unit_vectors(vectors)
        if not self.config.category_bias:
            return z
        ids, names = jnp.asarray(items["categorical"]), self.features.fields
        parts = [self.bias[x][ids[:, names.index(x)]] for x in self.levels]
        return jnp.concatenate([z, jnp.sum(jnp.stack(parts, 1), 1)[:, None]], axis=1)

    def level_logits(
        self, s: Float[Array, "batch width"]
    ) -> dict[str, Float[Array, "batch values"]]:
        """The logits of the category levels."""
        return {name: head(s) for name, head in self.level.items()}


def m2trec_losses(
    model: M2TRec,
    scores: Scores,
    items: Items,
    targets: Int[Array, " batch"],
    candidates: Bool[Array | np.ndarray, " items"],
) -> dict[str, Float[Array, ""]]:
    r"""The cross-entropies of the next item and of its categories.

    .. math:: L = L_{item} + \sum_m \lambda_m L_m

    is what `mtjax.constant({"item": 1, level: lambda, ...})` minimises; the paper's
    lambda is 1.

    Args:
      model: for the names of fields and levels.
      scores: what it says.
      items: the catalogue that was scored.
      targets: rows of the next items.
      candidates: which rows the softmax is over: the items of training. A target that
        is none of them does not count for `"item"`.

    Returns:
      The mean over sessions by task, in nats. A target whose category is missing or
      unknown does not count for that level.
    """
    lowest = jnp.finfo(scores.items.dtype).min
    candidates = jnp.asarray(candidates)
    logits = jnp.where(candidates[None], scores.items, lowest)
    error = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    found = {ITEM: masked_mean(error, candidates[targets])}
    return found | _level_losses(model, scores.levels, items, targets)


def sampled_losses(
    model: M2TRec,
    variables: PyTree,
    items: Items,
    history: Int[Array, "batch length"],
    targets: Int[Array, " batch"],
    negatives: Int[Array, " draws"],
    log_q: Float[Array, " draws"],
    *,
    key: Key[Array, ""] | None = None,
) -> dict[str, Float[Array, ""]]:
    """`m2trec_losses` of a large catalogue, of which only a few items are encoded.

    Args:
      model: with a tied output.
      variables: its parameters.
      items: the catalogue.
      history: rows of the items of each session.
      targets: rows of the next items, all of training.
      negatives: rows that were drawn, for all sessions.
      log_q: logarithm of the probability of each of these draws.
      key: for dropout; None does not drop.

    Returns:
      The losses by task; that of the item is `mtjax.losses.sampled_softmax_loss`.

    Raises:
      ValueError: if the output is linear.
    """
    if model.config.output == "linear":
        raise ValueError("`model` must have a tied output, got a linear one.")

    def encode(module: M2TRec) -> tuple[Array, ...]:
        flat = module.item_vectors(take_items(items, history.ravel()))
        sequence = flat.reshape(*history.shape, -1)
        s = module.session(sequence, history > 0, train=key is not None)
        ends = (take_items(items, targets), take_items(items, negatives))
        keys = (module.keys(x, module.item_vectors(x)) for x in ends)
        return s, module.queries(s), *keys

    rngs = None if key is None else {"dropout": key}
    encoded: Any = model.apply(variables, method=encode, rngs=rngs)
    s, queries, ours, others = encoded
    levels: Any = model.apply(variables, s, method="level_logits")
    ids = {"positive_ids": targets, "negative_ids": negatives}
    found = {ITEM: sampled_softmax_loss(queries, ours, others, log_q, **ids)}
    return found | _level_losses(model, levels, items, targets)


def recommend(
    scores: Float[Array, "batch items"],
    k: int,
    *,
    excluded: Bool[Array, "batch items"] | Bool[Array, " items"],
) -> Int[Array, "batch k"]:
    """The `k` best rows of every session, the best first.

    Of items with equal scores, such as those with equal metadata, the one that stands
    first in the catalogue comes first. (`mtjax.training.full_ranks` gives them all the
    mean of their ranks, so that no metric profits from the order.)

    Args:
      scores: logits of all rows.
      k: how many, at most the number of rows.
      excluded: rows that must not be recommended: at least 0 and 1, perhaps what has
        been seen.

    Returns:
      Rows of the catalogue. Excluded ones come last, if there are too few others.

    Example:
      >>> scores = jnp.array([[9.0, 9.0, 1.0, 2.0, 2.0]])
      >>> print(recommend(scores, 2, excluded=jnp.arange(5) < 2))
      [[3 4]]
    """
    excluded = jnp.broadcast_to(excluded, scores.shape)
    return jax.lax.top_k(jnp.where(excluded, -jnp.inf, scores), k)[1]


def equal_metadata(items: Items) -> Int[np.ndarray, " items"]:
    """Which items nothing but chance can tell apart.

    Args:
      items: rows of a catalogue.

    Returns:
      A number per row, the same for rows with equal metadata: with few distinct ones
      the metadata are too poor to recommend from.

    Example:
      >>> equal_metadata({"categorical": np.array([[4, 2], [3, 2], [4, 2]])}).tolist()
      [1, 0, 1]
    """
    columns = [np.asarray(x, np.float64) for x in jax.tree.leaves(dict(items))]
    return np.unique(np.concatenate(columns, axis=1), axis=0, return_inverse=True)[1]


def _level_losses(
    model: M2TRec, logits: Mapping[str, Array], items: Items, targets: Array
) -> dict[str, Array]:
    ids = jnp.asarray(items["categorical"])[targets]
    found = {}
    for name in model.levels:
        label = ids[:, model.features.fields.index(name)] - FIRST_KNOWN
        error = optax.softmax_cross_entropy_with_integer_labels(
            logits[name], jnp.maximum(label, 0)
        )
        found[name] = masked_mean(error, label >= 0)
    return found
