"""BERT: a transformer encoder of texts that normalises after every sum."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Ids = Int[Array | np.ndarray, "batch tokens"]
Mask = Bool[Array | np.ndarray, "batch tokens"]

_ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
}


class MaskedSelfAttention(nn.Module):
    """Multi-head self-attention that does not look at padding.

    As in `mtjax.nn.vit.SelfAttention` kernels have the shape `(width, width)`, so that
    methods which look at the matrices of a model find them.

    Attributes:
      heads: number of heads, a divisor of the width.
    """

    heads: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Mask
    ) -> Float[Array, "batch tokens width"]:
        """Lets every token look at the real tokens."""
        width = x.shape[-1]
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, width // self.heads)
        queries, keys, values = (
            split(nn.Dense(width, name=name)(x)) for name in ("query", "key", "value")
        )
        real = jnp.asarray(mask)[:, None, None, :]
        mixed = jax.nn.dot_product_attention(queries, keys, values, mask=real)
        return nn.Dense(width, name="output")(mixed.reshape(x.shape))


class Layer(nn.Module):
    """A transformer layer that normalises after attention and after its MLP.

    Attributes:
      heads: of the attention.
      hidden: width of the MLP.
      eps: what normalisation adds to variances.
      activation: of the MLP, as in `Bert`.
    """

    heads: int
    hidden: int
    eps: float
    activation: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Mask
    ) -> Float[Array, "batch tokens width"]:
        """Adds what attention and MLP say, and normalises both sums."""
        h = MaskedSelfAttention(self.heads, name="attention")(x, mask)
        x = _norm(self.eps, "attention_norm")(x + h)
        h = _ACTIVATIONS[self.activation](nn.Dense(self.hidden, name="mlp_in")(x))
        return _norm(self.eps, "mlp_norm")(x + nn.Dense(x.shape[-1], name="mlp_out")(h))


class Bert(nn.Module):
    """The BERT encoder, without a head and without dropout.

    Query, key and value are plain kernels of shape `(width, width)`, heads side by side
    in the columns: methods that merge matrices (singular vectors, layer inputs) find
    one matrix per linear map, as they do in a checkpoint of Hugging Face, transposed.
    Layers are named `layer_0`, `layer_1`, …, so that methods that look at depth find
    them too. Trained weights are read by `mtjax.nn.bert_files`.

    Attributes:
      vocabulary: number of token ids.
      width: of tokens.
      depth: number of layers.
      heads: of the attention, a divisor of the width.
      hidden: width of the layers' MLP.
      positions: most tokens of a text.
      segments: number of segment types.
      eps: what normalisation adds to variances.
      activation: of the MLP: `"gelu"` (exact), `"gelu_new"` or `"gelu_pytorch_tanh"`
        (with the hyperbolic tangent), or `"relu"`.

    Raises:
      ValueError: if a text has more tokens than `positions`, `heads` does not divide
        `width`, or `activation` is unknown.

    Example:
      >>> model = Bert(vocabulary=50, width=8, depth=1, heads=2, hidden=16, positions=9)
      >>> ids = jnp.array([[1, 7, 2, 0]])
      >>> mask = ids > 0
      >>> params = jax.jit(model.init)(jax.random.key(0), ids, mask)["params"]
      >>> params["layer_0"]["attention"]["query"]["kernel"].shape
      (8, 8)
      >>> states = jax.jit(model.apply)({"params": params}, ids, mask)
      >>> sentence_vectors(states, mask).shape
      (1, 8)

    References:
      Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
      Understanding", NAACL, 2019. The pooler (a dense layer on the first token, which
      sentence encoders do not use) is left out.
    """

    vocabulary: int = 30_522
    width: int = 384
    depth: int = 6
    heads: int = 12
    hidden: int = 1_536
    positions: int = 512
    segments: int = 2
    eps: float = 1e-12
    activation: str = "gelu"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Bert":
        """The encoder that a `config.json` of Hugging Face describes.

        Args:
          config: its content. Dropout and what is only for training is ignored.

        Returns:
          The model, without parameters.

        Raises:
          ValueError: if it is no BERT, has other than learned absolute positions, or
            lacks a size.

        Example:
          >>> sizes = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1}
          >>> sizes |= {"num_attention_heads": 2, "intermediate_size": 8}
          >>> sizes |= {"max_position_embeddings": 5, "model_type": "bert"}
          >>> Bert.from_config(sizes).width
          4
        """
        wanted = {"model_type": "bert", "position_embedding_type": "absolute"}
        for name, value in wanted.items():
            if (found := config.get(name, value)) != value:
                raise ValueError(
                    f"`config` must have the {name} {value!r}, got {found!r}: other "
                    "architectures have other modules."
                )
        sizes = {
            "vocabulary": "vocab_size",
            "width": "hidden_size",
            "depth": "num_hidden_layers",
            "heads": "num_attention_heads",
            "hidden": "intermediate_size",
            "positions": "max_position_embeddings",
        }
        if missing := [name for name in sizes.values() if name not in config]:
            raise ValueError(
                f"`config` must hold the sizes of a BERT, these are missing: {missing}."
                " Give the content of the model's config.json."
            )
        return cls(
            **{ours: config[theirs] for ours, theirs in sizes.items()},
            segments=config.get("type_vocab_size", 2),
            eps=config.get("layer_norm_eps", 1e-12),
            activation=config.get("hidden_act", "gelu"),
        )

    @nn.compact
    def __call__(
        self, ids: Ids, mask: Mask, segment_ids: Ids | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Encodes texts.

        Args:
          ids: of the tokens, from 0 to `vocabulary`, the first and last of a text being
            those that the model was trained with (`[CLS]` and `[SEP]`).
          mask: which tokens are real; the others are padding, anywhere in the row.
          segment_ids: segment of every token, from 0; 0 for all by default.

        Returns:
          States of the last layer. Those of padding mean nothing.
        """
        if ids.shape[1] > self.positions:
            raise ValueError(
                f"`ids` must have at most {self.positions} tokens per text, got "
                f"{ids.shape[1]}: cut them."
            )
        if self.width % self.heads:
            raise ValueError(
                f"`heads` must divide `width`, got {self.heads} and {self.width}."
            )
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"`activation` must be one of {[*_ACTIVATIONS]}, got "
                f"{self.activation!r}."
            )
        ids = jnp.asarray(ids)
        if segment_ids is None:
            segment_ids = jnp.zeros_like(ids)
        embed = lambda size, name: nn.Embed(
            size, self.width, embedding_init=nn.initializers.normal(0.02), name=name
        )
        x = embed(self.vocabulary, "word_embeddings")(ids)
        x = x + embed(self.segments, "segment_embeddings")(jnp.asarray(segment_ids))
        place = jnp.arange(ids.shape[1])[None]
        x = x + embed(self.positions, "position_embeddings")(place)
        x = _norm(self.eps, "embeddings_norm")(x)
        for i in range(self.depth):
            layer = Layer(
                self.heads, self.hidden, self.eps, self.activation, name=f"layer_{i}"
            )
            x = layer(x, mask)
        return x


def sentence_vectors(
    states: Float[Array, "batch tokens width"], mask: Mask
) -> Float[Array, "batch width"]:
    r"""One unit vector per text: the mean of its real tokens, normalised.

    $$v = \bar h / \|\bar h\|_2, \quad
    \bar h = \sum_i m_i h_i \,/ \sum_i m_i$$

    Args:
      states: of the last layer of an encoder.
      mask: which tokens are real.

    Returns:
      Vectors whose inner products are cosines; zero for a text without tokens.

    Example:
      >>> states = jnp.array([[[3.0, 4.0], [3.0, 4.0], [9.0, 9.0]]])
      >>> print(sentence_vectors(states, jnp.array([[True, True, False]])))
      [[0.6 0.8]]

    References:
      Reimers and Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese
      BERT-Networks", EMNLP, 2019.
    """
    real = jnp.asarray(mask)[..., None]
    total = jnp.sum(jnp.where(real, states, 0), axis=1)
    mean = total / jnp.maximum(jnp.sum(real, axis=1), 1)
    # The length of a zero vector has no gradient: keep away from its square root.
    square = jnp.sum(mean**2, axis=-1, keepdims=True)
    return mean * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def _norm(eps: float, name: str) -> nn.LayerNorm:
    # With an eps this small the difference of two large means would not do.
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, name=name)
